//! Flows whose endpoint a reload takes away from their tenant.

use super::super::harness::{ACME, STRANGER};
use super::{Balancer, CLIENT, Echo, datagram, finish, others_are_unharmed, soon, world};

const TO_HOOLI: [(&str, &str); 2] = [
    ("endpoints = [\"vpce-0acce0000acce0000\"]\n", ""),
    (
        "endpoints = [\"vpce-0400110400110400a\"]",
        "endpoints = [\"vpce-0400110400110400a\", \"vpce-0acce0000acce0000\"]",
    ),
];

#[tokio::test]
async fn datagram_of_a_moved_endpoint_goes_to_the_new_tenants_backend() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
    proxy.reload_all(&TO_HOOLI).unwrap();
    proxy.ended(&[("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "revoked")]).is(1).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"two")).await, b"hooli two");
    others_are_unharmed(&proxy).await;
    let log = finish(proxy).await;
    assert!(log.iter().any(|line| line["tenant"] == "acme" && line["outcome"]["why"] == "revoked"));
}

#[tokio::test]
async fn flow_of_a_disabled_tenant_ends_and_others_continue() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    balancer.ask(&datagram(CLIENT, ACME, b"one")).await;
    proxy.reload("name = \"acme\"\nendpoints", "name = \"acme\"\nstate = \"disabled\"\nendpoints").unwrap();
    proxy.ended(&[("tenant", "acme"), ("why", "revoked")]).is(1).await;
    balancer.send(&datagram(CLIENT, ACME, b"two")).await;
    proxy.ended(&[("tenant", "acme"), ("why", "tenant_disabled")]).is(1).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn flow_has_its_grace_and_a_kept_flow_continues() {
    for (keys, ends) in [("revoke-grace = \"300ms\"", true), ("on-revoke = \"keep\"", false)] {
        let acme = Echo::start("acme").await;
        let (mut proxy, _hooli) =
            world(&[acme.address], |conf, _| {
                conf.timeouts += "flow-idle = \"2s\"\n";
                conf.more += "[[tenant]]\nname = \"umbrella\"\nendpoints = [\"vpce-0bad0bad0bad0bad0\"]\npool = \"hooli\"\n";
            })
            .await;
        proxy.reload("labels = { plan = \"gold\" }", keys).unwrap();
        let balancer = Balancer::to(proxy.address("dns")).await;
        let one = datagram(CLIENT, ACME, b"one");
        balancer.ask(&one).await;
        proxy.reload_all(&TO_HOOLI).unwrap();
        assert_eq!(balancer.ask(&one).await, b"acme one");
        if ends {
            proxy.ended(&[("tenant", "acme"), ("why", "revoked")]).is(1).await;
            assert_eq!(balancer.ask(&one).await, b"hooli one");
        } else {
            // Another tenant loses its endpoint as well: its flow ends, and then all flows have been visited.
            let other = Balancer::to(proxy.address("dns")).await;
            other.ask(&datagram(CLIENT, STRANGER, b"x")).await;
            proxy.reload("endpoints = [\"vpce-0bad0bad0bad0bad0\"]", "endpoints = []").unwrap();
            proxy.ended(&[("tenant", "umbrella"), ("why", "revoked")]).is(1).await;
            assert_eq!(balancer.ask(&one).await, b"acme one");
        }
        finish(proxy).await;
    }
}
