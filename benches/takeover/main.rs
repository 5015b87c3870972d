//! Twenty takeovers in a row under load: a thousand long sessions that number every byte both ways live from the first process
//! to the last, new sessions and UDP flows go on beside them, and no client notices it.
//! `cargo bench --bench takeover`; `-- --test` takes seconds.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a bench that cannot go on says so by panicking"
)]

mod long;
#[path = "../stage/mod.rs"]
mod stage;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::json;
use tokio::time::sleep;

use self::long::{Kind, Long};
use self::stage::{Proc, VESTIBULE};

/// The endpoint of the long sessions, and of those whose tenant has little bandwidth.
const LONG: &str = "vpce-0106010601060106a";
const LIMITED: &str = "vpce-0106010601060106b";

/// Whose sessions are short, and whose flows.
const TENANTS: &str = "100";

/// From one takeover to the next.
const EVERY: Duration = Duration::from_secs(2);

/// How long a predecessor may take to be gone once its successor serves.
const GONE: Duration = Duration::from_secs(2);

#[derive(Parser)]
struct Options {
    /// Takeovers in a row
    #[arg(long, default_value_t = 20)]
    takeovers: u32,
    /// Long sessions
    #[arg(long, default_value_t = 1_000)]
    sessions: u32,
    /// New sessions in each second
    #[arg(long, default_value_t = 5_000)]
    rate: u32,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let mut options = Options::parse();
    if options.test {
        (options.takeovers, options.sessions, options.rate) = (3, 60, 200);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, run(&options));
}

async fn run(options: &Options) {
    println!(
        "kernel {}, vestibule {}: {} takeovers, {} long sessions, {} new ones a second",
        stage::kernel(),
        env!("CARGO_PKG_VERSION"),
        options.takeovers,
        options.sessions,
        options.rate
    );
    let dir = tempfile::tempdir().expect("a folder for configurations");
    let long = Long::start().await;
    let environment = Environment::start(dir.path(), long.backend);
    let mut old = environment.serve(None);
    let each = options.sessions / 20;
    let rest = options.sessions - each * 14;
    long.open(
        environment.target,
        &[
            (Kind::Idle, rest, LONG),
            (Kind::Talks, each * 6, LONG),
            (Kind::Streams, each, LONG),
            (Kind::ClientEnded, each * 3, LONG),
            (Kind::BackendEnded, each * 3, LONG),
            (Kind::Limited, each, LIMITED),
        ],
    )
    .await;
    let (mut sessions, mut flows) = environment.load(options.rate, EVERY * (options.takeovers + 1));
    let (begun, mut took) = (now(), Vec::new());
    for turn in 0..options.takeovers {
        sleep((EVERY * (turn + 1)).saturating_sub(begun.elapsed())).await;
        let start = now();
        let mut successor = environment.serve(Some(&environment.control));
        // Measured from outside: from the successor's start to the end of the predecessor, with the reading of the configuration.
        let mut looks = 0;
        while old.0.try_wait().expect("the old process").is_none() {
            assert!(
                successor.0.try_wait().expect("the successor").is_none(),
                "the successor of turn {turn} ended"
            );
            assert!(looks < 2_000, "the old process of turn {turn} is still there: {}", environment.left());
            looks += 1;
            sleep(Duration::from_millis(5)).await;
        }
        took.push(start.elapsed().as_secs_f64() * 1e3);
        let status = old.0.wait().expect("the old process's end");
        assert!(status.success(), "turn {turn}: {status}");
        old = successor;
    }
    println!(
        "from a successor's start to its predecessor's end: median {:.0} ms",
        stage::median(took.clone())
    );
    let (sessions, flows) = (finish(&mut sessions).await, finish(&mut flows).await);
    let bytes = long.finish().await;
    println!(
        "{} long sessions live to their end, with {bytes} bytes numbered and checked\n\
         {} short sessions, none failed, none misrouted; {} datagrams there and back, {} lost",
        options.sessions, sessions["operations"], flows["operations"], flows["lost"]
    );
    assert!(took.iter().all(|took| *took < GONE.as_secs_f64() * 1e3) || options.test, "{took:?}");
    environment.is_empty();
    stage::write_json(
        "takeover",
        &json!({ "kernel": stage::kernel(), "takeovers": options.takeovers, "long": options.sessions, "took_ms": took,
            "bytes": bytes, "sessions": sessions, "flows": flows }),
    );
}

#[expect(clippy::disallowed_methods, reason = "a bench measures")]
fn now() -> Instant {
    Instant::now()
}

/// Waits for the end of a load and checks its report: no session was misrouted, and none failed.
async fn finish(load: &mut Load) -> serde_json::Value {
    let mut looks = 0;
    while load.proc.0.try_wait().expect("the load generator").is_none() {
        assert!(looks < 1_000, "the load generator does not end");
        looks += 1;
        sleep(Duration::from_millis(20)).await;
    }
    let text = std::fs::read_to_string(&load.report).expect("a report");
    let report: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(report["misrouted"], 0, "{report}");
    assert_eq!(report["failed"].as_object().map_or(0, serde_json::Map::len), 0, "{report}");
    report
}

