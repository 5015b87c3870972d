//! What a neighbour feels of each attack on what all share: its failures, its 99th percentile, its throughput, and what the
//! proxy holds meanwhile.
//!
//! `cargo bench --bench neighbour` attacks for 60 s each and takes half an hour; `-- --only NAME --seconds 10` is one of them, and
//! `-- --test` takes some seconds for each. `--binary PATH` attacks another build. As root everything runs in a network namespace
//! of its own; attacks that need a sysctl are left out without. The proxy has one worker and a core to itself; the attackers share
//! the other core with the neighbour, which comes before all others. In turns the neighbour is
//! alone and beside the attack; percentiles are those of intervals of a hundred sessions or datagrams, and of these the median
//! counts. A control has the same load straight to a backend: what slows it down is not the proxy, but the kernel's work for
//! the attackers on the core of all loads. The table is also written to target/neighbour.json. Exit status 1 where a neighbour is
//! harmed or a bound is broken.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod actor;
mod attacks;
#[path = "../stage/mod.rs"]
mod stage;
mod world;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};

use self::attacks::Attack;
use self::stage::{Proc, VESTIBULE, median};
use self::world::{B, Peak, World, high_priority, low_priority};

/// What an attack may cost the neighbour.
const MOST: f64 = 1.10;

/// Sessions, and datagrams, of the neighbour in a second: few enough for their own ports in `TIME_WAIT` for a minute.
const RATE: &str = "200/s";

/// One interval has a hundred of them.
const INTERVAL: &str = "500ms";

/// Turns of alone and beside, as long as each other: what a machine does besides changes within minutes.
const ROUNDS: u32 = 3;

/// Set where this process is in a network namespace of its own.
const INSIDE: &str = "VESTIBULE_BENCH_NAMESPACE";

