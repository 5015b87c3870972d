//! The passive verdict: a backend that fails real sessions in a row is left out for a time.

use std::time::Duration;

use crate::clock::Moment;

/// The longest time out, however often a backend was ejected.
pub const LONGEST: Duration = Duration::from_secs(600);

/// The ejection settings of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EjectionRules {
    /// Failures in a row that eject it; 0 is never.
    pub consecutive_failures: u32,
    /// The first time out; it doubles with each ejection that follows.
    pub base: Duration,
    /// Percent of the pool's backends that may be out at once.
    pub max_percent: u32,
}

impl EjectionRules {
    /// How many of so many backends may be out at once. At least one where ejection is wanted at all, or it would do nothing
    /// for small pools; never all of several backends.
    #[must_use]
    pub fn most(self, backends: usize) -> usize {
        let percent = usize::try_from(self.max_percent).unwrap_or(100);
        if percent == 0 { 0 } else { (backends * percent / 100).max(1).min(backends.saturating_sub(1)) }
    }

    /// The time out after so many ejections.
    #[must_use]
    pub fn time(self, times: u32) -> Duration {
        let doubled = 1_u32.checked_shl(times.saturating_sub(1)).unwrap_or(u32::MAX);
        self.base.saturating_mul(doubled).min(LONGEST.max(self.base))
    }
}

/// The ejections of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EjectionState {
    /// Ejections that count for the length of the next.
    times: u32,
    /// While it is out, when that ends.
    until: Option<Moment>,
    /// While it is in, since when.
    since: Moment,
}

impl EjectionState {
    /// While it is out, when that ends.
    #[must_use]
    pub fn until(self) -> Option<Moment> {
        self.until
    }

    /// Whether it is out.
    #[must_use]
    pub fn is_out(self) -> bool {
        self.until.is_some()
    }

    /// Ejects it; returns for how long. A probe that succeeds does not end it: what failed was not a probe.
    ///
    /// For each base time that it was in since the last ejection ended, one ejection is forgotten.
    pub fn eject(&mut self, rules: EjectionRules, now: Moment) -> Duration {
        let good = now.since(self.since).as_nanos().checked_div(rules.base.as_nanos()).unwrap_or(u128::MAX);
        self.times = self.times.saturating_sub(u32::try_from(good).unwrap_or(u32::MAX)).saturating_add(1);
        let time = rules.time(self.times);
        self.until = Some(now + time);
        time
    }

    /// Ends the ejection if its time is over; returns whether it did.
    pub fn expire(&mut self, now: Moment) -> bool {
        let over = self.until.is_some_and(|until| now >= until);
        if over {
            self.until = None;
            self.since = now;
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EjectionRules =
        EjectionRules { consecutive_failures: 3, base: Duration::from_secs(30), max_percent: 50 };

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(0) + Duration::from_secs(seconds)
    }

    #[test]
    fn ejection_ends_exactly_at_its_time() {
        let mut ejection = EjectionState::default();
        ejection.eject(RULES, at(100));
        assert!(!ejection.expire(at(129)) && ejection.is_out());
        assert!(ejection.expire(at(130)) && !ejection.is_out());
        assert!(!ejection.expire(at(131)), "once");
    }

    #[test]
    fn times_double_up_to_ten_minutes_and_decay() {
        let mut ejection = EjectionState::default();
        let mut now = 0;
        for seconds in [30, 60, 120, 240, 480, 600, 600] {
            assert_eq!(ejection.eject(RULES, at(now)), Duration::from_secs(seconds));
            now += seconds;
            assert!(ejection.expire(at(now)));
        }
        // Five base times in: seven ejections count as two, and the next is the third.
        assert_eq!(ejection.eject(RULES, at(now + 150)), Duration::from_secs(120));
        assert!(ejection.expire(at(now + 10_000)));
        assert_eq!(ejection.eject(RULES, at(now + 20_000)), Duration::from_secs(30));
    }

    #[test]
    fn base_time_above_ten_minutes_is_kept_and_zero_base_time_has_no_duration() {
        let hour = EjectionRules { base: Duration::from_secs(3_600), ..RULES };
        assert_eq!((hour.time(1), hour.time(9)), (Duration::from_secs(3_600), Duration::from_secs(3_600)));
        let mut ejection = EjectionState::default();
        assert_eq!(ejection.eject(EjectionRules { base: Duration::ZERO, ..RULES }, at(0)), Duration::ZERO);
        assert!(ejection.expire(at(0)));
        assert_eq!(RULES.time(u32::MAX), LONGEST);
    }

    #[test]
    fn some_backends_may_be_ejected_but_never_all() {
        let most = |percent, backends| EjectionRules { max_percent: percent, ..RULES }.most(backends);
        assert_eq!((most(50, 10), most(50, 3), most(10, 3), most(0, 10)), (5, 1, 1, 0));
        assert_eq!((most(100, 10), most(100, 1), most(50, 0)), (9, 0, 0));
    }
}
