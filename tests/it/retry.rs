//! How many attempts beyond the first a pool's sessions have together.

use super::harness::{Conf, Proxy, end_of};
use super::raw::Held;
use super::sessions::{ROUND_ROBIN, asked, connects, greeting, is_turned_away};

const NEVER: &str = "kind = \"none\"\n[pool.ejection]\nconsecutive-failures = 0";

async fn retries(proxy: &Proxy, result: &str, count: u32) {
    proxy.metric("vestibule_pool_retries_total", &[("pool", "acme"), ("result", result)]).is(count).await;
}

#[tokio::test]
async fn without_a_budget_there_is_one_attempt() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let pool = format!("{ROUND_ROBIN}\nattempts = 3\nretry-budget = 0");
    let acme = vec![refusing.address(), good.address()];
    let proxy = Conf { acme, pool, health: NEVER.to_owned(), ..Conf::default() }.start().await;
    for _ in 0..5 {
        is_turned_away(&proxy).await;
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    proxy.ended(&[("tenant", "acme"), ("at", "connect"), ("why", "connect_refused")]).is(5).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(5).await;
    connects(&proxy, refusing.address(), "connect_refused", 5).await;
    connects(&proxy, good.address(), "done", 5).await;
    retries(&proxy, "refused", 5).await;
    retries(&proxy, "made", 0).await;
    assert_eq!(proxy.logged("connect_refused").await["attempts"], 1);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn first_hundred_retries_are_available() {
    let (refusing, good) = (Held::bind(), greeting("acme-1").await);
    let acme = vec![refusing.address(), good.address()];
    let conf = Conf { acme, pool: ROUND_ROBIN.to_owned(), health: NEVER.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    for _ in 0..200 {
        assert_eq!(asked(&proxy).await, "acme-1");
    }
    connects(&proxy, refusing.address(), "connect_refused", 100).await;
    retries(&proxy, "made", 100).await;
    retries(&proxy, "refused", 0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(200).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn failing_pool_gets_few_connects_beyond_its_sessions() {
    let refusing: Vec<_> = (0..4).map(|_| Held::bind()).collect();
    let acme = refusing.iter().map(Held::address).collect();
    let pool = "attempts = 4\nretry-budget = 1".to_owned();
    let proxy = Conf { acme, pool, health: NEVER.to_owned(), ..Conf::default() }.start().await;
    let refused = [("pool", "acme"), ("result", "refused")];
    let mut sessions = 0;
    while proxy.value("vestibule_pool_retries_total", &refused).await < 0.5 {
        assert!(sessions < 10_000, "the budget has no end");
        end_of(&mut proxy.open(super::harness::ACME, b"hello").await).await.unwrap_err();
        sessions += 1;
    }
    let made = proxy.value("vestibule_pool_retries_total", &[("pool", "acme"), ("result", "made")]).await;
    assert!(made >= 100.0, "{made}");
    proxy.ended(&[("tenant", "acme"), ("why", "connect_refused")]).is(sessions).await;
    let attempts = [("pool", "acme"), ("result", "connect_refused")];
    let attempts = proxy.value("vestibule_backend_connects_total", &attempts).await;
    assert!((attempts - made - f64::from(sessions)).abs() < 0.5, "{attempts}, {made} of them again");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
