//! The load generator: acts as the load balancer with many sessions, and checks which backend answered each.
//!
//! Closed loop without a rate: the next operation starts when the last has ended. With a rate, open loop: operations
//! are due at a fixed pace, and latency counts from when they were due.

mod client_addresses;
pub(crate) mod consumer;
pub(crate) mod datagram_requests;
mod flow;
pub mod schedule;
mod session;
mod timer_fd;

pub use self::client_addresses::MOST_CLIENTS;
pub use self::flow::FRONT;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::client_addresses::ClientAddresses;
use self::datagram_requests::DatagramRequests;
use self::flow::LoadFlow;
use self::schedule::{LoadPace, Skew, SkewedShares};
use self::session::LoadSession;
use self::timer_fd::TimerFd;
use crate::clock::{self, Moment};
use crate::lab::datagram::DatagramPort;

/// What a session does, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadMode {
    /// Connect, one message there and back, close.
    Connect,
    /// Messages there and back over one connection.
    RoundTrip,
    /// Receive as much as comes.
    ToClient,
    /// Send as much as goes.
    ToBackend,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadWork {
    /// TCP sessions.
    Sessions(LoadMode),
    /// UDP flows, each from a port of its own: datagrams there and back.
    Flows {
        /// Datagrams of a flow that wait for their answers at once, at least 1.
        window: usize,
        /// A datagram without an answer for so long is lost.
        timeout: Duration,
    },
}

/// The traffic to generate.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The proxy.
    pub target: SocketAddr,
    /// The endpoints' IDs, each with the name of the pool whose backends may answer; an empty name accepts any pool.
    /// Without an endpoint, no header is sent: the target is a backend, or a proxy that wants none.
    pub endpoints: Vec<(String, String)>,
    /// How often each endpoint is used.
    pub skew: Skew,
    /// What is sent.
    pub work: LoadWork,
    /// Sessions or flows at once.
    pub sessions: usize,
    /// Bytes of a message, at least 16; in the bulk modes, of one read or write. Of a datagram at least
    /// [`FRONT`], the header not counted.
    pub size: usize,
    /// Operations a second of all sessions together; `None` is a closed loop.
    pub rate: Option<f64>,
    /// How long is measured.
    pub duration: Duration,
    /// How long before that is not.
    pub warmup: Duration,
    /// What it is divided into, not nothing: each such span is reported by itself, too.
    pub interval: Option<Duration>,
    /// How many clients the connections are from, at least 1; drawn at random, all as often.
    pub clients: u32,
    /// How many of a hundred connections are noise: health checks, empty connections, split headers, unknown IDs.
    pub noise: u8,
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LoadFailure {
    /// The target did not take the connection.
    Connect,
    /// The connection ended or broke before the answer was whole.
    Broken,
    /// The answer was not the one that was due.
    Wrong,
}

impl LoadFailure {
    /// The failure in the text report.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Connect => "could not connect",
            Self::Broken => "reset or closed by the target; see the proxy's access log",
            Self::Wrong => "got a wrong answer",
        }
    }

    /// The label in JSON reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Broken => "broken",
            Self::Wrong => "wrong_answer",
        }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Operations that ended well.
    pub operations: u64,
    /// Payload bytes received, in [`LoadMode::ToBackend`] sent.
    pub bytes: u64,
    /// Operations that did not end well, by reason.
    pub failures: BTreeMap<LoadFailure, u64>,
    /// Sessions that a backend of another pool answered.
    pub misrouted: u64,
    /// Connections of noise.
    pub noise: u64,
    /// Operations of an open loop that were never sent: their session was too far behind.
    pub not_sent: u64,
    /// What became of datagrams that are no operations.
    pub datagrams: DatagramReport,
    /// How long it was measured.
    pub took: Duration,
    /// Latencies in nanoseconds, three digits.
    pub latency: Histogram<u64>,
    /// The same for each interval of the plan, in order; the last may be shorter.
    pub intervals: Vec<LoadInterval>,
}

