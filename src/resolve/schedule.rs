//! When a name is looked up again.

use std::time::Duration;

/// The least time to the next question after a failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The schedule of lookups of one name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LookupSchedule {
    min: Duration,
    max: Duration,
    /// After the next failure; `None` where the last lookup did not fail.
    retry: Option<Duration>,
}

impl LookupSchedule {
    /// An answer holds `min` at least and `max` at most.
    #[must_use]
    pub(crate) const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, retry: None }
    }

    /// Whether the last lookup failed.
    #[must_use]
    pub(crate) const fn is_failing(self) -> bool {
        self.retry.is_some()
    }

    /// The time to the next question after an answer that holds for `ttl`.
    pub(crate) fn found(&mut self, ttl: Duration) -> Duration {
        self.retry = None;
        ttl.min(self.max).max(self.min)
    }

    /// The time to the next question after a failure: it doubles with each that follows.
    pub(crate) fn failed(&mut self) -> Duration {
        let first = self.min.max(FIRST_RETRY);
        let time = self.retry.unwrap_or(first);
        self.retry = Some(time.saturating_mul(2).min(self.max.max(first)));
        time
    }
}

/// `time` and up to a tenth more, by a `roll` from 0 to 1: names that were asked for at once do not stay together.
#[must_use]
pub(crate) fn spread(time: Duration, roll: f64) -> Duration {
    time.saturating_add((time / 10).mul_f64(roll.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn failures_wait_longer_and_longer_and_an_answer_ends_that() {
        let mut pace = LookupSchedule::new(secs(5), secs(30));
        assert!(!pace.is_failing());
        let waits: Vec<_> = (0..5).map(|_| pace.failed()).collect();
        assert_eq!(waits, [5, 10, 20, 30, 30].map(secs));
        assert!(pace.is_failing());
        assert_eq!(pace.found(secs(12)), secs(12));
        assert!(!pace.is_failing());
        assert_eq!(pace.failed(), secs(5));
    }

    #[test]
    fn failed_lookup_is_not_repeated_at_once_with_any_bounds() {
        let mut pace = LookupSchedule::new(Duration::ZERO, Duration::ZERO);
        assert_eq!([pace.failed(), pace.failed(), pace.found(secs(9))], [secs(1), secs(1), Duration::ZERO]);
    }

    proptest! {
        #[test]
        fn answer_ttl_is_kept_within_the_bounds(
            min in 0_u64..100_000, more in 0_u64..100_000, ttl: u32, failures in 0_u8..9, roll in 0.0_f64..=1.0,
        ) {
            let mut pace = LookupSchedule::new(secs(min), secs(min + more));
            for _ in 0..failures {
                let wait = pace.failed();
                prop_assert!(wait >= secs(min.max(1)) && wait <= secs((min + more).max(1)));
            }
            let wait = pace.found(secs(ttl.into()));
            prop_assert!(wait >= secs(min) && wait <= secs(min + more));
            prop_assert!(wait == secs(ttl.into()) || wait == secs(min) || wait == secs(min + more));
            let late = spread(wait, roll);
            prop_assert!(late >= wait && late <= wait + wait / 10 + Duration::from_nanos(1));
        }
    }
}
