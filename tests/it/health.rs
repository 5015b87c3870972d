//! What the load balancer's health check asks, whatever stands in front of its request.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vestibule::clock;
use vestibule::config::Config;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;
use vestibule::pool::Answers;
use vestibule::state::{LiveState, NotReady, ProcessLimits};

use super::harness::{
    ACME, Conf, Metric, Proxy, are_read, closed_port, connect, connect_from, end_of, eventually, exchange,
    header, http, is_reset, open_port,
};

const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: target\r\nuser-agent: ELB-HealthChecker/2.0\r\n\r\n";
/// Room of a process that carries no session.
const MOST: ProcessLimits = ProcessLimits { sessions: 10, pending: 10, pipes: 0 };
/// Connections at once; one more takes the place of the one that was silent for longest.
const AT_ONCE: usize = 128;

async fn proxy(acme: &TestBackend) -> Proxy {
    Conf { acme: vec![acme.address()], ..Conf::default() }.start().await
}

/// The status and the text of a check.
async fn check(proxy: &Proxy) -> (u16, String) {
    let (head, body) = http(proxy.server().health(), "/healthz", b"").await;
    (status(&head), body.trim_end().to_owned())
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Waits until the check says so.
async fn says(proxy: &Proxy, status: u16, text: &str) {
    let expected = (status, text.to_owned());
    eventually(text, async || (check(proxy).await == expected).then_some(())).await;
}

/// Reads to the end.
async fn answer(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    tokio::time::timeout(super::harness::LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn health_check_is_answered_with_and_without_a_proxy_header() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut wrong_crc = header(ACME);
    wrong_crc[31] ^= 1;
    let v6 = nlb::header("[fd00::7]:1".parse().unwrap(), "[fd00::1]:2".parse().unwrap(), None);
    for before in [vec![], nlb::health_check_header(), header(ACME), wrong_crc, v6] {
        let (head, body) = http(proxy.server().health(), "/healthz", &before).await;
        assert_eq!((status(&head), &body[..]), (200, "ok\n"), "behind {before:?}");
    }
    // It is no session, whatever the header says.
    proxy.metric("vestibule_connections_accepted_total", &[]).is(0).await;
    assert_eq!(acme.sessions(), 0);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn health_check_may_arrive_in_pieces() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    for before in [nlb::health_check_header(), header(ACME)] {
        let whole = [&before[..], REQUEST].concat();
        for cut in [1, 12, 15, 16, 28, 50, 99, 100, 103, whole.len() - 1] {
            let mut stream = connect(proxy.server().health()).await;
            stream.write_all(&whole[..cut]).await.unwrap();
            are_read([&stream]).await;
            stream.write_all(&whole[cut..]).await.unwrap();
            let answer = answer(stream).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "cut at {cut}: {answer}");
            assert!(answer.ends_with("\r\n\r\nok\n"), "cut at {cut}: {answer}");
        }
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn health_check_connection_serves_one_request() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut stream = connect(proxy.server().health()).await;
    stream.write_all(REQUEST).await.unwrap();
    let answer = answer(stream).await;
    assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1);
    proxy.finish().await;
}

#[tokio::test]
async fn health_endpoint_serves_only_its_path() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    for (path, expected) in [
        ("/healthz", 200),
        ("/healthz?x=1", 200),
        ("/healthz/", 404),
        ("/", 404),
        ("/metrics", 404),
        ("/status", 404),
    ] {
        let (head, body) = http(proxy.server().health(), path, &nlb::health_check_header()).await;
        assert_eq!(status(&head), expected, "{path}");
        assert_eq!(body == "ok\n", expected == 200, "{path}: {body}");
    }
    // What is no HTTP gets no 200.
    let mut stream = connect(proxy.server().health()).await;
    stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xFC\x03\x03 and so on\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    proxy.finish().await;
}