/// What was measured in one interval.
#[derive(Clone, Debug)]
pub struct LoadInterval {
    /// Operations that were due in it and ended well.
    pub operations: u64,
    /// Their payload bytes, as in [`LoadReport::bytes`].
    pub bytes: u64,
    /// Operations that failed in it.
    pub failed: u64,
    /// Latencies in nanoseconds, two digits: there may be many.
    pub latency: Histogram<u32>,
}

impl LoadInterval {
    fn new() -> Self {
        #[expect(clippy::expect_used, reason = "two is one of the digits that hdrhistogram takes")]
        let latency = Histogram::new(2).expect("a histogram of two digits");
        Self { operations: 0, bytes: 0, failed: 0, latency }
    }
}

/// What became of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatagramReport {
    /// Questions without an answer in time.
    pub lost: u64,
    /// Answers after that time.
    pub late: u64,
    /// Answers that came after the one to a later question.
    pub reordered: u64,
    /// Answers to questions that had theirs.
    pub duplicates: u64,
}

/// What is seen while it runs.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Operations that ended well, those of the warm-up included.
    pub operations: AtomicU64,
    /// Payload bytes.
    pub bytes: AtomicU64,
    /// Operations that failed.
    pub failed: AtomicU64,
}

impl LoadReport {
    fn new() -> Self {
        #[expect(clippy::expect_used, reason = "three is one of the digits that hdrhistogram takes")]
        let latency = Histogram::new(3).expect("a histogram of three digits");
        Self {
            operations: 0,
            bytes: 0,
            failures: BTreeMap::new(),
            misrouted: 0,
            noise: 0,
            not_sent: 0,
            datagrams: DatagramReport::default(),
            took: Duration::ZERO,
            latency,
            intervals: Vec::new(),
        }
    }

    /// Whether every session reached its own pool, every answer was the one that was due, and something was measured.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.misrouted == 0 && !self.failures.contains_key(&LoadFailure::Wrong) && self.operations > 0
    }

    /// Operations that failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

/// Runs a plan on the caller's runtime, which has to be a local one; one core carries it.
///
/// # Errors
/// Where the kernel has no timer left, or no port for a flow.
pub async fn run(plan: LoadPlan, progress: Arc<LoadProgress>) -> io::Result<LoadReport> {
    let shares = Rc::new(SkewedShares::new(plan.skew, plan.endpoints.len()));
    let plan = Rc::new(plan);
    // Ports are taken before the time begins.
    let mut ports = Vec::new();
    if let LoadWork::Flows { .. } = plan.work {
        for _ in 0..plan.sessions {
            ports.push(DatagramPort::connect(plan.target).await?);
        }
    }
    let start = clock::now();
    let measured = start + plan.warmup;
    let end = measured + plan.duration;
    let window = LoadWindow { measured, end };
    let room = Rc::default();
    let mut sessions = JoinSet::new();
    let mut senders = Vec::new();
    let mut report = LoadReport::new();
    if let Some(interval) = plan.interval {
        let count = plan.duration.as_nanos().div_ceil(interval.as_nanos().max(1));
        report.intervals = (0..count).map(|_| LoadInterval::new()).collect();
    }
    let notes =
        LoadNotes { report: Rc::new(RefCell::new(report)), progress, measured, interval: plan.interval };
    let mut begin = || {
        let orders = plan.rate.map(|_| {
            let (sender, receiver) = mpsc::channel(BEHIND);
            senders.push(sender);
            receiver
        });
        (window, orders, notes.clone())
    };
    match plan.work {
        LoadWork::Sessions(mode) => {
            for _ in 0..plan.sessions {
                let session = LoadSession::new(&plan, mode, ClientAddresses::new(&plan, &shares), begin());
                sessions.spawn_local(session.run());
            }
        }
        LoadWork::Flows { window: at_once, timeout } => {
            for port in ports {
                let callers = ClientAddresses::new(&plan, &shares);
                let flow =
                    LoadFlow::new(&plan, port, at_once, DatagramRequests::new(timeout), callers, begin())?;
                sessions.spawn_local(flow.run(Rc::clone(&room)));
            }
        }
    }
    let not_sent = match plan.rate {
        Some(rate) => dispatch(LoadPace::new(start, rate), end, senders).await?,
        None => 0,
    };
    while sessions.join_next().await.is_some() {}
    let mut report = notes.report.replace(LoadReport::new());
    report.not_sent = not_sent;
    report.took = clock::now().since(measured).min(plan.duration);
    Ok(report)
}

