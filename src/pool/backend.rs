//! One address of a pool: what probes and sessions say of it, and how many sessions it has over all workers.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::cause::{Cause, Failed};
use super::ejection::Ejection;
use super::health::{FULL, Health, Rules, State, ramp};
use super::least::Tournament;
use super::queue::Queue;
use super::standing::Seen;
use crate::account::{Label, Verdict, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;

/// What the configuration, or a name's answer, says of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Its share in relation to the others'; 0 gives it no new sessions.
    pub weight: u32,
    /// Whether it is used only where no other can be.
    pub is_backup: bool,
    /// Sessions at once.
    pub max_sessions: Option<u32>,
    /// Where it is.
    pub zone: Option<Arc<str>>,
    /// Whether that is the zone that is preferred.
    pub is_preferred: bool,
}

impl Default for Traits {
    fn default() -> Self {
        Self { weight: 100, is_backup: false, max_sessions: None, zone: None, is_preferred: false }
    }
}

/// A backend.
#[derive(Debug)]
pub struct Backend {
    address: BackendAddr,
    label: Label,
    /// Its number within its pool, for life.
    slot: u32,
    max_sessions: Option<u32>,
    zone: Option<Arc<str>>,
    is_preferred: bool,
    chart: Mutex<Chart>,
    /// The chart's health and ejection, for those who only read.
    state: AtomicU8,
    is_ejected: AtomicBool,
    is_gone: AtomicBool,
    is_spare: AtomicBool,
    /// The weight in force, in [`FULL`]ths of a unit, and the sessions that it may have.
    weight: AtomicU32,
    pub(super) room: AtomicU32,
    /// Shared with one of the same address that was here before, as long as that has sessions.
    pub(super) load: Arc<AtomicU32>,
    /// Failures in a row, of connecting and of sessions that were reset before the first byte.
    connect_failures: AtomicU32,
    resets: AtomicU32,
    /// The tenant whose session the last of them was.
    reset_for: AtomicU32,
    early_resets: AtomicU64,
    ejections: AtomicU64,
    probes: [AtomicU64; Verdict::ALL.len()],
    /// How long the last probe took, in microseconds.
    probe_us: AtomicU32,
    /// Where its pool looks for the least loaded.
    pub(super) seat: Option<Arc<Tournament>>,
    /// Who waits for room.
    pub(super) queue: Option<Arc<Queue>>,
}

/// What changes seldom.
#[derive(Debug)]
struct Chart {
    weight: u32,
    /// The operator's, which counts instead.
    ordered: Option<u32>,
    is_backup: bool,
    health: Health,
    ejection: Ejection,
    /// Since when it comes back, and how long that takes.
    back: Option<(Moment, Duration)>,
    changed: (Moment, Cause),
}

/// What is shown of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its weight as ordered, configured or resolved.
    pub weight: u32,
    /// Whether it is a backup.
    pub is_backup: bool,
    /// While it is ejected, when that ends.
    pub ejected_until: Option<Moment>,
    /// When it was last treated in another way, and why.
    pub changed: (Moment, Cause),
}

impl Backend {
    /// A backend without sessions, and not in use before its pool says so.
    #[must_use]
    pub(super) fn new(
        address: BackendAddr,
        label: Label,
        slot: u32,
        traits: Traits,
        health: (Rules, State),
        changed: (Moment, Cause),
    ) -> Self {
        let (rules, state) = health;
        Self {
            address,
            label,
            slot,
            max_sessions: traits.max_sessions,
            zone: traits.zone,
            is_preferred: traits.is_preferred,
            chart: Mutex::new(Chart {
                weight: traits.weight,
                ordered: None,
                is_backup: traits.is_backup,
                health: Health::new(rules, state),
                ejection: Ejection::default(),
                back: None,
                changed,
            }),
            state: AtomicU8::new(state as u8),
            is_ejected: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            is_spare: AtomicBool::new(false),
            weight: AtomicU32::new(0),
            room: AtomicU32::new(u32::MAX),
            load: Arc::default(),
            connect_failures: AtomicU32::new(0),
            resets: AtomicU32::new(0),
            reset_for: AtomicU32::new(0),
            early_resets: AtomicU64::new(0),
            ejections: AtomicU64::new(0),
            probes: Default::default(),
            probe_us: AtomicU32::new(0),
            seat: None,
            queue: None,
        }
    }

