//! A provider's world in one process: a load balancer with its VPC endpoints, backends of many tempers, and load.
//! Demo, tests and benches share it. Everything listens on loopback, at ports that the system chooses, and ends
//! when its handle is dropped. The hands-on's world has networks and processes of its own (`vpc`, `world`).

pub mod backend;
mod datagram;
pub mod day;
pub mod load;
pub mod nlb;
pub(crate) mod vpc;
pub(crate) mod world;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;

/// The tasks behind a handle: all of them end with it.
type Tasks = JoinSet<()>;

/// Connections that may wait to be accepted; the kernel cuts it to `net.core.somaxconn`. Thousands of sessions start
/// at once, and one that finds the queue full waits for retransmissions, up to 16 s.
const BACKLOG: u32 = 65_535;

/// A port of loopback that the system chooses.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Where a socket that speaks to `target` is bound. On loopback that is the target's own address, so that its port is taken
/// there alone and is free for flows from the others; elsewhere the system chooses.
fn toward(target: SocketAddr) -> SocketAddr {
    let ip = match target.ip() {
        ip if ip.is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    (ip, 0).into()
}

/// A listening socket, and where it listens.
async fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let socket = socket.listen(BACKLOG)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// The next connection. Errors of accept are tried again: on loopback only descriptors can be short, and the lab's
/// sessions end soon.
async fn accept(socket: &TcpListener) -> tokio::net::TcpStream {
    loop {
        match socket.accept().await {
            Ok((stream, _)) => return stream,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// Takes the tasks that have ended out of the set, so that it holds only those that run.
fn reap(tasks: &mut Tasks) {
    while tasks.try_join_next().is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_address_is_of_this_machine() {
        for (target, expected) in [
            ("127.0.0.5:53", "127.0.0.5:0"),
            ("[::1]:53", "[::1]:0"),
            ("10.0.0.5:53", "0.0.0.0:0"),
            ("[2001:db8::5]:53", "[::]:0"),
        ] {
            assert_eq!(toward(target.parse().unwrap()), expected.parse().unwrap(), "{target}");
        }
    }
}
