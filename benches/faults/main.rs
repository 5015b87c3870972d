//! Ten minutes in which one call of the kernel's in a hundred fails, at random, under load: no byte is lost within a stream,
//! doubled or another tenant's, nothing crashes, nothing leaks, and afterwards every session succeeds. `cargo bench --bench
//! faults --features fault-injection`; `-- --seconds N` and `-- --seed N`; `-- --test` takes five seconds.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod backend;
mod stream;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use clap::Parser;
use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use vestibule::config::Config;
use vestibule::fault::{InjectedFault, Injection, Syscall};
use vestibule::forward::pipe::CAPACITY;
use vestibule::lab::nlb;
use vestibule::outcome::Reason;
use vestibule::server::Server;

use self::stream::{BLOCK, HEAD, Head, Toward};

const TENANTS: u32 = 20;
/// Clients that open one session after the other: of short ones, of long ones, and of datagrams.
const SHORT: u64 = 40;
const LONG: u64 = 6;
const DATAGRAMS: u64 = 6;

/// A long session's bytes each way, at most.
const MOST: u64 = 8 << 20;

/// A session that takes longer hangs: silence is over after ten seconds, half a session's after eight.
const LIMIT: Duration = Duration::from_secs(60);

/// A datagram that is not answered by then is lost.
const SOON: Duration = Duration::from_millis(200);

#[derive(clap::Parser)]
struct Options {
    /// How long calls fail
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Another row of faults
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    whole: AtomicU64,
    cut: AtomicU64,
    bytes: AtomicU64,
    answered: AtomicU64,
    unanswered: AtomicU64,
    sessions: AtomicU64,
    over: AtomicBool,
    faults: Mutex<Vec<String>>,
}

impl Tally {
    pub(crate) fn fault(&self, fault: String) {
        self.faults.lock().expect("no thread panicked").push(fault);
    }

    fn first_fault(&self) -> Option<String> {
        self.faults.lock().expect("no thread panicked").first().cloned()
    }

    fn count(cell: &AtomicU64) -> u64 {
        cell.load(Ordering::Relaxed)
    }
}

/// Who opens sessions, and where.
#[derive(Clone)]
struct Clients {
    web: SocketAddr,
    dns: SocketAddr,
    tally: Arc<Tally>,
}

fn endpoint(tenant: u32) -> String {
    format!("vpce-{:017x}", 0xfa_0000_u64 + u64::from(tenant))
}

/// At least so much that its receiver knows whose it is.
fn size(random: &mut fastrand::Rng, most: u64) -> u64 {
    random.u64(HEAD as u64..=most)
}

/// Every consumer has the same address.
fn consumer(session: u64) -> SocketAddr {
    SocketAddr::from(([10, 100, 0, 10], 1_024 + u16::try_from(session % 60_000).unwrap_or(0)))
}

impl Clients {
    fn head(&self, tenant: u32, ask: u64, answer: u64) -> Head {
        let session = self.tally.sessions.fetch_add(1, Ordering::Relaxed);
        Head { tenant, session, ask, answer }
    }

    /// One session; whether it came to its own end.
    async fn session(&self, head: Head) -> Result<bool, String> {
        let Ok(mut stream) = TcpStream::connect(self.web).await else { return Ok(false) };
        let header = nlb::header(consumer(head.session), self.web, Some(&endpoint(head.tenant)));
        if stream.write_all(&header).await.is_err() {
            return Ok(false);
        }
        let (mut from, mut to) = stream.split();
        let both = async {
            tokio::join!(head.receive(Toward::Client, &[], &mut from), head.send(Toward::Backend, &mut to))
        };
        let hangs = |_| format!("{head:?} hangs");
        let (received, sent) = timeout(LIMIT, both).await.map_err(hangs)?;
        let cut = head.judge(Toward::Client, &received?, &sent)?;
        self.tally.bytes.fetch_add(cut.unwrap_or(head.answer), Ordering::Relaxed);
        let is_whole = cut.is_none() && sent.is_ok();
        let cell = if is_whole { &self.tally.whole } else { &self.tally.cut };
        cell.fetch_add(1, Ordering::Relaxed);
        Ok(is_whole)
    }

    /// Sessions of one kind, until it is over.
    async fn open(self, seed: u64, most: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.tally.over.load(Ordering::Relaxed) {
            let head = self.head(random.u32(..TENANTS), size(&mut random, most), size(&mut random, most));
            if let Err(fault) = self.session(head).await {
                return self.tally.fault(fault);
            }
        }
    }

