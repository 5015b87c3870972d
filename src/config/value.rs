//! What a key may hold: numbers, words, addresses and names, each with the message for anything else.

mod address;
mod pool;
mod quantity;
#[cfg(test)]
mod test_read;

use std::path::PathBuf;

use toml::de::DeValue;

pub(super) use self::address::{HostName, Nameserver};
pub(super) use self::pool::{
    HostHeader, MatchKind, PathAndQuery, PreferZone, ProbeBytes, ProbeKind, SendProxy,
};
pub(super) use self::quantity::{
    ByteSize, BytesPerSecond, Count, Hours, Int, PositiveTime, RateInterval, SessionCount,
};
use super::section::{FromToml, quoted, shown};
use super::suggest;
use super::{
    AccessLogTarget, Balance, BareDatagrams, Fallback, LimitMode, LogFormat, LogLevel, OnRevoke, Protocol,
};
use crate::id::EndpointId;

fn must_be(wanted: &str, value: &DeValue<'_>) -> String {
    format!("must be {wanted}, found {}", shown(value))
}

/// A value that is one of a few words.
pub(super) trait Keyword {
    /// What the word means.
    type Meaning: Copy + PartialEq + 'static;
    /// Each word and its meaning.
    const WORDS: &'static [(&'static str, Self::Meaning)];

    /// The word of a meaning, in quotes.
    fn word(meaning: &Self::Meaning) -> String {
        let word = Self::WORDS.iter().find(|(_, known)| known == meaning).map(|(word, _)| *word);
        quoted(word.unwrap_or_default())
    }
}

impl<T: Keyword> FromToml for T {
    type Value = T::Meaning;

    fn from_toml(value: &DeValue<'_>) -> Result<T::Meaning, String> {
        if let Some((_, meaning)) = T::WORDS.iter().find(|(word, _)| value.as_str() == Some(*word)) {
            return Ok(*meaning);
        }
        let message = must_be(&Self::range(), value);
        match value.as_str().and_then(|text| suggest::closest(text, T::WORDS.iter().map(|(word, _)| *word))) {
            Some(close) => Err(format!("{message}: did you mean \"{close}\"?")),
            None => Err(message),
        }
    }

    fn range() -> String {
        one_of(&T::WORDS.iter().map(|(word, _)| quoted(word)).collect::<Vec<_>>())
    }
}

/// Declares the words of keys: `Type => Meaning: "word" meaning, ...`.
macro_rules! keywords {
    ($($kind:ty => $meaning:ty: $($word:literal $value:expr),+;)+) => {
        $(impl Keyword for $kind {
            type Meaning = $meaning;
            const WORDS: &'static [(&'static str, $meaning)] = &[$(($word, $value)),+];
        })+
    };
}

keywords! {
    LogLevel => LogLevel: "error" LogLevel::Error, "warn" LogLevel::Warn, "info" LogLevel::Info, "debug" LogLevel::Debug, "trace" LogLevel::Trace;
    LogFormat => LogFormat: "json" LogFormat::Json, "text" LogFormat::Text;
    Protocol => Protocol: "tcp" Protocol::Tcp, "udp" Protocol::Udp;
    ProxyProtocolMode => ProxyProtocolMode: "require" ProxyProtocolMode::Require, "off" ProxyProtocolMode::Off;
    BareDatagrams => BareDatagrams: "refuse" BareDatagrams::Refuse, "follow" BareDatagrams::Follow;
    Balance => Balance: "p2c" Balance::P2c, "round-robin" Balance::RoundRobin, "least-sessions" Balance::LeastSessions,
        "maglev" Balance::Maglev, "maglev-endpoint" Balance::MaglevEndpoint;
    SendProxy => bool: "off" false, "v2" true;
    ProbeKind => ProbeKind: "tcp" ProbeKind::Tcp, "http" ProbeKind::Http, "exchange" ProbeKind::Exchange, "none" ProbeKind::None;
    MatchKind => MatchKind: "contains" MatchKind::Contains, "prefix" MatchKind::Prefix;
    TenantState => bool: "enabled" true, "disabled" false;
    OnRevoke => OnRevoke: "end" OnRevoke::End, "keep" OnRevoke::Keep;
    LimitMode => LimitMode: "enforce" LimitMode::Enforce, "observe" LimitMode::Observe;
}