#[tokio::test]
async fn health_check_answers_no_backend_until_one_is_usable() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let (_kept, address) = closed_port(0).unwrap();
    let health =
        format!("interval = \"100ms\"\ntimeout = \"100ms\"\nrise = 1\nfall = 1\nport = {}", address.port());
    let conf =
        Conf { acme: vec![acme.address()], health: health.clone(), globex_health: health, ..Conf::default() };
    let proxy = conf.start().await;
    says(&proxy, 503, "no_backend").await;
    is_reset(&mut proxy.open(ACME, b"payload").await).await;
    let no_backend = [("tenant", "acme"), ("by", "proxy"), ("at", "pool"), ("why", "no_backend")];
    proxy.ended(&no_backend).is(1).await;
    proxy.metric("vestibule_backend_healthy", &[]).is(0).await;
    proxy.metric("vestibule_backend_probes_total", &[("result", "connect_refused")]).is_at_least(2).await;
    proxy.metric("vestibule_backend_probes_total", &[("result", "passed")]).is(0).await;
    assert_eq!(acme.sessions(), 0);

    let probed = open_port(address);
    says(&proxy, 200, "ok").await;
    proxy.metric("vestibule_backend_healthy", &[]).is(2).await;
    // Another change within a tenth of a second reaches the pool at the end of that.
    proxy.metric("vestibule_pool_usable_backends", &[]).is(2).await;
    assert_eq!(exchange(proxy.open(ACME, b"payload").await).await.unwrap(), b"payload");

    drop(probed);
    says(&proxy, 503, "no_backend").await;
    let _probed = open_port(address);
    says(&proxy, 200, "ok").await;
    proxy.metric("vestibule_pool_usable_backends", &[]).is(2).await;
    proxy.ended(&no_backend).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn one_usable_pool_is_enough() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let (_probed, address) = closed_port(0).unwrap();
    let health = format!("interval = \"100ms\"\ntimeout = \"100ms\"\nfall = 1\nport = {}", address.port());
    let proxy = Conf { acme: vec![acme.address()], health, ..Conf::default() }.start().await;
    proxy.metric("vestibule_pool_usable_backends", &[("pool", "acme")]).is(0).await;
    says(&proxy, 200, "ok").await;
    is_reset(&mut proxy.open(ACME, b"payload").await).await;
    proxy.ended(&[("tenant", "acme"), ("at", "pool"), ("why", "no_backend")]).is(1).await;
    assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// A port where a connection is neither taken nor refused: its queue is full.
fn full_port() -> (TcpListener, std::net::TcpStream, SocketAddr) {
    let (socket, address) = closed_port(0).unwrap();
    socket.listen(0).unwrap();
    let waiting = std::net::TcpStream::connect(address).unwrap();
    (socket.into(), waiting, address)
}

#[tokio::test]
async fn health_check_answers_starting_before_the_first_probes() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let (full, _waiting, address) = full_port();
    let health = format!("interval = \"60s\"\ntimeout = \"60s\"\nport = {}", address.port());
    let proxy = Conf { acme: vec![acme.address()], health, ..Conf::default() }.start().await;
    assert_eq!(check(&proxy).await, (503, "starting".to_owned()));
    // Traffic that comes all the same is carried: the backend may well be there.
    assert_eq!(exchange(proxy.open(ACME, b"early").await).await.unwrap(), b"early");
    proxy.others_are_unharmed().await;
    assert_eq!(check(&proxy).await, (503, "starting".to_owned()));
    proxy.metric("vestibule_backend_healthy", &[("pool", "acme")]).is_negative().await;

    eventually("ok", async || {
        while full.accept().is_ok() {}
        (check(&proxy).await == (200, "ok".to_owned())).then_some(())
    })
    .await;
    proxy.finish().await;
}

#[test]
fn reload_before_the_first_probes_does_not_leave_the_process_starting() {
    let config = |backends: &str, health: &str| {
        let text = format!(
            "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\npool = \"app\"
             [[pool]]\nname = \"app\"\nbackends = [{backends}]\nhealth = {{ {health} }}\n[[tenant]]\nname = \"acme\""
        );
        Arc::new(Config::parse("test.toml", &text).unwrap())
    };
    let live = LiveState::of(config("\"127.0.0.1:1\", \"127.0.0.1:2\"", "interval = \"5s\""), 1, MOST);
    assert_eq!(live.readiness(), Err(NotReady::Starting));
    // No probe task runs yet, and none will know of the backends of before.
    let next = config("\"127.0.0.1:3\"", "kind = \"none\"");
    let turn = live.begin_reload(&next).unwrap();
    assert_eq!(turn.put(&next, vec![Vec::new()], &Answers::default(), clock::now()).pools.changed, 1);
    assert_eq!(live.readiness(), Ok(()));
    // A process that has started once does not start again.
    let last = config("\"127.0.0.1:3\", \"127.0.0.1:4\"", "interval = \"5s\"");
    let turn = live.begin_reload(&last).unwrap();
    assert_eq!(turn.put(&last, vec![Vec::new()], &Answers::default(), clock::now()).pools.changed, 1);
    assert_eq!(live.readiness(), Ok(()));
}

#[tokio::test]
async fn draining_process_reports_it_and_accepts_sessions_during_the_notice() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
    proxy.metric("vestibule_draining", &[]).is(0).await;
    proxy.server().drain();
    says(&proxy, 503, "draining").await;
    proxy.metric("vestibule_draining", &[]).is(1).await;
    assert_eq!(exchange(proxy.open(ACME, b"late").await).await.unwrap(), b"late");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// So many checks that have asked half of their question.
