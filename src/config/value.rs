//! What a key may hold: numbers, words, addresses and names, each with the message for anything else.

mod address;
mod pool;
mod word;

use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

pub(super) use self::address::{HostName, Nameserver};
pub(super) use self::pool::{
    HostHeader, MatchKind, PathAndQuery, PreferZone, ProbeBytes, ProbeKind, SendProxy,
};
use super::section::{FromToml, quoted, shown};
use super::suggest;
use super::unit::{self, MalformedValue};
use super::{AccessLogTarget, Fallback, LimitMode, LogFormat, LogLevel, Protocol};
use crate::id::EndpointId;

fn must_be(wanted: &str, value: &DeValue<'_>) -> String {
    format!("must be {wanted}, found {}", shown(value))
}

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

/// Reads one of a few words.
fn word<T: Copy>(value: &DeValue<'_>, words: &[(&str, T)]) -> Result<T, String> {
    if let Some((_, meaning)) = words.iter().find(|(word, _)| value.as_str() == Some(*word)) {
        return Ok(*meaning);
    }
    let known: Vec<String> = words.iter().map(|(word, _)| quoted(word)).collect();
    let message = must_be(&one_of(&known), value);
    match value.as_str().and_then(|text| suggest::closest(text, words.iter().map(|(word, _)| *word))) {
        Some(close) => Err(format!("{message}: did you mean \"{close}\"?")),
        None => Err(message),
    }
}

/// `a, b or c`.
fn one_of(words: &[String]) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

/// A whole number from `LEAST` to `MOST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BoundedInt<const LEAST: u64, const MOST: u64>(pub(super) u64);

/// A whole number from `LEAST` to what 32 bits count.
pub(super) type Count<const LEAST: u64> = BoundedInt<LEAST, { u32::MAX as u64 }>;

impl<const LEAST: u64, const MOST: u64> FromToml for BoundedInt<LEAST, MOST> {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let number = value.as_integer().and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        match number {
            Some(number) if (LEAST..=MOST).contains(&number) => Ok(Self(number)),
            _ => Err(must_be(&format!("a whole number from {LEAST} to {MOST}"), value)),
        }
    }
}

impl<const LEAST: u64, const MOST: u64> BoundedInt<LEAST, MOST> {
    /// As a number of things in memory.
    pub(super) fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// As a small number, where `MOST` is one.
    pub(super) fn as_u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }

    /// As a port, where `MOST` is one.
    pub(super) fn as_u16(self) -> u16 {
        u16::try_from(self.0).unwrap_or(u16::MAX)
    }
}

impl FromToml for bool {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| must_be("true or false", value))
    }
}

impl FromToml for String {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_else(|| must_be("a text in quotes", value))
    }
}

/// The name of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TableName(pub(super) String);

impl FromToml for TableName {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        const LONGEST: usize = 64;
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        match value.as_str() {
            Some(name) if (1..=LONGEST).contains(&name.len()) && name.chars().all(fits) => {
                Ok(Self(name.to_owned()))
            }
            _ => Err(must_be("a name of 1 to 64 letters, digits, \"_\", \".\" and \"-\"", value)),
        }
    }
}

impl FromToml for Duration {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        with_unit(value, unit::DURATION, unit::duration)
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteSize(pub(super) u64);

impl FromToml for ByteSize {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        with_unit(value, unit::SIZE, unit::size).map(Self)
    }
}

/// A number of concurrent sessions, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SessionCount(pub(super) usize);

impl FromToml for SessionCount {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let sessions = Count::<1>::from_toml(value).map(|sessions| Self(sessions.as_usize()));
        let is_none = BoundedInt::<0, 0>::from_toml(value).is_ok();
        sessions.map_err(|message| if is_none { message + NOTHING } else { message })
    }
}

/// The remedy for a limit of nothing.
const NOTHING: &str = ": state = \"disabled\" stops all traffic of the tenant";

/// The interval of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RateInterval(pub(super) Duration);

impl FromToml for RateInterval {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        with_unit(value, unit::RATE, unit::rate).map(Self)
    }
}

/// A number of bytes in each second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BytesPerSecond(pub(super) u64);

impl FromToml for BytesPerSecond {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        with_unit(value, unit::BANDWIDTH, unit::bandwidth).map(Self)
    }
}

impl FromToml for LimitMode {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("enforce", Self::Enforce), ("observe", Self::Observe)])
    }
}

