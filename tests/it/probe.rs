//! Probes against servers that do what servers should, and what they should not.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use vestibule::account::{Labels, ProbeResult};
use vestibule::addr::BackendAddr;
use vestibule::admission::ports::LocalPorts;
use vestibule::clock;
use vestibule::config::{
    self, BackendTarget, Balance, EjectionConfig, ProbeCheck, ProbeConfig, Protocol, QueueConfig,
};
use vestibule::pool::backend::Backend;
use vestibule::pool::health::HealthState;
use vestibule::pool::{Pool, ResolvedAddress};
use vestibule::probe::exchange::ask;
use vestibule::probe::{ProbeSlots, ProbeStagger, run};
use vestibule::proxy_protocol::SIGNATURE;

/// Probes at once.
const AT_ONCE: usize = 64;

use super::harness::{Began, LIMIT, closed_port, connect, eventually, in_hex, is_reset, open_port};

/// A probe with all the time of the test.
fn probe(ask: ProbeCheck) -> ProbeConfig {
    let (interval, timeout) = (LIMIT, LIMIT);
    ProbeConfig { interval, timeout, rise: 1, fall: 1, port: None, send_proxy: false, ask }
}

fn get() -> ProbeCheck {
    ProbeCheck::Http { path: "/up".to_owned(), host: None, expect_status: vec![200..=299] }
}

fn banner(expect: &str) -> ProbeCheck {
    ProbeCheck::Exchange { protocol: Protocol::Tcp, send: Vec::new(), expect: expect.into(), prefix: true }
}

fn ping() -> ProbeCheck {
    ProbeCheck::Exchange {
        protocol: Protocol::Tcp,
        send: b"PING\r\n".to_vec(),
        expect: b"PONG".to_vec(),
        prefix: false,
    }
}

fn lanes_of_one() -> (Arc<ProbeSlots>, Arc<LocalPorts>) {
    (Arc::new(ProbeSlots::new(1)), Arc::default())
}

async fn ask_at(address: SocketAddr, probe: &ProbeConfig) -> ProbeResult {
    timeout(LIMIT * 2, ask(BackendAddr(address), (&[], &LocalPorts::default()), probe))
        .await
        .expect("a probe has its own limit")
}

/// What a probe says of a server that does this, and what became of that.
async fn probed<T>(probe: &ProbeConfig, serve: impl AsyncFnOnce(TcpStream) -> T) -> (ProbeResult, T) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = async {
        let (stream, _) = timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
        serve(stream).await
    };
    tokio::join!(ask_at(address, probe), served)
}

/// Reads the question up to its last bytes.
async fn question(stream: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let mut question = Vec::new();
    while !question.ends_with(end) {
        let count = timeout(LIMIT, stream.read_buf(&mut question)).await.unwrap().unwrap();
        assert!(count > 0, "an end after {:?}", String::from_utf8_lossy(&question));
    }
    question
}

/// The verdict where a server reads the question and says this; the probe's side is reset, whatever it was.
async fn answered(ask: ProbeCheck, answer: &[u8]) -> ProbeResult {
    let end: &[u8] = match ask {
        ProbeCheck::Http { .. } => b"\r\n\r\n",
        ProbeCheck::Connect | ProbeCheck::Exchange { .. } => b"\r\n",
    };
    let serve = async |mut stream: TcpStream| {
        question(&mut stream, end).await;
        stream.write_all(answer).await.unwrap();
        stream
    };
    let (verdict, mut stream) = probed(&probe(ask), serve).await;
    is_reset(&mut stream).await;
    verdict
}

/// Sends the same for ever; how that ended.
async fn flood(stream: &mut TcpStream, bytes: &[u8]) -> io::ErrorKind {
    let endless = async {
        loop {
            if let Err(error) = stream.write_all(bytes).await {
                break error.kind();
            }
        }
    };
    timeout(LIMIT, endless).await.expect("an end of the connection")
}

#[tokio::test]
async fn probe_of_a_closed_port_is_refused() {
    let (_socket, address) = closed_port(0).unwrap();
    for ask in [ProbeCheck::Connect, get(), ping()] {
        assert_eq!(ask_at(address, &probe(ask)).await, ProbeResult::ConnectRefused);
    }
}

