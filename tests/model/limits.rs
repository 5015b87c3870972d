//! Slots, rates and quotas under random operations and under real threads: what is counted is what is held.

use std::sync::atomic::AtomicU64;

use vestibule::admission::quota::{FlowPermit, Quota, Quotas, SessionPermit};
use vestibule::admission::rate_limiter::RateLimiter;
use vestibule::clock::Moment;
use vestibule::config::{LimitMode, TenantLimits};
use vestibule::fair_share::ShareReserve;

use super::*;

#[derive(Clone, Debug)]
enum Act {
    Take,
    Drop(Index),
    Limit(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        5 => Just(Act::Take),
        3 => any::<Index>().prop_map(Act::Drop),
        1 => prop_oneof![0..12_usize, Just(Slots::UNLIMITED)].prop_map(Act::Limit),
    ]
}

proptest! {
    #[test]
    fn changed_limit_admits_below_it_and_ends_no_session(acts in prop::collection::vec(act(), 0..300)) {
        let slots = Slots::new(5);
        let (mut held, mut limit) = (Vec::new(), 5);
        for act in acts {
            match act {
                Act::Take => {
                    let permit = slots.take();
                    prop_assert_eq!(permit.is_some(), held.len() < limit);
                    held.extend(permit);
                }
                Act::Drop(which) if !held.is_empty() => drop(held.swap_remove(which.index(held.len()))),
                Act::Drop(_) => {}
                Act::Limit(other) => {
                    limit = other;
                    slots.set_limit(limit);
                }
            }
            prop_assert_eq!((slots.used(), slots.limit()), (held.len(), limit));
        }
        drop(held);
        prop_assert_eq!(slots.used(), 0);
    }

    #[test]
    fn rate_limiter_agrees_with_a_token_bucket(
        interval in 1..1000_u64,
        burst in 1..20_u64,
        waits in prop::collection::vec(prop_oneof![3 => Just(0_u64), 3 => 0..1500_u64, 1 => 0..30_000_u64], 1..120),
    ) {
        let rate = RateLimiter::default();
        rate.set(Some(config::RateLimit { interval: Duration::from_nanos(interval), burst }));
        // Tokens in parts of an interval; full at first, as after a silence.
        let (mut level, mut now) = (burst * interval, 0);
        let mut admitted = Vec::new();
        for wait in waits {
            now += wait;
            level = (level + wait).min(burst * interval);
            let expected = level >= interval;
            prop_assert_eq!(rate.admit(Moment::from_nanos(now)), expected, "at {}", now);
            if expected {
                level -= interval;
                admitted.push(now);
            }
        }
        for (first, from) in admitted.iter().enumerate() {
            for (last, to) in admitted.iter().enumerate().skip(first) {
                let most = burst + (to - from) / interval;
                prop_assert!(((last - first) as u64) < most, "{} to {}", from, to);
            }
        }
    }
}

/// The rule of shares, written down once more: `free` is what is left behind the new one.
fn has_room(own: usize, holders: usize, process: usize, free: usize) -> bool {
    let (reserve, last, few) = (process.div_ceil(8), process.div_ceil(16), (process / 1024).max(1));
    let is_greedy = free < reserve || own >= process / (holders + 1);
    !is_greedy || (free > reserve && own < 9 * (free - reserve)) || (free >= last && own < free) || own < few
}

/// What tenants do to the process's slots.
#[derive(Clone, Debug)]
enum Grab {
    /// A tenant takes so many, or all that it gets.
    Sessions(usize, usize),
    Flows(usize, usize),
    /// A tenant gives so many back.
    GiveBack(usize, usize),
}

fn grab(tenants: usize) -> impl Strategy<Value = Grab> {
    let count = || prop_oneof![3 => 1..8_usize, 2 => 1..200_usize, 1 => Just(usize::MAX)];
    prop_oneof![
        5 => (0..tenants, count()).prop_map(|(tenant, count)| Grab::Sessions(tenant, count)),
        2 => (0..tenants, count()).prop_map(|(tenant, count)| Grab::Flows(tenant, count)),
        3 => (0..tenants, count()).prop_map(|(tenant, count)| Grab::GiveBack(tenant, count)),
    ]
}

/// A place of the process and one of a tenant.
type Held = (vestibule::admission::slots::SlotPermit, Result<SessionPermit, FlowPermit>);

