//! The parts of a pool against plain logic: health, ejection, the line of those who wait, retries, and the simple picks.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll};

use vestibule::account::ProbeResult;
use vestibule::clock::Moment;
use vestibule::config::{
    BackendConfig, BackendTarget, Balance, EjectionConfig, ProbeCheck, ProbeConfig, QueueConfig,
};
use vestibule::fair_share::ShareReserve;
use vestibule::pool::ejection;
use vestibule::pool::health::{FULL, HealthRules, HealthState, ProbeHealth, ramp};
use vestibule::pool::pick::{self, WeightTable};
use vestibule::pool::queue::QueuePlace;
use vestibule::pool::retry::RetryBudget;
use vestibule::pool::{PickError, PickedBackend, Pool, TriedBackends};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

pub(super) fn at(milliseconds: u64) -> Moment {
    Moment::from_nanos(milliseconds * 1_000_000)
}

/// A pool of backends on ports from 1000 on, of these weights.
pub(super) fn config(balance: Balance, weights: &[u32]) -> config::PoolConfig {
    let backend = |(port, weight): (u16, &u32)| BackendConfig {
        target: BackendTarget::Address(([10, 0, 0, 1], port).into()),
        weight: *weight,
        zone: None,
        max_sessions: None,
        backup: false,
    };
    config::PoolConfig {
        name: "shared".to_owned(),
        balance,
        backends: (1000..).zip(weights).map(backend).collect(),
        prefer_zone: None,
        send_proxy: false,
        attempts: 3,
        retry_budget: 20,
        slow_start: Duration::ZERO,
        source_addresses: Vec::new(),
        queue: QueueConfig { length: 0, timeout: SECOND },
        panic_threshold: 0,
        health: None,
        ejection: EjectionConfig { consecutive_failures: 0, base_time: SECOND, max_percent: 0 },
    }
}

/// A probe that changes what is believed after so many results.
pub(super) fn probe(rise: u32, fall: u32) -> ProbeConfig {
    ProbeConfig {
        interval: SECOND,
        timeout: SECOND,
        rise,
        fall,
        port: None,
        send_proxy: false,
        ask: ProbeCheck::Connect,
    }
}

pub(super) fn verdict(success: bool) -> ProbeResult {
    if success { ProbeResult::Passed } else { ProbeResult::ConnectRefused }
}

/// The place of a backend in the configuration.
pub(super) fn place(backend: &vestibule::pool::backend::Backend) -> usize {
    usize::from(backend.address().0.port() - 1000)
}

/// What a place in the line has been given, where it has.
pub(super) fn given(place: &mut QueuePlace) -> Option<PickedBackend> {
    match Pin::new(place).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(picked) => Some(picked),
        Poll::Pending => None,
    }
}

// Health.

/// What to believe after these results: the first decides, then so many equal ones at the end.
pub(super) fn believed(rules: HealthRules, start: HealthState, results: &[bool]) -> HealthState {
    let mut state = start;
    for seen in 1..=results.len() {
        let seen = &results[..seen];
        let ends_with = |result: bool, count: u32| {
            let tail = seen.iter().rev().take(count as usize).filter(|one| **one == result).count();
            tail == count as usize
        };
        state = match state {
            HealthState::Unknown if seen[0] => HealthState::Healthy,
            HealthState::Unknown => HealthState::Unhealthy,
            HealthState::Healthy if ends_with(false, rules.fall) => HealthState::Unhealthy,
            HealthState::Unhealthy if ends_with(true, rules.rise) => HealthState::Healthy,
            same @ (HealthState::Healthy | HealthState::Unhealthy) => same,
        };
    }
    state
}

proptest! {
    #[test]
    fn health_follows_the_last_results(
        rise in 1..6_u32,
        fall in 1..6_u32,
        start in prop::sample::select(vec![HealthState::Unknown, HealthState::Healthy, HealthState::Unhealthy]),
        results in prop::collection::vec(prop_oneof![3 => Just(true), 2 => Just(false)], 0..60),
    ) {
        let rules = HealthRules { rise, fall };
        let mut health = ProbeHealth::new(rules, start);
        for seen in 0..results.len() {
            let before = believed(rules, start, &results[..seen]);
            let after = believed(rules, start, &results[..=seen]);
            prop_assert_eq!(health.observe(results[seen]), (before != after).then_some(after));
            prop_assert_eq!(health.state(), after);
        }
    }

    #[test]
    fn slow_start_never_shrinks_and_ends_at_full_weight(
        span in 1..100_000_u64,
        since in 0..100_000_u64,
        mut times in prop::collection::vec(0..150_000_u64, 1..30),
    ) {
        times.sort_unstable();
        let mut before = 1;
        for passed in times {
            let now = at(since + passed);
            let (parts, next) = ramp(at(since), Duration::from_millis(span), now);
            prop_assert!((before..=FULL).contains(&parts));
            prop_assert_eq!(parts == FULL && next.is_none(), passed >= span);
            let due = passed.min(span) * u64::from(FULL);
            // In a line, and rounded down, but never nothing.
            prop_assert!(u64::from(parts) * span <= due.max(span) && u64::from(parts + 1) * span > due);
            prop_assert!(next.is_none_or(|next| next > now && next <= at(since + span)));
            before = parts;
        }
    }
}