#[tokio::test]
async fn probe_of_a_full_accept_queue_times_out() {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let rows = |place: usize, state: &'static str| {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let found = table.lines().filter(|row| {
            let columns: Vec<_> = row.split_ascii_whitespace().collect();
            columns[place] == in_hex(address) && columns[3] == state
        });
        found.map(str::to_owned).collect::<Vec<_>>()
    };
    // A listener's row has in its second queue who waits to be accepted: with one, this one is full.
    let _first = connect(address).await;
    eventually("a full backlog", async || rows(1, "0A")[0].contains(":00000001").then_some(())).await;
    let limit = Duration::from_millis(300);
    for ask in [ProbeCheck::Connect, get()] {
        let began = Began::now();
        let verdict = ask_at(address, &ProbeConfig { timeout: limit, ..probe(ask) }).await;
        assert_eq!(verdict, ProbeResult::ConnectTimeout);
        began.lasted(limit);
        assert_eq!(rows(2, "02"), [""; 0], "none is left that still connects");
    }
}

#[tokio::test]
async fn connect_probe_passes_on_connection() {
    let (verdict, mut stream) = probed(&probe(ProbeCheck::Connect), async |stream| stream).await;
    assert_eq!(verdict, ProbeResult::Passed);
    is_reset(&mut stream).await;
}

