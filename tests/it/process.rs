//! The program itself: what it prints, how it serves, how it ends.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{
    ACME, GLOBEX, STRANGER, connect, end_of, eventually, exchange, header, http, http_get, is_reset, read,
    scrape, still_lives,
};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vestibule");

/// A configuration file in a folder of its own.
pub struct Written {
    dir: TempDir,
    pub path: PathBuf,
}

impl Written {
    pub fn new(text: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("vestibule.toml");
        std::fs::write(&path, text).unwrap();
        Self { dir, path }
    }

    /// Writes `to` in place of `from`.
    pub fn rewrite(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(&self.path).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(&self.path, text.replace(from, to)).unwrap();
    }

    /// A path beside it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a successor that comes to its end by itself.
    pub fn successor(&self, control: &Path) -> Output {
        program(self).arg("--takeover").arg(control).output().unwrap()
    }

    /// Runs the program to its end.
    pub fn run(&self, command: &str) -> Output {
        Command::new(PROGRAM).arg(command).arg("--config").arg(&self.path).output().unwrap()
    }
}

/// acme's and globex's tables with an echo of each, behind what is said of the process.
pub struct World {
    pub acme: TestBackend,
    pub globex: TestBackend,
}

impl World {
    pub async fn new() -> Self {
        let echo = async |name| TestBackend::start(name, BackendBehavior::Echo).await.unwrap();
        Self { acme: echo("acme-1").await, globex: echo("globex-1").await }
    }

    /// `head` starts in `[process]`.
    pub fn config(&self, head: &str) -> Written {
        let pool = |name, backend: &TestBackend, endpoint| {
            format!(
                "[[pool]]\nname = \"{name}\"\nbackends = [\"{}\"]\n[pool.health]\nkind = \"none\"\n\
                 [[tenant]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\npool = \"{name}\"\n",
                backend.address()
            )
        };
        Written::new(&format!(
            "[process]\nworkers = 2\n{head}\n[admin]\nbind = \"127.0.0.1:0\"\n[health]\nbind = \"127.0.0.1:0\"\n\
             [[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\n{}{}",
            pool("acme", &self.acme, ACME),
            pool("globex", &self.globex, GLOBEX)
        ))
    }
}

/// The lines that come out of a pipe, as they come.
type Lines = Arc<Mutex<Vec<String>>>;

pub fn lines_of(pipe: impl std::io::Read + Send + 'static) -> Lines {
    let lines = Lines::default();
    let to = Arc::clone(&lines);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            to.lock().unwrap().push(line);
        }
    });
    lines
}

fn parsed(lines: &Lines) -> Vec<Value> {
    lines
        .lock()
        .unwrap()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
        .collect()
}

/// `vestibule serve` as a process of its own; it is killed with its handle.
pub struct Serve {
    pub child: Child,
    log: Lines,
    pub out: Lines,
    pub web: SocketAddr,
    pub admin: SocketAddr,
    pub health: SocketAddr,
}

impl Drop for Serve {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

/// `vestibule serve` with this configuration.
pub fn program(config: &Written) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--config").arg(&config.path);
    command
}

impl Serve {
    pub async fn start(config: &Written) -> Self {
        Self::of(program(config)).await
    }

    /// A successor of the process behind this socket.
    pub async fn successor(config: &Written, control: &Path) -> Self {
        let mut command = program(config);
        command.arg("--takeover").arg(control);
        Self::of(command).await
    }

    /// With at most so many descriptors.
    pub async fn limited(config: &Written, descriptors: usize) -> Self {
        Self::limited_softly(config, descriptors, descriptors).await
    }

    /// With at most so many descriptors, which it may raise to so many.
    pub async fn limited_softly(config: &Written, soft: usize, hard: usize) -> Self {
        let mut command = Command::new("sh");
        let script = format!("ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"$0\" serve --config \"$1\"");
        command.arg("-c").arg(script).arg(PROGRAM).arg(&config.path);
        Self::of(command).await
    }

