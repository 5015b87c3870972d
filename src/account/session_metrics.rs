//! A session's counters, looked up once; from then on, counting is one addition.

mod fold;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use self::fold::{ConfiguredLabels, REMOVED};
pub use super::connect_counters::ConnectResult;
pub use super::counters::{
    BackendCounters, CounterShard, ListenerCounters, PoolCounters, RouteCounters, WorkerCounters,
};
use super::udp_drops::DatagramDrop;
use super::{Direction, Label, PerDirection, lock};
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};

/// The counters that a worker has created so far, by label number.
type Index<K, C> = RefCell<HashMap<K, Arc<C>, foldhash::fast::FixedState>>;

/// The writing side of one worker's [`CounterShard`].
#[derive(Debug)]
pub struct WorkerMetrics {
    shard: Arc<CounterShard>,
    /// The empty label: a tenant or pool that is not known yet.
    unknown: Label,
    routes: Index<(u32, u32, u32), RouteCounters>,
    listeners: Index<u32, ListenerCounters>,
    backends: Index<(u32, u32), BackendCounters>,
    pools: Index<u32, PoolCounters>,
    folding: FoldProgress,
    sessions: Cell<u64>,
}

/// The progress of a worker's pass that folds counters of removed names.
#[derive(Debug, Default)]
struct FoldProgress {
    /// The pass that is done.
    turn: Cell<u64>,
    /// Where the next slice of the present pass begins.
    at: Cell<usize>,
    busy: Cell<u64>,
}

impl WorkerMetrics {
    /// The counters of a new worker. `unknown` is the label of the empty name.
    #[must_use]
    pub fn new(shard: Arc<CounterShard>, unknown: Label) -> Rc<Self> {
        Rc::new(Self {
            shard,
            unknown,
            routes: Index::default(),
            listeners: Index::default(),
            backends: Index::default(),
            pools: Index::default(),
            folding: FoldProgress::default(),
            sessions: Cell::new(0),
        })
    }

    /// The worker's own counters.
    #[must_use]
    pub fn worker(&self) -> &WorkerCounters {
        &self.shard.worker
    }

    /// Sets the next session number: those of a previous process, which may live on here, had lower numbers.
    pub fn start_session_numbers_at(&self, first: u64) {
        self.sessions.set(first);
    }

    /// Numbers the worker's sessions.
    #[must_use]
    pub fn next_session(&self) -> u64 {
        self.sessions.replace(self.sessions.get() + 1)
    }

    /// Finds counters, or creates them and registers them for scrapes.
    fn find<K: Eq + Hash, C>(
        &self,
        index: &Index<K, C>,
        published: &Mutex<Vec<Arc<C>>>,
        key: K,
        make: impl FnOnce() -> C,
    ) -> Arc<C> {
        let mut index = index.borrow_mut();
        Arc::clone(index.entry(key).or_insert_with(|| {
            let counters = Arc::new(make());
            lock(published).push(Arc::clone(&counters));
            self.worker().counters_made.add(1);
            counters
        }))
    }

    /// The counters of a listener.
    #[must_use]
    pub fn listener(&self, listener: &Label) -> Arc<ListenerCounters> {
        let make = || ListenerCounters::new(listener.clone());
        self.find(&self.listeners, &self.shard.listeners, listener.serial, make)
    }

    fn route(&self, listener: &Label, tenant: &Label, pool: &Label) -> Arc<RouteCounters> {
        let key = (listener.serial, tenant.serial, pool.serial);
        let make = || RouteCounters::new(listener.clone(), tenant.clone(), pool.clone());
        self.find(&self.routes, &self.shard.routes, key, make)
    }

    fn backend(&self, pool: &Label, backend: &Label) -> Arc<BackendCounters> {
        let make = || BackendCounters::new(pool.clone(), backend.clone());
        self.find(&self.backends, &self.shard.backends, (pool.serial, backend.serial), make)
    }

    fn pool(&self, pool: &Label) -> Arc<PoolCounters> {
        self.find(&self.pools, &self.shard.pools, pool.serial, || PoolCounters::new(pool.clone()))
    }
}

/// One session's counters. Dropping it without [`end`](Self::end) counts the session as ended by an internal error.
#[derive(Debug)]
pub struct SessionMetrics {
    worker_metrics: Rc<WorkerMetrics>,
    listener: Arc<ListenerCounters>,
    route: Arc<RouteCounters>,
    backend: Option<Arc<BackendCounters>>,
    bytes: PerDirection<u64>,
    /// The step it has come to, for an end without an outcome.
    at: EndedAt,
    ended: bool,
    /// Whether the session would have had to wait for bandwidth, were its tenant's limits not only observed.
    pub would_delay: bool,
}

