//! Sessions that wait because every backend has as many as it may have.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::harness::{ACME, Conf, Proxy, is_reset, read};
use super::raw::{Held, Raw, Swallow};
use super::sessions::{ROUND_ROBIN, UMBRELLA, asked, connects, greeting, is, is_turned_away, umbrella, with};

/// A proxy whose one backend may have `most` sessions.
async fn proxy(raw: &Raw, most: u32, queue: &str) -> Proxy {
    let backends = vec![with(raw.address(), &format!("max-sessions = {most}"))];
    Conf { backends, pool: queue.to_owned(), ..Conf::default() }.start().await
}

async fn queued(proxy: &Proxy, count: u32) {
    proxy.metric("vestibule_pool_sessions_queued", &[("pool", "acme")]).is(count).await;
}

/// Sessions that ended at the pool, by the proxy.
async fn ended(proxy: &Proxy, why: &str, count: u32) {
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "pool"), ("why", why)];
    proxy.ended(&labels).is(count).await;
}

/// A session that waits, the last of so many.
async fn waiting(proxy: &Proxy, message: &[u8], count: u32) -> TcpStream {
    let client = proxy.open(ACME, message).await;
    queued(proxy, count).await;
    client
}

/// The backend's next session begins with these bytes.
async fn accepted(raw: &Raw, expected: &[u8]) -> TcpStream {
    let mut stream = raw.accept().await;
    assert_eq!(read(&mut stream, expected.len()).await, expected);
    stream
}

#[tokio::test]
async fn sessions_beyond_max_sessions_queue_in_order_up_to_the_queue_length() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, 2, "queue = { length = 2, timeout = \"60s\" }").await;
    let (first, second) = (raw.session(&proxy).await, raw.session(&proxy).await);
    queued(&proxy, 0).await;
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 2).await;
    let third = waiting(&proxy, b"third", 1).await;
    let fourth = waiting(&proxy, b"fourth", 2).await;
    is_turned_away(&proxy).await;
    ended(&proxy, "pool_full", 1).await;
    let line = proxy.logged("pool_full").await;
    assert_eq!((&line["attempts"], line["backend"].is_null()), (&0.into(), true));
    assert!(line["queued_ms"].is_null(), "it did not wait: {line}");

    drop(first);
    let third = (third, accepted(&raw, b"third").await);
    queued(&proxy, 1).await;
    drop(second);
    let mut fourth = (fourth, accepted(&raw, b"fourth").await);
    queued(&proxy, 0).await;
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 2).await;
    fourth.1.write_all(b"welcome").await.unwrap();
    assert_eq!(read(&mut fourth.0, 7).await, b"welcome");
    proxy.others_are_unharmed().await;
    drop((third, fourth));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(4).await;
    connects(&proxy, raw.address(), "done", 4).await;
    let lines = proxy.finish_with_log().await;
    let waited: Vec<_> = lines.iter().filter_map(|line| line["queued_ms"].as_f64()).collect();
    assert_eq!(waited.len(), 2, "{lines:?}");
    assert!(waited.iter().all(|span| *span > 0.0));
}

/// Once the session that fills the backend has ended, another one is served. Ends the test.
async fn next_session_is_served(proxy: Proxy, raw: &Raw, held: (TcpStream, TcpStream)) {
    drop(held);
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 0).await;
    let next = raw.session(&proxy).await;
    proxy.others_are_unharmed().await;
    drop(next);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.finish().await;
}

#[tokio::test]
async fn without_a_queue_no_session_waits() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, 1, "").await;
    let held = raw.session(&proxy).await;
    is_turned_away(&proxy).await;
    ended(&proxy, "pool_full", 1).await;
    next_session_is_served(proxy, &raw, held).await;
}

#[tokio::test]
async fn queue_timeout_resets_the_session_and_the_next_is_served() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, 1, "queue = { length = 2, timeout = \"300ms\" }").await;
    let held = raw.session(&proxy).await;
    let mut late = waiting(&proxy, b"late", 1).await;
    is_reset(&mut late).await;
    ended(&proxy, "queue_timeout", 1).await;
    queued(&proxy, 0).await;
    let line = proxy.logged("queue_timeout").await;
    assert!(line["queued_ms"].as_f64().unwrap() >= 250.0, "a tick of 50 ms may have passed: {line}");
    assert_eq!((&line["attempts"], line["backend"].is_null()), (&0.into(), true));
    next_session_is_served(proxy, &raw, held).await;
}

