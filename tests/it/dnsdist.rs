//! dnsdist in front as the load balancer, with a header and an endpoint ID on every datagram, and dnsdist behind, which
//! reads the header that we pass on.

use std::process::{Command, Stdio};

use super::flow::{finish, others_are_unharmed, soon, world};
use super::harness::{ACME, STRANGER};
use super::peers::{Peer, installed};

/// What dig says that a server answers a consumer of this address.
async fn dig(program: &str, server: std::net::SocketAddr, consumer: &str) -> String {
    let (ip, port) = (format!("@{}", server.ip()), server.port().to_string());
    let mut command = Command::new(program);
    command.args([
        "-r",
        "+short",
        "+tries=1",
        "+time=2",
        &ip,
        "-p",
        &port,
        "-b",
        consumer,
        "example.com",
        "A",
    ]);
    let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output());
    String::from_utf8(output.await.unwrap().unwrap().stdout).unwrap()
}

/// dnsdist in front, which says that all its clients come through this endpoint.
async fn in_front(program: &str, target: std::net::SocketAddr, endpoint: &str) -> Peer {
    // It probes with LOCAL headers, and hears nothing.
    let rules = format!(
        "newServer({{address='{target}', useProxyProtocol=true}})\ngetServer(0):setUp()\n\
         addAction(AllRule(), SetProxyProtocolValuesAction({{[234]='\\1{endpoint}'}}))"
    );
    Peer::dnsdist(program, &rules).await
}

#[tokio::test]
async fn a_query_goes_through_dnsdist_on_both_sides_with_its_client_and_its_endpoint() {
    let Some([dnsdist, dig_program]) = installed(["dnsdist", "dig"]) else { return };
    let rules = format!(
        "setProxyProtocolACL({{'127.0.0.0/8'}})\nlocal consumer = newNMG()\nconsumer:addMask('127.0.0.5/32')\n\
         local endpoint = ProxyProtocolValueRule(234, '\\1{ACME}')\n\
         addAction(AndRule({{NetmaskGroupRule(consumer), endpoint}}), SpoofAction('192.0.2.5'))\n\
         addAction(endpoint, SpoofAction('192.0.2.6'))\naddAction(AllRule(), SpoofAction('192.0.2.1'))"
    );
    let behind = Peer::dnsdist(&dnsdist, &rules).await;
    let (proxy, _hooli) = world(&[behind.address], |conf, _| {
        conf.pool = "send-proxy = \"v2\"".to_owned();
        soon(conf);
    })
    .await;
    let front = in_front(&dnsdist, proxy.address("dns"), ACME).await;
    for _ in 0..5 {
        assert_eq!(dig(&dig_program, front.address, "127.0.0.5").await, "192.0.2.5\n");
        assert_eq!(dig(&dig_program, front.address, "127.0.0.6").await, "192.0.2.6\n");
    }
    let passed = [("tenant", "acme"), ("direction", "to_client")];
    proxy.metric("vestibule_forwarded_datagrams_total", &passed).is(10).await;
    let stranger = in_front(&dnsdist, proxy.address("dns"), STRANGER).await;
    assert!(!dig(&dig_program, stranger.address, "127.0.0.5").await.starts_with("192.0.2."));
    proxy.ended(&[("listener", "dns"), ("why", "unknown_endpoint")]).is_at_least(1).await;
    others_are_unharmed(&proxy).await;
    drop((front, stranger));
    let log = finish(proxy).await;
    let of_acme = log.iter().filter(|line| line["tenant"] == "acme").collect::<Vec<_>>();
    assert_eq!(of_acme.len(), 10, "each question comes from a port of its own");
    for line in of_acme {
        assert_eq!(line["endpoint"], ACME);
        assert!(line["client"].as_str().unwrap().starts_with("127.0.0."), "{line}");
    }
}