// Ejection.

proptest! {
    #[test]
    fn times_out_double_up_to_ten_minutes_and_are_forgotten_one_for_each_base_time(
        base in prop_oneof![1..60_u64, Just(700)],
        turns in prop::collection::vec((0..400_u64, 0..700_u64), 1..30),
    ) {
        let rules = ejection::EjectionRules { consecutive_failures: 1, base: Duration::from_secs(base), max_percent: 50 };
        let mut ejection = ejection::EjectionState::default();
        // Seconds; how many ejections count; since when it is in.
        let (mut now, mut counted, mut since) = (0_u64, 0_u32, 0);
        for (good, early) in turns {
            now += good;
            for _ in 0..(now - since) / base {
                counted = counted.saturating_sub(1);
            }
            counted += 1;
            let mut time = base;
            for _ in 1..counted {
                time = (time * 2).min(600.max(base));
            }
            prop_assert_eq!(ejection.eject(rules, at(now * 1_000)), Duration::from_secs(time));
            prop_assert_eq!(ejection.until(), Some(at((now + time) * 1_000)));
            let early = early.min(time - 1);
            prop_assert!(!ejection.expire(at((now + early) * 1_000 + 999)) && ejection.is_out());
            now += time;
            prop_assert!(ejection.expire(at(now * 1_000)) && !ejection.is_out());
            prop_assert!(!ejection.expire(at(now * 1_000)), "once");
            since = now;
        }
    }

    #[test]
    fn some_may_be_out_but_never_more_than_the_percent_and_never_all(backends in 0..300_usize, percent in 0..=100_u32) {
        let rules = ejection::EjectionRules { consecutive_failures: 1, base: SECOND, max_percent: percent };
        let allowed = |out: &usize| {
            let share = out * 100 <= backends * percent as usize;
            *out == 0 || *out < backends && (share || *out == 1 && percent > 0)
        };
        prop_assert_eq!(rules.most(backends), (0..=backends).filter(allowed).max().unwrap());
    }
}

// Retries.

#[derive(Clone, Debug)]
enum Spend {
    Sessions(u32),
    Retries(u32),
    Pass(u64),
}

fn spend() -> impl Strategy<Value = Spend> {
    prop_oneof![
        3 => (0..3_000_u32).prop_map(Spend::Sessions),
        3 => (1..300_u32).prop_map(Spend::Retries),
        2 => prop_oneof![0..300_u64, 0..100_000_u64].prop_map(Spend::Pass),
    ]
}

proptest! {
    #[test]
    fn retries_are_never_more_than_a_part_of_the_sessions_and_a_trickle_and_savings(
        percent in 0..=100_u32,
        spends in prop::collection::vec(spend(), 0..60),
    ) {
        let budget = RetryBudget::new(percent);
        let (mut now, mut retries, mut sessions) = (0, 0_u64, 0_u64);
        // The same since each moment: there never is more saved than 1,000 and what one session brings.
        let mut windows = vec![(0, 0, 0, 100)];
        for spend in spends {
            match spend {
                Spend::Sessions(count) => {
                    (0..count).for_each(|_| budget.deposit());
                    sessions += u64::from(count);
                }
                Spend::Pass(milliseconds) => now += milliseconds,
                Spend::Retries(count) => {
                    let paid = (0..count).filter(|_| budget.withdraw(at(now))).count() as u64;
                    prop_assert!(percent > 0 || paid == 0);
                    // Ten a second come in without sessions, so a pool that waits a while can always retry.
                    let waited = windows.last().is_some_and(|(then, ..)| now - then >= 200);
                    prop_assert!(percent == 0 || !waited || paid > 0);
                    retries += paid;
                }
            }
            for (then, retried, arrived, saved) in &windows {
                let trickle = (now - then) / 100 + 1;
                let part = (sessions - arrived) * u64::from(percent) / 100 + 1;
                prop_assert!(retries - retried <= saved + trickle + part);
            }
            windows.push((now, retries, sessions, 1_000));
        }
    }
}

// The line.

#[derive(Clone, Debug)]
enum Turn {
    Join,
    Leave(Index),
    Look,
    End(Index),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => Just(Turn::Join),
        2 => any::<Index>().prop_map(Turn::Leave),
        2 => Just(Turn::Look),
        4 => any::<Index>().prop_map(Turn::End),
    ]
}

