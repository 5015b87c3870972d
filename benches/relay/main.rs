//! The whole path on loopback: vestibule against a direct connection, HAProxy and nginx, in alternating rounds.
//!
//! `cargo bench --bench relay` takes some ten minutes. `-- --only short --rounds 15` measures one kind of work in more
//! rounds; `-- --test` runs vestibule once, briefly. The proxy is pinned to one core; load and backend, one process, to the
//! other. Figures are the proxy's CPU time from /proc (all threads), medians of the rounds, the first of which is
//! dropped; ratios are taken within each round. All of it, round by round, is also written to target/relay.json.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod contender;
#[path = "../stage/mod.rs"]
mod stage;

use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use self::contender::Further;
use self::stage::contender::{Contender, DIRECT, Other, TENANTS, alternate};
use self::stage::table::{self, Rounds, Row};
use self::stage::{Proc, median, number};

#[derive(clap::Parser)]
struct Options {
    /// Measure these alone
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',')]
    only: Vec<Kind>,
    /// Measure these contenders too
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',')]
    also: Vec<Further>,
    /// Measure this build of vestibule too
    #[arg(long, value_name = "NAME=PATH")]
    other: Vec<Other>,
    /// Leave HAProxy and nginx out
    #[arg(long)]
    no_peers: bool,
    /// Loads in open loop, in percent of the slowest proxy's capacity
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [20, 50, 80])]
    loads: Vec<u8>,
    /// Rounds that count; one more goes before them
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Briefly and without peers: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Anonymous memory of 5,000 idle sessions
    Memory,
    /// Short connections
    Short,
    /// 64 B round trips, 64 sessions
    Few,
    /// 64 B round trips, 2,000 sessions
    Many,
    /// 16 KiB round trips
    Medium,
    /// Bulk to the client
    ToClient,
    /// Bulk to the backend
    ToBackend,
    /// Latency in open loop
    Latency,
}

/// One kind of work, as options of `vestibule load`.
struct Work {
    kind: Kind,
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
        kind: Kind::Short,
        name: "short connection, 64 B echo",
        unit: Unit::PerOperation,
        options: &["--mode", "connect", "--sessions", "32"],
    },
    FEW,
    Work {
        kind: Kind::Many,
        name: "64 B round trip, 2,000 sessions",
        unit: Unit::PerOperation,
        options: &["--mode", "roundtrip", "--sessions", "2000"],
    },
    Work {
        kind: Kind::Medium,
        name: "16 KiB round trip, 64 sessions",
        unit: Unit::PerOperation,
        options: &["--mode", "roundtrip", "--sessions", "64", "--size", "16KiB"],
    },
    Work {
        kind: Kind::ToClient,
        name: "bulk to client, 8 sessions",
        unit: Unit::PerGigabyte,
        options: &["--mode", "to-client", "--sessions", "8", "--size", "256KiB"],
    },
    Work {
        kind: Kind::ToBackend,
        name: "bulk to backend, 8 sessions",
        unit: Unit::PerGigabyte,
        options: &["--mode", "to-backend", "--sessions", "8", "--size", "256KiB"],
    },
];

/// The work whose speed is the capacity that latencies refer to.
const FEW: Work = Work {
    kind: Kind::Few,
    name: "64 B round trip, 64 sessions",
    unit: Unit::PerOperation,
    options: &["--mode", "roundtrip", "--sessions", "64"],
};

/// Percentiles of latency.
const PERCENTILES: [&str; 3] = ["p50", "p99", "p99.9"];

/// How thorough a run is.
struct Effort {
    rounds: usize,
    /// Of each measurement.
    span: String,
    /// Idle sessions whose memory is measured, and how long they are watched.
    idle: u32,
    watched: Duration,
}

fn main() {
    let options = Options::parse();
    let effort = if options.test {
        Effort { rounds: 1, span: "50ms".to_owned(), idle: 50, watched: Duration::from_secs(1) }
    } else {
        let span = format!("{:.0}ms", options.seconds * 1e3);
        Effort { rounds: options.rounds.max(1), span, idle: 5_000, watched: Duration::from_secs(4) }
    };
    let wanted = |kind| options.only.is_empty() || options.only.contains(&kind);
    let dir = tempfile::tempdir().expect("a folder for configurations");
    stage::write_tenants(TENANTS, "app", &dir.path().join("tenants.toml"));
    let contenders =
        contender::all(dir.path(), !options.test && !options.no_peers, &options.also, &options.other);
    let versions: Vec<&str> = contenders.iter().map(|one| one.version.as_str()).collect();
    println!(
        "kernel {}; {}; {} rounds of {}",
        stage::kernel(),
        versions.join("; "),
        effort.rounds,
        effort.span
    );

    let mut rows = Vec::new();
    // First, before other work has left buffers that idle sessions would be given.
    if wanted(Kind::Memory) {
        rows.push(memory(&contenders, &effort));
    }
    let mut few = None;
    for work in WORKS.iter().filter(|work| wanted(work.kind)) {
        let row = measure(work, &contenders, &effort);
        if work.kind == Kind::Few {
            few = Some(slowest(&row));
        }
        rows.push(row);
    }
    let mut capacity = None;
    if wanted(Kind::Latency) {
        let slowest = few.unwrap_or_else(|| slowest(&measure(&FEW, &contenders, &effort)));
        capacity = Some(slowest);
        println!("latencies are at parts of {slowest:.0} round trips a second, the slowest proxy's capacity");
        for percent in options.loads {
            rows.extend(latency(&contenders, &effort, slowest * f64::from(percent) / 100.0, percent));
        }
    }
    table::print(&rows, &contenders);
    let report: Vec<Value> = rows.iter().map(Row::json).collect();
    stage::write_json(
        "relay",
        &json!({ "kernel": stage::kernel(), "versions": versions, "rounds": effort.rounds, "span": effort.span,
            "slowest_round_trips_per_second": capacity, "results": report }),
    );
}

