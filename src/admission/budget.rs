//! A tenant's bytes in one direction: a bucket that all its sessions on all workers share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::config::Bandwidth;

/// So many bytes in a second, and so many at once after a silence.
#[derive(Debug, Default)]
pub struct Budget {
    /// When the bucket is full again, in units of 1/64 ns: what was taken lies between now and then.
    full_at: AtomicU64,
    /// Bytes in each second; 0 is no limit.
    rate: AtomicU64,
    /// Bytes at once.
    burst: AtomicU64,
    delayed: AtomicU64,
    would_delay: AtomicU64,
    held: AtomicU64,
}

/// Units of the bucket's time in a nanosecond.
const FINE: u64 = 64;

impl Budget {
    /// From now on this much; `None` is no limit. What was taken stays taken.
    pub fn set(&self, limit: Option<Bandwidth>) {
        let (rate, burst) = limit.map_or((0, 0), |limit| (limit.bytes_per_second, limit.burst));
        self.burst.store(burst, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// Whether there is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) > 0
    }

    /// Takes at most `want` bytes, and tells how many; 0 where the bucket is empty.
    #[must_use]
    pub fn take(&self, want: u64, now: Moment) -> u64 {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return want;
        }
        let now = now.as_nanos().saturating_mul(FINE);
        let full = time_of(self.burst.load(Ordering::Relaxed), rate);
        let mut granted = 0;
        let take = |full_at: u64| {
            let owed = full_at.saturating_sub(now);
            granted = want.min(bytes_in(full.saturating_sub(owed), rate));
            (granted > 0).then(|| full_at.max(now).saturating_add(time_of(granted, rate)))
        };
        match self.full_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            Ok(_) => granted,
            Err(_) => 0,
        }
    }

    /// How long sessions have waited, all together.
    #[must_use]
    pub fn delayed(&self) -> Duration {
        Duration::from_nanos(self.delayed.load(Ordering::Relaxed))
    }

    /// How many reads would have had to wait.
    #[must_use]
    pub fn would_delay(&self) -> u64 {
        self.would_delay.load(Ordering::Relaxed)
    }

    /// The bytes that sessions hold, because their other ends do not take them.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }
}

/// The fine time in which so many bytes may pass.
fn time_of(bytes: u64, rate: u64) -> u64 {
    let time = u128::from(bytes) * u128::from(FINE * 1_000_000_000) / u128::from(rate.max(1));
    u64::try_from(time).unwrap_or(u64::MAX)
}

/// The bytes that may pass in a fine time.
fn bytes_in(time: u64, rate: u64) -> u64 {
    let bytes = u128::from(time) * u128::from(rate) / u128::from(FINE * 1_000_000_000);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_gives_a_seconds_worth_and_a_silence_a_burst() {
        let budget = Budget::default();
        let at_ms = |ms: u64| Moment::from_nanos(ms * 1_000_000);
        assert!(!budget.is_limited());
        assert_eq!(budget.take(u64::MAX, at_ms(0)), u64::MAX);
        budget.set(Some(Bandwidth { bytes_per_second: 1 << 20, burst: 1 << 16 }));
        assert!(budget.is_limited());
        assert_eq!(budget.take(1 << 20, at_ms(10_000)), 1 << 16);
        assert_eq!(budget.take(1, at_ms(10_000)), 0);
        let sum: u64 = (1..=1000).map(|ms| budget.take(u64::MAX, at_ms(10_000 + ms))).sum();
        assert!(((1 << 20) - 1100..=1 << 20).contains(&sum), "{sum}");
        budget.set(None);
        assert!(!budget.is_limited());
    }
}
