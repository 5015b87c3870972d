//! The proxy under attack, its backends, and what is read of it while it is attacked.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::now;
use super::stage::{self, LOAD_CORE, PROXY_CORE, Proc, VESTIBULE, free, pinned, until_after};

/// The attackers and the neighbour.
pub(super) const A: &str = "vpce-0aaaaaaaaaaaaaaaa";
pub(super) const B: &str = "vpce-0bbbbbbbbbbbbbbbb";
pub(super) const C: &str = "vpce-0cccccccccccccccc";

/// What an attack adds to the configuration. Every field is TOML.
#[derive(Default)]
pub(super) struct Conf {
    pub(super) process: String,
    /// Keys of A's and of C's limits.
    pub(super) limits: String,
    /// The pool of everybody, where it is one.
    pub(super) shared: Option<String>,
    /// The backend of A sends without end.
    pub(super) endless: bool,
    /// The access log; a file without it.
    pub(super) log: Option<PathBuf>,
}

/// A proxy, its backends, and where they are.
pub(super) struct World {
    pub(super) web: SocketAddr,
    pub(super) dns: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) health: SocketAddr,
    /// The control's backend, over TCP and UDP. It has an address of its own: to that of the neighbour the control's local ports in
    /// TIME_WAIT would be closed to the proxy.
    pub(super) control: SocketAddr,
    /// What an attack may rewrite: tenants that come and go.
    pub(super) more: PathBuf,
    pub(super) proxy: Proc,
    _backends: [Proc; 3],
}

/// The most that was seen.
#[derive(Clone, Copy, Default)]
pub(super) struct Peak {
    pub(super) rss: u64,
    pub(super) descriptors: usize,
    /// The slowest answer to a health check; `None` where one was not answered.
    pub(super) check: Option<Duration>,
}

/// Before all others of the ordinary classes (sched(7), `SCHED_RR`), where that is allowed.
const FIRST: &[&str] = &["chrt", "--rr", "1"];

fn may_use_realtime() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| {
        let tried = Command::new(FIRST[0]).args(&FIRST[1..]).arg("true").status();
        tried.is_ok_and(|status| status.success())
    });
    *ALLOWED
}

/// An attacker's command: the neighbour's load preempts it at once, so that the neighbour feels the proxy and not the
/// attacker's load generator. Where nothing may be first, it is in the idle class.
pub(super) fn low_priority(command: &Command) -> Command {
    classed(if may_use_realtime() { &["nice", "-n", "10"] } else { &["chrt", "--idle", "0"] }, command)
}

/// A command before all others.
pub(super) fn high_priority(command: &Command) -> Command {
    classed(if may_use_realtime() { FIRST } else { &[] }, command)
}

fn classed(class: &[&str], command: &Command) -> Command {
    let mut there = pinned(LOAD_CORE);
    there.args(class).arg(command.get_program()).args(command.get_args());
    there
}

