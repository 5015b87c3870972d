//! Health of one address, kept over reloads for the backend of that address in its pool.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::cause::{ChangeCause, SessionFailure};
use super::ejection::{EjectionRules, EjectionState};
use super::health::{FULL, HealthState, ProbeHealth, ramp};
use crate::account::{ProbeResult, lock};
use crate::clock::Moment;

/// The health of an address, from probes and sessions.
#[derive(Debug)]
pub(super) struct HealthRecord {
    details: Mutex<HealthDetails>,
    /// Health state and ejection of the details, for lock-free reads.
    state: AtomicU8,
    is_ejected: AtomicBool,
    /// Failures in a row, of connecting and of sessions that were reset before the first byte.
    connect_failures: AtomicU32,
    resets: AtomicU32,
    /// The tenant whose session the last of them was.
    reset_for: AtomicU32,
    pub(super) early_resets: AtomicU64,
    pub(super) ejections: AtomicU64,
    pub(super) probes: [AtomicU64; ProbeResult::ALL.len()],
    /// How long the last probe took, in microseconds.
    pub(super) probe_us: AtomicU32,
    /// Whether its first probe is over, or never will be.
    first_probe_is_over: AtomicBool,
}

/// Rarely changed fields.
#[derive(Debug)]
struct HealthDetails {
    health: ProbeHealth,
    ejection: EjectionState,
    /// Since when it comes back, and how long that takes.
    back: Option<(Moment, Duration)>,
    changed: (Moment, ChangeCause),
}

/// The health as the pool's selection sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct HealthView {
    pub(super) state: HealthState,
    pub(super) is_ejected: bool,
    /// How much of it is back, of [`FULL`].
    pub(super) ramp: u32,
    /// When time alone changes any of this.
    pub(super) due: Option<Moment>,
}

impl HealthRecord {
    /// Of a new address.
    pub(super) fn new(health: ProbeHealth, changed: (Moment, ChangeCause)) -> Self {
        Self {
            state: AtomicU8::new(health.state() as u8),
            details: Mutex::new(HealthDetails {
                health,
                ejection: EjectionState::default(),
                back: None,
                changed,
            }),
            is_ejected: AtomicBool::new(false),
            connect_failures: AtomicU32::new(0),
            resets: AtomicU32::new(0),
            reset_for: AtomicU32::new(0),
            early_resets: AtomicU64::new(0),
            ejections: AtomicU64::new(0),
            probes: Default::default(),
            probe_us: AtomicU32::new(0),
            first_probe_is_over: AtomicBool::new(false),
        }
    }

    pub(super) fn state(&self) -> HealthState {
        HealthState::from(self.state.load(Ordering::Acquire))
    }

    /// Whether a probe has said something of it, if only that it could not be sent.
    pub(super) fn was_probed(&self) -> bool {
        self.first_probe_is_over.load(Ordering::Acquire)
    }

    pub(super) fn end_first_probe(&self) {
        self.first_probe_is_over.store(true, Ordering::Release);
    }

    pub(super) fn is_ejected(&self) -> bool {
        self.is_ejected.load(Ordering::Acquire)
    }

    /// When an ejection ends, and how it was last treated in another way.
    pub(super) fn summary(&self) -> (Option<Moment>, (Moment, ChangeCause)) {
        let chart = lock(&self.details);
        (chart.ejection.until(), chart.changed)
    }

    pub(super) fn set_cause(&self, now: Moment, cause: ChangeCause) {
        lock(&self.details).changed = (now, cause);
    }

    /// Goes on with another pool's health checks.
    pub(super) fn follow(&self, health: impl FnOnce(ProbeHealth) -> ProbeHealth) {
        let mut chart = lock(&self.details);
        chart.health = health(chart.health);
        self.state.store(chart.health.state() as u8, Ordering::Release);
    }

