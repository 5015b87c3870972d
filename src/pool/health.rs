//! What probes say of a backend: so many successes in a row raise it, so many failures fell it.

use std::time::Duration;

use crate::clock::Moment;

/// The health state of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HealthState {
    /// Not probed yet: used only where no backend is known to be healthy.
    Unknown,
    /// Used.
    Healthy,
    /// Not used.
    Unhealthy,
}

impl HealthState {
    /// The label in log and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

impl From<u8> for HealthState {
    fn from(state: u8) -> Self {
        match state {
            state if state == Self::Healthy as u8 => Self::Healthy,
            state if state == Self::Unhealthy as u8 => Self::Unhealthy,
            _ => Self::Unknown,
        }
    }
}

/// The parts of a whole weight.
pub const FULL: u32 = 64;

/// The least time from one part of a slow start to the next.
const STEP: Duration = Duration::from_millis(100);

/// How much counts of a backend that has been coming back since `since` and takes `span` for it, from 1 to [`FULL`]; and
/// when there will be more, where it is not all.
#[must_use]
pub fn ramp(since: Moment, span: Duration, now: Moment) -> (u32, Option<Moment>) {
    let passed = now.since(since);
    if passed >= span {
        return (FULL, None);
    }
    let parts = passed.as_nanos() * u128::from(FULL) / span.as_nanos().max(1);
    let parts = u32::try_from(parts).unwrap_or(FULL).clamp(1, FULL);
    let step = (span / FULL).max(STEP).min(span.saturating_sub(passed));
    (parts, Some(now + step))
}

/// Results in a row that change the state; both at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthRules {
    /// Successes that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures that make a healthy backend unhealthy.
    pub fall: u32,
}

/// The health state of one backend from its probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeHealth {
    rules: HealthRules,
    state: HealthState,
    /// Results in a row that speak against the state.
    against: u32,
    /// Whether the first result of all is still to come.
    is_untested: bool,
}

impl ProbeHealth {
    /// A backend in a state that is known, or unknown.
    #[must_use]
    pub fn new(rules: HealthRules, state: HealthState) -> Self {
        Self { rules, state, against: 0, is_untested: state == HealthState::Unknown }
    }

    /// A backend that counts as healthy until its first result.
    #[must_use]
    pub fn presumed_healthy(rules: HealthRules) -> Self {
        Self { rules, state: HealthState::Healthy, against: 0, is_untested: true }
    }

    /// The same memory under other rules.
    #[must_use]
    pub fn with_rules(self, rules: HealthRules) -> Self {
        Self { rules, ..self }
    }

    /// What is believed now.
    #[must_use]
    pub fn state(&self) -> HealthState {
        self.state
    }

    /// Records a probe's result; returns the new state, if it changed.
    ///
    /// The first result of all decides at once, so that a backend is not left unknown for `rise` intervals.
    pub fn observe(&mut self, success: bool) -> Option<HealthState> {
        let (wanted, needed) = if success {
            (HealthState::Healthy, self.rules.rise)
        } else {
            (HealthState::Unhealthy, self.rules.fall)
        };
        let is_first = std::mem::take(&mut self.is_untested);
        if self.state == wanted {
            self.against = 0;
            return None;
        }
        self.against += 1;
        if !is_first && self.against < needed {
            return None;
        }
        self.against = 0;
        self.state = wanted;
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: HealthRules = HealthRules { rise: 2, fall: 3 };

    fn observe(health: &mut ProbeHealth, results: &str) -> Vec<Option<HealthState>> {
        results.chars().map(|result| health.observe(result == '+')).collect()
    }

    #[test]
    fn first_probe_result_decides() {
        assert_eq!(ProbeHealth::new(RULES, HealthState::Unknown).observe(true), Some(HealthState::Healthy));
        assert_eq!(
            ProbeHealth::new(RULES, HealthState::Unknown).observe(false),
            Some(HealthState::Unhealthy)
        );
    }

    #[test]
    fn presumed_healthy_holds_until_the_first_failure() {
        let mut health = ProbeHealth::presumed_healthy(RULES);
        assert_eq!(
            (health.state(), health.observe(false)),
            (HealthState::Healthy, Some(HealthState::Unhealthy))
        );
        let mut health = ProbeHealth::presumed_healthy(RULES);
        assert_eq!(observe(&mut health, "+--"), [None; 3]);
        assert_eq!(
            health.with_rules(HealthRules { rise: 1, fall: 1 }).observe(false),
            Some(HealthState::Unhealthy)
        );
    }

    #[test]
    fn backend_falls_at_third_consecutive_failure_and_rises_at_second_success() {
        let mut health = ProbeHealth::new(RULES, HealthState::Healthy);
        assert_eq!(observe(&mut health, "--+--"), [None; 5]);
        assert_eq!(health.observe(false), Some(HealthState::Unhealthy));
        assert_eq!(observe(&mut health, "-+-+"), [None; 4]);
        assert_eq!(health.observe(true), Some(HealthState::Healthy));
        assert_eq!(health.state().as_str(), "healthy");
    }

    #[test]
    fn slow_start_grows_linearly() {
        let at = |milliseconds| Moment::default() + Duration::from_millis(milliseconds);
        let span = Duration::from_secs(64);
        assert_eq!(ramp(at(0), span, at(0)), (1, Some(at(1_000))));
        assert_eq!(ramp(at(5), span, at(32_005)), (32, Some(at(33_005))));
        assert_eq!(ramp(at(0), span, at(63_500)), (63, Some(at(64_000))), "not beyond the end");
        assert_eq!(ramp(at(0), span, at(64_000)), (FULL, None));
        assert_eq!(
            ramp(at(0), Duration::from_millis(640), at(0)),
            (1, Some(at(100))),
            "no more often than this"
        );
        assert_eq!(ramp(at(0), Duration::ZERO, at(0)), (FULL, None));
    }

    #[test]
    fn one_result_changes_health_with_rise_and_fall_of_one() {
        let mut health = ProbeHealth::new(HealthRules { rise: 1, fall: 1 }, HealthState::Healthy);
        assert_eq!(observe(&mut health, "-+"), [Some(HealthState::Unhealthy), Some(HealthState::Healthy)]);
        assert_eq!(
            (HealthState::Unknown.as_str(), HealthState::Unhealthy.as_str()),
            ("unknown", "unhealthy")
        );
    }
}
