//! The attacks, one type each: what it is called, what the configuration is, and what the attackers do.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::actor::Act;
use super::stage::VESTIBULE;
use super::world::{A, C, Conf, World};

/// An endpoint that no tenant has.
const STRANGER: &str = "vpce-0dddddddddddddddd";

/// What a health check may take while the health port is attacked.
const CHECK: Duration = Duration::from_millis(100);

/// One kind of attack.
pub(super) trait Attack: Sync {
    /// Its name on the command line and in the table.
    fn name(&self) -> &'static str;

    /// What it needs of the configuration.
    fn conf(&self, _dir: &Path) -> Conf {
        Conf::default()
    }

    /// A sysctl that it needs, in a network namespace of its own.
    fn sysctl(&self) -> Option<(&'static str, &'static str)> {
        None
    }

    /// The attackers' processes.
    fn actors(&self, world: &World) -> Vec<Command>;

    /// What it does besides, in a thread of the bench, until it is told to stop.
    fn beside(&self, _world: &World, _stop: &AtomicBool) {}

    /// The most resident memory that the proxy may have, in MiB, and descriptors.
    fn bounds(&self) -> (u64, usize) {
        (256, 19_000)
    }

    /// What is wrong besides, given how many sessions of the neighbour there were and how long its attack lasted.
    fn faults(&self, _world: &World, _sessions: u64, _attacked: Duration) -> Vec<String> {
        Vec::new()
    }

    /// Sessions and flows of the attackers, at least, if the attack takes place.
    fn ends(&self) -> u32 {
        50
    }

    /// How long a health check may take.
    fn check(&self) -> Option<Duration> {
        None
    }
}

/// All of them.
pub(super) fn all() -> Vec<Box<dyn Attack>> {
    vec![
        Box::new(ShortSessions),
        Box::new(LivePorts),
        Box::new(SilentConnections),
        Box::new(TwoTenants),
        Box::new(FlowFlood),
        Box::new(BareDatagrams),
        Box::new(StalledReaders),
        Box::new(PoolHeld),
        Box::new(FirstSegments),
        Box::new(HealthFlood),
        Box::new(Strays::default()),
        Box::new(ComeAndGo),
        Box::new(Scrapes),
    ]
}

fn churn(world: &World, rate: u32, endpoint: &str, bytes: usize) -> Command {
    Act { kind: "churn", target: world.web, rate, most: 2_000, endpoint, bytes }.command()
}

/// Sessions without bytes behind the header stay: the backend waits for a message.
fn hold(world: &World, rate: u32, most: u32, endpoint: &str, bytes: usize) -> Command {
    Act { kind: "hold", target: world.web, rate, most, endpoint, bytes }.command()
}

fn flows(world: &World, rate: u32, most: u32) -> Command {
    Act { kind: "flows", target: world.dns, rate, most, endpoint: A, bytes: 24 }.command()
}

struct ShortSessions;
impl Attack for ShortSessions {
    fn name(&self) -> &'static str {
        "short-sessions"
    }
    fn sysctl(&self) -> Option<(&'static str, &'static str)> {
        Some(("net/ipv4/tcp_tw_reuse", "0"))
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![churn(world, 2_000, A, 16)]
    }
}

struct LivePorts;
impl Attack for LivePorts {
    fn name(&self) -> &'static str {
        "live-ports"
    }
    // The descriptors of two ends each are less than the ports: so the range is made smaller.
    fn sysctl(&self) -> Option<(&'static str, &'static str)> {
        Some(("net/ipv4/ip_local_port_range", "40000 44999"))
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![hold(world, 1_000, 6_000, A, 0)]
    }
}

struct SilentConnections;
impl Attack for SilentConnections {
    fn name(&self) -> &'static str {
        "silent-connections"
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![hold(world, 2_000, 9_000, "-", 0)]
    }
}