    /// Flows of a few datagrams each, until it is over.
    async fn speak(self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.tally.over.load(Ordering::Relaxed) {
            let head = self.head(random.u32(..TENANTS), 0, 0);
            if let Err(fault) = self.flow(head, 8, SOON, &mut random).await {
                return self.tally.fault(fault);
            }
        }
    }

    /// One flow; how many of its datagrams were answered, each within `patience`.
    async fn flow(
        &self,
        head: Head,
        count: u64,
        patience: Duration,
        random: &mut fastrand::Rng,
    ) -> Result<u64, String> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        socket.connect(self.dns).await.expect("an address");
        let header = nlb::datagram_header(consumer(head.session), self.dns, Some(&endpoint(head.tenant)));
        let mut room = vec![0; 65_536];
        let mut answered = 0;
        for number in 0..count {
            let payload = head.block(Toward::Backend, number);
            let payload = payload.get(..random.usize(64..1_200)).unwrap_or_default();
            // The ICMP error for an earlier answer that had no receiver is reported here.
            drop(socket.send(&[&header, payload].concat()).await);
            let Ok(Ok(count)) = timeout(patience, socket.recv(&mut room)).await else {
                continue;
            };
            let (found, _) = backend::checked(room.get(..count).unwrap_or_default(), Toward::Client)?;
            if found != head {
                return Err(format!("{head:?} got an answer to {found:?}"));
            }
            answered += 1;
        }
        self.tally.answered.fetch_add(answered, Ordering::Relaxed);
        self.tally.unanswered.fetch_add(count - answered, Ordering::Relaxed);
        Ok(answered)
    }

    /// Now that nothing fails any more: of new sessions, every one succeeds.
    async fn all_succeed(&self) {
        let mut random = fastrand::Rng::with_seed(1);
        let mut all = JoinSet::new();
        for place in 0..500 {
            let most = if place % 50 == 0 { MOST } else { 4 * BLOCK as u64 };
            let head = self.head(place % TENANTS, size(&mut random, most), size(&mut random, most));
            let clients = self.clone();
            all.spawn(async move { (head, clients.session(head).await) });
            // One that waits for its turn for long would look like one that has fallen silent.
            if all.len() >= 32 {
                succeeded(all.join_next().await.as_ref());
            }
        }
        while !all.is_empty() {
            succeeded(all.join_next().await.as_ref());
        }
        for tenant in 0..TENANTS {
            let answered = self.flow(self.head(tenant, 0, 0), 8, LIMIT, &mut random).await;
            assert_eq!(answered, Ok(8), "a datagram was lost, though no call failed");
        }
    }
}

/// A session that was joined.
type Joined = Result<(Head, Result<bool, String>), JoinError>;

fn succeeded(joined: Option<&Joined>) {
    let Some(Ok((head, ended))) = joined else { panic!("{joined:?}") };
    assert_eq!(ended, &Ok(true), "{head:?} failed, though no call did");
}

fn faults() -> Vec<InjectedFault> {
    let one_in_100 = |call, errnos: &[Errno]| InjectedFault::new(call, errnos).per_million(10_000);
    let shortage = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    let unreachable = [
        Errno::CONNREFUSED,
        Errno::TIMEDOUT,
        Errno::HOSTUNREACH,
        Errno::NETUNREACH,
        Errno::ADDRNOTAVAIL,
        Errno::PERM,
    ];
    vec![
        one_in_100(
            Syscall::Accept,
            &[&shortage[..], &[Errno::CONNABORTED, Errno::PROTO, Errno::PERM]].concat(),
        ),
        one_in_100(Syscall::Socket, &shortage),
        one_in_100(Syscall::Connect, &[&unreachable[..], &shortage[2..]].concat()),
        one_in_100(Syscall::Register, &[Errno::NOMEM, Errno::NOSPC]),
        one_in_100(Syscall::Receive, &[Errno::NOMEM, Errno::CONNRESET, Errno::TIMEDOUT]),
        one_in_100(
            Syscall::Send,
            &[Errno::NOMEM, Errno::NOBUFS, Errno::PIPE, Errno::CONNRESET, Errno::TIMEDOUT],
        ),
        one_in_100(Syscall::SpliceIn, &[Errno::INVAL, Errno::NOMEM, Errno::INTR, Errno::CONNRESET]),
        one_in_100(Syscall::SpliceOut, &[Errno::INVAL, Errno::NOMEM, Errno::INTR, Errno::PIPE]),
        // Pipes are kept: few are made.
        InjectedFault::new(Syscall::Pipe, &[Errno::MFILE, Errno::NFILE, Errno::NOMEM]).per_million(100_000),
        InjectedFault::new(Syscall::PipeSize, &[Errno::PERM, Errno::NOMEM]).per_million(100_000),
        one_in_100(Syscall::ReceiveDatagram, &[Errno::NOMEM, Errno::CONNREFUSED, Errno::INTR]),
        one_in_100(
            Syscall::SendDatagram,
            &[Errno::NOBUFS, Errno::NOMEM, Errno::PERM, Errno::AGAIN, Errno::CONNREFUSED],
        ),
    ]
}

