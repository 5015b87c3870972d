//! dnsdist in front as the load balancer, with a header and an endpoint ID on every datagram, and dnsdist behind, which
//! reads the header that we pass on; dig and dnsperf ask.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use tempfile::TempDir;

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
async fn query_through_dnsdist_on_both_sides_keeps_client_and_endpoint() {
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

/// What dnsperf found in about two seconds: queries sent, and queries that were answered without an error.
async fn dnsperf(program: &str, server: std::net::SocketAddr) -> (u32, u32) {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("queries");
    let mut queries = String::new();
    for number in 0..100 {
        writeln!(queries, "host-{number}.example.com A").unwrap();
    }
    std::fs::write(&file, queries).unwrap();
    let mut command = Command::new(program);
    command.args(["-l", "2", "-c", "20", "-q", "50", "-t", "10", "-s", &server.ip().to_string()]);
    command.args(["-p", &server.port().to_string(), "-d"]).arg(&file);
    let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output());
    let text = String::from_utf8(output.await.unwrap().unwrap().stdout).unwrap();
    let count = |name: &str| {
        let found = text.lines().find_map(|line| line.trim().strip_prefix(name));
        let found = found.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        found.unwrap_or_else(|| panic!("no line {name} in {text}"))
    };
    let (sent, completed) = (count("Queries sent:"), count("Queries completed:"));
    assert_eq!(completed, sent, "{text}");
    (sent, count("Response codes:       NOERROR"))
}

#[tokio::test]
async fn every_query_of_dnsperf_comes_back_and_is_counted() {
    let Some([dnsdist, dnsperf_program]) = installed(["dnsdist", "dnsperf"]) else { return };
    let rules = "setProxyProtocolACL({'127.0.0.0/8'})\naddAction(AllRule(), SpoofAction('192.0.2.1'))";
    let behind = Peer::dnsdist(&dnsdist, rules).await;
    let (proxy, _hooli) = world(&[behind.address], |conf, _| {
        conf.pool = "send-proxy = \"v2\"".to_owned();
        // Longer than a busy machine keeps a client waiting.
        conf.timeouts = "flow-idle = \"2s\"\n".to_owned();
    })
    .await;
    let front = in_front(&dnsdist, proxy.address("dns"), ACME).await;
    let (sent, answered) = dnsperf(&dnsperf_program, front.address).await;
    assert!(sent >= 100, "{sent}");
    assert_eq!(answered, sent);
    for direction in ["to_backend", "to_client"] {
        let labels = [("listener", "dns"), ("tenant", "acme"), ("direction", direction)];
        proxy.metric("vestibule_forwarded_datagrams_total", &labels).is(sent).await;
    }
    proxy.metric("vestibule_datagrams_dropped_total", &[]).is(0).await;
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(20).await;
    others_are_unharmed(&proxy).await;
    drop(front);
    finish(proxy).await;
}
