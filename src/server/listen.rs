//! Listening sockets: every worker has its own of each address, and the kernel spreads connections over them.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::StartError;
use crate::config::{self, Config};

/// Connections that may wait to be accepted, for each socket; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// Everything that workers accept on.
#[derive(Debug)]
pub(super) struct Doors {
    /// Each listener with the addresses it got.
    pub(super) addresses: Vec<(String, Vec<SocketAddr>)>,
    /// For each worker: its sockets, each with the place of its listener.
    pub(super) sockets: Vec<Vec<(u32, Bound)>>,
}

/// A socket of one worker, by its listener's protocol.
#[derive(Debug)]
pub(super) enum Bound {
    /// Connections are accepted here.
    Tcp(TcpListener),
    /// Datagrams are received here.
    Udp(UdpSocket),
}

/// Binds every address of every listener, once for each worker.
pub(super) fn doors(config: &Config, workers: usize) -> Result<Doors, StartError> {
    let mut doors = Doors { addresses: Vec::new(), sockets: (0..workers).map(|_| Vec::new()).collect() };
    for (listener, place) in config.listeners.iter().zip(0_u32..) {
        let mut bound = Vec::new();
        for &configured in &listener.bind {
            // Port 0: the first worker's socket finds a port, and the others join it there.
            let mut address = configured;
            for sockets in &mut doors.sockets {
                let refused = |error| StartError::Bind {
                    what: format!("listener \"{}\"", listener.name),
                    address,
                    error,
                };
                let socket = match listener.protocol {
                    config::Protocol::Tcp => open(address, true).map(Bound::Tcp),
                    config::Protocol::Udp => open_udp(address).map(Bound::Udp),
                };
                let socket = socket.map_err(refused)?;
                address = socket.local_addr().map_err(refused)?;
                sockets.push((place, socket));
            }
            bound.push(address);
        }
        doors.addresses.push((listener.name.clone(), bound));
    }
    Ok(doors)
}

impl Bound {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

/// Binds a port of every source address once: one that is not this machine's would fail every session.
pub(super) fn try_sources(config: &Config) -> Result<(), StartError> {
    for pool in &config.pools {
        for &source in &pool.source_addresses {
            let address = SocketAddr::new(source, 0);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP));
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
pub(super) fn page(what: &str, address: SocketAddr) -> Result<TcpListener, StartError> {
    open(address, false).map_err(|error| StartError::Bind { what: what.to_owned(), address, error })
}

fn open(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
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
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::UDP))?;
    // One socket for each worker, and a sender's datagrams always come to the same one: the kernel goes by the addresses.
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}