    /// With a standard output that nobody reads yet.
    pub async fn unread(config: &Written) -> (Self, ChildStdout) {
        let mut child = program(config).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = child.stdout.take().unwrap();
        (Self::at_work(child).await, out)
    }

    pub async fn of(mut command: Command) -> Self {
        Self::at_work(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await
    }

    /// Waits until it serves.
    pub async fn at_work(mut child: Child) -> Self {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let log = lines_of(child.stderr.take().unwrap());
        let out = child.stdout.take().map(lines_of).unwrap_or_default();
        let mut serve = Self { child, log, out, web: nowhere, admin: nowhere, health: nowhere };
        let serving = serve.says("serving").await;
        let address =
            |line: &Value, key: &str| line[key].as_str().unwrap().trim_matches(['[', ']']).parse().unwrap();
        serve.admin = address(&serving, "admin");
        serve.health = address(&serving, "health");
        serve.web = address(&serve.says("listening").await, "addresses");
        serve
    }

    /// The process log so far.
    pub fn log(&self) -> Vec<Value> {
        parsed(&self.log)
    }

    /// Waits for a line of the process log whose message starts so.
    pub async fn says(&self, message: &str) -> Value {
        eventually(message, async || {
            let starts =
                |line: &Value| line["message"].as_str().is_some_and(|text| text.starts_with(message));
            self.log().into_iter().find(starts)
        })
        .await
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let child = Mutex::new(&mut self.child);
        eventually("the process to end", async || child.lock().unwrap().try_wait().unwrap()).await
    }

    /// Ends it, by two signals.
    pub async fn end(&mut self) {
        self.signal(Signal::TERM);
        self.says("draining").await;
        self.signal(Signal::TERM);
        assert_eq!(self.ended().await.code(), Some(0));
    }

    /// A connection that has sent a header and this.
    pub async fn open(&self, endpoint: &str, payload: &[u8]) -> TcpStream {
        let mut stream = connect(self.web).await;
        stream.write_all(&[&header(endpoint)[..], payload].concat()).await.unwrap();
        stream
    }

    /// A session that is carried, and lives.
    pub async fn carried(&self) -> TcpStream {
        let mut stream = self.open(ACME, b"live").await;
        assert_eq!(read(&mut stream, 4).await, b"live");
        stream
    }

    /// Both tenants are served.
    pub async fn serves(&self) {
        for endpoint in [ACME, GLOBEX] {
            assert_eq!(exchange(self.open(endpoint, b"payload").await).await.unwrap(), b"payload");
        }
    }

    /// The sum of all series of a metric that have these labels; a panic where none can exist.
    pub async fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        sum(&http_get(self.admin, "/metrics").await, name, labels)
    }

    /// A metric becomes this, soon.
    pub async fn counts(&self, name: &str, labels: &[(&str, &str)], expected: u32) {
        eventually(&format!("{name}{labels:?} to be {expected}"), async || {
            ((self.value(name, labels).await - f64::from(expected)).abs() < 0.5).then_some(())
        })
        .await;
    }

    /// A metric is this already.
    pub async fn has(&self, name: &str, labels: &[(&str, &str)], expected: u32) {
        let value = self.value(name, labels).await;
        assert!((value - f64::from(expected)).abs() < 0.5, "{name}{labels:?}: {value}, not {expected}");
    }

    /// The access log, once it has `count` lines.
    pub async fn sessions(&self, count: usize) -> Vec<Value> {
        eventually("the access log", async || Some(parsed(&self.out)).filter(|lines| lines.len() >= count))
            .await
    }
}

/// What a page says of a metric. Of names it knows those that the page has.
pub fn sum(page: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    scrape::sum(page, name, labels, &scrape::Known::default())
}

pub const DRAIN_NEVER: &str = "[drain]\nnotice = \"300s\"\ndeadline = \"300s\"";

