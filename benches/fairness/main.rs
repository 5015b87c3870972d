//! Limits at full speed: how exact a bandwidth is, how equally sessions share it, and how tenants affect each other.
//!
//! `cargo bench --bench fairness` takes a quarter of an hour; `-- --only greedy --rounds 20` measures one neighbour in
//! more rounds; `-- --test` takes some seconds. Bandwidths are the proxy's own counts of bytes that it passed on, of two
//! workers; nothing is pinned. To measure how tenants affect each other the proxy has one worker and one core to itself, so
//! that both tenants are served by the same thread. On the other core the neighbour runs in the scheduler's idle class, and
//! client and backend of the measured tenant run with real-time priority. The table is also written to target/fairness.json.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod beside;
mod greedy;
mod neighbour;
#[path = "../stage/mod.rs"]
mod stage;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use self::neighbour::Neighbour;
use self::stage::{PROXY_CORE, Proc, VESTIBULE, free, ready};

/// The neighbour, the tenant measured with it, and the tenant whose bandwidth is measured.
const A: &str = "vpce-0aaaaaaaaaaaaaaaa";
const B: &str = "vpce-0bbbbbbbbbbbbbbbb";
const METERED: &str = "vpce-0cccccccccccccccc";

/// The metered tenant's bandwidth each way, in bytes.
const RATE: u64 = 32 << 20;

/// A's limit of new sessions per second. It tries fifty times as many: a machine of two cores must have CPU time for that flood
/// besides everything else, as a large machine has for a larger one.
const RATE_OF_A: u32 = 40;

#[derive(clap::Parser)]
struct Options {
    /// Set these neighbours alone beside B, and measure nothing else
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',')]
    only: Vec<Neighbour>,
    /// How often each neighbour is set beside B
    #[arg(long, default_value_t = 12)]
    rounds: usize,
    /// The proxy is this build of vestibule
    #[arg(long, value_name = "PATH", default_value = VESTIBULE)]
    proxy: PathBuf,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// How thorough a run is.
#[derive(Clone, Copy)]
struct Effort {
    /// Each bandwidth is measured so long, ...
    measured: Duration,
    /// ... after so long.
    left_out: Duration,
    /// The sessions that share it.
    sessions: &'static [usize],
    /// The time of each measurement of B, with a neighbour or alone.
    beside: Duration,
}

const FULL: Effort = Effort {
    measured: Duration::from_secs(10),
    left_out: Duration::from_secs(2),
    sessions: &[1, 10, 1000],
    beside: Duration::from_secs(4),
};
const ONCE: Effort = Effort {
    measured: Duration::from_millis(300),
    left_out: Duration::from_millis(200),
    sessions: &[1, 10],
    beside: Duration::from_millis(300),
};

/// Where a proxy runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On both cores, with a worker for each, among everything else.
    Anywhere,
    /// With one worker, on a core to itself.
    Alone,
}

/// The proxy under test and its backend.
struct Bench {
    target: SocketAddr,
    admin: SocketAddr,
    /// Held for their end.
    _processes: [Proc; 3],
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if neighbour::act(&arguments) {
        return;
    }
    let options = Options::parse();
    let mut report = if options.only.is_empty() { alone(&options) } else { Vec::new() };
    let [dir, apart] = [(); 2].map(|()| tempfile::tempdir().expect("a folder for the configuration"));
    let [bench, other] = [&dir, &apart].map(|dir| Bench::start(dir.path(), &options.proxy, Place::Alone));
    report.extend(beside::measure(&bench, &other, &options));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fairness.json");
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("target");
    std::fs::write(&path, format!("{:#}\n", json!(report))).expect("target/fairness.json");
}

/// What one tenant has: its bandwidth, and how its sessions share it.
fn alone(options: &Options) -> Vec<Value> {
    let effort = options.effort();
    let dir = tempfile::tempdir().expect("a folder for the configuration");
    // A proxy of its own for each: what the last one's sockets still hold would be let through for a while.
    let start = || Bench::start(dir.path(), &options.proxy, Place::Anywhere);
    let mut report = Vec::new();
    println!("bandwidth of {} MiB/s, over {:?}", RATE >> 20, effort.measured);
    for mode in ["to-client", "to-backend"] {
        for sessions in effort.sessions {
            let ratio = start().accuracy(mode, *sessions, &effort);
            println!("  {mode:<12} {sessions:>5} sessions   {:+.2} %", (ratio - 1.0) * 100.0);
            report.push(json!({ "name": "accuracy", "mode": mode, "sessions": sessions, "ratio": ratio }));
        }
    }
    let (index, workers) = greedy::share(&start(), 50, effort.left_out, effort.measured);
    println!(
        "50 greedy sessions, {} and {} on the two workers: Jain's index {index:.4}",
        workers[0], workers[1]
    );
    report.push(json!({ "name": "jain", "index": index, "workers": workers }));
    report
}

impl Options {
    fn effort(&self) -> Effort {
        if self.test { ONCE } else { FULL }
    }

    fn rounds(&self) -> usize {
        if self.test { 1 } else { self.rounds }
    }

    fn neighbours(&self) -> Vec<Neighbour> {
        if self.only.is_empty() { Neighbour::value_variants().to_vec() } else { self.only.clone() }
    }
}

/// Of B: the 95th and the 99th percentile of a round trip in microseconds and round trips a second, and the same of new
/// sessions.
#[derive(Clone, Copy)]
struct Figures([f64; 6]);

