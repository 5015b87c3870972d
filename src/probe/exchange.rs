//! One probe: a connection, a question and its answer, all within one time and all of them bounded.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::task::Poll;

use rustix::io::Errno;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::yield_now;
use tokio::time::timeout;

use super::response::ProbeResponse;
use crate::account::ProbeResult;
use crate::account::session_metrics::ConnectResult;
use crate::addr::BackendAddr;
use crate::admission::ports::{LocalPort, LocalPorts, PROBES};
use crate::config::{ProbeCheck, ProbeConfig, Protocol};
use crate::connect::{self, ConnectPurpose, SourcePorts};
use crate::proxy_protocol;

/// Bytes of one read.
const READ: usize = 4096;

/// Probes a backend once, from each source in turn as long as only the local ports are at fault; over after
/// `probe.timeout` at the latest. The connection is reset in the end, and never closed: a close would leave a port in
/// TIME_WAIT for each probe.
pub async fn ask(backend: BackendAddr, from: (&[IpAddr], &LocalPorts), probe: &ProbeConfig) -> ProbeResult {
    let mut late = ProbeResult::ConnectTimeout;
    let ended = timeout(probe.timeout, converse(backend, from, probe, &mut late)).await;
    match ended {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(error)) => match Errno::from_io_error(&error) {
            // Also before the request is sent: the backend accepted the connection and reset it.
            Some(Errno::CONNRESET | Errno::PIPE) => ProbeResult::Reset,
            Some(Errno::TIMEDOUT) => late,
            _ => connect::classify(&error).into(),
        },
        Err(_) => late,
    }
}

/// `late` is what it means if the time is over.
async fn converse(
    backend: BackendAddr,
    (sources, ports): (&[IpAddr], &LocalPorts),
    probe: &ProbeConfig,
    late: &mut ProbeResult,
) -> io::Result<ProbeResult> {
    let mut address = backend.0;
    if let Some(port) = probe.port {
        address.set_port(port);
    }
    let question = question(address, probe);
    if let ProbeCheck::Exchange { protocol: Protocol::Udp, .. } = probe.ask {
        return datagram(BackendAddr(address), sources, &question, probe, late).await;
    }
    let opening = if question.is_empty() { ConnectPurpose::Listens } else { ConnectPurpose::Speaks };
    // The connection ends with a reset, so its port is free at once.
    let (mut socket, _port) = connect(BackendAddr(address), (sources, ports), opening).await?;
    *late = ProbeResult::AnswerTimeout;
    socket.write_all(&question).await?;
    let Some(mut answer) = ProbeResponse::new(&probe.ask) else { return Ok(ProbeResult::Passed) };
    loop {
        socket.readable().await?;
        if let Poll::Ready(verdict) = read(&socket, &mut answer)? {
            return Ok(verdict);
        }
        // An endless response gets one read of the control thread, then other tasks run.
        yield_now().await;
    }
}

/// Sends a datagram; the first answer decides. Only the backend's answers are received.
async fn datagram(
    address: BackendAddr,
    sources: &[IpAddr],
    question: &[u8],
    probe: &ProbeConfig,
    late: &mut ProbeResult,
) -> io::Result<ProbeResult> {
    let source = connect::sources(sources, address, 0).next().flatten();
    let any = if address.0.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0)).await?;
    socket.connect(address.0).await?;
    // The socket would receive its own datagrams.
    if socket.local_addr()? == address.0 {
        return Err(Errno::CONNREFUSED.into());
    }
    *late = ProbeResult::AnswerTimeout;
    socket.send(question).await?;
    let Some(mut answer) = ProbeResponse::new(&probe.ask) else { return Ok(ProbeResult::Passed) };
    loop {
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error()
            && let Some(error) = socket.take_error()?
        {
            return Err(error);
        }
        if let Some(verdict) = hear(&socket, &mut answer)? {
            return Ok(verdict);
        }
    }
}

