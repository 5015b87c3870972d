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
/// Ours.
pub(crate) const OURS: &str = "vestibule";

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

    pub(crate) fn is_peer(&self) -> bool {
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

/// Everybody who is installed.
pub(crate) fn all(dir: &Path, peers: bool) -> Vec<Contender> {
    // Nobody listens there between two loads, and nobody probes it.
    let backend = free();
    let mut all = vec![
        Contender { name: DIRECT, version: DIRECT.to_owned(), target: backend, backend, process: None },
        ours(dir, backend),
    ];
    if !peers {
        return all;
    }
    match version("haproxy", "-v") {
        Some(version) => {
            all.push(haproxy(dir, backend, "haproxy", &version, ""));
            all.push(haproxy(dir, backend, "haproxy-splice", &version, "option splice-auto"));
        }
        None => println!("left out: haproxy is not installed"),
    }
    match version("nginx", "-v") {
        Some(version) if Path::new(STREAM_MODULE).exists() => all.push(nginx(dir, backend, version)),
        _ => println!("left out: nginx with its stream module is not installed"),
    }
    all
}

/// What ours is measured with beside the defaults. Limits go here once they are built: every tenant of the run has
/// these.
const TENANT_DEFAULTS: &str = "";

fn ours(dir: &Path, backend: SocketAddr) -> Contender {
    let target = free();
    let path = dir.join("vestibule.toml");
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
{TENANT_DEFAULTS}
"#,
        free(),
        free(),
        dir.join("access.log").display(),
    );
    std::fs::write(&path, text).expect("a configuration");
    let command = [VESTIBULE, "serve", "--config", path.to_str().expect("a path")];
    Contender::start(OURS, format!("vestibule {}", env!("CARGO_PKG_VERSION")), target, backend, &command)
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

fn nginx(dir: &Path, backend: SocketAddr, version: String) -> Contender {
    let target = free();
    let path = dir.join("nginx.conf");
    let text = format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nmaster_process off;\nworker_rlimit_nofile 20000;\npid {pid};\n\
         error_log {log};\nevents {{ worker_connections 19000; }}\nstream {{ server {{\n  \
         listen {target} proxy_protocol backlog=4096;\n  tcp_nodelay on;\n  proxy_pass {backend};\n}} }}\n",
        pid = dir.join("nginx.pid").display(),
        log = dir.join("nginx.log").display(),
    );
    std::fs::write(&path, text).expect("a configuration");
    Contender::start("nginx", version, target, backend, &["nginx", "-c", path.to_str().expect("a path")])
}
