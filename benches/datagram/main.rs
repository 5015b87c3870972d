//! UDP on loopback: ours against a direct path and nginx, in alternating rounds.
//!
//! `cargo bench --bench datagram` takes some minutes; `-- --test` runs ours once, briefly. As in `relay`: the proxy is
//! pinned to one core, load and backend, one process, to the other; figures are the proxy's CPU time, medians of the
//! rounds, ratios within each round. Ours reads a PROXY header in each datagram; nginx, which cannot, gets none. All of
//! it is also written to target/datagram.json.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod contender;
#[path = "../stage/mod.rs"]
mod stage;

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use self::stage::contender::{Contender, DIRECT, Other, TENANTS, alternate};
use self::stage::number;
use self::stage::table::{self, Rounds, Row};

#[derive(clap::Parser)]
struct Options {
    /// Measure these alone
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',')]
    only: Vec<Kind>,
    /// Measure this build of vestibule too
    #[arg(long, value_name = "NAME=PATH")]
    other: Vec<Other>,
    /// Leave nginx out
    #[arg(long)]
    no_peers: bool,
    /// Rounds that count; one more goes before them
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Briefly and without nginx: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Anonymous memory of 15,000 flows
    Memory,
    /// 64 B there and back, one flow
    One,
    /// 64 flows
    Few,
    /// 1,000 flows
    Many,
    /// 1,200 B, four flows that never rest
    Hot,
}

/// One kind of work.
struct Work {
    kind: Kind,
    name: &'static str,
    options: &'static [&'static str],
}

const WORKS: [Work; 4] = [
    Work { kind: Kind::One, name: "64 B there and back, 1 flow", options: &["--sessions", "1"] },
    Work { kind: Kind::Few, name: "64 B there and back, 64 flows", options: &["--sessions", "64"] },
    Work { kind: Kind::Many, name: "64 B there and back, 1,000 flows", options: &["--sessions", "1000"] },
    Work {
        kind: Kind::Hot,
        name: "1,200 B there and back, 4 hot flows",
        options: &["--sessions", "4", "--size", "1200B", "--window", "32"],
    },
];

/// Datagrams that may be lost, of a thousand: a full buffer is the kernel's, and its flow goes on after a timeout.
const MOST_LOST: f64 = 1.0;

fn main() {
    let options = Options::parse();
    let (rounds, span, flows) =
        if options.test { (1, 0.1, 200) } else { (options.rounds.max(1), options.seconds, 15_000) };
    let span = format!("{:.0}ms", span * 1e3);
    let wanted = |kind| options.only.is_empty() || options.only.contains(&kind);
    let dir = tempfile::tempdir().expect("a folder for configurations");
    stage::write_tenants(TENANTS, "app", &dir.path().join("tenants.toml"));
    let contenders = contender::all(dir.path(), !options.test && !options.no_peers, &options.other);
    let versions: Vec<&str> = contenders.iter().map(|one| one.version.as_str()).collect();
    println!("kernel {}; {}; {rounds} rounds of {span}", stage::kernel(), versions.join("; "));
    let mut rows = Vec::new();
    // First, before other work has left buffers that flows would be given.
    if wanted(Kind::Memory) {
        rows.push(memory(&contenders, flows));
    }
    for work in WORKS.iter().filter(|work| wanted(work.kind)) {
        rows.push(measure(work, &contenders, rounds, &span));
    }
    table::print(&rows, &contenders);
    let report: Vec<Value> = rows.iter().map(Row::json).collect();
    let kernel = stage::kernel();
    stage::write_json(
        "datagram",
        &json!({ "kernel": kernel, "versions": versions, "rounds": rounds, "span": span, "results": report }),
    );
}

/// What `vestibule load` tells of datagrams.
fn load(contender: &Contender, options: &[&str]) -> Value {
    contender.load(&[&["--mode", "udp", "--timeout", "1s"], options].concat())
}

/// CPU microseconds for each datagram that went there and back.
fn measure(work: &Work, contenders: &[Contender], rounds: usize, span: &str) -> Row {
    let (mut figures, mut speeds, mut losses) = (Rounds::new(), Rounds::new(), Rounds::new());
    alternate(contenders, rounds, |contender, counts| {
        let before = contender.cpu();
        let report = load(contender, &[work.options, &["--duration", span, "--warmup", "0s"]].concat());
        let cpu = contender.cpu() - before;
        // What comes late was not lost: the machine itself may stand still for as long.
        let (operations, lost) =
            (number(&report, "operations"), number(&report, "lost") - number(&report, "late"));
        if !counts {
            return;
        }
        if contender.name != DIRECT {
            figures.entry(contender.name).or_default().push(cpu * 1e6 / operations);
        }
        speeds.entry(contender.name).or_default().push(number(&report, "operations_per_second"));
        let lost = lost * 1e3 / (operations + lost);
        // A single round is there to see that it runs: in a tenth of a second one full buffer is more than that.
        assert!(rounds == 1 || lost <= MOST_LOST, "{}: {lost} of a thousand lost: {report}", contender.name);
        losses.entry(contender.name).or_default().push(lost);
    });
    let further = vec![("per_second", speeds), ("lost_per_thousand", losses)];
    Row { name: work.name.to_owned(), unit: "CPU us", figures, further }
}

/// Anonymous memory for each of many flows that have had a datagram there and back.
fn memory(contenders: &[Contender], flows: u32) -> Row {
    let mut figures = Rounds::new();
    for contender in contenders.iter().filter(|contender| contender.name != DIRECT) {
        // What is taken once for each tenant is no flow's. These flows stay, too.
        load(contender, &["--sessions", "2000", "--duration", "300ms", "--warmup", "0s"]);
        let before = contender.anonymous();
        // In open loop flows are asked in turn: each twice.
        let (sessions, rate) = (flows.to_string(), format!("{}/s", flows.div_ceil(2)));
        let options = ["--sessions", &sessions, "--rate", &rate, "--duration", "4s", "--warmup", "0s"];
        let report = load(contender, &options);
        assert!(number(&report, "operations") > f64::from(flows), "{}: {report}", contender.name);
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        let grown = contender.anonymous().saturating_sub(before) as f64;
        let held = contender.descriptors();
        assert!(held >= flows as usize, "{}: {held} descriptors for {flows} flows", contender.name);
        figures.entry(contender.name).or_default().push(grown / f64::from(flows));
    }
    // What follows has flows of its own.
    contenders.iter().for_each(Contender::wait_until_idle);
    let name = format!("anonymous memory, {flows} flows");
    Row { name, unit: "bytes", figures, further: Vec::new() }
}
