//! What real sessions say of a backend: who fails them in a row is left out for a time.

use std::net::SocketAddr;

use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, Proxy, eventually, is_reset};
use super::raw::Held;
use super::sessions::{
    ROUND_ROBIN, UMBRELLA, asked, asked_of, changed, connects, greeting, greeting_at, ground, is, umbrella,
    usable,
};

const CLIENT: &str = "10.100.0.10:40000";

/// A pool whose backends only sessions judge: out after three failures in a row.
fn conf(acme: Vec<SocketAddr>, pool: &str, ejection: &str) -> Conf {
    let ejection = format!("[pool.ejection]\nconsecutive-failures = 3\n{ejection}");
    Conf {
        acme,
        pool: format!("{ROUND_ROBIN}\n{pool}"),
        health: format!("kind = \"none\"\n{ejection}"),
        ..Conf::default()
    }
}

async fn ejected(proxy: &Proxy, backend: SocketAddr, expected: u32) {
    is(proxy, "vestibule_backend_ejected", backend, expected).await;
}

async fn ejections(proxy: &Proxy, backend: SocketAddr, expected: u32) {
    is(proxy, "vestibule_backend_ejections_total", backend, expected).await;
}

/// One session that its backend resets.
async fn is_reset_for(proxy: &Proxy, endpoint: &str) {
    is_reset(&mut proxy.open(endpoint, b"hello").await).await;
}

#[tokio::test]
async fn three_failed_connects_in_a_row_eject_and_no_client_sees_it() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let acme = vec![refusing.address(), good.address()];
    let proxy = conf(acme, "attempts = 2", "base-time = \"10m\"").start().await;
    usable(&proxy, 2).await;
    for _ in 0..30 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    ejected(&proxy, refusing.address(), 1).await;
    ejections(&proxy, refusing.address(), 1).await;
    changed(&proxy, refusing.address(), "connect_failures").await;
    usable(&proxy, 1).await;
    ground(&proxy, "healthy").await;
    is(&proxy, "vestibule_backend_weight", refusing.address(), 0).await;
    // At once, not only when the pool has been looked at.
    connects(&proxy, refusing.address(), "connect_refused", 3).await;
    connects(&proxy, good.address(), "done", 30).await;
    ejections(&proxy, good.address(), 0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(30).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn ejected_backend_returns_after_its_ejection_time() {
    let (held, good) = (Held::bind(), greeting("acme-1").await);
    let acme = vec![held.address(), good.address()];
    let proxy = conf(acme, "slow-start = \"200ms\"", "base-time = \"500ms\"").start().await;
    for _ in 0..6 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    ejections(&proxy, held.address(), 1).await;
    let back = greeting_at(held.address(), "acme-2").await;
    ejected(&proxy, held.address(), 0).await;
    changed(&proxy, held.address(), "ejection_over").await;
    is(&proxy, "vestibule_backend_weight", held.address(), 100).await;
    usable(&proxy, 2).await;
    let mut names = [asked(&proxy).await, asked(&proxy).await];
    names.sort();
    assert_eq!(names, ["acme-1", "acme-2"]);
    ejections(&proxy, held.address(), 1).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(8).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
    drop(back);
}

#[tokio::test]
async fn success_between_failures_resets_the_count() {
    let (held, good) = (Held::bind(), greeting("acme-1").await);
    let acme = vec![held.address(), good.address()];
    let proxy = conf(acme, "", "").start().await;
    for round in 1..=3 {
        for _ in 0..4 {
            assert_eq!(asked(&proxy).await, "acme-1");
        }
        connects(&proxy, held.address(), "connect_refused", 2 * round).await;
        let back = greeting_at(held.address(), "acme-2").await;
        let mut names = [asked(&proxy).await, asked(&proxy).await];
        names.sort();
        assert_eq!(names, ["acme-1", "acme-2"]);
        drop(back);
    }
    ejections(&proxy, held.address(), 0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(18).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn resets_of_one_tenant_eject_no_shared_backend_and_resets_of_two_do() {
    let good = greeting("acme-1").await;
    let resetting = TestBackend::start("acme-2", BackendBehavior::ResetAfter(5)).await.unwrap();
    let acme = vec![good.address(), resetting.address()];
    let conf = conf(acme, "", "base-time = \"10m\"");
    let proxy = Conf { more: umbrella(), ..conf }.start().await;
    assert_eq!(asked_of(&proxy, CLIENT, UMBRELLA).await, "acme-1");
    for _ in 0..6 {
        is_reset_for(&proxy, ACME).await;
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    is(&proxy, "vestibule_backend_early_resets_total", resetting.address(), 6).await;
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("why", "reset")]).is(6).await;
    ejections(&proxy, resetting.address(), 0).await;
    usable(&proxy, 2).await;

    // Each of two tenants in turn: the second of these is the third that counts.
    is_reset_for(&proxy, UMBRELLA).await;
    ejections(&proxy, resetting.address(), 0).await;
    assert_eq!(asked(&proxy).await, "acme-1");
    is_reset_for(&proxy, ACME).await;
    ejected(&proxy, resetting.address(), 1).await;
    changed(&proxy, resetting.address(), "resets").await;
    for _ in 0..10 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    is(&proxy, "vestibule_backend_early_resets_total", resetting.address(), 8).await;
    ejections(&proxy, resetting.address(), 1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn in_a_pool_of_one_tenant_its_own_resets_are_enough() {
    let good = greeting("acme-1").await;
    let resetting = TestBackend::start("acme-2", BackendBehavior::ResetAfter(5)).await.unwrap();
    let proxy = conf(vec![resetting.address(), good.address()], "", "base-time = \"10m\"").start().await;
    for count in 1..=3 {
        is_reset_for(&proxy, ACME).await;
        assert_eq!(asked(&proxy).await, "acme-1");
        is(&proxy, "vestibule_backend_early_resets_total", resetting.address(), count).await;
    }
    ejected(&proxy, resetting.address(), 1).await;
    changed(&proxy, resetting.address(), "resets").await;
    for _ in 0..6 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("why", "reset")]).is(3).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn no_more_backends_are_ejected_than_allowed() {
    let refusing = [Held::bind(), Held::bind()];
    let good = [greeting("acme-1").await, greeting("acme-2").await];
    let acme: Vec<_> =
        refusing.iter().map(Held::address).chain(good.iter().map(TestBackend::address)).collect();
    let proxy = conf(acme, "", "base-time = \"10m\"\nmax-percent = 49").start().await;
    for _ in 0..40 {
        assert!(asked(&proxy).await.starts_with("acme-"));
    }
    let of_acme = [("pool", "acme")];
    proxy.metric("vestibule_backend_ejected", &of_acme).is(1).await;
    proxy.metric("vestibule_backend_ejections_total", &of_acme).is(1).await;
    // The other one goes on being tried.
    let refused = [("pool", "acme"), ("result", "connect_refused")];
    proxy.metric("vestibule_backend_connects_total", &refused).is_at_least(10).await;
    usable(&proxy, 3).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(40).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn only_backend_is_not_ejected() {
    let held = Held::bind();
    let proxy = conf(vec![held.address()], "", "max-percent = 100").start().await;
    for _ in 0..6 {
        is_reset_for(&proxy, ACME).await;
    }
    ejections(&proxy, held.address(), 0).await;
    proxy.ended(&[("tenant", "acme"), ("at", "connect"), ("why", "connect_refused")]).is(6).await;
    let _back = greeting_at(held.address(), "acme-1").await;
    let served = async || (asked(&proxy).await == "acme-1").then_some(());
    eventually("a session", served).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
