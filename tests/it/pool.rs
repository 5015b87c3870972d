//! Which backend a session goes to, what happens when it cannot, and what probes say.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vestibule::lab::backend::TestBackend;

use super::harness::{ACME, Began, Conf, Proxy, eventually, header, http_get, read};
use super::process::sum;
use super::raw::{Held, Raw, Swallow};
use super::sessions::{ROUND_ROBIN, asked, connects, greeting, is_turned_away, usable};

#[tokio::test]
async fn round_robin_gives_each_its_share_to_the_session() {
    let backends = [greeting("acme-1").await, greeting("acme-2").await, greeting("acme-3").await];
    let acme = backends.iter().map(TestBackend::address).collect();
    let proxy = Conf { acme, pool: ROUND_ROBIN.to_owned(), ..Conf::default() }.start().await;
    let mut last = String::new();
    for _ in 0..30 {
        let name = asked(&proxy).await;
        assert_ne!(name, last);
        last = name;
    }
    for backend in &backends {
        assert_eq!(backend.sessions(), 10, "{}", backend.name());
        connects(&proxy, backend.address(), "done", 10).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn p2c_prefers_the_backend_with_fewer_sessions() {
    let backends = [greeting("acme-1").await, greeting("acme-2").await];
    let acme = backends.iter().map(TestBackend::address).collect();
    let proxy = Conf { acme, ..Conf::default() }.start().await;
    let mut held = proxy.open(ACME, b"").await;
    let busy = String::from_utf8(read(&mut held, 7).await).unwrap();
    for count in 1..=20 {
        assert_ne!(asked(&proxy).await, busy.trim_end());
        // A session is over at its client before it is at the proxy.
        proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(count).await;
        proxy.metric("vestibule_backend_sessions_active", &[("pool", "acme")]).is(1).await;
    }
    drop(held);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn refused_connect_retries_another_backend_unseen_by_the_client() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let pool = format!("{ROUND_ROBIN}\nattempts = 2");
    let acme = vec![refusing.address(), good.address()];
    let proxy = Conf { acme, pool, ..Conf::default() }.start().await;
    for _ in 0..10 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(10).await;
    connects(&proxy, good.address(), "done", 10).await;
    connects(&proxy, refusing.address(), "connect_refused", 5).await;
    proxy.others_are_unharmed().await;
    // Two workers write the log: which session's line is the first in it is not said.
    let lines = proxy.finish_with_log().await;
    let lines: Vec<_> = lines.iter().filter(|line| line["tenant"] == "acme").collect();
    let mut attempts: Vec<_> = lines.iter().map(|line| line["attempts"].as_u64()).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [[Some(1); 5], [Some(2); 5]].concat());
    let good = good.address().to_string();
    assert!(lines.iter().all(|line| line["backend"] == good));
}

#[tokio::test]
async fn single_attempt_tries_one_backend_only() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let pool = format!("{ROUND_ROBIN}\nattempts = 1");
    let acme = vec![refusing.address(), good.address()];
    let proxy = Conf { acme, pool, ..Conf::default() }.start().await;
    for _ in 0..5 {
        is_turned_away(&proxy).await;
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    let labels = [("tenant", "acme"), ("by", "backend"), ("at", "connect"), ("why", "connect_refused")];
    proxy.ended(&labels).is(5).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(5).await;
    connects(&proxy, refusing.address(), "connect_refused", 5).await;
    let line = proxy.logged("connect_refused").await;
    assert_eq!((&line["attempts"], &line["backend"]), (&1.into(), &refusing.address().to_string().into()));
    assert!(line["connect_ms"].is_null());
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn when_all_refuse_each_is_tried_once_and_the_client_is_reset() {
    let refusing = [Held::bind(), Held::bind(), Held::bind()];
    let acme: Vec<_> = refusing.iter().map(Held::address).collect();
    let conf = Conf { acme: acme.clone(), pool: "attempts = 100".to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    is_turned_away(&proxy).await;
    let labels = [("tenant", "acme"), ("by", "backend"), ("at", "connect"), ("why", "connect_refused")];
    proxy.ended(&labels).is(1).await;
    for address in acme {
        connects(&proxy, address, "connect_refused", 1).await;
    }
    assert_eq!(proxy.logged("connect_refused").await["attempts"], 3);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_backend_is_waited_for_until_the_connect_timeout() {
    let Some(swallow) = Swallow::start().await else { return };
    let conf = |pool: &str, acme| Conf {
        acme,
        timeouts: "connect = \"400ms\"".to_owned(),
        pool: format!("{ROUND_ROBIN}\n{pool}"),
        ..Conf::default()
    };
    let proxy = conf("attempts = 1", vec![swallow.address()]).start().await;
    let began = Began::now();
    is_turned_away(&proxy).await;
    began.lasted(std::time::Duration::from_millis(400));
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "connect"), ("why", "connect_timeout")];
    proxy.ended(&labels).is(1).await;
    connects(&proxy, swallow.address(), "connect_timeout", 1).await;
    assert_eq!(proxy.logged("connect_timeout").await["attempts"], 1);
    proxy.others_are_unharmed().await;
    proxy.finish().await;

    let good = greeting("acme-1").await;
    let proxy = conf("attempts = 2", vec![swallow.address(), good.address()]).start().await;
    assert_eq!(asked(&proxy).await, "acme-1");
    let line = proxy.logged("done").await;
    assert_eq!(line["attempts"], 2);
    // The failed attempt counts in the session's time; `connect_ms` is the successful attempt alone.
    let (connect, total) = (line["connect_ms"].as_f64().unwrap(), line["total_ms"].as_f64().unwrap());
    assert!(total - connect >= 350.0, "{line}");
    connects(&proxy, swallow.address(), "connect_timeout", 1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Waits for a state; how many probes had succeeded and failed when it was first seen.
async fn becomes(proxy: &Proxy, expected: i64) -> (i64, i64, i64) {
    let asked = async || Some(probed(proxy).await).filter(|(state, ..)| *state == expected);
    eventually(&format!("the backend's state {expected}"), asked).await
}

/// What `vestibule_backend_healthy` says, and how many probes succeeded and failed, from one scrape: a state is
/// read before its probes are.
async fn probed(proxy: &Proxy) -> (i64, i64, i64) {
    let page = http_get(proxy.server().admin(), "/metrics").await;
    let acme = |name: &str, labels: &[(&str, &str)]| {
        format!("{:.0}", sum(&page, name, &[&[("pool", "acme")], labels].concat())).parse::<i64>().unwrap()
    };
    let (all, passed) = (
        acme("vestibule_backend_probes_total", &[]),
        acme("vestibule_backend_probes_total", &[("result", "passed")]),
    );
    (acme("vestibule_backend_healthy", &[]), passed, all - passed)
}

#[tokio::test]
async fn backend_falls_after_fall_failures_and_rises_after_rise_successes() {
    let held = Held::bind();
    let listening = held.listen();
    let health = "interval = \"100ms\"\ntimeout = \"100ms\"\nrise = 2\nfall = 3".to_owned();
    let proxy = Conf { acme: vec![held.address()], health, ..Conf::default() }.start().await;
    let healthy = [("pool", "acme")];
    proxy.metric("vestibule_backend_healthy", &healthy).is(1).await;
    drop(listening);
    let failed = becomes(&proxy, 0).await.2;
    assert!(failed >= 3, "it fell after {failed} probes");
    usable(&proxy, 0).await;
    is_turned_away(&proxy).await;
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "pool"), ("why", "no_backend")];
    proxy.ended(&labels).is(1).await;
    let line = proxy.logged("no_backend").await;
    assert_eq!((&line["attempts"], line["backend"].is_null()), (&0.into(), true));
    proxy.others_are_unharmed().await;

    let (_, done_before, _) = probed(&proxy).await;
    let listening = held.listen();
    let done = becomes(&proxy, 1).await.1;
    assert!(done - done_before >= 2, "it rose after {} probes", done - done_before);
    usable(&proxy, 1).await;
    let mut client = proxy.open(ACME, b"hello").await;
    // Probes are connections too: they come before the session's, and end without a byte.
    let mut session = loop {
        let mut stream = listening.accept().await;
        if let Ok(1) = stream.read(&mut [0; 1]).await {
            break stream;
        }
    };
    assert_eq!(read(&mut session, 4).await, b"ello");
    session.write_all(b"back").await.unwrap();
    assert_eq!(read(&mut client, 4).await, b"back");
    drop((client, session));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.finish().await;
}

#[tokio::test]
async fn only_the_healthy_are_used_while_there_are_any() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let health = "interval = \"10s\"\ntimeout = \"10s\"".to_owned();
    let acme = vec![refusing.address(), good.address()];
    let conf = Conf { acme, health, pool: format!("{ROUND_ROBIN}\nattempts = 1"), ..Conf::default() };
    let proxy = conf.start().await;
    let probes = |result| [("pool", "acme"), ("result", result)];
    proxy.metric("vestibule_backend_probes_total", &probes("passed")).is(1).await;
    proxy.metric("vestibule_backend_probes_total", &probes("connect_refused")).is(1).await;
    proxy.metric("vestibule_backend_healthy", &[("pool", "acme")]).is(1).await;
    usable(&proxy, 1).await;
    for _ in 0..10 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    connects(&proxy, good.address(), "done", 10).await;
    connects(&proxy, refusing.address(), "connect_refused", 0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn backend_is_used_before_its_first_probe_result() {
    let Some(swallow) = Swallow::start().await else { return };
    let good = greeting("acme-1").await;
    let port = swallow.address().port();
    let health = format!("interval = \"1h\"\ntimeout = \"1h\"\nport = {port}");
    let proxy = Conf { acme: vec![good.address()], health, ..Conf::default() }.start().await;
    let healthy = async || proxy.value("vestibule_backend_healthy", &[("pool", "acme")]).await;
    assert!((healthy().await + 1.0).abs() < 0.1, "unknown");
    assert_eq!(asked(&proxy).await, "acme-1");
    assert!((healthy().await + 1.0).abs() < 0.1, "still unknown");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn backend_sees_the_configured_source_address() {
    let raw = Raw::bind().await;
    let pool = "source-addresses = [\"127.0.0.9\"]".to_owned();
    let proxy = raw.proxy(Conf { pool, ..Conf::default() }).await;
    let (client, backend) = raw.session(&proxy).await;
    assert_eq!(backend.peer_addr().unwrap().ip().to_string(), "127.0.0.9");
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn foreign_source_address_is_refused_at_the_start() {
    let raw = Raw::bind().await;
    let pool = "source-addresses = [\"127.0.0.9\", \"192.0.2.1\"]".to_owned();
    let conf = Conf { acme: vec![raw.address()], pool, ..Conf::default() };
    let error = conf.try_start().await.map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("pool \"acme\": source-addresses: cannot bind 192.0.2.1:0: "), "{error}");
}

#[tokio::test]
async fn header_without_payload_connects_to_the_backend() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let mut client = proxy.connect().await;
    client.write_all(&header(ACME)).await.unwrap();
    let mut backend = raw.accept().await;
    backend.write_all(b"welcome").await.unwrap();
    assert_eq!(read(&mut client, 7).await, b"welcome");
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
