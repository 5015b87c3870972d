//! What comes with a header, or with a flow's first datagram, is held to the tenant's limits as everything after it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::account::Direction;

use super::flow::{Balancer, Echo, datagram, finish as finish_flows, others_are_unharmed, soon, world};
use super::harness::{ACME, Conf, Proxy, end_of, eventually, exchange, is_reset, read};
use super::raw::Raw;

/// The payload that comes with a header: more than the limited tenant has in ten seconds.
const PAYLOAD: [u8; 15_000] = [7; 15_000];

const LIMIT: &str = "to-backend = \"1KiB/s\"";

/// A proxy whose tenant acme has these limits.
async fn limited(raw: &Raw, limits: &str, drain: &str) -> Proxy {
    let (limits, drain) = (limits.to_owned(), drain.to_owned());
    raw.proxy(Conf { drain, limits, ..Conf::default() }).await
}

/// A session that waits for its tenant's bandwidth, and has no backend.
async fn waiting(proxy: &Proxy) -> TcpStream {
    let client = proxy.open(ACME, &PAYLOAD).await;
    wait_for(proxy, 1).await;
    let labels = [("tenant", "acme"), ("direction", "to_backend")];
    proxy.metric("vestibule_tenant_waiting", &labels).is(1).await;
    let live = Arc::clone(proxy.server().live());
    let loads = |pool: &Arc<vestibule::pool::Pool>| {
        pool.candidates().backends().iter().map(|one| one.load()).sum::<u32>()
    };
    assert_eq!(live.snapshot.load().pools.iter().map(loads).sum::<u32>(), 0, "it holds a backend's place");
    client
}

/// Waits until so many sessions wait for bandwidth towards their backend.
async fn wait_for(proxy: &Proxy, count: u64) {
    let snapshot = proxy.server().live().snapshot.load();
    let quota = &snapshot.directory.tenants()[0].quota;
    let waiting = || quota.budget(Direction::ToBackend).waiters();
    eventually("sessions to wait", async || (waiting() == count).then_some(())).await;
}

#[tokio::test]
async fn first_bytes_wait_for_the_bandwidth_before_a_backend_is_connected() {
    let raw = Raw::bind().await;
    let mut proxy = limited(&raw, LIMIT, "").await;
    let client = waiting(&proxy).await;
    proxy.others_are_unharmed().await;
    // A client that has gone does not keep its place in the line.
    client.set_zero_linger().unwrap();
    drop(client);
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("at", "tenant"), ("why", "reset")]).is(1).await;
    wait_for(&proxy, 0).await;
    assert_eq!(proxy.logged("reset").await["attempts"], 0);

    // One that has sent its end has said all that it has to say, and is served once its bytes are paid for.
    let mut client = waiting(&proxy).await;
    client.shutdown().await.unwrap();
    proxy.reload(LIMIT, "to-backend = \"1GiB/s\"").unwrap();
    let mut backend = raw.accept().await;
    assert_eq!(read(&mut backend, PAYLOAD.len()).await, PAYLOAD);
    assert_eq!(end_of(&mut backend).await.unwrap(), 0);
    drop(backend);
    assert_eq!(end_of(&mut client).await.unwrap(), 0);
    wait_for(&proxy, 0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn first_bytes_that_wait_end_with_the_drain() {
    let raw = Raw::bind().await;
    let proxy =
        limited(&raw, LIMIT, "notice = \"0s\"\nquiet = \"0s\"\nidle = \"1s\"\ndeadline = \"1h\"").await;
    let mut client = waiting(&proxy).await;
    proxy.server().drain();
    is_reset(&mut client).await;
    let line = proxy.logged("drained").await;
    assert_eq!((&line["tenant"], &line["outcome"]["at"]), (&"acme".into(), &"tenant".into()));
}

#[tokio::test]
async fn first_bytes_that_are_only_observed_pass_and_are_counted() {
    let raw = Raw::bind().await;
    let proxy = limited(&raw, &format!("mode = \"observe\"\n{LIMIT}"), "").await;
    for _ in 0..2 {
        let mut client = proxy.open(ACME, &PAYLOAD).await;
        client.shutdown().await.unwrap();
        let mut backend = raw.accept().await;
        assert_eq!(read(&mut backend, PAYLOAD.len()).await, PAYLOAD);
        drop(backend);
        assert_eq!(end_of(&mut client).await.unwrap(), 0);
    }
    let labels = [("tenant", "acme"), ("direction", "to_backend")];
    proxy.metric("vestibule_tenant_would_delay_total", &labels).is(2).await;
    proxy.metric("vestibule_tenant_delayed_seconds_total", &labels).is(0).await;
    assert_eq!(proxy.logged("done").await["would_delay"], true);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn first_bytes_within_the_burst_are_not_delayed() {
    let raw = Raw::bind().await;
    let proxy = limited(&raw, "to-backend = \"1MiB/s\"", "").await;
    let mut client = proxy.open(ACME, &PAYLOAD).await;
    let mut backend = raw.accept().await;
    assert_eq!(read(&mut backend, PAYLOAD.len()).await, PAYLOAD);
    client.shutdown().await.unwrap();
    assert_eq!(exchange(backend).await.unwrap(), b"");
    assert_eq!(end_of(&mut client).await.unwrap(), 0);
    let snapshot = proxy.server().live().snapshot.load_full();
    let budget = snapshot.directory.tenants()[0].quota.budget(Direction::ToBackend);
    assert_eq!(budget.delayed(), Duration::ZERO);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn datagram_beyond_the_limits_begins_no_flow() {
    // The rate: the first one, its answer and one more pass. The bandwidth: one, and then one in a second.
    let rate = ("datagram-rate = \"1/h\"\ndatagram-burst = 3", 9);
    for (limits, least) in [rate, ("to-backend = \"1KiB/s\"", 1)] {
        let acme = Echo::start("acme").await;
        let (proxy, _hooli) = world(&[acme.address], |conf, _| {
            conf.limits = limits.to_owned();
            soon(conf);
        })
        .await;
        let balancer = Balancer::to(proxy.address("dns")).await;
        let client = |number: u32| format!("10.100.0.{number}:5000");
        let payload = [7; 900];
        balancer.ask(&datagram(&client(1), ACME, &payload)).await;
        for number in 2..=11 {
            balancer.send(&datagram(&client(number), ACME, &payload)).await;
        }
        let dropped = [("tenant", "acme"), ("by", "proxy"), ("at", "tenant"), ("why", "datagram_limit")];
        proxy.ended(&dropped).is_at_least(least).await;
        others_are_unharmed(&proxy).await;
        let log = finish_flows(proxy).await;
        let no_flow = log.iter().filter(|line| line["outcome"]["why"] == "datagram_limit");
        assert!(
            no_flow.clone().all(|line| line["attempts"] == 0 && line.get("backend").is_none()),
            "{log:?}"
        );
        let flows = log.iter().filter(|line| line["tenant"] == "acme" && line["attempts"] == 1);
        assert!(least == 1 || flows.count() == 2, "{log:?}");
    }
}
