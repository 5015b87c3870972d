//! The first step: accepts connections.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::IpNet;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::io::unix::AsyncFd;

use crate::addr::PeerAddr;
use crate::fault::{self, Syscall};

/// A TCP listening socket of one worker.
#[derive(Debug)]
pub(crate) struct ListenSocket(AsyncFd<TcpListener>);

/// An accepted connection that is not registered with a worker's poll yet, so that another worker can still take it.
#[derive(Debug)]
pub struct AcceptedConnection {
    /// The socket, non-blocking.
    pub socket: TcpStream,
    /// The other end.
    pub peer: PeerAddr,
}

/// An accept error, in three classes.
#[derive(Debug)]
pub(crate) enum AcceptError {
    /// This peer's own: it has gone. The next one may be fine.
    Peer,
    /// Descriptors or memory ran out: wait, then go on.
    Shortage(io::Error),
    /// The listening socket itself is broken.
    Fatal(io::Error),
}

/// How long accepting rests when descriptors or memory have run out.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// Connections taken in one go before other tasks get their turn. Each costs a session's beginning, and what live sessions
/// have to forward waits for all of them; but where all are busy, what waits to be accepted gets only so many of a round.
const BATCH: usize = 8;

impl ListenSocket {
    /// Takes over a bound, listening, non-blocking socket.
    ///
    /// # Errors
    /// Where the runtime cannot register it.
    pub(crate) fn new(socket: TcpListener) -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "its successor is unsafe; a std TcpListener keeps its descriptor, as both ask"
        )]
        let socket = AsyncFd::new(socket)?;
        Ok(Self(socket))
    }

    /// Waits for connections and passes each to `take`, until the queue is empty or the batch is full.
    ///
    /// # Errors
    /// The trouble that ended the batch; what was accepted before has been handed over.
    pub(crate) async fn accept(&self, mut take: impl FnMut(AcceptedConnection)) -> Result<(), AcceptError> {
        let mut ready = self.0.readable().await.map_err(AcceptError::Fatal)?;
        for _ in 0..BATCH {
            match self.next() {
                Ok(accepted) => accepted.into_iter().for_each(&mut take),
                Err(Errno::AGAIN) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(errno) => return Err(classify(errno)),
            }
        }
        drop(ready);
        tokio::task::yield_now().await;
        Ok(())
    }

    /// Passes on what the kernel has accepted already, before the socket is closed: it would be reset.
    pub(crate) fn close(&self, mut take: impl FnMut(AcceptedConnection)) {
        loop {
            match self.next() {
                Ok(accepted) => accepted.into_iter().for_each(&mut take),
                Err(errno) if matches!(classify(errno), AcceptError::Peer) => {}
                Err(_) => return,
            }
        }
    }

    /// Accepts one connection; `None` if its peer has closed already.
    fn next(&self) -> Result<Option<AcceptedConnection>, Errno> {
        fault::at(Syscall::Accept)?;
        let (socket, peer) = acceptfrom_with(&self.0, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        Ok(peer.map(|peer| AcceptedConnection { socket: TcpStream::from(socket), peer: PeerAddr(peer) }))
    }
}

impl AsFd for ListenSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// The three classes of accept errors. The list of the peer's is the one in accept(2), "Error handling": Linux
/// passes pending network errors of the new socket on as errors of accept.
#[must_use]
pub(crate) fn classify(errno: Errno) -> AcceptError {
    match errno {
        Errno::CONNABORTED
        | Errno::INTR
        | Errno::PROTO
        | Errno::PERM
        | Errno::NETDOWN
        | Errno::NOPROTOOPT
        | Errno::HOSTDOWN
        | Errno::NONET
        | Errno::HOSTUNREACH
        | Errno::OPNOTSUPP
        | Errno::NETUNREACH
        | Errno::TIMEDOUT => AcceptError::Peer,
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => AcceptError::Shortage(errno.into()),
        _ => AcceptError::Fatal(errno.into()),
    }
}

/// Whether the peer is in one of the networks.
#[must_use]
pub(crate) fn is_trusted(peer: PeerAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&peer.0.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_fall_in_three_classes() {
        assert!(matches!(classify(Errno::CONNABORTED), AcceptError::Peer));
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
            assert!(matches!(classify(errno), AcceptError::Shortage(_)));
        }
        for errno in [Errno::BADF, Errno::INVAL, Errno::NOTSOCK] {
            assert!(matches!(classify(errno), AcceptError::Fatal(_)));
        }
    }

    #[test]
    fn trust_goes_by_network() {
        let trusted: Vec<IpNet> = vec!["10.0.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let peer = |text: &str| PeerAddr(text.parse().unwrap());
        assert!(is_trusted(peer("10.0.255.255:1"), &trusted));
        assert!(is_trusted(peer("[fd12::1]:1"), &trusted));
        assert!(!is_trusted(peer("10.1.0.0:1"), &trusted));
        assert!(!is_trusted(peer("[::ffff:10.0.0.1]:1"), &trusted));
        assert!(!is_trusted(peer("10.0.0.1:1"), &[]));
    }
}
