//! What a pool does with what probes, sessions, names and time say.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::config::{Balance, EjectionConfig, ProbeCheck};
use crate::pool::health::FULL;

mod names;
mod replacement;

const SECOND: Duration = Duration::from_secs(1);

fn at(milliseconds: u64) -> Moment {
    Moment::default() + Duration::from_millis(milliseconds)
}

fn target(port: u16) -> crate::config::BackendConfig {
    let target = BackendTarget::Address(([10, 0, 0, 1], port).into());
    crate::config::BackendConfig { target, weight: 100, zone: None, max_sessions: None, backup: false }
}

/// So many backends, on ports from 1000 on, that are probed every second.
fn config(balance: Balance, count: u16) -> crate::config::PoolConfig {
    crate::config::PoolConfig {
        name: "shared".to_owned(),
        balance,
        backends: (0..count).map(|n| target(1000 + n)).collect(),
        prefer_zone: None,
        send_proxy: false,
        attempts: 3,
        retry_budget: 20,
        slow_start: Duration::ZERO,
        source_addresses: Vec::new(),
        queue: crate::config::QueueConfig { length: 0, timeout: SECOND },
        panic_threshold: 0,
        health: Some(ProbeConfig {
            interval: SECOND,
            timeout: SECOND,
            rise: 1,
            fall: 2,
            port: None,
            send_proxy: false,
            ask: ProbeCheck::Connect,
        }),
        ejection: EjectionConfig { consecutive_failures: 3, base_time: 30 * SECOND, max_percent: 50 },
    }
}

fn pool(config: &crate::config::PoolConfig) -> Pool {
    Pool::new(config, &Labels::default())
}

/// A pool whose backends all passed their first probe.
fn healthy(config: &crate::config::PoolConfig) -> Pool {
    let pool = pool(config);
    for place in 0..pool.candidates().backends().len() {
        assert!(probe(&pool, place, true, at(0)).is_some());
    }
    pool.run_due(at(100));
    pool
}

fn backend(pool: &Pool, place: usize) -> Arc<Backend> {
    Arc::clone(&pool.candidates().backends()[place])
}

fn probe(pool: &Pool, place: usize, success: bool, now: Moment) -> Option<BackendChange> {
    let verdict = if success { ProbeResult::Passed } else { ProbeResult::AnswerTimeout };
    pool.observe(&backend(pool, place), verdict, SECOND, now)
}

fn port(backend: &Backend) -> u16 {
    backend.address().0.port()
}

fn pick(pool: &Pool, roll: u64) -> Result<u16, PickError> {
    pool.pick(roll, roll, &mut TriedBackends::default()).map(|picked| port(&picked))
}

/// What a place in the line has been given, where it has.
fn given(place: &mut QueuePlace) -> Option<PickedBackend> {
    match Pin::new(place).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(picked) => Some(picked),
        Poll::Pending => None,
    }
}

/// How many of so many sessions, which end at once, each port has.
fn shares(pool: &Pool, sessions: u32) -> BTreeMap<u16, u32> {
    let mut shares = BTreeMap::new();
    for session in 0..sessions {
        let roll = pick::hash(&session.to_be_bytes());
        *shares.entry(pick(pool, roll).unwrap()).or_default() += 1;
    }
    shares
}

const ALL: [Balance; 5] =
    [Balance::RoundRobin, Balance::LeastSessions, Balance::P2c, Balance::Maglev, Balance::MaglevEndpoint];

#[test]
fn round_robin_takes_each_in_turn_and_another_attempt_takes_no_turn() {
    let pool = healthy(&config(Balance::RoundRobin, 2));
    for expected in [1000, 1001, 1000, 1001] {
        let mut tried = TriedBackends::default();
        assert_eq!(port(&pool.pick(0, 7, &mut tried).unwrap()), expected);
        assert_eq!(port(&pool.pick(0, 7, &mut tried).unwrap()), 2001 - expected);
    }
}

#[test]
fn p2c_and_least_sessions_take_the_less_loaded() {
    for balance in [Balance::P2c, Balance::LeastSessions] {
        let pool = healthy(&config(balance, 2));
        let busy = pool.pick(0, 0, &mut TriedBackends::default()).unwrap();
        for roll in [0, 1, u64::MAX, 0x1234_5678_9ABC_DEF0] {
            assert_eq!(pick(&pool, roll), Ok(2001 - port(&busy)), "{balance:?}");
        }
    }
}

