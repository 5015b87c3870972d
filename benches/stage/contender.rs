//! Who is measured: each as a child process, pinned to the proxy's core; and in which order.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{LOAD_CORE, PROXY_CORE, Proc, VESTIBULE, free, pinned};

/// The endpoints that the load plays, each a tenant.
pub(crate) const TENANTS: &str = "1000";

/// One who is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) version: String,
    pub(crate) target: SocketAddr,
    /// Where the load has to serve the backend.
    backend: SocketAddr,
    /// Whether it wants a header, and knows endpoints.
    hears_endpoints: bool,
    process: Option<Proc>,
}

/// The load's connection to the backend without anybody between.
pub(crate) const DIRECT: &str = "direct";
/// Ours, with every limit on.
pub(crate) const OURS: &str = "vestibule";

/// Another build of ours, to see what a change does.
#[derive(Clone)]
pub(crate) struct Other {
    pub(crate) name: &'static str,
    pub(crate) program: String,
}

impl std::str::FromStr for Other {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, program) = text.split_once('=').ok_or("NAME=PATH is meant")?;
        Ok(Self { name: name.to_owned().leak(), program: program.to_owned() })
    }
}

/// What is added to the configuration of ours: to its listener, to its pool, and behind them.
#[derive(Clone, Copy, Default)]
pub(crate) struct How<'a> {
    pub(crate) listener: &'a str,
    pub(crate) pool: &'a str,
    pub(crate) rest: &'a str,
}

/// Whether it is somebody else's proxy.
pub(crate) fn is_peer(name: &str) -> bool {
    name.starts_with("haproxy") || name.starts_with("nginx")
}

impl Contender {
    /// Nobody: the load's connection to this backend.
    pub(crate) fn direct(backend: SocketAddr) -> Self {
        let version = DIRECT.to_owned();
        Self { name: DIRECT, version, target: backend, backend, hears_endpoints: false, process: None }
    }

    /// Starts it on the proxy's core; it may not be ready yet.
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
        Self { name, version, target, backend, hears_endpoints: true, process }
    }

    /// Ours, with one listener and one pool.
    pub(crate) fn ours(dir: &Path, name: &'static str, program: &str, how: &How<'_>) -> Self {
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
            how.listener,
            how.pool,
            how.rest,
        );
        std::fs::write(&path, text).expect("a configuration");
        let command = [program, "serve", "--config", path.to_str().expect("a path")];
        let version = format!("{name} {}", env!("CARGO_PKG_VERSION"));
        Self::start(name, version, target, backend, &command)
    }

    /// It knows no headers.
    pub(crate) fn without_header(self) -> Self {
        Self { hears_endpoints: false, ..self }
    }

    /// Whether ours is compared with it.
    pub(crate) fn is_compared(&self) -> bool {
        self.name != DIRECT && self.name != OURS
    }

    /// CPU seconds so far; a direct connection has none.
    pub(crate) fn cpu(&self) -> f64 {
        self.process.as_ref().map_or(0.0, Proc::cpu)
    }

    /// Bytes of anonymous memory.
    pub(crate) fn anonymous(&self) -> u64 {
        self.process.as_ref().map_or(0, Proc::anonymous)
    }

    /// Its descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        self.process.as_ref().map_or(0, |process| process.descriptors().0)
    }

    /// Waits until it has let go of its sessions and flows.
    pub(crate) fn rest(&self) {
        /// More than any has beside them.
        const FEW: usize = 200;
        let fault = format!("{} holds on to what is idle", self.name);
        super::until_after(Duration::from_secs(60), &fault, || self.descriptors() < FEW);
    }

    /// `vestibule load` against it, with the backend in the same process: on the one core that is left to both, nobody's
    /// work then waits for the other process's turn.
    pub(crate) fn load_command(&self, options: &[&str]) -> Command {
        let mut command = pinned(LOAD_CORE);
        command.args([VESTIBULE, "load", "--json", "--target"]).arg(self.target.to_string());
        command.arg("--serve").arg(format!("app={}", self.backend));
        if self.hears_endpoints {
            command.args(["--endpoints", TENANTS]);
        }
        command.args(["--pools", "app"]).args(options);
        command
    }

    /// What that load tells.
    pub(crate) fn load(&self, options: &[&str]) -> serde_json::Value {
        super::load(self.name, &mut self.load_command(options))
    }
}

/// Calls `one` for everybody, round after round; the first round does not count. Each round begins with another one:
/// who comes after whom is a part of what is measured.
pub(crate) fn alternate(contenders: &[Contender], rounds: usize, mut one: impl FnMut(&Contender, bool)) {
    for round in 0..=rounds {
        let (last, first) = contenders.split_at(round % contenders.len());
        for contender in first.iter().chain(last) {
            one(contender, round > 0);
        }
    }
}
