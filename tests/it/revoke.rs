//! Tenants that a reload takes an endpoint away from: what happens to their sessions.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::ferry::move_all;
use super::harness::{ACME, Conf, Proxy, STRANGER, eventually, exchange, is_reset, read, still_lives};
use super::raw::Raw;

const REVOKED: [(&str, &str); 4] =
    [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "revoked")];

/// The changes that take acme's endpoint away.
const CHANGES: [&[(&str, &str)]; 3] = [
    &[("name = \"acme\"\nendpoints", "name = \"acme\"\nstate = \"disabled\"\nendpoints")],
    // To another tenant.
    &[
        ("name = \"acme\"\nendpoints = [\"vpce-0acce0000acce0000\"]", "name = \"acme\""),
        (
            "endpoints = [\"vpce-0910be00910be0000\"]",
            "endpoints = [\"vpce-0910be00910be0000\", \"vpce-0acce0000acce0000\"]",
        ),
    ],
    // The whole tenant.
    &[("name = \"acme\"\nendpoints", "name = \"umbrella\"\nendpoints")],
];

/// A proxy whose tenant acme has these keys.
async fn start(keys: &str) -> (TestBackend, Proxy) {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let mut proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    if !keys.is_empty() {
        proxy.reload("labels = { plan = \"gold\" }", keys).unwrap();
    }
    (acme, proxy)
}

