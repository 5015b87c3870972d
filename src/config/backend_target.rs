//! Where a backend accepts, as a text: an address, a host name with a port, or the name of a service.

use std::fmt;
use std::net::SocketAddr;

use super::BackendTarget;
use super::unit::MalformedValue;

/// What the address of a backend must be.
pub(super) const TARGET: &str = "an address and a port, such as \"10.0.1.10:80\", \"[fd00::10]:80\" or \
    \"db.internal:80\", or the name of a service, such as \"_http._tcp.example.com\"";

/// Bytes of a name, without a dot at its end (RFC 1035).
const LONGEST_NAME: usize = 253;
/// Bytes of a label of a name (RFC 1035).
const LONGEST_LABEL: usize = 63;

/// As it is written in a configuration, in lower case.
impl fmt::Display for BackendTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => fmt::Display::fmt(address, f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
            Self::Service(name) => f.write_str(name),
        }
    }
}

/// Reads `ip:port`, `host:port` or `_service._proto.domain`; an IPv6 address stands in brackets.
///
/// # Errors
/// Where it is none of these, or the port is 0, or nothing can be reached there.
pub(super) fn target(text: &str) -> Result<BackendTarget, MalformedValue> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match (address.port(), address.ip().is_unspecified()) {
            (0, _) => Err(not_so(NO_PORT)),
            (_, true) => Err(not_so(", which means every address")),
            (_, false) => Ok(BackendTarget::Address(address)),
        };
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return if text.starts_with('_') { service(text) } else { Err(not_so(", which has no port")) };
    };
    if host.starts_with('_') {
        return Err(not_so(": a service name has no port; its SRV records have one"));
    }
    if host.contains(':') && !host.starts_with('[') {
        return Err(not_so(": write an IPv6 address in brackets before its port"));
    }
    is_name(host)?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or(not_so(NO_PORT))?;
    Ok(BackendTarget::Host { name: host.to_ascii_lowercase(), port })
}

const NO_PORT: &str = ", whose port is not from 1 to 65535";

fn not_so(because: &'static str) -> MalformedValue {
    MalformedValue { must: TARGET, because }
}

/// Reads the name of a service (RFC 2782).
fn service(text: &str) -> Result<BackendTarget, MalformedValue> {
    const FORM: &str = ", which is not of the form _service._proto.domain";
    let mut parts = text.splitn(3, '.');
    for _ in 0..2 {
        let label = parts.next().and_then(|label| label.strip_prefix('_')).ok_or(not_so(FORM))?;
        // The underscore is a byte of the label.
        is_label(label, LONGEST_LABEL - 1)?;
    }
    is_name(parts.next().ok_or(not_so(FORM))?)?;
    is_short(text)?;
    Ok(BackendTarget::Service(text.to_ascii_lowercase()))
}

/// Whether it is a host name (RFC 1123). One that ends with a number is a slip in an IPv4 address.
fn is_name(name: &str) -> Result<(), MalformedValue> {
    is_short(name)?;
    name.split('.').try_for_each(|label| is_label(label, LONGEST_LABEL))?;
    let last = name.rsplit('.').next().unwrap_or_default();
    if last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(not_so(", which ends with a number and is not an IP address"));
    }
    Ok(())
}

fn is_short(name: &str) -> Result<(), MalformedValue> {
    if name.len() <= LONGEST_NAME { Ok(()) } else { Err(not_so(", whose name has more than 253 bytes")) }
}

