//! The fifth step: a connection to one backend, within its time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::account::meter::Connect;
use crate::addr::BackendAddr;
use crate::clock::wheel::Span;
use crate::fault::{self, Call};
use crate::life::{Cut, Life};
use crate::outcome::{At, By, Outcome, Why};

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// This backend could not be reached; another may be.
    Backend(Connect),
    /// The process drains, and cannot wait.
    Drained,
}

impl Failure {
    /// The outcome of a session whose last attempt failed like this.
    #[must_use]
    pub const fn outcome(self) -> Outcome {
        let (by, why) = match self {
            Self::Drained => (By::Proxy, Why::Drained),
            Self::Backend(result) => match result {
                Connect::Refused => (By::Backend, Why::ConnectRefused),
                Connect::Timeout => (By::Proxy, Why::ConnectTimeout),
                Connect::Unreachable => (By::Proxy, Why::ConnectUnreachable),
                Connect::NoLocalPort => (By::Proxy, Why::NoLocalPort),
                Connect::Shortage => (By::Proxy, Why::Shortage),
                Connect::Failed | Connect::Done => (By::Backend, Why::ConnectFailed),
            },
        };
        Outcome::new(by, At::Connect, why)
    }
}

/// What a connection is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The first bytes are at hand, and are written as soon as it stands.
    Speaks,
    /// Nothing may be written for a while.
    Listens,
}

/// Connects to `address`, from `source` where one is given, within `limit`.
///
/// # Errors
/// Why not; nothing has been sent then.
pub async fn dial(
    address: BackendAddr,
    source: Option<IpAddr>,
    opening: Opening,
    limit: Span,
    life: &mut Life,
) -> Result<TcpStream, Failure> {
    let failed = |error: io::Error| Failure::Backend(classify(&error));
    let socket = start(address, source, opening).map_err(failed)?;
    life.wake_at(life.tick().after(limit));
    let connected = life.watch(pin!(socket.ready(Interest::WRITABLE))).await;
    match connected {
        Ok(Ok(ready)) => {
            // A socket that connected is writable and not closed: SO_ERROR need not be asked.
            if ready.is_write_closed()
                && let Some(error) = socket.take_error().map_err(failed)?
            {
                return Err(failed(error));
            }
            Ok(socket)
        }
        Ok(Err(error)) => Err(failed(error)),
        Err(Cut::Expired) => Err(Failure::Backend(Connect::Timeout)),
        Err(Cut::Drained) => Err(Failure::Drained),
    }
}

/// The source addresses of a backend's family, each once, from the `start`-th on; the system's choice alone where
/// there is none. Never empty.
pub fn sources(
    all: &[IpAddr],
    address: BackendAddr,
    start: usize,
) -> impl Iterator<Item = Option<IpAddr>> + '_ {
    // Not the address itself: a session keeps room for the closure while it connects.
    let is_ipv4 = address.0.is_ipv4();
    let of_family = move || all.iter().copied().filter(move |ip| ip.is_ipv4() == is_ipv4);
    let count = of_family().count();
    let chosen = of_family().chain(of_family()).skip(start % count.max(1)).take(count).map(Some);
    chosen.chain((count == 0).then_some(None))
}

/// Starts to connect. TCP_NODELAY is left to the second write: the first leaves at once without it, as nothing is
/// on its way that it could be held back for (`tcp_nagle_check` in net/ipv4/`tcp_output.c`), and a session of one request
/// is spared the call.
///
/// # Errors
/// What the system says at once.
pub fn start(address: BackendAddr, source: Option<IpAddr>, opening: Opening) -> io::Result<TcpStream> {
    let kind = Type::STREAM.nonblocking().cloexec();
    fault::at(Call::Socket)?;
    let socket = Socket::new(Domain::for_address(address.0), kind, Some(Protocol::TCP))?;
    if opening == Opening::Speaks {
        // The handshake's last segment waits for the first bytes and goes with them: a packet less. Without bytes at
        // hand it would wait for 200 ms (`tcp_rcv_synsent_state_process` in net/ipv4/`tcp_input.c`).
        socket.set_tcp_quickack(false)?;
    }
    if let Some(source) = source {
        // The port is chosen at connect, for the pair of addresses: 28,000 ports to EACH backend (ip(7)).
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        fault::at(Call::Bind)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    fault::at(Call::Connect)?;
    match socket.connect(&address.0.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    fault::at(Call::Register)?;
    TcpStream::from_std(socket.into())
}

/// What kind of failure an error is.
#[must_use]
pub fn classify(error: &io::Error) -> Connect {
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED) => Connect::Refused,
        Some(Errno::TIMEDOUT) => Connect::Timeout,
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN | Errno::HOSTDOWN) => {
            Connect::Unreachable
        }
        Some(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) => Connect::NoLocalPort,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC) => Connect::Shortage,
        _ => Connect::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_an_outcome_of_the_closed_set() {
        for result in Connect::ALL {
            assert!(Failure::Backend(result).outcome().place().is_some(), "{result:?}");
        }
        assert!(Failure::Drained.outcome().place().is_some());
    }

    #[test]
    fn sources_are_of_the_backends_family() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = [ip("10.0.0.1"), ip("fd00::1"), ip("10.0.0.2")];
        let backend = |text: &str| BackendAddr(text.parse().unwrap());
        let found = |all: &[IpAddr], address: &str, start: usize| -> Vec<Option<IpAddr>> {
            sources(all, backend(address), start).collect()
        };
        let (first, second) = (Some(ip("10.0.0.1")), Some(ip("10.0.0.2")));
        assert_eq!(found(&all, "10.1.1.1:80", 0), [first, second]);
        assert_eq!(found(&all, "10.1.1.1:80", 1), [second, first]);
        assert_eq!(found(&all, "10.1.1.1:80", usize::MAX - 1), [first, second]);
        assert_eq!(found(&all, "[fd00::9]:80", 7), [Some(ip("fd00::1"))]);
        assert_eq!(found(&all[..1], "[fd00::9]:80", 0), [None]);
        assert_eq!(found(&[], "10.1.1.1:80", 3), [None]);
    }

    #[test]
    fn errors_are_told_apart() {
        for (errno, expected) in [
            (Errno::CONNREFUSED, Connect::Refused),
            (Errno::TIMEDOUT, Connect::Timeout),
            (Errno::HOSTUNREACH, Connect::Unreachable),
            (Errno::ADDRNOTAVAIL, Connect::NoLocalPort),
            (Errno::MFILE, Connect::Shortage),
            (Errno::CONNRESET, Connect::Failed),
        ] {
            assert_eq!(classify(&errno.into()), expected);
        }
        assert_eq!(classify(&io::ErrorKind::Other.into()), Connect::Failed);
    }
}
