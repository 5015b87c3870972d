//! Splicing: bytes go from socket to pipe to socket inside the kernel.
//!
//! EAGAIN of a splice into a pipe may mean that the socket is empty or that the pipe is full; so a pipe is filled
//! only when it is empty, and EAGAIN has one meaning (sozu-proxy/sozu pull request 1323). A splice out asks for
//! exactly what the pipe holds and never for SPLICE_F_MORE: either would have the kernel hold back the last segment
//! for 200 ms (golang/go issue 10948).

use std::io;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::pipe::Pipe;

/// Fills an empty pipe with what the source has, up to `most` bytes; 0 at its end.
pub(super) fn poll_in(
    source: &TcpStream,
    pipe: &mut Pipe,
    most: usize,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(source.poll_read_ready(context))?;
        match source.try_io(Interest::READABLE, || pipe.fill(source, most)) {
            Err(error) if is_transient(&error) => {}
            result => return Poll::Ready(result),
        }
    }
}

/// Empties a pipe into the sink as far as it takes it; how much.
pub(super) fn poll_out(
    pipe: &mut Pipe,
    sink: &TcpStream,
    context: &mut Context<'_>,
) -> Poll<io::Result<u64>> {
    loop {
        ready!(sink.poll_write_ready(context))?;
        match sink.try_io(Interest::WRITABLE, || pipe.empty_into(sink)) {
            Err(error) if is_transient(&error) => {}
            result => return Poll::Ready(result.map(|count| count as u64)),
        }
    }
}

/// Whether this cannot be spliced, or not now: the socket does not know how, a filter forbids it, or memory is short.
/// That says nothing of the connection, and no byte has moved where a splice fails: a copy goes on from there.
pub(super) fn is_refused(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::INVAL
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::ACCESS
                | Errno::NOMEM
                | Errno::NOBUFS
        )
    )
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