/// `a, b or c`.
fn one_of(words: &[String]) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

impl FromToml for bool {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| must_be("true or false", value))
    }
}

impl FromToml for String {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_else(|| must_be("a text in quotes", value))
    }
}

/// The name of a table.
pub(super) struct TableName;

impl FromToml for TableName {
    type Value = String;

    fn from_toml(value: &DeValue<'_>) -> Result<String, String> {
        const LONGEST: usize = 64;
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        match value.as_str() {
            Some(name) if (1..=LONGEST).contains(&name.len()) && name.chars().all(fits) => {
                Ok(name.to_owned())
            }
            _ => Err(must_be("a name of 1 to 64 letters, digits, \"_\", \".\" and \"-\"", value)),
        }
    }
}

/// Reads a text that is what it is, without a unit.
fn text<T>(value: &DeValue<'_>, wanted: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    value.as_str().and_then(read).ok_or_else(|| must_be(wanted, value))
}

impl FromToml for EndpointId {
    type Value = Self;

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

impl FromToml for Fallback {
    type Value = Self;

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

impl FromToml for AccessLogTarget {
    type Value = Self;

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
pub(super) struct SocketPath;

impl FromToml for SocketPath {
    type Value = PathBuf;

    fn from_toml(value: &DeValue<'_>) -> Result<PathBuf, String> {
        /// `sun_path` of unix(7), without the zero at its end.
        const LONGEST: usize = 107;
        let wanted = "an absolute path of at most 107 bytes, such as \"/run/vestibule/admin.sock\"";
        text(value, wanted, |text| {
            let fits = text.len() <= LONGEST && text.starts_with('/') && !text.ends_with('/');
            (fits && !text.contains('\0')).then(|| PathBuf::from(text))
        })
    }
}

/// Whether a tenant is enabled.
pub(super) struct TenantState;

/// The path of a URL, without a query.
pub(super) struct UrlPath;

impl FromToml for UrlPath {
    type Value = String;

    fn from_toml(value: &DeValue<'_>) -> Result<String, String> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'?' && byte != b'#';
        text(value, "a path that begins with \"/\", such as \"/healthz\"", |text| {
            (text.starts_with('/') && text.bytes().all(plain)).then(|| text.to_owned())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::test_read::{read, refused};
    use super::*;

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
        assert_eq!(TenantState::word(&false), "\"disabled\"");
    }

    #[test]
    fn fallback_rejects_or_names_a_tenant() {
        assert_eq!(read::<Fallback>("\"reject\""), Ok(Fallback::Reject));
        assert_eq!(read::<Fallback>("\"tenant:acme\""), Ok(Fallback::Tenant("acme".into())));
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
    fn access_log_target_is_off_stdout_or_a_path() {
        assert_eq!(read::<AccessLogTarget>("\"off\""), Ok(AccessLogTarget::Off));
        assert_eq!(read::<AccessLogTarget>("\"stdout\""), Ok(AccessLogTarget::Stdout));
        assert_eq!(
            read::<AccessLogTarget>("\"/var/log/access\""),
            Ok(AccessLogTarget::File("/var/log/access".into()))
        );
        assert!(read::<AccessLogTarget>("\"\"").is_err());
    }

    #[test]
    fn socket_path_is_absolute_and_within_the_length_limit() {
        let longest = format!("\"/{}\"", "a".repeat(106));
        assert!(read::<SocketPath>(&longest).is_ok());
        for text in
            ["\"\"", "\"admin.sock\"", "\"/run/\"", "\"/a\\u0000b\"", "5", &longest.replacen('a', "aa", 1)]
        {
            assert!(refused::<SocketPath>(text).starts_with("must be an absolute path"), "{text}");
        }
    }

    #[test]
    fn url_path_begins_with_a_slash() {
        assert_eq!(read::<UrlPath>("\"/\""), Ok("/".to_owned()));
        for text in ["\"\"", "\"healthz\"", "\"/a b\"", "\"/a?b\"", "\"/a#b\"", "\"/é\""] {
            assert!(read::<UrlPath>(text).is_err(), "{text}");
        }
    }
}
