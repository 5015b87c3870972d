//! Who is measured: each as a child process, pinned to the proxy's core.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use super::process::{Proc, VESTIBULE, free, ready};

/// The backend of all of them.
pub(crate) struct Backend {
    address: SocketAddr,
    _process: Proc,
}

impl Backend {
    pub(crate) fn start() -> Self {
        let address = free();
        let mut command = pinned(LOAD_CORE);
        command.args([VESTIBULE, "backend", "--listen"]).arg(format!("app={address}"));
        let process = Proc::start(&command);
        ready(address);
        Self { address, _process: process }
    }
}

/// One who is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) version: String,
    target: SocketAddr,
    process: Option<Proc>,
}

/// The core of the proxy, and that of everything else.
const PROXY_CORE: &str = "0";
const LOAD_CORE: &str = "1";

fn pinned(core: &str) -> Command {
    let mut command = Command::new("taskset");
    // On a machine with one core everything shares it.
    let core =
        if std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) { core } else { "0" };
    command.args(["-c", core]);
    command
}

/// `vestibule load` against one of them.
pub(crate) fn load_command(contender: &Contender, options: &[&str]) -> Command {
    let mut command = pinned(LOAD_CORE);
    command.args([VESTIBULE, "load", "--json", "--target"]).arg(contender.target.to_string());
    if contender.name != "direct" {
        command.args(["--endpoints", super::TENANTS]);
    }
    command.args(["--pools", "app"]).args(options);
    command
}

impl Contender {
    fn start(name: &'static str, version: String, target: SocketAddr, command: &[&str]) -> Self {
        let mut pinned = pinned(PROXY_CORE);
        pinned.args(command);
        let process = Proc::start(&pinned);
        ready(target);
        Self { name, version, target, process: Some(process) }
    }

    /// CPU microseconds so far, of all threads: fields 14 and 15 of /proc/PID/stat (proc(5)).
    pub(crate) fn cpu(&self) -> f64 {
        let Some(process) = &self.process else { return 0.0 };
        // taskset becomes the program that it starts, and keeps its number.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.0.id())).expect("the process");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().filter_map(|field| field.parse::<f64>().ok()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a hundred ticks a second")]
        let second = rustix::param::clock_ticks_per_second() as f64;
        ticks / second
    }

    /// Bytes of anonymous memory.
    pub(crate) fn anonymous(&self) -> u64 {
        let Some(process) = &self.process else { return 0 };
        let rollup =
            std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.0.id())).expect("the process");
        let line = rollup.lines().find(|line| line.starts_with("Anonymous:")).expect("its anonymous memory");
        let kibibytes = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
        kibibytes.expect("a number") * 1024
    }
}

/// Everybody who is installed.
pub(crate) fn all(dir: &Path, backend: &Backend, peers: bool) -> Vec<Contender> {
    let mut all = vec![
        Contender { name: "direct", version: "direct".to_owned(), target: backend.address, process: None },
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

fn version(program: &str, option: &str) -> Option<String> {
    let output = Command::new(program).arg(option).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).lines().next()?.trim().to_owned())
}

fn ours(dir: &Path, backend: &Backend) -> Contender {
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
backends = ["{}"]
"#,
        free(),
        free(),
        dir.join("access.log").display(),
        backend.address,
    );
    std::fs::write(&path, text).expect("a configuration");
    let command = [VESTIBULE, "serve", "--config", path.to_str().expect("a path")];
    Contender::start("vestibule", format!("vestibule {}", env!("CARGO_PKG_VERSION")), target, &command)
}

fn haproxy(dir: &Path, backend: &Backend, name: &'static str, version: &str, option: &str) -> Contender {
    let target = free();
    let path = dir.join(format!("{name}.cfg"));
    let text = format!(
        "global\n  nbthread 1\n  maxconn 7000\n  maxpipes 500\ndefaults\n  mode tcp\n  {option}\n  timeout connect 3s\n  \
         timeout client 350s\n  timeout server 350s\nlisten web\n  bind {target} accept-proxy\n  server app {}\n",
        backend.address
    );
    std::fs::write(&path, text).expect("a configuration");
    Contender::start(
        name,
        version.to_owned(),
        target,
        &["haproxy", "-db", "-f", path.to_str().expect("a path")],
    )
}

/// Where Debian puts it.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

fn nginx(dir: &Path, backend: &Backend, version: String) -> Contender {
    let target = free();
    let path = dir.join("nginx.conf");
    let text = format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nmaster_process off;\nworker_rlimit_nofile 20000;\npid {pid};\n\
         error_log {log};\nevents {{ worker_connections 19000; }}\nstream {{ server {{\n  \
         listen {target} proxy_protocol backlog=4096;\n  tcp_nodelay on;\n  proxy_pass {};\n}} }}\n",
        backend.address,
        pid = dir.join("nginx.pid").display(),
        log = dir.join("nginx.log").display(),
    );
    std::fs::write(&path, text).expect("a configuration");
    Contender::start("nginx", version, target, &["nginx", "-c", path.to_str().expect("a path")])
}