#[test]
fn check_and_serve_report_the_same_errors_and_fail() {
    let faulty =
        Written::new("[process]\nworkers = \"two\"\nmax-session = 3\n[[listener]]\nname = \"web\"\n");
    let (check, serve) = (faulty.run("check"), faulty.run("serve"));
    assert_eq!((check.status.code(), serve.status.code()), (Some(1), Some(1)));
    let said = String::from_utf8(check.stderr).unwrap();
    assert_eq!(said, String::from_utf8(serve.stderr).unwrap());
    assert!(check.stdout.is_empty() && serve.stdout.is_empty());
    let file = faulty.path.display().to_string();
    for fault in
        [":2: process: workers: must be", ":3: process: max-session: ", ":4: listener \"web\": bind: "]
    {
        assert!(
            said.lines().any(|line| line.starts_with(&format!("{file}{fault}"))),
            "{fault} is not in\n{said}"
        );
    }
    let absent = Written { path: faulty.path.with_file_name("absent.toml"), ..faulty };
    let (check, serve) = (absent.run("check"), absent.run("serve"));
    assert_eq!((check.status.code(), serve.status.code()), (Some(1), Some(1)));
    assert_eq!(check.stderr, serve.stderr);
    assert!(String::from_utf8(check.stderr).unwrap().contains("absent.toml: must be readable"));
}

#[tokio::test]
async fn check_prints_the_contents_of_a_valid_configuration() {
    let fine = World::new().await.config("").run("check");
    assert_eq!(fine.status.code(), Some(0));
    let said = String::from_utf8(fine.stdout).unwrap();
    let held = ": OK: 1 listener (1 address), 2 pools (2 backends), 2 tenants (2 endpoints); 0 warnings\n";
    assert!(said.ends_with(held), "{said}");
    assert!(fine.stderr.is_empty());
}

#[tokio::test]
async fn sigterm_drains_and_a_live_session_ends_by_itself() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"4s\"\nquiet = \"100ms\"\nidle = \"300s\"\ndeadline = \"300s\"";
    let mut serve = Serve::start(&world.config(drain)).await;
    let check = async || http(serve.health, "/healthz", b"").await;
    assert!(check().await.0.starts_with("HTTP/1.1 200 "));
    let mut live = serve.carried().await;

    serve.signal(Signal::TERM);
    eventually("the check to fail", async || {
        let (head, body) = check().await;
        (head.starts_with("HTTP/1.1 503 ") && body == "draining\n").then_some(())
    })
    .await;
    serve.serves().await;
    let late = serve.carried().await;
    assert!(serve.log().iter().all(|line| line["message"] != "listeners closed"), "before its time");

    serve.says("listeners closed").await;
    // It is said first and done then; what comes in between is a connection without a byte.
    eventually("a refusal", async || {
        let error = TcpStream::connect(serve.web).await.err()?;
        (error.kind() == std::io::ErrorKind::ConnectionRefused).then_some(())
    })
    .await;
    still_lives(&mut live).await;
    // The pages are there to the end, so that the last session is seen too.
    assert!(http_get(serve.admin, "/metrics").await.contains("\nvestibule_draining 1\n"));
    for session in [live, late] {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    assert_eq!(serve.ended().await.code(), Some(0));
    let log = serve.sessions(4).await;
    assert_eq!(log.len(), 4);
    assert!(log.iter().all(|line| line["outcome"]["why"] == "done"), "{log:?}");
    serve.says("ended").await;
}

#[tokio::test]
async fn second_signal_ends_all_sessions_at_once() {
    let world = World::new().await;
    for signals in [[Signal::TERM, Signal::TERM], [Signal::INT, Signal::TERM], [Signal::TERM, Signal::INT]] {
        let mut serve = Serve::start(&world.config(DRAIN_NEVER)).await;
        let (mut live, mut pending) = (serve.carried().await, connect(serve.web).await);
        serve.signal(signals[0]);
        serve.says("draining").await;
        serve.serves().await;
        serve.signal(signals[1]);
        is_reset(&mut live).await;
        assert_eq!(end_of(&mut pending).await.unwrap(), 0);
        assert_eq!(serve.ended().await.code(), Some(0));
        let log = serve.sessions(4).await;
        let drained = log.iter().filter(|line| line["outcome"]["why"] == "drained");
        assert!(drained.clone().all(|line| line["outcome"]["by"] == "proxy"), "{log:?}");
        let mut at: Vec<_> = drained.map(|line| line["outcome"]["at"].as_str().unwrap()).collect();
        at.sort_unstable();
        assert_eq!((at, log.len()), (vec!["forward", "header"], 4));
    }
}

