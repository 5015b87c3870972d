//! Both connections of a session: which is which end of a direction, their options and their errors.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::TcpStream;

use crate::account::Direction;
use crate::outcome::{EndedBy, Reason};

/// Keepalive of both connections. NLB and security groups drop an idle connection after 350 s, so the first probe
/// is sent well before (AWS, "Connection idle timeout").
pub(super) fn keepalive() -> socket2::TcpKeepalive {
    socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4)
}

/// Shuts down the sending side. A connection that is already closed reports that at its next read.
pub(super) fn shut_down(sink: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(sink).shutdown(std::net::Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// The reason code of a failed read or write.
pub(super) fn reason(error: &io::Error) -> Reason {
    match Errno::from_io_error(error) {
        Some(Errno::CONNRESET | Errno::PIPE | Errno::CONNABORTED) => Reason::Reset,
        Some(Errno::NOBUFS | Errno::NOMEM) => Reason::Shortage,
        _ => Reason::Unanswered,
    }
}

/// The source and the sink of a direction.
pub(super) const fn ends(direction: Direction) -> (EndedBy, EndedBy) {
    match direction {
        Direction::ToBackend => (EndedBy::Client, EndedBy::Backend),
        Direction::ToClient => (EndedBy::Backend, EndedBy::Client),
    }
}
