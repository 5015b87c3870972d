//! Random operations against naive models: the wheel, slots, limits, health, the pick, the directory, endpoint IDs,
//! counters, bandwidth.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use vestibule::account::Labels;
use vestibule::addr::BackendAddr;
use vestibule::admission::slots::Slots;
use vestibule::clock::wheel::{Key, Tick, Wheel};
use vestibule::config::{self, Balance, Probe};
use vestibule::id::{Claim, EndpointId};
use vestibule::outcome::Why;
use vestibule::pool::backend::{Backend, Picked};
use vestibule::pool::health::{Health, Rules, State};
use vestibule::pool::{Pool, Tried, pick};
use vestibule::tenant::{self, Directory, Tenant};

#[path = "model/limits.rs"]
mod limits;
#[path = "model/meter.rs"]
mod meter;
#[path = "model/pace.rs"]
mod pace;

// The timing wheel.

#[derive(Clone, Debug)]
enum Turn {
    /// Somebody new, so many ticks from now.
    Insert(u32),
    /// Another deadline, so many ticks from now; a deadline that has passed is one, too.
    Set(Index, u32),
    Remove(Index),
    Advance(u32),
}

/// Spans around the wheel's own length and its multiples, where a slot is met again.
fn ticks() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..8_u32, 4 => 0..1100_u32, 2 => 1020..1030_u32, 2 => 2040..2060_u32, 1 => 0..1_000_000_u32]
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => ticks().prop_map(Turn::Insert),
        3 => (any::<Index>(), ticks()).prop_map(|(which, ticks)| Turn::Set(which, ticks)),
        2 => any::<Index>().prop_map(Turn::Remove),
        4 => ticks().prop_map(Turn::Advance),
    ]
}

fn tick(count: u32) -> Tick {
    Tick::at(Tick::SPAN * count)
}

/// Writes down that it was woken.
struct Waiting {
    number: usize,
    woken: Arc<Mutex<Vec<usize>>>,
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.woken.lock().unwrap().push(self.number);
    }
}

/// Whoever waits: the number, the key, the deadline.
type Waits = Vec<(usize, Key, u32)>;

fn due(waits: &Waits, now: u32) -> Vec<usize> {
    let mut numbers: Vec<_> =
        waits.iter().filter(|(.., deadline)| *deadline <= now).map(|(number, ..)| *number).collect();
    numbers.sort_unstable();
    numbers
}

fn turn_the_wheel(start: u32, turns: Vec<Turn>) -> Result<(), TestCaseError> {
    let woken = Arc::new(Mutex::new(Vec::new()));
    let mut wheel = Wheel::default();
    wheel.advance(tick(start), |_| unreachable!("nobody waits"));
    let (mut now, mut waits, mut born) = (start, Waits::new(), 0);
    for turn in turns {
        match turn {
            Turn::Insert(ahead) => {
                let deadline = now.saturating_add(ahead);
                let key = wheel.insert(tick(deadline));
                let waiting = Waiting { number: born, woken: Arc::clone(&woken) };
                wheel.wake_with(&key, &Waker::from(Arc::new(waiting)));
                waits.push((born, key, deadline));
                born += 1;
            }
            Turn::Set(which, ahead) if !waits.is_empty() => {
                let which = which.index(waits.len());
                let deadline = now.saturating_sub(3).saturating_add(ahead);
                wheel.set(&waits[which].1, tick(deadline));
                waits[which].2 = deadline;
            }
            Turn::Remove(which) if !waits.is_empty() => {
                wheel.remove(waits.swap_remove(which.index(waits.len())).1);
            }
            Turn::Advance(ticks) => {
                let before = now;
                now = now.saturating_add(ticks);
                wheel.advance(tick(now), Waker::wake_by_ref);
                let mut woken = std::mem::take(&mut *woken.lock().unwrap());
                woken.sort_unstable();
                // Where no tick has passed nobody is called, those who are due included.
                let expected = if now == before { Vec::new() } else { due(&waits, now) };
                prop_assert_eq!(woken, expected, "at {}", now);
            }
            Turn::Set(..) | Turn::Remove(_) => {}
        }
        prop_assert_eq!((wheel.len(), wheel.is_empty()), (waits.len(), waits.is_empty()));
        prop_assert_eq!(wheel.now(), tick(now));
        for (_, key, deadline) in &waits {
            prop_assert_eq!(wheel.is_due(key), *deadline <= now);
        }
    }
    wheel.wake_all(Waker::wake_by_ref);
    let mut woken = std::mem::take(&mut *woken.lock().unwrap());
    woken.sort_unstable();
    prop_assert_eq!(woken, due(&waits, u32::MAX));
    Ok(())
}

