//! Units as text: durations, sizes, port ranges and networks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

/// Why a text cannot be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be {must}")]
pub(crate) struct MalformedValue {
    /// What it must be, to follow "must be".
    pub must: &'static str,
    /// What is wrong with the text, to follow the text itself; often empty.
    pub because: &'static str,
}

/// What a duration must be.
pub(crate) const DURATION: &str = "a duration with a unit, such as \"5s\" (ms, s, m or h)";
/// What a size must be.
pub(crate) const SIZE: &str = "a size with a unit, such as \"64MiB\" (B, KiB, MiB, GiB, KB, MB or GB)";
/// What a rate must be.
pub(crate) const RATE: &str = "a rate with a unit of time, such as \"200/s\" (s, m or h)";
/// What a bandwidth must be.
pub(crate) const BANDWIDTH: &str = "a size with a unit in each second, such as \"50MiB/s\"";
/// What a bind must be.
pub(crate) const PORTS: &str =
    "an IP address and a port or a range of ports, such as \"0.0.0.0:8080\" or \"[::]:8080-8083\"";
/// What a network must be.
pub(crate) const NETWORK: &str = "a network, such as \"10.0.0.0/16\", or one IP address";

/// Nanoseconds of each unit of time.
const TIMES: [(&str, u64); 4] =
    [("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];
/// Bytes of each unit of size.
const SIZES: [(&str, u64); 7] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

/// Reads a whole number and its unit; the clock counts nanoseconds in 64 bits, so 584 years are the most.
///
/// # Errors
/// Where it is no number, has no unit or another one, or is longer.
pub(crate) fn duration(text: &str) -> Result<Duration, MalformedValue> {
    counted(text, &TIMES, DURATION, "at most 5124095h").map(Duration::from_nanos)
}

/// Reads a whole number and its unit, as bytes.
///
/// # Errors
/// Where it is no number, has no unit or another one, or is more than 64 bits count.
pub(crate) fn size(text: &str) -> Result<u64, MalformedValue> {
    counted(text, &SIZES, SIZE, "at most 17179869183GiB")
}

fn counted(
    text: &str,
    units: &[(&str, u64)],
    must: &'static str,
    limit: &'static str,
) -> Result<u64, MalformedValue> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if digits.is_empty() {
        return Err(MalformedValue { must, because: "" });
    }
    if unit.is_empty() {
        return Err(MalformedValue { must, because: ", which has no unit" });
    }
    if unit.contains(char::is_whitespace) {
        return Err(MalformedValue { must, because: ", which contains a space" });
    }
    if unit.starts_with('.') {
        return Err(MalformedValue { must, because: ", which is not a whole number: use a smaller unit" });
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        return Err(MalformedValue { must, because: ", which has an unknown unit" });
    };
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(*factor));
    count.ok_or(MalformedValue { must: limit, because: "" })
}

/// Reads a whole number and a unit of time behind a slash, as the time from one to the next: from one in an hour to
/// a million in a second, of which a nanosecond tells even the fastest from its neighbours by a thousandth.
///
/// # Errors
/// Where it has another form, or is slower or faster.
pub(crate) fn rate(text: &str) -> Result<Duration, MalformedValue> {
    const FASTEST: u64 = 1_000;
    let (count, unit) =
        text.split_once('/').ok_or(MalformedValue { must: RATE, because: ", which has no unit" })?;
    if count.is_empty() || !count.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(MalformedValue { must: RATE, because: "" });
    }
    let known = TIMES.iter().find(|(name, _)| *name == unit && unit != "ms");
    let (_, nanos) = known.ok_or(MalformedValue { must: RATE, because: ", which has an unknown unit" })?;
    let interval = count.parse::<u64>().map_or(Some(0), |count| nanos.checked_div(count));
    match interval {
        None => Err(MalformedValue {
            must: "more than 0",
            because: ": state = \"disabled\" stops all traffic of the tenant",
        }),
        Some(nanos) if nanos < FASTEST => Err(MalformedValue { must: "at most 1000000/s", because: "" }),
        Some(nanos) => Ok(Duration::from_nanos(nanos)),
    }
}

/// Reads a size in each second, as bytes.
///
/// # Errors
/// Where it has another form, or is less than a KiB.
pub(crate) fn bandwidth(text: &str) -> Result<u64, MalformedValue> {
    const LEAST: u64 = 1 << 10;
    let per_second = text.strip_suffix("/s");
    let size =
        per_second.ok_or(MalformedValue { must: BANDWIDTH, because: ", which has no \"/s\" at its end" })?;
    match counted(size, &SIZES, BANDWIDTH, "at most 17179869183GiB/s")? {
        bytes if bytes < LEAST => Err(MalformedValue { must: "at least 1KiB/s", because: "" }),
        bytes => Ok(bytes),
    }
}

/// One address with a port, or with several in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindPorts {
    /// The address with its first port; port 0 is the system's choice.
    pub first: SocketAddr,
    /// The last port, at least the first.
    pub last: u16,
}

