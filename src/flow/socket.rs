//! UDP sockets: the listening ones, which learn what address was asked, and one for each flow, connected to its backend.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::io::Errno;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ip_recvtos, set_ipv6_mtu_discover,
    set_ipv6_recvtclass, socket_cookie,
};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::drops::KernelDrops;
use super::retirement::SocketRetirement;
use super::table::FlowPath;
use crate::account::udp_drops::DatagramDrop;
use crate::addr::{BackendAddr, PeerAddr};
use crate::connect;
use crate::fault::{self, Syscall};
use crate::proxy_protocol;

/// Messages that are received in one call.
pub(super) const BATCH: usize = quinn_udp::BATCH_SIZE;

/// Room for each: the longest datagram of all, and all that the kernel puts together.
pub(super) const ROOM: usize = 64 * 1024;

/// Datagrams that the kernel takes in one call for one receiver (`UDP_MAX_SEGMENTS` in include/linux/udp.h) ...
pub(super) const SEGMENTS: usize = 64;

/// ... and their bytes: with the headers in front they have to fit 16 bits.
pub(super) const TOGETHER: usize = 65_000;

/// The longest that go together: what Ethernet carries of IPv6. Kernels before 6.14 refuse longer ones than the way allows by
/// an error (EINVAL) that says nothing of the length, and by themselves they may be cut in pieces.
pub(super) const EACH: usize = 1_452;

/// The longest payload of a datagram over IPv4: 16 bits, without the headers of IP and UDP.
pub(super) const LONGEST: usize = 65_507;

/// Bytes of a socket's receive queue, of a listening one's and of a flow's own: what comes while a worker is at other work. The kernel cuts it to
/// `net.core.rmem_max`.
const QUEUE: usize = 4 * 1024 * 1024;

/// Where a datagram lies in what was received.
pub(super) type Span = Range<usize>;

/// Where the datagrams lie that the kernel put together, one by one: all of one length, but for a shorter last one.
pub(super) fn datagrams(at: usize, len: usize, each: usize) -> impl Iterator<Item = Span> {
    let each = each.max(1);
    // One of no bytes is one.
    let count = len.div_ceil(each).max(1);
    (0..count).map(move |place| at + place * each..at + len.min((place + 1) * each))
}

/// A UDP listening socket of one worker.
#[derive(Debug)]
pub(super) struct UdpListenSocket {
    socket: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// The place of its listener: of the one whose flows begin here.
    listener: Cell<u32>,
    /// What is asked of a header, as it was when the last batch came; `None` where there is none.
    pub(super) header: Cell<Option<proxy_protocol::ParserRules>>,
    /// Whether a datagram without a header may belong to the one flow of its sender; as it was then.
    pub(super) follows_bare: Cell<bool>,
    /// The kernel's own number of the socket, in whatever process.
    pub(super) cookie: u64,
    /// What the kernel has dropped here, as far as it is counted.
    drops: Cell<KernelDrops>,
    /// Held by each of its flows.
    pub(super) flows: Rc<()>,
    /// While it closes: the workers that have flows there, and whether this one is no more among them.
    closing: RefCell<Option<(Arc<SocketRetirement>, bool)>>,
    /// Once it is closed.
    closed: Notify,
    is_closed: Cell<bool>,
    address: SocketAddr,
    /// Whether it hears on every address of the machine: then answers leave from the one that was asked.
    is_wildcard: bool,
}