fn measure(work: &Work, contenders: &[Contender], effort: &Effort) -> Row {
    let (mut figures, mut speeds) = (Rounds::new(), Rounds::new());
    alternate(contenders, effort.rounds, |contender, counts| {
        let before = contender.cpu();
        let report =
            contender.load(&[work.options, &["--duration", &effort.span, "--warmup", "0s"]].concat());
        let cpu = contender.cpu() - before;
        let (count, speed) = match work.unit {
            Unit::PerOperation => {
                (number(&report, "operations") / 1e6, number(&report, "operations_per_second"))
            }
            Unit::PerGigabyte => (number(&report, "bytes") / 1e9, number(&report, "bytes_per_second") / 1e9),
        };
        if counts {
            if contender.name != DIRECT {
                figures.entry(contender.name).or_default().push(cpu / count);
            }
            speeds.entry(contender.name).or_default().push(speed);
        }
    });
    let (unit, speed) = match work.unit {
        Unit::PerOperation => ("CPU us", "per_second"),
        Unit::PerGigabyte => ("s/GB", "gigabytes_per_second"),
    };
    Row { name: work.name.to_owned(), unit, figures, further: vec![(speed, speeds)] }
}

/// The lowest speed of all proxies.
fn slowest(row: &Row) -> f64 {
    let speeds = row.further.iter().flat_map(|(_, speeds)| speeds);
    let proxies = speeds.filter(|(name, _)| **name != DIRECT);
    proxies.map(|(_, speeds)| median(speeds.clone())).fold(f64::INFINITY, f64::min)
}

/// The latency that each contender adds to the direct connection's of the same round, at a fixed rate in open loop. The
/// column of the direct connection has its own latency.
fn latency(contenders: &[Contender], effort: &Effort, rate: f64, percent: u8) -> Vec<Row> {
    let rate = format!("{:.0}/s", rate.max(1.0));
    let mut absolute = PERCENTILES.map(|_| Rounds::new());
    let (mut late, mut not_sent) = (Rounds::new(), Rounds::new());
    alternate(contenders, effort.rounds, |contender, counts| {
        let options = ["--mode", "roundtrip", "--sessions", "64", "--rate", &rate];
        let warmup = if effort.rounds > 1 { "200ms" } else { "50ms" };
        let report =
            contender.load(&[&options[..], &["--duration", &effort.span, "--warmup", warmup]].concat());
        if counts {
            for (percentile, rounds) in PERCENTILES.iter().zip(&mut absolute) {
                let nanos = report["latency_ns"][percentile].as_f64().expect("a percentile");
                rounds.entry(contender.name).or_default().push(nanos / 1e3);
            }
            let max = report["latency_ns"]["max"].as_f64().expect("the longest");
            late.entry(contender.name).or_default().push(max / 1e3);
            not_sent.entry(contender.name).or_default().push(number(&report, "not_sent"));
        }
    });
    let rows = PERCENTILES.iter().zip(absolute).map(|(percentile, absolute)| {
        let mut figures = absolute.clone();
        let direct = absolute.get(DIRECT).cloned().unwrap_or_default();
        for (_, rounds) in figures.iter_mut().filter(|(name, _)| **name != DIRECT) {
            rounds.iter_mut().zip(&direct).for_each(|(figure, direct)| *figure -= direct);
        }
        let name = format!("{percentile} added, open loop, {percent} %");
        let further = vec![("absolute", absolute), ("max", late.clone()), ("not_sent", not_sent.clone())];
        Row { name, unit: "us", figures, further }
    });
    rows.collect()
}

/// Anonymous memory for each idle session that has had traffic, measured before other work.
fn memory(contenders: &[Contender], effort: &Effort) -> Row {
    let mut figures = Rounds::new();
    for contender in contenders.iter().filter(|contender| contender.name != DIRECT) {
        // Allocates what each tenant needs once, so that it is not counted for sessions.
        contender.load(&["--mode", "connect", "--sessions", "32", "--duration", "300ms", "--warmup", "0s"]);
        let before = contender.anonymous();
        let sessions = effort.idle.to_string();
        let rate = format!("{}/s", effort.idle);
        let span = format!("{}s", effort.watched.as_secs());
        let options = ["--mode", "roundtrip", "--sessions", &sessions, "--rate", &rate, "--duration", &span];
        // With a second of warm-up it goes on for one longer than it is watched.
        let mut load = Proc::start(&contender.load_command(&options));
        std::thread::park_timeout(effort.watched);
        let grown = contender.anonymous().saturating_sub(before);
        load.wait();
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        let grown = grown as f64;
        figures.entry(contender.name).or_default().push(grown / f64::from(effort.idle) / 1024.0);
    }
    let name = format!("anonymous memory, {} idle sessions", effort.idle);
    Row { name, unit: "KiB", figures, further: Vec::new() }
}
