//! The contenders over UDP. HAProxy forwards no UDP; Envoy has no Debian package.

use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

use super::stage::contender::{ConfigLines, Contender, OURS, Other};
use super::stage::{STREAM_MODULE, VESTIBULE, bound, free, version};

/// A source address on loopback for each proxy: one address has too few ports for the flows of all.
fn source() -> String {
    static COUNT: AtomicU8 = AtomicU8::new(2);
    format!("127.0.0.{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The idle timeout of flows.
const IDLE: &str = "10s";

/// The limits of every tenant: all of them are on, and none is ever reached.
const LIMITS: &str = r#"
[tenant-defaults.limits]
flows = 100000
datagram-rate = "1000000/s"
to-backend = "100GiB/s"
to-client = "100GiB/s"
"#;

/// Every proxy that is installed, and these builds of vestibule.
pub(crate) fn all(dir: &Path, peers: bool, others: &[Other]) -> Vec<Contender> {
    let mut all = vec![Contender::direct(free()), ours(dir, OURS, VESTIBULE)];
    all.extend(others.iter().map(|other| ours(dir, other.name, &other.program)));
    match version("nginx", "-v").filter(|_| peers) {
        Some(version) if Path::new(STREAM_MODULE).exists() => all.push(nginx(dir, version)),
        Some(_) => println!("left out: nginx has no stream module"),
        None if peers => println!("left out: nginx is not installed"),
        None => {}
    }
    all
}

fn ours(dir: &Path, name: &'static str, program: &str) -> Contender {
    let pool = format!("source-addresses = [\"{}\"]", source());
    let rest = format!("[timeouts]\nflow-idle = \"{IDLE}\"\n{LIMITS}");
    let ours = Contender::ours(
        dir,
        name,
        program,
        &ConfigLines { listener: "protocol = \"udp\"", pool: &pool, rest: &rest },
    );
    bound(ours.target);
    ours
}

fn nginx(dir: &Path, version: String) -> Contender {
    let (target, backend) = (free(), free());
    let path = dir.join("nginx.conf");
    let text = format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nmaster_process off;\nworker_rlimit_nofile 20000;\npid \"{pid}\";\n\
         error_log \"{log}\";\nevents {{ worker_connections 40000; }}\nstream {{ server {{\n  \
         listen {target} udp rcvbuf=4m;\n  proxy_timeout {IDLE};\n  proxy_bind {source};\n  proxy_pass {backend};\n}} }}\n",
        pid = dir.join("nginx.pid").display(),
        log = dir.join("nginx.log").display(),
        source = source(),
    );
    std::fs::write(&path, text).expect("a configuration");
    let command = ["nginx", "-c", path.to_str().expect("a path")];
    let nginx = Contender::start("nginx", version, target, backend, &command).without_header();
    bound(target);
    nginx
}
