//! How the load generator's report is shown.

use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::LoadModeName;
use crate::cli::plot;
use crate::lab::load::{DatagramReport, LoadReport};

/// Percentiles that are shown; those of an interval stand in one line.
const PERCENTILES: [f64; 7] = [50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99];
const OF_INTERVALS: [f64; 3] = [50.0, 95.0, 99.0];

fn per_second(count: u64, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
    let count = count as f64;
    count / took.as_secs_f64().max(f64::MIN_POSITIVE)
}

pub(super) fn as_text(report: &LoadReport, mode: LoadModeName, interval: Option<Duration>) -> String {
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
        writeln!(text, "  {count} {}", failure.meaning()).unwrap_or_default();
    }
    if matches!(mode, LoadModeName::Udp) {
        let DatagramReport { lost, late, reordered, duplicates } = report.datagrams;
        writeln!(
            text,
            "datagrams: {lost} unanswered, {late} answered late, {reordered} reordered, {duplicates} duplicated"
        )
        .unwrap_or_default();
    }
    // The duration of a single read or write in a bulk transfer is not meaningful.
    let is_bulk = matches!(mode, LoadModeName::ToClient | LoadModeName::ToBackend);
    if !is_bulk && report.operations > 0 {
        text.push_str("\nlatency\n");
        for percentile in PERCENTILES {
            let value = report.latency.value_at_percentile(percentile);
            writeln!(text, "{:>10} {}", format!("p{percentile}"), plot::shown(value)).unwrap_or_default();
        }
        writeln!(text, "{:>10} {}\n", "max", plot::shown(report.latency.max())).unwrap_or_default();
        text.push_str(&plot::bars(&report.latency));
    }
    if let Some(interval) = interval {
        text.push_str(&table(report, interval, is_bulk));
    }
    text
}

/// A line for each interval.
fn table(report: &LoadReport, interval: Duration, is_bulk: bool) -> String {
    let heads = OF_INTERVALS.map(|percentile| format!("p{percentile}"));
    let heads = ["from", "operations", "MiB/s", "failed"].into_iter().map(str::to_owned).chain(heads);
    let heads = heads.chain(["max".to_owned()]).map(|head| format!("{head:>10}"));
    let mut text = format!("\n{}\n", heads.collect::<Vec<_>>().join(" "));
    for (from, each) in starts(interval).zip(&report.intervals) {
        // The last may be shorter.
        let took = report.took.saturating_sub(from).min(interval);
        let mebibytes = per_second(each.bytes, took) / f64::from(1 << 20);
        let from = format!("{} s", from.as_secs_f64());
        write!(text, "{from:>10} {:>10} {mebibytes:>10.1} {:>10}", each.operations, each.failed)
            .unwrap_or_default();
        for percentile in OF_INTERVALS.into_iter().chain([100.0]) {
            let value = if is_bulk || each.operations == 0 {
                "-".to_owned()
            } else {
                plot::shown(each.latency.value_at_percentile(percentile))
            };
            write!(text, " {value:>10}").unwrap_or_default();
        }
        text.push('\n');
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

pub(super) fn as_json(report: &LoadReport, interval: Option<Duration>) -> serde_json::Value {
    let intervals = starts(interval.unwrap_or_default()).zip(&report.intervals).map(|(from, interval)| {
        json!({
            "from_seconds": from.as_secs_f64(),
            "operations": interval.operations,
            "bytes": interval.bytes,
            "failed": interval.failed,
            "latency_ns": percentiles(&interval.latency),
        })
    });
    json!({
        "operations": report.operations,
        "operations_per_second": per_second(report.operations, report.took),
        "bytes": report.bytes,
        "bytes_per_second": per_second(report.bytes, report.took),
        "failed": report.failures.iter().map(|(failure, count)| (failure.as_str(), *count))
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