#[derive(clap::Parser)]
struct Options {
    /// These attacks alone
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    only: Vec<String>,
    /// How long each attack lasts, all turns together
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// The proxy is this build of vestibule
    #[arg(long, value_name = "PATH", default_value = VESTIBULE)]
    binary: PathBuf,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the neighbour measured: over TCP its new sessions, over UDP its datagrams.
#[derive(Default)]
struct Measured {
    /// The 99th percentile of each interval, in microseconds.
    p99: Vec<f64>,
    /// Operations a second, of each turn.
    rate: Vec<f64>,
    done: u64,
    failures: u64,
}

/// Over TCP and over UDP.
type Both = [Measured; 2];

/// The neighbour and the control at the same time.
#[derive(Default)]
struct Turn {
    neighbour: Both,
    control: Both,
}

/// All turns alone, and all beside the attack.
#[derive(Default)]
struct Turns {
    alone: Turn,
    beside: Turn,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    if actor::act(&arguments) {
        return ExitCode::SUCCESS;
    }
    let options = Options::parse();
    let is_inside = std::env::var_os(INSIDE).is_some();
    if !is_inside && can_unshare() {
        let script = "ip link set lo up && exec \"$0\" \"$@\"";
        let mut again = Command::new("unshare");
        again.args(["--net", "sh", "-c", script]).arg(std::env::current_exe().expect("this program"));
        panic!("{}", again.args(&arguments[1..]).env(INSIDE, "1").exec());
    }
    let attacks = attacks::all();
    for name in &options.only {
        assert!(attacks.iter().any(|attack| attack.name() == name), "no attack is called {name}");
    }
    println!("the neighbour has {RATE} over TCP and over UDP; kernel {}", stage::kernel());
    println!(
        "| attack | | alone: p99, rate | beside: p99, rate | control: p99 alone, beside | p99 | rate | failures | RSS | descriptors | health check | the attackers' ends |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let mut report = Vec::new();
    let mut faults = Vec::new();
    for attack in &attacks {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == attack.name()) {
            continue;
        }
        if attack.sysctl().is_some() && !is_inside {
            println!("| {} | left out: it needs root, and a network namespace of its own |", attack.name());
            continue;
        }
        report.push(run(&**attack, &options, &mut faults));
    }
    stage::write_json("neighbour", &json!(report));
    println!(
        "{}",
        if faults.is_empty() {
            "\nall within their bounds".to_owned()
        } else {
            format!("\n{}", faults.join("\n"))
        }
    );
    // A moment is too short to show more than that it runs.
    if faults.is_empty() || options.test { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn can_unshare() -> bool {
    let tried = Command::new("unshare").args(["--net", "ip", "link", "set", "lo", "up"]).output();
    tried.is_ok_and(|output| output.status.success())
}

/// One attack: its row is printed, and what is wrong is added to the faults.
fn run(attack: &dyn Attack, options: &Options, faults: &mut Vec<String>) -> Value {
    let _restored = attack.sysctl().map(|(key, value)| Sysctl::set(key, value));
    let dir = tempfile::tempdir().expect("a folder for the configuration");
    let conf = attack.conf(dir.path());
    let (rounds, beside) = if options.test {
        (1, Duration::from_secs(1))
    } else {
        (ROUNDS, Duration::from_secs(options.seconds.into()) / ROUNDS)
    };
    let world = World::start(dir.path(), &options.binary, &conf);
    let (mut turns, mut peak, mut attacked) = (Turns::default(), Peak::default(), Duration::ZERO);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut watch = None;
        for round in 0..rounds {
            neighbour(&world, beside, &mut turns.alone);
            if round == 0 {
                watch = Some(scope.spawn(|| world.watch(&stop)));
                scope.spawn(|| attack.beside(&world, &stop));
            }
            let start = now();
            let actors: Vec<_> =
                attack.actors(&world).iter().map(|actor| Proc::start(&low_priority(actor))).collect();
            neighbour(&world, beside, &mut turns.beside);
            drop(actors);
            attacked += now() - start;
        }
        // The last lines of a log are written within a second.
        std::thread::park_timeout(Duration::from_secs(1));
        stop.store(true, Ordering::Relaxed);
        peak = watch.expect("a round").join().expect("the peak");
    });
    let ends = world.by("vestibule_sessions_ended_total", "why", "tenant=\"b\"");
    // Flows outlive the run.
    let active = world.by("vestibule_sessions_active", "tenant", "tenant=\"b\"");
    let all: f64 = ends.values().chain(active.values()).sum();
    if all < f64::from(attack.ends()) {
        faults.push(format!("{}: the attack did not take place: {all} sessions and flows", attack.name()));
    }
    let sessions = turns.beside.neighbour[0].done;
    let own = attack.faults(&world, sessions, attacked);
    faults.extend(own.into_iter().map(|fault| format!("{}: {fault}", attack.name())));
    print_row(attack, &turns, &peak, &ends, faults)
}

/// The neighbour and the control, over TCP and UDP at once.
fn neighbour(world: &World, time: Duration, into: &mut Turn) {
    let (warmup, time) = (Duration::from_millis(500).min(time / 2), format!("{}ms", time.as_millis()));
    let load = |mode: &str, target: std::net::SocketAddr, header: &[&str]| {
        let mut command = Command::new(VESTIBULE);
        command.args(["load", "--json", "--target", &target.to_string(), "--pools", "b"]).args(header);
        command.args(["--mode", mode, "--sessions", "32", "--rate", RATE, "--interval", INTERVAL]);
        command.args(["--duration", &time, "--warmup", &format!("{}ms", warmup.as_millis())]);
        high_priority(&command)
    };
    let mut commands = [
        load("connect", world.web, &["--endpoint", B]),
        load("udp", world.dns, &["--endpoint", B]),
        load("connect", world.control, &[]),
        load("udp", world.control, &[]),
    ];
    let measured = into.neighbour.iter_mut().chain(&mut into.control);
    std::thread::scope(|scope| {
        for (command, measured) in commands.iter_mut().zip(measured) {
            scope.spawn(move || measured.add(command));
        }
    });
}

impl Measured {
    fn add(&mut self, command: &mut Command) {
        let output = command.output().expect("the load generator");
        let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
            // Nothing was answered at all.
            self.failures += 1;
            self.rate.push(0.0);
            return;
        };
        let intervals = report["intervals"].as_array().expect("intervals");
        let percentile = |interval: &Value| interval["latency_ns"]["p99"].as_f64().map(|ns| ns / 1e3);
        self.p99.extend(intervals.iter().filter_map(percentile).filter(|p99| *p99 > 0.0));
        self.rate.push(report["operations_per_second"].as_f64().unwrap_or_default());
        self.done += report["operations"].as_u64().unwrap_or_default();
        let failed =
            report["failed"].as_object().map_or(0, |failed| failed.values().filter_map(Value::as_u64).sum());
        self.failures += failed + report["misrouted"].as_u64().unwrap_or_default();
    }