impl World {
    /// Starts the backends and the proxy, which has one worker and a core to itself.
    pub(super) fn start(dir: &Path, program: &Path, conf: &Conf) -> Self {
        let [web, dns, admin, health, of_a, of_b, control] = std::array::from_fn(|_| free());
        let backend = |name: &str, at: SocketAddr| {
            let mut command = Command::new(VESTIBULE);
            command.args(["backend", "--listen", &format!("{name}={at}"), "--udp", &format!("{name}={at}")]);
            command
        };
        let source =
            super::actor::Act { kind: "source", target: of_a, rate: 0, most: 0, endpoint: "-", bytes: 0 };
        // One that sends without end has to accept as fast as its clients come, and must not hold up the neighbour's load.
        let behind_a =
            if conf.endless { classed(&[], &source.command()) } else { low_priority(&backend("a", of_a)) };
        let own = [of_b, control].map(|at| Proc::start(&high_priority(&backend("b", at))));
        let [behind_b, of_control] = own;
        let backends = [Proc::start(&behind_a), behind_b, of_control];
        for at in [of_a, of_b, control] {
            ready(at);
        }
        let pools = match &conf.shared {
            Some(keys) => pool("shared", of_b, keys),
            None => pool("a", of_a, "") + &pool("b", of_b, ""),
        };
        let name = |own| if conf.shared.is_some() { "shared" } else { own };
        let tenants = tenant("a", A, name("a"), &conf.limits)
            + &tenant("b", B, name("b"), "")
            + &tenant("c", C, name("a"), &conf.limits);
        let more = dir.join("more.toml");
        std::fs::write(&more, "").expect("a file for tenants");
        let log = conf.log.clone().unwrap_or_else(|| dir.join("access.log"));
        let text = format!(
            "include = [\"more.toml\"]\n[process]\nworkers = 1\n{}\n[admin]\nbind = \"{admin}\"\n\
             [health]\nbind = \"{health}\"\n[log]\naccess = \"{}\"\n{}{}{pools}{tenants}",
            conf.process,
            log.display(),
            listener("web", web, "tcp"),
            listener("dns", dns, "udp"),
        );
        let path = dir.join("vestibule.toml");
        std::fs::write(&path, text).expect("a configuration");
        let mut serve = pinned(PROXY_CORE);
        serve.arg(program).args(["serve", "--config"]).arg(&path);
        let proxy = Proc::start(&serve);
        ready(web);
        ready(admin);
        Self { web, dns, admin, health, control, more, proxy, _backends: backends }
    }

    /// The sums of a metric by one of its labels, of series that have none of `without`.
    pub(super) fn by(&self, name: &str, label: &str, without: &str) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::new();
        for (series, value) in stage::scrape(self.admin) {
            let is_it = series.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
            if is_it && (without.is_empty() || !series.contains(without)) {
                let value_of =
                    series.split_once(&format!("{label}=\"")).and_then(|(_, rest)| rest.split_once('"'));
                *sums.entry(value_of.map_or("", |(word, _)| word).to_owned()).or_default() += value;
            }
        }
        sums
    }

    /// What the proxy holds, and how long a health check takes, ten times in a second until it is told to stop. Its descriptors
    /// are counted every two seconds: that takes milliseconds of a core where there are thousands, which the neighbour feels.
    pub(super) fn watch(&self, stop: &AtomicBool) -> Peak {
        let mut peak = Peak { check: Some(Duration::ZERO), ..Peak::default() };
        for turn in 0_u32.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            peak.rss = peak.rss.max(self.proxy.resident());
            if turn % 20 == 10 {
                let table = format!("/proc/{}/fd", self.proxy.0.id());
                peak.descriptors = peak.descriptors.max(std::fs::read_dir(table).map_or(0, Iterator::count));
            }
            peak.check = peak.check.and_then(|slowest| Some(slowest.max(self.check()?)));
            std::thread::park_timeout(Duration::from_millis(100));
        }
        peak
    }

    /// How long the load balancer's check takes; `None` where it fails.
    fn check(&self) -> Option<Duration> {
        let start = now();
        let mut stream = TcpStream::connect_timeout(&self.health, Duration::from_secs(6)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(6))).ok()?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200 ").then(|| now() - start)
    }
}

/// Waits until something listens; the backend of the attackers starts in the idle class.
fn ready(address: SocketAddr) {
    let fault = format!("nothing listens on {address}");
    until_after(Duration::from_secs(60), &fault, || TcpStream::connect(address).is_ok());
}

fn listener(name: &str, bind: SocketAddr, protocol: &str) -> String {
    format!(
        "[[listener]]\nname = \"{name}\"\nbind = \"{bind}\"\nprotocol = \"{protocol}\"\ntrusted-sources = [\"127.0.0.0/8\"]\n"
    )
}

fn pool(name: &str, backend: SocketAddr, keys: &str) -> String {
    let keys = if keys.is_empty() {
        format!("backends = [\"{backend}\"]")
    } else {
        keys.replace("BACKEND", &backend.to_string())
    };
    format!("[[pool]]\nname = \"{name}\"\n{keys}\n[pool.health]\nkind = \"none\"\n")
}

fn tenant(name: &str, endpoint: &str, pool: &str, limits: &str) -> String {
    format!(
        "[[tenant]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\npool = \"{pool}\"\n[tenant.limits]\n{limits}\n"
    )
}
