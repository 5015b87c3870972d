//! Counters of removed names: once idle, they are added to an aggregate and dropped.
//!
//! A name that is gone stands as [`REMOVED`] in the aggregate, so sums over the names that stay never fall. The worker folds
//! its own counters, a slice at each tick; counters that a session or a scrape holds are left for a later pass.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use super::super::counters::FlowCounters;
use super::{BackendCounters, Index, ListenerCounters, PoolCounters, RouteCounters, WorkerMetrics};
use crate::account::{Counter64, udp_drops::DatagramDrop};
use crate::account::{Direction, Label, Labels, PerDirection, lock};

/// The name of what is gone, in the labels of metrics.
pub const REMOVED: &str = "(removed)";

/// Cells that a worker looks at in one tick: a tenth of a millisecond or two.
const SLICE: usize = 4096;

/// Numbers of labels.
#[derive(Debug, Default)]
struct LabelNumbers(Vec<u64>);

impl LabelNumbers {
    fn of(numbers: impl Iterator<Item = u32>) -> Self {
        let mut set = Self::default();
        for number in numbers {
            let place = number as usize / 64;
            if set.0.len() <= place {
                set.0.resize(place + 1, 0);
            }
            set.0.get_mut(place).into_iter().for_each(|bits| *bits |= 1 << (number % 64));
        }
        set
    }

    fn contains(&self, number: u32) -> bool {
        self.0.get(number as usize / 64).is_some_and(|bits| bits & (1 << (number % 64)) != 0)
    }
}

/// The configured names, by label number. A number that has been reused does no harm: a counter is folded
/// early, or one pass later.
#[derive(Debug)]
pub struct ConfiguredLabels {
    /// The number of the pass.
    pass: u64,
    removed: Label,
    listeners: LabelNumbers,
    tenants: LabelNumbers,
    pools: LabelNumbers,
    /// By pool and backend.
    backends: HashSet<(u32, u32)>,
}

impl ConfiguredLabels {
    /// What no pass is made for.
    #[must_use]
    pub fn none(labels: &Labels) -> Self {
        let none = std::iter::empty::<u32>;
        Self::new(labels, 0, [none(), none(), none()], std::iter::empty())
    }

    /// For another pass: the numbers of listeners, tenants and pools, and those of pools with their backends.
    pub fn new<N: Iterator<Item = u32>>(
        labels: &Labels,
        turn: u64,
        [listeners, tenants, pools]: [N; 3],
        backends: impl Iterator<Item = (u32, u32)>,
    ) -> Self {
        Self {
            pass: turn,
            removed: labels.intern(REMOVED),
            listeners: LabelNumbers::of(listeners),
            tenants: LabelNumbers::of(tenants),
            pools: LabelNumbers::of(pools),
            backends: backends.collect(),
        }
    }

    /// The number of the pass.
    #[must_use]
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// The label, or the one of what is gone. The empty name, of what is not known yet, is never gone.
    fn keep_configured(&self, set: &LabelNumbers, label: &Label) -> Label {
        let stays = label.name().is_empty() || set.contains(label.serial());
        if stays { label.clone() } else { self.removed.clone() }
    }
}

/// Counters that can be folded into an aggregate.
trait Fold: Sized {
    type Key: Copy + Eq + Hash;

    fn key(&self) -> Self::Key;

    /// Empty counters of the aggregate that these belong to; of their own key if no name of theirs is removed.
    fn aggregate(&self, configured: &ConfiguredLabels) -> Self;

    /// Whether a name of their labels is removed.
    fn is_removed(&self, configured: &ConfiguredLabels) -> bool;

    fn add(&self, other: &Self);
}

fn add(to: &Counter64, from: &Counter64) {
    to.add(from.value());
}

fn add_per_direction(to: &PerDirection<Counter64>, from: &PerDirection<Counter64>) {
    for way in Direction::ALL {
        add(to.of(way), from.of(way));
    }
}

impl Fold for RouteCounters {
    type Key = (u32, u32, u32);

    fn key(&self) -> Self::Key {
        (self.listener.serial(), self.tenant.serial(), self.pool.serial())
    }

    fn is_removed(&self, configured: &ConfiguredLabels) -> bool {
        let stays =
            |set: &LabelNumbers, label: &Label| set.contains(label.serial()) || label.name().is_empty();
        !(stays(&configured.tenants, &self.tenant)
            && stays(&configured.pools, &self.pool)
            && stays(&configured.listeners, &self.listener))
    }

