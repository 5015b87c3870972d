//! What a reload costs: 100,000 tenants put in force, a hundred reloads a second under load, and requests meanwhile.
//!
//! `cargo bench --bench reload` takes three minutes, `-- --test` some seconds; `-- --seconds 60` sets how long the load
//! lasts in each part. Proxy, load, backends and reloads share the machine and nothing is pinned: a rate that the load
//! generator cannot reach is told. Also written to target/reload.json.
#![allow(clippy::indexing_slicing, clippy::panic, reason = "a bench that cannot go on says so by panicking")]

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::runtime::{Builder, LocalOptions};
use vestibule::clock;
use vestibule::config::Config;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::load::schedule::Skew;
use vestibule::lab::load::{self, LoadMode, LoadPlan, LoadProgress, LoadReport, LoadWork};
use vestibule::pool::Answers;
use vestibule::server::Server;
use vestibule::state::{LiveState, ProcessLimits};

const ACME: &str = "vpce-0acce0000acce0000";
const GLOBEX: &str = "vpce-0910be00910be0000";

/// What a swap of all tenants may take of a core.
const ALLOWED: Duration = Duration::from_millis(300);
/// Reloads a second.
const RELOADS: u32 = 100;

/// How thorough a run is.
#[derive(Clone, Copy)]
struct Effort {
    tenants: usize,
    swaps: usize,
    held: usize,
    /// New sessions a second.
    rate: f64,
    seconds: u64,
    is_full: bool,
}

const FULL: Effort =
    Effort { tenants: 100_000, swaps: 10, held: 1_000, rate: 5_000.0, seconds: 60, is_full: true };
const ONCE: Effort = Effort { tenants: 2_000, swaps: 2, held: 20, rate: 100.0, seconds: 1, is_full: false };

/// Two pools that a tenant goes to and fro between, a bystander's, and more tenants.
fn text(backends: [SocketAddr; 3], pool: &str, more: &str) -> String {
    let [old, new, other] = backends;
    let none = "health = { kind = \"none\" }";
    format!(
        "[process]\nworkers = 1\n[admin]\nbind = \"127.0.0.1:0\"\n[health]\nbind = \"127.0.0.1:0\"\n[log]\naccess = \"off\"\n\
         [[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.0/8\"]\n\
         [[pool]]\nname = \"old\"\nbackends = [\"{old}\"]\n{none}\n[[pool]]\nname = \"new\"\nbackends = [\"{new}\"]\n{none}\n\
         [[pool]]\nname = \"other\"\nbackends = [\"{other}\"]\n{none}\n\
         [[tenant]]\nname = \"acme\"\nendpoints = [\"{ACME}\"]\npool = \"{pool}\"\n\
         [[tenant]]\nname = \"globex\"\nendpoints = [\"{GLOBEX}\"]\npool = \"other\"\n{more}"
    )
}

/// So many tenants, each with an endpoint, a limit and a label.
fn tenants(count: usize) -> String {
    let mut text = String::new();
    for number in 0..count {
        writeln!(
            text,
            "[[tenant]]\nname = \"tenant-{number}\"\nendpoints = [\"vpce-1{number:016x}\"]\npool = \"other\"\n\
             labels = {{ plan = \"gold\" }}\nlimits = {{ sessions = {} }}",
            number % 100 + 1
        )
        .unwrap_or_default();
    }
    text
}

fn parse(text: &str) -> Config {
    Config::parse("reload.toml", text).unwrap_or_else(|faults| panic!("{faults}"))
}

/// The processor time of this thread so far.
fn cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("a time that is not negative")
}

/// What something takes of a core, and of the clock.
fn timed<T>(act: impl FnOnce() -> T) -> (T, Duration, Duration) {
    let (start, before) = (clock::now(), cpu());
    let done = act();
    (done, cpu().saturating_sub(before), clock::now().since(start))
}

fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