impl SessionMetrics {
    /// Counts a session that was just accepted.
    #[must_use]
    pub fn new(worker_metrics: Rc<WorkerMetrics>, listener: &Label) -> Self {
        let route = worker_metrics.route(listener, &worker_metrics.unknown, &worker_metrics.unknown);
        let listener = worker_metrics.listener(listener);
        listener.accepted.add(1);
        route.active.add(1);
        Self {
            worker_metrics,
            listener,
            route,
            backend: None,
            bytes: PerDirection::default(),
            at: EndedAt::Header,
            ended: false,
            would_delay: false,
        }
    }

    /// Counts a session taken over from another process, which has forwarded so much already.
    #[must_use]
    pub fn taken_over(
        worker_metrics: Rc<WorkerMetrics>,
        [listener, tenant, pool, backend]: [&Label; 4],
        bytes: PerDirection<u64>,
    ) -> Self {
        let route = worker_metrics.route(listener, tenant, pool);
        route.active.add(1);
        let listener = worker_metrics.listener(listener);
        listener.taken_over.add(1);
        let mut metrics = Self {
            worker_metrics,
            listener,
            route,
            backend: None,
            bytes,
            at: EndedAt::Forward,
            ended: false,
            would_delay: false,
        };
        metrics.assume_backend(backend);
        metrics
    }

    /// Sets the session's tenant, and its pool if known.
    pub fn assign_tenant(&mut self, tenant: &Label, pool: Option<&Label>) {
        let pool = pool.unwrap_or(&self.worker_metrics.unknown);
        let route = self.worker_metrics.route(&self.route.listener, tenant, pool);
        self.route.active.sub(1);
        route.active.add(1);
        self.route = route;
        self.worker_metrics.worker().identified.add(1);
    }

    /// Counts an attempt to connect a backend.
    pub fn count_connect(&mut self, backend: &Label, result: ConnectResult) {
        self.at = EndedAt::Connect;
        let counters = self.worker_metrics.backend(&self.route.pool, backend);
        counters.count(result);
        if result == ConnectResult::Done {
            self.enter_backend(counters);
        }
    }

    /// Counts an attempt to connect another backend that failed, while the present one is kept.
    pub fn count_failed_connect(&self, backend: &Label, result: ConnectResult) {
        self.worker_metrics.backend(&self.route.pool, backend).count(result);
    }

    /// Moves to a backend that has not answered yet.
    pub fn assume_backend(&mut self, backend: &Label) {
        let counters = self.worker_metrics.backend(&self.route.pool, backend);
        self.enter_backend(counters);
    }

    /// Counts the result of the [assumed](Self::assume_backend) backend; it is left if it was not there.
    pub fn count_assumed(&mut self, result: ConnectResult) {
        let Some(counters) = &self.backend else { return };
        counters.count(result);
        if result != ConnectResult::Done {
            counters.active.sub(1);
            self.backend = None;
        }
    }

    /// Leaves its backend.
    pub fn leave_backend(&mut self) {
        if let Some(counters) = self.backend.take() {
            counters.active.sub(1);
        }
    }

    fn enter_backend(&mut self, counters: Arc<BackendCounters>) {
        counters.active.add(1);
        self.at = EndedAt::Forward;
        self.backend = Some(counters);
    }

    /// Records how long the successful attempt took.
    pub fn record_connect_time(&self, took: Duration) {
        self.worker_metrics.pool(&self.route.pool).connect_time.record(took);
    }

    /// Counts forwarded bytes; `spliced` tells whether they were spliced or copied.
    #[inline]
    pub fn count_bytes(&mut self, direction: Direction, bytes: u64, spliced: bool) {
        *self.bytes.of_mut(direction) += bytes;
        self.route.bytes.of(direction).add(bytes);
        if let Some(backend) = &self.backend {
            backend.bytes.of(direction).add(bytes);
        }
        let worker = &self.worker_metrics.shard.worker;
        if spliced { &worker.spliced } else { &worker.copied }.of(direction).add(bytes);
    }

