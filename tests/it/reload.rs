//! Another configuration while sessions live: what changes, what stays, and what is refused.

mod listeners;
mod pools;

use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{
    ACME, Conf, GLOBEX, Proxy, STRANGER, eventually, exchange, is_reset, read, still_lives,
};
use super::process::{Serve, World};

async fn start(limits: &str) -> (TestBackend, Proxy) {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy =
        Conf { acme: vec![acme.address()], limits: limits.to_owned(), ..Conf::default() }.start().await;
    (acme, proxy)
}

async fn carried(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.open(ACME, b"x").await;
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

async fn rejected(proxy: &Proxy, endpoint: &str) {
    is_reset(&mut proxy.open(endpoint, b"x").await).await;
}

#[tokio::test]
async fn limit_is_raised_and_lowered_while_sessions_are_open() {
    let (_acme, mut proxy) = start("sessions = 1").await;
    let mut sessions = vec![carried(&proxy).await];
    rejected(&proxy, ACME).await;
    proxy.reload("sessions = 1", "sessions = 3").unwrap();
    sessions.push(carried(&proxy).await);
    sessions.push(carried(&proxy).await);
    rejected(&proxy, ACME).await;
    proxy.metric("vestibule_tenant_sessions_limit", &[("tenant", "acme")]).is(3).await;

    proxy.reload("sessions = 3", "sessions = 2").unwrap();
    proxy.metric("vestibule_tenant_sessions_limit", &[("tenant", "acme")]).is(2).await;
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(3).await;
    for session in &mut sessions {
        still_lives(session).await;
    }
    // One that goes makes no room yet; the second does.
    exchange(sessions.pop().unwrap()).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(2).await;
    rejected(&proxy, ACME).await;
    exchange(sessions.pop().unwrap()).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(1).await;
    sessions.push(carried(&proxy).await);

    proxy.reload("sessions = 2", "").unwrap();
    for _ in 0..5 {
        sessions.push(carried(&proxy).await);
    }
    for session in sessions {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("tenant", "acme"), ("why", "session_limit")]).is(3).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(9).await;
    proxy.metric("vestibule_config_reloads_total", &[]).is(3).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn used_up_rate_stays_used_up_after_a_reload() {
    let (_acme, mut proxy) = start("session-rate = \"1/h\"\nsession-burst = 2").await;
    exchange(carried(&proxy).await).await.unwrap();
    exchange(carried(&proxy).await).await.unwrap();
    rejected(&proxy, ACME).await;
    proxy.reload("session-burst = 2", "session-burst = 3").unwrap();
    exchange(carried(&proxy).await).await.unwrap();
    rejected(&proxy, ACME).await;
    proxy.reload("session-rate = \"1/h\"", "mode = \"observe\"\nsession-rate = \"1/h\"").unwrap();
    exchange(carried(&proxy).await).await.unwrap();
    proxy.ended(&[("why", "session_rate")]).is(2).await;
    proxy.metric("vestibule_tenant_would_reject_total", &[("why", "session_rate")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn removed_tenant_that_returns_keeps_its_usage() {
    let (_acme, mut proxy) = start("sessions = 2").await;
    let mut session = carried(&proxy).await;
    let listed = format!("name = \"acme\"\nendpoints = [\"{ACME}\"]\npool");
    let other = format!("name = \"umbrella\"\nendpoints = [\"{STRANGER}\"]\npool");
    proxy.reload("labels = { plan = \"gold\" }", "on-revoke = \"keep\"").unwrap();
    proxy.reload(&listed, &other).unwrap();
    rejected(&proxy, ACME).await;
    proxy.ended(&[("why", "unknown_endpoint")]).is(1).await;
    // The one that came in its place has a count of its own.
    let mut of_other = proxy.open(STRANGER, b"x").await;
    assert_eq!(read(&mut of_other, 1).await, b"x");
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "umbrella")]).is(1).await;
    still_lives(&mut session).await;

    proxy.reload(&other, &listed).unwrap();
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(1).await;
    let second = carried(&proxy).await;
    rejected(&proxy, ACME).await;
    proxy.ended(&[("tenant", "acme"), ("why", "session_limit")]).is(1).await;
    for session in [session, second, of_other] {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("why", "done")]).is(3).await;
    proxy.others_are_unharmed().await;
    let live = std::sync::Arc::clone(proxy.server().live());
    proxy.finish().await;
    drop(live.unused());
    live.quotas.forget_unused();
    assert_eq!(live.quotas.count(), 3, "the other one is forgotten");
}