#[test]
fn least_sessions_balances_held_sessions_by_weight() {
    let mut config = config(Balance::LeastSessions, 3);
    config.backends[2].weight = 200;
    let pool = healthy(&config);
    let held: Vec<_> = (0..40).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
    let loads: Vec<u32> = pool.candidates().backends().iter().map(|backend| backend.load()).collect();
    assert_eq!(loads, [10, 10, 20]);
    drop(held);
    assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
}

#[test]
fn maglev_sends_a_key_to_its_backend_and_to_the_same_second_one() {
    for balance in [Balance::Maglev, Balance::MaglevEndpoint] {
        let pool = healthy(&config(balance, 10));
        for key in 0..100 {
            let key = pick::hash(&[key]);
            let pair = |roll| {
                let mut tried = TriedBackends::default();
                let mut next = || port(&pool.pick(key, roll, &mut tried).unwrap());
                (next(), next())
            };
            let (first, second) = pair(1);
            assert_ne!(first, second);
            assert_eq!(pair(u64::MAX), (first, second));
        }
        let keys = [pool.key(|| 5, || 6), healthy(&config(Balance::P2c, 1)).key(|| 5, || 6)];
        assert_eq!(keys, [if balance == Balance::Maglev { 5 } else { 6 }, 0]);
    }
}

#[test]
fn each_backend_is_tried_once_until_none_is_left() {
    for balance in ALL {
        assert_eq!(pick(&pool(&config(balance, 0)), 7), Err(PickError::Usable));
        let pool = healthy(&config(balance, 3));
        let mut tried = TriedBackends::default();
        let mut ports: Vec<u16> =
            (0..3).map(|roll| port(&pool.pick(9, roll << 32 | roll, &mut tried).unwrap())).collect();
        ports.sort_unstable();
        assert_eq!(ports, [1000, 1001, 1002], "{balance:?}");
        assert_eq!((tried.len(), tried.is_empty()), (3, false));
        assert_eq!(pool.pick(9, 0, &mut tried).unwrap_err(), PickError::Usable);
    }
}

#[test]
fn shares_go_by_weight_in_every_algorithm() {
    for balance in ALL {
        let mut config = config(balance, 4);
        for (backend, weight) in config.backends.iter_mut().zip([100, 200, 0, 700]) {
            backend.weight = weight;
        }
        let pool = healthy(&config);
        let shares = shares(&pool, 20_000);
        for (port, share) in [(1000, 2_000_u32), (1001, 4_000), (1003, 14_000)] {
            assert!(shares[&port].abs_diff(share) < share / 20, "{balance:?}: {shares:?}");
        }
        assert_eq!(shares.len(), 3, "a weight of 0 gets nothing");
    }
}

#[test]
fn healthy_backends_are_used_else_unknown_ones_but_never_unhealthy_ones() {
    for balance in ALL {
        let pool = pool(&config(balance, 3));
        assert_eq!((pool.usable(), pool.candidates().tier().as_str()), (3, "unknown"));
        let change = probe(&pool, 1, true, at(1_000)).unwrap();
        assert_eq!((change.state, change.why, change.backend.name()), ("healthy", "passed", "10.0.0.1:1001"));
        assert_eq!((pick(&pool, 5), pool.usable()), (Ok(1001), 1));
        // The second of two failures counts.
        assert!(probe(&pool, 1, false, at(2_000)).is_none());
        assert_eq!(probe(&pool, 1, false, at(3_000)).unwrap().why, "answer_timeout");
        assert_eq!((pick(&pool, 5).is_ok_and(|port| port != 1001), pool.usable()), (true, 2));
        assert!(probe(&pool, 0, false, at(4_000)).is_some() && probe(&pool, 2, false, at(5_000)).is_some());
        assert_eq!((pool.usable(), pick(&pool, 5)), (0, Err(PickError::Usable)));
        assert_eq!(pool.candidates().tier().as_str(), "none");
    }
}

#[test]
fn without_probes_all_are_healthy() {
    let config = crate::config::PoolConfig { health: None, ..config(Balance::P2c, 2) };
    let pool = pool(&config);
    assert_eq!((pool.usable(), pool.candidates().tier().as_str()), (2, "healthy"));
}

