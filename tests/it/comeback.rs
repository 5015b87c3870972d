//! A backend that comes back gets little at first, and more as time goes.

use std::cell::RefCell;

use super::harness::{Conf, Proxy, eventually};
use super::raw::Held;
use super::sessions::{ROUND_ROBIN, greeting, greeting_at, is, shares, usable};
use vestibule::lab::backend::TestBackend;

const QUICK: &str = "interval = \"100ms\"\ntimeout = \"100ms\"\nrise = 1\nfall = 1";

/// A pool of two that takes so long for a slow start.
async fn proxy(held: &Held, good: &TestBackend, slow_start: &str) -> Proxy {
    let acme = vec![good.address(), held.address()];
    let pool = format!("{ROUND_ROBIN}\nslow-start = \"{slow_start}\"");
    Conf { acme, pool, health: QUICK.to_owned(), ..Conf::default() }.start().await
}

#[tokio::test]
async fn slow_start_weight_grows_to_full_weight() {
    let (held, good) = (Held::bind(), greeting("acme-1").await);
    let back = greeting_at(held.address(), "acme-2").await;
    let proxy = proxy(&held, &good, "3s").await;
    // Nobody is slow at the start of the process.
    is(&proxy, "vestibule_backend_healthy", held.address(), 1).await;
    is(&proxy, "vestibule_backend_weight", held.address(), 100).await;
    drop(back);
    is(&proxy, "vestibule_backend_healthy", held.address(), 0).await;
    is(&proxy, "vestibule_backend_weight", held.address(), 0).await;
    let _back = greeting_at(held.address(), "acme-2").await;

    let (address, seen) = (held.address().to_string(), RefCell::new(Vec::new()));
    let labels = [("pool", "acme"), ("backend", address.as_str())];
    eventually("the whole weight", async || {
        let weight = proxy.value("vestibule_backend_weight", &labels).await;
        if weight > 0.0 {
            seen.borrow_mut().push(weight);
        }
        (weight > 99.9).then_some(())
    })
    .await;
    let mut seen = seen.take();
    assert!(seen[0] < 50.0, "{seen:?}");
    assert!(seen.is_sorted(), "{seen:?}");
    seen.dedup();
    assert!(seen.len() >= 5, "{seen:?}");
    is(&proxy, "vestibule_backend_weight", good.address(), 100).await;
    let shares = shares(&proxy, 10).await;
    assert_eq!((shares["acme-1"], shares["acme-2"]), (5, 5));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(10).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn slow_start_begins_with_a_small_share() {
    let (held, good) = (Held::bind(), greeting("acme-1").await);
    let proxy = proxy(&held, &good, "1h").await;
    // A first probe that succeeds makes no comeback.
    is(&proxy, "vestibule_backend_healthy", held.address(), 0).await;
    usable(&proxy, 1).await;
    let _back = greeting_at(held.address(), "acme-2").await;
    usable(&proxy, 2).await;
    let shares = shares(&proxy, 200).await;
    // One part of 64 for the first minute.
    let own = shares.get("acme-2").copied().unwrap_or(0);
    assert!((1..=6).contains(&own), "{own} of 200");
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(200).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
