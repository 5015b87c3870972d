//! What names leave behind: tenants that come and go in rounds, each with a session, and the memory of a tenant's counters
//! on a worker. `cargo bench --bench tenants` has a million come and go, `-- --test` a few thousand.
#![allow(clippy::expect_used, clippy::panic, reason = "a bench that cannot go on says so by panicking")]

use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use vestibule::account::Direction;
use vestibule::account::session_metrics::{ConnectResult, SessionMetrics, WorkerMetrics};
use vestibule::clock;
use vestibule::config::Config;
use vestibule::outcome::{EndedAt, EndedBy, Outcome, Reason};
use vestibule::pool::Answers;
use vestibule::state::{LiveState, ProcessLimits};

const WORKERS: usize = 16;

/// A configuration of so many tenants, with numbers from the first on.
fn config(first: usize, count: usize) -> Arc<Config> {
    let mut text = String::from(
        "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:8080\"\ntrusted-sources = [\"127.0.0.0/8\"]\npool = \"app\"\n\
         [[pool]]\nname = \"app\"\nbackends = [\"127.0.0.1:9\"]\n",
    );
    for number in first..first + count {
        writeln!(text, "[[tenant]]\nname = \"tenant-{number}\"\nendpoints = [\"vpce-{number:017x}\"]")
            .expect("a text takes all");
    }
    Arc::new(Config::parse("bench.toml", &text).unwrap_or_else(|faults| panic!("{faults}")))
}

/// The resident memory of the process, in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").expect("a process has a status");
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    kib.expect("the status has the memory") * 1024
}

/// One session of each tenant on each worker.
fn sessions(live: &LiveState, ledgers: &[Rc<WorkerMetrics>]) {
    let (web, app) = (live.labels.intern("web"), live.labels.intern("app"));
    let backend = live.labels.intern("127.0.0.1:9");
    for tenant in live.snapshot.load().directory.tenants() {
        for ledger in ledgers {
            let mut meter = SessionMetrics::new(Rc::clone(ledger), &web);
            meter.assign_tenant(&tenant.label, Some(&app));
            meter.count_connect(&backend, ConnectResult::Done);
            meter.count_bytes(Direction::ToClient, 1, false);
            meter
                .end(Outcome::new(EndedBy::Client, EndedAt::Forward, Reason::Done), Duration::from_millis(1));
        }
    }
}

/// A second of the control thread, and as many ticks of each worker as its pass takes.
fn sweep(live: &LiveState, ledgers: &[Rc<WorkerMetrics>], tenants: usize) {
    drop(live.unused());
    live.sweep();
    for ledger in ledgers {
        (0..=tenants / 2048 + 1).for_each(|_| ledger.fold(&live.configured.load()));
    }
    live.sweep();
}

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let (tenants, rounds, each) = if is_test { (1_000, 5, 1_000) } else { (100_000, 20, 50_000) };
    let most = ProcessLimits { sessions: 1_000, pending: 1_000, pipes: 0 };
    let live = LiveState::of(config(0, tenants), WORKERS, most);
    let ledger = |shard| WorkerMetrics::new(Arc::clone(shard), live.labels.intern(""));
    let ledgers: Vec<_> = live.shards.iter().map(ledger).collect();
    let before = resident();
    sessions(&live, &ledgers);
    let bytes = resident().saturating_sub(before) / (tenants * WORKERS);
    println!("{tenants} tenants, {WORKERS} workers: {bytes} bytes for each tenant and worker");
    let mut after_first = 0;
    for round in 1..=rounds {
        let next = config(tenants + round * each, each);
        let turn = live.begin_reload(&next).expect("nothing changes that must not");
        let changes = turn.put(&next, Vec::new(), &Answers::new(), clock::now());
        assert_eq!(changes.tenants.added, each);
        sweep(&live, &ledgers, tenants.max(each));
        sessions(&live, ledgers.get(..1).expect("there is a worker"));
        let (names, rows) =
            (live.labels.count(), live.shards.iter().map(|shard| shard.routes().len()).sum::<usize>());
        assert!(names <= 2 * each + tenants / 10 + 100, "{names} names are known in round {round}");
        assert!(rows <= each + 4 * WORKERS, "{rows} rows in round {round}");
        let memory = resident();
        println!("round {round}: {} MiB, {names} names, {rows} rows", memory >> 20);
        if round == 2 {
            after_first = memory;
        }
    }
    let grown = resident().saturating_sub(after_first);
    println!("{} tenants came and went: {} KiB more than after two rounds", rounds * each, grown >> 10);
    assert!(is_test || grown < after_first / 5, "memory grows with tenants that come and go");
}