proptest! {
    /// Whatever other tenants have taken, and in which order: a tenant that holds few sessions and flows gets another one,
    /// as long as no more tenants hold any than the last part of the reserve is for.
    #[test]
    fn tenant_that_holds_few_is_always_admitted(
        process in prop_oneof![16..200_usize, 1024..3000_usize],
        grabs in prop::collection::vec(grab(15), 0..60),
    ) {
        let (slots, labels) = (Slots::new(process), Labels::default());
        let quotas = Quotas::new(Arc::clone(&slots));
        let tenants: Vec<_> = (0..15).map(|tenant| quotas.find(&labels.intern(&format!("{tenant}")))).collect();
        let mut held: Vec<Vec<Held>> = tenants.iter().map(|_| Vec::new()).collect();
        let reserve = ShareReserve::of(process);
        prop_assert!(process < 1024 || reserve.last / reserve.few >= 64);
        let take = |tenant: usize, flows: bool| -> Option<Held> {
            let slot = slots.take()?;
            let quota: &Arc<Quota> = &tenants[tenant];
            let permit = if flows {
                quota.admit_flow(|_| false).map(Err).ok()?
            } else {
                quota.admit(Moment::default()).map(Ok).ok()?
            };
            Some((slot, permit))
        };
        for grab in grabs {
            match grab {
                Grab::Sessions(tenant, count) | Grab::Flows(tenant, count) => {
                    let flows = matches!(grab, Grab::Flows(..));
                    held[tenant].extend((0..count.min(process)).map_while(|_| take(tenant, flows)));
                }
                Grab::GiveBack(tenant, count) => {
                    let left = held[tenant].len().saturating_sub(count);
                    held[tenant].truncate(left);
                }
            }
            for (tenant, held) in held.iter().enumerate() {
                // A tenant that has both sessions and flows counts twice.
                if held.len() < reserve.few && quotas.holders() < reserve.last / reserve.few {
                    prop_assert!(take(tenant, false).is_some(), "a session of {} of {}", tenant, process);
                    prop_assert!(take(tenant, true).is_some(), "a flow of {} of {}", tenant, process);
                }
            }
        }
        drop(held);
        prop_assert_eq!((quotas.holders(), slots.used()), (0, 0));
    }
}

#[derive(Clone, Debug)]
enum Deed {
    /// One of the tenants asks, so long after the last deed.
    Admit(usize, u64),
    Drop(Index),
    Set(usize, TenantLimits),
}

fn limits() -> impl Strategy<Value = TenantLimits> {
    let rate = (1..50_u64, 1..6_u64)
        .prop_map(|(ms, burst)| config::RateLimit { interval: Duration::from_millis(ms), burst });
    let mode = prop::sample::select(vec![LimitMode::Enforce, LimitMode::Enforce, LimitMode::Observe]);
    (mode, prop::option::of(1..8_usize), prop::option::of(rate)).prop_map(|(mode, sessions, session_rate)| {
        TenantLimits { mode, sessions, session_rate, ..TenantLimits::default() }
    })
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        6 => (0..3_usize, 0..20_u64).prop_map(|(tenant, wait)| Deed::Admit(tenant, wait)),
        3 => any::<Index>().prop_map(Deed::Drop),
        1 => (0..3_usize, limits()).prop_map(|(tenant, limits)| Deed::Set(tenant, limits)),
    ]
}

/// One tenant, in plain numbers.
#[derive(Clone, Copy, Default)]
struct Plain {
    limits: TenantLimits,
    held: usize,
    /// Nanoseconds until the bucket is full again, at the last deed.
    owed: u64,
    /// Whether nobody has asked since there is another rate.
    is_fresh: bool,
    rejected: u64,
    would_reject: u64,
}

impl Plain {
    /// Whether it is admitted, and whether that is only because it observes.
    fn admit(&mut self, room: bool) -> (bool, bool) {
        let observes = self.limits.mode == LimitMode::Observe;
        let mut beyond = self.limits.sessions.is_some_and(|limit| self.held >= limit);
        if beyond && !observes || !room {
            self.rejected += 1;
            return (false, beyond);
        }
        if !beyond && let Some(rate) = self.limits.session_rate {
            let interval = u64::try_from(rate.interval.as_nanos()).unwrap();
            if std::mem::take(&mut self.is_fresh) {
                self.owed = self.owed.min(interval * rate.burst);
            }
            beyond = self.owed > interval * (rate.burst - 1);
            self.owed += if beyond { 0 } else { interval };
        }
        let admitted = !beyond || observes;
        self.held += usize::from(admitted);
        self.would_reject += u64::from(admitted && beyond);
        self.rejected += u64::from(!admitted);
        (admitted, beyond)
    }
}

