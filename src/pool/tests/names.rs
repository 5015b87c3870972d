//! What a pool does with the answers of its names.

use super::*;

fn named(balance: Balance) -> crate::config::PoolConfig {
    let mut config = config(balance, 1);
    let name = BackendTarget::Host { name: "app.example.com".to_owned(), port: 80 };
    config.backends.push(crate::config::BackendConfig { target: name, weight: 50, ..target(0) });
    config
}

fn found(hosts: &[u8]) -> Vec<ResolvedAddress> {
    let resolved = |host: &u8| ResolvedAddress {
        address: ([10, 0, 9, *host], 80).into(),
        weight: None,
        is_backup: false,
    };
    hosts.iter().map(resolved).collect()
}

#[test]
fn resolved_name_adds_and_removes_backends() {
    let (labels, pool) = (Labels::default(), healthy(&named(Balance::LeastSessions)));
    assert_eq!((pool.names().count(), pool.usable()), (1, 1));
    let (fresh, changes) = pool.resolve(0, &found(&[1, 2]), &labels, at(1_000));
    assert_eq!((fresh.len(), changes.len()), (2, 2));
    assert_eq!((changes[0].state, changes[0].why), ("unknown", "resolved"));
    for backend in &fresh {
        pool.observe(backend, ProbeResult::Passed, SECOND, at(2_000));
    }
    pool.run_due(at(3_000));
    assert_eq!(pool.usable(), 3);
    assert!(pool.candidates().used().iter().any(|backend| backend.weight() == 50 * FULL));
    // The same answer changes nothing; another one keeps what it can.
    let (again, changes) = pool.resolve(0, &found(&[2, 1]), &labels, at(4_000));
    assert!(again.is_empty() && changes.is_empty());
    let held: Vec<_> = (0..8).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
    let (fresh, changes) = pool.resolve(0, &found(&[2, 3]), &labels, at(5_000));
    assert_eq!((fresh.len(), changes[0].state, changes[0].why), (1, "gone", "not_resolved"));
    assert!(held.iter().any(|picked| picked.is_removed()), "its sessions may finish");
    // A slot of a removed address is not reused at once.
    drop(held);
    pool.observe(&fresh[0], ProbeResult::Passed, SECOND, at(6_000));
    pool.run_due(at(7_000));
    let ports: std::collections::BTreeSet<_> =
        (0..60).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap().address()).collect();
    assert_eq!(ports.len(), 3, "{ports:?}");
    assert!(pool.resolve(9, &found(&[1]), &labels, at(8_000)).1.is_empty(), "there is no such name");
}

#[test]
fn resolved_weights_and_backups_are_applied_and_their_number_is_bounded() {
    let (labels, pool) = (Labels::default(), healthy(&named(Balance::P2c)));
    let mut answer = found(&[1]);
    let (fresh, _) = pool.resolve(0, &answer, &labels, at(1_000));
    pool.observe(&fresh[0], ProbeResult::Passed, SECOND, at(2_000));
    pool.run_due(at(3_000));
    answer[0].weight = Some(7);
    let (_, changes) = pool.resolve(0, &answer, &labels, at(4_000));
    assert_eq!((changes.len(), fresh[0].weight()), (1, 7 * FULL));
    answer[0].is_backup = true;
    pool.resolve(0, &answer, &labels, at(5_000));
    assert_eq!((fresh[0].weight(), pool.usable()), (0, 1));
    // For months, more addresses than there are slots.
    for turn in 0..10_u8 {
        let hosts: Vec<u8> = (0..80).map(|host| host + turn * 13).collect();
        let (_, changes) = pool.resolve(0, &found(&hosts), &labels, at(6_000));
        assert!(!changes.is_empty());
        assert_eq!(pool.candidates().backends().len(), 65);
    }
    let slots: std::collections::BTreeSet<_> =
        pool.candidates().backends().iter().map(|backend| backend.slot()).collect();
    assert_eq!(slots.len(), 65);
    // An address that stands in the list already is not there twice.
    let double = [ResolvedAddress { address: ([10, 0, 0, 1], 1000).into(), weight: None, is_backup: false }];
    pool.resolve(0, &double, &labels, at(7_000));
    assert_eq!(pool.candidates().backends().len(), 1);
}

#[test]
fn answers_of_many_names_rebuild_the_candidates_few_times_and_returning_address_keeps_sessions() {
    let (labels, mut config) = (Labels::default(), named(Balance::P2c));
    config.health = None;
    config.backends[1].max_sessions = Some(2);
    let pool = pool(&config);
    pool.resolve(0, &found(&[1]), &labels, at(1_000));
    let held: Vec<_> =
        std::iter::repeat_with(|| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).take(6).collect();
    let of_name = || held.iter().filter(|picked| picked.address().0.port() == 80).count();
    assert_eq!((of_name(), pool.usable()), (2, 2));
    pool.resolve(0, &found(&[]), &labels, at(1_050));
    assert_eq!(pool.usable(), 2, "the roster is 50 ms old");
    assert!((0..20).all(|roll| pick(&pool, pick::hash(&[roll])) == Ok(1000)), "but it gets no session");
    pool.resolve(0, &found(&[1]), &labels, at(1_060));
    pool.run_due(at(1_100));
    assert_eq!((pool.usable(), pool.candidates().backends()[1].load()), (2, 2));
    assert!((0..20).all(|roll| pick(&pool, pick::hash(&[roll])) == Ok(1000)), "it is full");
    drop(held);
    assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
}

#[test]
fn operator_weight_overrides_the_resolved_weight() {
    let (labels, pool) = (Labels::default(), healthy(&named(Balance::P2c)));
    let (fresh, _) = pool.resolve(0, &found(&[1]), &labels, at(1_000));
    pool.observe(&fresh[0], ProbeResult::Passed, SECOND, at(2_000));
    pool.run_due(at(3_000));
    assert_eq!(pool.usable(), 2);
    let address = fresh[0].address();
    let (before, change) = pool.override_weight(address, 0, at(4_000)).unwrap();
    assert_eq!((before, change.why, pool.usable(), fresh[0].weight()), (50, "ordered", 1, 0));
    let weighed = [ResolvedAddress { weight: Some(30), ..found(&[1])[0] }];
    pool.resolve(0, &weighed, &labels, at(5_000));
    pool.run_due(at(6_000));
    assert_eq!((pool.usable(), fresh[0].summary().weight), (1, 0));
    assert_eq!(pool.override_weight(address, 70, at(7_000)).unwrap().0, 0);
    assert_eq!((pool.usable(), fresh[0].weight()), (2, 70 * FULL));
    assert!(pool.override_weight(BackendAddr(([10, 0, 9, 9], 80).into()), 1, at(8_000)).is_none());
}
