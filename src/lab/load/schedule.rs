//! What comes when, and over which endpoint: pure, given random numbers.

use std::time::Duration;

use crate::clock::Moment;

/// How often each endpoint is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Skew {
    /// All alike.
    Uniform,
    /// The n-th as often as `1 / n^exponent` (Zipf).
    Zipf(f64),
}

impl std::str::FromStr for Skew {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "uniform" {
            return Ok(Self::Uniform);
        }
        let exponent = text.strip_prefix("zipf:").and_then(|exponent| exponent.parse::<f64>().ok());
        exponent.filter(|exponent| exponent.is_finite() && *exponent > 0.0).map(Self::Zipf).ok_or_else(|| {
            format!("must be \"uniform\" or \"zipf:\" and a positive exponent, found \"{text}\"")
        })
    }
}

/// Draws endpoints by their share.
#[derive(Clone, Debug)]
pub struct SkewedShares {
    /// The sum of the shares up to and with each endpoint; the last is the sum of all.
    sums: Vec<f64>,
}

impl SkewedShares {
    /// The shares of `count` endpoints, at least one.
    #[must_use]
    pub fn new(skew: Skew, count: usize) -> Self {
        let mut sum = 0.0;
        let sums = (1..=count.max(1)).map(|place| {
            #[expect(clippy::cast_precision_loss, reason = "fewer endpoints than 2^52")]
            let place = place as f64;
            sum += match skew {
                Skew::Uniform => 1.0,
                Skew::Zipf(exponent) => place.powf(-exponent),
            };
            sum
        });
        Self { sums: sums.collect() }
    }

    /// The endpoint that `roll`, a number from 0 up to 1, stands for.
    #[must_use]
    pub fn draw(&self, roll: f64) -> usize {
        let target = roll * self.sums.last().copied().unwrap_or_default();
        self.sums.partition_point(|sum| *sum <= target).min(self.sums.len() - 1)
    }
}

/// When each operation is due, in an open loop: at a fixed pace from the start on, however long the answers take.
/// Latency counts from these moments, so that a stall is not hidden by the requests that it kept back (no coordinated
/// omission).
#[derive(Clone, Debug)]
pub struct LoadPace {
    start: Moment,
    rate: f64,
    count: u32,
}

impl LoadPace {
    /// `rate` operations a second from `start` on.
    #[must_use]
    pub fn new(start: Moment, rate: f64) -> Self {
        Self { start, rate, count: 0 }
    }
}

impl Iterator for LoadPace {
    type Item = Moment;

    fn next(&mut self) -> Option<Moment> {
        let since = Duration::try_from_secs_f64(f64::from(self.count) / self.rate).ok()?;
        self.count = self.count.checked_add(1)?;
        Some(self.start + since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skew_is_parsed_or_its_error_explained() {
        assert_eq!("uniform".parse(), Ok(Skew::Uniform));
        assert_eq!("zipf:1.1".parse(), Ok(Skew::Zipf(1.1)));
        for bad in ["", "zipf", "zipf:", "zipf:0", "zipf:-1", "zipf:NaN", "zipf:inf"] {
            assert!(bad.parse::<Skew>().is_err_and(|message| message.contains("zipf:")), "{bad}");
        }
    }

    #[test]
    fn shares_add_up() {
        let uniform = SkewedShares::new(Skew::Uniform, 4);
        let drawn: Vec<_> = [0.0, 0.24, 0.25, 0.5, 0.99].map(|roll| uniform.draw(roll)).to_vec();
        assert_eq!(drawn, [0, 0, 1, 2, 3]);
        let zipf = SkewedShares::new(Skew::Zipf(1.0), 3);
        // 1, 1/2, 1/3: shares of 6/11, 3/11, 2/11.
        let drawn: Vec<_> = [0.0, 0.54, 0.55, 0.81, 0.82, 1.0].map(|roll| zipf.draw(roll)).to_vec();
        assert_eq!(drawn, [0, 0, 1, 1, 2, 2]);
        assert_eq!(SkewedShares::new(Skew::Uniform, 0).draw(0.9), 0);
    }

    #[test]
    fn schedule_does_not_drift() {
        let start = Moment::from_nanos(1_000);
        let mut pace = LoadPace::new(start, 3_000.0);
        assert_eq!(pace.next(), Some(start));
        assert_eq!(pace.nth(2_998).map(|due| due.since(start).as_micros()), Some(999_666));
        assert_eq!(pace.next(), Some(start + Duration::from_secs(1)));
        assert_eq!(LoadPace::new(start, f64::MIN_POSITIVE).nth(1), None);
    }
}