const CALLS: [Syscall; 12] = [
    Syscall::Accept,
    Syscall::Socket,
    Syscall::Connect,
    Syscall::Register,
    Syscall::Receive,
    Syscall::Send,
    Syscall::SpliceIn,
    Syscall::SpliceOut,
    Syscall::Pipe,
    Syscall::PipeSize,
    Syscall::ReceiveDatagram,
    Syscall::SendDatagram,
];

fn configuration(backends: &[[SocketAddr; 2]]) -> Config {
    let mut text =
        "[process]\nworkers = 2\n[admin]\nbind = \"127.0.0.1:0\"\n[health]\nbind = \"127.0.0.1:0\"\n[log]\n\
        access = \"off\"\n[timeouts]\nidle = \"10s\"\nhalf-close = \"8s\"\nflow-idle = \"1s\"\n"
            .to_owned();
    for (name, protocol) in [("web", "tcp"), ("dns", "udp")] {
        // Writing to a string does not fail.
        write!(
            text,
            "[[listener]]\nname = \"{name}\"\nbind = \"127.0.0.1:0\"\nprotocol = \"{protocol}\"\n\
             trusted-sources = [\"127.0.0.0/8\"]\n"
        )
        .unwrap_or_default();
    }
    for (tenant, [one, two]) in (0..).zip(backends) {
        write!(
            text,
            "[[pool]]\nname = \"{tenant}\"\nbackends = [\"{one}\", \"{two}\"]\nhealth = {{ kind = \"none\" }}\n\
             [[tenant]]\nname = \"{tenant}\"\nendpoints = [\"{}\"]\npool = \"{tenant}\"\n",
            endpoint(tenant)
        )
        .unwrap_or_default();
    }
    Config::parse("faults.toml", &text).unwrap_or_else(|faults| panic!("{faults}"))
}

/// Backends on a thread of their own.
fn backends(tally: &Arc<Tally>) -> Vec<[SocketAddr; 2]> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let tally = Arc::clone(tally);
    std::thread::spawn(move || {
        runtime().block_on(async {
            let mut all = Vec::new();
            for tenant in 0..TENANTS {
                let start = async || backend::start(tenant, Arc::clone(&tally)).await;
                all.push([start().await, start().await]);
            }
            sender.send(all).expect("the receiver waits");
            std::future::pending::<()>().await;
        });
    });
    receiver.recv().expect("backends")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Open descriptors: those that are no pipe's, and those that are.
fn descriptors() -> (usize, usize) {
    let links = std::fs::read_dir("/proc/self/fd").expect("descriptors");
    let links: Vec<_> = links.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
    let pipes = links.iter().filter(|link| link.to_string_lossy().starts_with("pipe:")).count();
    (links.len() - pipes, pipes)
}

