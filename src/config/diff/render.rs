//! Values as an operator reads them, and the keys that have another one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use super::KeyChange;
use crate::config::{BandwidthLimit, RateLimit};

/// Steps on the way to a value that are names of variants and no keys of a file.
const NO_KEYS: [&str; 5] = ["identity", "Header", "Fixed", "ask", "file"];

/// The keys of a table that are different. They are found in whatever the table serialises to, so that no new key can
/// be forgotten here.
pub(in crate::config) fn keys<T: Serialize>(before: &T, after: &T) -> Vec<KeyChange> {
    let [mut old, new] = [before, after].map(|table| {
        let mut flat = BTreeMap::new();
        flatten(String::new(), &serde_json::to_value(table).unwrap_or_default(), &mut flat);
        flat
    });
    let mut differing = Vec::new();
    for (key, to) in new {
        let from = old.remove(&key).unwrap_or_else(none);
        differing.push(KeyChange { key, from: Some(from), to: Some(to) });
    }
    differing.extend(old.into_iter().map(|(key, from)| KeyChange {
        key,
        from: Some(from),
        to: Some(none()),
    }));
    differing.retain(|change| change.from != change.to);
    differing.sort_by(|a, b| a.key.cmp(&b.key));
    differing
}

fn none() -> String {
    "none".to_owned()
}

fn flatten(key: String, value: &Value, flat: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(object) if leaf(object).is_none() => {
            for (name, value) in object {
                let (name, value) = as_in_a_file(name, value);
                let inside = match (NO_KEYS.contains(&name), key.is_empty()) {
                    (true, _) => key.clone(),
                    (false, true) => name.replace('_', "-"),
                    (false, false) => format!("{key}.{}", name.replace('_', "-")),
                };
                flatten(inside, &value, flat);
            }
        }
        Value::Null => {}
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            flat.insert(key, text(value));
        }
    }
}

/// A field by the name and value of its key, where they are others.
fn as_in_a_file<'v>(name: &'v str, value: &'v Value) -> (&'v str, Cow<'v, Value>) {
    let text = |text: &str| Cow::Owned(Value::from(text));
    match (name, value) {
        ("trusted", _) => ("trusted-sources", Cow::Borrowed(value)),
        ("prefix", Value::Bool(true)) => ("match", text("prefix")),
        ("prefix", Value::Bool(false)) => ("match", text("contains")),
        ("ask", Value::String(_)) => ("kind", text("tcp")),
        ("ask", Value::Object(kinds)) => {
            let (kind, keys) = kinds.iter().next().unzip();
            let mut keys = keys.and_then(Value::as_object).cloned().unwrap_or_default();
            keys.insert("kind".to_owned(), Value::from(kind.map(|kind| kind.to_lowercase())));
            ("ask", Cow::Owned(Value::Object(keys)))
        }
        ("on_no_endpoint" | "on_unknown_endpoint", Value::Object(tenant)) => {
            let tenant = tenant.values().next().and_then(Value::as_str).unwrap_or_default();
            (name, text(&format!("tenant:{tenant}")))
        }
        _ => (name, Cow::Borrowed(value)),
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => none(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Object(object) => leaf(object).unwrap_or_else(|| value.to_string()),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// What serialises to a table and is one value: durations, ranges and limits.
fn leaf(object: &Map<String, Value>) -> Option<String> {
    let whole = || Value::Object(object.clone());
    if object.contains_key("burst") {
        let a_rate = serde_json::from_value(whole()).map(rate);
        return a_rate.or_else(|_| serde_json::from_value(whole()).map(bandwidth)).ok();
    }
    let number = |key: &str| object.get(key).and_then(Value::as_u64);
    if let (Some(secs), Some(nanos), 2) = (number("secs"), number("nanos"), object.len()) {
        return Some(duration(Duration::new(secs, u32::try_from(nanos).ok()?)));
    }
    let (start, end) = (number("start")?, number("end")?);
    Some(if start == end { start.to_string() } else { format!("{start}-{end}") })
}

fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

fn rate(rate: RateLimit) -> String {
    let nanos = rate.interval.as_nanos().max(1);
    let second = Duration::from_secs(1).as_nanos();
    let each = if nanos <= second {
        // The interval was rounded to nanoseconds, so the rate is rounded back.
        format!("{}/s", (second + nanos / 2) / nanos)
    } else {
        format!("one in {}", duration(rate.interval))
    };
    format!("{each} (burst {})", rate.burst)
}

fn bandwidth(bandwidth: BandwidthLimit) -> String {
    format!("{}/s (burst {})", size(bandwidth.bytes_per_second), size(bandwidth.burst))
}

/// Bytes in the largest unit that divides them.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let whole = units.into_iter().find(|(_, bits)| bytes > 0 && bytes.trailing_zeros() >= *bits);
    whole.map_or_else(|| format!("{bytes}B"), |(unit, bits)| format!("{}{unit}", bytes >> bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, TABLES};

    /// Lists that are empty here.
    const ALL: [&str; 3] = ["listeners", "pools", "tenants"];

    /// The keys of a table, as a difference names them.
    fn named<T: Serialize>(table: &str, row: &T) -> Vec<String> {
        let row = serde_json::to_value(row).unwrap();
        keys(&Value::Null, &row).into_iter().map(|change| format!("{table}{}", change.key)).collect()
    }

    #[test]
    fn difference_names_keys_as_they_are_declared() {
        let file = std::path::Path::new("tests/config/valid/everything.toml");
        let mut config = Config::load(file).unwrap_or_else(|faults| panic!("{faults}"));
        let mut found = Vec::new();
        for listener in std::mem::take(&mut config.listeners) {
            found.extend(named("listener.", &listener));
        }
        for mut pool in std::mem::take(&mut config.pools) {
            let backends = std::mem::take(&mut pool.backends);
            found.extend(named("pool.", &pool));
            found.extend(backends.iter().flat_map(|backend| named("pool.backends.", backend)));
        }
        found.extend(std::mem::take(&mut config.tenants).iter().flat_map(|tenant| named("tenant.", tenant)));
        found.extend(named("", &config));
        // The backend's address is its name, and the tenant's state is a change of its own.
        found.retain(|key| !key.starts_with("pool.backends.target") && key != "tenant.enabled");
        let declared: Vec<_> = TABLES
            .iter()
            .flat_map(|table| table.keys.iter().map(|key| format!("{}.{}", table.name(), key.name)))
            .collect();
        let is_declared = |key: &String| {
            declared.contains(key) || key.starts_with("tenant.labels.") || key.starts_with("tenant.routes.")
        };
        let others: Vec<_> =
            found.iter().filter(|key| !is_declared(key) && !ALL.contains(&key.as_str())).collect();
        assert!(found.len() > 100 && others.is_empty(), "{others:?}");
    }

    #[test]
    fn values_are_printed_as_written() {
        assert_eq!(
            [0, 1023, 1024, 1 << 20, 50 << 20, 1 << 30].map(size),
            ["0B", "1023B", "1KiB", "1MiB", "50MiB", "1GiB"]
        );
        let every = |interval| rate(RateLimit { interval, burst: 4 });
        assert_eq!(every(Duration::from_millis(5)), "200/s (burst 4)");
        assert_eq!(every(Duration::from_nanos(333_333_333)), "3/s (burst 4)");
        assert_eq!(every(Duration::from_secs(60)), "one in 1m (burst 4)");
    }
}