    fn figures(&self) -> (f64, f64) {
        (median(self.p99.clone()), median(self.rate.clone()))
    }
}

fn print_row(
    attack: &dyn Attack,
    turns: &Turns,
    peak: &Peak,
    ends: &std::collections::BTreeMap<String, f64>,
    faults: &mut Vec<String>,
) -> Value {
    let mut ends: Vec<_> = ends.iter().map(|(why, count)| (why.as_str(), *count)).collect();
    ends.sort_by(|one, other| other.1.total_cmp(&one.1));
    let shown: Vec<_> = ends.iter().take(4).map(|(why, count)| format!("{why} {count:.0}")).collect();
    let (mib, descriptors) = attack.bounds();
    let mut fault = |text: String| faults.push(format!("{}: {text}", attack.name()));
    let mut report = json!({ "attack": attack.name(), "rss": peak.rss, "descriptors": peak.descriptors });
    let check = peak.check.map_or("failed".to_owned(), |slowest| format!("{} ms", slowest.as_millis()));
    for (place, protocol) in ["TCP", "UDP"].into_iter().enumerate() {
        let (alone, beside) = (&turns.alone.neighbour[place], &turns.beside.neighbour[place]);
        let ((p99, rate), (p99_beside, rate_beside)) = (alone.figures(), beside.figures());
        let [control, control_beside] =
            [&turns.alone, &turns.beside].map(|turn| turn.control[place].figures().0);
        // Where the control is faster beside the attack, that is no excuse for the proxy, and no merit.
        let (slower, less) = (p99_beside / p99 / (control_beside / control).max(1.0), rate_beside / rate);
        println!(
            "| {} | {protocol} | {p99:.0} us, {rate:.0}/s | {p99_beside:.0} us, {rate_beside:.0}/s | {control:.0}, {control_beside:.0} us | {slower:.2} | {less:.2} | {} | {} MiB | {} | {check} | {} |",
            attack.name(),
            beside.failures,
            peak.rss >> 20,
            peak.descriptors,
            shown.join(", ")
        );
        if beside.failures > 0 {
            fault(format!("{protocol}: {} failures of the neighbour", beside.failures));
        }
        // Written so that a figure that is not there is a fault.
        if !matches!(slower.partial_cmp(&MOST), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            fault(format!("{protocol}: the p99 is {slower:.2} of that alone, relative to the control"));
        }
        if !matches!(
            (less * MOST).partial_cmp(&1.0),
            Some(std::cmp::Ordering::Greater | std::cmp::Ordering::Equal)
        ) {
            fault(format!("{protocol}: the throughput is {less:.2} of that alone"));
        }
        report[protocol] = json!({ "alone": { "p99_us": p99, "rate": rate, "failures": alone.failures },
            "beside": { "p99_us": p99_beside, "rate": rate_beside, "failures": beside.failures },
            "control": { "alone_p99_us": control, "beside_p99_us": control_beside }, "p99_ratio": slower });
    }
    if peak.rss >> 20 > mib {
        fault(format!("{} MiB resident, and {mib} are the most", peak.rss >> 20));
    }
    if peak.descriptors > descriptors {
        fault(format!("{} descriptors, and {descriptors} are the most", peak.descriptors));
    }
    if let Some(most) = attack.check().filter(|most| peak.check.is_none_or(|slowest| slowest > *most)) {
        fault(format!("a health check: {check}, and {} ms are the most", most.as_millis()));
    }
    report["ends"] = json!(ends);
    report
}

/// A sysctl with another value, for as long as this lives.
struct Sysctl {
    path: PathBuf,
    before: String,
}

impl Sysctl {
    fn set(key: &str, value: &str) -> Self {
        let path = PathBuf::from("/proc/sys").join(key);
        let before = std::fs::read_to_string(&path).expect("a sysctl");
        std::fs::write(&path, value).expect("a sysctl of this namespace");
        Self { path, before }
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        std::fs::write(&self.path, &self.before).unwrap_or_default();
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench measures")]
fn now() -> Instant {
    Instant::now()
}