async fn carried(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.open(ACME, b"x").await;
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

#[tokio::test]
async fn session_ends_as_revoked_when_its_endpoint_is_taken_away() {
    for changes in CHANGES {
        let (_acme, mut proxy) = start("").await;
        let mut sessions = [carried(&proxy).await, carried(&proxy).await];
        let mut other = proxy.open(super::harness::GLOBEX, b"x").await;
        assert_eq!(read(&mut other, 1).await, b"x");
        proxy.reload_all(changes).unwrap();
        for session in &mut sessions {
            is_reset(session).await;
        }
        proxy.ended(&REVOKED).is(2).await;
        still_lives(&mut other).await;
        exchange(other).await.unwrap();
        proxy.others_are_unharmed().await;
        let log = proxy.finish_with_log().await;
        assert_eq!(log.iter().filter(|line| line["outcome"]["why"] == "revoked").count(), 2);
    }
}

#[tokio::test]
async fn session_continues_when_its_tenant_keeps_revoked_sessions() {
    for changes in CHANGES {
        let (_acme, mut proxy) = start("on-revoke = \"keep\"").await;
        let mut session = carried(&proxy).await;
        let mut globex = proxy.open(super::harness::GLOBEX, b"x").await;
        assert_eq!(read(&mut globex, 1).await, b"x");
        proxy.reload_all(changes).unwrap();
        // Sessions were visited once a session of a tenant that ends them is gone.
        proxy
            .reload("endpoints = [\"vpce-01717ec401717ec40\"]", "endpoints = [\"vpce-01717ec401717ec41\"]")
            .unwrap();
        for _ in 0..20 {
            still_lives(&mut session).await;
            proxy.others_are_unharmed().await;
        }
        still_lives(&mut globex).await;
        exchange(session).await.unwrap();
        exchange(globex).await.unwrap();
        proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
        proxy.finish().await;
    }
}

#[tokio::test]
async fn grace_passes_before_a_revoked_session_ends_and_is_forgotten_when_the_endpoint_returns() {
    let (_acme, mut proxy) = start("revoke-grace = \"700ms\"").await;
    let mut session = carried(&proxy).await;
    proxy.reload_all(CHANGES[0]).unwrap();
    still_lives(&mut session).await;
    proxy.reload_all(&[(CHANGES[0][0].1, CHANGES[0][0].0)]).unwrap();
    let second = carried(&proxy).await;
    // Longer than the grace: a session of another tenant that is revoked now ends after it.
    let mut other = proxy.open(super::harness::GLOBEX, b"x").await;
    assert_eq!(read(&mut other, 1).await, b"x");
    proxy
        .reload(
            "endpoints = [\"vpce-0910be00910be0000\"]\npool = \"globex\"",
            "endpoints = []\nrevoke-grace = \"1s\"\npool = \"globex\"",
        )
        .unwrap();
    is_reset(&mut other).await;
    still_lives(&mut session).await;
    exchange(second).await.unwrap();
    proxy.reload_all(CHANGES[0]).unwrap();
    is_reset(&mut session).await;
    proxy.ended(&REVOKED).is(1).await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_of_a_fallback_or_fixed_tenant_ends_when_the_listener_gives_it_to_another() {
    let listener = "bind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.0/8\"]\n";
    for (before, after) in [
        ("on-unknown-endpoint = \"tenant:acme\"", "on-unknown-endpoint = \"tenant:globex\""),
        ("on-unknown-endpoint = \"tenant:acme\"", "on-unknown-endpoint = \"reject\""),
        ("proxy-protocol = \"off\"\ntenant = \"acme\"", "proxy-protocol = \"off\"\ntenant = \"globex\""),
    ] {
        let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
        let conf =
            Conf { acme: vec![acme.address()], listener: format!("{listener}{before}"), ..Conf::default() };
        let mut proxy = conf.start().await;
        let is_fixed = before.contains("off");
        let mut session = if is_fixed { proxy.send(b"x").await } else { proxy.open(STRANGER, b"x").await };
        assert_eq!(read(&mut session, 1).await, b"x");
        proxy.reload(before, after).unwrap();
        is_reset(&mut session).await;
        proxy.ended(&REVOKED).is(1).await;
        if !is_fixed {
            proxy.others_are_unharmed().await;
        }
        proxy.finish().await;
    }
}

#[tokio::test]
async fn session_that_waits_in_the_queue_is_checked_before_it_forwards() {
    let raw = Raw::bind().await;
    let backends = vec![super::sessions::with(raw.address(), "max-sessions = 1")];
    let pool = "queue = { length = 2, timeout = \"60s\" }".to_owned();
    let mut proxy = Conf { backends, pool, ..Conf::default() }.start().await;
    let first = raw.session(&proxy).await;
    let mut waits = proxy.open(ACME, b"secret").await;
    proxy.metric("vestibule_pool_sessions_queued", &[("pool", "acme")]).is(1).await;
    proxy.reload_all(CHANGES[1]).unwrap();
    // The first session is revoked and gives its place to the one that waits, which is revoked too.
    is_reset(&mut waits).await;
    proxy.ended(&REVOKED).is(2).await;
    proxy
        .metric("vestibule_forwarded_bytes_total", &[("tenant", "acme"), ("direction", "to_backend")])
        .is(0)
        .await;
    drop(first);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn successor_without_the_endpoint_ends_a_taken_over_session() {
    for (keys, is_kept) in [("", false), ("on-revoke = \"keep\"", true)] {
        let (acme, one) = start(keys).await;
        let mut other = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
        other.reload_all(CHANGES[2]).unwrap();
        let mut session = carried(&one).await;
        move_all(&one, &other, |_| ()).await;
        if is_kept {
            for _ in 0..20 {
                still_lives(&mut session).await;
                other.others_are_unharmed().await;
            }
            exchange(session).await.unwrap();
        } else {
            is_reset(&mut session).await;
            other.ended(&REVOKED).is(1).await;
        }
        one.finish().await;
        other.finish().await;
    }
}

#[tokio::test]
async fn reload_that_takes_nothing_away_visits_no_session() {
    let (_acme, mut proxy) = start("").await;
    let mut session = carried(&proxy).await;
    let before = proxy.server().live().snapshot.load().revocations;
    proxy
        .reload("name = \"globex\"\nendpoints = [", "name = \"globex\"\nendpoints = [\"vpce-00000009\", ")
        .unwrap();
    assert_eq!(proxy.server().live().snapshot.load().revocations, before);
    session.write_all(b"more").await.unwrap();
    assert_eq!(read(&mut session, 4).await, b"more");
    exchange(session).await.unwrap();
    eventually("the end", async || (proxy.value("vestibule_sessions_active", &[]).await < 0.5).then_some(()))
        .await;
    proxy.finish().await;
}