    /// Records a probe's result; returns whether it changed the state. A backend that was down, or `is_late`, comes
    /// back slowly.
    pub(super) fn observe(
        &self,
        verdict: ProbeResult,
        took: Duration,
        slow_start: Duration,
        is_late: bool,
        now: Moment,
    ) -> bool {
        if let Some(count) = self.probes.get(verdict as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.probe_us.store(u32::try_from(took.as_micros()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let mut chart = lock(&self.details);
        let before = chart.health.state();
        let Some(state) = verdict.is_success().and_then(|is_success| chart.health.observe(is_success)) else {
            self.end_first_probe();
            return false;
        };
        if state == HealthState::Healthy && (before == HealthState::Unhealthy || is_late) {
            chart.begin_slow_start(now, slow_start);
        }
        chart.changed = (now, ChangeCause::Probe(verdict));
        self.state.store(state as u8, Ordering::Release);
        self.end_first_probe();
        true
    }

    /// Counts a failure of a session; how many there have been in a row. Where several tenants share the pool, resets of one
    /// of them in a row count once: it may be what that tenant sends.
    pub(super) fn failed(&self, failed: SessionFailure, is_shared: bool) -> u32 {
        let SessionFailure::Reset { tenant } = failed else {
            return self.connect_failures.fetch_add(1, Ordering::AcqRel).saturating_add(1);
        };
        self.early_resets.fetch_add(1, Ordering::Relaxed);
        let is_same = self.reset_for.swap(tenant, Ordering::AcqRel) == tenant;
        let more = u32::from(!is_shared || !is_same || self.resets.load(Ordering::Acquire) == 0);
        self.resets.fetch_add(more, Ordering::AcqRel).saturating_add(more)
    }

    /// Records a successful connect. Nearly always there is no failure to reset, and nothing is written.
    pub(super) fn connected(&self) {
        if self.connect_failures.load(Ordering::Relaxed) > 0 {
            self.connect_failures.store(0, Ordering::Relaxed);
        }
    }

    /// Records that a session got an answer.
    pub(super) fn answered(&self) {
        if self.resets.load(Ordering::Relaxed) > 0 {
            self.resets.store(0, Ordering::Relaxed);
        }
    }

    /// Ejects it; returns for how long.
    pub(super) fn eject(&self, rules: EjectionRules, cause: ChangeCause, now: Moment) -> Duration {
        let mut chart = lock(&self.details);
        let time = chart.ejection.eject(rules, now);
        chart.changed = (now, cause);
        self.is_ejected.store(true, Ordering::Release);
        self.ejections.fetch_add(1, Ordering::Relaxed);
        self.connect_failures.store(0, Ordering::Relaxed);
        self.resets.store(0, Ordering::Relaxed);
        time
    }

    /// Ends the ejection if its time is over; returns whether it did.
    pub(super) fn expire(&self, gentle: Duration, now: Moment) -> bool {
        let mut chart = lock(&self.details);
        let over = chart.ejection.expire(now);
        if over {
            chart.begin_slow_start(now, gentle);
            chart.changed = (now, ChangeCause::EjectionOver);
            // Failures of its remaining sessions during the ejection are not counted; otherwise the first failure would
            // eject it again.
            self.connect_failures.store(0, Ordering::Relaxed);
            self.resets.store(0, Ordering::Relaxed);
            self.is_ejected.store(false, Ordering::Release);
        }
        over
    }

    /// What is known now, and when time alone will change that.
    pub(super) fn view(&self, now: Moment) -> HealthView {
        let mut chart = lock(&self.details);
        let (ramp, next) = chart.back.map_or((FULL, None), |(since, span)| ramp(since, span, now));
        if ramp == FULL {
            chart.back = None;
        }
        let due = [next, chart.ejection.until()].into_iter().flatten().min();
        HealthView { state: chart.health.state(), is_ejected: chart.ejection.is_out(), ramp, due }
    }
}

impl HealthDetails {
    fn begin_slow_start(&mut self, now: Moment, span: Duration) {
        self.back = (!span.is_zero()).then_some((now, span));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> HealthRecord {
        let health =
            ProbeHealth::new(crate::pool::health::HealthRules { rise: 1, fall: 1 }, HealthState::Healthy);
        HealthRecord::new(health, (Moment::default(), ChangeCause::Start))
    }

    #[test]
    fn probes_are_counted_by_result_and_a_local_shortage_changes_no_health() {
        let health = health();
        let observe = |verdict| {
            health.observe(verdict, Duration::from_micros(7), Duration::ZERO, false, Moment::default())
        };
        assert!(!observe(ProbeResult::Shortage) && !observe(ProbeResult::Passed));
        assert!(observe(ProbeResult::ConnectRefused));
        assert_eq!((health.state(), health.probe_us.load(Ordering::Relaxed)), (HealthState::Unhealthy, 7));
        assert_eq!(health.summary().1.1.as_str(), "connect_refused");
        let counts = ProbeResult::ALL.into_iter().zip(&health.probes);
        let counted: Vec<_> = counts
            .filter(|(_, count)| count.load(Ordering::Relaxed) > 0)
            .map(|(verdict, _)| verdict)
            .collect();
        assert_eq!(counted, [ProbeResult::Passed, ProbeResult::ConnectRefused, ProbeResult::Shortage]);
    }

    #[test]
    fn failures_count_in_a_row_and_each_kind_for_itself() {
        let health = health();
        let (one, other) = (SessionFailure::Reset { tenant: 1 }, SessionFailure::Reset { tenant: 2 });
        let failed = |failed| health.failed(failed, false);
        assert_eq!((failed(SessionFailure::Connect), failed(SessionFailure::Connect)), (1, 2));
        assert_eq!((failed(one), failed(one)), (1, 2));
        health.connected();
        assert_eq!((failed(SessionFailure::Connect), failed(other)), (1, 3));
        health.answered();
        assert_eq!(failed(one), 1);
        let failed = |failed| health.failed(failed, true);
        health.answered();
        assert_eq!(
            [one, one, other, other, one].map(failed),
            [1, 1, 2, 2, 3],
            "of one in a row the first counts"
        );
        health.answered();
        assert_eq!([one, one].map(failed), [1, 1]);
    }
}
