//! The whole path on loopback: ours against a direct connection, HAProxy and nginx, in alternating rounds.
//!
//! `cargo bench --bench relay` takes some minutes; `-- --test` runs ours once, briefly. The proxy is pinned to one
//! core, load and backend to the other. Figures are the proxy's CPU time from /proc (all threads), medians of the
//! rounds, the first of which is dropped. The table is also written to target/relay.json.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod contender;
mod process;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use self::contender::{Backend, Contender};
use self::process::{Proc, VESTIBULE};

/// The endpoint that the load plays; the other tenants only fill the directory.
const TENANTS: &str = "1000";

/// One kind of work, as options of `vestibule load`.
struct Work {
    name: &'static str,
    unit: Unit,
    options: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// CPU microseconds for each operation.
    PerOperation,
    /// CPU seconds for each gigabyte.
    PerGigabyte,
}

const WORKS: [Work; 6] = [
    Work {
        name: "short connection, 64 B echo",
        unit: Unit::PerOperation,
        options: &["--mode", "connect", "--sessions", "32"],
    },
    Work {
        name: "64 B round trip, 64 sessions",
        unit: Unit::PerOperation,
        options: &["--mode", "roundtrip", "--sessions", "64"],
    },
    Work {
        name: "64 B round trip, 2,000 sessions",
        unit: Unit::PerOperation,
        options: &["--mode", "roundtrip", "--sessions", "2000"],
    },
    Work {
        name: "16 KiB round trip, 64 sessions",
        unit: Unit::PerOperation,
        options: &["--mode", "roundtrip", "--sessions", "64", "--size", "16KiB"],
    },
    Work {
        name: "bulk to client, 8 sessions",
        unit: Unit::PerGigabyte,
        options: &["--mode", "to-client", "--sessions", "8", "--size", "256KiB"],
    },
    Work {
        name: "bulk to backend, 8 sessions",
        unit: Unit::PerGigabyte,
        options: &["--mode", "to-backend", "--sessions", "8", "--size", "256KiB"],
    },
];

/// How thorough a run is.
struct Effort {
    /// Rounds that count; one more goes before them.
    rounds: usize,
    /// Of each measurement.
    seconds: &'static str,
    /// Idle sessions whose memory is measured.
    idle: u64,
    peers: bool,
}

const FULL: Effort = Effort { rounds: 5, seconds: "2s", idle: 5_000, peers: true };
const ONCE: Effort = Effort { rounds: 1, seconds: "200ms", idle: 50, peers: false };

fn main() {
    let effort = if std::env::args().any(|argument| argument == "--test") { ONCE } else { FULL };
    let dir = tempfile::tempdir().expect("a folder for configurations");
    let backend = Backend::start();
    let tenants = dir.path().join("tenants.toml");
    let written = Command::new(VESTIBULE)
        .args(["load", "--target", "127.0.0.1:1", "--endpoints", TENANTS, "--pools", "app"])
        .arg("--write-tenants")
        .arg(&tenants)
        .status();
    assert!(written.is_ok_and(|status| status.success()), "tenants for the directory");
    let contenders = contender::all(dir.path(), &backend, effort.peers);
    println!(
        "kernel {}, {}",
        kernel(),
        contenders.iter().map(|one| one.version.as_str()).collect::<Vec<_>>().join(", ")
    );
    let mut results = Vec::new();
    for work in &WORKS {
        results.push(measure(work, &contenders, &effort));
    }
    let slowest = slowest_round_trips(&results[1]);
    for percent in [20, 50, 80] {
        results.push(latency(&contenders, &effort, slowest * f64::from(percent) / 100.0, percent));
    }
    results.push(memory(&contenders, &effort));
    for result in &results {
        result.print();
    }
    let report: Vec<Value> = results.iter().map(Row::json).collect();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/relay.json");
    std::fs::write(&path, format!("{:#}\n", json!({ "kernel": kernel(), "results": report })))
        .expect("target/relay.json");
}

/// One line of the table: a figure for each contender.
struct Row {
    name: String,
    unit: &'static str,
    figures: BTreeMap<&'static str, f64>,
    /// Operations, or gigabytes, a second.
    speeds: BTreeMap<&'static str, f64>,
}