#[tokio::test]
async fn change_that_needs_a_restart_is_refused_as_a_whole() {
    let (_acme, mut proxy) = start("sessions = 1").await;
    let session = carried(&proxy).await;
    let refused = proxy.reload("workers = 2", "workers = 3").unwrap_err();
    let message = "[process] changed: this needs a restart or a takeover; reload refused";
    assert_eq!(refused.to_string(), message);
    proxy.metric("vestibule_config_last_reload_successful", &[]).is(0).await;
    proxy.metric("vestibule_config_rejected_total", &[]).is(1).await;
    proxy.metric("vestibule_config_reloads_total", &[]).is(0).await;
    rejected(&proxy, ACME).await;
    proxy.reload("sessions = 1", "sessions = 2").unwrap();
    proxy.metric("vestibule_config_last_reload_successful", &[]).is(1).await;
    exchange(carried(&proxy).await).await.unwrap();
    exchange(session).await.unwrap();
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn sighup_reloads_and_a_faulty_file_changes_nothing() {
    let world = World::new().await;
    let config = world.config("");
    let mut serve = Serve::start(&config).await;
    let session = serve.carried().await;
    let unix = || vestibule::clock::wall().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let before = unix();
    let limits = "pool = \"acme\"\n[tenant.limits]\nsessions = 1\n";
    config.rewrite("pool = \"acme\"\n", limits);
    serve.signal(Signal::HUP);
    let told = serve.says("reloaded").await;
    assert_eq!([&told["tenants"], &told["tenants_changed"], &told["pools_changed"]], [2, 1, 0]);
    is_reset(&mut serve.open(ACME, b"x").await).await;

    config.rewrite("sessions = 1", "sessions = 0");
    serve.signal(Signal::HUP);
    let refused = serve.says("reload refused; the configuration in force stays").await;
    assert_eq!((&refused["level"], &refused["faults"]), (&"ERROR".into(), &1.into()));
    let fault = |line: &serde_json::Value| {
        line["message"].as_str().is_some_and(|text| text.contains("limits.sessions: must be"))
    };
    assert!(serve.log().iter().any(fault));
    is_reset(&mut serve.open(ACME, b"x").await).await;
    serve.has("vestibule_config_last_reload_successful", &[], 0).await;
    let first = serve.value("vestibule_config_last_reload_timestamp_seconds", &[]).await;
    let after = unix();
    // The page has milliseconds.
    assert!(first > before - 0.001 && first < after + 0.001, "{first} between {before} and {after}");

    config.rewrite("sessions = 0", "sessions = 9");
    config.rewrite("workers = 2", "workers = 3");
    serve.signal(Signal::HUP);
    let message = "[process] changed: ";
    serve.says(message).await;
    config.rewrite("workers = 3", "workers = 2");
    serve.signal(Signal::HUP);
    serve.counts("vestibule_config_reloads_total", &[], 2).await;
    serve.has("vestibule_config_rejected_total", &[], 2).await;
    assert!(serve.value("vestibule_config_last_reload_timestamp_seconds", &[]).await > first);
    serve.has("vestibule_config_last_reload_successful", &[], 1).await;
    exchange(serve.carried().await).await.unwrap();
    exchange(session).await.unwrap();
    assert_eq!(exchange(serve.open(GLOBEX, b"unharmed").await).await.unwrap(), b"unharmed");
    serve.end().await;
}