proptest! {
    #[test]
    fn the_wheel_calls_all_who_are_due_once_a_tick_and_nobody_early(turns in prop::collection::vec(turn(), 0..60)) {
        turn_the_wheel(0, turns)?;
    }

    #[test]
    fn the_wheel_does_the_same_at_the_end_of_time(
        before in 0..5000_u32,
        turns in prop::collection::vec(turn(), 0..60),
    ) {
        turn_the_wheel(u32::MAX - before, turns)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nobody_among_thousands_is_forgotten_over_jumps(
        deadlines in prop::collection::vec(0..20_000_u32, 1..2000),
        jumps in prop::collection::vec(1..3000_u32, 1..40),
    ) {
        let jumps = jumps.into_iter().map(Turn::Advance);
        turn_the_wheel(0, deadlines.into_iter().map(Turn::Insert).chain(jumps).collect())?;
    }
}

// Slots.

proptest! {
    #[test]
    fn slots_count_like_a_counter(
        limit in 0..20_usize,
        operations in prop::collection::vec(prop::option::of(any::<Index>()), 0..200),
    ) {
        let slots = Slots::new(limit);
        let mut held = Vec::new();
        for operation in operations {
            match operation {
                Some(which) if !held.is_empty() => drop(held.swap_remove(which.index(held.len()))),
                Some(_) => {}
                None => {
                    let permit = slots.take();
                    prop_assert_eq!(permit.is_some(), held.len() < limit);
                    held.extend(permit);
                }
            }
            prop_assert_eq!((slots.used(), slots.limit()), (held.len(), limit));
        }
        drop(held);
        prop_assert_eq!(slots.used(), 0);
    }
}

// Health.

/// What to believe after these results: the first decides, then so many equal ones at the end.
fn believed(rules: Rules, start: State, results: &[bool]) -> State {
    let mut state = start;
    for seen in 1..=results.len() {
        let seen = &results[..seen];
        let ends_with = |result: bool, count: u32| {
            let tail = seen.iter().rev().take(count as usize).filter(|one| **one == result).count();
            tail == count as usize
        };
        state = match state {
            State::Unknown if seen[0] => State::Healthy,
            State::Unknown => State::Unhealthy,
            State::Healthy if ends_with(false, rules.fall) => State::Unhealthy,
            State::Unhealthy if ends_with(true, rules.rise) => State::Healthy,
            same @ (State::Healthy | State::Unhealthy) => same,
        };
    }
    state
}

proptest! {
    #[test]
    fn health_is_what_the_last_results_say(
        rise in 1..6_u32,
        fall in 1..6_u32,
        start in prop::sample::select(vec![State::Unknown, State::Healthy, State::Unhealthy]),
        results in prop::collection::vec(prop_oneof![3 => Just(true), 2 => Just(false)], 0..60),
    ) {
        let rules = Rules { rise, fall };
        let mut health = Health::new(rules, start);
        for seen in 0..results.len() {
            let before = believed(rules, start, &results[..seen]);
            let after = believed(rules, start, &results[..=seen]);
            prop_assert_eq!(health.observe(results[seen]), (before != after).then_some(after));
            prop_assert_eq!(health.state(), after);
        }
    }
}

// The pick.

fn pool(balance: Balance, count: u16) -> Pool {
    let labels = Labels::default();
    let addresses: Vec<SocketAddr> = (0..count).map(|place| ([10, 0, 0, 1], 1000 + place).into()).collect();
    let config = config::Pool {
        name: "shared".to_owned(),
        balance,
        backends: addresses.clone(),
        send_proxy: false,
        attempts: 3,
        source_addresses: Vec::new(),
        health: Probe::None,
    };
    let backend = |address: SocketAddr| {
        let label = labels.intern(&address.to_string());
        let rules = Rules { rise: 1, fall: 1 };
        Arc::new(Backend::new(BackendAddr(address), label, rules, State::Unknown))
    };
    let backends = addresses.into_iter().map(backend).collect();
    Pool::new(labels.intern("shared"), &config, backends)
}

fn place(picked: &Picked) -> usize {
    usize::from(picked.address().0.port() - 1000)
}

#[derive(Clone, Debug)]
enum Step {
    /// A session that tries so many backends, and keeps the last.
    Session(Vec<u64>),
    /// Of the sessions, this one ends.
    End(Index),
    /// A probe's result.
    Probe(Index, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(any::<u64>(), 1..5).prop_map(Step::Session),
        2 => any::<Index>().prop_map(Step::End),
        2 => (any::<Index>(), any::<bool>()).prop_map(|(which, result)| Step::Probe(which, result)),
    ]
}

fn run_the_pool(balance: Balance, count: u16, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let pool = pool(balance, count);
    let mut states = vec![State::Unknown; usize::from(count)];
    let mut loads = vec![0_u32; usize::from(count)];
    let mut sessions = Vec::new();
    for step in steps {
        let all = |state| (0..states.len()).filter(|place| states[*place] == state).collect::<Vec<_>>();
        let usable = Some(all(State::Healthy)).filter(|some| !some.is_empty()).unwrap_or(all(State::Unknown));
        prop_assert_eq!(pool.usable(), usable.len());
        match step {
            Step::Session(rolls) => {
                let (mut tried, mut places) = (Tried::default(), BTreeSet::new());
                let mut last: Option<Picked> = None;
                for roll in rolls {
                    let left: Vec<_> =
                        usable.iter().copied().filter(|place| !places.contains(place)).collect();
                    // The attempt before is over when the next is made.
                    drop(last.take());
                    let Some(picked) = pool.pick(roll, &mut tried) else {
                        prop_assert!(left.is_empty());
                        break;
                    };
                    let place = place(&picked);
                    prop_assert!(left.contains(&place));
                    let heaviest = left.iter().map(|place| loads[*place]).max().unwrap_or_default();
                    let others =
                        left.iter().filter(|other| **other != place && loads[**other] == heaviest).count();
                    if balance == Balance::P2c && left.len() > 1 {
                        prop_assert!(
                            loads[place] < heaviest || others > 0,
                            "the most loaded of all never wins"
                        );
                    }
                    places.insert(place);
                    prop_assert_eq!((tried.len(), tried.is_empty()), (places.len(), false));
                    last = Some(picked);
                }
                if let Some(picked) = last {
                    loads[place(&picked)] += 1;
                    sessions.push(picked);
                }
            }
            Step::End(which) if !sessions.is_empty() => {
                let ended = sessions.swap_remove(which.index(sessions.len()));
                loads[place(&ended)] -= 1;
            }
            Step::End(_) => {}
            Step::Probe(which, result) => {
                let which = which.index(states.len());
                let state = if result { State::Healthy } else { State::Unhealthy };
                let changed = (states[which] != state).then_some(state);
                prop_assert_eq!(pool.backends()[which].observe(result), changed);
                pool.refresh();
                states[which] = state;
            }
        }
        let shown: Vec<u32> = pool.backends().iter().map(|backend| backend.load()).collect();
        prop_assert_eq!(&shown, &loads);
    }
    drop(sessions);
    prop_assert!(pool.backends().iter().all(|backend| backend.load() == 0));
    Ok(())
}

proptest! {
    #[test]
    fn nobody_unhealthy_or_tried_is_picked_in_turn(count in 1..8_u16, steps in prop::collection::vec(step(), 0..60)) {
        run_the_pool(Balance::RoundRobin, count, steps)?;
    }

    #[test]
    fn nobody_unhealthy_or_tried_is_picked_by_load(count in 1..8_u16, steps in prop::collection::vec(step(), 0..60)) {
        run_the_pool(Balance::P2c, count, steps)?;
    }

    #[test]
    fn round_robin_is_even_from_wherever_it_starts(count in 1..30_u16, skipped in 0..50_u16, rounds in 1..10_usize) {
        let pool = pool(Balance::RoundRobin, count);
        for _ in 0..skipped {
            drop(pool.pick(0, &mut Tried::default()));
        }
        let picked: Vec<_> = (0..usize::from(count) * rounds)
            .map(|_| place(&pool.pick(0, &mut Tried::default()).unwrap()))
            .collect();
        for round in picked.chunks(usize::from(count)) {
            prop_assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), usize::from(count));
        }
    }

    #[test]
    fn p2c_takes_the_less_loaded_of_the_two_that_the_roll_names(
        roll in any::<u64>(),
        loads in prop::collection::vec(0..4_u32, 2..40),
    ) {
        let (len, high, low) = (loads.len() as u64, roll >> 32, roll & 0xFFFF_FFFF);
        let first = (high * len) >> 32;
        let second = (first + 1 + ((low * (len - 1)) >> 32)) % len;
        let [first, second] = [first, second].map(|place| usize::try_from(place).unwrap());
        prop_assert_ne!(first, second);
        let picked = pick::p2c(roll, loads.len(), |place| loads[place]).unwrap();
        prop_assert_eq!(picked, if loads[second] < loads[first] { second } else { first });
    }

    #[test]
    fn p2c_looks_at_two_loads_and_no_more(roll in any::<u64>(), len in 2..5000_usize) {
        let looks = AtomicUsize::new(0);
        let picked = pick::p2c(roll, len, |place| {
            assert!(place < len);
            looks.fetch_add(1, Ordering::Relaxed);
            0
        });
        prop_assert!(picked.is_some());
        prop_assert_eq!(looks.into_inner(), 2);
    }
}