    /// Counts datagrams that were sent together.
    #[inline]
    pub fn count_datagrams(&mut self, direction: Direction, datagrams: u64, bytes: u64) {
        self.count_bytes(direction, bytes, false);
        self.route.flows().datagrams.of(direction).add(datagrams);
    }

    /// Counts datagrams that the kernel dropped because the socket's receive queue was full.
    pub fn count_overflow(&self, datagrams: u64) {
        self.listener.overflowed.get_or_init(PerDirection::default).to_client.add(datagrams);
    }

    /// Counts datagrams that were dropped.
    pub fn count_dropped(&self, direction: Direction, drop: DatagramDrop, datagrams: u64) {
        if let Some(count) = self.route.flows().dropped.get(drop as usize) {
            count.of(direction).add(datagrams);
        }
    }

    /// Counts a datagram that a limit would have dropped in enforce mode.
    pub fn count_would_drop(&mut self, direction: Direction, drop: DatagramDrop) {
        self.would_delay = true;
        if let Some(count) = self.route.flows().would_drop.get(drop as usize) {
            count.of(direction).add(1);
        }
    }

    /// Its listener, tenant and pool; the latter two are empty until they are known.
    #[must_use]
    pub fn labels(&self) -> [&Label; 3] {
        [&self.route.listener, &self.route.tenant, &self.route.pool]
    }

    /// The bytes that this session has forwarded.
    #[must_use]
    pub fn bytes(&self) -> PerDirection<u64> {
        self.bytes
    }

    /// The worker's own counters.
    #[must_use]
    pub fn worker(&self) -> &WorkerCounters {
        self.worker_metrics.worker()
    }

    /// The listener's counters.
    #[must_use]
    pub fn listener(&self) -> Arc<ListenerCounters> {
        Arc::clone(&self.listener)
    }

    /// Counts the end.
    pub fn end(mut self, outcome: Outcome, took: Duration) {
        if outcome.is_logged() {
            self.listener.duration.record(took);
        }
        self.close(outcome);
    }

    fn close(&mut self, outcome: Outcome) {
        self.ended = true;
        self.route.active.sub(1);
        if let Some(backend) = self.backend.take() {
            backend.active.sub(1);
        }
        debug_assert!(outcome.place().is_some(), "an outcome that no table lists: {outcome}");
        if let Some(place) = outcome.place() {
            self.route.ended.add(place, 1);
        }
    }
}

