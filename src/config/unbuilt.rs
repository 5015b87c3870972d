//! The parts of the contract that this version does not build: recognised, and refused instead of ignored.

use toml::de::DeValue;

/// One key that is refused. Once it is built, its line goes.
pub(super) struct Part {
    /// The kind of table that holds it.
    table: &'static str,
    /// The key.
    pub(super) key: &'static str,
    refused: Refused,
    /// What must hold, to stand before ", found".
    pub(super) must: &'static str,
}

/// Which values of a key are refused.
enum Refused {
    /// Each.
    All,
    /// Each but the one that asks for nothing.
    AllBut(fn(&DeValue<'_>) -> bool),
    /// Those that ask for what is not built.
    Those(fn(&DeValue<'_>) -> bool),
}

/// What becomes of a value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is read as any other.
    Built,
    /// It asks for nothing, and nobody reads it.
    Inert,
    /// It is a fault.
    Refused,
}

impl Part {
    /// Judges a value of the key.
    pub(super) fn verdict(&self, value: &DeValue<'_>) -> Verdict {
        match self.refused {
            Refused::AllBut(inert) if inert(value) => Verdict::Inert,
            Refused::All | Refused::AllBut(_) => Verdict::Refused,
            Refused::Those(asks) if asks(value) => Verdict::Refused,
            Refused::Those(_) => Verdict::Built,
        }
    }
}

/// The refused keys of a kind of table.
pub(super) fn parts_of(kind: &str) -> impl Iterator<Item = &'static Part> {
    UNBUILT.iter().filter(move |part| part.table == kind)
}

use Refused::{All, AllBut, Those};

#[rustfmt::skip]
const UNBUILT: &[Part] = &[
    part("process", "watch", AllBut(is_false), "must be false: reloading when a file changes is not built in this version"),
    part("admin", "socket", All, "must be absent: the control socket is not built in this version"),
    part("listener", "protocol", Those(is_udp), "must be \"tcp\": UDP is not built in this version"),
    part("pool", "balance", Those(is_unbuilt_balance), "must be \"p2c\" or \"round-robin\": that way of balancing is not built in this version"),
    part("pool", "prefer-zone", AllBut(is_empty_text), "must be absent or \"\": preferring a zone is not built in this version"),
    part("pool", "slow-start", AllBut(is_no_time), "must be absent or \"0s\": slow start is not built in this version"),
    part("pool", "queue", AllBut(is_no_queue), "must be absent or { length = 0 }: queueing is not built in this version"),
    part("pool", "panic-threshold", AllBut(is_zero), "must be absent or 0: failing open is not built in this version"),
    part("pool", "ejection", All, "must be absent: ejection is not built in this version"),
    part("backend", "address", Those(is_host_name), "must be an IP address and a port: looking up host names is not built in this version"),
    part("backend", "weight", All, "must be absent: weights are not built in this version"),
    part("backend", "zone", All, "must be absent: zones are not built in this version"),
    part("backend", "max-sessions", All, "must be absent: a limit for one backend is not built in this version"),
    part("backend", "backup", All, "must be absent: backup backends are not built in this version"),
    part("pool.health", "kind", Those(is_unbuilt_probe), "must be \"tcp\" or \"none\": that kind of probe is not built in this version"),
    part("pool.health", "path", All, "must be absent: HTTP probes are not built in this version"),
    part("pool.health", "host", All, "must be absent: HTTP probes are not built in this version"),
    part("pool.health", "expect-status", All, "must be absent: HTTP probes are not built in this version"),
    part("pool.health", "send", All, "must be absent: probes that send and expect are not built in this version"),
    part("pool.health", "expect", All, "must be absent: probes that send and expect are not built in this version"),
    part("pool.health", "send-proxy", All, "must be absent: a PROXY header before a probe is not built in this version"),
    part("tenant.limits", "flows", All, "must be absent: UDP is not built in this version"),
    part("tenant.limits", "datagram-rate", All, "must be absent: UDP is not built in this version"),
];

const fn part(table: &'static str, key: &'static str, refused: Refused, must: &'static str) -> Part {
    Part { table, key, refused, must }
}

fn is_false(value: &DeValue<'_>) -> bool {
    value.as_bool() == Some(false)
}

fn is_udp(value: &DeValue<'_>) -> bool {
    value.as_str() == Some("udp")
}

fn is_unbuilt_balance(value: &DeValue<'_>) -> bool {
    matches!(value.as_str(), Some("least-sessions" | "maglev" | "maglev-endpoint"))
}

fn is_unbuilt_probe(value: &DeValue<'_>) -> bool {
    matches!(value.as_str(), Some("http" | "exchange"))
}

fn is_empty_text(value: &DeValue<'_>) -> bool {
    value.as_str() == Some("")
}

fn is_no_time(value: &DeValue<'_>) -> bool {
    value.as_str().and_then(|text| super::unit::duration(text).ok()).is_some_and(|time| time.is_zero())
}

fn is_zero(value: &DeValue<'_>) -> bool {
    value.as_integer().is_some_and(|number| i64::from_str_radix(number.as_str(), number.radix()) == Ok(0))
}

/// Whether it is a queue of length 0, with nothing in it that nobody knows.
fn is_no_queue(value: &DeValue<'_>) -> bool {
    let known = |key: &str| key == "length" || key == "timeout";
    value.as_table().is_some_and(|queue| {
        queue.get("length").is_some_and(|length| is_zero(length.get_ref()))
            && queue.keys().all(|key| known(key.get_ref()))
    })
}

/// Whether it has the form of a host name and a port, and is no address.
fn is_host_name(value: &DeValue<'_>) -> bool {
    let Some((host, port)) = value.as_str().and_then(|text| text.rsplit_once(':')) else { return false };
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    port.parse::<u16>().is_ok() && host.chars().all(fits) && host.contains(|c: char| c.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(table: &str, key: &str, value: &str) -> Verdict {
        let value = DeValue::parse(value).unwrap();
        let part = parts_of(table).find(|part| part.key == key).unwrap();
        part.verdict(value.get_ref())
    }

    #[test]
    fn values_that_ask_for_nothing_are_inert() {
        for (table, key, inert, refused) in [
            ("process", "watch", "false", vec!["true", "0", "\"false\""]),
            ("pool", "prefer-zone", "\"\"", vec!["\"usw2-az1\"", "0"]),
            ("pool", "slow-start", "\"0s\"", vec!["\"1ms\"", "0", "\"0\""]),
            ("pool", "panic-threshold", "0", vec!["1", "\"0\"", "0.0"]),
            (
                "pool",
                "queue",
                "{ length = 0 }",
                vec!["{}", "{ length = 1 }", "{ length = 0, time = 0 }", "0"],
            ),
        ] {
            assert_eq!(verdict(table, key, inert), Verdict::Inert, "{key}");
            for value in refused {
                assert_eq!(verdict(table, key, value), Verdict::Refused, "{key} {value}");
            }
        }
        assert_eq!(verdict("pool", "queue", "{ length = 0, timeout = \"1s\" }"), Verdict::Inert);
    }

    #[test]
    fn values_that_are_built_are_left_to_be_read() {
        for (table, key, built, refused) in [
            ("listener", "protocol", "\"tcp\"", "\"udp\""),
            ("pool", "balance", "\"p2c\"", "\"maglev\""),
            ("pool.health", "kind", "\"none\"", "\"http\""),
            ("backend", "address", "\"10.0.0.1:80\"", "\"db.internal:80\""),
            ("backend", "address", "\"[::1]:80\"", "\"localhost:80\""),
            ("backend", "address", "\"db.internal\"", "\"a:0\""),
            ("backend", "address", "5", "\"A_b-c.1:65535\""),
        ] {
            assert_eq!(verdict(table, key, built), Verdict::Built, "{key} {built}");
            assert_eq!(verdict(table, key, refused), Verdict::Refused, "{key} {refused}");
        }
    }

    #[test]
    fn every_message_says_that_it_is_not_built() {
        assert!(UNBUILT.iter().all(
            |part| part.must.starts_with("must be ") && part.must.contains(" not built in this version")
        ));
        assert_eq!(verdict("tenant.limits", "flows", "5000"), Verdict::Refused);
        assert_eq!(parts_of("timeouts").count(), 0);
    }
}