    fn aggregate(&self, configured: &ConfiguredLabels) -> Self {
        Self::new(
            configured.keep_configured(&configured.listeners, &self.listener),
            configured.keep_configured(&configured.tenants, &self.tenant),
            configured.keep_configured(&configured.pools, &self.pool),
        )
    }

    fn add(&self, other: &Self) {
        add(&self.active, &other.active);
        add_per_direction(&self.bytes, &other.bytes);
        other.ended.counts().for_each(|(place, count)| self.ended.add(place, count));
        let Some(theirs) = other.flows.get() else { return };
        let own = self.flows.get_or_init(|| Box::new(FlowCounters::default()));
        add_per_direction(&own.datagrams, &theirs.datagrams);
        for drop in DatagramDrop::ALL {
            let pairs = [own.dropped.get(drop as usize), theirs.dropped.get(drop as usize)];
            if let [Some(own), Some(theirs)] = pairs {
                add_per_direction(own, theirs);
            }
        }
        own.would_drop
            .iter()
            .zip(&theirs.would_drop)
            .for_each(|(own, theirs)| add_per_direction(own, theirs));
    }
}

impl Fold for ListenerCounters {
    type Key = u32;

    fn key(&self) -> Self::Key {
        self.listener.serial()
    }

    fn is_removed(&self, configured: &ConfiguredLabels) -> bool {
        !configured.listeners.contains(self.listener.serial())
    }

    fn aggregate(&self, configured: &ConfiguredLabels) -> Self {
        Self::new(configured.keep_configured(&configured.listeners, &self.listener))
    }

    fn add(&self, other: &Self) {
        for (own, theirs) in [
            (&self.accepted, &other.accepted),
            (&self.taken_over, &other.taken_over),
            (&self.errors_peer, &other.errors_peer),
            (&self.errors_shortage, &other.errors_shortage),
            (&self.errors_fatal, &other.errors_fatal),
            (&self.pending, &other.pending),
        ] {
            add(own, theirs);
        }
        if let Some(theirs) = other.overflowed.get() {
            add_per_direction(self.overflowed.get_or_init(PerDirection::default), theirs);
        }
        self.duration.add(&other.duration);
    }
}

impl Fold for BackendCounters {
    type Key = (u32, u32);

    fn key(&self) -> Self::Key {
        (self.pool.serial(), self.backend.serial())
    }

    fn is_removed(&self, configured: &ConfiguredLabels) -> bool {
        !configured.backends.contains(&self.key())
    }

    fn aggregate(&self, configured: &ConfiguredLabels) -> Self {
        Self::new(configured.keep_configured(&configured.pools, &self.pool), configured.removed.clone())
    }

    fn add(&self, other: &Self) {
        add(&self.active, &other.active);
        add_per_direction(&self.bytes, &other.bytes);
        self.connects.iter().zip(&other.connects).for_each(|(own, theirs)| add(own, theirs));
    }
}

impl Fold for PoolCounters {
    type Key = u32;

    fn key(&self) -> Self::Key {
        self.pool.serial()
    }

    fn is_removed(&self, configured: &ConfiguredLabels) -> bool {
        !self.pool.name().is_empty() && !configured.pools.contains(self.pool.serial())
    }

    fn aggregate(&self, configured: &ConfiguredLabels) -> Self {
        Self::new(configured.keep_configured(&configured.pools, &self.pool))
    }

    fn add(&self, other: &Self) {
        self.connect_time.add(&other.connect_time);
    }
}

/// The result of one slice of a pass.
#[derive(Debug, Default)]
struct FoldedSlice {
    /// Where the next slice begins; none after the last.
    next: Option<usize>,
    folded: u64,
    /// Cells that are gone and in use.
    busy: u64,
}