/// 100,000 tenants, of which one changes each time.
fn swap(effort: Effort) -> Value {
    let backends = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let more = tenants(effort.tenants);
    let texts = ["old", "new"].map(|pool| text(backends, pool, &more));
    let (first, parse_cpu, parse_wall) = timed(|| parse(&texts[0]));
    let configs = [first, parse(&texts[1])];
    let live = LiveState::new(&configs[0], 1, ProcessLimits { sessions: 1_000, pending: 1_000, pipes: 0 });
    let (mut most_cpu, mut most_wall) = (Duration::ZERO, Duration::ZERO);
    for turn in 1..=effort.swaps {
        // As one that was just read: what was in force before is freed within the turn.
        let config = &Arc::new(configs[turn % 2].clone());
        let (changes, swap_cpu, swap_wall) = timed(|| {
            let turn = live.begin_reload(config).expect("nothing that needs a restart");
            turn.put(config, Vec::new(), &Answers::new(), clock::now())
        });
        assert_eq!((changes.tenants.changed, changes.pools.changed), (1, 0));
        (most_cpu, most_wall) = (most_cpu.max(swap_cpu), most_wall.max(swap_wall));
        drop(live.unused());
    }
    println!(
        "{} tenants: read and checked in {:.0} ms of a core ({:.0} ms), put in force in {:.1} ms ({:.1} ms) at most",
        effort.tenants,
        ms(parse_cpu),
        ms(parse_wall),
        ms(most_cpu),
        ms(most_wall)
    );
    assert!(!effort.is_full || most_cpu <= ALLOWED, "a swap takes more than {ALLOWED:?} of a core");
    json!({ "name": "swap", "tenants": effort.tenants, "parse_ms": ms(parse_cpu), "swap_ms": ms(most_cpu),
        "swap_wall_ms": ms(most_wall) })
}

/// Three backends, and a proxy in front of them.
struct Environment {
    backends: [SocketAddr; 3],
    server: Server,
    _running: tokio::runtime::Runtime,
    _backends: Vec<TestBackend>,
}

impl Environment {
    fn start() -> Self {
        let running = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime for backends");
        // Both of the tenant's are one to the load generator: a third would be a wrong one.
        let start =
            |name| running.block_on(TestBackend::start(name, BackendBehavior::Load)).expect("a backend");
        let all: Vec<_> = ["app", "app", "other"].map(start).into();
        let mut backends = [SocketAddr::from(([0; 4], 0)); 3];
        backends.iter_mut().zip(&all).for_each(|(address, backend)| *address = backend.address());
        let server = Server::start(&parse(&text(backends, "old", ""))).expect("a proxy");
        Self { backends, server, _running: running, _backends: all }
    }

    /// Runs a load on a thread of its own.
    fn load(
        &self,
        mode: LoadMode,
        sessions: usize,
        rate: Option<f64>,
        seconds: u64,
    ) -> JoinHandle<LoadReport> {
        let target = self.server.addresses("web").first().copied().expect("a listener");
        let endpoints = [(ACME, "app"), (GLOBEX, "other")].map(|(id, pool)| (id.to_owned(), pool.to_owned()));
        let plan = LoadPlan {
            target,
            endpoints: endpoints.into(),
            skew: Skew::Uniform,
            work: LoadWork::Sessions(mode),
            sessions,
            size: 64,
            rate,
            duration: Duration::from_secs(seconds),
            warmup: Duration::from_millis(200),
            interval: None,
            clients: 1,
            noise: 0,
        };
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
            let runtime = runtime.expect("a runtime for the load");
            runtime.block_on(load::run(plan, Arc::<LoadProgress>::default())).expect("a load")
        })
    }
}

fn judge(what: &str, report: &LoadReport) {
    assert!(
        report.is_fine() && report.failed() == 0,
        "{what}: {:?}, {} misrouted",
        report.failures,
        report.misrouted
    );
}

