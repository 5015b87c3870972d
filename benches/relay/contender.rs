//! The contenders over TCP.

use std::net::SocketAddr;
use std::path::Path;

use super::stage::contender::{ConfigLines, Contender, OURS, Other};
use super::stage::{STREAM_MODULE, VESTIBULE, free, ready, version};

/// vestibule without limits: shows what limits cost.
const UNLIMITED: &str = "no limits";
/// nginx that forwards a half-close, as the other contenders do.
const HALF_CLOSING: &str = "nginx half-close";

/// Further contenders.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Further {
    /// vestibule without limits
    Unlimited,
    /// nginx with `proxy_half_close on`
    HalfClosing,
}

/// Every proxy that is installed, and these further ones.
pub(crate) fn all(dir: &Path, peers: bool, further: &[Further], others: &[Other]) -> Vec<Contender> {
    // Between two loads nothing listens there, and it is not probed. Each contender has its own backend address: ports left
    // in TIME_WAIT by one contender's connections would slow down the next contender's `connect`.
    let backend = free();
    let mut all = vec![Contender::direct(backend), ours(dir, OURS, VESTIBULE, LIMITS)];
    if further.contains(&Further::Unlimited) {
        all.push(ours(dir, UNLIMITED, VESTIBULE, ""));
    }
    all.extend(others.iter().map(|other| ours(dir, other.name, &other.program, LIMITS)));
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
            if further.contains(&Further::HalfClosing) {
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

fn ours(dir: &Path, name: &'static str, program: &str, limits: &str) -> Contender {
    started(Contender::ours(dir, name, program, &ConfigLines { rest: limits, ..ConfigLines::default() }))
}

fn started(contender: Contender) -> Contender {
    ready(contender.target);
    contender
}

fn haproxy(dir: &Path, backend: SocketAddr, name: &'static str, version: &str, option: &str) -> Contender {
    let target = free();
    let path = dir.join(format!("{name}.cfg"));
    let text = format!(
        "global\n  nbthread 1\n  maxconn 7000\n  maxpipes 500\ndefaults\n  mode tcp\n  {option}\n  timeout connect 3s\n  \
         timeout client 350s\n  timeout server 350s\nlisten web\n  bind {target} accept-proxy\n  server app {backend}\n"
    );
    std::fs::write(&path, text).expect("a configuration");
    let command = ["haproxy", "-db", "-f", path.to_str().expect("a path")];
    started(Contender::start(name, version.to_owned(), target, backend, &command))
}

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
    let command = ["nginx", "-c", path.to_str().expect("a path")];
    started(Contender::start(name, version, target, backend, &command))
}