impl BindPorts {
    /// How many ports there are, at least one.
    #[must_use]
    pub(crate) fn count(&self) -> usize {
        usize::from(self.last - self.first.port()) + 1
    }

    /// Each address with its port, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        let first = self.first;
        (first.port()..=self.last).map(move |port| {
            let mut address = first;
            address.set_port(port);
            address
        })
    }
}

/// Reads `ip:port` or `ip:first-last`; an IPv6 address stands in brackets.
///
/// # Errors
/// Where the address or a port is none, or the range is reversed or holds port 0.
pub(crate) fn ports(text: &str) -> Result<BindPorts, MalformedValue> {
    let form = MalformedValue { must: PORTS, because: "" };
    let (host, range) = text.rsplit_once(':').ok_or(form)?;
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let ranged = range.contains('-');
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(MalformedValue {
            must: "a range of ports from the lower to the higher",
            because: ", which is reversed",
        });
    }
    if ranged && first == 0 {
        return Err(MalformedValue { must: "a range of ports from 1 up", because: ", which starts at 0" });
    }
    let first = format!("{host}:{first}").parse().map_err(|_| without_brackets(host).unwrap_or(form))?;
    Ok(BindPorts { first, last })
}

fn port(digits: &str) -> Result<u16, MalformedValue> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(MalformedValue { must: PORTS, because: "" });
    }
    digits.parse().map_err(|_| MalformedValue { must: PORTS, because: ", which has a port above 65535" })
}

/// What is wrong with an IPv6 address that stands bare before its port.
fn without_brackets(host: &str) -> Option<MalformedValue> {
    host.parse::<std::net::Ipv6Addr>().ok()?;
    Some(MalformedValue { must: PORTS, because: ": write an IPv6 address in brackets before its port" })
}

