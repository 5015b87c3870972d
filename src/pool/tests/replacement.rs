//! What a pool goes on with that takes another one's place in a reload.

use super::*;

fn succeed(before: &Arc<Pool>, config: &crate::config::PoolConfig, now: Moment) -> Arc<Pool> {
    Pool::replace(Some(before), config, &Labels::default(), &Answers::new(), now)
}

fn ports(pool: &Pool) -> Vec<u16> {
    pool.candidates().used().iter().map(|backend| backend.address().0.port()).collect()
}

fn one(pool: &Arc<Pool>) -> PickedBackend {
    pool.pick(0, 0, &mut TriedBackends::default()).unwrap()
}

#[test]
fn reload_keeps_health_and_ejections_and_a_new_backend_waits_for_its_probe() {
    let before = Arc::new(healthy(&config(Balance::P2c, 3)));
    assert!(probe(&before, 1, false, at(500)).is_none(), "one of two");
    assert!(fail(&before, 0, SessionFailure::Connect, 3, at(600)).is_some());
    before.count_session(7);
    assert!(before.may_retry(at(600)));
    let mut other = config(Balance::P2c, 4);
    other.backends.remove(2);
    other.backends[1].weight = 50;
    let after = succeed(&before, &other, at(1_000));
    assert_eq!((ports(&after), after.retries()), (vec![1001], (1, 0)));
    let candidates = after.candidates();
    let shown: Vec<_> = candidates
        .backends()
        .iter()
        .map(|backend| (backend.is_ejected(), backend.state(), backend.summary().changed.1.as_str()))
        .collect();
    let expected = [
        (true, HealthState::Healthy, "connect_failures"),
        (false, HealthState::Healthy, "passed"),
        (false, HealthState::Unknown, "reload"),
    ];
    assert_eq!(shown, expected);
    assert_eq!((backend(&after, 0).ejections(), backend(&after, 1).weight()), (1, 50 * FULL));
    assert_eq!(backend(&after, 1).probes().map(|(_, count)| count).sum::<u64>(), 2);
    // The second failure of two is the second here too.
    assert!(probe(&after, 1, false, at(1_500)).is_some());
    let over = after.run_due(at(31_000));
    assert_eq!((over[0].why, over.len()), ("ejection_over", 1));
    assert!(before.is_replaced() && Arc::ptr_eq(&before.latest(), &after));
}

#[test]
fn sessions_of_the_old_pool_reach_the_new_one() {
    let before = Arc::new(healthy(&config(Balance::LeastSessions, 2)));
    let held = [one(&before), one(&before), one(&before)];
    let mut other = config(Balance::LeastSessions, 2);
    other.attempts = 1;
    let middle = succeed(&before, &other, at(1_000));
    let after = succeed(&middle, &config(Balance::LeastSessions, 2), at(2_000));
    drop(middle);
    let loads = || after.candidates().backends().iter().map(|backend| backend.load()).collect::<Vec<_>>();
    assert_eq!(loads().iter().sum::<u32>(), 3);
    // The backend with fewer sessions is picked first, whichever pool counted them.
    let (full, other) = if loads()[0] == 2 { (1000, 1001) } else { (1001, 1000) };
    assert_eq!(port(&one(&after)), other);
    let more: Vec<_> = (0..4).map(|_| one(&before)).collect();
    assert_eq!(loads().iter().sum::<u32>(), 7);
    drop((held, more));
    assert_eq!((loads(), full != other), (vec![0, 0], true));
    // Failures of old sessions eject in the new one, and so do results of probes that were under way.
    let old = Arc::clone(&before.candidates().backends()[0]);
    assert!((0..3).filter_map(|_| before.failed(&old, SessionFailure::Connect, at(3_000))).count() == 1);
    after.run_due(at(3_100));
    assert_eq!(ports(&after), [1001]);
    assert!(before.observe(&old, ProbeResult::ConnectRefused, SECOND, at(3_200)).is_none());
    assert!(before.observe(&old, ProbeResult::ConnectRefused, SECOND, at(3_300)).is_some());
    assert_eq!(backend(&after, 0).state(), HealthState::Unhealthy);
    let (pool, replacement) = before.follow(&old).unwrap();
    assert!(Arc::ptr_eq(&pool, &after) && Arc::ptr_eq(&replacement, &after.candidates().backends()[0]));
    assert_eq!(replacement.identity(), old.identity());
}

#[test]
fn fully_replaced_backends_count_as_healthy_until_their_first_probe() {
    let before = Arc::new(healthy(&config(Balance::P2c, 2)));
    let mut other = config(Balance::P2c, 2);
    other.backends = vec![target(2000), target(2001)];
    let after = succeed(&before, &other, at(1_000));
    assert_eq!((after.candidates().tier().as_str(), ports(&after)), ("healthy", vec![2000, 2001]));
    assert!(probe(&after, 0, false, at(1_500)).is_some(), "the first result counts at once");
    assert_eq!(ports(&after), [2001]);
    let new = Pool::replace(None, &other, &Labels::default(), &Answers::new(), at(2_000));
    assert_eq!((new.candidates().tier().as_str(), new.usable()), ("healthy", 2));
}

