//! What the keys of a pool may hold: targets, ways of balancing, zones, and what a probe asks.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use toml::de::DeValue;

use super::address::not_mapped;
use super::{TableName, must_be, text};
use crate::config::section::{FromToml, quoted};
use crate::config::{BackendTarget, backend_target};

impl FromToml for BackendTarget {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| must_be(backend_target::TARGET, value))?;
        let target = backend_target::target(text)
            .map_err(|malformed| format!("{malformed}, found {}{}", quoted(text), malformed.because))?;
        if let Self::Address(address) = target {
            not_mapped(address.ip(), text, |ip| SocketAddr::new(ip, address.port()).to_string())?;
        }
        Ok(target)
    }
}

/// Whether the client's header is passed on.
pub(in crate::config) struct SendProxy;

/// The zone whose backends are used first, or none.
pub(in crate::config) struct PreferZone;

impl FromToml for PreferZone {
    type Value = Option<String>;

    fn from_toml(value: &DeValue<'_>) -> Result<Option<String>, String> {
        if value.as_str() == Some("") {
            return Ok(None);
        }
        match TableName::from_toml(value) {
            Ok(zone) => Ok(Some(zone)),
            Err(_) => Err(must_be("the zone of a backend, or \"\" for none", value)),
        }
    }
}

/// What a probe does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum ProbeKind {
    None,
    Tcp,
    Http,
    Exchange,
}

/// The path of a URL, with or without a query.
pub(in crate::config) struct PathAndQuery;

impl FromToml for PathAndQuery {
    type Value = String;

    fn from_toml(value: &DeValue<'_>) -> Result<String, String> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'#';
        text(value, "a path that begins with \"/\", such as \"/healthz\" or \"/healthz?deep=1\"", |text| {
            (text.starts_with('/') && text.bytes().all(plain)).then(|| text.to_owned())
        })
    }
}

/// What the Host header of a probe says.
pub(in crate::config) struct HostHeader;

impl FromToml for HostHeader {
    type Value = String;

    fn from_toml(value: &DeValue<'_>) -> Result<String, String> {
        /// A name, a colon and a port.
        const LONGEST: usize = 253 + 6;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
        text(value, "a host with an optional port, such as \"example.com\" or \"example.com:8080\"", |text| {
            let fits = (1..=LONGEST).contains(&text.len()) && text.bytes().all(plain);
            fits.then(|| text.to_owned())
        })
    }
}

/// Statuses of HTTP: one, or all from one to another.
impl FromToml for RangeInclusive<u16> {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        const WANTED: &str =
            "a text with a status or a range of statuses from 100 to 599, such as \"200\" or \"200-399\"";
        let statuses = text(value, WANTED, |text| {
            let (from, to) = text.split_once('-').unwrap_or((text, text));
            Some(status(from)?..=status(to)?)
        })?;
        if statuses.is_empty() { Err(must_be(WANTED, value) + ", which is reversed") } else { Ok(statuses) }
    }
}

fn status(digits: &str) -> Option<u16> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|status| plain && (100..=599).contains(status))
}

/// Bytes that a probe sends or expects, at least so many: a text, or hexadecimal digits.
pub(in crate::config) struct ProbeBytes<const LEAST: usize>;

impl<const LEAST: usize> FromToml for ProbeBytes<LEAST> {
    type Value = Vec<u8>;

    fn from_toml(value: &DeValue<'_>) -> Result<Vec<u8>, String> {
        /// A probe holds so much at once.
        const MOST: usize = 4096;
        let wanted = "a text, or \"hex:\" and pairs of hexadecimal digits, such as \"hex:0a0b\"";
        let bytes = text(value, wanted, |text| match text.strip_prefix("hex:") {
            Some(digits) => unhex(digits),
            None => Some(text.as_bytes().to_vec()),
        })?;
        if (LEAST..=MOST).contains(&bytes.len()) {
            return Ok(bytes);
        }
        Err(format!("must be {LEAST} to {MOST} bytes long, found {}", bytes.len()))
    }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|nibble| u8::try_from(nibble).ok());
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?));
    if rest.is_empty() { bytes.collect() } else { None }
}

/// Where in an answer the expected bytes must stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum MatchKind {
    Contains,
    Prefix,
}

#[cfg(test)]
mod tests {
    use super::super::test_read::{read, refused};
    use super::*;
    use crate::config::Balance;

    #[test]
    fn malformed_backend_target_names_its_error() {
        assert_eq!(
            read::<BackendTarget>("\"[::1]:80\""),
            Ok(BackendTarget::Address("[::1]:80".parse().unwrap()))
        );
        let wrong = refused::<BackendTarget>("\"10.0.0.1:0\"");
        assert!(wrong.ends_with(", found \"10.0.0.1:0\", whose port is not from 1 to 65535"), "{wrong}");
        let wrong = refused::<BackendTarget>("80");
        assert!(wrong.starts_with("must be an address and a port, such as") && wrong.ends_with(", found 80"));
    }