/// Reads a text that is what it is, without a unit.
fn text<T>(value: &DeValue<'_>, wanted: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    value.as_str().and_then(read).ok_or_else(|| must_be(wanted, value))
}

impl FromToml for EndpointId {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let wanted = "the ID of a VPC endpoint: \"vpce-\" and 17 (or 8) lower-case hexadecimal digits";
        let written = value.as_str().ok_or_else(|| must_be(wanted, value))?;
        if let Ok(id) = written.parse() {
            return Ok(id);
        }
        let hint = if written.starts_with("vpce-svc-") {
            ", which is the ID of the endpoint service, not of an endpoint"
        } else if written.to_ascii_lowercase().parse::<Self>().is_ok() {
            ", which has upper-case letters"
        } else if written.trim().parse::<Self>().is_ok() {
            ", which has spaces around it"
        } else {
            ""
        };
        Err(must_be(wanted, value) + hint)
    }
}

/// Whether a PROXY header is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProxyProtocolMode {
    Require,
    Off,
}

impl FromToml for ProxyProtocolMode {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("require", Self::Require), ("off", Self::Off)])
    }
}

impl FromToml for Protocol {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("tcp", Self::Tcp), ("udp", Self::Udp)])
    }
}

impl FromToml for Fallback {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        text(value, "\"reject\", or \"tenant:\" and the name of a tenant", |text| {
            match text.strip_prefix("tenant:") {
                Some(name) if !name.is_empty() => Some(Self::Tenant(name.to_owned())),
                Some(_) => None,
                None => (text == "reject").then_some(Self::Reject),
            }
        })
    }
}

impl FromToml for LogLevel {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let levels = [
            ("error", Self::Error),
            ("warn", Self::Warn),
            ("info", Self::Info),
            ("debug", Self::Debug),
            ("trace", Self::Trace),
        ];
        word(value, &levels)
    }
}

impl FromToml for LogFormat {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("json", Self::Json), ("text", Self::Text)])
    }
}

impl FromToml for AccessLogTarget {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        text(value, "\"stdout\", \"off\" or the path of a file", |text| match text {
            "" => None,
            "stdout" => Some(Self::Stdout),
            "off" => Some(Self::Off),
            path => Some(Self::File(PathBuf::from(path))),
        })
    }
}

/// The path of the admin socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SocketPath(pub(super) PathBuf);

impl FromToml for SocketPath {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        /// `sun_path` of unix(7), without the zero at its end.
        const LONGEST: usize = 107;
        let wanted = "an absolute path of at most 107 bytes, such as \"/run/vestibule/admin.sock\"";
        text(value, wanted, |text| {
            let fits = text.len() <= LONGEST && text.starts_with('/') && !text.ends_with('/');
            (fits && !text.contains('\0')).then(|| Self(PathBuf::from(text)))
        })
    }
}

/// Whether a tenant is enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TenantState(pub(super) bool);

impl FromToml for TenantState {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("enabled", Self(true)), ("disabled", Self(false))])
    }
}

/// The path of a URL, without a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UrlPath(pub(super) String);