#[tokio::test]
async fn silent_probe_target_times_out() {
    for ask in [get(), banner("220 "), ping()] {
        let limit = Duration::from_millis(300);
        let began = Began::now();
        let serve = async |stream: TcpStream| stream;
        let (verdict, mut stream) = probed(&ProbeConfig { timeout: limit, ..probe(ask) }, serve).await;
        assert_eq!(verdict, ProbeResult::AnswerTimeout);
        began.lasted(limit);
        let mut bytes = Vec::new();
        let end = timeout(LIMIT, stream.read_to_end(&mut bytes)).await.unwrap();
        assert_eq!(end.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn probe_timeout_covers_all_steps() {
    // Each byte is early enough, and all of them are not.
    let limit = Duration::from_millis(300);
    let serve = async |mut stream: TcpStream| {
        question(&mut stream, b"\r\n\r\n").await;
        stream.write_all(b"HTTP/1.1 200 OK\r\na: ").await.unwrap();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            if stream.write_all(b"x").await.is_err() {
                break;
            }
        }
    };
    let (verdict, ()) = probed(&ProbeConfig { timeout: limit, ..probe(get()) }, serve).await;
    assert_eq!(verdict, ProbeResult::AnswerTimeout);
}

#[tokio::test]
async fn endless_probe_answer_is_not_read_to_its_end() {
    for (ask, start, more) in [
        (get(), &b"HTTP/1.1 200 OK\r\na: "[..], &[b'x'; 512][..]),
        (get(), b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        (get(), b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (ping(), b"", &[b'P'; 16_384]),
    ] {
        let serve = async |mut stream: TcpStream| {
            stream.write_all(start).await.unwrap();
            flood(&mut stream, more).await
        };
        let (verdict, end) = probed(&probe(ask), serve).await;
        assert_eq!(verdict, ProbeResult::AnswerTooLong);
        assert!(matches!(end, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{end:?}");
    }
}

#[tokio::test]
async fn transfer_replies_are_read_back() {
    for (answer, expected) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..], ProbeResult::Passed),
        (b"HTTP/1.0 204 No Content\r\n\r\n", ProbeResult::Passed),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", ProbeResult::Passed),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", ProbeResult::UnexpectedStatus),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\nThe plain HTTP request was sent to HTTPS port",
            ProbeResult::UnexpectedStatus,
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ProbeResult::AnswerMalformed),
        (b"\x15\x03\x01\0\x02\x02\x46", ProbeResult::AnswerTls),
    ] {
        assert_eq!(answered(get(), answer).await, expected, "{}", String::from_utf8_lossy(answer));
    }
    assert_eq!(answered(ping(), b"+PONG\r\n").await, ProbeResult::Passed);
    let whole = ProbeCheck::Exchange {
        protocol: Protocol::Tcp,
        send: b"PING\r\n".to_vec(),
        expect: b"PONG".to_vec(),
        prefix: true,
    };
    assert_eq!(answered(whole, b"-LOADING\r\n").await, ProbeResult::UnexpectedAnswer);
}

#[tokio::test]
async fn server_may_speak_first_and_in_pieces() {
    let serve = async |mut stream: TcpStream| {
        for byte in *b"220 mail" {
            stream.write_all(&[byte]).await.unwrap_or_default();
            tokio::task::yield_now().await;
        }
        stream
    };
    let (verdict, _stream) = probed(&probe(banner("220 ")), serve).await;
    assert_eq!(verdict, ProbeResult::Passed);
}

#[tokio::test]
async fn reset_and_end_are_distinguished() {
    for (ask, end, said, expected) in [
        (get(), &b"\r\n\r\n"[..], &b""[..], ProbeResult::Closed),
        (get(), b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n", ProbeResult::Closed),
        (ping(), b"\r\n", b"", ProbeResult::Closed),
        (ping(), b"\r\n", b"-ERR", ProbeResult::UnexpectedAnswer),
        (banner("220 "), b"", b"", ProbeResult::Closed),
        (banner("220 "), b"", b"22", ProbeResult::Closed),
    ] {
        for is_reset in [false, true] {
            let serve = async |mut stream: TcpStream| {
                if !end.is_empty() {
                    question(&mut stream, end).await;
                }
                stream.write_all(said).await.unwrap();
                if is_reset {
                    stream.set_zero_linger().unwrap();
                }
            };
            let (verdict, ()) = probed(&probe(ask.clone()), serve).await;
            let expected = if is_reset { ProbeResult::Reset } else { expected };
            assert_eq!(verdict, expected, "{}", String::from_utf8_lossy(said));
        }
    }
}

#[tokio::test]
async fn probe_sends_a_local_header_first() {
    let local = [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat();
    for (ask, rest) in [(ProbeCheck::Connect, ""), (ping(), "PING\r\n"), (get(), "GET /up HTTP/1.1\r\n")] {
        let serve = async |mut stream: TcpStream| {
            let mut header = [0; 16];
            timeout(LIMIT, stream.read_exact(&mut header)).await.unwrap().unwrap();
            let mut start = vec![0; rest.len()];
            timeout(LIMIT, stream.read_exact(&mut start)).await.unwrap().unwrap();
            stream.write_all(b"HTTP/1.1 200 PONG\r\n\r\n").await.unwrap_or_default();
            (header, String::from_utf8(start).unwrap())
        };
        let (verdict, (header, start)) = probed(&ProbeConfig { send_proxy: true, ..probe(ask) }, serve).await;
        assert_eq!(verdict, ProbeResult::Passed);
        assert_eq!((&header[..], &start[..]), (&local[..], rest));
    }
}

#[tokio::test]
async fn another_port_is_asked_by_its_own_name() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let traffic = "[::1]:1".parse().unwrap();
    let probe = ProbeConfig { port: Some(port), ..probe(get()) };
    let served = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let question = question(&mut stream, b"\r\n\r\n").await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        String::from_utf8(question).unwrap()
    };
    let (verdict, question) = tokio::join!(ask_at(traffic, &probe), served);
    assert_eq!(verdict, ProbeResult::Passed);
    assert!(question.contains(&format!("\r\nHost: [::1]:{port}\r\n")), "{question}");
}

#[tokio::test]
async fn sources_are_tried_in_turn_while_only_ports_are_at_fault() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = BackendAddr(listener.local_addr().unwrap());
    // An address that is not this machine's (RFC 5737) has no ports here.
    let [foreign, own] = [[192, 0, 2, 1], [127, 0, 0, 7]].map(|ip| IpAddr::V4(Ipv4Addr::from(ip)));
    let probe = probe(ProbeCheck::Connect);
    assert_eq!(ask(address, (&[foreign], &LocalPorts::default()), &probe).await, ProbeResult::NoLocalPort);
    assert_eq!(ask(address, (&[foreign, own], &LocalPorts::default()), &probe).await, ProbeResult::Passed);
    let (_, from) = listener.accept().await.unwrap();
    assert_eq!(from.ip(), own);
}