/// Operations that one session may be behind; the next are not sent, and are counted.
const BEHIND: usize = 1024;

/// Gives each operation, when it is due, to the next session in turn. How many could not be given.
async fn dispatch(pace: LoadPace, end: Moment, sessions: Vec<mpsc::Sender<Moment>>) -> io::Result<u64> {
    let alarm = TimerFd::new()?;
    let mut not_sent = 0;
    for (due, session) in pace.take_while(|due| *due < end).zip(sessions.iter().cycle()) {
        alarm.wait_until(due).await?;
        not_sent += u64::from(session.try_send(due).is_err());
    }
    Ok(not_sent)
}

/// What counts: operations that were due after the warm-up and before the end.
#[derive(Clone, Copy, Debug)]
struct LoadWindow {
    measured: Moment,
    end: Moment,
}

impl LoadProgress {
    fn note(&self, bytes: u64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a session or flow begins with: what counts, its orders in an open loop, and where it takes down what became of them.
type Begin = (LoadWindow, Option<mpsc::Receiver<Moment>>, LoadNotes);

/// What sessions and flows take down, all in one place.
#[derive(Clone)]
struct LoadNotes {
    report: Rc<RefCell<LoadReport>>,
    progress: Arc<LoadProgress>,
    measured: Moment,
    interval: Option<Duration>,
}

impl LoadNotes {
    /// An operation that was due then has ended well.
    fn succeeded(&self, due: Moment, bytes: u64, window: LoadWindow) {
        self.progress.note(bytes);
        let now = clock::now();
        if due >= window.measured {
            let mut report = self.report.borrow_mut();
            report.operations += 1;
            report.bytes += bytes;
            let nanos = u64::try_from(now.since(due).as_nanos()).unwrap_or(u64::MAX).max(1);
            // The histogram grows as it has to.
            report.latency.record(nanos).unwrap_or_default();
            self.interval(&mut report, due, |interval| {
                interval.operations += 1;
                interval.bytes += bytes;
                interval.latency.record(nanos).unwrap_or_default();
            });
        }
    }

    fn failed(&self, failure: LoadFailure) {
        self.progress.fail();
        let mut report = self.report.borrow_mut();
        *report.failures.entry(failure).or_default() += 1;
        self.interval(&mut report, clock::now(), |interval| interval.failed += 1);
    }

    /// Takes something down in the interval that a moment belongs to, if it belongs to any.
    fn interval(&self, report: &mut LoadReport, at: Moment, note: impl FnOnce(&mut LoadInterval)) {
        let Some(interval) = self.interval.filter(|_| at >= self.measured) else { return };
        let place = at.since(self.measured).as_nanos() / interval.as_nanos().max(1);
        if let Some(interval) = usize::try_from(place).ok().and_then(|place| report.intervals.get_mut(place))
        {
            note(interval);
        }
    }

    /// A datagram that was due then had no answer in time.
    fn lost(&self, due: Moment, window: LoadWindow) {
        self.progress.fail();
        self.datagrams(|datagrams| datagrams.lost += u64::from(due >= window.measured));
    }

    fn misrouted(&self) {
        self.report.borrow_mut().misrouted += 1;
    }

    fn noise(&self) {
        self.report.borrow_mut().noise += 1;
    }

    fn datagrams(&self, count: impl FnOnce(&mut DatagramReport)) {
        count(&mut self.report.borrow_mut().datagrams);
    }
}
