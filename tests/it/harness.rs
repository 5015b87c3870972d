//! The bench that every test stands on: a proxy on ports of its own, two tenants, and questions about metrics.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use vestibule::config::Config;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;
use vestibule::server::{ReloadError, Server, StartError};
use vestibule::state::ConfigChanges;

#[path = "began.rs"]
mod began;
#[path = "http.rs"]
mod page;
#[path = "scrape.rs"]
pub mod scrape;

#[allow(unused_imports, reason = "the tests of faults tell no time")]
pub use self::began::Began;
pub use self::page::{http, http_get};

/// The tenant that a test is about, and its endpoint.
pub const ACME: &str = "vpce-0acce0000acce0000";
/// The bystander.
pub const GLOBEX: &str = "vpce-0910be00910be0000";
/// An endpoint that no tenant lists.
pub const STRANGER: &str = "vpce-0bad0bad0bad0bad0";
/// A disabled tenant's endpoint.
pub const INITECH: &str = "vpce-01717ec401717ec40";

/// A test that waits for an event in vain ends by this. It only stops a hang: no test may depend on how long anything takes.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A configuration with what most tests leave alone. Every field is TOML.
pub struct Conf {
    /// Backends of acme's pool.
    pub acme: Vec<SocketAddr>,
    /// More of them: a TOML value each, a text or a table.
    pub backends: Vec<String>,
    /// Worker threads.
    pub workers: usize,
    /// More keys of `[process]`.
    pub process: String,
    /// Keys of `[timeouts]`.
    pub timeouts: String,
    /// Keys of `[drain]`.
    pub drain: String,
    /// The listener `web`'s keys: by default those of a loopback listener with two families.
    pub listener: String,
    /// More keys of acme's pool.
    pub pool: String,
    /// More keys of `[health]`.
    pub check: String,
    /// `[pool.health]` of acme's pool.
    pub health: String,
    /// `[pool.health]` of globex's pool.
    pub globex_health: String,
    /// Keys of acme's `[tenant.limits]`.
    pub limits: String,
    /// More tables at the end.
    pub more: String,
}

impl Default for Conf {
    fn default() -> Self {
        Self {
            acme: Vec::new(),
            backends: Vec::new(),
            workers: 2,
            process: String::new(),
            timeouts: String::new(),
            drain: String::new(),
            listener: r#"bind = "127.0.0.1:0"
                trusted-sources = ["127.0.0.0/8"]"#
                .to_owned(),
            pool: String::new(),
            check: String::new(),
            health: "kind = \"none\"".to_owned(),
            globex_health: "kind = \"none\"".to_owned(),
            limits: String::new(),
            more: String::new(),
        }
    }
}

impl Conf {
    fn text(&self, globex: SocketAddr, log: &str) -> String {
        let acme = self.acme.iter().map(|address| format!("\"{address}\""));
        let acme: Vec<_> = acme.chain(self.backends.iter().cloned()).collect();
        format!(
            r#"
[process]
workers = {workers}
{process}
[admin]
bind = "127.0.0.1:0"
[health]
bind = "127.0.0.1:0"
{check}
[log]
access = "{log}"
[timeouts]
{timeouts}
[drain]
{drain}
[[listener]]
name = "web"
{listener}
[[pool]]
name = "acme"
backends = [{acme}]
{pool}
[pool.health]
{health}
[[pool]]
name = "globex"
backends = ["{globex}"]
[pool.health]
{globex_health}
[[tenant]]
name = "acme"
endpoints = ["{ACME}"]
pool = "acme"
labels = {{ plan = "gold" }}
[tenant.limits]
{limits}
[[tenant]]
name = "globex"
endpoints = ["{GLOBEX}"]
pool = "globex"
[[tenant]]
name = "initech"
endpoints = ["{INITECH}"]
pool = "globex"
state = "disabled"
{more}
"#,
            workers = self.workers,
            process = self.process,
            timeouts = self.timeouts,
            drain = self.drain,
            listener = self.listener,
            acme = acme.join(", "),
            pool = self.pool,
            check = self.check,
            health = self.health,
            globex_health = self.globex_health,
            limits = self.limits,
            more = self.more,
        )
    }

