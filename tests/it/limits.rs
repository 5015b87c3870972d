//! What a tenant may take: the last that is admitted, the first that is not, and what is only observed.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{
    ACME, Conf, GLOBEX, INITECH, Proxy, end_of, eventually, exchange, header, is_reset, read,
};
use super::process::{Serve, World};

/// A proxy in which acme has these limits, and its backend.
async fn limited(limits: &str, process: &str) -> (TestBackend, Proxy) {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let (limits, process) = (limits.to_owned(), process.to_owned());
    let proxy = Conf { acme: vec![acme.address()], limits, process, ..Conf::default() }.start().await;
    (acme, proxy)
}

/// A session that is known to be carried.
async fn carried(proxy: &Proxy, endpoint: &str) -> TcpStream {
    let mut stream = proxy.open(endpoint, b"x").await;
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

async fn rejected(proxy: &Proxy, endpoint: &str) {
    is_reset(&mut proxy.open(endpoint, b"x").await).await;
}

async fn all_are_carried(sessions: Vec<TcpStream>) {
    for mut session in sessions {
        session.write_all(b"still").await.unwrap();
        assert_eq!(read(&mut session, 5).await, b"still");
        exchange(session).await.unwrap();
    }
}

#[tokio::test]
async fn session_beyond_the_limit_is_reset_before_a_backend_is_contacted() {
    let (acme, proxy) = limited("sessions = 2", "").await;
    let mut sessions = vec![carried(&proxy, ACME).await, carried(&proxy, ACME).await];
    rejected(&proxy, ACME).await;
    let labels =
        [("tenant", "acme"), ("pool", "acme"), ("by", "proxy"), ("at", "tenant"), ("why", "session_limit")];
    proxy.ended(&labels).is(1).await;
    let line = proxy.logged("session_limit").await;
    assert_eq!((&line["tenant"], &line["attempts"], line.get("backend")), (&"acme".into(), &0.into(), None));
    assert_eq!(acme.sessions(), 2);
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(2).await;
    proxy.metric("vestibule_tenant_sessions_limit", &[("tenant", "acme")]).is(2).await;
    proxy.metric("vestibule_tenant_rejected_total", &labels[4..]).is(1).await;

    exchange(sessions.pop().unwrap()).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[]).is(1).await;
    sessions.push(carried(&proxy, ACME).await);
    rejected(&proxy, ACME).await;
    all_are_carried(sessions).await;
    proxy.ended(&labels).is(2).await;
    proxy.metric("vestibule_tenant_sessions", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_limit_is_exact_under_concurrent_connects_on_two_workers() {
    let (acme, proxy) = limited("sessions = 10", "").await;
    let mut opened = Vec::new();
    for _ in 0..60 {
        opened.push(proxy.connect().await);
    }
    for stream in &mut opened {
        stream.write_all(&[&header(ACME)[..], b"x"].concat()).await.unwrap();
    }
    proxy.ended(&[("why", "session_limit")]).is(50).await;
    proxy.metric("vestibule_tenant_sessions", &[]).is(10).await;
    let mut admitted = 0;
    for mut stream in opened {
        // The reset may come before this.
        stream.shutdown().await.unwrap_or_default();
        admitted += usize::from(end_of(&mut stream).await.is_ok());
    }
    assert_eq!((admitted, acme.sessions()), (10, 10));
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn last_of_a_burst_is_admitted_and_the_next_returns_its_slot() {
    let (acme, proxy) = limited("sessions = 4\nsession-rate = \"1/h\"\nsession-burst = 3", "").await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        sessions.push(carried(&proxy, ACME).await);
    }
    for _ in 0..5 {
        rejected(&proxy, ACME).await;
    }
    proxy.ended(&[("tenant", "acme"), ("at", "tenant"), ("why", "session_rate")]).is(5).await;
    proxy.metric("vestibule_tenant_rejected_total", &[("why", "session_rate")]).is(5).await;
    proxy.metric("vestibule_tenant_sessions", &[]).is(3).await;
    assert_eq!(acme.sessions(), 3);
    all_are_carried(sessions).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_rejected_by_the_limit_uses_no_rate() {
    let (_acme, proxy) = limited("sessions = 1\nsession-rate = \"1/h\"\nsession-burst = 2", "").await;
    let first = carried(&proxy, ACME).await;
    for _ in 0..3 {
        rejected(&proxy, ACME).await;
    }
    proxy.ended(&[("why", "session_limit")]).is(3).await;
    exchange(first).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[]).is(0).await;
    exchange(carried(&proxy, ACME).await).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[]).is(0).await;
    rejected(&proxy, ACME).await;
    proxy.ended(&[("why", "session_rate")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn observed_excess_is_counted_and_forwarded() {
    let limits = "mode = \"observe\"\nsessions = 2\nsession-rate = \"1/h\"\nsession-burst = 3";
    let (acme, proxy) = limited(limits, "").await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(carried(&proxy, ACME).await);
    }
    all_are_carried(sessions).await;
    proxy.metric("vestibule_tenant_sessions", &[]).is(0).await;
    // Two have passed the rate, and one more would.
    for _ in 0..2 {
        exchange(carried(&proxy, ACME).await).await.unwrap();
        proxy.metric("vestibule_tenant_sessions", &[]).is(0).await;
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(6).await;
    let would_reject = "vestibule_tenant_would_reject_total";
    proxy.metric(would_reject, &[("tenant", "acme"), ("why", "session_limit")]).is(2).await;
    proxy.metric(would_reject, &[("tenant", "acme"), ("why", "session_rate")]).is(1).await;
    proxy.metric("vestibule_tenant_rejected_total", &[]).is(0).await;
    assert_eq!(acme.sessions(), 6);
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let with = |why: &str| log.iter().filter(|line| line["would_reject"] == serde_json::json!([why])).count();
    assert_eq!((with("session_limit"), with("session_rate")), (2, 1));
    let without = log.iter().filter(|line| line.get("would_reject").is_none()).count();
    assert_eq!(without, log.len() - 3);
}

#[tokio::test]
async fn near_the_process_limit_tenants_that_hold_most_are_shed_first() {
    let (_acme, proxy) = limited("", "max-sessions = 10").await;
    let mut sessions = Vec::new();
    for _ in 0..7 {
        sessions.push(carried(&proxy, ACME).await);
    }
    rejected(&proxy, ACME).await;
    let shed = [("tenant", "acme"), ("by", "proxy"), ("at", "tenant"), ("why", "shed")];
    let shed_of_globex = [("tenant", "globex"), ("at", "tenant"), ("why", "shed")];
    proxy.ended(&shed).is(1).await;
    proxy.metric("vestibule_tenant_rejected_total", &[("tenant", "acme"), ("why", "shed")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.metric("vestibule_sessions_active", &[]).is(7).await;

    // The reserve is for those that hold less than what is left.
    sessions.push(carried(&proxy, GLOBEX).await);
    rejected(&proxy, GLOBEX).await;
    proxy.ended(&shed_of_globex).is(1).await;

    // What the first gives back is for the other, up to its share.
    for session in sessions.drain(4..7) {
        exchange(session).await.unwrap();
    }
    proxy.metric("vestibule_sessions_active", &[]).is(5).await;
    for _ in 0..2 {
        sessions.push(carried(&proxy, GLOBEX).await);
    }
    rejected(&proxy, GLOBEX).await;
    proxy.ended(&shed_of_globex).is(2).await;
    rejected(&proxy, ACME).await;
    proxy.ended(&shed).is(2).await;
    // With room, an equal share is no bound.
    exchange(sessions.remove(0)).await.unwrap();
    proxy.metric("vestibule_sessions_active", &[]).is(6).await;
    sessions.push(carried(&proxy, GLOBEX).await);
    all_are_carried(sessions).await;
    proxy.finish().await;
}

#[tokio::test]
async fn disabled_tenant_is_rejected_and_uses_no_limit() {
    let (_acme, mut proxy) = limited("", "").await;
    proxy.reload("state = \"disabled\"", "state = \"disabled\"\n[tenant.limits]\nsessions = 5").unwrap();
    for _ in 0..3 {
        rejected(&proxy, INITECH).await;
    }
    let labels = [("tenant", "initech"), ("why", "tenant_disabled")];
    proxy.ended(&labels).is(3).await;
    proxy.metric("vestibule_tenant_rejected_total", &labels).is(3).await;
    proxy.metric("vestibule_tenant_sessions_limit", &labels[..1]).is(5).await;
    proxy.metric("vestibule_tenant_sessions", &labels[..1]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn flood_of_rejections_logs_few_lines_and_the_count_of_the_rest() {
    const FLOOD: usize = 300;
    let limits = "pool = \"acme\"\n[tenant.limits]\nsession-rate = \"1/h\"\n";
    let world = World::new().await;
    let config = world.config("");
    config.rewrite("pool = \"acme\"\n", limits);
    let mut serve = Serve::start(&config).await;
    let first = serve.carried().await;
    let mut flood = Vec::new();
    for _ in 0..FLOOD {
        flood.push(serve.open(ACME, b"").await);
    }
    for stream in &mut flood {
        is_reset(stream).await;
    }
    let told = serve.says("access log lines of rejections suppressed").await;
    assert_eq!((&told["tenant"], &told["level"]), (&"acme".into(), &"WARN".into()));
    // Each rejection has its line, or is counted: by a later line, or by the process log.
    let sum = |lines: &[serde_json::Value], key: &str| {
        lines.iter().filter_map(|line| line[key].as_u64()).sum::<u64>()
    };
    let lines = eventually("every rejection to be told", async || {
        let (access, process) = (serve.sessions(0).await, serve.log());
        let left_out = sum(&access, "left_out") + sum(&process, "lines");
        (access.len() as u64 + left_out == FLOOD as u64).then_some(access)
    })
    .await;
    assert!(lines.len() < FLOOD / 2, "{} lines", lines.len());
    assert!(lines.iter().all(|line| line["outcome"]["why"] == "session_rate"));
    assert_eq!(exchange(first).await.unwrap(), b"");
    assert_eq!(exchange(serve.open(GLOBEX, b"unharmed").await).await.unwrap(), b"unharmed");
    serve.end().await;
}