#[test]
fn switching_probes_off_or_on_leaves_no_backend_down_or_unknown() {
    let before = Arc::new(healthy(&config(Balance::P2c, 2)));
    (1..3).for_each(|second| drop(probe(&before, 0, false, at(second * 1_000))));
    assert_eq!(ports(&before), [1001]);
    let off =
        succeed(&before, &crate::config::PoolConfig { health: None, ..config(Balance::P2c, 2) }, at(3_000));
    assert_eq!(ports(&off), [1000, 1001]);
    let on = succeed(&off, &config(Balance::P2c, 2), at(4_000));
    assert_eq!((ports(&on), on.candidates().tier().as_str()), (vec![1000, 1001], "healthy"));
    assert!(probe(&on, 0, false, at(5_000)).is_some());
}

#[test]
fn queue_of_a_replaced_pool_is_served_by_the_new_pool_and_no_removed_backend() {
    let mut config = config(Balance::P2c, 1);
    config.queue.length = 3;
    config.backends[0].max_sessions = Some(1);
    let before = Arc::new(healthy(&config));
    let held = one(&before);
    let mut place = before.join_queue(1).unwrap();
    let mut other = config.clone();
    other.backends = vec![crate::config::BackendConfig { max_sessions: Some(1), ..target(2000) }];
    // It is served at once, as the new one has room.
    let after = succeed(&before, &other, at(1_000));
    let picked = given(&mut place).expect("no backend serves it");
    assert_eq!((port(&picked), after.waiting(), before.waiting()), (2000, 0, 0));
    let (mut first, mut second) = (before.join_queue(1).unwrap(), after.join_queue(1).unwrap());
    drop(held);
    assert!(given(&mut first).is_none() && given(&mut second).is_none(), "the old pool gets no session");
    drop(picked);
    let picked = given(&mut first).expect("no backend serves it");
    // A line that is given up is served to its end.
    let none = crate::config::PoolConfig {
        queue: crate::config::QueueConfig { length: 0, timeout: SECOND },
        ..other
    };
    let last = succeed(&after, &none, at(2_000));
    assert!(last.join_queue(1).is_none() && last.waiting() == 1);
    drop(picked);
    assert!(given(&mut second).is_some());
    assert!(last.candidates().backends().iter().all(|backend| backend.load() == 0));
}

#[test]
fn returning_address_keeps_its_session_count() {
    let both = config(Balance::LeastSessions, 2);
    let mut single = both.clone();
    single.backends.remove(1);
    let first = Arc::new(healthy(&both));
    let held: Vec<_> = (0..4).map(|_| one(&first)).collect();
    let second = succeed(&first, &single, at(1_000));
    let third = succeed(&second, &both, at(2_000));
    let loads: Vec<_> = third.candidates().backends().iter().map(|backend| backend.load()).collect();
    assert_eq!(loads, [2, 2]);
    assert_eq!(backend(&third, 1).state(), HealthState::Unknown);
    assert!(
        first.follow(&first.candidates().backends()[1]).is_some_and(|(pool, _)| Arc::ptr_eq(&pool, &third))
    );
    assert!(second.follow(&second.candidates().backends()[0]).is_some());
    drop(held);
    assert!(third.candidates().backends().iter().all(|backend| backend.load() == 0));
}

#[test]
fn reload_keeps_resolved_names_and_takes_answers_for_new_ones() {
    let host = |name: &str| BackendTarget::Host { name: name.to_owned(), port: 80 };
    let named = |names: &[&str]| {
        let backends =
            names.iter().map(|name| crate::config::BackendConfig { target: host(name), ..target(0) });
        crate::config::PoolConfig { backends: backends.collect(), ..config(Balance::P2c, 0) }
    };
    let found = |hosts: &[u8]| -> Vec<ResolvedAddress> {
        let resolved = |host: &u8| ResolvedAddress {
            address: ([10, 0, 9, *host], 80).into(),
            weight: Some(u32::from(*host)),
            is_backup: false,
        };
        hosts.iter().map(resolved).collect()
    };
    let labels = Labels::default();
    let answers = Answers::from([(host("a"), found(&[1, 2])), (host("b"), found(&[2, 3]))]);
    let first = Pool::replace(None, &named(&["a"]), &labels, &answers, at(0));
    assert_eq!((first.usable(), first.candidates().tier().as_str()), (2, "healthy"));
    first.lookups().next().unwrap().count(crate::account::dns_counters::LookupResult::Found);
    let second = Pool::replace(Some(&first), &named(&["b", "a"]), &labels, &answers, at(1_000));
    let hosts = |pool: &Pool| {
        let candidates = pool.candidates();
        let shown = candidates.backends().iter().map(|backend| {
            (
                backend.address().0.to_string(),
                backend.summary().weight,
                backend.state() == HealthState::Healthy,
            )
        });
        shown.collect::<Vec<_>>()
    };
    let expected = [("10.0.9.2:80", 2, true), ("10.0.9.3:80", 3, false), ("10.0.9.1:80", 1, true)];
    let expected = expected.map(|(address, weight, healthy)| (address.to_owned(), weight, healthy));
    assert_eq!(hosts(&second), expected);
    let counts: Vec<u64> =
        second.lookups().map(|lookups| lookups.counts().map(|(_, count)| count).sum()).collect();
    assert_eq!(counts, [0, 1]);
    // An answer that was asked for the old one is the new one's.
    let (fresh, _) = first.resolve(0, &found(&[4]), &labels, at(2_000));
    assert_eq!((fresh.len(), second.candidates().backends().len()), (1, 3));
    assert!(first.candidates().backends().iter().all(|backend| backend.is_retired()));
}

