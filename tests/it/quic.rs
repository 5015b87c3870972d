//! QUIC through the load balancer and the proxy: connections of two tenants at once, every byte of theirs checked.

mod peer;

use std::sync::Arc;

use tokio::time::timeout;
use vestibule::lab::nlb::{Nlb, VpcEndpoint};

use self::peer::{Client, Server};
use super::flow::{finish, others_are_unharmed, world};
use super::harness::{ACME, LIMIT, Proxy};

/// The second tenant whose backend speaks QUIC.
const UMBRELLA: &str = "vpce-0abe110abe110abe1";

/// Streams at once on each connection, and their bytes each way.
const STREAMS: u64 = 4;
const LEN: u64 = 512 * 1024;

/// What every datagram of a connection's became, once both ends have closed.
async fn every_datagram_is_accounted_for(proxy: &Proxy, tenant: &str, client: &Client, server: &Server) {
    let [there] = &server.connections()[..] else { panic!("{tenant}: more than one connection") };
    let (client, server) = (client.connection.stats(), there.stats());
    let count = |number: u64| f64::from(u32::try_from(number).unwrap());
    for (direction, sent, received) in [
        ("to_backend", client.udp_tx.datagrams, server.udp_rx.datagrams),
        ("to_client", server.udp_tx.datagrams, client.udp_rx.datagrams),
    ] {
        let labels = [("listener", "dns"), ("tenant", tenant), ("direction", direction)];
        let passed = proxy.value("vestibule_forwarded_datagrams_total", &labels).await;
        let bounds = count(received)..=count(sent);
        assert!(bounds.contains(&passed), "{labels:?}: {passed} is not in {bounds:?}");
        let bytes = proxy.value("vestibule_forwarded_bytes_total", &labels).await;
        assert!(bytes > count(STREAMS * LEN), "{labels:?}: {bytes}");
    }
    // Several left the server in one call, and came to the proxy together.
    let sent = server.udp_tx;
    assert!(sent.ios < sent.datagrams, "{tenant}: {} calls for {} datagrams", sent.ios, sent.datagrams);
    proxy.metric("vestibule_datagrams_dropped_total", &[("tenant", tenant)]).is(0).await;
}

#[tokio::test]
async fn connections_of_two_tenants_carry_their_streams_and_are_never_crossed() {
    let transport = Arc::default();
    let (acme, umbrella) = (Server::start("acme", &transport), Server::start("umbrella", &transport));
    let (proxy, _hooli) = world(&[acme.address], |conf, _| {
        // Longer than a busy machine keeps a connection waiting.
        conf.timeouts = "flow-idle = \"2s\"\n".to_owned();
        conf.more = format!(
            "[[pool]]\nname = \"umbrella\"\nbackends = [\"{}\"]\nhealth = {{ kind = \"none\" }}\n\
             [[tenant]]\nname = \"umbrella\"\nendpoints = [\"{UMBRELLA}\"]\npool = \"umbrella\"\n",
            umbrella.address
        );
    })
    .await;
    let endpoint = |id: &str| VpcEndpoint { id: id.to_owned(), consumers: "10.100.0.0/16".parse().unwrap() };
    let nlb = Nlb::start_udp(proxy.address("dns"), vec![endpoint(ACME), endpoint(UMBRELLA)]).await.unwrap();
    let connect = async |server: &Server, at: usize| {
        let connecting = Client::connect(server, nlb.address(at).unwrap(), &transport);
        timeout(LIMIT, connecting).await.expect("a connection in time")
    };
    let clients = [connect(&acme, 0).await, connect(&umbrella, 1).await];
    let before = clients.each_ref().map(|client| client.connection.stable_id());

    let [one, two] = clients.each_ref().map(async |client| {
        let stream = |number| client.exchange(number, LEN);
        tokio::join!(stream(0), stream(1), stream(2), stream(3));
    });
    timeout(LIMIT, async { tokio::join!(one, two) }).await.expect("all streams in time");

    for (client, server) in clients.iter().zip([&acme, &umbrella]) {
        assert!(client.connection.close_reason().is_none());
        assert_eq!(server.remotes().len(), 1, "one address for the whole connection");
    }
    assert_eq!(clients.each_ref().map(|client| client.connection.stable_id()), before);
    assert_eq!((nlb.connections(0), nlb.connections(1)), (1, 1));
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(2).await;
    others_are_unharmed(&proxy).await;
    for client in &clients {
        client.close().await;
    }
    for tenant in ["acme", "umbrella"] {
        proxy.ended(&[("listener", "dns"), ("tenant", tenant), ("why", "idle_timeout")]).is(1).await;
    }
    let [of_acme, of_umbrella] = &clients;
    every_datagram_is_accounted_for(&proxy, "acme", of_acme, &acme).await;
    every_datagram_is_accounted_for(&proxy, "umbrella", of_umbrella, &umbrella).await;
    let log = finish(proxy).await;
    for (tenant, server) in [("acme", &acme), ("umbrella", &umbrella)] {
        let line = log.iter().find(|line| line["tenant"] == tenant).unwrap();
        assert_eq!(line["client"], "10.100.0.10:40000", "both tenants' clients have one address");
        assert_eq!(line["backend"], server.address.to_string());
    }
}
