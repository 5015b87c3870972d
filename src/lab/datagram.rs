//! Sockets of the lab that take and give many datagrams in one call, as the proxy's own do: what is measured is then the
//! proxy, and it is spoken to as a network card would speak, which puts together what belongs together.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, set_ip_mtu_discover, set_socket_recv_buffer_size, set_socket_recv_buffer_size_force,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::toward;

/// The longest datagram over IPv4, and so the longest run of them in one call.
const LONGEST: usize = 65_507;

/// Where one message of the kernel's fits, however much of it was put together.
const EACH: usize = 1 << 16;

/// Messages taken in one call.
const BATCH: usize = 8;

/// Bytes that a socket may hold until they are taken.
const QUEUE: usize = 8 << 20;

/// Where datagrams are received. Sockets of one thread share it.
pub(super) struct ReceiveBuffer {
    bytes: Vec<u8>,
    metas: [RecvMeta; BATCH],
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self { bytes: vec![0; BATCH * EACH], metas: [RecvMeta::default(); BATCH] }
    }
}

/// A socket for datagrams.
pub(super) struct DatagramPort {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl DatagramPort {
    pub(super) async fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address).await?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // quinn-udp has longer datagrams refused than the path takes whole; here they may be cut in pieces.
        if address.is_ipv4() {
            set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::WANT)?;
        }
        // What waits here is not what is measured. Beyond the system's bound only root may go.
        if set_socket_recv_buffer_size_force(&socket, QUEUE).is_err() {
            set_socket_recv_buffer_size(&socket, QUEUE)?;
        }
        // The runtime takes a new socket for one that is full until it has heard otherwise.
        socket.writable().await?;
        Ok(Self { socket, state })
    }

    /// One that speaks to this address alone.
    pub(super) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let port = Self::bind(toward(address)).await?;
        port.socket.connect(address).await?;
        Ok(port)
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    pub(super) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Takes what has come: `run` is given the sender, one or more datagrams side by side, and the length of each; the
    /// last may be shorter.
    ///
    /// # Errors
    /// `WouldBlock` where nothing has come; what an earlier datagram has brought back.
    pub(super) fn receive(
        &self,
        room: &mut ReceiveBuffer,
        mut run: impl FnMut(SocketAddr, &mut [u8], usize),
    ) -> io::Result<()> {
        let ReceiveBuffer { bytes, metas } = room;
        let mut parts = bytes.chunks_exact_mut(EACH);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        let received = self.socket.try_io(Interest::READABLE, || {
            self.state.recv(UdpSockRef::from(&self.socket), &mut slices, metas)
        });
        let count = received?;
        for (meta, bytes) in metas.iter().zip(bytes.chunks_exact_mut(EACH)).take(count) {
            // The kernel gives no length of each for a datagram of no bytes.
            run(meta.addr, bytes.get_mut(..meta.len).unwrap_or_default(), meta.stride.max(1));
        }
        Ok(())
    }

    /// Sends datagrams that lie side by side, each of this length but for a shorter last one; how many bytes were taken.
    ///
    /// # Errors
    /// Where the first was not taken: `WouldBlock` with a full buffer, and what an earlier datagram has brought back.
    pub(super) fn send(&self, to: SocketAddr, bytes: &[u8], each: usize) -> io::Result<usize> {
        let mut done = 0;
        loop {
            let rest = bytes.get(done..).unwrap_or_default();
            let run = rest.get(..self.together(each)).unwrap_or(rest);
            match self.send_run(to, run, each) {
                Ok(()) => done += run.len(),
                // The kernel, or a card, takes none together: the state knows that now.
                Err(_) if run.len() > each && self.together(each) <= each => continue,
                Err(error) if done == 0 => return Err(error),
                Err(_) => return Ok(done),
            }
            if done >= bytes.len() {
                return Ok(done);
            }
        }
    }

    /// The longest run of datagrams of this length that goes out in one call.
    fn together(&self, each: usize) -> usize {
        let count = (LONGEST / each.max(1)).clamp(1, self.state.max_gso_segments().max(1));
        count * each.max(1)
    }

    fn send_run(&self, to: SocketAddr, run: &[u8], each: usize) -> io::Result<()> {
        let segment_size = Some(each).filter(|each| run.len() > *each);
        let transmit = Transmit { destination: to, ecn: None, contents: run, segment_size, src_ip: None };
        self.socket
            .try_io(Interest::WRITABLE, || self.state.try_send(UdpSockRef::from(&self.socket), &transmit))
    }
}