#[test]
fn thousand_replacements_leave_no_chain() {
    let configs = [config(Balance::RoundRobin, 2), config(Balance::P2c, 2)];
    let mut pool = Arc::new(healthy(&configs[0]));
    let first = Arc::downgrade(&pool);
    let session = one(&pool);
    for generation in 0..1_000_u64 {
        let config = &configs[usize::from(generation % 2 == 0)];
        pool = succeed(&pool, config, at(generation));
    }
    assert!(first.upgrade().is_none(), "a session keeps its backend, and not the pool");
    assert_eq!(pool.candidates().backends().iter().map(|backend| backend.load()).sum::<u32>(), 1);
    drop(session);
    assert_eq!(pool.candidates().backends().iter().map(|backend| backend.load()).sum::<u32>(), 0);
}

/// Those of the line that have had their turn.
fn served(places: &mut Vec<QueuePlace>) -> Vec<PickedBackend> {
    let mut all = Vec::new();
    places.retain_mut(|place| given(place).map(|picked| all.push(picked)).is_none());
    all
}

#[test]
fn after_any_reload_loads_match_and_no_session_waits_beside_free_room() {
    let mut random = fastrand::Rng::with_seed(7);
    for balance in ALL {
        let mut config = crate::config::PoolConfig { health: None, ..config(balance, 6) };
        config.queue.length = 4;
        let first = Arc::new(pool(&config));
        let mut pools = [Arc::clone(&first), first];
        let (mut held, mut places) = (Vec::<PickedBackend>::new(), Vec::new());
        for step in 0..600 {
            let from = &pools[usize::from(random.bool())];
            match random.u8(..12) {
                0 => {
                    let mut next = config.clone();
                    next.backends.retain(|_| random.u8(..4) > 0);
                    next.backends.push(target(2_000 + random.u16(..2)));
                    let most = random.u32(0..5);
                    next.backends.iter_mut().for_each(|own| own.max_sessions = (most > 0).then_some(most));
                    next.queue.length = random.usize(..6);
                    let [_, last] = pools;
                    pools = [Arc::clone(&last), succeed(&last, &next, at(step))];
                }
                1..=5 => match from.pick(random.u64(..), random.u64(..), &mut TriedBackends::default()) {
                    Ok(picked) => held.push(picked),
                    Err(PickError::Free) => places.extend(from.join_queue(random.u32(..2))),
                    Err(PickError::Usable | PickError::Share) => {}
                },
                6 if !places.is_empty() => drop(places.swap_remove(random.usize(..places.len()))),
                _ if !held.is_empty() => drop(held.swap_remove(random.usize(..held.len()))),
                _ => {}
            }
            held.extend(served(&mut places));
            let (now, candidates) = (&pools[1], pools[1].candidates());
            for backend in candidates.backends() {
                let own = held.iter().filter(|picked| picked.address() == backend.address()).count();
                assert_eq!(backend.load() as usize, own, "{balance:?}, step {step}, {backend:?}");
            }
            let is_full = || candidates.used().iter().all(|backend| !backend.has_room());
            assert!(now.waiting() == places.len() && (places.is_empty() || is_full()), "step {step}");
        }
        drop((held, places));
        assert!(pools[1].candidates().backends().iter().all(|backend| backend.load() == 0));
    }
}

#[test]
fn sessions_from_before_a_limit_count_for_their_tenant_and_those_of_other_backends_take_no_room() {
    let pick = |pool: &Pool, tenant: u32| pool.pick_for(tenant, 0, 0, &mut TriedBackends::default());
    let mut limited = config(Balance::RoundRobin, 1);
    let before = Arc::new(healthy(&limited));
    before.set_shared(true);
    let mut held: Vec<_> = (0..8).map(|_| pick(&before, 1).unwrap()).collect();
    limited.backends[0].max_sessions = Some(10);
    let after = succeed(&before, &limited, at(1_000));
    assert_eq!(after.held(1), 8);
    for pool in [&before, &after] {
        assert_eq!(pick(pool, 1).unwrap_err(), PickError::Share);
        assert!(pick(pool, 2).is_ok());
    }
    held.truncate(6);
    held.push(pick(&after, 1).unwrap());
    // The room of a backend that is new is free, whatever the one before it has still.
    let mut moved = config(Balance::RoundRobin, 2);
    moved.backends.remove(0);
    moved.backends[0].max_sessions = Some(10);
    let last = succeed(&after, &moved, at(2_000));
    assert!(pick(&last, 1).is_ok() && last.held(1) == 7);
    drop(held);
    assert_eq!(last.held(1), 0);
}
