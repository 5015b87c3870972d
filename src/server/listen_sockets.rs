//! Listening sockets: every worker has its own socket for each address, and the kernel spreads connections over them.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Socket, Type};

use super::StartError;
use super::inherit::InheritedSockets;
use crate::config::{self, Config, PoolConfig, Protocol};
use crate::fault::{self, Syscall};

/// Connections that may wait to be accepted, for each socket; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// Identifies a listening socket: listener index, protocol and address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ListenSocketId {
    pub(super) listener: u32,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
}

impl ListenSocketId {
    pub(super) fn is_udp(&self) -> bool {
        self.protocol == Protocol::Udp
    }
}

/// The listening sockets of all workers.
#[derive(Debug)]
pub(super) struct ListenSockets {
    /// Every address, in the order of the configuration.
    pub(super) held: Vec<BoundListener>,
    /// For each worker: its sockets, each with the place of its listener.
    pub(super) sockets: Vec<Vec<(u32, BoundSocket)>>,
}

/// A bound address of a listener; each worker has its own socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct BoundListener {
    /// As it stands in the configuration, perhaps without a port.
    pub(super) configured: SocketAddr,
    pub(super) socket: ListenSocketId,
}

/// A socket of one worker, by its listener's protocol.
#[derive(Debug)]
pub(super) enum BoundSocket {
    /// Connections are accepted here.
    Tcp(TcpListener),
    /// Datagrams are received here.
    Udp(UdpSocket),
}

impl ListenSockets {
    /// The addresses of so many listeners, by place.
    pub(super) fn addresses(&self, listeners: usize) -> Vec<Vec<SocketAddr>> {
        let mut addresses = vec![Vec::new(); listeners];
        for held in &self.held {
            if let Some(own) = addresses.get_mut(held.socket.listener as usize) {
                own.push(held.socket.address);
            }
        }
        addresses
    }
}

/// Binds every address of every listener, once for each worker, except inherited ones.
pub(super) fn bind_all(
    config: &Config,
    workers: usize,
    inherited: &mut InheritedSockets,
) -> Result<ListenSockets, StartError> {
    let mut sockets = ListenSockets { held: Vec::new(), sockets: (0..workers).map(|_| Vec::new()).collect() };
    for (listener, place) in config.listeners.iter().zip(0_u32..) {
        for &configured in &listener.bind {
            sockets.held.push(bind(listener, place, configured, &mut sockets.sockets, inherited)?);
        }
    }
    Ok(sockets)
}

/// Binds one address of a listener, once for each worker, unless it is inherited.
///
/// What is there already is spread over the workers, however many there are. Those that are left share it: one more
/// would get connections at once, and none is accepted before everything is ready; and a low port they could not
/// bind. But a flow's datagrams must come to one worker, which the kernel finds by how many sockets there are: of UDP
/// no socket is shared, and none is added.
pub(super) fn bind(
    listener: &config::ListenerConfig,
    place: u32,
    configured: SocketAddr,
    workers: &mut [Vec<(u32, BoundSocket)>],
    inherited: &mut InheritedSockets,
) -> Result<BoundListener, StartError> {
    // Port 0: the first worker's socket finds a port, and the others join it there.
    let mut address = inherited.bound(&listener.name, configured);
    let refused = |address| {
        move |error| StartError::Bind { what: format!("listener \"{}\"", listener.name), address, error }
    };
    let given = given(listener.protocol, address, inherited).map_err(refused(address))?;
    let (had, count) = (given.len(), workers.len().max(1));
    for (socket, number) in given.into_iter().zip(0..) {
        if let Some(own) = workers.get_mut(number % count) {
            own.push((place, socket));
        }
    }
    let shared: Vec<_> = workers.iter().take(had).filter_map(|own| own.last()?.1.try_clone()).collect();
    let mut shared = shared.iter().cycle();
    for sockets in workers.iter_mut().skip(had) {
        let socket = match listener.protocol {
            Protocol::Udp if had > 0 => break,
            Protocol::Udp => open_udp(address).map(BoundSocket::Udp),
            Protocol::Tcp => match shared.next().and_then(BoundSocket::try_clone) {
                Some(again) => Ok(again),
                None => open(address, true).map(BoundSocket::Tcp),
            },
        };
        let socket = socket.map_err(refused(address))?;
        address = socket.local_addr().map_err(refused(address))?;
        sockets.push((place, socket));
    }
    Ok(BoundListener {
        configured,
        socket: ListenSocketId { listener: place, protocol: listener.protocol, address },
    })
}

/// The inherited sockets of an address, if any.
fn given(
    protocol: Protocol,
    address: SocketAddr,
    inherited: &mut InheritedSockets,
) -> io::Result<Vec<BoundSocket>> {
    Ok(match protocol {
        Protocol::Tcp => inherited.tcp(address, BACKLOG)?.into_iter().map(BoundSocket::Tcp).collect(),
        Protocol::Udp => inherited.udp(address)?.into_iter().map(BoundSocket::Udp).collect(),
    })
}

impl BoundSocket {
    /// The same socket once more, of TCP alone.
    fn try_clone(&self) -> Option<Self> {
        match self {
            Self::Tcp(socket) => socket.try_clone().ok().map(Self::Tcp),
            Self::Udp(_) => None,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

/// Opens a TCP listening socket that broke once more.
pub(super) fn reopen(address: SocketAddr) -> io::Result<TcpListener> {
    fault::at(Syscall::Listen)?;
    open(address, true)
}

/// The same of UDP.
pub(super) fn reopen_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    fault::at(Syscall::Listen)?;
    open_udp(address)
}

/// Binds a port of every source address once: an address of another machine would fail every session.
pub(super) fn try_sources<'a>(pools: impl IntoIterator<Item = &'a PoolConfig>) -> Result<(), StartError> {
    for pool in pools {
        for &source in &pool.source_addresses {
            let address = SocketAddr::new(source, 0);
            let socket =
                Socket::new(Domain::for_address(address), Type::STREAM, Some(socket2::Protocol::TCP));
            socket.and_then(|socket| socket.bind(&address.into())).map_err(|error| StartError::Bind {
                what: format!("pool \"{}\": source-addresses", pool.name),
                address,
                error,
            })?;
        }
    }
    Ok(())
}

/// Binds the address of a page, which one thread serves. It is not shared, so a second process on the same
/// configuration fails here, before it takes a share of the first one's connections.
pub(super) fn page(
    what: &str,
    address: SocketAddr,
    inherited: &mut InheritedSockets,
) -> Result<TcpListener, StartError> {
    let address = inherited.bound(what, address);
    let given = inherited.tcp(address, BACKLOG).map(|mut given| {
        let first = given.pop();
        inherited.tcp.append(&mut given);
        first
    });
    given.and_then(|given| given.map_or_else(|| open(address, false), Ok)).map_err(|error| StartError::Bind {
        what: what.to_owned(),
        address,
        error,
    })
}

fn open(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(socket2::Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
        // Accepted sockets inherit it: no call for each session.
        socket.set_tcp_nodelay(true)?;
    }
    if address.is_ipv6() {
        // [::] and 0.0.0.0 are two addresses, and each is configured for itself.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn open_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(socket2::Protocol::UDP))?;
    // One socket for each worker, and a sender's datagrams always come to the same one: the kernel goes by the addresses.
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}
