//! Shared by the benches with child processes: starting them, and reading their figures from /proc.
#![allow(dead_code, reason = "no bench needs all of it")]

pub(crate) mod contender;
pub(crate) mod table;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// The binary under measurement, built with this bench's profile.
pub(crate) const VESTIBULE: &str = env!("CARGO_BIN_EXE_vestibule");

/// The core of the proxy, and that of everything else.
pub(crate) const PROXY_CORE: &str = "0";
pub(crate) const LOAD_CORE: &str = "1";

/// nginx's stream module, at its path in Debian.
pub(crate) const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// A child process that ends with its handle.
pub(crate) struct Proc(pub(crate) Child);

impl Proc {
    pub(crate) fn start(command: &Command) -> Self {
        let mut again = Command::new(command.get_program());
        again.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(again.spawn().expect("a child process"))
    }

    pub(crate) fn wait(&mut self) {
        let status = self.0.wait().expect("the child's end");
        assert!(status.success(), "{status}");
    }

    fn proc(&self, file: &str) -> String {
        // taskset becomes the program that it starts, and keeps its number.
        std::fs::read_to_string(format!("/proc/{}/{file}", self.0.id())).expect("the process")
    }

    /// CPU seconds so far, of all threads: fields 14 and 15 of /proc/PID/stat (proc(5)).
    pub(crate) fn cpu(&self) -> f64 {
        let stat = self.proc("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().filter_map(|field| field.parse::<f64>().ok()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a hundred ticks a second")]
        let second = rustix::param::clock_ticks_per_second() as f64;
        ticks / second
    }

    /// Bytes of anonymous memory.
    pub(crate) fn anonymous(&self) -> u64 {
        bytes(&self.proc("smaps_rollup"), "Anonymous:")
    }

    /// Bytes of resident memory, the program's own text included.
    pub(crate) fn resident(&self) -> u64 {
        bytes(&self.proc("status"), "VmRSS:")
    }

    /// Open descriptors: those that are not pipes, and pipes.
    pub(crate) fn descriptors(&self) -> (usize, usize) {
        let links = std::fs::read_dir(format!("/proc/{}/fd", self.0.id())).expect("its descriptors");
        let links: Vec<_> =
            links.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
        let pipes = links.iter().filter(|link| link.to_string_lossy().starts_with("pipe:")).count();
        (links.len() - pipes, pipes)
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().unwrap_or_default();
        self.0.wait().map(|_| ()).unwrap_or_default();
    }
}

/// The value of a line of /proc that counts in kB.
fn bytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).expect("a line of /proc");
    let kibibytes = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
    kibibytes.expect("a number") * 1024
}

/// A command on one core; on a machine with one core everything shares it.
pub(crate) fn pinned(core: &str) -> Command {
    let mut command = Command::new("taskset");
    let core =
        if std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) { core } else { "0" };
    command.args(["-c", core]);
    command
}

/// A free address outside the kernel's range of local ports: some addresses are bound only later, and a load has used
/// every port of that range by then.
pub(crate) fn free() -> SocketAddr {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let lowest = range.split_whitespace().next().and_then(|port| port.parse().ok()).unwrap_or(32_768_u16);
    let mut addresses =
        (0..1_000).map(|_| SocketAddr::from(([127, 0, 0, 1], fastrand::u16(10_000..lowest.max(10_001)))));
    addresses
        .find(|address| TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok())
        .expect("a free port")
}

/// Waits until connections to the address are accepted.
pub(crate) fn ready(address: SocketAddr) {
    until(&format!("no process listens on {address}"), || TcpStream::connect(address).is_ok());
}

/// Waits until a UDP socket is bound to the address, according to /proc/net/udp.
pub(crate) fn bound(address: SocketAddr) {
    let port = format!(":{:04X} ", address.port());
    until(&format!("no UDP socket is bound to {address}"), || {
        std::fs::read_to_string("/proc/net/udp").is_ok_and(|table| table.contains(&port))
    });
}

/// Checks the condition a hundred times a second, for at most five seconds.
pub(crate) fn until(fault: &str, is_met: impl FnMut() -> bool) {
    until_after(Duration::from_secs(5), fault, is_met);
}

/// The same for at most `longest`.
pub(crate) fn until_after(longest: Duration, fault: &str, mut is_met: impl FnMut() -> bool) {
    for _ in 0..longest.as_millis() / 10 {
        if is_met() {
            return;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    panic!("{fault}");
}

/// The first line of a program's version message; `None` if it is not installed.
pub(crate) fn version(program: &str, option: &str) -> Option<String> {
    let output = Command::new(program).arg(option).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).lines().next()?.trim().to_owned())
}

pub(crate) fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
}

/// The report of `vestibule load --json`. No session may be misrouted, and none may fail.
pub(crate) fn load(name: &str, command: &mut Command) -> Value {
    let output = command.output().expect("the load generator");
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{name}: {error}: {said}"));
    assert_eq!(report["misrouted"], 0, "{name}: {report}");
    assert_eq!(report["failed"].as_object().map_or(0, serde_json::Map::len), 0, "{name}: {report}");
    report
}

pub(crate) fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"))
}

/// Writes tenants for `count` generated endpoints, which use these pools in turn.
pub(crate) fn write_tenants(count: &str, pools: &str, path: &Path) {
    let written = Command::new(VESTIBULE)
        .args(["load", "--target", "127.0.0.1:1", "--endpoints", count, "--pools", pools, "--write-tenants"])
        .arg(path)
        .stderr(Stdio::null())
        .status();
    assert!(written.is_ok_and(|status| status.success()), "tenants for the directory");
}

/// The lines of /metrics, without comments: each a name with its labels, and a value.
pub(crate) fn scrape(admin: SocketAddr) -> Vec<(String, f64)> {
    let mut stream = TcpStream::connect(admin).expect("the admin address");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .expect("a request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("the metrics");
    let lines = text.lines().filter(|line| line.starts_with("vestibule_"));
    let lines = lines.filter_map(|line| line.rsplit_once(' '));
    lines.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

/// Writes target/NAME.json.
pub(crate) fn write_json(name: &str, value: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(format!("{name}.json"));
    // The build may have its folder elsewhere.
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("target/");
    std::fs::write(&path, format!("{value:#}\n")).expect("a file under target/");
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