    /// Where it accepts.
    #[must_use]
    pub fn address(&self) -> BackendAddr {
        self.address
    }

    /// Its name in metrics: the address.
    #[must_use]
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Its number within its pool.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Where it is.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Sessions that it may have at once.
    #[must_use]
    pub fn max_sessions(&self) -> Option<u32> {
        self.max_sessions
    }

    /// Its sessions now, over all workers, those being connected included.
    #[must_use]
    pub fn load(&self) -> u32 {
        self.load.load(Ordering::SeqCst)
    }

    /// The weight in force, in [`FULL`]ths of a unit; 0 gives it no new sessions.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::SeqCst)
    }

    /// Whether new sessions may go there.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.weight() > 0
    }

    /// Whether it gets the sessions that those in use have no room for.
    #[must_use]
    pub fn is_spare(&self) -> bool {
        self.is_spare.load(Ordering::SeqCst)
    }

    /// Whether it has room for a session more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.load() < self.room.load(Ordering::SeqCst)
    }

    /// What probes say of it.
    #[must_use]
    pub fn state(&self) -> State {
        State::from(self.state.load(Ordering::Acquire))
    }

    /// Whether sessions have put it out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.is_ejected.load(Ordering::Acquire)
    }

    /// Whether its name does not lead to it any more: nobody probes it then.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// How many sessions it reset, or lost, before its first byte.
    #[must_use]
    pub fn early_resets(&self) -> u64 {
        self.early_resets.load(Ordering::Relaxed)
    }

    /// How often it was ejected.
    #[must_use]
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Relaxed)
    }

    /// Its probes by result.
    pub fn probes(&self) -> impl Iterator<Item = (Verdict, u64)> + '_ {
        let counts = self.probes.iter().map(|count| count.load(Ordering::Relaxed));
        Verdict::ALL.into_iter().zip(counts)
    }

    /// How long the last probe took, in microseconds.
    #[must_use]
    pub fn probe_us(&self) -> u32 {
        self.probe_us.load(Ordering::Relaxed)
    }

    /// What is shown of it.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let chart = lock(&self.chart);
        Summary {
            weight: chart.weight_in_force(),
            is_backup: chart.is_backup,
            ejected_until: chart.ejection.until(),
            changed: chart.changed,
        }
    }

    /// Takes in one probe's result; whether it changed the state. A backend that was down, or `is_late`, comes back slowly.
    pub(super) fn observe(
        &self,
        verdict: Verdict,
        took: Duration,
        slow_start: Duration,
        is_late: bool,
        now: Moment,
    ) -> bool {
        if let Some(count) = self.probes.get(verdict as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.probe_us.store(u32::try_from(took.as_micros()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let Some(is_success) = verdict.is_success() else { return false };
        let mut chart = lock(&self.chart);
        let before = chart.health.state();
        let Some(state) = chart.health.observe(is_success) else { return false };
        if state == State::Healthy && (before == State::Unhealthy || is_late) {
            chart.come_back(now, slow_start);
        }
        chart.changed = (now, Cause::Probe(verdict));
        self.state.store(state as u8, Ordering::Release);
        true
    }

    /// Counts a failure of a session; how many there have been in a row. Where several tenants share the pool, resets of one
    /// of them in a row count once: it may be what that tenant sends.
    pub(super) fn failed(&self, failed: Failed, is_shared: bool) -> u32 {
        let Failed::Reset { tenant } = failed else {
            return self.connect_failures.fetch_add(1, Ordering::AcqRel).saturating_add(1);
        };
        self.early_resets.fetch_add(1, Ordering::Relaxed);
        let is_same = self.reset_for.swap(tenant, Ordering::AcqRel) == tenant;
        let more = u32::from(!is_shared || !is_same || self.resets.load(Ordering::Acquire) == 0);
        self.resets.fetch_add(more, Ordering::AcqRel).saturating_add(more)
    }

    /// Takes in that a session could connect. Nearly always there is nothing to take back, and nothing is written.
    pub fn connected(&self) {
        if self.connect_failures.load(Ordering::Relaxed) > 0 {
            self.connect_failures.store(0, Ordering::Relaxed);
        }
    }

    /// Takes in that a session got an answer.
    pub fn answered(&self) {
        if self.resets.load(Ordering::Relaxed) > 0 {
            self.resets.store(0, Ordering::Relaxed);
        }
    }

    /// Puts it out; for how long.
    pub(super) fn eject(&self, rules: super::ejection::Rules, cause: Cause, now: Moment) -> Duration {
        let mut chart = lock(&self.chart);
        let time = chart.ejection.eject(rules, now);
        chart.changed = (now, cause);
        self.is_ejected.store(true, Ordering::Release);
        self.ejections.fetch_add(1, Ordering::Relaxed);
        self.connect_failures.store(0, Ordering::Relaxed);
        self.resets.store(0, Ordering::Relaxed);
        drop(chart);
        self.set(0, self.room.load(Ordering::SeqCst), false);
        time
    }

    /// Lets it in again where its time is over; whether that is so.
    pub(super) fn expire(&self, gentle: Duration, now: Moment) -> bool {
        let mut chart = lock(&self.chart);
        let over = chart.ejection.expire(now);
        if over {
            chart.come_back(now, gentle);
            chart.changed = (now, Cause::EjectionOver);
            // What its last sessions came to meanwhile is not held against it, or the first failure would put it out again.
            self.connect_failures.store(0, Ordering::Relaxed);
            self.resets.store(0, Ordering::Relaxed);
            self.is_ejected.store(false, Ordering::Release);
        }
        over
    }

    /// Gives it the weight that its name says now; whether that is another one.
    pub(super) fn reweigh(&self, weight: u32, is_backup: bool, now: Moment) -> bool {
        let mut chart = lock(&self.chart);
        if (chart.weight, chart.is_backup) == (weight, is_backup) {
            return false;
        }
        (chart.weight, chart.is_backup) = (weight, is_backup);
        chart.changed = (now, Cause::Resolved);
        true
    }

    /// Gives it the operator's weight, whatever its name says; the one that counted before.
    pub(super) fn order(&self, weight: u32, now: Moment) -> u32 {
        let mut chart = lock(&self.chart);
        let before = chart.weight_in_force();
        chart.ordered = Some(weight);
        chart.changed = (now, Cause::Ordered);
        before
    }

    /// Its name does not lead to it any more: its sessions may finish.
    pub(super) fn retire(&self, now: Moment) {
        lock(&self.chart).changed = (now, Cause::NotResolved);
        self.is_gone.store(true, Ordering::Release);
        self.set(0, 0, false);
    }

    /// What is known of it, and when time alone will change that.
    pub(super) fn seen(&self, now: Moment) -> (Seen, Option<Moment>) {
        let mut chart = lock(&self.chart);
        let (ramp, next) = chart.back.map_or((FULL, None), |(since, span)| ramp(since, span, now));
        if ramp == FULL {
            chart.back = None;
        }
        let due = [next, chart.ejection.until()].into_iter().flatten().min();
        let seen = Seen {
            state: chart.health.state(),
            is_ejected: chart.ejection.is_out(),
            weight: chart.weight_in_force(),
            ramp,
            is_backup: chart.is_backup,
            is_preferred: self.is_preferred,
        };
        (seen, due)
    }

    /// How many sessions it may have while that much of it is back; at least one.
    pub(super) fn room_at(&self, ramp: u32) -> u32 {
        let part = |most: u32| u64::from(most) * u64::from(ramp) / u64::from(FULL);
        self.max_sessions.map_or(u32::MAX, |most| u32::try_from(part(most).max(1)).unwrap_or(u32::MAX))
    }

    /// Puts a weight and a room in force, and whether it helps out where those in use are full.
    pub(super) fn set(&self, weight: u32, room: u32, is_spare: bool) {
        self.is_spare.store(is_spare, Ordering::SeqCst);
        self.weight.store(weight, Ordering::SeqCst);
        self.room.store(room, Ordering::SeqCst);
        if let Some(seat) = &self.seat {
            seat.changed(self.slot as usize, || self.standing());
        }
    }

    /// Its sessions, and its weight where it has room.
    pub(super) fn standing(&self) -> (u32, u32) {
        let load = self.load();
        let weight = if load < self.room.load(Ordering::SeqCst) { self.weight() } else { 0 };
        (load, weight)
    }
}

impl Chart {
    fn weight_in_force(&self) -> u32 {
        self.ordered.unwrap_or(self.weight)
    }

    fn come_back(&mut self, now: Moment, span: Duration) {
        self.back = (!span.is_zero()).then_some((now, span));
    }
}

#[cfg(test)]
impl Backend {
    /// A healthy backend that is in no pool and may be used.
    pub(super) fn alone(address: &str, traits: Traits) -> Self {
        let label = crate::account::Labels::default().intern(address);
        let rules = Rules { rise: 1, fall: 1 };
        let address = BackendAddr(address.parse().unwrap());
        let backend =
            Self::new(address, label, 0, traits, (rules, State::Healthy), (Moment::default(), Cause::Start));
        backend.set(100 * FULL, backend.room_at(FULL), false);
        backend
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(max_sessions: Option<u32>) -> Arc<Backend> {
        Arc::new(Backend::alone("10.0.0.1:80", Traits { max_sessions, ..Traits::default() }))
    }

    #[test]
    fn probes_are_counted_by_result_and_what_is_short_here_is_no_verdict() {
        let backend = backend(None);
        let observe = |verdict| {
            backend.observe(verdict, Duration::from_micros(7), Duration::ZERO, false, Moment::default())
        };
        assert!(!observe(Verdict::Shortage) && !observe(Verdict::Passed));
        assert!(observe(Verdict::ConnectRefused));
        assert_eq!((backend.state(), backend.probe_us()), (State::Unhealthy, 7));
        assert_eq!(backend.summary().changed.1.word(), "connect_refused");
        let counted: Vec<_> =
            backend.probes().filter(|(_, count)| *count > 0).map(|(verdict, _)| verdict).collect();
        assert_eq!(counted, [Verdict::Passed, Verdict::ConnectRefused, Verdict::Shortage]);
    }

    #[test]
    fn failures_count_in_a_row_and_each_kind_for_itself() {
        let backend = backend(None);
        let (one, other) = (Failed::Reset { tenant: 1 }, Failed::Reset { tenant: 2 });
        let failed = |failed| backend.failed(failed, false);
        assert_eq!((failed(Failed::Connect), failed(Failed::Connect)), (1, 2));
        assert_eq!((failed(one), failed(one)), (1, 2));
        backend.connected();
        assert_eq!((failed(Failed::Connect), failed(other)), (1, 3));
        backend.answered();
        assert_eq!(failed(one), 1);
        let failed = |failed| backend.failed(failed, true);
        backend.answered();
        assert_eq!(
            [one, one, other, other, one].map(failed),
            [1, 1, 2, 2, 3],
            "of one in a row the first counts"
        );
        backend.answered();
        assert_eq!([one, one].map(failed), [1, 1]);
    }
}