#[test]
fn thousands_of_first_results_rebuild_the_candidates_few_times() {
    let pool = pool(&config(Balance::P2c, 3));
    assert!(probe(&pool, 0, true, at(50)).is_some());
    assert_eq!(pool.candidates().tier().as_str(), "unknown", "the roster is 50 ms old");
    assert!(pool.run_due(at(99)).is_empty());
    assert_eq!(pool.candidates().tier().as_str(), "unknown");
    pool.run_due(at(100));
    assert_eq!(pool.usable(), 1);
    assert!(probe(&pool, 1, true, at(200)).is_some());
    assert_eq!(pool.usable(), 2, "the roster was 100 ms old");
}

fn fail(pool: &Pool, place: usize, failed: SessionFailure, times: u32, now: Moment) -> Option<BackendChange> {
    (0..times).filter_map(|_| pool.failed(&backend(pool, place), failed, now)).last()
}

#[test]
fn third_consecutive_failure_ejects_at_once_and_the_backend_returns_slowly() {
    for balance in ALL {
        let pool = healthy(&config(balance, 4));
        assert!(fail(&pool, 0, SessionFailure::Connect, 2, at(500)).is_none());
        backend(&pool, 0).connected();
        assert!(fail(&pool, 0, SessionFailure::Connect, 2, at(600)).is_none());
        let change = fail(&pool, 0, SessionFailure::Connect, 1, at(700)).unwrap();
        assert_eq!(
            (change.state, change.why, change.out_for),
            ("ejected", "connect_failures", Some(30 * SECOND))
        );
        // It gets no session, though the candidates are unchanged.
        let without = (0..200).all(|roll| pick(&pool, pick::hash(&[roll])) != Ok(1000));
        assert!(without && pool.usable() == 4, "{balance:?}");
        pool.run_due(at(800));
        assert_eq!(pool.usable(), 3);
        // A probe's success does not bring it back.
        assert!(probe(&pool, 0, true, at(900)).is_none());
        assert!(pool.run_due(at(30_699)).is_empty() && pool.usable() == 3);
        let over = pool.run_due(at(30_700));
        assert_eq!((over[0].state, over[0].why, over.len()), ("healthy", "ejection_over", 1));
        assert_eq!((pool.usable(), backend(&pool, 0).weight()), (4, 100), "1 of 64 parts");
        pool.run_due(at(35_700));
        assert_eq!(backend(&pool, 0).weight(), 100 * FULL / 2, "half of ten seconds");
        pool.run_due(at(40_700));
        assert_eq!((backend(&pool, 0).weight(), backend(&pool, 0).ejections()), (100 * FULL, 1));
        // Again within its base time, twice as long.
        let again = fail(&pool, 0, SessionFailure::Connect, 3, at(45_000)).unwrap();
        assert_eq!(again.out_for, Some(60 * SECOND));
    }
}

#[test]
fn no_more_than_half_is_ejected_and_the_rest_stays() {
    let pool = healthy(&config(Balance::P2c, 4));
    for place in 0..4 {
        let change = fail(&pool, place, SessionFailure::Connect, 10, at(500));
        assert_eq!(change.is_some(), place < 2);
    }
    pool.run_due(at(600));
    assert_eq!((pool.usable(), pool.candidates().tier().as_str()), (2, "healthy"));
    let off = config(Balance::P2c, 4);
    let off = crate::config::PoolConfig {
        ejection: EjectionConfig { consecutive_failures: 0, ..off.ejection },
        ..off
    };
    assert!(fail(&healthy(&off), 0, SessionFailure::Connect, 100, at(500)).is_none());
}

#[test]
fn resets_of_one_tenant_eject_no_shared_backend() {
    let of = |tenant| SessionFailure::Reset { tenant };
    let alone = healthy(&config(Balance::P2c, 2));
    (0..5).for_each(|_| alone.count_session(7));
    assert_eq!(fail(&alone, 0, of(7), 3, at(500)).unwrap().why, "resets");
    let shared = healthy(&config(Balance::P2c, 2));
    shared.count_session(7);
    shared.count_session(8);
    assert!(fail(&shared, 0, of(7), 50, at(500)).is_none());
    assert_eq!(backend(&shared, 0).early_resets(), 50);
    assert!(fail(&shared, 0, of(8), 50, at(500)).is_none(), "each of them once");
    assert!(fail(&shared, 0, of(7), 1, at(500)).is_some(), "in turns: it is the backend");
}