impl UdpListenSocket {
    /// Takes over a bound socket.
    ///
    /// # Errors
    /// Where the system or the runtime refuses it.
    pub(super) fn new(socket: UdpSocket, listener: u32) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let address = socket.local_addr()?;
        // What quinn-udp forbids for QUIC's sake is a datagram longer than the way allows; here it may be cut in pieces.
        if address.is_ipv4() {
            set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::WANT)?;
        } else {
            set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::WANT)?;
            setsockopt(&socket, sockopt::Ipv6DontFrag, &false)?;
        }
        let cookie = socket_cookie(&socket)?;
        let is_wild = address.ip().is_unspecified();
        disable_unused_options(&socket, address, is_wild)?;
        SockRef::from(&socket).set_recv_buffer_size(QUEUE)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; a std UdpSocket keeps its descriptor, as both ask"
        )]
        let socket = AsyncFd::new(socket)?;
        let (flows, closing, closed) = (Rc::default(), RefCell::default(), Notify::new());
        let (header, is_closed) = (Cell::default(), Cell::new(false));
        Ok(Self {
            socket,
            state,
            listener: Cell::new(listener),
            header,
            follows_bare: Cell::new(false),
            cookie,
            drops: Cell::default(),
            flows,
            closing,
            closed,
            is_closed,
            address,
            is_wildcard: is_wild,
        })
    }

    /// The same with another socket, for the flows that there are.
    ///
    /// # Errors
    /// Where the system or the runtime refuses it.
    pub(super) fn replaced_by(&self, socket: UdpSocket) -> io::Result<Self> {
        let fresh = Self::new(socket, self.listener())?;
        fresh.header.set(self.header.get());
        Ok(Self { flows: Rc::clone(&self.flows), ..fresh })
    }

    /// A copy of the socket.
    pub(super) fn try_clone(&self) -> Option<OwnedFd> {
        self.socket.get_ref().as_fd().try_clone_to_owned().ok()
    }

    /// The place of its listener.
    pub(super) fn listener(&self) -> u32 {
        self.listener.get()
    }

    /// Whether it is a listener's, at this address.
    pub(super) fn is_at(&self, listener: u32, address: SocketAddr) -> bool {
        self.listener() == listener && self.address == address
    }

    /// Stops opening flows here.
    pub(super) fn close(&self, vacancy: Arc<SocketRetirement>) {
        self.closing.replace(Some((vacancy, false)));
    }

    /// Opens flows again, for this listener.
    pub(super) fn reopen(&self, listener: u32) {
        self.listener.set(listener);
        self.closing.replace(None);
    }

    /// How many datagrams the kernel has dropped here since the last call.
    pub(super) fn take_drops(&self) -> u64 {
        let mut drops = self.drops.get();
        let count = drops.take(self.socket.get_ref());
        self.drops.set(drops);
        count
    }

    /// Whether no flow begins here any more.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Whether it is closed.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.get()
    }

    /// Closes it where it closes and no worker has a flow here any more; whether that is so.
    pub(super) fn is_vacant(&self, is_complete: impl Fn(&SocketRetirement) -> bool) -> bool {
        let mut closing = self.closing.borrow_mut();
        let Some((vacancy, has_left)) = closing.as_mut() else { return false };
        // One that comes from another process may come late.
        let is_empty = Rc::strong_count(&self.flows) == 1;
        if !*has_left && is_empty {
            *has_left = true;
            vacancy.worker_done();
        }
        let is_vacant = is_empty && is_complete(vacancy);
        if is_vacant {
            self.is_closed.set(true);
            self.closed.notify_one();
        }
        is_vacant
    }

    /// Waits until there is something to receive, and has `take` receive it. `take` tells whether it has taken all.
    ///
    /// # Errors
    /// What broke the socket.
    pub(super) async fn readable(&self, take: impl FnOnce(&Self) -> io::Result<bool>) -> io::Result<()> {
        let mut ready = tokio::select! {
            ready = self.socket.readable() => ready?,
            () = self.closed.notified() => return Ok(()),
        };
        match take(self) {
            Ok(true) => ready.clear_ready(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Ok(false) => {
                drop(ready);
                tokio::task::yield_now().await;
            }
            // What was sent before has come back as an error: it is the receiver's, and says nothing of this socket.
            Err(error) if is_peer_error(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Receives as many messages as there are and fit.
    pub(super) fn receive(&self, room: &mut [u8], metas: &mut [RecvMeta]) -> io::Result<usize> {
        self.receive_from(self.socket.get_ref(), room, metas)
    }

    /// Receives in the same way from another socket: one that is connected to a backend.
    pub(super) fn receive_from(
        &self,
        socket: &UdpSocket,
        room: &mut [u8],
        metas: &mut [RecvMeta],
    ) -> io::Result<usize> {
        fault::at(Syscall::ReceiveDatagram)?;
        let count = metas.len().min(room.len() / ROOM).min(BATCH);
        let mut rooms = room.chunks_exact_mut(ROOM);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
        self.state.recv(UdpSockRef::from(socket), slices.get_mut(..count).unwrap_or_default(), metas)
    }

    /// The address that was asked, where the socket's own does not tell.
    pub(super) fn local_address(&self, meta: &RecvMeta) -> Option<IpAddr> {
        meta.dst_ip.filter(|_| self.is_wildcard)
    }

    /// The bound address.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What was asked by a datagram of this path.
    pub(super) fn destination(&self, path: FlowPath) -> SocketAddr {
        SocketAddr::new(path.local.unwrap_or(self.address.ip()), self.address.port())
    }

    /// Whether datagrams of one length may go out together.
    pub(super) fn has_gso(&self) -> bool {
        self.state.max_gso_segments() > 1
    }

    /// Sends a datagram, or several of the length `each`.
    pub(super) fn send(
        &self,
        contents: &[u8],
        each: Option<usize>,
        to: PeerAddr,
        from: Option<IpAddr>,
    ) -> Result<(), DatagramDrop> {
        let transmit = || {
            fault::at(Syscall::SendDatagram)?;
            if each.is_none() && from.is_none() {
                let sent = rustix::net::sendto(self.socket.get_ref(), contents, SendFlags::empty(), &to.0);
                return sent.map(|_| ()).map_err(io::Error::from);
            }
            let what = Transmit { destination: to.0, ecn: None, contents, segment_size: each, src_ip: from };
            self.state.try_send(UdpSockRef::from(self.socket.get_ref()), &what)
        };
        // The kernel reports an ICMP error of an earlier datagram once, at the next call.
        let sent = transmit().or_else(|error| if is_peer_error(&error) { transmit() } else { Err(error) });
        sent.map_err(|error| drop_reason(&error))
    }
}

/// Switches off control messages that quinn-udp asks for and nothing here reads: congestion marks, times of
/// arrival and, where the socket has but one address, the address that was asked.
fn disable_unused_options(socket: &UdpSocket, address: SocketAddr, is_wild: bool) -> io::Result<()> {
    setsockopt(socket, sockopt::ReceiveTimestampns, &false)?;
    if address.is_ipv4() {
        set_ip_recvtos(socket, false)?;
        setsockopt(socket, sockopt::Ipv4PacketInfo, &is_wild)?;
    } else {
        set_ipv6_recvtclass(socket, false)?;
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &is_wild)?;
    }
    Ok(())
}

/// A socket connected to this backend; datagrams from other addresses are not received.
///
/// # Errors
/// What the system says.
pub(super) fn connect(address: BackendAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    fault::at(Syscall::Socket)?;
    let socket = Socket::new(Domain::for_address(address.0), kind, Some(Protocol::UDP))?;
    if let Some(source) = source {
        fault::at(Syscall::Bind)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.set_recv_buffer_size(QUEUE)?;
    fault::at(Syscall::Connect)?;
    socket.connect(&address.0.into())?;
    if connect::is_connected_to_itself(&socket, address) {
        return Err(Errno::CONNREFUSED.into());
    }
    Ok(socket.into())
}

/// Receives one datagram from a connected socket without GRO ([`enable_gro`]).
///
/// # Errors
/// What the system says.
pub(super) fn receive_one(socket: &UdpSocket, room: &mut [u8]) -> io::Result<usize> {
    fault::at(Syscall::ReceiveDatagram)?;
    Ok(rustix::net::recv(socket, room, RecvFlags::empty())?.1)
}

/// From now on the kernel may put together what comes in at a socket; one that cannot hands out each datagram by itself.
pub(super) fn enable_gro(socket: &UdpSocket) {
    setsockopt(socket, sockopt::UdpGroSegment, &true).unwrap_or_default();
}

/// Sends one datagram over a connected socket: what stands in front of it, and itself.
///
/// # Errors
/// What the system says.
pub(super) fn send(socket: &UdpSocket, front: &[u8], payload: &[u8]) -> io::Result<()> {
    fault::at(Syscall::SendDatagram)?;
    let sent = if front.is_empty() {
        rustix::net::send(socket, payload, SendFlags::empty())
    } else {
        let parts = [IoSlice::new(front), IoSlice::new(payload)];
        let mut none = SendAncillaryBuffer::default();
        rustix::net::sendmsg(socket, &parts, &mut none, SendFlags::empty())
    };
    sent.map(|_| ()).map_err(io::Error::from)
}

/// Sends several datagrams over a connected socket, all but the last `each` bytes long, in one call.
///
/// # Errors
/// What the system says; none was sent then.
pub(super) fn send_segments(socket: &UdpSocket, parts: &[IoSlice<'_>], each: u16) -> io::Result<()> {
    fault::at(Syscall::SendDatagram)?;
    let each = ControlMessage::UdpGsoSegments(&each);
    sendmsg::<()>(socket.as_raw_fd(), parts, &[each], MsgFlags::empty(), None)?;
    Ok(())
}

/// Whether the kernel, or a driver behind it, does not take datagrams together: each may still pass by itself.
pub(super) fn is_gso_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::IO | Errno::INVAL | Errno::OPNOTSUPP))
}

/// Whether the path takes no datagram of that length. Of several together that is no answer: by itself each may be cut in
/// pieces. Nor is it one where an earlier datagram has brought it back: the kernel knows the path better now.
pub(super) fn is_too_long(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::MSGSIZE)
}