#[tokio::test]
async fn drain_deadline_ends_waiting_sessions() {
    let raw = Raw::bind().await;
    let conf = Conf {
        // On two, one may still be served what the other's end has left.
        workers: 1,
        backends: vec![with(raw.address(), "max-sessions = 1")],
        pool: "queue = { length = 2, timeout = \"60s\" }".to_owned(),
        drain: "notice = \"0s\"\nquiet = \"0s\"\nidle = \"60s\"\ndeadline = \"300ms\"".to_owned(),
        ..Conf::default()
    };
    let mut proxy = conf.start().await;
    let held = raw.session(&proxy).await;
    let mut late = waiting(&proxy, b"late", 1).await;
    proxy.others_are_unharmed().await;
    proxy.server().drain();
    is_reset(&mut late).await;
    proxy.end().await;
    let lines = proxy.log();
    let of = |at: &str| lines.iter().filter(|line| line["outcome"]["at"] == at).collect::<Vec<_>>();
    let (pool, drained) = (of("pool"), |line: &serde_json::Value| line["outcome"]["why"] == "drained");
    assert!(pool.len() == 1 && drained(pool[0]) && pool[0]["outcome"]["by"] == "proxy", "{lines:?}");
    assert!(pool[0]["queued_ms"].as_f64().unwrap() > 0.0, "{lines:?}");
    assert_eq!(of("forward").into_iter().filter(|line| drained(line)).count(), 1, "{lines:?}");
    drop(held);
}

/// Sessions that ended because their client had reset its connection at this step.
async fn resets(proxy: &Proxy, at: &str, count: u32) {
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("at", at), ("why", "reset")]).is(count).await;
}

fn reset(client: TcpStream) {
    client.set_zero_linger().unwrap();
    drop(client);
}