#[tokio::test]
async fn drain_deadline_resets_remaining_sessions() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"0s\"\nquiet = \"0s\"\nidle = \"300s\"\ndeadline = \"500ms\"";
    let mut serve = Serve::start(&world.config(drain)).await;
    let (mut live, mut pending) = (serve.carried().await, connect(serve.web).await);
    serve.serves().await;
    serve.signal(Signal::TERM);
    is_reset(&mut live).await;
    assert_eq!(end_of(&mut pending).await.unwrap(), 0);
    assert_eq!(serve.ended().await.code(), Some(0));
    let log = serve.sessions(4).await;
    let why = |tenant: &str, why: &str| {
        log.iter().filter(|line| line["tenant"] == tenant && line["outcome"]["why"] == why).count()
    };
    assert_eq!((why("acme", "drained"), why("acme", "done"), why("globex", "done")), (1, 1, 1), "{log:?}");
}

#[tokio::test]
async fn address_in_use_is_reported_and_fails() {
    let world = World::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for (table, what) in
        [("[admin]\n", "admin"), ("[health]\n", "health"), ("name = \"web\"\n", "listener \"web\"")]
    {
        let free = format!("{table}bind = \"127.0.0.1:0\"");
        let config = world.config("");
        let text = std::fs::read_to_string(&config.path).unwrap();
        let text = text.replace(&free, &format!("{table}bind = \"{address}\""));
        let output = Written::new(&text).run("serve");
        assert_eq!(output.status.code(), Some(1), "{what}");
        let said = String::from_utf8(output.stderr).unwrap();
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let message = last["message"].as_str().unwrap();
        assert!(message.starts_with(&format!("{what}: cannot bind {address}: ")), "{message}");
        assert_eq!(last["level"], "ERROR");
    }
}

#[tokio::test]
async fn access_log_on_stdout_is_json_lines_only() {
    let world = World::new().await;
    let mut serve = Serve::start(&world.config(DRAIN_NEVER)).await;
    serve.serves().await;
    is_reset(&mut serve.open(STRANGER, b"").await).await;
    let log = serve.sessions(3).await;
    for line in &log {
        for key in ["time", "session", "listener", "peer", "bytes", "total_ms", "outcome"] {
            assert!(line.get(key).is_some(), "{key} is not in {line}");
        }
    }
    serve.end().await;
    assert_eq!(serve.sessions(3).await.len(), 3);
    assert!(serve.log().iter().all(|line| line.get("outcome").is_none()), "sessions in the process log");
}

#[tokio::test]
async fn unwritable_access_log_does_not_stop_the_process() {
    let world = World::new().await;
    let to_stdout = world.config(DRAIN_NEVER);
    let to_file = world.config(&format!("[log]\naccess = \"/dev/full\"\n{DRAIN_NEVER}"));
    let mut on_stdout = program(&to_stdout);
    on_stdout.stdout(File::options().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
    for mut serve in [Serve::start(&to_file).await, Serve::at_work(on_stdout.spawn().unwrap()).await] {
        serve.serves().await;
        let line = serve.says("cannot write the access log; its lines are lost").await;
        assert_eq!(line["level"], "ERROR");
        for _ in 0..3 {
            serve.serves().await;
        }
        // Four rounds of two sessions, and each line is missed.
        eventually("the lost lines to be counted", async || {
            let page = http_get(serve.admin, "/metrics").await;
            page.contains("\nvestibule_access_log_dropped_total{class=\"session\"} 8\n").then_some(())
        })
        .await;
        serve.end().await;
        let said = serve
            .log()
            .into_iter()
            .filter(|line| line["message"] == "cannot write the access log; its lines are lost")
            .count();
        assert!(said <= 1, "said {said} times");
    }
}