/// Whether an error is what the network says of an earlier datagram.
pub(super) fn is_peer_error(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNREFUSED
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                // What a firewall that rejects says over IPv6 (`icmp6_err_convert` in net/ipv6/icmp.c).
                | Errno::ACCESS
                | Errno::NOPROTOOPT
                | Errno::PROTO
                | Errno::INTR
        )
    )
}

/// Why a datagram was not taken.
pub(super) fn drop_reason(error: &io::Error) -> DatagramDrop {
    match Errno::from_io_error(error) {
        Some(Errno::AGAIN) => DatagramDrop::Full,
        Some(Errno::MSGSIZE) => DatagramDrop::TooLong,
        Some(Errno::NOBUFS | Errno::NOMEM) => DatagramDrop::Shortage,
        Some(Errno::CONNREFUSED) => DatagramDrop::Refused,
        _ => DatagramDrop::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart() {
        for (errno, expected) in [
            (Errno::AGAIN, DatagramDrop::Full),
            (Errno::MSGSIZE, DatagramDrop::TooLong),
            (Errno::NOBUFS, DatagramDrop::Shortage),
            (Errno::CONNREFUSED, DatagramDrop::Refused),
            (Errno::NETUNREACH, DatagramDrop::Unreachable),
        ] {
            assert_eq!(drop_reason(&errno.into()), expected);
        }
        assert!([Errno::CONNREFUSED, Errno::ACCESS].into_iter().all(|errno| is_peer_error(&errno.into())));
        assert!(!is_peer_error(&Errno::BADF.into()));
        assert!(is_gso_unsupported(&Errno::IO.into()) && !is_gso_unsupported(&Errno::MSGSIZE.into()));
        assert!(is_too_long(&Errno::MSGSIZE.into()) && !is_too_long(&Errno::IO.into()));
    }

    #[test]
    fn coalesced_datagrams_arrive_one_by_one_without_gro() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = connect(BackendAddr(receiver.local_addr().unwrap()), None).unwrap();
        send(&sender, b"front-", b"payload").unwrap();
        send(&sender, b"", b"").unwrap();
        let parts = [b"one".as_slice(), b"two", b"3"].map(IoSlice::new);
        send_segments(&sender, &parts, 3).unwrap();
        let mut room = [0; 100];
        for expected in ["front-payload", "", "one", "two", "3"] {
            let count = receiver.recv(&mut room).unwrap();
            assert_eq!(&room[..count], expected.as_bytes());
        }
    }
}
