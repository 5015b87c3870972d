//! Who is measured: each as a child process, pinned to the proxy's core.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use super::stage::{LOAD_CORE, PROXY_CORE, Proc, VESTIBULE, free, pinned, ready, version};

/// One who is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) version: String,
    target: SocketAddr,
    /// Where the load has to serve the backend.
    backend: SocketAddr,
    process: Option<Proc>,
}

/// The load's connection to the backend without anybody between.
pub(crate) const DIRECT: &str = "direct";
/// Ours, with every limit on.
pub(crate) const OURS: &str = "vestibule";
/// Ours without limits: what they cost.
const UNLIMITED: &str = "no limits";
/// nginx that passes a half-close on, as everybody else here does.
const HALF_CLOSING: &str = "nginx half-close";

/// Who else may be measured.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Also {
    /// Ours without limits
    Unlimited,
    /// nginx with `proxy_half_close on`
    HalfClosing,
}

/// Another build of ours, to see what a change does.
#[derive(Clone)]
pub(crate) struct Other {
    name: &'static str,
    program: String,
}

impl std::str::FromStr for Other {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, program) = text.split_once('=').ok_or("NAME=PATH is meant")?;
        Ok(Self { name: name.to_owned().leak(), program: program.to_owned() })
    }
}

/// `vestibule load` against one of them, with the backend in the same process: on the one core that is left to both,
/// nobody's work then waits for the other process's turn.
pub(crate) fn load_command(contender: &Contender, options: &[&str]) -> Command {
    let mut command = pinned(LOAD_CORE);
    command.args([VESTIBULE, "load", "--json", "--target"]).arg(contender.target.to_string());
    command.arg("--serve").arg(format!("app={}", contender.backend));
    if contender.name != DIRECT {
        command.args(["--endpoints", super::TENANTS]);
    }
    command.args(["--pools", "app"]).args(options);
    command
}

/// Whether it is somebody else's proxy.
pub(crate) fn is_peer(name: &str) -> bool {
    name.starts_with("haproxy") || name.starts_with("nginx")
}

impl Contender {
    fn start(
        name: &'static str,
        version: String,
        target: SocketAddr,
        backend: SocketAddr,
        command: &[&str],
    ) -> Self {
        let mut pinned = pinned(PROXY_CORE);
        pinned.args(command);
        let process = Proc::start(&pinned);
        ready(target);
        Self { name, version, target, backend, process: Some(process) }
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
}

/// Everybody who is installed, and `also` these.
pub(crate) fn all(dir: &Path, peers: bool, also: &[Also], others: &[Other]) -> Vec<Contender> {
    // Nobody listens there between two loads, and nobody probes it. Each has one of its own: the ports that one's closed
    // connections leave in TIME_WAIT are those that the next one's `connect` would have to search through.
    let backend = free();
    let mut all = vec![
        Contender { name: DIRECT, version: DIRECT.to_owned(), target: backend, backend, process: None },
        ours(dir, free(), OURS, VESTIBULE, LIMITS),
    ];
    if also.contains(&Also::Unlimited) {
        all.push(ours(dir, free(), UNLIMITED, VESTIBULE, ""));
    }
    all.extend(others.iter().map(|other| ours(dir, free(), other.name, &other.program, LIMITS)));
    if !peers {
        return all;
    }
    match version("haproxy", "-v") {
        Some(version) => {
            all.push(haproxy(dir, free(), "haproxy", &version, ""));
            all.push(haproxy(dir, free(), "haproxy-splice", &version, "option splice-auto"));
        }
        None => println!("left out: haproxy is not installed"),
    }
    match version("nginx", "-v") {
        Some(version) if Path::new(STREAM_MODULE).exists() => {
            if also.contains(&Also::HalfClosing) {
                all.push(nginx(dir, free(), HALF_CLOSING, version.clone(), "proxy_half_close on;"));
            }
            all.push(nginx(dir, free(), "nginx", version, ""));
        }
        _ => println!("left out: nginx with its stream module is not installed"),
    }
    all
}

/// The limits of every tenant: all of them are on, and none is ever reached.
const LIMITS: &str = r#"
[tenant-defaults.limits]
sessions = 100000
session-rate = "1000000/s"
to-backend = "100GiB/s"
to-client = "100GiB/s"
"#;

fn ours(dir: &Path, backend: SocketAddr, name: &'static str, program: &str, limits: &str) -> Contender {
    let target = free();
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
name = "web"
bind = "{target}"
trusted-sources = ["127.0.0.0/8"]
[[pool]]
name = "app"
backends = ["{backend}"]
health = {{ kind = "none" }}
{limits}
"#,
        free(),
        free(),
        dir.join(format!("{name}.log")).display(),
    );
    std::fs::write(&path, text).expect("a configuration");
    let command = [program, "serve", "--config", path.to_str().expect("a path")];
    let version = format!("{name} {}", env!("CARGO_PKG_VERSION"));
    Contender::start(name, version, target, backend, &command)
}

fn haproxy(dir: &Path, backend: SocketAddr, name: &'static str, version: &str, option: &str) -> Contender {
    let target = free();
    let path = dir.join(format!("{name}.cfg"));
    let text = format!(
        "global\n  nbthread 1\n  maxconn 7000\n  maxpipes 500\ndefaults\n  mode tcp\n  {option}\n  timeout connect 3s\n  \
         timeout client 350s\n  timeout server 350s\nlisten web\n  bind {target} accept-proxy\n  server app {backend}\n"
    );
    std::fs::write(&path, text).expect("a configuration");
    Contender::start(
        name,
        version.to_owned(),
        target,
        backend,
        &["haproxy", "-db", "-f", path.to_str().expect("a path")],
    )
}

/// Where Debian puts it.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

fn nginx(
    dir: &Path,
    backend: SocketAddr,
    name: &'static str,
    version: String,
    directives: &str,
) -> Contender {
    let target = free();
    let path = dir.join(format!("{name}.conf"));
    let text = format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nmaster_process off;\nworker_rlimit_nofile 20000;\npid \"{pid}\";\n\
         error_log \"{log}\";\nevents {{ worker_connections 19000; }}\nstream {{ server {{\n  \
         listen {target} proxy_protocol backlog=4096;\n  tcp_nodelay on;\n  {directives}\n  proxy_pass {backend};\n}} }}\n",
        pid = dir.join(format!("{name}.pid")).display(),
        log = dir.join(format!("{name}.log")).display(),
    );
    std::fs::write(&path, text).expect("a configuration");
    Contender::start(name, version, target, backend, &["nginx", "-c", path.to_str().expect("a path")])
}