    /// Starts the proxy and globex's backend.
    pub async fn start(self) -> Proxy {
        self.try_start().await.unwrap()
    }

    /// Starts the proxy and globex's backend, or says why not.
    pub async fn try_start(self) -> Result<Proxy, StartError> {
        let dir = TempDir::new().unwrap();
        let log = dir.path().join("access.log");
        let globex = TestBackend::start("globex-1", BackendBehavior::Echo).await.unwrap();
        let text = self.text(globex.address(), log.to_str().unwrap());
        let config = Config::parse("test.toml", &text).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        let (server, known) = (Some(Server::start(&config)?), Mutex::default());
        Ok(Proxy { server, text, dir, known, _globex: globex })
    }
}

/// A proxy under test.
pub struct Proxy {
    server: Option<Server>,
    /// Its configuration.
    text: String,
    dir: TempDir,
    /// Every name that it has had.
    known: Mutex<scrape::Known>,
    _globex: TestBackend,
}

impl Proxy {
    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// Puts another configuration in force: the present one with `to` in place of `from`.
    pub fn reload(&mut self, from: &str, to: &str) -> Result<ConfigChanges, ReloadError> {
        self.reload_all(&[(from, to)])
    }

    /// The same with several changes at once.
    pub fn reload_all(&mut self, changes: &[(&str, &str)]) -> Result<ConfigChanges, ReloadError> {
        let mut text = self.text.clone();
        for (from, to) in changes {
            assert_eq!(text.matches(from).count(), 1, "{from}\n{text}");
            text = text.replace(from, to);
        }
        let config = Config::parse("test.toml", &text).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        self.known.lock().unwrap().live(self.server().live());
        let changes = self.server().reload(&Arc::new(config))?;
        self.text = text;
        Ok(changes)
    }

    /// The first address of a listener.
    pub fn address(&self, listener: &str) -> SocketAddr {
        self.server().addresses(listener)[0]
    }

    /// A connection to the listener `web` on which nothing has been sent yet.
    pub async fn connect(&self) -> TcpStream {
        connect(self.address("web")).await
    }

    /// A connection that has sent its header, and with it `payload`.
    pub async fn open(&self, endpoint: &str, payload: &[u8]) -> TcpStream {
        self.send(&[&header(endpoint)[..], payload].concat()).await
    }

