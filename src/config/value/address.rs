//! Addresses and networks. An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) is refused: sockets are of one family,
//! so that nothing could be bound to it or come from it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use toml::de::DeValue;

use super::{must_be, text};
use crate::config::section::{FromToml, quoted};
use crate::config::unit::{self, BindPorts};

/// The length of the prefix that all IPv4-mapped addresses share.
const MAPPED_PREFIX: u8 = 96;

/// Refuses an IPv4-mapped IPv6 address; `as_ipv4` says how to write it instead.
pub(super) fn not_mapped(
    ip: IpAddr,
    found: &str,
    as_ipv4: impl FnOnce(IpAddr) -> String,
) -> Result<(), String> {
    let canonical = ip.to_canonical();
    if canonical == ip { Ok(()) } else { Err(mapped(found, &as_ipv4(canonical))) }
}

fn mapped(found: &str, as_ipv4: &str) -> String {
    format!("must not be an IPv4-mapped IPv6 address, found {}: write {}", quoted(found), quoted(as_ipv4))
}

impl FromToml for BindPorts {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| must_be(unit::PORTS, value))?;
        let ports = unit::ports(text)
            .map_err(|malformed| format!("{malformed}, found {}{}", quoted(text), malformed.because))?;
        not_mapped(ports.first.ip(), text, |ip| match (ports.first.port(), ports.last) {
            (first, last) if first == last => format!("{ip}:{first}"),
            (first, last) => format!("{ip}:{first}-{last}"),
        })?;
        Ok(ports)
    }
}

impl FromToml for SocketAddr {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        const WANTED: &str = "an IP address and a port, such as \"127.0.0.1:9900\" or \"[::]:9900\"";
        let address: Self = text(value, WANTED, |text| text.parse().ok())?;
        let found = value.as_str().unwrap_or_default();
        not_mapped(address.ip(), found, |ip| Self::new(ip, address.port()).to_string())?;
        Ok(address)
    }
}

/// The address of a DNS server; the default port is 53.
pub(in crate::config) struct Nameserver;

impl FromToml for Nameserver {
    type Value = SocketAddr;

    fn from_toml(value: &DeValue<'_>) -> Result<SocketAddr, String> {
        const PORT: u16 = 53;
        const WANTED: &str = "an IP address with an optional port, such as \"10.0.0.2\" or \"[fd00::2]:53\"";
        let reachable = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
        let address = text(value, WANTED, |text| {
            let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, PORT)));
            address.ok().filter(reachable)
        })?;
        let found = value.as_str().unwrap_or_default();
        not_mapped(address.ip(), found, |ip| SocketAddr::new(ip, address.port()).to_string())?;
        Ok(address)
    }
}

impl FromToml for IpAddr {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let ip: Self = text(value, "an IP address, such as \"10.0.0.5\"", |text| text.parse().ok())?;
        not_mapped(ip, value.as_str().unwrap_or_default(), |ip| ip.to_string())?;
        Ok(ip)
    }
}

impl FromToml for IpNet {
    type Value = Self;

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let network = text(value, unit::NETWORK, |text| unit::network(text).ok())?;
        let canonical = network.network().to_canonical();
        // A shorter prefix, such as ::/0, holds other addresses too.
        match network.prefix_len().checked_sub(MAPPED_PREFIX) {
            Some(bits) if canonical != network.network() => {
                Err(mapped(value.as_str().unwrap_or_default(), &format!("{canonical}/{bits}")))
            }
            _ => Ok(network),
        }
    }
}

/// A name by which a browser or a scraper asks, in lower case.
pub(in crate::config) struct HostName;

impl FromToml for HostName {
    type Value = String;

    fn from_toml(value: &DeValue<'_>) -> Result<String, String> {
        const WANTED: &str =
            "a host name without a port, such as \"proxy.internal\" (IP addresses are always accepted)";
        /// Of a name and of a label (RFC 1035, section 2.3.4).
        const LONGEST: (usize, usize) = (253, 63);
        text(value, WANTED, |text| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            let is_label = |label: &str| (1..=LONGEST.1).contains(&label.len()) && label.bytes().all(plain);
            let is_name = text.len() <= LONGEST.0 && text.split('.').all(is_label);
            (is_name && text.parse::<IpAddr>().is_err()).then(|| text.to_ascii_lowercase())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_read::read;
    use super::*;
    use crate::config::BackendTarget;

    #[test]
    fn name_server_port_defaults_to_53() {
        for (text, address) in [
            ("\"10.0.0.2\"", "10.0.0.2:53"),
            ("\"10.0.0.2:5353\"", "10.0.0.2:5353"),
            ("\"fd00::2\"", "[fd00::2]:53"),
            ("\"[fd00::2]:65535\"", "[fd00::2]:65535"),
        ] {
            assert_eq!(read::<Nameserver>(text), Ok(address.parse().unwrap()), "{text}");
        }
        for text in ["\"10.0.0.2:0\"", "\"0.0.0.0\"", "\"[::]:53\"", "\"ns.example\"", "\"\"", "53"] {
            assert!(read::<Nameserver>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn host_name_has_no_port_and_is_no_address() {
        assert_eq!(read::<HostName>("\"Proxy-1.Internal\""), Ok("proxy-1.internal".to_owned()));
        for text in [
            "",
            "proxy:9900",
            "10.0.0.1",
            "[::1]",
            "*.internal",
            "a..b",
            "internal.",
            "http://a",
            &"a".repeat(64),
        ] {
            assert!(read::<HostName>(&format!("\"{text}\"")).is_err(), "{text}");
        }
    }

    #[test]
    fn mapped_address_is_refused_with_its_ipv4_form() {
        fn refused<T: FromToml>(found: &str, instead: &str) {
            let message = read::<T>(&format!("\"{found}\"")).map(|_| ()).unwrap_err();
            let expected =
                format!("must not be an IPv4-mapped IPv6 address, found \"{found}\": write \"{instead}\"");
            assert_eq!(message, expected);
        }
        refused::<BindPorts>("[::ffff:127.0.0.1]:8099", "127.0.0.1:8099");
        refused::<BindPorts>("[::ffff:7f00:1]:8000-8003", "127.0.0.1:8000-8003");
        refused::<SocketAddr>("[::ffff:127.0.0.1]:9900", "127.0.0.1:9900");
        refused::<Nameserver>("::ffff:10.0.0.2", "10.0.0.2:53");
        refused::<Nameserver>("[::ffff:10.0.0.2]:5353", "10.0.0.2:5353");
        refused::<IpAddr>("::ffff:10.0.0.5", "10.0.0.5");
        refused::<IpNet>("::ffff:10.0.0.0/104", "10.0.0.0/8");
        refused::<IpNet>("::ffff:10.0.0.1", "10.0.0.1/32");
        refused::<IpNet>("::ffff:0:0/96", "0.0.0.0/0");
        refused::<BackendTarget>("[::ffff:10.0.1.10]:80", "10.0.1.10:80");
    }

    #[test]
    fn address_that_only_resembles_a_mapped_one_is_taken() {
        for text in
            ["\"::/0\"", "\"::ffff:0:0:0/96\"", "\"::/96\"", "\"::fffe:10.0.0.0/104\"", "\"::ffff:0:0/95\""]
        {
            assert!(read::<IpNet>(text).is_ok(), "{text}");
        }
        for text in ["\"[::1]:80\"", "\"[::]:80\"", "\"[::10.0.0.1]:80\""] {
            assert!(read::<SocketAddr>(text).is_ok(), "{text}");
        }
    }
}
