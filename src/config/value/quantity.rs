//! Numbers, times, sizes and rates, with their ranges.

use std::time::Duration;

use toml::de::DeValue;

use super::must_be;
use crate::config::section::{FromToml, quoted, shown};
use crate::config::unit::{self, MalformedValue};

/// Reads a text with a unit in it; a bare number has forgotten the unit.
fn with_unit<T>(
    value: &DeValue<'_>,
    wanted: &str,
    read: fn(&str) -> Result<T, MalformedValue>,
) -> Result<T, String> {
    if value.is_integer() || value.is_float() {
        return Err(format!("must be {wanted}, found the bare number {}", shown(value)));
    }
    let text = value.as_str().ok_or_else(|| must_be(wanted, value))?;
    read(text).map_err(|malformed| format!("{malformed}, found {}{}", quoted(text), malformed.because))
}

/// A whole number from `LEAST` to `MOST`.
pub(in crate::config) struct Int<T, const LEAST: u64, const MOST: u64>(std::marker::PhantomData<T>);

/// What 32 bits count.
const MOST_COUNT: u64 = u32::MAX as u64;

/// A whole number from `LEAST` to what 32 bits count.
pub(in crate::config) type Count<T, const LEAST: u64> = Int<T, LEAST, MOST_COUNT>;

impl<T: TryFrom<u64>, const LEAST: u64, const MOST: u64> FromToml for Int<T, LEAST, MOST> {
    type Value = T;

    fn from_toml(value: &DeValue<'_>) -> Result<T, String> {
        let number = value.as_integer().and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        let number = number.filter(|number| (LEAST..=MOST).contains(number));
        let read = number.and_then(|number| T::try_from(number).ok());
        read.ok_or_else(|| must_be(&format!("a whole number from {LEAST} to {MOST}"), value))
    }

    fn range() -> String {
        match (LEAST, MOST) {
            (0, MOST_COUNT) => String::new(),
            (_, MOST_COUNT) => format!("at least {LEAST}"),
            (_, _) => format!("from {LEAST} to {MOST}"),
        }
    }
}

impl FromToml for Duration {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        with_unit(value, unit::DURATION, unit::duration)
    }
}

/// A time of more than 0s.
pub(in crate::config) struct PositiveTime;

impl FromToml for PositiveTime {
    type Value = Duration;

    fn from_toml(value: &DeValue<'_>) -> Result<Duration, String> {
        let time = Duration::from_toml(value)?;
        if time.is_zero() { Err(format!("must be {}, found 0s", Self::range())) } else { Ok(time) }
    }

    fn range() -> String {
        "more than 0s".to_owned()
    }
}

/// A time of at most so many hours.
pub(in crate::config) struct Hours<const MOST: u64>;

impl<const MOST: u64> FromToml for Hours<MOST> {
    type Value = Duration;

    fn from_toml(value: &DeValue<'_>) -> Result<Duration, String> {
        let time = Duration::from_toml(value)?;
        let fits = time <= Duration::from_secs(MOST * 3600);
        if fits { Ok(time) } else { Err(format!("must be {}, found {time:?}", Self::range())) }
    }

    fn range() -> String {
        format!("at most {MOST}h")
    }
}

/// A number of bytes.
pub(in crate::config) struct ByteSize;

impl FromToml for ByteSize {
    type Value = u64;

    fn from_toml(value: &DeValue<'_>) -> Result<u64, String> {
        with_unit(value, unit::SIZE, unit::size)
    }
}

/// A number of concurrent sessions, at least one.
pub(in crate::config) struct SessionCount;

impl FromToml for SessionCount {
    type Value = usize;

    fn from_toml(value: &DeValue<'_>) -> Result<usize, String> {
        let is_none = Int::<u64, 0, 0>::from_toml(value).is_ok();
        Count::<usize, 1>::from_toml(value)
            .map_err(|message| if is_none { message + NOTHING } else { message })
    }

    fn range() -> String {
        Count::<usize, 1>::range()
    }
}

/// The remedy for a limit of nothing.
const NOTHING: &str = ": state = \"disabled\" stops all traffic of the tenant";

/// The interval of a rate.
pub(in crate::config) struct RateInterval;

impl FromToml for RateInterval {
    type Value = Duration;

    fn from_toml(value: &DeValue<'_>) -> Result<Duration, String> {
        with_unit(value, unit::RATE, unit::rate)
    }

    fn range() -> String {
        "from 1/h to 1000000/s".to_owned()
    }
}

/// A number of bytes in each second.
pub(in crate::config) struct BytesPerSecond;

impl FromToml for BytesPerSecond {
    type Value = u64;

    fn from_toml(value: &DeValue<'_>) -> Result<u64, String> {
        with_unit(value, unit::BANDWIDTH, unit::bandwidth)
    }

    fn range() -> String {
        "at least 1KiB/s".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_read::{read, refused};
    use super::*;

    #[test]
    fn whole_numbers_have_both_bounds() {
        type Percent = Int<u32, 1, 100>;
        for (text, number) in [("1", 1), ("100", 100), ("0x10", 16), ("1_0", 10)] {
            assert_eq!(read::<Percent>(text), Ok(number));
        }
        for text in ["0", "101", "-1", "99999999999999999999999", "1.5", "\"4\"", "true"] {
            assert!(
                refused::<Percent>(text).starts_with("must be a whole number from 1 to 100, found "),
                "{text}"
            );
        }
        assert_eq!(read::<Count<u32, 0>>("4294967295"), Ok(u32::MAX));
        assert!(read::<Count<u32, 0>>("4294967296").is_err());
        let ranges = [Percent::range(), Count::<u32, 1>::range(), Count::<u32, 0>::range()];
        assert_eq!(ranges, ["from 1 to 100", "at least 1", ""]);
    }

    #[test]
    fn times_have_bounds() {
        assert_eq!(read::<PositiveTime>("\"1ms\""), Ok(Duration::from_millis(1)));
        assert_eq!(refused::<PositiveTime>("\"0s\""), "must be more than 0s, found 0s");
        assert_eq!(read::<Hours<1>>("\"60m\""), Ok(Duration::from_secs(3600)));
        assert_eq!(refused::<Hours<1>>("\"3601s\""), "must be at most 1h, found 3601s");
    }

    #[test]
    fn number_without_a_unit_is_refused() {
        assert!(
            refused::<Duration>("5").ends_with("such as \"5s\" (ms, s, m or h), found the bare number 5")
        );
        assert!(refused::<Duration>("0.5").ends_with("found the bare number 0.5"));
        assert!(refused::<ByteSize>("64").ends_with("found the bare number 64"));
        assert!(refused::<Duration>("true").ends_with("found true"));
        assert!(refused::<Duration>("\"5\"").ends_with("found \"5\", which has no unit"));
        assert_eq!(read::<ByteSize>("\"2KiB\""), Ok(2048));
        assert!(refused::<RateInterval>("200").ends_with("(s, m or h), found the bare number 200"));
        assert_eq!(
            refused::<RateInterval>("\"0/s\""),
            "must be more than 0, found \"0/s\": state = \"disabled\" stops all traffic of the tenant"
        );
        assert_eq!(read::<SessionCount>("1"), Ok(1));
        assert!(
            refused::<SessionCount>("0")
                .ends_with("found 0: state = \"disabled\" stops all traffic of the tenant")
        );
        assert!(refused::<SessionCount>("-1").ends_with("from 1 to 4294967295, found -1"));
        assert!(refused::<BytesPerSecond>("5000").ends_with("found the bare number 5000"));
        assert_eq!(read::<BytesPerSecond>("\"2KiB/s\""), Ok(2048));
    }
}
