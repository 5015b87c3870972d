//! The same client, or the same endpoint, comes to the same backend.

use std::collections::BTreeMap;

use vestibule::lab::backend::TestBackend;

use super::harness::{ACME, Conf, Proxy};
use super::raw::Held;
use super::sessions::{asked_of, greeting, greeting_at, is, usable};

/// Where each of some clients, or endpoints, comes to.
type Places = BTreeMap<String, String>;

fn conf(balance: &str, backends: &[TestBackend]) -> Conf {
    Conf {
        acme: backends.iter().map(TestBackend::address).collect(),
        pool: format!("balance = \"{balance}\""),
        ..Conf::default()
    }
}

async fn three() -> [TestBackend; 3] {
    [greeting("acme-1").await, greeting("acme-2").await, greeting("acme-3").await]
}

/// Endpoints of one tenant.
fn endpoints() -> Vec<String> {
    (0..40).map(|number| format!("vpce-0e0d{number:013x}")).collect()
}

fn tenant() -> String {
    format!("[[tenant]]\nname = \"umbrella\"\nendpoints = {:?}\npool = \"acme\"", endpoints())
}

async fn by_endpoint(proxy: &Proxy, port: u16) -> Places {
    let mut places = Places::new();
    for (number, endpoint) in endpoints().into_iter().enumerate() {
        let client = format!("10.100.{number}.{}:{port}", port % 200);
        let name = asked_of(proxy, &client, &endpoint).await;
        places.insert(endpoint, name);
    }
    places
}

async fn by_client(proxy: &Proxy, port: u16) -> Places {
    let mut places = Places::new();
    for number in 0..60 {
        let client = format!("10.100.{number}.7");
        let name = asked_of(proxy, &format!("{client}:{port}"), ACME).await;
        places.insert(client, name);
    }
    places
}

/// How many of them come to each backend.
fn counts(places: &Places) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for name in places.values() {
        *counts.entry(name.as_str()).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn endpoint_keeps_its_backend_for_all_clients_and_after_a_restart() {
    let backends = three().await;
    let start = async || Conf { more: tenant(), ..conf("maglev-endpoint", &backends) }.start().await;
    let proxy = start().await;
    let first = by_endpoint(&proxy, 1_000).await;
    assert_eq!(counts(&first).len(), 3, "{first:?}");
    for port in 1_001..1_005 {
        assert_eq!(by_endpoint(&proxy, port).await, first);
    }
    proxy.ended(&[("tenant", "umbrella"), ("why", "done")]).is(200).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;

    let proxy = start().await;
    assert_eq!(by_endpoint(&proxy, 2_000).await, first);
    proxy.ended(&[("tenant", "umbrella"), ("why", "done")]).is(40).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_keeps_its_backend_from_any_port_and_after_a_restart() {
    let backends = three().await;
    let proxy = conf("maglev", &backends).start().await;
    let first = by_client(&proxy, 1_000).await;
    assert_eq!(counts(&first).len(), 3, "{first:?}");
    assert_eq!(by_client(&proxy, 2_000).await, first);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(120).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;

    // In whatever order they are written.
    let Conf { mut acme, pool, .. } = conf("maglev", &backends);
    acme.reverse();
    let proxy = Conf { acme, pool, ..Conf::default() }.start().await;
    assert_eq!(by_client(&proxy, 3_000).await, first);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Those that had the lost backend come to another, and the others keep theirs.
fn only_the_lost_move(first: &Places, now: &Places, lost: &str) {
    for (client, name) in first {
        if name == lost {
            assert_ne!(now[client], lost);
        } else {
            assert_eq!(&now[client], name, "{client}");
        }
    }
}

#[tokio::test]
async fn dead_backends_clients_move_and_other_clients_stay() {
    let good = [greeting("acme-1").await, greeting("acme-2").await];
    let held = Held::bind();
    let dying = greeting_at(held.address(), "acme-3").await;
    let mut conf = conf("maglev", &good);
    conf.acme.push(held.address());
    conf.health.push_str("\n[pool.ejection]\nconsecutive-failures = 5\nbase-time = \"10m\"");
    let proxy = conf.start().await;
    let first = by_client(&proxy, 1_000).await;
    assert!(counts(&first)["acme-3"] >= 5, "{first:?}");

    drop(dying);
    let failing = by_client(&proxy, 2_000).await;
    only_the_lost_move(&first, &failing, "acme-3");
    is(&proxy, "vestibule_backend_ejected", held.address(), 1).await;
    usable(&proxy, 2).await;
    let without = by_client(&proxy, 3_000).await;
    only_the_lost_move(&first, &without, "acme-3");
    assert_eq!(by_client(&proxy, 4_000).await, without);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(240).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
