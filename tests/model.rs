//! Random operations against naive models: the wheel, slots, limits, pools, the directory, endpoint IDs, counters,
//! bandwidth, local ports.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use vestibule::account::Labels;
use vestibule::admission::slots::Slots;
use vestibule::clock::Moment;
use vestibule::clock::wheel::{Tick, TimerKey, TimerWheel};
use vestibule::config;
use vestibule::id::{EndpointClaim, EndpointId};
use vestibule::outcome::Reason;
use vestibule::tenant::{self, Tenant, TenantDirectory};

#[path = "model/day.rs"]
mod day;
#[path = "model/flow.rs"]
mod flow;
#[path = "model/least.rs"]
mod least;
#[path = "model/limits.rs"]
mod limits;
#[path = "model/maglev.rs"]
mod maglev;
#[path = "model/meter.rs"]
mod meter;
#[path = "model/naive.rs"]
mod naive;
#[path = "model/pace.rs"]
mod pace;
#[path = "model/pool.rs"]
mod pool;
#[path = "model/ports.rs"]
mod ports;
#[path = "model/whole.rs"]
mod whole;

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
type Waits = Vec<(usize, TimerKey, u32)>;

fn due(waits: &Waits, now: u32) -> Vec<usize> {
    let mut numbers: Vec<_> =
        waits.iter().filter(|(.., deadline)| *deadline <= now).map(|(number, ..)| *number).collect();
    numbers.sort_unstable();
    numbers
}

fn turn_the_wheel(start: u32, turns: Vec<Turn>) -> Result<(), TestCaseError> {
    let woken = Arc::new(Mutex::new(Vec::new()));
    let mut wheel = TimerWheel::default();
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
    fn wheel_fires_due_timers_once_a_tick_and_none_early(turns in prop::collection::vec(turn(), 0..60)) {
        turn_the_wheel(0, turns)?;
    }

    #[test]
    fn wheel_works_near_the_largest_time(
        before in 0..5000_u32,
        turns in prop::collection::vec(turn(), 0..60),
    ) {
        turn_the_wheel(u32::MAX - before, turns)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_timer_of_thousands_is_lost_over_jumps(
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

// The directory.

/// Few enough for known and unknown ones to meet, in both lengths.
fn endpoint() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..40_u32).prop_map(|n| format!("vpce-{n:08x}")),
        (0..40_u32).prop_map(|n| format!("vpce-{n:017x}"))
    ]
}

fn directory(tenants: u32, endpoints: &BTreeMap<String, u32>) -> TenantDirectory {
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
    TenantDirectory::new((0..tenants).map(tenant).collect(), endpoints)
}

proptest! {
    #[test]
    fn directory_agrees_with_a_sorted_list(
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
            Some(place) => tenant::TenantRules::Fixed(place),
            None => tenant::TenantRules::ByEndpoint { absent, unknown },
        };
        for claim in claims {
            let expected = match (fixed, &claim) {
                (Some(place), _) => Ok(place),
                (None, None) => absent.ok_or(Reason::NoEndpoint),
                (None, Some(text)) => listed.get(text).copied().or(unknown).ok_or(Reason::UnknownEndpoint),
            };
            let found = directory.find(EndpointClaim::from_tlv(claim.as_deref().map(str::as_bytes)), rules);
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
    fn endpoint_id_round_trips(text in "vpce-([0-9a-f]{8}|[0-9a-f]{17})") {
        let id: EndpointId = text.parse().unwrap();
        prop_assert_eq!(id.to_string(), text.clone());
        prop_assert_eq!(EndpointId::from_bytes(text.as_bytes()), Some(id));
        prop_assert_eq!(EndpointClaim::from_tlv(Some(text.as_bytes())), EndpointClaim::Id(id));
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
fn tick_has_its_declared_length() {
    assert_eq!(tick(7), Tick::at(Duration::from_millis(399)));
    assert_ne!(tick(7), Tick::at(Duration::from_millis(400)));
}