/// A pool of one name, and the backends that it leads to.
fn pool(
    probe: ProbeConfig,
    source_addresses: Vec<IpAddr>,
    found: &[SocketAddr],
) -> (Arc<Pool>, Vec<Arc<Backend>>) {
    let named = config::BackendConfig {
        target: BackendTarget::Host { name: "backend.test".to_owned(), port: 1 },
        weight: 1,
        zone: None,
        max_sessions: None,
        backup: false,
    };
    let config = config::PoolConfig {
        name: "probed".to_owned(),
        balance: Balance::RoundRobin,
        backends: vec![named; found.len().max(1)],
        prefer_zone: None,
        send_proxy: false,
        attempts: 1,
        retry_budget: 0,
        slow_start: Duration::ZERO,
        source_addresses,
        queue: QueueConfig { length: 0, timeout: LIMIT },
        panic_threshold: 0,
        health: Some(probe),
        ejection: EjectionConfig { consecutive_failures: 0, base_time: LIMIT, max_percent: 0 },
    };
    let labels = Labels::default();
    let pool = Arc::new(Pool::new(&config, &labels));
    let mut backends = Vec::new();
    for (place, address) in found.iter().enumerate() {
        let resolved = [ResolvedAddress { address: *address, weight: None, is_backup: false }];
        backends.extend(pool.resolve(place, &resolved, &labels, clock::now()).0);
    }
    assert_eq!(backends.len(), found.len());
    (pool, backends)
}

fn count(backend: &Backend, verdict: ProbeResult) -> u64 {
    backend.probes().find(|(other, _)| *other == verdict).map_or(0, |(_, count)| count)
}

#[tokio::test]
async fn backend_is_probed_until_it_is_removed() {
    let (_socket, address) = closed_port(0).unwrap();
    let probe = ProbeConfig { interval: Duration::from_millis(20), ..probe(ProbeCheck::Connect) };
    let (pool, backends) = pool(probe, Vec::new(), &[address]);
    let backend = Arc::clone(&backends[0]);
    let turn = ProbeStagger { place: 0, of: 1 };
    let running = tokio::spawn(run(Arc::clone(&pool), Arc::clone(&backend), turn, lanes_of_one()));
    for state in [HealthState::Unhealthy, HealthState::Healthy, HealthState::Unhealthy, HealthState::Healthy]
    {
        let listener = (state == HealthState::Healthy).then(|| open_port(address));
        eventually(state.as_str(), async || (backend.state() == state).then_some(())).await;
        drop(listener);
    }
    assert!(count(&backend, ProbeResult::Passed) >= 2 && count(&backend, ProbeResult::ConnectRefused) >= 2);
    pool.resolve(0, &[], &Labels::default(), clock::now());
    timeout(LIMIT, running).await.expect("an end, as the backend is gone").unwrap();
}

#[tokio::test]
async fn backend_removed_before_its_first_probe_does_not_delay_readiness() {
    let (_socket, address) = closed_port(0).unwrap();
    let (pool, backends) = pool(probe(ProbeCheck::Connect), Vec::new(), &[address]);
    pool.resolve(0, &[], &Labels::default(), clock::now());
    let turn = ProbeStagger { place: 0, of: 1 };
    let running = run(Arc::clone(&pool), Arc::clone(&backends[0]), turn, lanes_of_one());
    timeout(LIMIT, running).await.unwrap();
    assert!(backends[0].awaits_first_probe() && pool.backends().is_empty());
    assert_eq!(backends[0].probes().map(|(_, count)| count).sum::<u64>(), 0);
}

#[tokio::test]
async fn unsent_probe_does_not_change_health() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let foreign = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let probe = ProbeConfig { interval: Duration::from_millis(20), ..probe(ProbeCheck::Connect) };
    let (pool, backends) = pool(probe, vec![foreign], &[listener.local_addr().unwrap()]);
    let turn = ProbeStagger { place: 0, of: 1 };
    let running = tokio::spawn(run(pool, Arc::clone(&backends[0]), turn, lanes_of_one()));
    let many = async || (count(&backends[0], ProbeResult::NoLocalPort) >= 5).then_some(());
    eventually("probes that cannot be sent", many).await;
    assert_eq!(backends[0].state(), HealthState::Unknown);
    running.abort();
}