#[test]
fn ejected_backend_is_used_when_all_others_fail() {
    let pool = healthy(&config(Balance::RoundRobin, 2));
    fail(&pool, 0, SessionFailure::Connect, 3, at(500));
    pool.run_due(at(600));
    let mut tried = TriedBackends::default();
    assert_eq!(port(&pool.pick(0, 0, &mut tried).unwrap()), 1001);
    assert_eq!(port(&pool.pick(0, 0, &mut tried).unwrap()), 1000);
    // Sessions leave it, but where the other one is unhealthy, it is used by all.
    probe(&pool, 1, false, at(1_000));
    probe(&pool, 1, false, at(2_000));
    assert_eq!((pool.candidates().tier().as_str(), pick(&pool, 0)), ("ejected", Ok(1000)));
}

#[test]
fn recovered_backend_starts_slowly_and_a_new_one_does_not() {
    let config = crate::config::PoolConfig { slow_start: 64 * SECOND, ..config(Balance::P2c, 2) };
    let pool = healthy(&config);
    assert_eq!(backend(&pool, 0).weight(), 100 * FULL);
    probe(&pool, 0, false, at(1_000));
    probe(&pool, 0, false, at(2_000));
    assert!(probe(&pool, 0, true, at(10_000)).is_some());
    for (milliseconds, parts) in [(10_000, 1), (42_000, 32), (73_000, 63), (74_000, FULL)] {
        pool.run_due(at(milliseconds));
        assert_eq!(backend(&pool, 0).weight(), 100 * parts, "at {milliseconds} ms");
    }
}

#[test]
fn slow_start_also_bounds_concurrent_sessions_except_for_the_first() {
    let mut config = crate::config::PoolConfig { slow_start: 64 * SECOND, ..config(Balance::P2c, 2) };
    config.backends.iter_mut().for_each(|backend| backend.max_sessions = Some(32));
    let pool = healthy(&config);
    let falls = |place| (1..3).for_each(|second| drop(probe(&pool, place, false, at(second * 1_000))));
    falls(0);
    probe(&pool, 0, true, at(10_000));
    pool.run_due(at(26_000));
    let held: Vec<_> = std::iter::from_fn(|| pool.pick(0, 0, &mut TriedBackends::default()).ok()).collect();
    let loads = |place| backend(&pool, place).load();
    assert_eq!((loads(0), loads(1)), (8, 32), "a quarter of 32, and all");
    drop(held);
    // Where all come back, there is room for all at once.
    falls(0);
    falls(1);
    probe(&pool, 0, true, at(30_000));
    pool.run_due(at(31_000));
    let held: Vec<_> = std::iter::from_fn(|| pool.pick(0, 0, &mut TriedBackends::default()).ok()).collect();
    assert_eq!((held.len(), pool.usable()), (32, 1));
}

#[test]
fn ejection_rejects_no_session_before_the_candidates_are_rebuilt() {
    let mut config = config(Balance::P2c, 2);
    config.backends[1].backup = true;
    let pool = healthy(&config);
    assert_eq!(pick(&pool, 0), Ok(1000));
    assert!(fail(&pool, 0, SessionFailure::Connect, 3, at(500)).is_some());
    assert_eq!(pick(&pool, 0), Ok(1001), "the healthy backup, and not who was put out");
    pool.run_due(at(600));
    assert_eq!((pick(&pool, 0), pool.candidates().tier().as_str()), (Ok(1001), "backup"));
}

#[test]
fn full_zone_spills_to_other_zones() {
    let mut config =
        crate::config::PoolConfig { prefer_zone: Some("a".to_owned()), ..config(Balance::P2c, 3) };
    for (backend, zone) in config.backends.iter_mut().zip(["a", "b", "b"]) {
        (backend.zone, backend.max_sessions) = (Some(zone.to_owned()), Some(1));
    }
    config.queue.length = 1;
    let pool = healthy(&config);
    let mut held: Vec<_> = (0..3).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
    assert_eq!(port(&held[0]), 1000);
    assert_eq!(pick(&pool, 0), Err(PickError::Free));
    let mut place = pool.join_queue(1).unwrap();
    held.truncate(2);
    assert!(given(&mut place).is_some_and(|picked| port(&picked) != 1000));
}