    #[test]
    fn every_way_of_balancing_has_its_word() {
        for (text, way) in [
            ("\"p2c\"", Balance::P2c),
            ("\"round-robin\"", Balance::RoundRobin),
            ("\"least-sessions\"", Balance::LeastSessions),
            ("\"maglev\"", Balance::Maglev),
            ("\"maglev-endpoint\"", Balance::MaglevEndpoint),
        ] {
            assert_eq!(read::<Balance>(text), Ok(way));
        }
        assert!(refused::<Balance>("\"magleb\"").ends_with("did you mean \"maglev\"?"));
    }

    #[test]
    fn preferred_zone_may_be_empty() {
        assert_eq!(read::<PreferZone>("\"\""), Ok(None));
        assert_eq!(read::<PreferZone>("\"usw2-az1\""), Ok(Some("usw2-az1".to_owned())));
        for text in ["\"a b\"", "0", "false"] {
            assert!(refused::<PreferZone>(text).starts_with("must be the zone of a backend"), "{text}");
        }
    }

    #[test]
    fn probe_path_may_have_a_query() {
        for path in ["/", "/healthz", "/healthz?deep=1&a=%20"] {
            assert_eq!(read::<PathAndQuery>(&format!("\"{path}\"")), Ok(path.to_owned()));
        }
        for text in ["\"\"", "\"healthz\"", "\"/a b\"", "\"/a#b\"", "\"/\\r\\n\"", "\"/\u{e9}\"", "5"] {
            assert!(read::<PathAndQuery>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn host_header_is_a_host_with_an_optional_port() {
        for host in ["example.com", "example.com:8080", "10.0.0.1", "[fd00::1]:80", "a_b", &"a".repeat(259)] {
            assert_eq!(read::<HostHeader>(&format!("\"{host}\"")), Ok(host.to_owned()));
        }
        for host in ["", "a b", "a/b", "a\\r\\nb: c", "a@b", &"a".repeat(260)] {
            assert!(read::<HostHeader>(&format!("\"{host}\"")).is_err(), "{host}");
        }
    }

    #[test]
    fn statuses_are_100_to_599() {
        for (text, statuses) in [
            ("\"200\"", 200..=200),
            ("\"200-399\"", 200..=399),
            ("\"100-599\"", 100..=599),
            ("\"204-204\"", 204..=204),
        ] {
            assert_eq!(read::<RangeInclusive<u16>>(text), Ok(statuses), "{text}");
        }
        for text in [
            "\"99\"",
            "\"600\"",
            "\"99-200\"",
            "\"200-600\"",
            "\"200-\"",
            "\"-\"",
            "\"+200\"",
            "\"2xx\"",
            "200",
        ] {
            let wrong = refused::<RangeInclusive<u16>>(text);
            assert!(wrong.starts_with("must be a text with a status") && wrong.ends_with(text), "{wrong}");
        }
        assert!(refused::<RangeInclusive<u16>>("\"399-398\"").ends_with(", which is reversed"));
    }

    #[test]
    fn bytes_are_a_text_or_hexadecimal() {
        let bytes = |bytes: &[u8]| Ok(bytes.to_vec());
        for (text, expected) in [
            ("\"\"", bytes(b"")),
            ("\"PING\\r\\n\"", bytes(b"PING\r\n")),
            ("\"hex:\"", bytes(b"")),
            ("\"hex:0a0B\"", bytes(b"\x0a\x0b")),
            ("\"hex:fF00\"", bytes(b"\xff\x00")),
            ("\"Hex:0\"", bytes(b"Hex:0")),
        ] {
            assert_eq!(read::<ProbeBytes<0>>(text), expected, "{text}");
        }
        for text in ["\"hex:0\"", "\"hex:0g\"", "\"hex:0a 0b\"", "\"hex:\u{e9}\"", "\"hex:+1\"", "5"] {
            assert!(refused::<ProbeBytes<0>>(text).starts_with("must be a text, or \"hex:\""), "{text}");
        }
    }

    #[test]
    fn bytes_have_bounds() {
        for text in [
            "\"a\"".to_owned(),
            format!("\"{}\"", "a".repeat(4096)),
            format!("\"hex:{}\"", "0a".repeat(4096)),
        ] {
            assert!(read::<ProbeBytes<1>>(&text).is_ok());
        }
        assert_eq!(refused::<ProbeBytes<1>>("\"\""), "must be 1 to 4096 bytes long, found 0");
        for text in [format!("\"{}\"", "a".repeat(4097)), format!("\"hex:{}\"", "0a".repeat(4097))] {
            assert_eq!(refused::<ProbeBytes<0>>(&text), "must be 0 to 4096 bytes long, found 4097");
        }
    }

    #[test]
    fn match_kind_is_contains_or_prefix() {
        assert_eq!(read::<MatchKind>("\"contains\""), Ok(MatchKind::Contains));
        assert_eq!(read::<MatchKind>("\"prefix\""), Ok(MatchKind::Prefix));
        assert_eq!(
            refused::<MatchKind>("\"suffix\""),
            "must be \"contains\" or \"prefix\", found \"suffix\""
        );
    }
}