// The directory.

/// Few enough for known and unknown ones to meet, in both lengths.
fn endpoint() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..40_u32).prop_map(|n| format!("vpce-{n:08x}")),
        (0..40_u32).prop_map(|n| format!("vpce-{n:017x}"))
    ]
}

fn directory(tenants: u32, endpoints: &BTreeMap<String, u32>) -> Directory {
    let labels = Labels::default();
    let tenant = |place: u32| Tenant {
        label: labels.intern(&place.to_string()),
        labels: None,
        enabled: true,
        pool: None,
        routes: Box::default(),
        quota: Arc::default(),
    };
    let endpoints = endpoints.iter().map(|(text, place)| (text.parse().unwrap(), *place));
    Directory::new((0..tenants).map(tenant).collect(), endpoints)
}

proptest! {
    #[test]
    fn the_directory_finds_what_a_sorted_list_finds(
        listed in prop::collection::btree_map(endpoint(), 0..10_u32, 0..40),
        absent in prop::option::of(0..10_u32),
        unknown in prop::option::of(0..10_u32),
        fixed in prop::option::weighted(0.1, 0..10_u32),
        claims in prop::collection::vec(
            prop_oneof![6 => endpoint().prop_map(Some), 1 => "[a-z0-9-]{0,22}".prop_map(Some), 1 => Just(None)],
            1..40,
        ),
    ) {
        let directory = directory(10, &listed);
        prop_assert_eq!(directory.tenants().len(), 10);
        let rules = match fixed {
            Some(place) => tenant::Rules::Fixed(place),
            None => tenant::Rules::ByEndpoint { absent, unknown },
        };
        for claim in claims {
            let expected = match (fixed, &claim) {
                (Some(place), _) => Ok(place),
                (None, None) => absent.ok_or(Why::NoEndpoint),
                (None, Some(text)) => listed.get(text).copied().or(unknown).ok_or(Why::UnknownEndpoint),
            };
            let found = directory.find(Claim::from_tlv(claim.as_deref().map(str::as_bytes)), rules);
            let found = found.map(|tenant| tenant.label.name().parse().unwrap()).map_err(|outcome| outcome.why);
            prop_assert_eq!(found, expected, "{:?}", claim);
        }
    }
}