#[test]
fn queued_session_gets_the_preferred_zone_first_and_no_unhealthy_backend() {
    let mut config =
        crate::config::PoolConfig { prefer_zone: Some("a".to_owned()), ..config(Balance::P2c, 2) };
    for (backend, zone) in config.backends.iter_mut().zip(["b", "a"]) {
        (backend.zone, backend.max_sessions) = (Some(zone.to_owned()), Some(1));
    }
    config.queue.length = 2;
    let pool = healthy(&config);
    let wait = || {
        let mut place = pool.join_queue(1).unwrap();
        given(&mut place).ok_or(place)
    };
    let near = wait().ok().unwrap();
    assert_eq!(port(&near), 1001, "of its zone, though the other comes first in the list");
    assert_eq!(port(&wait().ok().unwrap()), 1000, "the other, as its zone is full");
    (1..4).for_each(|turn| drop(probe(&pool, 0, false, at(turn))));
    assert_eq!(
        pool.candidates().backends()[0].state(),
        HealthState::Unhealthy,
        "and the roster does not know it yet"
    );
    let _waiting = wait().expect_err("an unhealthy backend takes no sessions of others");
    assert_eq!(pick(&pool, 0), Err(PickError::Free));
    drop(near);
    assert_eq!(pool.waiting(), 0);
}

#[test]
fn session_does_not_queue_where_no_backend_is_in_use() {
    let mut config = config(Balance::P2c, 1);
    config.queue.length = 5;
    config.backends[0].max_sessions = Some(1);
    let pool = healthy(&config);
    let _held = pool.pick(0, 0, &mut TriedBackends::default()).unwrap();
    let _place = pool.join_queue(1).unwrap();
    assert_eq!(pick(&pool, 0), Err(PickError::Free));
    (1..3).for_each(|second| drop(probe(&pool, 0, false, at(second * 1_000))));
    assert_eq!(pick(&pool, 0), Err(PickError::Usable));
}

#[test]
fn in_panic_tier_all_backends_are_used() {
    let config = crate::config::PoolConfig { panic_threshold: 50, ..config(Balance::P2c, 3) };
    let pool = healthy(&config);
    for (place, tier) in [(0, "healthy"), (1, "panic")] {
        probe(&pool, place, false, at(1_000));
        probe(&pool, place, false, at(2_000));
        pool.run_due(at(3_000));
        assert_eq!(pool.candidates().tier().as_str(), tier);
    }
    assert_eq!((pool.usable(), shares(&pool, 900).len()), (3, 3));
}

#[test]
fn queued_sessions_are_served_in_order() {
    let mut config = config(Balance::P2c, 2);
    config.queue.length = 2;
    config.backends.iter_mut().for_each(|backend| backend.max_sessions = Some(1));
    let pool = healthy(&config);
    let mut held: Vec<_> = (0..2).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
    assert_eq!(pick(&pool, 0), Err(PickError::Free));
    let mut places = [pool.join_queue(1).unwrap(), pool.join_queue(1).unwrap()];
    assert!(pool.join_queue(1).is_none() && pool.waiting() == 2);
    held.pop();
    assert_eq!(pick(&pool, 0), Err(PickError::Free), "the one with room is the first waiter's");
    let mut is_served = |place: usize| given(&mut places[place]).is_some();
    assert!(!is_served(1) && is_served(0), "in turn");
    assert!(is_served(1) && pool.waiting() == 0, "the first one's session is over already");
    assert!(pick(&pool, 0).is_ok());
    assert!(healthy(&self::config(Balance::P2c, 1)).join_queue(1).is_none(), "there is no queue");
}

#[test]
fn retries_are_a_part_of_the_sessions_once_the_first_hundred_are_used_up() {
    let pool = healthy(&config(Balance::P2c, 2));
    assert!((0..100).all(|_| pool.may_retry(at(0))));
    assert!(!pool.may_retry(at(0)));
    (0..10).for_each(|_| pool.count_session(1));
    assert_eq!((0..10).filter(|_| pool.may_retry(at(0))).count(), 2);
    assert_eq!(pool.retries(), (102, 9));
}

#[test]
fn zones_are_preferred_and_spill_only_what_is_missing() {
    let mut config =
        crate::config::PoolConfig { prefer_zone: Some("a".to_owned()), ..config(Balance::P2c, 4) };
    for (backend, zone) in config.backends.iter_mut().zip(["a", "a", "b", "b"]) {
        backend.zone = Some(zone.to_owned());
    }
    let pool = healthy(&config);
    assert_eq!(shares(&pool, 1_000).keys().copied().collect::<Vec<_>>(), [1000, 1001]);
    probe(&pool, 0, false, at(1_000));
    probe(&pool, 0, false, at(2_000));
    let shares = shares(&pool, 10_000);
    assert!(shares[&1001].abs_diff(5_000) < 300 && shares[&1002].abs_diff(2_500) < 300, "{shares:?}");
    assert_eq!(backend(&pool, 3).zone(), Some("b"));
}
