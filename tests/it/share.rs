//! What the process takes at once, and how its workers share it.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, GLOBEX, LIMIT, Proxy, exchange, is_reset, read};

/// A third tenant.
const HOOLI: &str = "vpce-0400110400110400a";

/// A session that is known to be carried.
async fn carried(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.open(ACME, b"x").await;
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

/// How many sessions each of the two workers has.
async fn of_workers(proxy: &Proxy) -> [f64; 2] {
    let of = async |worker| proxy.value("vestibule_worker_sessions_active", &[("worker", worker)]).await;
    [of("0").await, of("1").await]
}

/// Sessions of a tenant, as many as it gets.
async fn as_many_as_it_gets(proxy: &Proxy, endpoint: &str) -> Vec<TcpStream> {
    let mut sessions = Vec::new();
    loop {
        let mut stream = proxy.open(endpoint, b"x").await;
        let mut byte = [0];
        match timeout(LIMIT, stream.read(&mut byte)).await.expect("an answer or a reset") {
            Ok(_) => sessions.push(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                return sessions;
            }
        }
    }
}

#[tokio::test]
async fn last_session_within_the_process_limit_is_admitted_and_the_next_is_shed() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let more = format!("[[tenant]]\nname = \"hooli\"\nendpoints = [\"{HOOLI}\"]\npool = \"acme\"\n");
    let process = "max-sessions = 3".to_owned();
    let proxy = Conf { acme: vec![acme.address()], process, more, ..Conf::default() }.start().await;
    proxy.metric("vestibule_sessions_limit", &[]).is(3).await;
    let mut sessions = Vec::new();
    for endpoint in [ACME, GLOBEX, HOOLI] {
        let mut stream = proxy.open(endpoint, b"x").await;
        assert_eq!(read(&mut stream, 1).await, b"x");
        sessions.push(stream);
    }
    for (endpoint, tenant) in [(ACME, "acme"), (GLOBEX, "globex")] {
        is_reset(&mut proxy.open(endpoint, b"x").await).await;
        proxy.ended(&[("tenant", tenant), ("by", "proxy"), ("at", "tenant"), ("why", "shed")]).is(1).await;
        let labels = [("tenant", tenant), ("why", "shed")];
        proxy.metric("vestibule_tenant_rejected_total", &labels).is(1).await;
    }
    assert_eq!(proxy.logged("shed").await["listener"], "web");
    for session in &mut sessions {
        session.write_all(b"still").await.unwrap();
        assert_eq!(read(session, 5).await, b"still");
    }
    assert_eq!(acme.sessions(), 2);
    for session in sessions {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("why", "done")]).is(3).await;
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn two_tenants_at_their_most_and_silence_leave_room_for_a_third() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let more = format!("[[tenant]]\nname = \"hooli\"\nendpoints = [\"{HOOLI}\"]\npool = \"acme\"\n");
    let process = "max-sessions = 64".to_owned();
    let proxy = Conf { acme: vec![acme.address()], process, more, ..Conf::default() }.start().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(proxy.connect().await);
    }
    let first = as_many_as_it_gets(&proxy, ACME).await;
    let second = as_many_as_it_gets(&proxy, GLOBEX).await;
    // A fifth is left beside the first, and half of that beside both.
    assert_eq!((first.len(), second.len()), (50, 7));
    proxy.metric("vestibule_sessions_pending", &[]).is(100).await;
    for _ in 0..100 {
        assert_eq!(exchange(proxy.open(HOOLI, b"served").await).await.unwrap(), b"served");
    }
    proxy.ended(&[("tenant", "hooli"), ("why", "done")]).is(100).await;
    for (tenant, shed) in [("acme", 1), ("globex", 1), ("hooli", 0)] {
        proxy.ended(&[("tenant", tenant), ("at", "tenant"), ("why", "shed")]).is(shed).await;
    }
    for session in first.into_iter().chain(second) {
        exchange(session).await.unwrap();
    }
    drop(silent);
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    proxy.finish().await;
}

#[tokio::test]
async fn workers_balance_new_connections() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let mut sessions = [Vec::new(), Vec::new()];
    let mut before = of_workers(&proxy).await;
    while sessions[0].len() < 60 || sessions[1].len() < 20 {
        let session = carried(&proxy).await;
        let now = of_workers(&proxy).await;
        let worker = usize::from(now[1] > before[1]);
        assert!((now[worker] - before[worker] - 1.0).abs() < 0.5, "{before:?} and then {now:?}");
        sessions[worker].push(session);
        before = now;
        assert!(sessions[0].len() + sessions[1].len() < 400, "one worker gets everything");
    }
    // One worker loses all its sessions. The kernel does not know, and goes on giving half to the other.
    let [heavy, light] = sessions;
    for session in light {
        exchange(session).await.unwrap();
    }
    proxy.metric("vestibule_worker_sessions_active", &[("worker", "1")]).is(0).await;
    let handed_over =
        async |worker| proxy.value("vestibule_worker_handed_over_total", &[("worker", worker)]).await;
    let earlier = [handed_over("0").await, handed_over("1").await];
    let mut later = Vec::new();
    while handed_over("0").await - earlier[0] < 0.5 {
        later.push(carried(&proxy).await);
        assert!(later.len() < 100, "nothing is handed over");
    }
    assert!((handed_over("1").await - earlier[1]).abs() < 0.5, "the lighter one keeps what it gets");
    let now = of_workers(&proxy).await;
    assert!(now[1] > 0.5, "{now:?}");
    // Who was handed over is served as well as anybody.
    for session in heavy.into_iter().chain(later) {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    proxy.ended(&[("by", "proxy")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn many_sessions_at_once_are_on_both_workers() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let mut sessions = Vec::new();
    for _ in 0..200 {
        sessions.push(carried(&proxy).await);
    }
    let [one, two] = of_workers(&proxy).await;
    assert!((one + two - 200.0).abs() < 0.5, "{one} and {two}");
    // Beyond a quarter and sixteen more, a connection is handed over: 82 is the least that one can have.
    assert!(one.min(two) > 81.5, "{one} and {two}");
    for (place, session) in sessions.iter_mut().enumerate() {
        let payload = format!("session {place}");
        session.write_all(payload.as_bytes()).await.unwrap();
        assert_eq!(read(session, payload.len()).await, payload.as_bytes());
    }
    for session in sessions {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(200).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