async fn half_asked(proxy: &Proxy, count: usize) -> Vec<TcpStream> {
    let mut silent = Vec::new();
    for _ in 0..count {
        let mut stream = connect(proxy.server().health()).await;
        // It may have been closed already, for a later one.
        stream.write_all(&REQUEST[..10]).await.unwrap_or_default();
        silent.push(stream);
    }
    silent
}

/// Whether it has neither been answered nor closed.
fn is_open(stream: &TcpStream) -> bool {
    stream.try_read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

#[tokio::test]
async fn half_a_request_does_not_block_others() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    // A machine so busy that the silent are given up meanwhile says nothing of who waits for whom.
    for attempt in 1.. {
        let silent = half_asked(&proxy, AT_ONCE - 1).await;
        assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
        if silent.iter().all(is_open) {
            break;
        }
        assert!(attempt < 3, "a place was free, and it was waited for");
    }
    proxy.finish().await;
}

#[tokio::test]
async fn silent_health_connection_gives_its_slot_to_a_new_check() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut silent = half_asked(&proxy, AT_ONCE).await;
    assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
    let gave_way = async || (!silent.iter().all(is_open)).then_some(());
    eventually("one to give way", gave_way).await;
    for stream in &mut silent {
        assert_eq!(end_of(stream).await.unwrap_or(0), 0, "half a request was answered");
    }
    proxy.finish().await;
}

/// What became of connections at the health port.
fn ended<'a>(proxy: &'a Proxy, labels: &'a [(&'a str, &'a str)]) -> Metric<'a> {
    proxy.metric("vestibule_admin_connections_total", labels)
}

#[tokio::test]
async fn health_check_is_answered_during_a_flood_of_2000_connections() {
    const MANY: usize = 2000;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    // Silent ones, and such as have sent one byte, half a request, or a header without a request.
    for bytes in [vec![], b"G".to_vec(), REQUEST[..10].to_vec(), nlb::health_check_header()] {
        let mut held = Vec::new();
        for _ in 0..MANY {
            let mut stream = connect(proxy.server().health()).await;
            // It may have been closed already, for a later one.
            stream.write_all(&bytes).await.unwrap_or_default();
            held.push(stream);
        }
        assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
        assert_eq!(exchange(proxy.open(ACME, b"payload").await).await.unwrap(), b"payload");
        let are_bounded =
            async || (held.iter().filter(|stream| is_open(stream)).count() <= AT_ONCE).then_some(());
        eventually("all but so many to be closed", are_bounded).await;
    }
    ended(&proxy, &[("endpoint", "health"), ("result", "displaced")]).is_at_least(1).await;
    ended(&proxy, &[("endpoint", "health"), ("result", "answered")]).is(4).await;
    proxy.others_are_unharmed().await;
    proxy.metric("vestibule_admin_connections", &[("endpoint", "health")]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(4).await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_and_half_checks_are_ended_by_their_own_limits() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut silent = connect(proxy.server().health()).await;
    let mut half = half_asked(&proxy, 1).await;
    assert_eq!(end_of(&mut silent).await.unwrap(), 0);
    assert_eq!(end_of(&mut half[0]).await.unwrap_or(0), 0);
    ended(&proxy, &[("endpoint", "health"), ("result", "first_byte_timeout")]).is(1).await;
    ended(&proxy, &[("endpoint", "health"), ("result", "request_timeout")]).is(1).await;
    drop(connect(proxy.server().health()).await);
    ended(&proxy, &[("endpoint", "health"), ("result", "closed")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.metric("vestibule_admin_connections", &[("endpoint", "health")]).is(0).await;
    proxy.finish().await;
}

#[tokio::test]
async fn untrusted_connections_take_no_slot_of_trusted_networks() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let check_keys = "trusted-sources = [\"127.0.0.2\"]".to_owned();
    let proxy = Conf { acme: vec![acme.address()], check: check_keys, ..Conf::default() }.start().await;
    // A machine so busy that the first is given up meanwhile says nothing of places.
    for attempt in 1.. {
        let mut trusted = connect_from("127.0.0.2", proxy.server().health()).await;
        trusted.write_all(&REQUEST[..10]).await.unwrap();
        let strangers = half_asked(&proxy, 2 * AT_ONCE).await;
        // Strangers share places, so one more of them is answered.
        assert_eq!(check(&proxy).await, (200, "ok".to_owned()));
        let is_kept = trusted.write_all(&REQUEST[10..]).await.is_ok();
        let mut found = String::new();
        if is_kept
            && trusted.read_to_string(&mut found).await.is_ok()
            && found.starts_with("HTTP/1.1 200 OK\r\n")
        {
            drop(strangers);
            break;
        }
        assert!(attempt < 5, "strangers took a place of a trusted network");
    }
    ended(&proxy, &[("endpoint", "health"), ("result", "displaced")]).is_at_least(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