#[tokio::test]
async fn probes_are_bounded_and_waiting_ones_do_not_fail() {
    const MORE: usize = 36;
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let addresses = (1..).take(AT_ONCE + MORE).map(|last| SocketAddr::from(([127, 0, 1, last], port)));
    let (pool, backends) = pool(probe(ping()), Vec::new(), &addresses.collect::<Vec<_>>());
    let lanes = Arc::new(ProbeSlots::new(AT_ONCE));
    for (place, backend) in backends.iter().enumerate() {
        let turn = ProbeStagger { place, of: backends.len() };
        tokio::spawn(run(Arc::clone(&pool), Arc::clone(backend), turn, (Arc::clone(&lanes), Arc::default())));
    }
    let accept = async || timeout(LIMIT, listener.accept()).await.unwrap().unwrap().0;
    let mut held = Vec::new();
    while held.len() < AT_ONCE {
        held.push(accept().await);
    }
    // All first probes are due by now, and no more come.
    let pause = Duration::from_millis(500);
    timeout(pause, listener.accept()).await.expect_err("no more than have a lane");
    for mut stream in held {
        stream.write_all(b"PONG").await.unwrap();
    }
    for _ in 0..MORE {
        accept().await.write_all(b"PONG").await.unwrap();
    }
    let healthy = || backends.iter().filter(|backend| backend.state() == HealthState::Healthy).count();
    eventually("all to be healthy", async || (healthy() == backends.len()).then_some(())).await;
    let quick = backends.iter().filter(|backend| Duration::from_micros(backend.probe_us().into()) < pause);
    let quick = quick.count();
    assert!((MORE / 2..=MORE).contains(&quick), "{quick} of {MORE} took less than they waited");
}

/// A question by datagram.
fn knock(send_proxy: bool) -> ProbeConfig {
    let (send, expect) = (b"PING".to_vec(), b"PONG".to_vec());
    ProbeConfig {
        send_proxy,
        ..probe(ProbeCheck::Exchange { protocol: Protocol::Udp, send, expect, prefix: true })
    }
}

/// What a probe by datagram says of a server that answers like this, and what was asked.
async fn knocked(probe: &ProbeConfig, answer: Option<&[u8]>) -> (ProbeResult, Vec<u8>) {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let answered = async {
        let mut room = [0; 2048];
        let (count, from) = timeout(LIMIT, server.recv_from(&mut room)).await.unwrap().unwrap();
        if let Some(answer) = answer {
            server.send_to(answer, from).await.unwrap();
        }
        room[..count].to_vec()
    };
    tokio::join!(ask_at(server.local_addr().unwrap(), probe), answered)
}

#[tokio::test]
async fn udp_probe_is_decided_by_the_first_datagram() {
    assert_eq!(knocked(&knock(false), Some(b"PONG and more")).await, (ProbeResult::Passed, b"PING".to_vec()));
    for wrong in [&b"PO"[..], b"", b"NO"] {
        let (verdict, _) = knocked(&knock(false), Some(wrong)).await;
        assert_eq!(verdict.is_success(), Some(false), "{wrong:?}: {verdict:?}");
        assert!(
            !matches!(verdict, ProbeResult::AnswerTimeout | ProbeResult::ConnectRefused),
            "{wrong:?}: {verdict:?}"
        );
    }
    let (verdict, asked) = knocked(&knock(true), Some(b"PONG")).await;
    let local = [&SIGNATURE[..], &[0x20, 0, 0, 0], b"PING"].concat();
    assert_eq!((verdict, asked), (ProbeResult::Passed, local));
}

#[tokio::test]
async fn udp_probe_without_answer_times_out_and_closed_port_is_refused() {
    let short = ProbeConfig { timeout: Duration::from_millis(100), ..knock(false) };
    assert_eq!(knocked(&short, None).await.0, ProbeResult::AnswerTimeout);
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_eq!(ask_at(gone, &knock(false)).await, ProbeResult::ConnectRefused);
}