fn fold<C: Fold>(
    index: &Index<C::Key, C>,
    published: &Mutex<Vec<Arc<C>>>,
    from: usize,
    slice: usize,
    configured: &ConfiguredLabels,
) -> FoldedSlice {
    let (mut index, mut counters) = (index.borrow_mut(), lock(published));
    let (mut at, mut done) = (from, FoldedSlice::default());
    for _ in 0..slice {
        let Some(own) = counters.get(at) else { break };
        let into = own.is_removed(configured).then(|| own.aggregate(configured));
        let into = into.filter(|into| into.key() != own.key());
        let Some(into) = into else {
            at += 1;
            continue;
        };
        // The index and this list hold one reference each. With more, a session still counts there, or a scrape has not
        // read it yet and would count it twice, here and in the aggregate.
        if Arc::strong_count(own) > 2 {
            done.busy += 1;
            at += 1;
            continue;
        }
        let gone = counters.swap_remove(at);
        index.remove(&gone.key());
        let into = index.entry(into.key()).or_insert_with(|| {
            let into = Arc::new(into);
            counters.push(Arc::clone(&into));
            into
        });
        into.add(&gone);
        done.folded += 1;
    }
    if at < counters.len() {
        done.next = Some(at);
    } else if counters.capacity() > 4 * counters.len().max(SLICE) {
        let room = 2 * counters.len();
        counters.shrink_to(room);
        index.shrink_to(room);
    }
    done
}