impl Row {
    /// The best of the peers, and ours against it.
    fn print(&self) {
        let ours = self.figures.get("vestibule").copied().unwrap_or(f64::NAN);
        let peers = self.figures.iter().filter(|(name, _)| **name != "vestibule" && **name != "direct");
        let best = peers.map(|(_, figure)| *figure).fold(f64::INFINITY, f64::min);
        let figures: Vec<String> =
            self.figures.iter().map(|(name, figure)| format!("{name} {figure:.2}")).collect();
        let ratio =
            if best.is_finite() { format!("{:.2} of the best peer", ours / best) } else { String::new() };
        println!("{:<38} {:<7} {}   {ratio}", self.name, self.unit, figures.join("  "));
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "unit": self.unit, "figures": self.figures, "speeds": self.speeds })
    }
}

fn measure(work: &Work, contenders: &[Contender], effort: &Effort) -> Row {
    let mut figures: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut speeds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=effort.rounds {
        for contender in contenders {
            let before = contender.cpu();
            let report =
                load(contender, &[work.options, &["--duration", effort.seconds, "--warmup", "0s"]].concat());
            let cpu = contender.cpu() - before;
            let (count, speed) = match work.unit {
                Unit::PerOperation => {
                    (number(&report, "operations") / 1e6, number(&report, "operations_per_second"))
                }
                Unit::PerGigabyte => {
                    (number(&report, "bytes") / 1e9, number(&report, "bytes_per_second") / 1e9)
                }
            };
            if round > 0 {
                figures.entry(contender.name).or_default().push(cpu / count);
                speeds.entry(contender.name).or_default().push(speed);
            }
        }
    }
    let unit = if work.unit == Unit::PerOperation { "CPU us" } else { "s/GB" };
    Row { name: work.name.to_owned(), unit, figures: medians(figures), speeds: medians(speeds) }
}

fn slowest_round_trips(row: &Row) -> f64 {
    row.speeds
        .iter()
        .filter(|(name, _)| **name != "direct")
        .map(|(_, speed)| *speed)
        .fold(f64::INFINITY, f64::min)
}

/// p99.9 over that of a direct connection, at a fixed rate in open loop.
fn latency(contenders: &[Contender], effort: &Effort, rate: f64, percent: u32) -> Row {
    let rate = format!("{:.0}/s", rate.max(1.0));
    let mut figures: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=effort.rounds {
        for contender in contenders {
            let options = ["--mode", "roundtrip", "--sessions", "64", "--rate", &rate];
            let report = load(
                contender,
                &[&options[..], &["--duration", effort.seconds, "--warmup", "200ms"]].concat(),
            );
            if round > 0 {
                let nanos = report["latency_ns"]["p99.9"].as_f64().expect("a percentile");
                figures.entry(contender.name).or_default().push(nanos / 1e3);
            }
        }
    }
    let mut figures = medians(figures);
    let direct = figures.get("direct").copied().unwrap_or(0.0);
    for (name, figure) in &mut figures {
        if *name != "direct" {
            *figure -= direct;
        }
    }
    let name = format!("p99.9 added, open loop at {percent} %");
    Row { name, unit: "us", figures, speeds: BTreeMap::new() }
}

/// Anonymous memory for each idle session, after traffic.
fn memory(contenders: &[Contender], effort: &Effort) -> Row {
    let mut figures = BTreeMap::new();
    for contender in contenders.iter().filter(|contender| contender.name != "direct") {
        let before = contender.anonymous();
        let sessions = effort.idle.to_string();
        let rate = format!("{}/s", effort.idle);
        let options = ["--mode", "roundtrip", "--sessions", &sessions, "--rate", &rate, "--duration", "4s"];
        let mut load = Proc::start(&contender::load_command(contender, &options));
        std::thread::park_timeout(Duration::from_secs(4));
        let grown = contender.anonymous().saturating_sub(before);
        load.wait();
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        figures.insert(contender.name, grown as f64 / effort.idle as f64 / 1024.0);
    }
    let name = format!("anonymous memory, {} idle sessions", effort.idle);
    Row { name, unit: "KiB", figures, speeds: BTreeMap::new() }
}

fn load(contender: &Contender, options: &[&str]) -> Value {
    let output = contender::load_command(contender, options).output().expect("the load generator");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report["misrouted"], 0, "{}: {report}", contender.name);
    let failed = report["failed"].as_object().map_or(0, serde_json::Map::len);
    assert!(failed == 0, "{}: {report}", contender.name);
    report
}

fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"))
}

fn medians(all: BTreeMap<&str, Vec<f64>>) -> BTreeMap<&str, f64> {
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    all.into_iter().map(|(name, values)| (name, median(values))).collect()
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
}
