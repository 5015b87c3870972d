//! Values as an operator reads them, and the keys that have another one.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use super::KeyChange;
use crate::config::{BandwidthLimit, RateLimit};

/// Steps on the way to a value that are names of variants and no keys of a file.
const NO_KEYS: [&str; 7] = ["identity", "Header", "Fixed", "ask", "Http", "Exchange", "file"];

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
        let from = old.remove(&key);
        if from.as_ref() != Some(&to) {
            differing.push(KeyChange { key, from: Some(from.unwrap_or_else(none)), to: Some(to) });
        }
    }
    differing.extend(old.into_iter().map(|(key, from)| KeyChange {
        key,
        from: Some(from),
        to: Some(none()),
    }));
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
                let inside = match (NO_KEYS.contains(&name.as_str()), key.is_empty()) {
                    (true, _) => key.clone(),
                    (false, true) => name.replace('_', "-"),
                    (false, false) => format!("{key}.{}", name.replace('_', "-")),
                };
                flatten(inside, value, flat);
            }
        }
        Value::Null => {}
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            flat.insert(key, text(value));
        }
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