#[tokio::test]
async fn client_that_resets_while_it_waits_leaves_the_queue_at_once() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, 1, "queue = { length = 2, timeout = \"60s\" }").await;
    let held = raw.session(&proxy).await;
    let first = waiting(&proxy, b"first", 1).await;
    let second = waiting(&proxy, b"second", 2).await;
    reset(first);
    reset(second);
    queued(&proxy, 0).await;
    resets(&proxy, "pool", 2).await;
    let line = proxy.logged("reset").await;
    assert!(line["queued_ms"].as_f64().unwrap() > 0.0 && line["backend"].is_null(), "{line}");
    let next = waiting(&proxy, b"next", 1).await;
    drop(held);
    let next = (next, accepted(&raw, b"next").await);
    connects(&proxy, raw.address(), "done", 2).await;
    proxy.others_are_unharmed().await;
    drop(next);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_that_only_ends_its_side_keeps_its_place_and_gets_its_answer() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, 1, "queue = { length = 1, timeout = \"60s\" }").await;
    let held = raw.session(&proxy).await;
    let mut client = waiting(&proxy, b"request", 1).await;
    client.shutdown().await.unwrap();
    // Another session, begun later and ended, shows that the worker has seen the end.
    proxy.others_are_unharmed().await;
    queued(&proxy, 1).await;
    drop(held);
    let mut backend = accepted(&raw, b"request").await;
    backend.write_all(b"answer").await.unwrap();
    drop(backend);
    assert_eq!(read(&mut client, 6).await, b"answer");
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_that_resets_while_its_backend_is_connected_ends_and_the_backend_is_not_blamed() {
    let Some(swallow) = Swallow::start().await else { return };
    let conf =
        Conf { acme: vec![swallow.address()], timeouts: "connect = \"60s\"".to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let client = proxy.open(ACME, b"hello").await;
    proxy.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(1).await;
    reset(client);
    resets(&proxy, "connect", 1).await;
    for result in ["connect_timeout", "connect_failed"] {
        connects(&proxy, swallow.address(), result, 0).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn one_full_backend_is_passed_over_while_another_has_room() {
    let (raw, good) = (Raw::bind().await, greeting("acme-1").await);
    let backends = vec![with(raw.address(), "max-sessions = 1"), with(good.address(), "weight = 100")];
    let pool = format!("{ROUND_ROBIN}\nqueue = {{ length = 1 }}");
    let proxy = Conf { backends, pool, ..Conf::default() }.start().await;
    let held = raw.session(&proxy).await;
    for _ in 0..6 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    connects(&proxy, raw.address(), "done", 1).await;
    queued(&proxy, 0).await;
    proxy.others_are_unharmed().await;
    drop(held);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(7).await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_that_failed_to_connect_does_not_queue() {
    let (refusing, raw) = (Held::bind(), Raw::bind().await);
    let backends = vec![with(raw.address(), "max-sessions = 1"), with(refusing.address(), "weight = 100")];
    let pool = format!("{ROUND_ROBIN}\nqueue = {{ length = 1, timeout = \"60s\" }}");
    let proxy = Conf { backends, pool, ..Conf::default() }.start().await;
    let held = raw.session(&proxy).await;
    is_turned_away(&proxy).await;
    proxy.ended(&[("tenant", "acme"), ("at", "connect"), ("why", "connect_refused")]).is(1).await;
    queued(&proxy, 0).await;
    proxy.others_are_unharmed().await;
    drop(held);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.finish().await;
}

/// A proxy whose one backend, of ten places, two tenants may use. One of them gets seven.
async fn shared(raw: &Raw, queue: &str) -> Proxy {
    let backends = vec![with(raw.address(), "max-sessions = 10")];
    Conf { backends, pool: queue.to_owned(), more: umbrella(), ..Conf::default() }.start().await
}

#[tokio::test]
async fn tenant_that_fills_a_shared_pool_leaves_room_for_the_others() {
    let raw = Raw::bind().await;
    let proxy = shared(&raw, "").await;
    let mut held = Vec::new();
    for _ in 0..7 {
        held.push(raw.session(&proxy).await);
    }
    is_turned_away(&proxy).await;
    ended(&proxy, "pool_share", 1).await;
    let other = (proxy.open(UMBRELLA, b"other").await, accepted(&raw, b"other").await);
    proxy.others_are_unharmed().await;
    drop((held, other));
    proxy.ended(&[("pool", "acme"), ("why", "done")]).is(8).await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_over_its_tenants_share_waits_and_others_pass_it() {
    let raw = Raw::bind().await;
    let proxy = shared(&raw, "queue = { length = 4, timeout = \"60s\" }").await;
    let mut held = Vec::new();
    for _ in 0..7 {
        held.push(raw.session(&proxy).await);
    }
    let eighth = waiting(&proxy, b"eighth", 1).await;
    let other = (proxy.open(UMBRELLA, b"other").await, accepted(&raw, b"other").await);
    queued(&proxy, 1).await;
    drop(other);
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 7).await;
    queued(&proxy, 1).await;
    held.pop();
    let eighth = (eighth, accepted(&raw, b"eighth").await);
    queued(&proxy, 0).await;
    proxy.others_are_unharmed().await;
    drop((held, eighth));
    proxy.ended(&[("pool", "acme"), ("why", "done")]).is(9).await;
    proxy.finish().await;
}

#[tokio::test]
async fn pool_is_shared_from_the_reload_on_that_brings_a_second_tenant() {
    let raw = Raw::bind().await;
    let backends = vec![with(raw.address(), "max-sessions = 10")];
    let more = umbrella().replace("pool = \"acme\"", "pool = \"globex\"");
    let mut proxy = Conf { backends, more, ..Conf::default() }.start().await;
    let mut held = Vec::new();
    for _ in 0..10 {
        held.push(raw.session(&proxy).await);
    }
    let ends = format!("endpoints = [\"{UMBRELLA}\"]\npool = ");
    proxy.reload(&format!("{ends}\"globex\""), &format!("{ends}\"acme\"")).unwrap();
    held.truncate(8);
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 8).await;
    // What was there before counts for its tenant.
    is_turned_away(&proxy).await;
    ended(&proxy, "pool_share", 1).await;
    let other = (proxy.open(UMBRELLA, b"other").await, accepted(&raw, b"other").await);
    held.truncate(5);
    is(&proxy, "vestibule_backend_sessions_active", raw.address(), 6).await;
    held.push(raw.session(&proxy).await);
    proxy.others_are_unharmed().await;
    drop((held, other));
    proxy.ended(&[("pool", "acme"), ("why", "done")]).is(12).await;
    proxy.finish().await;
}
