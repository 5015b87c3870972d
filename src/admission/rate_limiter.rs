//! So many in a time: a token bucket on one atomic number, exact over all workers.

use std::time::Duration;

use crate::atomic::{AtomicU64, Ordering};
use crate::clock::Moment;
use crate::config;

/// A rate limit with its burst. Without a limit everything passes.
///
/// The bucket is stored as the time when it is full again (GCRA, ITU-T I.371). Each admission moves that by one
/// interval; one that would move it further ahead of now than the burst allows is refused. A reload changes interval
/// and burst: what was taken stays taken, but no more than all of the new burst.
#[derive(Debug, Default)]
pub struct RateLimiter {
    full_at: AtomicU64,
    /// Nanoseconds from one to the next; 0 is no limit. With [`FRESH`] set, no request has come since it or the
    /// burst changed.
    interval: AtomicU64,
    /// How far ahead of now the bucket's time may be before one more passes: the burst but one.
    tolerance: AtomicU64,
}

/// In an interval: the rate is another one than before.
const FRESH: u64 = 1 << 63;

impl RateLimiter {
    /// Sets the rate; `None` means no limit.
    pub fn set(&self, rate: Option<config::RateLimit>) {
        let (interval, tolerance) = rate.map_or((0, 0), |rate| {
            let interval = nanos(rate.interval).min(FRESH - 1);
            (interval, interval.saturating_mul(rate.burst.saturating_sub(1)))
        });
        let before = self.interval.load(Ordering::Relaxed) & !FRESH;
        if (before, self.tolerance.load(Ordering::Relaxed)) != (interval, tolerance) {
            self.tolerance.store(tolerance, Ordering::Relaxed);
            // A reader of `FRESH` also sees the new tolerance. Exchanged, as loom lets a store go under that another
            // thread's exchange was before.
            let mark = if interval == 0 { 0 } else { FRESH };
            self.interval.swap(interval | mark, Ordering::AcqRel);
        }
    }

    /// Whether one more may pass now. A refusal uses nothing.
    #[must_use]
    #[inline]
    pub fn admit(&self, now: Moment) -> bool {
        let interval = self.interval.load(Ordering::Acquire);
        if interval & FRESH != 0 {
            self.begin(now, interval);
        }
        let interval = interval & !FRESH;
        interval == 0 || take(&self.full_at, now, interval, self.tolerance.load(Ordering::Relaxed))
    }

    /// The first request after a change caps the bucket at the emptiest state of the new rate: by a slower one
    /// before, it might be full again in an hour.
    #[cold]
    fn begin(&self, now: Moment, fresh: u64) {
        let interval = fresh & !FRESH;
        if self.interval.compare_exchange(fresh, interval, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let ahead = self.tolerance.load(Ordering::Relaxed).saturating_add(interval);
            self.full_at.fetch_min(now.as_nanos().saturating_add(ahead), Ordering::AcqRel);
        }
    }
}

/// Takes one, where `full_at` is ahead of now by no more than `tolerance`. One atomic operation, unless another
/// worker's comes between.
pub(super) fn take(full_at: &AtomicU64, now: Moment, interval: u64, tolerance: u64) -> bool {
    let now = now.as_nanos();
    let one_more = |full_at: u64| {
        (full_at.saturating_sub(now) <= tolerance).then(|| full_at.max(now).saturating_add(interval))
    };
    full_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos(ms * 1_000_000)
    }

    fn rate(per_second: u64, burst: u64) -> RateLimiter {
        let rate = RateLimiter::default();
        rate.set(Some(config::RateLimit {
            interval: Duration::from_secs(1) / u32::try_from(per_second).unwrap(),
            burst,
        }));
        rate
    }

    fn admitted(rate: &RateLimiter, tries: usize, now: Moment) -> usize {
        (0..tries).filter(|_| rate.admit(now)).count()
    }

    #[test]
    fn last_of_a_burst_passes_and_the_next_does_not() {
        let rate = rate(10, 5);
        assert_eq!(admitted(&rate, 20, at_ms(0)), 5);
        assert!(!rate.admit(Moment::from_nanos(99_999_999)), "a nanosecond too early");
        assert!(rate.admit(at_ms(100)));
        assert!(!rate.admit(at_ms(100)));
        assert_eq!(admitted(&rate, 20, at_ms(10_000)), 5, "a long silence fills no more than the burst");
    }

    #[test]
    fn burst_of_one_keeps_the_interval() {
        let rate = rate(1000, 1);
        let admitted: usize =
            (0..10_000).map(|tenth| admitted(&rate, 3, Moment::from_nanos(tenth * 100_000))).sum();
        assert_eq!(admitted, 1000);
    }

    #[test]
    fn no_rate_limit_admits_all() {
        let rate = RateLimiter::default();
        assert_eq!(admitted(&rate, 100, at_ms(0)), 100);
        rate.set(None);
        assert_eq!(admitted(&rate, 100, at_ms(0)), 100);
    }

    #[test]
    fn debt_of_a_slow_rate_is_at_most_the_burst_of_a_fast_one() {
        let rate = RateLimiter::default();
        rate.set(Some(config::RateLimit { interval: Duration::from_secs(6), burst: 600 }));
        assert_eq!(admitted(&rate, 1_000, at_ms(0)), 600, "full again in an hour");
        let fast = Some(config::RateLimit { interval: Duration::from_millis(10), burst: 100 });
        rate.set(fast);
        assert_eq!(admitted(&rate, 1_000, at_ms(0)), 0, "what was taken stays taken");
        assert_eq!(admitted(&rate, 1_000, at_ms(500)), 50);
        rate.set(fast);
        assert_eq!(admitted(&rate, 1_000, at_ms(500)), 0, "the same once more gives nothing");
        assert_eq!(admitted(&rate, 1_000, at_ms(60_000)), 100);
    }

    #[test]
    fn another_rate_holds_at_once_and_gives_nothing_back() {
        let rate = rate(10, 10);
        assert_eq!(admitted(&rate, 20, at_ms(0)), 10);
        rate.set(Some(config::RateLimit { interval: Duration::from_millis(10), burst: 100 }));
        assert_eq!(
            admitted(&rate, 200, at_ms(0)),
            0,
            "the bucket is a second behind, of which 990 ms are allowed"
        );
        assert_eq!(admitted(&rate, 200, at_ms(1000)), 100);
        rate.set(Some(config::RateLimit { interval: Duration::from_secs(3600), burst: 1 }));
        assert!(!rate.admit(at_ms(1999)));
        assert!(rate.admit(at_ms(2000)));
        assert!(!rate.admit(at_ms(3_000_000)));
    }

    #[test]
    fn rate_limiter_tolerates_stopped_and_largest_time() {
        let slow = RateLimiter::default();
        slow.set(Some(config::RateLimit { interval: Duration::from_secs(3600), burst: u64::from(u32::MAX) }));
        assert!(slow.admit(at_ms(0)) && slow.admit(Moment::from_nanos(u64::MAX)));
        assert!(slow.admit(at_ms(0)), "a burst of centuries");
    }
}