proptest! {
    #[test]
    fn quotas_hold_what_plain_numbers_hold(deeds in prop::collection::vec(deed(), 0..300)) {
        const PROCESS: usize = 12;
        let (slots, labels) = (Slots::new(PROCESS), Labels::default());
        let quotas = Quotas::new(Arc::clone(&slots));
        let tenants: Vec<_> = (0..3).map(|tenant| quotas.find(&labels.intern(&format!("{tenant}")))).collect();
        let (mut plain, mut now) = ([Plain::default(); 3], 0);
        let mut held = Vec::new();
        for deed in deeds {
            match deed {
                Deed::Admit(tenant, wait) => {
                    now += wait * 1_000_000;
                    for plain in &mut plain {
                        plain.owed = plain.owed.saturating_sub(wait * 1_000_000);
                    }
                    let Some(slot) = slots.take() else { continue };
                    let others = plain.iter().enumerate().filter(|(other, plain)| *other != tenant && plain.held > 0);
                    let (own, holders) = (plain[tenant].held, others.count() + 1);
                    let free = PROCESS - slots.used();
                    let room = has_room(own, holders, PROCESS, free);
                    let (admitted, beyond) = plain[tenant].admit(room);
                    let permit = tenants[tenant].admit(Moment::from_nanos(now));
                    prop_assert_eq!(permit.is_ok(), admitted);
                    if let Ok(permit) = permit {
                        prop_assert_eq!(permit.would_reject().is_some(), beyond);
                        held.push((tenant, permit, slot));
                    }
                }
                Deed::Drop(which) if !held.is_empty() => {
                    let (tenant, ..) = held.swap_remove(which.index(held.len()));
                    plain[tenant].held -= 1;
                }
                Deed::Drop(_) => {}
                Deed::Set(tenant, limits) => {
                    tenants[tenant].set(&limits, Moment::from_nanos(now));
                    plain[tenant].is_fresh |= limits.session_rate != plain[tenant].limits.session_rate;
                    plain[tenant].limits = limits;
                }
            }
            for (quota, plain) in tenants.iter().zip(&plain) {
                prop_assert_eq!(quota.sessions(), plain.held);
                prop_assert_eq!(quota.rejected().map(|(_, count)| count).sum::<u64>(), plain.rejected);
                prop_assert_eq!(quota.would_reject().map(|(_, count)| count).sum::<u64>(), plain.would_reject);
            }
            prop_assert_eq!(quotas.holders(), plain.iter().filter(|plain| plain.held > 0).count());
        }
        drop(held);
        prop_assert_eq!((quotas.holders(), slots.used()), (0, 0));
        prop_assert!(tenants.iter().all(|quota| quota.sessions() == 0));
    }
}

/// Threads at work on the same thing.
const THREADS: usize = 4;

#[test]
fn threads_get_the_burst_and_not_one_more() {
    for burst in [1, 7, 1000] {
        let rate = RateLimiter::default();
        rate.set(Some(config::RateLimit { interval: Duration::from_secs(3600), burst }));
        let admitted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let own = (0..1000).filter(|_| rate.admit(Moment::from_nanos(5))).count();
                    admitted.fetch_add(own as u64, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(admitted.into_inner(), burst);
    }
}

#[test]
fn threads_with_a_common_clock_get_the_rate_exactly() {
    const STEPS: u64 = 200_000;
    let rate = RateLimiter::default();
    rate.set(Some(config::RateLimit { interval: Duration::from_nanos(10), burst: 100 }));
    let (clock, admitted) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let now = clock.fetch_add(1, Ordering::SeqCst);
                    if now >= STEPS {
                        break;
                    }
                    admitted.fetch_add(u64::from(rate.admit(Moment::from_nanos(now))), Ordering::SeqCst);
                }
            });
        }
    });
    // Each nanosecond somebody asks, so that nothing of the rate is left; a thread that was held up while others went
    // on asks in the past, which takes nothing from anybody.
    let admitted = admitted.into_inner();
    assert!((STEPS / 10..=STEPS / 10 + 100).contains(&admitted), "{admitted}");
}

#[test]
fn threads_leave_nothing_behind_while_limits_move() {
    let slots = Slots::new(1000);
    let (quotas, labels) = (Quotas::new(Arc::clone(&slots)), Labels::default());
    let tenants: Vec<Arc<Quota>> = ["a", "b"].map(|name| quotas.find(&labels.intern(name))).into();
    let held: Vec<_> = tenants.iter().map(|_| AtomicUsize::new(0)).collect();
    let most = |tenant: usize| tenant + 3;
    for (tenant, quota) in tenants.iter().enumerate() {
        quota.set(
            &TenantLimits { sessions: Some(most(tenant)), ..TenantLimits::default() },
            Moment::default(),
        );
    }
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (tenants, held, slots) = (&tenants, &held, &slots);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread as u64);
                let mut own: Vec<(usize, SessionPermit)> = Vec::new();
                for _ in 0..20_000 {
                    let tenant = random.usize(..2);
                    if random.bool()
                        && let Some(at) = own.len().checked_sub(1)
                    {
                        let (tenant, permit) = own.swap_remove(random.usize(..=at));
                        held[tenant].fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    } else if random.u8(..) < 8 {
                        let sessions = Some(random.usize(1..=most(tenant)));
                        tenants[tenant]
                            .set(&TenantLimits { sessions, ..TenantLimits::default() }, Moment::default());
                    } else if let Some(_slot) = slots.take()
                        && let Ok(permit) = tenants[tenant].admit(Moment::default())
                    {
                        let now = held[tenant].fetch_add(1, Ordering::SeqCst) + 1;
                        assert!(now <= most(tenant), "{now} hold of {}", most(tenant));
                        own.push((tenant, permit));
                    }
                }
                for (tenant, permit) in own {
                    held[tenant].fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                }
            });
        }
    });
    assert_eq!((quotas.holders(), slots.used()), (0, 0));
    assert!(tenants.iter().all(|quota| quota.sessions() == 0));
}
