//! The fifth step: a connection to one backend, within its time.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::account::session_metrics::ConnectResult;
use crate::addr::BackendAddr;
use crate::admission::ports::{LocalPort, LocalPortRange, LocalPorts, PortSpace, TimeWaitReuse};
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::fault::{self, Syscall};
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::session_context::{Cancelled, SessionContext};
use crate::socket_options::IpLocalPortRange;

/// Why connecting failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectError {
    /// This backend could not be reached; another may be.
    Backend(ConnectResult),
    /// The process drains, and cannot wait.
    Drained,
    /// The client has reset its connection: the backend is not at fault.
    ClientReset,
}

impl ConnectError {
    /// The outcome of a session whose last attempt failed like this.
    #[must_use]
    pub(crate) const fn outcome(self) -> Outcome {
        let (by, why) = match self {
            Self::Drained => (EndedBy::Proxy, Reason::Drained),
            Self::ClientReset => (EndedBy::Client, Reason::Reset),
            Self::Backend(result) => match result {
                ConnectResult::Refused => (EndedBy::Backend, Reason::ConnectRefused),
                ConnectResult::Timeout => (EndedBy::Proxy, Reason::ConnectTimeout),
                ConnectResult::Unreachable => (EndedBy::Proxy, Reason::ConnectUnreachable),
                ConnectResult::NoLocalPort => (EndedBy::Proxy, Reason::NoLocalPort),
                ConnectResult::Shortage => (EndedBy::Proxy, Reason::Shortage),
                ConnectResult::Failed | ConnectResult::Done => (EndedBy::Backend, Reason::ConnectFailed),
            },
        };
        Outcome::new(by, EndedAt::Connect, why)
    }
}

/// Ports that the kernel is asked for until there is said to be none, at some 3 us each. Few are used by other processes, but
/// one before this one may have left three quarters of them in TIME_WAIT.
const CANDIDATES: usize = 32;

/// The source address and local ports of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourcePorts<'a> {
    /// The source address; the system's choice where there is none.
    pub source: Option<IpAddr>,
    /// The local ports in use.
    pub ports: &'a LocalPorts,
    /// Those of them that lead from this source to this backend.
    pub space: &'a Arc<PortSpace>,
    /// The tenant that its port is counted for.
    pub tenant: u32,
}

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectPurpose {
    /// The first bytes are at hand, and are written as soon as it stands.
    Speaks,
    /// Nothing may be written for a while.
    Listens,
}

/// Runs `step` until it ends, or until `reset`, which is the client's socket being ready for [`Interest::ERROR`]: then `None`.
/// The step goes first.
///
/// An end alone (FIN) is no reset: a client may have sent its whole request and wait for the answer. Once it has closed its
/// socket, its kernel answers the first byte of ours with a reset.
pub(crate) fn unless_reset<'a, F: Future + Unpin + 'a>(
    mut reset: Pin<&'a mut (impl Future<Output = io::Result<Ready>> + 'a)>,
    mut step: F,
) -> impl Future<Output = Option<F::Output>> + Unpin + 'a {
    poll_fn(move |context| {
        if let Poll::Ready(output) = Pin::new(&mut step).poll(context) {
            return Poll::Ready(Some(output));
        }
        reset.as_mut().poll(context).map(|_| None)
    })
}

/// Connects to the backend of the ports of `origin`, within `limit` and as long as the `client` is there. The
/// connection uses the port as long as it lives.
///
/// # Errors
/// Why not; nothing has been sent then.
///
/// Not an `async fn`: that would keep a place for the origin as long as it waits.
pub(crate) fn dial<'a>(
    origin: SourcePorts<'_>,
    opening: ConnectPurpose,
    client: &'a TcpStream,
    limit: TickSpan,
    session: &'a mut SessionContext,
) -> impl Future<Output = Result<(TcpStream, LocalPort), ConnectError>> + use<'a> {
    let started = clock::now();
    let socket = start(origin, opening);
    session.metrics.worker().connect_calls.add(nanos(clock::now().since(started)));
    async move {
        let failed = |error: io::Error| ConnectError::Backend(classify(&error));
        let (socket, port) = socket.map_err(failed)?;
        session.wake_at(session.tick().after(limit));
        let reset = pin!(client.ready(Interest::ERROR));
        // Polls the socket's own slot for a writer: a separate future for it adds 100 bytes to every session that connects.
        let writable = poll_fn(|context| {
            ready!(socket.poll_write_ready(context))?;
            pin!(socket.ready(Interest::WRITABLE)).poll(context)
        });
        match session.watch(unless_reset(reset, writable)).await {
            Ok(Some(Ok(ready))) => {
                // A socket that connected is writable and not closed: SO_ERROR need not be asked.
                if ready.is_write_closed()
                    && let Some(error) = socket.take_error().map_err(failed)?
                {
                    return Err(failed(error));
                }
                Ok((socket, port))
            }
            Ok(Some(Err(error))) => Err(failed(error)),
            Ok(None) => Err(ConnectError::ClientReset),
            Err(Cancelled::Expired) => Err(ConnectError::Backend(ConnectResult::Timeout)),
            Err(Cancelled::Drained) => Err(ConnectError::Drained),
        }
    }
}

