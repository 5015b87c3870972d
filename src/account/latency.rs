//! Latency histograms: one hdrhistogram per worker, merged at a scrape.

use std::sync::Mutex;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::lock;

/// Significant decimal digits of a recorded time.
const DIGITS: u8 = 2;

/// A longer time counts as this one, so that a histogram's memory has a bound: two weeks.
const LONGEST_US: u64 = 14 * 24 * 3600 * 1_000_000;

/// Times, in microseconds, with two significant digits.
#[derive(Clone, Debug)]
pub struct LatencyHistogram {
    histogram: Histogram<u64>,
    sum_us: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "2 is one of the digits that hdrhistogram takes")]
        let histogram = Histogram::new(DIGITS).expect("a histogram of two digits");
        Self { histogram, sum_us: 0 }
    }
}

impl LatencyHistogram {
    /// Records a time. A time under a microsecond counts as one, one over two weeks as two weeks.
    pub fn record(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).clamp(1, LONGEST_US);
        self.sum_us = self.sum_us.saturating_add(us);
        // The only error is a value out of range of a histogram that may not grow; this one grows.
        self.histogram.record(us).unwrap_or_default();
    }

    /// Adds what another worker recorded.
    pub fn add(&mut self, other: &Self) {
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
        // As in `record`.
        self.histogram.add(&other.histogram).unwrap_or_default();
    }

    /// The count.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// All of them together, in seconds.
    #[must_use]
    pub fn sum_seconds(&self) -> f64 {
        Duration::from_micros(self.sum_us).as_secs_f64()
    }

    /// The number of values of at most `bound`, to two digits.
    #[must_use]
    pub fn at_most(&self, bound: Duration) -> u64 {
        self.histogram.count_between(0, u64::try_from(bound.as_micros()).unwrap_or(u64::MAX))
    }

    /// The percentile.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Duration {
        Duration::from_micros(self.histogram.value_at_percentile(percent))
    }
}

/// One worker's histogram. Its lock is taken by other threads only at a scrape, for the time of a copy.
#[derive(Debug, Default)]
pub struct LatencyRecorder(Mutex<LatencyHistogram>);

impl LatencyRecorder {
    /// Records a time.
    pub fn record(&self, took: Duration) {
        lock(&self.0).record(took);
    }

    /// Adds what another recorder has.
    pub fn add(&self, other: &Self) {
        let theirs = other.times();
        lock(&self.0).add(&theirs);
    }

    /// All that was recorded so far.
    #[must_use]
    pub fn times(&self) -> LatencyHistogram {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_add_up_over_workers() {
        let (one, two) = (LatencyRecorder::default(), LatencyRecorder::default());
        one.record(Duration::from_millis(1));
        two.record(Duration::from_millis(20));
        two.record(Duration::from_secs(7200));
        two.record(Duration::ZERO);
        let mut all = one.times();
        all.add(&two.times());
        assert_eq!(all.count(), 4);
        assert_eq!(all.at_most(Duration::from_millis(5)), 2);
        assert_eq!(all.at_most(Duration::from_secs(9000)), 4);
        assert!((all.sum_seconds() - 7_200.021_001).abs() < 1e-9);
        assert!(all.percentile(50.0) >= Duration::from_micros(990));
    }

    #[test]
    fn duration_over_two_weeks_counts_as_two_weeks() {
        let longest = Duration::from_micros(LONGEST_US);
        for took in [longest, longest + Duration::from_micros(1), Duration::MAX] {
            let mut times = LatencyHistogram::default();
            times.record(took);
            assert!((times.sum_seconds() - longest.as_secs_f64()).abs() < 1e-9);
            assert!(times.percentile(100.0) < longest.mul_f64(1.01));
            assert_eq!((times.at_most(Duration::from_secs(3600)), times.at_most(Duration::MAX)), (0, 1));
        }
    }

    #[test]
    fn empty_histogram_has_no_duration() {
        let times = LatencyRecorder::default().times();
        assert_eq!(
            (times.count(), times.at_most(Duration::MAX), times.percentile(99.0)),
            (0, 0, Duration::ZERO)
        );
    }
}