fn is_label(label: &str, longest: usize) -> Result<(), MalformedValue> {
    let fits = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if fits && (1..=longest).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-') {
        return Ok(());
    }
    Err(not_so(", which has a label that is not 1 to 63 letters, digits and, between them, \"-\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn because(text: &str) -> &'static str {
        target(text).unwrap_err().because
    }

    fn host(name: &str, port: u16) -> BackendTarget {
        BackendTarget::Host { name: name.to_owned(), port }
    }

    #[test]
    fn target_is_an_address_a_host_or_a_service() {
        for (text, expected) in [
            ("10.0.1.10:80", BackendTarget::Address("10.0.1.10:80".parse().unwrap())),
            ("[::1]:65535", BackendTarget::Address("[::1]:65535".parse().unwrap())),
            ("localhost:1", host("localhost", 1)),
            ("name.example.com:80", host("name.example.com", 80)),
            ("1.2.3.4a:80", host("1.2.3.4a", 80)),
            ("xn--bcher-kva.example:65535", host("xn--bcher-kva.example", 65_535)),
            ("_http._tcp.example.com", BackendTarget::Service("_http._tcp.example.com".to_owned())),
        ] {
            assert_eq!(target(text), Ok(expected.clone()), "{text}");
            assert_eq!(expected.to_string(), text);
        }
    }

    #[test]
    fn names_are_case_insensitive() {
        assert_eq!(target("DB.Internal:80"), Ok(host("db.internal", 80)));
        assert_eq!(target("_Http._TCP.Example.com"), target("_http._tcp.example.com"));
    }

    #[test]
    fn port_is_1_to_65535() {
        for text in ["10.0.0.1:0", "db:0", "db:65536", "db:", "db:+80", "db:http", "db:-1"] {
            assert_eq!(because(text), NO_PORT, "{text}");
        }
        for text in ["10.0.0.1", "db.internal", ""] {
            assert_eq!(because(text), ", which has no port", "{text}");
        }
    }

    #[test]
    fn wildcard_address_is_not_a_backend() {
        for text in ["0.0.0.0:80", "[::]:80"] {
            assert_eq!(because(text), ", which means every address");
        }
    }

    #[test]
    fn mistyped_address_is_not_a_host_name() {
        for text in ["10.0.0:80", "10.0.0.256:80", "10.0.0.1.1:80", "5:80"] {
            assert_eq!(because(text), ", which ends with a number and is not an IP address", "{text}");
        }
        for text in ["::1:80", "fd00::10:80"] {
            assert!(because(text).contains("in brackets"), "{text}");
        }
    }

    #[test]
    fn labels_have_a_length_and_an_alphabet() {
        let long = |length: usize| "a".repeat(length);
        assert!(target(&format!("{}.b:80", long(63))).is_ok());
        assert!(target(&format!("_{}._tcp.b", long(62))).is_ok());
        let bad = [
            format!("{}.b:80", long(64)),
            format!("_{}._tcp.b", long(63)),
            "a..b:80".to_owned(),
            "a.b.:80".to_owned(),
            ".b:80".to_owned(),
            ":80".to_owned(),
            "-a.b:80".to_owned(),
            "a-.b:80".to_owned(),
            "a_b:80".to_owned(),
            "a b:80".to_owned(),
            "b\u{fc}cher:80".to_owned(),
            "[db]:80".to_owned(),
            "_._tcp.b".to_owned(),
            "_-a._tcp.b".to_owned(),
            "_a._tcp._b".to_owned(),
            "_a._tcp.b.".to_owned(),
        ];
        for text in bad {
            assert!(because(&text).starts_with(", which has a label"), "{text}");
        }
    }

    #[test]
    fn names_have_253_bytes_at_most() {
        let name = |length: usize| {
            ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(length - 192)].join(".")
        };
        assert!(target(&format!("{}:80", name(253))).is_ok());
        assert_eq!(because(&format!("{}:80", name(254))), ", whose name has more than 253 bytes");
        let name = |length: usize| format!("_a._b.{}", name(length - 6));
        assert!(target(&name(253)).is_ok());
        assert_eq!(because(&name(254)), ", whose name has more than 253 bytes");
    }

    #[test]
    fn service_name_has_a_protocol_and_a_domain_and_no_port() {
        assert_eq!(because("_http._tcp.b:80"), ": a service name has no port; its SRV records have one");
        for text in ["_http", "_http._tcp", "_http.tcp.b", "_http.b"] {
            assert_eq!(because(text), ", which is not of the form _service._proto.domain", "{text}");
        }
        assert_eq!(because("_http._tcp.5"), ", which ends with a number and is not an IP address");
    }
}
