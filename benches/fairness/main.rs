//! Limits at full speed: how exact a bandwidth is, how equally sessions share it, and what tenants do to each other.
//!
//! `cargo bench --bench fairness` takes ten minutes; `-- --test` some seconds. Nothing is pinned: proxy, load and
//! backend share the machine. Whoever disturbs runs in the scheduler's idle class, and both ends of whom it disturbs
//! before all others, so that what is measured is the proxy between them. Bandwidths are the proxy's own
//! counts of bytes that it passed on. The table is also written to target/fairness.json.
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
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::stage::{Proc, VESTIBULE, free, ready};

/// The tenant that does what it likes, the one beside it, and the one whose bandwidth is measured.
const A: &str = "vpce-0aaaaaaaaaaaaaaaa";
const B: &str = "vpce-0bbbbbbbbbbbbbbbb";
const METERED: &str = "vpce-0cccccccccccccccc";

/// The metered tenant's bandwidth each way, in bytes.
const RATE: u64 = 32 << 20;

/// New sessions in a second that A may have. It tries fifty times as many: all that it does has to fit beside everybody
/// else on a machine of two cores, as floods fit beside others on a large one.
const RATE_OF_A: u32 = 40;

/// How thorough a run is.
#[derive(Clone, Copy)]
struct Effort {
    /// Each bandwidth is measured so long, ...
    measured: Duration,
    /// ... after so long.
    left_out: Duration,
    /// The sessions that share it.
    sessions: &'static [usize],
    /// B for each of its measurements, beside somebody or alone.
    beside: Duration,
    rounds: usize,
}

const FULL: Effort = Effort {
    measured: Duration::from_secs(10),
    left_out: Duration::from_secs(2),
    sessions: &[1, 10, 1000],
    beside: Duration::from_secs(4),
    rounds: 8,
};
const ONCE: Effort = Effort {
    measured: Duration::from_millis(300),
    left_out: Duration::from_millis(200),
    sessions: &[1, 10],
    beside: Duration::from_millis(300),
    rounds: 1,
};

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
    let effort = if arguments.iter().any(|argument| argument == "--test") { ONCE } else { FULL };
    let dir = tempfile::tempdir().expect("a folder for the configuration");
    let mut report = Vec::new();
    println!("bandwidth of {} MiB/s, over {:?}", RATE >> 20, effort.measured);
    for mode in ["to-client", "to-backend"] {
        for sessions in effort.sessions {
            // A proxy of its own for each: what the last one's sockets still hold would be let through for a while.
            let ratio = Bench::start(dir.path(), false).accuracy(mode, *sessions, &effort);
            println!("  {mode:<12} {sessions:>5} sessions   {:+.2} %", (ratio - 1.0) * 100.0);
            report.push(json!({ "name": "accuracy", "mode": mode, "sessions": sessions, "ratio": ratio }));
        }
    }
    let (index, workers) =
        greedy::share(&Bench::start(dir.path(), false), 50, effort.left_out, effort.measured);
    println!(
        "50 greedy sessions, {} and {} on the two workers: Jain's index {index:.4}",
        workers[0], workers[1]
    );
    report.push(json!({ "name": "jain", "index": index, "workers": workers }));
    let apart = tempfile::tempdir().expect("another folder");
    report.extend(beside::measure(
        &Bench::start(dir.path(), true),
        &Bench::start(apart.path(), true),
        &effort,
    ));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fairness.json");
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("target");
    std::fs::write(&path, format!("{:#}\n", json!(report))).expect("target/fairness.json");
}

/// Of B: the 95th and the 99th percentile of a round trip in microseconds and round trips a second, and the same of new
/// sessions.
#[derive(Clone, Copy)]
struct Figures([f64; 6]);

impl Bench {
    /// Starts both; B's backend before all others where it is to be measured for its latency.
    fn start(dir: &Path, urgent: bool) -> Self {
        let [backend, of_a, target, admin] = [free(), free(), free(), free()];
        let mut command = Command::new(VESTIBULE);
        command.args(["backend", "--listen"]).arg(format!("app={backend}"));
        let behind = Proc::start(&if urgent { neighbour::urgent(&command) } else { command });
        ready(backend);
        // A's has no thread in common with B's, and is A's doing like its load.
        let mut command = Command::new(VESTIBULE);
        command.args(["backend", "--listen"]).arg(format!("other={of_a}"));
        let behind_a = Proc::start(&neighbour::humble(&command));
        ready(of_a);
        let tenant = |name, endpoint, pool, limits: &str| {
            format!(
                "[[tenant]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\npool = \"{pool}\"\n[tenant.limits]\n{limits}\n"
            )
        };
        let each_way = |bandwidth| format!("to-backend = \"{bandwidth}\"\nto-client = \"{bandwidth}\"\n");
        let text = format!(
            "[process]\nworkers = 2\n[admin]\nbind = \"{admin}\"\n[health]\nbind = \"{}\"\n[log]\naccess = \"{}\"\n\
             [[listener]]\nname = \"web\"\nbind = \"{target}\"\ntrusted-sources = [\"127.0.0.0/8\"]\npool = \"app\"\n\
             [[pool]]\nname = \"app\"\nbackends = [\"{backend}\"]\n\
             [[pool]]\nname = \"other\"\nbackends = [\"{of_a}\"]\n{}{}{}",
            free(),
            dir.join("access.log").display(),
            tenant("a", A, "other", &(each_way("8MiB/s") + &format!("session-rate = \"{RATE_OF_A}/s\""))),
            tenant("b", B, "app", &(each_way("16MiB/s") + "session-rate = \"800/s\"")),
            tenant("metered", METERED, "app", &each_way(&format!("{RATE}B/s"))),
        );
        let path = dir.join("vestibule.toml");
        std::fs::write(&path, text).expect("a configuration");
        let mut command = Command::new(VESTIBULE);
        command.args(["serve", "--config"]).arg(&path);
        let proxy = Proc::start(&command);
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

    /// What B measures.
    fn load_of_b(&self, duration: Duration) -> Figures {
        let seconds = format!("{}ms", duration.as_millis());
        let run = |options: &[&str]| {
            let mut command = self.load(B, options);
            command.args(["--duration", &seconds, "--warmup", "500ms"]);
            let output = neighbour::urgent(&command).output().expect("the load generator");
            let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
            let figure = |value: &Value| value.as_f64().expect("a number");
            let latency = |percentile: &str| figure(&report["latency_ns"][percentile]) / 1e3;
            [latency("p95"), latency("p99"), figure(&report["operations_per_second"])]
        };
        std::thread::scope(|scope| {
            let trips = ["--mode", "roundtrip", "--size", "4KiB", "--rate", "2000/s", "--sessions", "32"];
            let trips = scope.spawn(move || run(&trips));
            let [new_p95, new_p99, new_rate] =
                run(&["--mode", "connect", "--rate", "400/s", "--sessions", "32"]);
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
        stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: bench\r\n\r\n").expect("a request");
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