// Endpoint IDs.

/// The form, letter by letter.
fn is_well_formed(text: &str) -> bool {
    let digits = text.strip_prefix("vpce-").unwrap_or_default();
    let good = digits.chars().all(|digit| matches!(digit, '0'..='9' | 'a'..='f'));
    good && (digits.len() == 8 || digits.len() == 17)
}

proptest! {
    #[test]
    fn an_endpoint_id_survives_the_way_there_and_back(text in "vpce-([0-9a-f]{8}|[0-9a-f]{17})") {
        let id: EndpointId = text.parse().unwrap();
        prop_assert_eq!(id.to_string(), text.clone());
        prop_assert_eq!(EndpointId::from_bytes(text.as_bytes()), Some(id));
        prop_assert_eq!(Claim::from_tlv(Some(text.as_bytes())), Claim::Id(id));
    }

    #[test]
    fn two_ids_are_equal_where_their_texts_are(one in endpoint(), other in endpoint()) {
        let ids = [&one, &other].map(|text| text.parse::<EndpointId>().unwrap());
        prop_assert_eq!(ids[0] == ids[1], one == other);
    }

    #[test]
    fn only_the_well_formed_is_an_endpoint_id(text in "(vpce-|vpcf-|vpce)?[0-9a-gA-F]{7,9}|vpce-[0-9a-f]{15,18}|\\PC{0,25}") {
        prop_assert_eq!(text.parse::<EndpointId>().is_ok(), is_well_formed(&text));
    }
}

#[test]
fn a_tick_is_as_long_as_it_says() {
    assert_eq!(tick(7), Tick::at(Duration::from_millis(399)));
    assert_ne!(tick(7), Tick::at(Duration::from_millis(400)));
}