impl Bench {
    /// Starts both, and A's backend.
    fn start(dir: &Path, proxy: &Path, place: Place) -> Self {
        let [backend, of_a, target, admin] = [free(), free(), free(), free()];
        let of = |name, address: SocketAddr| {
            let mut command = Command::new(VESTIBULE);
            command.args(["backend", "--listen"]).arg(format!("{name}={address}"));
            command
        };
        // A's backend is a process of its own, with the same priority as A's load.
        let (of_b, low_priority) = (of("app", backend), neighbour::low_priority(&of("other", of_a)));
        let (behind, behind_a) = match place {
            Place::Anywhere => (Proc::start(&of_b), Proc::start(&of("other", of_a))),
            Place::Alone => (Proc::start(&neighbour::high_priority(&of_b)), Proc::start(&low_priority)),
        };
        ready(backend);
        ready(of_a);
        let workers = if place == Place::Alone { 1 } else { 2 };
        let tenant = |name, endpoint, pool, limits: &str| {
            format!(
                "[[tenant]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\npool = \"{pool}\"\n[tenant.limits]\n{limits}\n"
            )
        };
        let each_way = |bandwidth| format!("to-backend = \"{bandwidth}\"\nto-client = \"{bandwidth}\"\n");
        let text = format!(
            "[process]\nworkers = {workers}\n[admin]\nbind = \"{admin}\"\n[health]\nbind = \"{}\"\n[log]\naccess = \"{}\"\n\
             [[listener]]\nname = \"web\"\nbind = \"{target}\"\ntrusted-sources = [\"127.0.0.0/8\"]\npool = \"app\"\n\
             [[pool]]\nname = \"app\"\nbackends = [\"{backend}\"]\n\
             [[pool]]\nname = \"other\"\nbackends = [\"{of_a}\"]\n{}{}{}",
            free(),
            dir.join("access.log").display(),
            tenant("a", A, "other", &(each_way("8MiB/s") + &format!("session-rate = \"{RATE_OF_A}/s\""))),
            tenant("b", B, "app", &(each_way("16MiB/s") + "session-rate = \"2000/s\"")),
            tenant("metered", METERED, "app", &each_way(&format!("{RATE}B/s"))),
        );
        let path = dir.join("vestibule.toml");
        std::fs::write(&path, text).expect("a configuration");
        let mut command = Command::new(proxy);
        command.args(["serve", "--config"]).arg(&path);
        let proxy = match place {
            Place::Anywhere => Proc::start(&command),
            Place::Alone => Proc::start(&neighbour::on(PROXY_CORE, &[], &command)),
        };
        ready(target);
        ready(admin);
        Self { target, admin, _processes: [behind, behind_a, proxy] }
    }

    fn load(&self, endpoint: &str, options: &[&str]) -> Command {
        let mut command = Command::new(VESTIBULE);
        command.args(["load", "--json", "--target"]).arg(self.target.to_string());
        let pool = if endpoint == A { "other" } else { "app" };
        command.args(["--endpoint", endpoint, "--pools", pool]).args(options);
        command
    }

    /// What B measures: the medians of intervals in which it does a hundred things each. Where the machine stands still for
    /// some milliseconds, which it does several times a second, that spoils the percentiles of one interval or two, and would
    /// be the percentiles of all together; what a neighbour costs is in each.
    fn load_of_b(&self, time: Duration) -> Figures {
        let time = format!("{}ms", time.as_millis());
        let run = |options: &[&str]| {
            let mut command = self.load(B, options);
            command.args(["--duration", &time, "--warmup", "500ms", "--sessions", "32"]);
            let output = neighbour::high_priority(&command).output().expect("the load generator");
            let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
            let figure = |value: &Value| value.as_f64().expect("a number");
            let intervals = report["intervals"].as_array().expect("intervals");
            let latency = |percentile: &str| {
                let each = intervals.iter().map(|interval| figure(&interval["latency_ns"][percentile]) / 1e3);
                stage::median(each.collect())
            };
            [latency("p95"), latency("p99"), figure(&report["operations_per_second"])]
        };
        std::thread::scope(|scope| {
            let trips = ["--mode", "roundtrip", "--size", "4KiB", "--rate", "2000/s", "--interval", "50ms"];
            let trips = scope.spawn(move || run(&trips));
            let [new_p95, new_p99, new_rate] =
                run(&["--mode", "connect", "--rate", "1000/s", "--interval", "100ms"]);
            let [p95, p99, rate] = trips.join().expect("round trips");
            Figures([p95, p99, rate, new_p95, new_p99, new_rate])
        })
    }

    /// The metered tenant's bandwidth over what it should be.
    fn accuracy(&self, mode: &str, sessions: usize, effort: &Effort) -> f64 {
        let all =
            format!("{}ms", (effort.left_out + effort.measured + Duration::from_millis(500)).as_millis());
        let sessions = sessions.to_string();
        let options = [
            "--mode",
            mode,
            "--sessions",
            &sessions,
            "--size",
            "64KiB",
            "--warmup",
            "0s",
            "--duration",
            &all,
        ];
        let mut load = Proc::start(&self.load(METERED, &options));
        let direction = mode.replace('-', "_");
        let labels = [("tenant", "metered"), ("direction", direction.as_str())];
        std::thread::park_timeout(effort.left_out);
        let (start, before) = (now(), self.metric("vestibule_forwarded_bytes_total", &labels));
        std::thread::park_timeout(effort.measured);
        let (took, after) = (now() - start, self.metric("vestibule_forwarded_bytes_total", &labels));
        load.wait();
        #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
        let expected = RATE as f64 * took.as_secs_f64();
        (after - before) / expected
    }

    /// The sum of a metric's series that have these labels.
    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut stream = TcpStream::connect(self.admin).expect("the admin server");
        stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: localhost\r\n\r\n").expect("a request");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("the metrics");
        let series =
            page.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        let series = series.filter(|line| {
            labels.iter().all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
        });
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench measures")]
fn now() -> Instant {
    Instant::now()
}