impl WorkerMetrics {
    /// Continues a due pass over all counters, if any. Call it once in each tick, by the worker.
    pub fn fold(&self, configured: &ConfiguredLabels) {
        if self.folding.turn.get() == configured.pass {
            return;
        }
        let (worker, folding) = (&self.shard.worker, &self.folding);
        let count = |done: &FoldedSlice| {
            worker.counters_folded.add(done.folded);
            folding.busy.set(folding.busy.get() + done.busy);
        };
        if folding.at.get() == 0 {
            // These are few, so they are folded in one step.
            count(&fold(&self.listeners, &self.shard.listeners, 0, usize::MAX, configured));
            count(&fold(&self.backends, &self.shard.backends, 0, usize::MAX, configured));
            count(&fold(&self.pools, &self.shard.pools, 0, usize::MAX, configured));
        }
        let done = fold(&self.routes, &self.shard.routes, folding.at.get(), SLICE, configured);
        count(&done);
        folding.at.set(done.next.unwrap_or(0));
        if done.next.is_none() {
            folding.turn.set(configured.pass);
            if folding.busy.take() > 0 {
                worker.busy_passes.add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use super::super::{ConnectResult, CounterShard, SessionMetrics};
    use super::*;
    use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};

    struct World {
        labels: Labels,
        shard: Arc<CounterShard>,
        worker_metrics: Rc<WorkerMetrics>,
    }

    impl World {
        fn new() -> Self {
            let (labels, shard) = (Labels::default(), Arc::new(CounterShard::default()));
            let worker_metrics = WorkerMetrics::new(Arc::clone(&shard), labels.intern(""));
            Self { labels, shard, worker_metrics }
        }

        fn session(&self, listener: &str, tenant: &str, pool: &str) -> SessionMetrics {
            let mut metrics =
                SessionMetrics::new(Rc::clone(&self.worker_metrics), &self.labels.intern(listener));
            metrics.assign_tenant(&self.labels.intern(tenant), Some(&self.labels.intern(pool)));
            metrics.count_connect(&self.labels.intern("10.0.0.1:80"), ConnectResult::Done);
            metrics.record_connect_time(Duration::from_millis(1));
            metrics.count_bytes(Direction::ToClient, 10, false);
            metrics
        }

        /// A whole pass with these listeners, tenants, and pools with one backend.
        fn pass(&self, turn: u64, listeners: &[&str], tenants: &[&str], pools: &[&str]) {
            let numbers = |names: &[&str]| {
                names.iter().map(|name| self.labels.intern(name).serial()).collect::<Vec<_>>().into_iter()
            };
            let backend = self.labels.intern("10.0.0.1:80").serial();
            let backends = numbers(pools).map(|pool| (pool, backend));
            let all = [numbers(listeners), numbers(tenants), numbers(pools)];
            let configured = ConfiguredLabels::new(&self.labels, turn, all, backends);
            while self.worker_metrics.folding.turn.get() != turn {
                self.worker_metrics.fold(&configured);
            }
        }

        /// Bytes of each route.
        fn routes(&self) -> Vec<(String, u64)> {
            let name = |route: &RouteCounters| {
                [&route.listener, &route.tenant, &route.pool].map(|label| label.name().to_owned()).join("/")
            };
            let routes = self.shard.routes();
            let mut rows: Vec<_> =
                routes.iter().map(|route| (name(route), route.bytes.to_client.value())).collect();
            rows.sort();
            rows
        }
    }

    const DONE: Outcome = Outcome::new(EndedBy::Client, EndedAt::Forward, Reason::Done);

    fn rows(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
        rows.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect()
    }

    #[test]
    fn counts_of_removed_tenants_go_to_one_row_and_sums_stay() {
        let world = World::new();
        for tenant in ["acme", "globex", "initech"] {
            world.session("web", tenant, "app").end(DONE, Duration::from_millis(1));
        }
        world.pass(1, &["web"], &["acme"], &["app"]);
        let expected = [("web/(removed)/app", 20), ("web//", 0), ("web/acme/app", 10)];
        assert_eq!(world.routes(), rows(&expected));
        let ended = world
            .shard
            .routes()
            .iter()
            .flat_map(|route| route.ended().map(|(_, count)| count).collect::<Vec<_>>())
            .sum::<u64>();
        assert_eq!((ended, world.shard.worker.counters_folded.value()), (3, 2));
        // Passes over what is folded change nothing, and a tenant that comes back begins anew.
        world.pass(2, &["web"], &["acme"], &["app"]);
        assert_eq!(world.routes(), rows(&expected));
        world.session("web", "globex", "app").end(DONE, Duration::ZERO);
        assert_eq!(world.routes().last().unwrap(), &("web/globex/app".to_owned(), 10));
        assert_eq!(world.shard.worker.busy_passes.value(), 0);
    }

    #[test]
    fn counts_of_removed_listeners_pools_and_backends_go_to_their_own_rows() {
        let world = World::new();
        for (listener, pool) in [("web", "app"), ("old", "app"), ("web", "gone")] {
            world.session(listener, "acme", pool).end(DONE, Duration::from_millis(1));
        }
        world.pass(1, &["web"], &["acme"], &["app"]);
        let expected = [
            ("(removed)//", 0),
            ("(removed)/acme/app", 10),
            ("web//", 0),
            ("web/acme/(removed)", 10),
            ("web/acme/app", 10),
        ];
        assert_eq!(world.routes(), rows(&expected));
        let listeners = world.shard.listeners();
        let listeners: Vec<_> =
            listeners.iter().map(|counters| (counters.listener.name(), counters.accepted.value())).collect();
        assert_eq!(listeners, [("web", 2), (REMOVED, 1)]);
        let (backends, pools) = (world.shard.backends(), world.shard.pools());
        let of =
            |counters: &BackendCounters| (counters.pool.name().to_owned(), counters.bytes.to_client.value());
        let backends: Vec<_> = backends.iter().map(|counters| of(counters)).collect();
        assert_eq!(backends, [("app".to_owned(), 20), (REMOVED.to_owned(), 10)]);
        assert_eq!(pools.iter().map(|counters| counters.connect_time.times().count()).sum::<u64>(), 3);
    }

    #[test]
    fn cells_that_a_session_or_a_scrape_holds_are_folded_later() {
        let world = World::new();
        let live = world.session("web", "acme", "app");
        world.session("web", "globex", "app").end(DONE, Duration::ZERO);
        let scrape = world.shard.routes();
        world.pass(1, &["web"], &[], &["app"]);
        assert_eq!(world.shard.worker.busy_passes.value(), 1);
        assert_eq!(world.routes().len(), 3);
        drop(scrape);
        world.pass(2, &["web"], &[], &["app"]);
        assert_eq!(world.routes(), rows(&[("web/(removed)/app", 10), ("web//", 0), ("web/acme/app", 10)]));
        live.end(DONE, Duration::ZERO);
        world.pass(3, &["web"], &[], &["app"]);
        assert_eq!(world.routes(), rows(&[("web/(removed)/app", 20), ("web//", 0)]));
        assert_eq!(world.shard.worker.busy_passes.value(), 2);
        assert!(world.shard.routes().iter().all(|route| route.active.value() == 0));
    }

    #[test]
    fn added_and_removed_names_leave_no_memory() {
        let world = World::new();
        for turn in 1..=20 {
            for number in 0..SLICE {
                world.session("web", &format!("tenant-{turn}-{number}"), "app").end(DONE, Duration::ZERO);
            }
            world.pass(turn, &["web"], &[], &["app"]);
            world.labels.forget_unused(|_| false);
            assert_eq!((world.shard.routes().len(), world.worker_metrics.routes.borrow().len()), (2, 2));
            assert!(world.labels.count() < 10, "{} names", world.labels.count());
        }
        assert_eq!(world.routes(), rows(&[("web/(removed)/app", 20 * SLICE as u64 * 10), ("web//", 0)]));
        let highest = world.labels.intern("another").serial() as usize;
        assert!(highest < 2 * SLICE, "numbers are given again: {highest}");
    }
}
