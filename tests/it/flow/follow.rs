//! A flow whose backend is no longer in use: where its next datagram goes.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use vestibule::addr::BackendAddr;
use vestibule::clock;

use super::super::harness::{ACME, Proxy, eventually};
use super::{Balancer, CLIENT, Echo, datagram, finish, others_are_unharmed, soon, world};

/// The one flow goes to `expected` from now on, and is counted there alone.
async fn is_at(proxy: &Proxy, balancer: &Balancer, expected: &str, [on, off]: [SocketAddr; 2]) {
    let question = datagram(CLIENT, ACME, b"where");
    assert_eq!(balancer.ask(&question).await, format!("{expected} where").as_bytes());
    for (address, count) in [(on, 1), (off, 0)] {
        let labels = [("pool", "acme"), ("backend", &*address.to_string())];
        if count > 0 || proxy.value("vestibule_backend_sessions_active", &labels).await > 0.0 {
            proxy.metric("vestibule_backend_sessions_active", &labels).is(count).await;
        }
    }
    let port = [("backend", ""), ("protocol", "udp"), ("state", "live")];
    proxy.metric("vestibule_local_ports_in_use", &port).is(1).await;
}

#[tokio::test]
async fn flow_moves_when_a_reload_removes_its_backend_or_sets_its_weight_to_0() {
    let [one, two] = [Echo::start("one").await, Echo::start("two").await];
    let (mut proxy, _hooli) = world(&[one.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"begin")).await, b"one begin");
    let [first, second] = [&one, &two].map(|echo| format!("backends = [\"{}\"]", echo.address));
    proxy.reload(&first, &second).unwrap();
    is_at(&proxy, &balancer, "two", [two.address, one.address]).await;
    let both = |of_one: u32, of_two: u32| {
        let backend =
            |echo: &Echo, weight: u32| format!("{{ address = \"{}\", weight = {weight} }}", echo.address);
        format!("backends = [{}, {}]", backend(&one, of_one), backend(&two, of_two))
    };
    proxy.reload(&second, &both(100, 100)).unwrap();
    is_at(&proxy, &balancer, "two", [two.address, one.address]).await;
    proxy.reload(&both(100, 100), &both(100, 0)).unwrap();
    is_at(&proxy, &balancer, "one", [one.address, two.address]).await;
    // Where no backend is in use, the flow stays.
    proxy.reload(&both(100, 0), &both(0, 0)).unwrap();
    is_at(&proxy, &balancer, "one", [one.address, two.address]).await;
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn flow_moves_when_an_operator_sets_the_weight_of_its_backend_to_0() {
    let [one, two] = [Echo::start("one").await, Echo::start("two").await];
    let (proxy, _hooli) = world(&[one.address, two.address], |conf, _| {
        conf.pool = "balance = \"round-robin\"".to_owned();
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let answer = balancer.ask(&datagram(CLIENT, ACME, b"where")).await;
    let (from, to, expected) = if answer == b"one where" { (&one, &two, "two") } else { (&two, &one, "one") };
    let snapshot = proxy.server().live().snapshot.load_full();
    let pool = snapshot.pools.iter().find(|pool| pool.label.name() == "acme").unwrap();
    pool.override_weight(BackendAddr(from.address), 0, clock::now()).unwrap();
    is_at(&proxy, &balancer, expected, [to.address, from.address]).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn flow_moves_from_an_unhealthy_backend_unless_all_are() {
    // Each backend is probed at the same port of its own address.
    let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = first.local_addr().unwrap().port();
    let second = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let [one, two] = [Echo::start_at("127.0.0.1:0", "one").await, Echo::start_at("127.0.0.2:0", "two").await];
    let (proxy, _hooli) = world(&[one.address, two.address], |conf, _| {
        conf.pool = "balance = \"round-robin\"".to_owned();
        conf.health = format!(
            "kind = \"tcp\"\nport = {port}\ninterval = \"50ms\"\ntimeout = \"50ms\"\nrise = 1\nfall = 1"
        );
        conf.timeouts += "flow-idle = \"2s\"\n";
    })
    .await;
    for backend in [&one, &two] {
        let labels = [("pool", "acme"), ("backend", &*backend.address.to_string())];
        proxy.metric("vestibule_backend_healthy", &labels).is(1).await;
    }
    proxy.metric("vestibule_pool_usable_backends", &[("pool", "acme")]).is(2).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let question = datagram(CLIENT, ACME, b"where");
    let was_first = balancer.ask(&question).await == b"one where";
    let ([of_present, of_other], other) =
        if was_first { ([first, second], "two") } else { ([second, first], "one") };
    drop(of_present);
    eventually("the flow at the other backend", async || {
        (balancer.ask(&question).await == format!("{other} where").as_bytes()).then_some(())
    })
    .await;
    drop(of_other);
    proxy.metric("vestibule_pool_usable_backends", &[("pool", "acme")]).is(0).await;
    assert_eq!(balancer.ask(&question).await, format!("{other} where").as_bytes());
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}
