//! The rules of admission under every order in which threads' steps may take effect, by loom: the same sources, on loom's
//! atomic numbers.
//!
//! Without the usual harness: with it the sources' own tests would be here too, and loom's numbers live in its models only.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the sources are the library's, and only a part of them is tried here"
)]
#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected has failed")]

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use loom::thread::{JoinHandle, spawn};
use vestibule::{account, clock, config, fair_share, outcome};

use self::clock::Moment;
use self::config::{BandwidthLimit, TenantLimits};
use self::outcome::Reason;
use self::source::admission::bandwidth::{BandwidthBudget, PARTS};
use self::source::admission::quota::{Quota, ReservedSlots, SessionPermit};
use self::source::admission::rate_limiter::RateLimiter;
use self::source::admission::session_share::SessionShare;
use self::source::admission::slots::Slots;

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
}

#[path = "../src"]
mod source {
    pub mod admission;
}

/// More than any bucket here has.
const ALL: u64 = 1 << 32;

const NOW: Moment = Moment::from_nanos(60_000_000_000);

/// Models by their names.
macro_rules! trials {
    ($($model:ident),* $(,)?) => {
        vec![$(Trial::test(stringify!($model), || {
            loom::model($model);
            Ok(())
        })),*]
    };
}

fn main() {
    let trials = trials![
        one_of_two_has_the_last_slot,
        refused_session_does_not_cause_another_refusal,
        a_lowered_limit_holds_from_then_on,
        reserved_slot_is_taken_or_released_once,
        a_burst_is_admitted_and_not_one_more,
        a_rate_that_is_set_is_seen_whole,
        a_tenant_holds_while_it_has_a_session,
        the_limit_and_the_rate_together_lose_nothing,
        reserved_slots_end_at_zero,
        bytes_are_taken_once_and_come_back,
        distributed_bandwidth_has_come_in,
        bandwidth_without_waiters_stays,
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Does something with what is shared, in a thread of its own.
fn with<S: Send + Sync + 'static, T: 'static>(
    shared: &Arc<S>,
    act: impl FnOnce(&Arc<S>) -> T + Send + 'static,
) -> JoinHandle<T> {
    let shared = Arc::clone(shared);
    spawn(move || act(&shared))
}

fn every(interval: u64, burst: u64) -> config::RateLimit {
    config::RateLimit { interval: Duration::from_millis(interval), burst }
}

fn one_of_two_has_the_last_slot() {
    let slots = Slots::new(2);
    let _first = slots.take().unwrap();
    let other = with(&slots, Slots::take);
    let own = slots.take();
    assert!(slots.used() <= 2);
    let other = other.join().unwrap();
    assert!(own.is_some() != other.is_some());
    drop((own, other));
    assert_eq!(slots.used(), 1);
}

fn refused_session_does_not_cause_another_refusal() {
    let slots = Slots::new(1);
    let come_and_go = |slots: &Arc<Slots>| slots.take().is_some();
    let others = [with(&slots, come_and_go), with(&slots, come_and_go)];
    let others = others.map(|other| other.join().unwrap());
    assert!(others.contains(&true), "where both were refused, nobody was there");
    assert!(slots.used() == 0 && slots.take().is_some());
}

fn a_lowered_limit_holds_from_then_on() {
    let slots = Slots::new(2);
    let lower = with(&slots, |slots| slots.set_limit(1));
    let held: Vec<_> = (0..3).filter_map(|_| slots.take()).collect();
    lower.join().unwrap();
    assert!((1..=2).contains(&held.len()) && slots.used() == held.len());
    assert!(slots.take().is_none());
    drop(held);
    let _last = slots.take().unwrap();
    assert!(slots.take().is_none());
}

fn reserved_slot_is_taken_or_released_once() {
    let slots = Slots::new(1);
    slots.reserve_more(1);
    let late = with(&slots, Slots::take_anyway);
    let new = with(&slots, Slots::take);
    slots.release_reserved();
    let (late, new) = (late.join().unwrap(), new.join().unwrap());
    assert_eq!(slots.used(), 1 + usize::from(new.is_some()));
    assert_eq!(slots.present(), slots.used());
    drop((late, new));
    assert_eq!((slots.used(), slots.release_reserved()), (0, None));
}

fn a_burst_is_admitted_and_not_one_more() {
    let rate = Arc::new(RateLimiter::default());
    rate.set(Some(every(100, 3)));
    let twice = |rate: &Arc<RateLimiter>| (0..2).filter(|_| rate.admit(NOW)).count();
    let other = with(&rate, twice);
    let own = twice(&rate);
    assert_eq!(own + other.join().unwrap(), 3);
    assert!(!rate.admit(NOW));
}

fn a_rate_that_is_set_is_seen_whole() {
    let rate = Arc::new(RateLimiter::default());
    rate.set(Some(every(1_000, 5)));
    let set = with(&rate, |rate| rate.set(Some(every(10, 2))));
    let own = (0..3).filter(|_| rate.admit(NOW)).count();
    set.join().unwrap();
    assert!(own >= 1, "there is a rate, and with it its burst");
    let left = (0..6).filter(|_| rate.admit(NOW)).count();
    assert!(own + left <= 5, "{own} and {left}: what was taken stays taken");
    assert_eq!(
        (0..6).filter(|_| rate.admit(NOW + Duration::from_millis(20))).count(),
        2,
        "the new burst, and no more"
    );
}

fn quota(limits: &TenantLimits) -> (Arc<SessionShare>, Arc<Quota>) {
    let share = SessionShare::new(Slots::new(1_000));
    let quota = Quota::new(Arc::clone(&share));
    quota.set(limits, NOW);
    (share, quota)
}

fn a_tenant_holds_while_it_has_a_session() {
    let (share, quota) = quota(&TenantLimits::default());
    let come_and_go = |quota: &Arc<Quota>| drop(quota.admit(NOW).unwrap());
    let other = with(&quota, come_and_go);
    let own = quota.admit(NOW).unwrap();
    assert!(share.holders() <= 2, "never below nobody");
    other.join().unwrap();
    assert_eq!((share.holders(), quota.sessions()), (1, 1));
    drop(own);
    assert_eq!((share.holders(), quota.sessions()), (0, 0));
}

fn the_limit_and_the_rate_together_lose_nothing() {
    let (share, quota) = quota(&TenantLimits {
        sessions: Some(1),
        session_rate: Some(every(1_000, 2)),
        ..TenantLimits::default()
    });
    let admit = |quota: &Arc<Quota>| quota.admit(NOW);
    let other = with(&quota, admit);
    let own = quota.admit(NOW);
    let both: [Result<SessionPermit, Reason>; 2] = [own, other.join().unwrap()];
    assert_eq!(both.iter().flatten().count(), 1);
    assert!(both.iter().any(|one| matches!(one, Err(Reason::SessionLimit))));
    drop(both);
    drop(quota.admit(NOW).unwrap());
    assert_eq!(quota.admit(NOW).unwrap_err(), Reason::SessionRate, "who the limit refused has taken nothing");
    assert_eq!((share.holders(), quota.sessions()), (0, 0));
}

fn reserved_slots_end_at_zero() {
    let (share, quota) = quota(&TenantLimits { sessions: Some(1), ..TenantLimits::default() });
    let slots = Slots::new(10);
    let kept = ReservedSlots::new(&slots, 1, vec![(Arc::clone(&quota), 1, 0)]);
    let late = with(&quota, |quota| quota.adopt(None));
    drop(kept);
    let late = late.join().unwrap();
    assert_eq!((quota.sessions(), share.holders(), slots.used()), (1, 1, 0));
    assert_eq!(quota.admit(NOW).unwrap_err(), Reason::SessionLimit);
    drop(late);
    assert_eq!((quota.sessions(), share.holders()), (0, 0));
}

fn budget() -> Arc<BandwidthBudget> {
    let budget = BandwidthBudget::default();
    budget.set(Some(BandwidthLimit { bytes_per_second: 1_000, burst: 200 }), NOW);
    Arc::new(budget)
}

fn bytes_are_taken_once_and_come_back() {
    let budget = budget();
    let other = with(&budget, |budget| {
        let taken = budget.take(150, 1, NOW);
        budget.give_back(taken.min(30));
        taken - taken.min(30)
    });
    assert!(budget.take_whole(40, NOW));
    let used = 40 + other.join().unwrap();
    assert_eq!((used, budget.take(ALL, 1, NOW)), (160, 40));
}

fn distributed_bandwidth_has_come_in() {
    let budget = budget();
    assert_eq!(budget.take(200, 200, NOW), 200);
    let later = NOW + Duration::from_millis(100);
    let before = budget.join();
    let other = with(&budget, move |budget| {
        let before = budget.join();
        budget.distribute(later);
        budget.leave() - before
    });
    budget.distribute(later);
    let dealt = budget.leave() - before + other.join().unwrap();
    assert_eq!(budget.waiters(), 0);
    // What is dealt to nobody, or not to be divided, stays; a part of a byte may be lost with each who deals.
    let left = budget.take(ALL, 1, later) * PARTS;
    let income = 100 * PARTS;
    assert!(dealt + left <= income && dealt + left + 2 * PARTS >= income, "{dealt} and {left}");
}

fn bandwidth_without_waiters_stays() {
    let budget = budget();
    assert_eq!(budget.take(200, 200, NOW), 200);
    let later = NOW + Duration::from_millis(100);
    let before = budget.join();
    let other = with(&budget, move |budget| budget.distribute(later));
    let dealt = budget.leave() - before;
    other.join().unwrap();
    assert!(dealt == 0 || dealt == 100 * PARTS, "all of it, or nothing: {dealt}");
    assert_eq!(budget.take(ALL, 1, later) * PARTS, 100 * PARTS - dealt);
}
