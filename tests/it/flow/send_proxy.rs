//! `send-proxy = "v2"` for datagrams: which header each has towards the backend.

use vestibule::addr::{ClientAddr, DestinationAddr};
use vestibule::proxy_protocol::{HeaderBuilder, Transport};

use super::super::harness::ACME;
use super::{Balancer, CLIENT, Echo, FOLLOW, datagram, finish, others_are_unharmed, soon, world};

#[tokio::test]
async fn send_proxy_puts_the_header_on_every_datagram() {
    let acme = Echo::start("").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, listener| {
        listener.push_str(FOLLOW);
        conf.pool = "send-proxy = \"v2\"".to_owned();
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let whole = datagram(CLIENT, ACME, b"one");
    assert_eq!(balancer.ask(&whole).await, whole);
    assert_eq!(
        balancer.ask(b"two").await,
        datagram(CLIENT, ACME, b"two"),
        "one that came without a header too"
    );
    balancer.send(&vec![0; 65_500]).await;
    let too_long = [("tenant", "acme"), ("direction", "to_backend"), ("why", "too_long")];
    proxy.metric("vestibule_datagrams_dropped_total", &too_long).is(1).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn send_proxy_gives_each_datagram_its_own_header() {
    let acme = Echo::start("").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| {
        conf.pool = "send-proxy = \"v2\"".to_owned();
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let (client, destination) = (CLIENT.parse().unwrap(), "10.0.0.1:53".parse().unwrap());
    // With a unique ID, as other senders than NLB write it, of several lengths; several in one batch.
    let datagrams = (0..20_usize).map(|number| {
        let builder =
            HeaderBuilder::proxy(Transport::Datagram, ClientAddr(client), DestinationAddr(destination));
        let builder = builder.endpoint(ACME).unwrap();
        let builder = builder.tlv(0x05, format!("id{}", "x".repeat(number % 7)).as_bytes()).unwrap();
        [builder.crc().unwrap().build(), format!("payload {number}").into_bytes()].concat()
    });
    let datagrams: Vec<_> = datagrams.collect();
    for datagram in &datagrams {
        balancer.send(datagram).await;
    }
    for datagram in &datagrams {
        assert_eq!(&balancer.answer().await, datagram);
    }
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}
