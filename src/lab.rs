//! A provider's world in one process: a load balancer with its VPC endpoints, backends of many tempers, and load.
//! Demo, tests and benches share it. Everything listens on loopback, at ports that the system chooses, and ends
//! when its handle is dropped.

pub mod backend;
mod datagram;
pub mod day;
pub mod load;
pub mod nlb;

pub use self::datagram::LONGEST;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;

/// The tasks behind a handle: all of them end with it.
type Tasks = JoinSet<()>;

/// Connections that may wait to be accepted; the kernel cuts it to `net.core.somaxconn`. Thousands of sessions start
/// at once, and one that finds the queue full waits for retransmissions, up to 16 s.
const BACKLOG: u32 = 65_535;

/// A port of loopback that the system chooses.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

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