/// Everything that was taken has been given back, soon: sessions, flows, permits, places at backends, pipes.
async fn nothing_is_held(server: &Server, before: (usize, usize)) {
    let live = server.live();
    let held = || {
        let routes = live.shards.iter().flat_map(|shard| shard.routes()).map(|route| route.active.value());
        let pipes = live.shards.iter().map(|shard| shard.worker.pipes.value());
        let snapshot = live.snapshot.load();
        let loads = snapshot.pools.iter().flat_map(|pool| pool.candidates().backends().to_vec());
        let loads = loads.map(|backend| u64::from(backend.load()));
        let of_tenants = snapshot.directory.tenants().iter().map(|tenant| {
            tenant.quota.sessions()
                + tenant.quota.flows()
                + tenant.quota.pipes.load(Ordering::SeqCst) as usize
        });
        let (sockets, pipe_ends) = descriptors();
        // Empty pipes are kept, and are in the budget's books.
        let kept = usize::try_from(live.pipes.used() / CAPACITY as u64).unwrap_or(usize::MAX) * 2;
        [
            ("sessions and flows", routes.sum::<u64>()),
            ("pipes", pipes.sum()),
            ("slots", live.sessions.used() as u64),
            ("holders", live.quotas.holders() as u64),
            ("loads", loads.sum()),
            ("permits", of_tenants.sum::<usize>() as u64),
            ("sockets", sockets.saturating_sub(before.0) as u64),
            ("ends of pipes", (pipe_ends - before.1).saturating_sub(kept) as u64),
        ]
    };
    for _ in 0..3_000 {
        if held().iter().all(|(_, count)| *count == 0) {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("something leaked: {:?}", held());
}

/// How sessions ended, and that none of them by a fault of ours.
fn outcomes(server: &Server) {
    let live = server.live();
    let mut ended = std::collections::BTreeMap::<String, u64>::new();
    for route in live.shards.iter().flat_map(|shard| shard.routes()) {
        for (outcome, count) in route.ended().filter(|(_, count)| *count > 0) {
            assert_ne!(outcome.why, Reason::Internal, "{count} sessions ended by a fault of ours");
            *ended.entry(outcome.to_string()).or_default() += count;
        }
    }
    for (outcome, count) in &ended {
        println!("  {count:>10}  {outcome}");
    }
    assert_eq!(live.stopped_listeners.count(), 0, "a worker stopped listening");
    let listeners = live.shards.iter().flat_map(|shard| shard.listeners());
    let accepted: u64 = listeners.map(|listener| listener.accepted.value()).sum();
    assert_eq!(accepted, ended.values().sum::<u64>(), "accepted, and ended");
}

/// `pipes` are the ends of those that are not the server's.
async fn run(options: &Options, server: &Server, clients: &Clients, pipes: usize) {
    let tally = &clients.tally;
    // What is taken once and kept is taken first.
    clients.all_succeed().await;
    nothing_is_held(server, (usize::MAX, pipes)).await;
    let before = (descriptors().0, pipes);
    let injection = Injection::new(options.seed, faults());
    let mut all = JoinSet::new();
    for seed in 0..SHORT {
        all.spawn(clients.clone().open(seed, 4 * BLOCK as u64));
    }
    for seed in SHORT..SHORT + LONG {
        all.spawn(clients.clone().open(seed, MOST));
    }
    for seed in 0..DATAGRAMS {
        all.spawn(clients.clone().speak(seed));
    }
    for second in 1..=options.seconds {
        sleep(Duration::from_secs(1)).await;
        if let Some(fault) = tally.first_fault() {
            panic!("after {second} s: {fault}");
        }
        if second % 60 == 0 {
            println!("{second} s: {} sessions whole", Tally::count(&tally.whole));
        }
    }
    tally.over.store(true, Ordering::Relaxed);
    while let Some(ended) = all.join_next().await {
        ended.expect("a client that does not panic");
    }
    println!("calls that failed:");
    for call in CALLS {
        println!("  {:>10}  {call:?}", injection.count(call));
        let is_rare = matches!(call, Syscall::Pipe | Syscall::PipeSize);
        assert!(options.test || is_rare || injection.count(call) > 0, "{call:?} never failed");
    }
    drop(injection);
    nothing_is_held(server, before).await;
    clients.all_succeed().await;
    nothing_is_held(server, before).await;
    if let Some(fault) = tally.first_fault() {
        panic!("{fault}");
    }
}

fn main() {
    let mut options = Options::parse();
    if options.test {
        options.seconds = 5;
    }
    let pipes = descriptors().1;
    let tally = Arc::new(Tally::default());
    let server = Server::start(&configuration(&backends(&tally))).expect("a server");
    let clients = Clients { web: server.addresses("web")[0], dns: server.addresses("dns")[0], tally };
    runtime().block_on(run(&options, &server, &clients, pipes));
    println!("sessions that ended:");
    outcomes(&server);
    let tally = &clients.tally;
    let [whole, cut, bytes, answered, unanswered] =
        [&tally.whole, &tally.cut, &tally.bytes, &tally.answered, &tally.unanswered].map(Tally::count);
    println!(
        "{} s, seed {}: {whole} sessions whole, {cut} cut short, {} MB of answers, {answered} datagrams answered, \
         {unanswered} not; no byte of another tenant, none lost within a stream, nothing leaked, and then every session \
         succeeded",
        options.seconds,
        options.seed,
        bytes / 1_000_000
    );
}