/// A hundred reloads a second, while sessions are held and others come and go.
fn churn(effort: Effort) -> Value {
    let environment = Environment::start();
    let configs = ["old", "new"].map(|pool| Arc::new(parse(&text(environment.backends, pool, ""))));
    // The held ones say something now and then.
    let talk = Some(f64::from(u32::try_from(effort.held).unwrap_or(u32::MAX)));
    let held = environment.load(LoadMode::RoundTrip, effort.held, talk, effort.seconds);
    let fresh = environment.load(LoadMode::Connect, 64, Some(effort.rate), effort.seconds);
    let (start, mut done) = (clock::now(), 0_u32);
    while !(held.is_finished() && fresh.is_finished()) {
        let config = &configs[(done as usize + 1) % 2];
        environment.server.reload(config).expect("a reload");
        done += 1;
        let due = start + Duration::from_secs(1) / RELOADS * done;
        thread::park_timeout(due.since(clock::now()));
    }
    let took = clock::now().since(start);
    let (held, fresh) = (held.join().expect("the held"), fresh.join().expect("the fresh"));
    judge("held sessions", &held);
    judge("new sessions", &fresh);
    let unfreed = environment.server.live().replaced();
    let (reloads, sessions) = (
        f64::from(done) / took.as_secs_f64(),
        f64::from(u32::try_from(fresh.operations).unwrap_or(u32::MAX)) / fresh.took.as_secs_f64(),
    );
    println!(
        "{done} reloads in {took:.1?} ({reloads:.0}/s) under {} held sessions and {sessions:.0} new ones a second: \
         {} and {} requests, none failed, none misrouted; {} not sent; {unfreed} snapshots held",
        effort.held, held.operations, fresh.operations, fresh.not_sent
    );
    json!({ "name": "churn", "reloads": done, "reloads_per_second": reloads, "held": effort.held,
        "sessions_per_second": sessions, "not_sent": fresh.not_sent, "failed": 0, "misrouted": 0 })
}

/// Requests beside reloads of all tenants, and without.
fn beside(effort: Effort) -> Value {
    let mut quantiles = Vec::new();
    let more = tenants(effort.tenants);
    for with in [false, true] {
        let environment = Environment::start();
        let texts = ["old", "new"].map(|pool| text(environment.backends, pool, &more));
        environment.server.reload(&Arc::new(parse(&texts[0]))).expect("a reload");
        let load = environment.load(LoadMode::RoundTrip, 16, Some(effort.rate / 5.0), effort.seconds);
        let (start, mut turn) = (clock::now(), 0_u32);
        while !load.is_finished() {
            if with && clock::now() >= start + Duration::from_secs(1) * turn {
                turn += 1;
                let text = if turn % 2 == 0 { &texts[0] } else { &texts[1] };
                environment.server.reload(&Arc::new(parse(text))).expect("a reload");
            }
            thread::park_timeout(Duration::from_millis(20));
        }
        let report = load.join().expect("the load");
        judge("requests", &report);
        let at = |quantile| ms(Duration::from_nanos(report.latency.value_at_quantile(quantile)));
        println!(
            "{} a reload of {} tenants each second: p50 {:.3} ms, p99 {:.3} ms, p99.9 {:.3} ms, {turn} reloads",
            if with { "with" } else { "without" },
            effort.tenants,
            at(0.5),
            at(0.99),
            at(0.999)
        );
        quantiles.push(json!({ "with": with, "p50_ms": at(0.5), "p99_ms": at(0.99), "p999_ms": at(0.999) }));
    }
    json!({ "name": "beside", "runs": quantiles })
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    let mut effort = if arguments.iter().any(|argument| argument == "--test") { ONCE } else { FULL };
    let seconds = arguments.iter().skip_while(|argument| *argument != "--seconds").nth(1);
    if let Some(seconds) = seconds.and_then(|seconds| seconds.parse().ok()) {
        effort.seconds = seconds;
    }
    let report = [swap(effort), churn(effort), beside(effort)];
    if effort.is_full {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/reload.json");
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("target/");
        std::fs::write(&path, format!("{:#}\n", json!(report))).expect("a file under target/");
    }
}
