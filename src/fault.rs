//! Error injection for tests: a system call returns a chosen error instead of being made.
//!
//! Neither the configuration nor the command line reaches it, and a release build does not contain it: only builds with
//! `debug_assertions` or with the cargo feature `fault-injection` do, and `.ci/release-contents` checks it. There, a call without
//! an injected error costs one relaxed load.

#[cfg(any(debug_assertions, feature = "fault-injection"))]
mod injection;

use rustix::io::Errno;

#[cfg(any(debug_assertions, feature = "fault-injection"))]
pub use self::injection::{InjectedFault, Injection};

/// The system calls at which errors can be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syscall {
    /// A connection out of a listening socket's queue.
    Accept,
    /// A socket towards a backend.
    Socket,
    /// Its source address.
    Bind,
    /// Its way to the backend.
    Connect,
    /// A socket into a worker's or its flows' epoll.
    Register,
    /// A read of a session's socket.
    Receive,
    /// A write to one.
    Send,
    /// Bytes from a socket into a pipe.
    SpliceIn,
    /// Bytes from a pipe into a socket.
    SpliceOut,
    /// A pipe.
    Pipe,
    /// A pipe of more than the usual size.
    PipeSize,
    /// Datagrams in.
    ReceiveDatagram,
    /// Datagrams out.
    SendDatagram,
    /// A listening socket that is opened again.
    Listen,
    /// The runtime of a worker at its start.
    WorkerStart,
    /// No call of the kernel's: a fault in vestibule itself, in the middle of a session.
    Panic,
    /// The same in a worker's timers.
    WorkerPanic,
    /// The same in the control thread.
    ControlPanic,
}

/// The injected error of a call, if there is one; the caller then does not make the call.
///
/// # Errors
/// The injected one.
#[cfg(any(debug_assertions, feature = "fault-injection"))]
#[inline]
pub fn at(call: Syscall) -> Result<(), Errno> {
    injection::next(call)
}

/// In a build without error injection: no error.
///
/// # Errors
/// None.
#[cfg(not(any(debug_assertions, feature = "fault-injection")))]
#[inline]
pub const fn at(_: Syscall) -> Result<(), Errno> {
    Ok(())
}

/// Whether errors are injected now.
#[cfg(any(debug_assertions, feature = "fault-injection"))]
#[inline]
#[must_use]
pub fn is_on() -> bool {
    injection::is_on()
}

/// In a build without error injection: never.
#[cfg(not(any(debug_assertions, feature = "fault-injection")))]
#[inline]
#[must_use]
pub const fn is_on() -> bool {
    false
}

/// Panics in a session if that is injected.
///
/// # Panics
/// If it is injected.
#[inline]
pub fn panic_where_injected() {
    panic_at(Syscall::Panic);
}

/// Panics in another place if that is injected.
///
/// # Panics
/// If it is injected.
#[inline]
pub fn panic_at(call: Syscall) {
    // .ci/release-contents looks for this text in the programs.
    assert!(at(call).is_ok(), "injected by vestibule::fault");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_fails_where_nothing_is_injected() {
        assert_eq!(at(Syscall::SpliceIn), Ok(()));
    }
}