impl FromToml for UrlPath {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'?' && byte != b'#';
        text(value, "a path that begins with \"/\", such as \"/healthz\"", |text| {
            (text.starts_with('/') && text.bytes().all(plain)).then(|| Self(text.to_owned()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: FromToml>(text: &str) -> Result<T, String> {
        T::from_toml(DeValue::parse(text).unwrap().get_ref())
    }

    fn refused<T: FromToml>(text: &str) -> String {
        read::<T>(text).map(|_| ()).unwrap_err()
    }

    #[test]
    fn whole_numbers_have_both_bounds() {
        type Percent = BoundedInt<1, 100>;
        for (text, number) in [("1", 1), ("100", 100), ("0x10", 16), ("1_0", 10)] {
            assert_eq!(read(text), Ok(BoundedInt::<1, 100>(number)));
        }
        for text in ["0", "101", "-1", "99999999999999999999999", "1.5", "\"4\"", "true"] {
            assert!(
                refused::<Percent>(text).starts_with("must be a whole number from 1 to 100, found "),
                "{text}"
            );
        }
        assert_eq!(read::<Count<0>>("4294967295").map(BoundedInt::as_u32), Ok(u32::MAX));
        assert!(read::<Count<0>>("4294967296").is_err());
        let most = BoundedInt::<0, { u64::MAX }>(u64::MAX);
        assert_eq!((most.as_u16(), most.as_u32()), (u16::MAX, u32::MAX));
        assert_eq!(most.as_usize(), usize::MAX);
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
        assert_eq!(read("\"2KiB\""), Ok(ByteSize(2048)));
        assert!(refused::<RateInterval>("200").ends_with("(s, m or h), found the bare number 200"));
        assert_eq!(
            refused::<RateInterval>("\"0/s\""),
            "must be more than 0, found \"0/s\": state = \"disabled\" stops all traffic of the tenant"
        );
        assert_eq!(read("1"), Ok(SessionCount(1)));
        assert!(
            refused::<SessionCount>("0")
                .ends_with("found 0: state = \"disabled\" stops all traffic of the tenant")
        );
        assert!(refused::<SessionCount>("-1").ends_with("from 1 to 4294967295, found -1"));
        assert!(refused::<BytesPerSecond>("5000").ends_with("found the bare number 5000"));
        assert_eq!(read("\"2KiB/s\""), Ok(BytesPerSecond(2048)));
    }

    #[test]
    fn names_have_a_length_and_an_alphabet() {
        let longest = format!("\"{}\"", "a".repeat(64));
        assert!(read::<TableName>(&longest).is_ok());
        assert!(read::<TableName>("\"A-z_0.9\"").is_ok());
        for text in ["\"\"", &longest.replacen('a', "aa", 1), "\"a b\"", "\"é\"", "\"a/b\"", "5"] {
            assert!(read::<TableName>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_suggest_the_closest() {
        assert_eq!(
            refused::<LogLevel>("\"wran\""),
            "must be \"error\", \"warn\", \"info\", \"debug\" or \"trace\", found \"wran\": did you mean \"warn\"?"
        );
        assert_eq!(refused::<Protocol>("\"quic\""), "must be \"tcp\" or \"udp\", found \"quic\"");
        assert_eq!(
            refused::<LogFormat>("1979-05-27"),
            "must be \"json\" or \"text\", found the date 1979-05-27"
        );
        assert_eq!(one_of(&[]), "");
    }

    #[test]
    fn a_fallback_rejects_or_names_a_tenant() {
        assert_eq!(read("\"reject\""), Ok(Fallback::Reject));
        assert_eq!(read("\"tenant:acme\""), Ok(Fallback::Tenant("acme".into())));
        for text in ["\"tenant:\"", "\"acme\"", "\"Reject\"", "\"\"", "false"] {
            assert!(read::<Fallback>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn malformed_endpoint_id_names_its_error() {
        for (text, hint) in [
            ("\"vpce-svc-0123456789abcdef0\"", "which is the ID of the endpoint service, not of an endpoint"),
            ("\"vpce-08D2bf15fac5001c9\"", "which has upper-case letters"),
            ("\" vpce-08d2bf15fac5001c9\"", "which has spaces around it"),
            ("\"vpce-08d2\"", "found \"vpce-08d2\""),
            ("5", "found 5"),
        ] {
            assert!(refused::<EndpointId>(text).ends_with(hint), "{text}");
        }
    }

    #[test]
    fn the_access_log_goes_somewhere() {
        assert_eq!(read("\"off\""), Ok(AccessLogTarget::Off));
        assert_eq!(read("\"stdout\""), Ok(AccessLogTarget::Stdout));
        assert_eq!(read("\"/var/log/access\""), Ok(AccessLogTarget::File("/var/log/access".into())));
        assert!(read::<AccessLogTarget>("\"\"").is_err());
    }

    #[test]
    fn a_socket_has_an_absolute_path_that_the_system_takes() {
        let longest = format!("\"/{}\"", "a".repeat(106));
        assert!(read::<SocketPath>(&longest).is_ok());
        for text in
            ["\"\"", "\"admin.sock\"", "\"/run/\"", "\"/a\\u0000b\"", "5", &longest.replacen('a', "aa", 1)]
        {
            assert!(refused::<SocketPath>(text).starts_with("must be an absolute path"), "{text}");
        }
    }

    #[test]
    fn a_path_begins_with_a_slash() {
        assert_eq!(read("\"/\""), Ok(UrlPath("/".into())));
        for text in ["\"\"", "\"healthz\"", "\"/a b\"", "\"/a?b\"", "\"/a#b\"", "\"/é\""] {
            assert!(read::<UrlPath>(text).is_err(), "{text}");
        }
    }
}
