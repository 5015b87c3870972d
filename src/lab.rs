//! A provider's world in one process: a load balancer with its VPC endpoints, backends of many tempers, and load.
//! Demo, tests and benches share it. Everything listens on loopback, at ports that the system chooses, and ends
//! when its handle is dropped.

pub mod backend;
pub mod load;
pub mod nlb;

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The tasks behind a handle: all of them end with it.
type Tasks = JoinSet<()>;

/// A listening socket on loopback.
async fn listen() -> io::Result<(TcpListener, SocketAddr)> {
    let socket = TcpListener::bind("127.0.0.1:0").await?;
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