proptest! {
    #[test]
    fn queue_is_served_in_order_and_nothing_is_lost(
        length in 1..6_usize,
        rooms in prop::collection::vec(1..4_u32, 1..4),
        turns in prop::collection::vec(turn(), 0..120),
    ) {
        let mut config = config(Balance::RoundRobin, &vec![100; rooms.len()]);
        for (backend, room) in config.backends.iter_mut().zip(&rooms) {
            backend.max_sessions = Some(*room);
        }
        config.queue.length = length;
        let pool = Pool::new(&config, &Labels::default());
        let room = rooms.iter().sum::<u32>() as usize;
        let mut held: Vec<_> = (0..room).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
        // Who joined, in turn, with whether it has been given a backend by the model; the first are.
        let mut line: VecDeque<(QueuePlace, bool)> = VecDeque::new();
        for turn in turns {
            match turn {
                Turn::Join => {
                    let place = pool.join_queue(1);
                    let waiting = line.iter().filter(|(_, is_given)| !is_given).count();
                    prop_assert_eq!(place.is_some(), waiting < length);
                    line.extend(place.map(|place| (place, false)));
                }
                Turn::Leave(which) if !line.is_empty() => {
                    drop(line.remove(which.index(line.len())));
                }
                Turn::End(which) if !held.is_empty() => drop(held.swap_remove(which.index(held.len()))),
                Turn::Look => {
                    let mut left = VecDeque::new();
                    for (mut place, is_given) in line.drain(..) {
                        let picked = given(&mut place);
                        prop_assert_eq!(picked.is_some(), is_given);
                        match picked {
                            Some(picked) => held.push(picked),
                            None => left.push_back((place, false)),
                        }
                    }
                    line = left;
                }
                Turn::Leave(_) | Turn::End(_) => {}
            }
            // Whatever is free is given to the first who have nothing yet.
            let mut free = room - held.len() - line.iter().filter(|(_, is_given)| *is_given).count();
            for (_, is_given) in line.iter_mut().filter(|(_, is_given)| !is_given) {
                *is_given = free > 0;
                free = free.saturating_sub(1);
            }
            let waiting = line.iter().filter(|(_, is_given)| !is_given).count();
            prop_assert_eq!(pool.waiting(), waiting);
            let load: u32 = pool.candidates().backends().iter().map(|backend| backend.load()).sum();
            prop_assert_eq!(load as usize, room - free);
        }
        drop((line, held));
        prop_assert_eq!(pool.waiting(), 0);
        prop_assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
    }
}

// The shares of several tenants.

/// A tenant takes a place, a session of it moves to another backend, or one of them all ends.
#[derive(Clone, Debug)]
enum Take {
    Session(u32),
    Move(Index),
    End(Index),
}

fn take() -> impl Strategy<Value = Take> {
    prop_oneof![
        // Mostly one tenant, which takes all that it gets.
        6 => prop_oneof![3 => Just(0_u32), 1 => 0..6_u32].prop_map(Take::Session),
        1 => any::<Index>().prop_map(Take::Move),
        3 => any::<Index>().prop_map(Take::End),
    ]
}

proptest! {
    /// Whatever the others hold, and whoever waits: a tenant that holds few places gets another one, as long as no more tenants
    /// hold any than the last part of the reserve is for.
    #[test]
    fn tenant_that_holds_few_is_always_served_in_a_shared_pool(
        rooms in prop::collection::vec(1..60_u32, 1..4),
        greedy in 0..200_usize,
        turns in prop::collection::vec(take(), 0..300),
    ) {
        let mut config = config(Balance::RoundRobin, &vec![100; rooms.len()]);
        for (backend, room) in config.backends.iter_mut().zip(&rooms) {
            backend.max_sessions = Some(*room);
        }
        config.queue.length = 8;
        let pool = Pool::new(&config, &Labels::default());
        pool.set_shared(true);
        let reserve = ShareReserve::of(rooms.iter().sum::<u32>() as usize);
        let mut held: Vec<(u32, PickedBackend)> = Vec::new();
        let mut line: Vec<(u32, QueuePlace)> = Vec::new();
        for turn in (0..greedy).map(|_| Take::Session(0)).chain(turns) {
            match turn {
                Take::Session(tenant) => match pool.pick_for(tenant, 0, 0, &mut TriedBackends::default()) {
                    Ok(picked) => held.push((tenant, picked)),
                    Err(PickError::Share | PickError::Free) => {
                        line.extend(pool.join_queue(tenant).map(|place| (tenant, place)));
                    }
                    Err(PickError::Usable) => prop_assert!(false, "every backend is used"),
                },
                Take::Move(which) if !held.is_empty() => {
                    let (tenant, _) = held.swap_remove(which.index(held.len()));
                    let again = pool.pick_again(tenant, 0, 0, &mut TriedBackends::default());
                    held.extend(again.map(|picked| (tenant, picked)));
                }
                Take::End(which) if !held.is_empty() => drop(held.swap_remove(which.index(held.len()))),
                Take::Move(_) | Take::End(_) => {}
            }
            for (tenant, mut place) in std::mem::take(&mut line) {
                match given(&mut place) {
                    Some(picked) => held.push((tenant, picked)),
                    None => line.push((tenant, place)),
                }
            }
            let load: u32 = pool.candidates().backends().iter().map(|backend| backend.load()).sum();
            prop_assert_eq!(load as usize, held.len());
            let mut holders = BTreeMap::new();
            for (tenant, _) in &held {
                *holders.entry(*tenant).or_insert(0_usize) += 1;
            }
            for (tenant, own) in &holders {
                prop_assert_eq!(pool.held(*tenant), *own);
            }
            if holders.len() < reserve.last / reserve.few {
                let newcomer = pool.pick_for(99, 0, 0, &mut TriedBackends::default());
                prop_assert!(newcomer.is_ok(), "{} places taken by {} tenants", load, holders.len());
            }
        }
        drop((line, held));
        prop_assert_eq!((pool.waiting(), (0..100).map(|tenant| pool.held(tenant)).sum::<usize>()), (0, 0));
        prop_assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
    }
}