struct TwoTenants;
impl Attack for TwoTenants {
    fn name(&self) -> &'static str {
        "two-tenants-and-silence"
    }
    fn conf(&self, _dir: &Path) -> Conf {
        Conf { process: "max-sessions = 3000".to_owned(), ..Conf::default() }
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        let silence = hold(world, 1_000, 3_000, "-", 0);
        vec![hold(world, 1_000, 3_000, A, 0), hold(world, 1_000, 3_000, C, 0), silence]
    }
}

struct FlowFlood;
impl Attack for FlowFlood {
    fn name(&self) -> &'static str {
        "flow-flood"
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![flows(world, 10_000, 60_000)]
    }
}

struct BareDatagrams;
impl Attack for BareDatagrams {
    fn name(&self) -> &'static str {
        "bare-datagrams"
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        let bare = Act { kind: "bare", target: world.dns, rate: 5_000, most: 1, endpoint: "-", bytes: 64 };
        vec![bare.command()]
    }
}

struct StalledReaders;
impl Attack for StalledReaders {
    fn name(&self) -> &'static str {
        "stalled-readers"
    }
    fn conf(&self, _dir: &Path) -> Conf {
        Conf { endless: true, ..Conf::default() }
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![hold(world, 500, 1_000, A, 1)]
    }
    fn bounds(&self) -> (u64, usize) {
        (64, 19_000)
    }
}

struct PoolHeld;
impl Attack for PoolHeld {
    fn name(&self) -> &'static str {
        "shared-pool-held"
    }
    fn conf(&self, _dir: &Path) -> Conf {
        // The neighbour's flows, some 200, are in the pool, too.
        let backend = "backends = [{ address = \"BACKEND\", max-sessions = 1000 }]";
        let queue = "queue = { length = 40, timeout = \"1s\" }";
        Conf { shared: Some(format!("{backend}\n{queue}")), ..Conf::default() }
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![hold(world, 1_000, 3_000, A, 0)]
    }
}

struct FirstSegments;
impl FirstSegments {
    /// A's bandwidth to its backend in a second.
    const MIB: f64 = 1.0;
}
impl Attack for FirstSegments {
    fn name(&self) -> &'static str {
        "first-segments"
    }
    fn conf(&self, _dir: &Path) -> Conf {
        Conf { limits: "to-backend = \"1MiB/s\"".to_owned(), ..Conf::default() }
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        vec![churn(world, 2_000, A, 15_000)]
    }
    fn faults(&self, world: &World, _sessions: u64, attacked: Duration) -> Vec<String> {
        let bytes = world.by("vestibule_forwarded_bytes_total", "tenant", "direction=\"to_client\"");
        let rate = bytes.get("a").copied().unwrap_or_default() / attacked.as_secs_f64() / f64::from(1 << 20);
        // A second's worth may be saved up.
        let most = Self::MIB * (1.1 + 1.0 / attacked.as_secs_f64());
        Vec::from_iter((rate > most).then(|| format!("A sent {rate:.1} MiB/s of {:.1}", Self::MIB)))
    }
}

struct HealthFlood;
impl Attack for HealthFlood {
    fn name(&self) -> &'static str {
        "health-and-admin"
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        let half =
            |target, rate, most| Act { kind: "hold", target, rate, most, endpoint: "-", bytes: 1 }.command();
        vec![half(world.health, 2_000, 2_000), half(world.admin, 200, 64)]
    }
    // They are at other ports.
    fn ends(&self) -> u32 {
        0
    }
    fn check(&self) -> Option<Duration> {
        Some(CHECK)
    }
}

/// A pipe that takes so many bytes in a second.
const SINK: u32 = 1_000_000;

