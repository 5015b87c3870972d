//! Flows that are silent, and what ends them.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::{Balancer, CLIENT, Echo, datagram, finish, others_are_unharmed, soon, world};
use crate::harness::{ACME, GLOBEX, LIMIT, eventually, still_lives};

#[tokio::test]
async fn drain_ends_idle_flows_and_admits_no_new_one() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| {
        conf.drain = "notice = \"0s\"\nquiet = \"0s\"\nidle = \"500ms\"\ndeadline = \"20s\"\n".to_owned();
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    balancer.ask(&datagram(CLIENT, ACME, b"one")).await;
    proxy.server().drain();
    let other = Balancer::to(proxy.address("dns")).await;
    // Whoever comes before the drain has begun is let in: each is somebody else.
    let next = std::cell::Cell::new(1_u16);
    let begun = eventually("a flow that is not let in", async || {
        next.set(next.get() + 1);
        other.send(&datagram(&format!("10.100.0.11:{}", next.get()), ACME, b"late")).await;
        assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"still")).await, b"acme still");
        let drained = [("at", "header"), ("why", "drained")];
        (proxy.value("vestibule_sessions_ended_total", &drained).await > 0.0).then_some(())
    });
    begun.await;
    let mut proxy = proxy;
    eventually("the silent flow's end", async || {
        let ended = |line: &Value| line["outcome"]["at"] == "forward" && line["outcome"]["why"] == "drained";
        proxy.log().iter().any(ended).then_some(())
    })
    .await;
    proxy.end().await;
}

#[tokio::test]
async fn immediate_end_ends_flows_while_datagrams_arrive() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |_, _| ()).await;
    let mut held = proxy.open(GLOBEX, b"").await;
    still_lives(&mut held).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    balancer.ask(&datagram(CLIENT, ACME, b"one")).await;
    let flood = tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(1));
        for port in 1..=u16::MAX {
            pause.tick().await;
            // Once nobody hears them the kernel says so.
            drop(balancer.socket.send(&datagram(&format!("10.100.0.11:{port}"), ACME, b"more")).await);
        }
    });
    timeout(LIMIT, proxy.end()).await.expect("an end, whoever speaks");
    flood.abort();
    drop(held);
}

/// More than end in one go, and they end together.
#[tokio::test]
async fn many_idle_flows_all_end() {
    const MANY: u16 = 200;
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    for port in 0..MANY {
        let client = format!("10.100.0.10:{}", 40_000 + port);
        assert_eq!(balancer.ask(&datagram(&client, ACME, b"one")).await, b"acme one");
    }
    proxy.ended(&[("listener", "dns"), ("tenant", "acme"), ("why", "idle_timeout")]).is(MANY.into()).await;
    others_are_unharmed(&proxy).await;
    let log = finish(proxy).await;
    let lines =
        log.iter().filter(|line| line["tenant"] == "acme" && line["outcome"]["why"] == "idle_timeout");
    assert_eq!(lines.count(), usize::from(MANY));
}

#[tokio::test]
async fn active_flow_is_not_idle() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let mut pause = tokio::time::interval(Duration::from_millis(100));
    for _ in 0..10 {
        pause.tick().await;
        balancer.ask(&datagram(CLIENT, ACME, b"here")).await;
    }
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    finish(proxy).await;
}