    /// A connection that has sent these bytes.
    pub async fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// The sum of all series of a metric that have these labels; a panic where none can exist.
    pub async fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let page = http_get(self.server().admin(), "/metrics").await;
        let mut known = self.known.lock().unwrap();
        known.live(self.server().live());
        scrape::sum(&page, name, labels, &known)
    }

    /// The ends that were counted, for the message of a test that fails.
    pub async fn ends(&self) -> Vec<String> {
        let page = http_get(self.server().admin(), "/metrics").await;
        let is_one =
            |line: &&str| line.starts_with("vestibule_sessions_ended_total{") && !line.ends_with(" 0");
        page.lines().filter(is_one).map(str::to_owned).collect()
    }

    /// A backend that DNS leads to later, or led to once: its series may have no row.
    pub fn knows(&self, backend: SocketAddr) {
        self.known.lock().unwrap().backend(backend);
    }

    /// A question about a metric: `proxy.metric("vestibule_…", &[("tenant", "acme")]).is(1).await`.
    pub fn metric<'a>(&'a self, name: &'a str, labels: &'a [(&'a str, &'a str)]) -> Metric<'a> {
        Metric { proxy: self, name, labels }
    }

    /// How many sessions ended for this reason.
    pub fn ended<'a>(&'a self, labels: &'a [(&'a str, &'a str)]) -> Metric<'a> {
        self.metric("vestibule_sessions_ended_total", labels)
    }

    /// The access log so far.
    pub fn log(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for the log's line of a session that ended for this reason.
    pub async fn logged(&self, why: &str) -> Value {
        eventually(&format!("a log line with why = {why}"), async || {
            self.log().into_iter().find(|line| line["outcome"]["why"] == why)
        })
        .await
    }

    /// Another tenant is served as if nothing had happened.
    pub async fn others_are_unharmed(&self) {
        let answer = exchange(self.open(GLOBEX, b"unharmed").await).await.unwrap();
        assert_eq!(answer, b"unharmed");
    }

    /// Everything that was taken has been given back: all gauges are zero. Then the proxy ends.
    pub async fn finish(self) {
        self.finish_with_log().await;
    }

    /// [`finish`](Self::finish); then the whole access log, to which nothing is added any more.
    pub async fn finish_with_log(mut self) -> Vec<Value> {
        for gauge in [
            "vestibule_sessions_active",
            "vestibule_sessions_pending",
            "vestibule_backend_sessions_active",
            "vestibule_worker_sessions_active",
            "vestibule_pipes_in_use",
            "vestibule_buffer_memory_bytes",
            "vestibule_pool_sessions_queued",
        ] {
            self.metric(gauge, &[]).is(0).await;
        }
        let live = self.server().live();
        assert_eq!((live.sessions.used(), live.quotas.holders()), (0, 0), "a permit leaked");
        for tenant in live.snapshot.load().directory.tenants() {
            let held = (tenant.quota.sessions(), tenant.quota.pipes.load(Ordering::SeqCst));
            assert_eq!(held, (0, 0), "{} holds sessions or pipes", tenant.label.name());
        }
        let udp_ports = live.udp_ports.usage();
        assert!(udp_ports.iter().all(|usage| usage.live == 0), "a local port leaked: {udp_ports:?}");
        for pool in &live.snapshot.load().pools {
            assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
        }
        let accepted = self.value("vestibule_connections_accepted_total", &[]).await;
        let ended = self.value("vestibule_sessions_ended_total", &[]).await;
        let taken_over = self.value("vestibule_sessions_taken_over_total", &[]).await;
        let began = accepted + taken_over;
        assert!((began - ended).abs() < 0.5, "{accepted} accepted, {taken_over} taken over, {ended} ended");
        self.end().await;
        self.log()
    }

    /// Ends the proxy, whatever it is doing.
    pub async fn end(&mut self) {
        let server = self.server.take().unwrap();
        server.end();
        tokio::task::spawn_blocking(move || server.join()).await.unwrap();
    }
}

/// A question about a metric.
pub struct Metric<'a> {
    proxy: &'a Proxy,
    name: &'a str,
    labels: &'a [(&'a str, &'a str)],
}

impl Metric<'_> {
    /// It becomes this value, soon.
    pub async fn is(&self, expected: u32) {
        self.becomes(&format!("to be {expected}"), |value| (value - f64::from(expected)).abs() < 0.5).await;
    }

    /// It becomes at least this value, soon.
    pub async fn is_at_least(&self, least: u32) {
        self.becomes(&format!("to be at least {least}"), |value| value >= f64::from(least)).await;
    }

    /// It becomes less than zero, soon.
    pub async fn is_negative(&self) {
        self.becomes("to be negative", |value| value < 0.0).await;
    }

    async fn becomes(&self, what: &str, is: impl Fn(f64) -> bool) {
        let last = std::cell::Cell::new(f64::NAN);
        let asked = async || {
            last.set(self.proxy.value(self.name, self.labels).await);
            is(last.get()).then_some(())
        };
        let waited = timeout(LIMIT, poll_until(asked)).await;
        assert!(waited.is_ok(), "{}{:?}: wanted {what}, found {}", self.name, self.labels, last.get());
    }
}

