//! Listening sockets: every worker has its own of each address, and the kernel spreads connections over them.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::StartError;
use super::inherit::Inherited;
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

/// Binds every address of every listener, once for each worker, but for those that somebody has bound before.
pub(super) fn doors(config: &Config, workers: usize, inherited: &mut Inherited) -> Result<Doors, StartError> {
    let mut doors = Doors { addresses: Vec::new(), sockets: (0..workers).map(|_| Vec::new()).collect() };
    for (listener, place) in config.listeners.iter().zip(0_u32..) {
        let mut bound = Vec::new();
        for &configured in &listener.bind {
            // Port 0: the first worker's socket finds a port, and the others join it there.
            let mut address = configured;
            let refused = |address| {
                move |error| StartError::Bind {
                    what: format!("listener \"{}\"", listener.name),
                    address,
                    error,
                }
            };
            let given = given(listener.protocol, configured, workers, inherited).map_err(refused(address))?;
            if !given.is_empty() {
                given.into_iter().zip(&mut doors.sockets).for_each(|(socket, own)| own.push((place, socket)));
                bound.push(address);
                continue;
            }
            for sockets in &mut doors.sockets {
                let socket = match listener.protocol {
                    config::Protocol::Tcp => open(address, true).map(Bound::Tcp),
                    config::Protocol::Udp => open_udp(address).map(Bound::Udp),
                };
                let socket = socket.map_err(refused(address))?;
                address = socket.local_addr().map_err(refused(address))?;
                sockets.push((place, socket));
            }
            bound.push(address);
        }
        doors.addresses.push((listener.name.clone(), bound));
    }
    Ok(doors)
}

/// What somebody has bound before of an address, for the workers in their order; none where nobody has.
///
/// One listening socket serves all workers, for they could not bind a low port; but a flow's datagrams must come to one
/// worker, so of one UDP socket only the first gets it.
fn given(
    protocol: config::Protocol,
    address: SocketAddr,
    workers: usize,
    inherited: &mut Inherited,
) -> io::Result<Vec<Bound>> {
    match protocol {
        config::Protocol::Tcp => {
            let given = inherited.tcp(address, BACKLOG)?;
            // One that nobody accepts from would swallow connections.
            for socket in given.iter().skip(workers) {
                inherited.tcp.push(socket.try_clone()?);
            }
            let each = given.iter().cycle().take(if given.is_empty() { 0 } else { workers });
            each.map(|socket| socket.try_clone().map(Bound::Tcp)).collect()
        }
        config::Protocol::Udp => {
            let mut given = inherited.udp(address)?;
            inherited.udp.extend(given.drain(workers.min(given.len())..));
            Ok(given.into_iter().map(Bound::Udp).collect())
        }
    }
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
pub(super) fn page(
    what: &str,
    address: SocketAddr,
    inherited: &mut Inherited,
) -> Result<TcpListener, StartError> {
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