struct Load {
    proc: Proc,
    report: PathBuf,
}

/// The backends, and where the proxies serve one after the other.
struct Environment {
    dir: PathBuf,
    target: SocketAddr,
    datagrams: SocketAddr,
    admin: SocketAddr,
    health: SocketAddr,
    control: PathBuf,
    _backends: [Proc; 2],
}

impl Environment {
    fn start(dir: &Path, long: SocketAddr) -> Self {
        // One address for both: connections and datagrams have ports of their own.
        let short = stage::free();
        let backends = ["--listen", "--udp"].map(|option| {
            let mut command = Command::new(VESTIBULE);
            command.args(["backend", option]).arg(format!("short={short}"));
            Proc::start(&command)
        });
        stage::ready(short);
        stage::bound(short);
        stage::write_tenants(TENANTS, "short", &dir.join("tenants.toml"));
        let [target, datagrams, admin, health] = [(); 4].map(|()| stage::free());
        let control = dir.join("control");
        let text = format!(
            r#"
include = ["tenants.toml"]
[admin]
bind = "{admin}"
socket = "{}"
[health]
bind = "{health}"
[log]
level = "warn"
access = "off"
[[listener]]
name = "web"
bind = "{target}"
trusted-sources = ["127.0.0.0/8"]
[[listener]]
name = "dns"
protocol = "udp"
bind = "{datagrams}"
trusted-sources = ["127.0.0.0/8"]
[[pool]]
name = "short"
backends = ["{short}"]
[[pool]]
name = "long"
backends = ["{long}"]
[pool.health]
kind = "none"
[[tenant]]
name = "long"
endpoints = ["{LONG}"]
pool = "long"
[[tenant]]
name = "limited"
endpoints = ["{LIMITED}"]
pool = "long"
[tenant.limits]
to-backend = "2MiB/s"
to-client = "2MiB/s"
"#,
            control.display()
        );
        std::fs::write(dir.join("vestibule.toml"), text).expect("a configuration");
        Self { dir: dir.to_owned(), target, datagrams, admin, health, control, _backends: backends }
    }

    /// A proxy; one that takes over from the process behind this socket.
    fn serve(&self, takeover: Option<&Path>) -> Proc {
        let mut command = Command::new(VESTIBULE);
        command.args(["serve", "--config"]).arg(self.dir.join("vestibule.toml"));
        if let Some(control) = takeover {
            command.arg("--takeover").arg(control);
        }
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("a file for the log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let proc = Proc(command.spawn().expect("a proxy"));
        if takeover.is_none() {
            stage::ready(self.target);
            stage::until("the proxy is not ready", || self.is_ready());
        }
        proc
    }

    /// Short sessions and UDP flows, for so long.
    fn load(&self, rate: u32, span: Duration) -> (Load, Load) {
        let start = |name: &str, options: &[&str], target: SocketAddr| {
            let report = self.dir.join(name);
            let file = std::fs::File::create(&report).expect("a file for the report");
            let mut command = Command::new(VESTIBULE);
            command.args(["load", "--json", "--endpoints", TENANTS, "--pools", "short", "--duration"]);
            command.arg(format!("{}s", span.as_secs()));
            command.args(options).arg("--target").arg(target.to_string());
            command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null());
            Load { proc: Proc(command.spawn().expect("the load generator")), report }
        };
        let rate = format!("{rate}/s");
        let sessions =
            start("sessions", &["--mode", "connect", "--sessions", "64", "--rate", &rate], self.target);
        let flows = start(
            "flows",
            &["--mode", "udp", "--sessions", "64", "--timeout", "1s", "--rate", "2000/s"],
            self.datagrams,
        );
        (sessions, flows)
    }

    /// Whether the health check passes.
    fn is_ready(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(self.health) else { return false };
        let mut answer = String::new();
        let asked = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n");
        asked.and_then(|()| stream.read_to_string(&mut answer)).is_ok() && answer.starts_with("HTTP/1.1 200 ")
    }

    /// What the last lines of the log say.
    fn left(&self) -> String {
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    /// Every gauge of the last process is at zero, and every session was ended by its client or its backend.
    fn is_empty(&self) {
        stage::until("something is left", || {
            let all = stage::scrape(self.admin);
            let gauges =
                ["vestibule_sessions_active", "vestibule_pipes_in_use", "vestibule_tenant_sessions{"];
            gauges.iter().all(|gauge| {
                // Flows live until they have been silent for long.
                let of_sessions = |name: &str| name.starts_with(gauge) && !name.contains("\"dns\"");
                all.iter().filter(|(name, _)| of_sessions(name)).all(|(_, value)| *value == 0.0)
            })
        });
        let faults: Vec<_> = stage::scrape(self.admin)
            .into_iter()
            .filter(|(name, value)| {
                name.starts_with("vestibule_sessions_ended_total")
                    && name.contains("why=\"internal\"")
                    && *value > 0.0
            })
            .collect();
        assert!(faults.is_empty(), "{faults:?}");
    }
}