impl Drop for SessionMetrics {
    fn drop(&mut self) {
        if !self.ended {
            let why = if std::thread::panicking() { Reason::Internal } else { Reason::Drained };
            self.close(Outcome::new(EndedBy::Proxy, self.at, why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Labels;
    use super::*;

    fn worker_metrics() -> (Labels, Arc<CounterShard>, Rc<WorkerMetrics>) {
        let labels = Labels::default();
        let shard = Arc::new(CounterShard::default());
        let worker_metrics = WorkerMetrics::new(Arc::clone(&shard), labels.intern(""));
        (labels, shard, worker_metrics)
    }

    fn ended(shard: &CounterShard) -> Vec<(String, String, u64)> {
        shard
            .routes()
            .iter()
            .flat_map(|route| {
                let tenant = route.tenant.name().to_owned();
                route.ended().map(move |(outcome, count)| (tenant.clone(), outcome.to_string(), count))
            })
            .filter(|(_, _, count)| *count > 0)
            .collect()
    }

    #[test]
    fn session_is_counted_for_its_listener_tenant_pool_and_backend() {
        let (labels, shard, worker_metrics) = worker_metrics();
        let mut metrics = SessionMetrics::new(Rc::clone(&worker_metrics), &labels.intern("web"));
        assert_eq!(shard.routes()[0].active.value(), 1);
        metrics.assign_tenant(&labels.intern("acme"), Some(&labels.intern("shared")));
        metrics.count_connect(&labels.intern("10.0.0.1:80"), ConnectResult::Refused);
        metrics.count_connect(&labels.intern("10.0.0.2:80"), ConnectResult::Done);
        metrics.record_connect_time(Duration::from_millis(2));
        metrics.count_bytes(Direction::ToBackend, 10, false);
        metrics.count_bytes(Direction::ToClient, 20, true);
        assert_eq!(metrics.bytes(), PerDirection { to_backend: 10, to_client: 20 });
        assert_eq!(metrics.worker().pipes.value(), 0);
        assert_eq!(metrics.listener().accepted.value(), 1);
        let routes = shard.routes();
        assert_eq!((routes[0].active.value(), routes[1].active.value()), (0, 1));
        let backends = shard.backends();
        assert_eq!((backends[0].active.value(), backends[1].active.value()), (0, 1));
        assert_eq!(backends[0].connects().find(|(_, count)| *count == 1), Some((ConnectResult::Refused, 1)));
        metrics.end(Outcome::new(EndedBy::Client, EndedAt::Forward, Reason::Done), Duration::from_secs(1));
        assert_eq!((routes[1].active.value(), backends[1].active.value()), (0, 0));
        assert_eq!(routes[1].bytes.to_client.value(), 20);
        assert_eq!(backends[1].bytes.to_backend.value(), 10);
        assert_eq!(shard.worker.spliced.to_client.value(), 20);
        assert_eq!(shard.worker.copied.to_backend.value(), 10);
        assert_eq!(ended(&shard), [("acme".to_owned(), "done by client at forward".to_owned(), 1)]);
        assert_eq!(shard.pools()[0].connect_time.times().count(), 1);
        assert_eq!(shard.listeners()[0].duration.times().count(), 1);
    }

    #[test]
    fn tenant_without_a_pool_is_counted() {
        let (labels, shard, worker_metrics) = worker_metrics();
        let mut metrics = SessionMetrics::new(worker_metrics, &labels.intern("web"));
        metrics.assign_tenant(&labels.intern("acme"), None);
        metrics.end(Outcome::reject(EndedAt::Tenant, Reason::NoPool), Duration::ZERO);
        assert_eq!(ended(&shard), [("acme".to_owned(), "no_pool by proxy at tenant".to_owned(), 1)]);
    }

    #[test]
    fn taken_over_session_is_not_accepted_again_and_its_bytes_are_counted_once() {
        let (labels, shard, worker_metrics) = worker_metrics();
        let names = ["web", "acme", "shared", "10.0.0.1:80"].map(|name| labels.intern(name));
        let bytes = PerDirection { to_backend: 7, to_client: 9 };
        let mut metrics = SessionMetrics::taken_over(worker_metrics, names.each_ref(), bytes);
        metrics.count_bytes(Direction::ToClient, 20, false);
        assert_eq!(metrics.bytes(), PerDirection { to_backend: 7, to_client: 29 });
        assert_eq!(metrics.labels().map(Label::name), ["web", "acme", "shared"]);
        let (route, backend) = (Arc::clone(&shard.routes()[0]), Arc::clone(&shard.backends()[0]));
        let taken_over = shard.listeners()[0].taken_over.value();
        assert_eq!((route.active.value(), taken_over, backend.active.value()), (1, 1, 1));
        assert_eq!((route.bytes.to_client.value(), shard.listeners()[0].accepted.value()), (20, 0));
        assert_eq!(backend.connects().map(|(_, count)| count).sum::<u64>(), 0);
        metrics.end(Outcome::reject(EndedAt::Forward, Reason::Moved), Duration::from_secs(1));
        assert_eq!((route.active.value(), backend.active.value()), (0, 0));
        assert_eq!(shard.listeners()[0].duration.times().count(), 0, "it goes on elsewhere");
    }

    #[test]
    fn health_checks_stay_out_of_the_durations() {
        let (labels, shard, worker_metrics) = worker_metrics();
        SessionMetrics::new(worker_metrics, &labels.intern("web"))
            .end(Outcome::new(EndedBy::Client, EndedAt::Header, Reason::Local), Duration::from_secs(1));
        assert_eq!(shard.listeners()[0].duration.times().count(), 0);
    }

    #[test]
    fn dropped_session_counts_as_drained_or_as_internal_error() {
        let (labels, shard, worker_metrics) = worker_metrics();
        drop(SessionMetrics::new(Rc::clone(&worker_metrics), &labels.intern("web")));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _meter = SessionMetrics::new(Rc::clone(&worker_metrics), &labels.intern("web"));
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        let words: Vec<_> = ended(&shard).into_iter().map(|(_, outcome, count)| (outcome, count)).collect();
        let expected = ["drained by proxy at header", "internal by proxy at header"];
        assert_eq!(words, expected.map(|outcome| (outcome.to_owned(), 1)));
        assert_eq!(shard.routes()[0].active.value(), 0);
    }

    #[test]
    fn sessions_are_numbered_from_zero() {
        let (_, _, worker_metrics) = worker_metrics();
        assert_eq!((worker_metrics.next_session(), worker_metrics.next_session()), (0, 1));
    }
}