/// A header as NLB writes it, of a client whose address every consumer has.
pub fn header(endpoint: &str) -> Vec<u8> {
    header_of("10.100.0.10:40000", endpoint)
}

/// A header as NLB writes it, of any client.
pub fn header_of(client: &str, endpoint: &str) -> Vec<u8> {
    nlb::header(client.parse().unwrap(), "10.0.0.5:8080".parse().unwrap(), Some(endpoint))
}

/// A connection without delay.
pub async fn connect(address: SocketAddr) -> TcpStream {
    let stream = timeout(LIMIT, TcpStream::connect(address)).await.unwrap().unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// A session with an echo behind it goes on.
pub async fn still_lives(session: &mut TcpStream) {
    session.write_all(b"still").await.unwrap();
    assert_eq!(read(session, 5).await, b"still");
}

/// A connection from an address of this machine's own choice: all of 127.0.0.0/8 is.
pub async fn connect_from(source: &str, address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    let stream = timeout(LIMIT, socket.connect(address)).await.unwrap().unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Waits until the other ends, on loopback and IPv4, have read all that these have sent.
pub async fn are_read(streams: impl IntoIterator<Item = &TcpStream>) {
    let mut unread = HashMap::new();
    for stream in streams {
        let (here, there) = (in_hex(stream.local_addr().unwrap()), in_hex(stream.peer_addr().unwrap()));
        // Of the queues, `tx:rx`, the sender's first and the receiver's second has to be empty.
        unread.insert((here.clone(), there.clone()), 0);
        unread.insert((there, here), 1);
    }
    eventually("everything to be read", async || {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let empty = |row: &str| {
            let mut columns = row.split_ascii_whitespace().skip(1);
            let ends = (columns.next()?.to_owned(), columns.next()?.to_owned());
            let queues = columns.nth(1)?;
            Some(queues.split(':').nth(*unread.get(&ends)?)? == "00000000")
        };
        table.lines().all(|row| empty(row).unwrap_or(true)).then_some(())
    })
    .await;
}

/// An address as `/proc/net/tcp` has it.
pub fn in_hex(address: SocketAddr) -> String {
    let std::net::IpAddr::V4(ip) = address.ip() else { panic!("{address} is not IPv4") };
    format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port())
}

/// Ends its side, then reads to the other side's end.
pub async fn exchange(mut stream: TcpStream) -> io::Result<Vec<u8>> {
    timeout(LIMIT, async {
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    })
    .await
    .expect("an end within the limit")
}

/// Reads so many bytes.
pub async fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(LIMIT, stream.read_exact(&mut bytes)).await.expect("bytes within the limit").unwrap();
    bytes
}

/// A port of loopback where nothing listens, and nobody will who does not share it; 0 is the system's choice.
/// `None` where somebody has it.
pub fn closed_port(port: u16) -> Option<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).ok()?;
    // Only now: nobody had the port, and from here on a listener may share it.
    share(&socket);
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    Some((socket, address))
}

/// Listens at a closed port for as long as the socket lives.
pub fn open_port(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
    share(&socket);
    socket.bind(&address.into()).unwrap();
    socket.listen(4096).unwrap();
    socket
}

fn share(socket: &Socket) {
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
}

/// How a connection ends that sends nothing more: `Ok` for an end, `Err` for a reset.
pub async fn end_of(stream: &mut TcpStream) -> io::Result<usize> {
    let mut rest = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("an end within the limit")
}

/// The connection is reset, and nothing came before.
pub async fn is_reset(stream: &mut TcpStream) {
    let end = end_of(stream).await;
    assert_eq!(end.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
}

/// Waits until `ask` answers.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl Fn() -> F) -> T {
    timeout(LIMIT, poll_until(ask)).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

async fn poll_until<T, F: Future<Output = Option<T>>>(ask: impl Fn() -> F) -> T {
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        sleep(Duration::from_millis(5)).await;
    }
}
