//! How sessions are shared out: by weight and load, to backups, to zones, and to all where health says too little.

use std::collections::BTreeMap;

use vestibule::lab::backend::TestBackend;

use super::harness::{ACME, Conf, Proxy, read};
use super::raw::Held;
use super::sessions::{ROUND_ROBIN, connects, greeting, greeting_at, ground, is, shares, usable, with};

/// Probes that decide at once.
const QUICK: &str = "interval = \"100ms\"\ntimeout = \"100ms\"\nrise = 1\nfall = 1";

fn only(name: &str, sessions: u32) -> BTreeMap<String, u32> {
    BTreeMap::from([(name.to_owned(), sessions)])
}

async fn done(proxy: &Proxy, sessions: u32) {
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(sessions).await;
}

#[tokio::test]
async fn shares_are_those_of_the_weights_and_zero_gets_nothing() {
    let weights = [0, 100, 300, 600];
    let mut all = Vec::new();
    for weight in weights {
        all.push(greeting(&format!("of-{weight}")).await);
    }
    let backends = all.iter().zip(weights);
    let backends =
        backends.map(|(backend, weight)| with(backend.address(), &format!("weight = {weight}"))).collect();
    let proxy = Conf { backends, pool: ROUND_ROBIN.to_owned(), ..Conf::default() }.start().await;
    usable(&proxy, 3).await;
    let shares = shares(&proxy, 1_000).await;
    for (backend, weight) in all.iter().zip(weights) {
        let own = shares.get(backend.name()).copied().unwrap_or(0);
        assert!(own.abs_diff(weight) <= weight / 20, "{own} of 1000 sessions for {weight} of 1000");
        connects(&proxy, backend.address(), "done", own).await;
        is(&proxy, "vestibule_backend_weight", backend.address(), weight).await;
    }
    assert_eq!(all[0].sessions(), 0);
    done(&proxy, 1_000).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn least_sessions_counts_sessions_relative_to_weight() {
    let all = [greeting("acme-1").await, greeting("acme-2").await, greeting("acme-3").await];
    let backends = all.iter().zip(["weight = 100", "weight = 200", "weight = 0"]);
    let backends = backends.map(|(backend, weight)| with(backend.address(), weight)).collect();
    let pool = "balance = \"least-sessions\"".to_owned();
    let proxy = Conf { backends, pool, ..Conf::default() }.start().await;
    let mut held = Vec::new();
    for _ in 0..30 {
        let mut stream = proxy.open(ACME, b"").await;
        let name = String::from_utf8(read(&mut stream, 7).await).unwrap();
        held.push((name.trim_end().to_owned(), stream));
    }
    let open = |name: &str| held.iter().filter(|(other, _)| other == name).count();
    assert_eq!((open("acme-1"), open("acme-2"), open("acme-3")), (10, 20, 0));
    // What is free on one is filled there.
    held.retain(|(name, _)| name != "acme-1");
    is(&proxy, "vestibule_backend_sessions_active", all[0].address(), 0).await;
    let free = shares(&proxy, 5).await;
    assert_eq!(free, only("acme-1", 5));
    drop(held);
    done(&proxy, 35).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn backup_is_used_while_no_other_backend_can_be() {
    let (held, backup) = (Held::bind(), greeting("backup").await);
    let primary = greeting_at(held.address(), "primary").await;
    let backends = vec![with(backup.address(), "backup = true"), with(held.address(), "weight = 1")];
    let conf = Conf { backends, pool: ROUND_ROBIN.to_owned(), health: QUICK.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    is(&proxy, "vestibule_backend_healthy", held.address(), 1).await;
    ground(&proxy, "healthy").await;
    usable(&proxy, 1).await;
    assert_eq!(shares(&proxy, 10).await, only("primary", 10));

    drop(primary);
    ground(&proxy, "backup").await;
    is(&proxy, "vestibule_backend_healthy", held.address(), 0).await;
    assert_eq!(shares(&proxy, 10).await, only("backup", 10));

    let _primary = greeting_at(held.address(), "primary").await;
    ground(&proxy, "healthy").await;
    assert_eq!(shares(&proxy, 10).await, only("primary", 10));
    is(&proxy, "vestibule_backend_weight", backup.address(), 0).await;
    done(&proxy, 30).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn preferred_zone_gets_all_and_others_get_its_missing_weight() {
    let near = greeting("near-1").await;
    let (held, far) = (Held::bind(), greeting("far").await);
    let second = greeting_at(held.address(), "near-2").await;
    let backends = vec![
        with(near.address(), "zone = \"a\""),
        with(held.address(), "zone = \"a\""),
        with(far.address(), "zone = \"b\""),
    ];
    let pool = format!("{ROUND_ROBIN}\nprefer-zone = \"a\"");
    let proxy = Conf { backends, pool, health: QUICK.to_owned(), ..Conf::default() }.start().await;
    proxy.metric("vestibule_backend_healthy", &[("pool", "acme")]).is(3).await;
    usable(&proxy, 2).await;
    let both = BTreeMap::from([("near-1".to_owned(), 10), ("near-2".to_owned(), 10)]);
    assert_eq!(shares(&proxy, 20).await, both);

    drop(second);
    is(&proxy, "vestibule_backend_weight", far.address(), 100).await;
    is(&proxy, "vestibule_backend_weight", held.address(), 0).await;
    let half = BTreeMap::from([("near-1".to_owned(), 10), ("far".to_owned(), 10)]);
    assert_eq!(shares(&proxy, 20).await, half);

    let _second = greeting_at(held.address(), "near-2").await;
    is(&proxy, "vestibule_backend_weight", far.address(), 0).await;
    usable(&proxy, 2).await;
    assert_eq!(shares(&proxy, 20).await, both);
    done(&proxy, 60).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn when_none_of_the_preferred_zone_can_be_used_the_others_are() {
    let (held, far) = (Held::bind(), greeting("far").await);
    let backends = vec![with(held.address(), "zone = \"a\""), with(far.address(), "zone = \"b\"")];
    let pool = format!("{ROUND_ROBIN}\nprefer-zone = \"a\"");
    let proxy = Conf { backends, pool, health: QUICK.to_owned(), ..Conf::default() }.start().await;
    is(&proxy, "vestibule_backend_healthy", held.address(), 0).await;
    is(&proxy, "vestibule_backend_healthy", far.address(), 1).await;
    usable(&proxy, 1).await;
    ground(&proxy, "healthy").await;
    assert_eq!(shares(&proxy, 5).await, only("far", 5));
    done(&proxy, 5).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Of three backends, the probes let one be used.
async fn one_of_three(panic_threshold: u32) -> (Proxy, [TestBackend; 3]) {
    let all = [greeting("sick-1").await, greeting("sick-2").await, greeting("well-1").await];
    let conf = Conf {
        acme: all.iter().map(TestBackend::address).collect(),
        pool: format!("{ROUND_ROBIN}\npanic-threshold = {panic_threshold}"),
        health: "kind = \"exchange\"\nexpect = \"well\"\nmatch = \"prefix\"".to_owned(),
        ..Conf::default()
    };
    let proxy = conf.start().await;
    let probes = |result| [("pool", "acme"), ("result", result)];
    proxy.metric("vestibule_backend_probes_total", &probes("unexpected_answer")).is_at_least(2).await;
    proxy.metric("vestibule_backend_probes_total", &probes("passed")).is_at_least(1).await;
    proxy.metric("vestibule_backend_healthy", &[("pool", "acme")]).is(1).await;
    (proxy, all)
}

#[tokio::test]
async fn where_too_few_are_healthy_all_are_used() {
    let (proxy, all) = one_of_three(34).await;
    ground(&proxy, "panic").await;
    usable(&proxy, 3).await;
    let shares = shares(&proxy, 30).await;
    assert!(all.iter().all(|backend| shares[backend.name()] == 10), "{shares:?}");
    done(&proxy, 30).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn where_enough_are_healthy_only_they_are_used() {
    let (proxy, _all) = one_of_three(33).await;
    ground(&proxy, "healthy").await;
    usable(&proxy, 1).await;
    assert_eq!(shares(&proxy, 10).await, only("well-1", 10));
    done(&proxy, 10).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