/// The source addresses of a backend's family, each once, from the `start`-th on; the system's choice alone where
/// there is none. Never empty.
pub(crate) fn sources(
    all: &[IpAddr],
    address: BackendAddr,
    start: usize,
) -> impl Iterator<Item = Option<IpAddr>> + '_ {
    // Captures one bool instead of the address: each connecting session stores the closure.
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
pub(crate) fn start(origin: SourcePorts<'_>, opening: ConnectPurpose) -> io::Result<(TcpStream, LocalPort)> {
    let SourcePorts { source, ports, space, tenant } = origin;
    let address = BackendAddr(space.backend());
    let no_port = || io::Error::from(Errno::ADDRNOTAVAIL);
    let mut port = space.take(tenant).ok_or_else(no_port)?;
    let kind = Type::STREAM.nonblocking().cloexec();
    fault::at(Syscall::Socket)?;
    let socket = Socket::new(Domain::for_address(address.0), kind, Some(Protocol::TCP))?;
    if opening == ConnectPurpose::Speaks {
        // The handshake's last segment waits for the first bytes and goes with them: a packet less. Without bytes at
        // hand it would wait for 200 ms (`tcp_rcv_synsent_state_process` in net/ipv4/`tcp_input.c`).
        socket.set_tcp_quickack(false)?;
    }
    if let Some(source) = source {
        // The port is chosen at connect, for the pair of addresses: 28,000 ports to EACH backend (ip(7)).
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        fault::at(Syscall::Bind)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    let mut candidates = CANDIDATES;
    loop {
        if let Some(number) = port.number()
            && !choose_port(&socket, number)?
        {
            ports.leave_choice_to_kernel();
        }
        fault::at(Syscall::Connect)?;
        let Err(error) = socket.connect(&address.0.into()) else { break };
        match Errno::from_io_error(&error) {
            Some(Errno::INPROGRESS) => break,
            Some(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) => {
                port.refused();
                candidates -= 1;
                if candidates == 0 {
                    return Err(error);
                }
                port = space.take_instead(tenant).ok_or_else(no_port)?;
            }
            _ => return Err(error),
        }
    }
    if ports.range().spans(address.0.port()) && is_connected_to_itself(&socket, address) {
        return Err(Errno::CONNREFUSED.into());
    }
    fault::at(Syscall::Register)?;
    Ok((TcpStream::from_std(socket.into())?, port))
}

/// Whether a socket's own address is the one that it was to be connected to: where nothing listens at a port of the same
/// host within the range of local ports, the kernel may choose that very port, and TCP's simultaneous open then connects
/// the socket to itself (RFC 9293 section 3.5).
#[must_use]
pub(crate) fn is_connected_to_itself(socket: &Socket, address: BackendAddr) -> bool {
    socket.local_addr().ok().and_then(|own| own.as_socket()).is_some_and(|own| own == address.0)
}

/// Has the kernel take this port and no other; whether it can.
fn choose_port(socket: &Socket, port: u16) -> io::Result<bool> {
    let only = u32::from(port) << 16 | u32::from(port);
    match setsockopt(socket, IpLocalPortRange, &only) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The local ports that the system lets connections use, as its sysctls say at this moment; the kernel's defaults where
/// they cannot be read.
#[must_use]
pub(crate) fn system_ports() -> LocalPorts {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    let reuse = match read("tcp_tw_reuse").trim() {
        "0" => TimeWaitReuse::Never,
        "1" => TimeWaitReuse::Always,
        _ => TimeWaitReuse::Loopback,
    };
    let reserved = reserved(&read("ip_local_reserved_ports"));
    let is_reserved = |port: u16| reserved.iter().any(|range| range.contains(&port));
    let range = read("ip_local_port_range");
    let bounds: Vec<u16> = range.split_whitespace().filter_map(|bound| bound.parse().ok()).collect();
    let range = match bounds[..] {
        [low, high] => LocalPortRange::new(low, high, is_reserved),
        _ => LocalPortRange::default(),
    };
    LocalPorts::new(range, reuse)
}

/// Reads `ip_local_reserved_ports`: ports and ranges of ports, such as `8080,9148-9150`.
fn reserved(text: &str) -> Vec<RangeInclusive<u16>> {
    let range = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some(low.parse().ok()?..=high.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).collect()
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// Classifies an error.
#[must_use]
pub(crate) fn classify(error: &io::Error) -> ConnectResult {
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED) => ConnectResult::Refused,
        Some(Errno::TIMEDOUT) => ConnectResult::Timeout,
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN | Errno::HOSTDOWN) => {
            ConnectResult::Unreachable
        }
        // The last is what a datagram socket without a port says where none is left (`inet_autobind` in net/ipv4/af_inet.c).
        Some(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE | Errno::AGAIN) => ConnectResult::NoLocalPort,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC) => {
            ConnectResult::Shortage
        }
        _ => ConnectResult::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_an_outcome_of_the_closed_set() {
        for result in ConnectResult::ALL {
            assert!(ConnectError::Backend(result).outcome().place().is_some(), "{result:?}");
        }
        assert!(ConnectError::Drained.outcome().place().is_some());
        assert!(ConnectError::ClientReset.outcome().place().is_some());
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
            (Errno::CONNREFUSED, ConnectResult::Refused),
            (Errno::TIMEDOUT, ConnectResult::Timeout),
            (Errno::HOSTUNREACH, ConnectResult::Unreachable),
            (Errno::ADDRNOTAVAIL, ConnectResult::NoLocalPort),
            (Errno::ADDRINUSE, ConnectResult::NoLocalPort),
            (Errno::AGAIN, ConnectResult::NoLocalPort),
            (Errno::MFILE, ConnectResult::Shortage),
            (Errno::CONNRESET, ConnectResult::Failed),
        ] {
            assert_eq!(classify(&errno.into()), expected);
        }
        assert_eq!(classify(&io::ErrorKind::Other.into()), ConnectResult::Failed);
    }
}