#[derive(Default)]
struct Strays {
    /// Lines of the neighbour that came out of the log.
    lines: AtomicU32,
    path: std::sync::OnceLock<PathBuf>,
}
impl Attack for Strays {
    fn name(&self) -> &'static str {
        "strays-and-slow-log"
    }
    fn conf(&self, dir: &Path) -> Conf {
        let path = self.path.get_or_init(|| dir.join("access.fifo"));
        let made = Command::new("mkfifo").arg(path).status();
        assert!(made.is_ok_and(|status| status.success()), "a named pipe");
        Conf { log: Some(path.clone()), ..Conf::default() }
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        (0..2).map(|_| churn(world, 5_000, STRANGER, 0)).collect()
    }
    fn beside(&self, _world: &World, stop: &AtomicBool) {
        let path = self.path.get().expect("the pipe");
        // With both ends, so that opening and reading wait for nobody.
        let pipe = std::fs::File::options().read(true).write(true).open(path).expect("the pipe");
        rustix::io::ioctl_fionbio(&pipe, true).expect("a pipe that does not wait");
        let mut log = BufReader::new(pipe);
        let mut line = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let mut read = 0;
            while read < SINK / 100 && log.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                read += u32::try_from(line.len()).unwrap_or(SINK);
                let is_b = String::from_utf8_lossy(&line).contains("\"tenant\":\"b\"");
                self.lines.fetch_add(u32::from(is_b), Ordering::Relaxed);
                line.clear();
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
    fn faults(&self, _world: &World, sessions: u64, _attacked: Duration) -> Vec<String> {
        let lines = self.lines.load(Ordering::Relaxed);
        // The last batch may be on its way; UDP flows have their lines when they end.
        let is_short = f64::from(lines) < 0.99 * f64::from(u32::try_from(sessions).unwrap_or(u32::MAX));
        Vec::from_iter(is_short.then(|| format!("{lines} lines of the neighbour's {sessions} sessions")))
    }
}

/// Tenants of each generation.
const GENERATION: u32 = 200;

struct ComeAndGo;
impl Attack for ComeAndGo {
    fn name(&self) -> &'static str {
        "tenants-come-and-go"
    }
    fn actors(&self, _world: &World) -> Vec<Command> {
        Vec::new()
    }
    fn beside(&self, world: &World, stop: &AtomicBool) {
        let process = Pid::from_child(&world.proxy.0);
        for generation in 0_u32.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let number = |each: u32| generation * GENERATION + each;
            let tenants = (0..GENERATION).map(|each| {
                let number = number(each);
                format!(
                    "[[tenant]]\nname = \"t{number}\"\nendpoints = [\"vpce-{number:017x}\"]\npool = \"b\"\n"
                )
            });
            std::fs::write(&world.more, tenants.collect::<String>()).expect("tenants");
            kill_process(process, Signal::HUP).expect("the proxy");
            std::thread::park_timeout(Duration::from_millis(400));
            let mut load = Command::new(VESTIBULE);
            load.args(["load", "--target", &world.web.to_string(), "--mode", "connect", "--pools", "b"]);
            load.args(["--sessions", "8", "--rate", "500/s", "--warmup", "0s", "--duration", "400ms"]);
            for each in 0..GENERATION {
                load.arg("--endpoint").arg(format!("vpce-{:017x}", number(each)));
            }
            // Those that a reload has met are the proxy's to count.
            drop(super::world::low_priority(&load).output());
        }
    }
    fn faults(&self, world: &World, _sessions: u64, _attacked: Duration) -> Vec<String> {
        let rows = world.by("vestibule_sessions_active", "tenant", "").len();
        // This generation, the one before it that is not folded yet, and those that stay.
        let most = usize::try_from(2 * GENERATION).expect("few") + 10;
        Vec::from_iter((rows > most).then(|| format!("{rows} tenants have rows")))
    }
}

struct Scrapes;
impl Attack for Scrapes {
    fn name(&self) -> &'static str {
        "scrapes-with-flows"
    }
    fn actors(&self, world: &World) -> Vec<Command> {
        let scrape = Act { kind: "scrape", target: world.admin, rate: 20, most: 1, endpoint: "-", bytes: 0 };
        vec![flows(world, 2_000, 8_000), scrape.command()]
    }
}
