//! The one place where time is read; everywhere else it is an argument.

pub mod wheel;

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

/// A time of the monotonic clock, in nanoseconds since its first reading in this process. Never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The moment that lies `nanos` after the process first asked.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the process first asked.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The time `span` before, but not before the first reading.
    #[must_use]
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time since `earlier`; zero if it is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// A start time, which may lie before the start of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartTime(i64);

impl StartTime {
    /// So long before `now`.
    #[must_use]
    pub fn before(now: Moment, age: Duration) -> Self {
        let age = i64::try_from(age.as_nanos()).unwrap_or(i64::MAX);
        Self(now.0.cast_signed().saturating_sub(age))
    }

    /// The age; zero if it lies ahead.
    #[must_use]
    pub fn age(self, now: Moment) -> Duration {
        let nanos = now.0.cast_signed().saturating_sub(self.0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
    }
}

impl From<Moment> for StartTime {
    fn from(moment: Moment) -> Self {
        Self(moment.0.cast_signed())
    }
}

static START: LazyLock<Instant> = LazyLock::new(read_monotonic);

#[expect(clippy::disallowed_methods, reason = "this is the place that the rule names")]
fn read_monotonic() -> Instant {
    Instant::now()
}

/// The time of day, as the time since 1970 in UTC.
#[must_use]
pub fn unix() -> Duration {
    wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Reads the monotonic clock.
#[must_use]
pub fn now() -> Moment {
    let start = *START;
    Moment(u64::try_from(read_monotonic().saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX))
}

/// Reads the wall clock, for output only.
#[expect(clippy::disallowed_methods, reason = "this is the place that the rule names")]
#[must_use]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_back() {
        let first = now();
        let second = now();
        assert!(second >= first);
        assert_eq!(first.since(second + Duration::from_secs(1)), Duration::ZERO);
        assert!(wall() > SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn start_time_of_another_process_may_precede_this_one() {
        let now = Moment::from_nanos(5);
        assert_eq!(StartTime::before(now, Duration::from_secs(3600)).age(now), Duration::from_secs(3600));
        assert_eq!(StartTime::from(now).age(Moment::from_nanos(7)), Duration::from_nanos(2));
        assert_eq!(StartTime::from(now).age(Moment::from_nanos(1)), Duration::ZERO);
        assert!(StartTime::before(now, Duration::MAX).age(now) > Duration::from_secs(24 * 3600));
    }

    #[test]
    fn moments_add_and_subtract() {
        let moment = Moment::from_nanos(5) + Duration::from_nanos(7);
        assert_eq!(moment.as_nanos(), 12);
        assert_eq!(
            (moment.before(Duration::from_nanos(7)).as_nanos(), moment.before(Duration::MAX).as_nanos()),
            (5, 0)
        );
        assert_eq!(moment.since(Moment::from_nanos(2)), Duration::from_nanos(10));
        assert_eq!((Moment::from_nanos(1) + Duration::MAX).as_nanos(), u64::MAX);
    }
}