// The simple picks.

proptest! {
    #[test]
    fn round_robin_is_even_from_wherever_it_starts(count in 1..30_usize, skipped in 0..50_u16, rounds in 1..10_usize) {
        let pool = Pool::new(&config(Balance::RoundRobin, &vec![7; count]), &Labels::default());
        let next = || place(&pool.pick(0, 0, &mut TriedBackends::default()).unwrap());
        for _ in 0..skipped {
            next();
        }
        let picked: Vec<_> = (0..count * rounds).map(|_| next()).collect();
        for round in picked.chunks(count) {
            prop_assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), count);
        }
    }

    #[test]
    fn round_robin_gives_each_its_turns_by_weight_at_any_time(
        weights in prop::collection::vec(1..1_000_u32, 2..20),
        skipped in 0..100_000_usize,
    ) {
        let shares = WeightTable::new(&weights);
        let total = f64::from(weights.iter().sum::<u32>());
        let mut counts = vec![0_u32; weights.len()];
        for turn in 0..1_000_u16 {
            counts[pick::round_robin(skipped + usize::from(turn), &shares).unwrap()] += 1;
            for (count, weight) in counts.iter().zip(&weights) {
                let due = f64::from(*weight) / total * f64::from(turn + 1);
                prop_assert!((f64::from(*count) - due).abs() < 6.0, "{:?} at {}", counts, turn);
            }
        }
    }

    #[test]
    fn p2c_takes_the_less_loaded_of_the_two_that_the_roll_names(
        roll in any::<u64>(),
        places in prop::collection::vec((1..6_u32, 0..8_u32), 1..40),
    ) {
        // A box with as many slips of each as it has weight; then one without the first one's.
        let slips = |without: Option<usize>| -> Vec<usize> {
            let left = (0..places.len()).filter(|place| Some(*place) != without);
            left.flat_map(|place| vec![place; places[place].0 as usize]).collect()
        };
        let draw = |slips: &[usize], bits: u64| slips.get(((bits * slips.len() as u64) >> 32) as usize).copied();
        let first = draw(&slips(None), roll >> 32).unwrap();
        let second = draw(&slips(Some(first)), roll & 0xFFFF_FFFF).unwrap_or(first);
        // Whole sessions of the smallest weight: at least, and at most.
        let least = places.iter().map(|(weight, _)| *weight).min().unwrap();
        let whole = |place: usize| {
            let (weight, load) = places[place];
            (load * least / weight, (load * least).div_ceil(weight))
        };
        let looks = AtomicUsize::new(0);
        let weights: Vec<_> = places.iter().map(|(weight, _)| *weight).collect();
        let picked = pick::p2c(roll, &WeightTable::new(&weights), |place| {
            looks.fetch_add(1, Ordering::Relaxed);
            places[place].1
        });
        let (of_first, of_second) = (whole(first), whole(second));
        if of_second.1 < of_first.0 {
            prop_assert_eq!(picked, Some(second));
        } else if of_second.0 >= of_first.1 {
            prop_assert_eq!(picked, Some(first));
        } else {
            prop_assert!(picked == Some(first) || picked == Some(second), "by chance");
        }
        prop_assert_eq!(looks.into_inner(), if places.len() > 1 { 2 } else { 0 }, "and no more");
    }
}
