//! The contenders of a comparison: each is a child process, pinned to the proxy's core. They are measured in alternation.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{LOAD_CORE, PROXY_CORE, Proc, VESTIBULE, free, pinned};

/// The number of endpoints that the load sends in its headers, each a tenant.
pub(crate) const TENANTS: &str = "1000";

/// A proxy, or the direct connection, that is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) version: String,
    pub(crate) target: SocketAddr,
    /// The address at which the load serves the backend.
    backend: SocketAddr,
    /// Whether the load sends a PROXY header with an endpoint.
    sends_header: bool,
    process: Option<Proc>,
}

/// The load's connection to the backend without a proxy.
pub(crate) const DIRECT: &str = "direct";
/// vestibule with every limit on.
pub(crate) const OURS: &str = "vestibule";

/// Another build of vestibule, to measure a change.
#[derive(Clone)]
pub(crate) struct Other {
    pub(crate) name: &'static str,
    pub(crate) program: String,
}

impl std::str::FromStr for Other {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, program) = text.split_once('=').ok_or("must be NAME=PATH")?;
        Ok(Self { name: name.to_owned().leak(), program: program.to_owned() })
    }
}

/// Lines added to vestibule's configuration: to its listener, to its pool, and at the end.
#[derive(Clone, Copy, Default)]
pub(crate) struct ConfigLines<'a> {
    pub(crate) listener: &'a str,
    pub(crate) pool: &'a str,
    pub(crate) rest: &'a str,
}

/// Whether this is a proxy other than vestibule.
pub(crate) fn is_peer(name: &str) -> bool {
    name.starts_with("haproxy") || name.starts_with("nginx")
}

impl Contender {
    /// A direct connection from the load to this backend.
    pub(crate) fn direct(backend: SocketAddr) -> Self {
        let version = DIRECT.to_owned();
        Self { name: DIRECT, version, target: backend, backend, sends_header: false, process: None }
    }

    /// Starts a proxy on the proxy's core; it may not be ready yet.
    pub(crate) fn start(
        name: &'static str,
        version: String,
        target: SocketAddr,
        backend: SocketAddr,
        command: &[&str],
    ) -> Self {
        let mut pinned = pinned(PROXY_CORE);
        pinned.args(command);
        let process = Some(Proc::start(&pinned));
        Self { name, version, target, backend, sends_header: true, process }
    }

    /// Starts vestibule with one listener and one pool.
    pub(crate) fn ours(dir: &Path, name: &'static str, program: &str, lines: &ConfigLines<'_>) -> Self {
        let (target, backend) = (free(), free());
        let path = dir.join(format!("{name}.toml"));
        let text = format!(
            r#"
include = ["tenants.toml"]
[process]
workers = 1
[admin]
bind = "{}"
[health]
bind = "{}"
[log]
access = "{}"
[[listener]]
name = "load"
bind = "{target}"
trusted-sources = ["127.0.0.0/8"]
{}
[[pool]]
name = "app"
backends = ["{backend}"]
health = {{ kind = "none" }}
{}
{}
"#,
            free(),
            free(),
            dir.join(format!("{name}.log")).display(),
            lines.listener,
            lines.pool,
            lines.rest,
        );
        std::fs::write(&path, text).expect("a configuration");
        let command = [program, "serve", "--config", path.to_str().expect("a path")];
        let version = format!("{name} {}", env!("CARGO_PKG_VERSION"));
        Self::start(name, version, target, backend, &command)
    }

    /// The same, with a load that sends no PROXY header.
    pub(crate) fn without_header(self) -> Self {
        Self { sends_header: false, ..self }
    }

    /// Whether vestibule is compared with it.
    pub(crate) fn is_compared(&self) -> bool {
        self.name != DIRECT && self.name != OURS
    }

    /// CPU seconds used so far; a direct connection has none.
    pub(crate) fn cpu(&self) -> f64 {
        self.process.as_ref().map_or(0.0, Proc::cpu)
    }

    /// Bytes of anonymous memory.
    pub(crate) fn anonymous(&self) -> u64 {
        self.process.as_ref().map_or(0, Proc::anonymous)
    }

    /// Open descriptors, pipes excluded.
    pub(crate) fn descriptors(&self) -> usize {
        self.process.as_ref().map_or(0, |process| process.descriptors().0)
    }

    /// Waits until it has closed its sessions and flows.
    pub(crate) fn wait_until_idle(&self) {
        /// More than any proxy has besides those of sessions and flows.
        const FEW: usize = 200;
        let fault = format!("{} keeps idle sessions or flows open", self.name);
        super::until_after(Duration::from_secs(60), &fault, || self.descriptors() < FEW);
    }

    /// `vestibule load` against it, with the backend in the same process: load and backend share one core, and neither waits
    /// until the scheduler gives the core to another process.
    pub(crate) fn load_command(&self, options: &[&str]) -> Command {
        let mut command = pinned(LOAD_CORE);
        command.args([VESTIBULE, "load", "--json", "--target"]).arg(self.target.to_string());
        command.arg("--serve").arg(format!("app={}", self.backend));
        if self.sends_header {
            command.args(["--endpoints", TENANTS]);
        }
        command.args(["--pools", "app"]).args(options);
        command
    }

    /// The report of that load.
    pub(crate) fn load(&self, options: &[&str]) -> serde_json::Value {
        super::load(self.name, &mut self.load_command(options))
    }
}

/// Calls `one` for each contender, round after round; the first round does not count. Each round begins with another one, and every
/// second round goes backwards: what a contender leaves behind (ports in TIME_WAIT, warm caches) is not always met by the same one.
pub(crate) fn alternate(contenders: &[Contender], rounds: usize, mut one: impl FnMut(&Contender, bool)) {
    for round in 0..=rounds {
        let (last, first) = contenders.split_at(round / 2 % contenders.len());
        let mut order: Vec<_> = first.iter().chain(last).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for contender in order {
            one(contender, round > 0);
        }
    }
}