/// Reads `network/bits`, or one address as a network of its own. Bits behind the prefix are cleared.
///
/// # Errors
/// Where it is neither.
pub(crate) fn network(text: &str) -> Result<IpNet, MalformedValue> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => text.parse::<IpNet>(),
    };
    network.map(|network| network.trunc()).map_err(|_| MalformedValue { must: NETWORK, because: "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why<T: std::fmt::Debug>(read: Result<T, MalformedValue>) -> &'static str {
        read.unwrap_err().because
    }

    #[test]
    fn durations_are_a_number_and_a_unit() {
        assert_eq!(duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1m"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("007h"), Ok(Duration::from_secs(7 * 3600)));
        for text in ["", "s", "-5s", "+5s", " 5s", "fast"] {
            assert_eq!(duration(text), Err(MalformedValue { must: DURATION, because: "" }), "{text}");
        }
        assert_eq!(why(duration("5")), ", which has no unit");
        assert_eq!(why(duration("1.5s")), ", which is not a whole number: use a smaller unit");
        assert_eq!(why(duration("5 s")), ", which contains a space");
        assert_eq!(why(duration("5s ")), ", which contains a space");
        for text in ["5S", "5sec", "1m30s", "5d", "5MiB"] {
            assert_eq!(why(duration(text)), ", which has an unknown unit", "{text}");
        }
    }

    #[test]
    fn durations_end_where_64_bits_of_nanoseconds_end() {
        assert_eq!(duration("18446744073s"), Ok(Duration::from_secs(18_446_744_073)));
        assert_eq!(duration("5124095h"), Ok(Duration::from_secs(18_446_742_000)));
        for text in ["18446744074s", "18446744073709551616ms", "5124096h", "99999999999999999999999h"] {
            assert_eq!(duration(text).unwrap_err().must, "at most 5124095h", "{text}");
        }
    }

    #[test]
    fn sizes_are_a_number_and_a_unit() {
        for (text, bytes) in [
            ("0B", 0),
            ("1B", 1),
            ("64KiB", 65_536),
            ("64MiB", 67_108_864),
            ("1GiB", 1_073_741_824),
            ("2KB", 2_000),
            ("3MB", 3_000_000),
            ("4GB", 4_000_000_000),
            ("18446744073709551615B", u64::MAX),
            ("17179869183GiB", 17_179_869_183 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        assert_eq!(why(size("64")), ", which has no unit");
        assert_eq!(why(size("64kib")), ", which has an unknown unit");
        assert_eq!(why(size("1.5GiB")), ", which is not a whole number: use a smaller unit");
        assert_eq!(size("MiB").unwrap_err().must, SIZE);
        for text in ["18446744073709551616B", "17179869184GiB"] {
            assert_eq!(size(text).unwrap_err().must, "at most 17179869183GiB", "{text}");
        }
    }

    #[test]
    fn rates_are_read_as_the_time_from_one_to_the_next() {
        for (text, nanos) in [
            ("200/s", 5_000_000),
            ("3/s", 333_333_333),
            ("10/m", 6_000_000_000),
            ("1/h", 3_600_000_000_000),
            ("1000000/s", 1_000),
            ("60000000/m", 1_000),
        ] {
            assert_eq!(rate(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        assert_eq!(why(rate("200")), ", which has no unit");
        for text in ["200/ms", "200/", "200/sec", "200/S", "200/ s", "200/s "] {
            assert_eq!(why(rate(text)), ", which has an unknown unit", "{text}");
        }
        for text in ["/s", "-1/s", "1.5/s", " 1/s", "1 /s"] {
            assert_eq!(rate(text), Err(MalformedValue { must: RATE, because: "" }), "{text}");
        }
        assert_eq!(rate("0/s").unwrap_err().must, "more than 0");
        for text in ["1000001/s", "60000001/m", "99999999999999999999999/h"] {
            assert_eq!(rate(text).unwrap_err().must, "at most 1000000/s", "{text}");
        }
    }

    #[test]
    fn bandwidths_are_a_size_in_a_second() {
        assert_eq!(bandwidth("50MiB/s"), Ok(50 << 20));
        assert_eq!(bandwidth("1KiB/s"), Ok(1024));
        assert_eq!(bandwidth("17179869183GiB/s"), Ok(17_179_869_183 << 30));
        for text in ["50MiB", "50MiB/m", "50", "50MiB/s "] {
            assert_eq!(why(bandwidth(text)), ", which has no \"/s\" at its end", "{text}");
        }
        assert_eq!(why(bandwidth("50/s")), ", which has no unit");
        assert_eq!(why(bandwidth("50Mbit/s")), ", which has an unknown unit");
        for text in ["1023B/s", "0MiB/s"] {
            assert_eq!(bandwidth(text).unwrap_err().must, "at least 1KiB/s", "{text}");
        }
        assert_eq!(bandwidth("17179869184GiB/s").unwrap_err().must, "at most 17179869183GiB/s");
    }

    #[test]
    fn bind_is_one_port_or_a_range() {
        let one = ports("0.0.0.0:8080").unwrap();
        assert_eq!((one.first, one.last, one.count()), ("0.0.0.0:8080".parse().unwrap(), 8080, 1));
        let four = ports("[::]:8080-8083").unwrap();
        assert_eq!(four.count(), 4);
        let spelled: Vec<String> = four.iter().map(|address| address.to_string()).collect();
        assert_eq!(spelled, ["[::]:8080", "[::]:8081", "[::]:8082", "[::]:8083"]);
        assert_eq!(ports("127.0.0.1:0").unwrap().iter().count(), 1);
        assert_eq!(ports("127.0.0.1:7-7").unwrap().count(), 1);
        assert_eq!(ports("127.0.0.1:1-65535").unwrap().count(), 65_535);
        assert_eq!(ports("[fe80::1%2]:80").unwrap().first, "[fe80::1%2]:80".parse().unwrap());
    }

    #[test]
    fn malformed_bind_names_its_error() {
        for text in ["", "8080", "0.0.0.0", ":8080", "0.0.0.0:", "0.0.0.0:-", "0.0.0.0:80-", "0.0.0.0:+80"] {
            assert_eq!(ports(text), Err(MalformedValue { must: PORTS, because: "" }), "{text}");
        }
        assert_eq!(ports("localhost:80"), Err(MalformedValue { must: PORTS, because: "" }));
        assert_eq!(ports("0.0.0.0:80-81-82"), Err(MalformedValue { must: PORTS, because: "" }));
        assert_eq!(why(ports("0.0.0.0:8083-8080")), ", which is reversed");
        assert_eq!(why(ports("0.0.0.0:0-5")), ", which starts at 0");
        assert_eq!(why(ports("0.0.0.0:65535-65536")), ", which has a port above 65535");
        assert_eq!(why(ports("0.0.0.0:99999999")), ", which has a port above 65535");
        assert_eq!(why(ports(":::80")), ": write an IPv6 address in brackets before its port");
    }

    #[test]
    fn network_is_a_prefix_or_an_address() {
        assert_eq!(network("10.0.0.0/16"), Ok("10.0.0.0/16".parse().unwrap()));
        assert_eq!(network("10.0.3.4/16"), Ok("10.0.0.0/16".parse().unwrap()));
        assert_eq!(network("10.0.0.1"), Ok("10.0.0.1/32".parse().unwrap()));
        assert_eq!(network("fd00::1"), Ok("fd00::1/128".parse().unwrap()));
        assert_eq!(network("0.0.0.0/0").unwrap().prefix_len(), 0);
        assert_eq!(network("::/128").unwrap().prefix_len(), 128);
        for text in ["", "10.0.0.0/33", "::/129", "10.0.0", "vpc", "10.0.0.0/", "10.0.0.1:80"] {
            assert_eq!(network(text), Err(MalformedValue { must: NETWORK, because: "" }), "{text}");
        }
        assert_eq!(network("x").unwrap_err().to_string(), format!("must be {NETWORK}"));
    }
}
