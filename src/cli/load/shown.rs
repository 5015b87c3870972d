//! How the load generator's report is shown.

use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::ModeName;
use crate::cli::plot;
use crate::lab::load::{Datagrams, Interval, Report};

/// Percentiles that are shown; those of an interval stand in one line.
const PERCENTILES: [f64; 7] = [50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99];
const OF_INTERVALS: [f64; 3] = [50.0, 95.0, 99.0];

fn per_second(count: u64, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
    let count = count as f64;
    count / took.as_secs_f64().max(f64::MIN_POSITIVE)
}

pub(super) fn as_text(report: &Report, mode: ModeName, interval: Option<Duration>) -> String {
    let mut text = format!(
        "{:.0} operations/s, {:.1} MiB/s over {:.1} s; {} failed, {} misrouted, {} not sent, {} noise\n",
        per_second(report.operations, report.took),
        per_second(report.bytes, report.took) / f64::from(1 << 20),
        report.took.as_secs_f64(),
        report.failed(),
        report.misrouted,
        report.not_sent,
        report.noise,
    );
    for (failure, count) in &report.failures {
        writeln!(text, "  failed, {}: {count}", failure.word()).unwrap_or_default();
    }
    if matches!(mode, ModeName::Udp) {
        let Datagrams { lost, late, reordered, duplicates } = report.datagrams;
        writeln!(
            text,
            "datagrams without an answer {lost}, answered late {late}, reordered {reordered}, twice {duplicates}"
        )
        .unwrap_or_default();
    }
    if !matches!(mode, ModeName::ToClient | ModeName::ToBackend) && report.operations > 0 {
        text.push_str("\nlatency\n");
        for percentile in PERCENTILES {
            let value = report.latency.value_at_percentile(percentile);
            writeln!(text, "{:>10} {}", format!("p{percentile}"), plot::shown(value)).unwrap_or_default();
        }
        writeln!(text, "{:>10} {}\n", "max", plot::shown(report.latency.max())).unwrap_or_default();
        text.push_str(&plot::bars(&report.latency));
    }
    if let Some(interval) = interval {
        let percentiles =
            OF_INTERVALS.map(|percentile| format!("{:>10}", format!("p{percentile}"))).join(" ");
        writeln!(text, "\n{:>10} {:>12} {:>8} {percentiles} {:>10}", "from", "operations", "failed", "max")
            .unwrap_or_default();
        for (from, Interval { operations, failed, latency }) in starts(interval).zip(&report.intervals) {
            let from = format!("{} s", from.as_secs_f64());
            write!(text, "{from:>10} {operations:>12} {failed:>8}").unwrap_or_default();
            for percentile in OF_INTERVALS.into_iter().chain([100.0]) {
                let value = match operations {
                    0 => "-".to_owned(),
                    _ => plot::shown(latency.value_at_percentile(percentile)),
                };
                write!(text, " {value:>10}").unwrap_or_default();
            }
            text.push('\n');
        }
    }
    text
}

/// When each interval begins, from the first on.
fn starts(interval: Duration) -> impl Iterator<Item = Duration> {
    (0..).map(move |number| interval * number)
}

/// The percentiles of a histogram and its greatest value.
fn percentiles<T: hdrhistogram::Counter>(latency: &Histogram<T>) -> Map<String, Value> {
    let each =
        PERCENTILES.map(|percentile| (format!("p{percentile}"), latency.value_at_percentile(percentile)));
    each.into_iter()
        .chain([("max".to_owned(), latency.max())])
        .map(|(name, value)| (name, json!(value)))
        .collect()
}

pub(super) fn as_json(report: &Report, interval: Option<Duration>) -> serde_json::Value {
    let intervals = starts(interval.unwrap_or_default()).zip(&report.intervals).map(|(from, interval)| {
        json!({
            "from_seconds": from.as_secs_f64(),
            "operations": interval.operations,
            "failed": interval.failed,
            "latency_ns": percentiles(&interval.latency),
        })
    });
    json!({
        "operations": report.operations,
        "operations_per_second": per_second(report.operations, report.took),
        "bytes": report.bytes,
        "bytes_per_second": per_second(report.bytes, report.took),
        "failed": report.failures.iter().map(|(failure, count)| (failure.word(), *count))
            .collect::<std::collections::BTreeMap<_, _>>(),
        "misrouted": report.misrouted,
        "not_sent": report.not_sent,
        "noise": report.noise,
        "lost": report.datagrams.lost,
        "late": report.datagrams.late,
        "reordered": report.datagrams.reordered,
        "duplicates": report.datagrams.duplicates,
        "seconds": report.took.as_secs_f64(),
        "latency_ns": percentiles(&report.latency),
        "intervals": intervals.collect::<Vec<_>>(),
    })
}