/// Here for the same reason as [`read`].
fn hear(socket: &UdpSocket, answer: &mut ProbeResponse<'_>) -> io::Result<Option<ProbeResult>> {
    let mut bytes = [0; READ];
    match socket.try_recv(&mut bytes) {
        Ok(count) => {
            let fed = answer.feed(bytes.get(..count).unwrap_or(&bytes));
            Ok(Some(if let Poll::Ready(verdict) = fed { verdict } else { answer.end() }))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

async fn connect(
    address: BackendAddr,
    (sources, ports): (&[IpAddr], &LocalPorts),
    opening: ConnectPurpose,
) -> io::Result<(TcpStream, LocalPort)> {
    let mut result = Err(Errno::ADDRNOTAVAIL.into());
    for source in connect::sources(sources, address, 0) {
        let space = &ports.space(source, address.0);
        result = attempt(SourcePorts { source, ports, space, tenant: PROBES }, opening).await;
        if !matches!(&result, Err(error) if connect::classify(error) == ConnectResult::NoLocalPort) {
            break;
        }
    }
    result
}

async fn attempt(origin: SourcePorts<'_>, opening: ConnectPurpose) -> io::Result<(TcpStream, LocalPort)> {
    let (socket, port) = connect::start(origin, opening)?;
    // Set now, so that it applies at every exit.
    socket.set_zero_linger()?;
    socket.writable().await?;
    socket.take_error()?.map_or(Ok((socket, port)), Err)
}

/// Here and not in [`converse`], whose future would keep the bytes for every backend all the time.
fn read(socket: &TcpStream, answer: &mut ProbeResponse<'_>) -> io::Result<Poll<ProbeResult>> {
    let mut bytes = [0; READ];
    match socket.try_read(&mut bytes) {
        Ok(0) => Ok(Poll::Ready(answer.end())),
        Ok(count) => Ok(answer.feed(bytes.get(..count).unwrap_or(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Poll::Pending),
        Err(error) => Err(error),
    }
}

/// What is sent: in one piece, so that the answer to the first part cannot end the connection before the second.
fn question(address: SocketAddr, probe: &ProbeConfig) -> Vec<u8> {
    let mut bytes =
        if probe.send_proxy { proxy_protocol::HeaderBuilder::local().build() } else { Vec::new() };
    match &probe.ask {
        ProbeCheck::Connect => {}
        ProbeCheck::Http { path, host, .. } => {
            // An IPv6 address without its zone, which is of no use to others (RFC 9844, 6).
            let own = || SocketAddr::new(address.ip(), address.port()).to_string();
            let host = host.clone().unwrap_or_else(own);
            let version = env!("CARGO_PKG_VERSION");
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: vestibule/{version}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
            );
            bytes.extend(request.bytes());
        }
        ProbeCheck::Exchange { send, .. } => bytes.extend(send),
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn asked(address: &str, send_proxy: bool, ask: ProbeCheck) -> Vec<u8> {
        let (interval, timeout) = (Duration::from_secs(5), Duration::from_secs(1));
        let probe = ProbeConfig { interval, timeout, rise: 1, fall: 1, port: None, send_proxy, ask };
        question(address.parse().unwrap(), &probe)
    }

    fn get(host: Option<&str>) -> ProbeCheck {
        ProbeCheck::Http {
            path: "/up?x=1".to_owned(),
            host: host.map(str::to_owned),
            expect_status: vec![200..=200],
        }
    }

    #[test]
    fn probe_request_has_a_host_header() {
        for (address, host, expected) in [
            ("10.0.0.1:80", None, "10.0.0.1:80"),
            ("[fd00::1]:8080", None, "[fd00::1]:8080"),
            ("[fe80::1%7]:8080", None, "[fe80::1]:8080"),
            ("10.0.0.1:80", Some("shop.example.com"), "shop.example.com"),
        ] {
            let request = String::from_utf8(asked(address, false, get(host))).unwrap();
            let lines: Vec<_> = request.split("\r\n").collect();
            let agent = concat!("User-Agent: vestibule/", env!("CARGO_PKG_VERSION"));
            let host = format!("Host: {expected}");
            let head = ["GET /up?x=1 HTTP/1.1", &host, agent, "Accept: */*", "Connection: close", "", ""];
            assert_eq!(lines, head);
        }
    }

    #[test]
    fn probe_request_starts_with_a_local_header() {
        let local = [&proxy_protocol::SIGNATURE[..], &[0x20, 0, 0, 0]].concat();
        let exchange = ProbeCheck::Exchange {
            protocol: Protocol::Tcp,
            send: b"PING".to_vec(),
            expect: b"PONG".to_vec(),
            prefix: true,
        };
        assert_eq!(asked("10.0.0.1:80", true, ProbeCheck::Connect), local);
        assert_eq!(asked("10.0.0.1:80", false, ProbeCheck::Connect), b"");
        assert_eq!(asked("10.0.0.1:80", true, exchange.clone()), [&local[..], b"PING"].concat());
        assert_eq!(asked("10.0.0.1:80", false, exchange), b"PING");
        assert!(asked("10.0.0.1:80", true, get(None)).starts_with(&[&local[..], b"GET /"].concat()));
    }
}
