//! The control thread's work for pools: probes, lookups and timers.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::failure;
use crate::account::dns_counters::LookupCounters;
use crate::account::lock;
use crate::clock;
use crate::config::BackendTarget;
use crate::pool::Pool;
use crate::pool::backend::Backend;
use crate::probe::{self, ProbeSlots, ProbeStagger};
use crate::resolve::{self, Resolver};
use crate::state::LiveState;

/// How often pools are looked at: an ejection reaches a pool's weights within this, and a slow start goes on.
const EVERY: Duration = Duration::from_millis(100);

/// Looks at pools from one sweep to the next: a second. What is gone and idle leaves the metrics within two of them, and the
/// time of the workers' pass.
const SWEEPING: u32 = 10;

/// The shared tools of the pool supervisor.
#[derive(Clone)]
pub(super) struct PoolContext {
    pub(super) live: Arc<LiveState>,
    pub(super) probe_slots: Arc<ProbeSlots>,
    /// There where a pool has names.
    pub(super) resolver: Arc<OnceLock<Arc<Resolver>>>,
}

/// The probe tasks of one pool's backends, by address, with the identity of each backend.
type Probes = Arc<Mutex<HashMap<SocketAddr, (usize, AbortHandle)>>>;

/// A supervised pool with its tasks.
#[derive(Debug)]
struct SupervisedPool {
    pool: Arc<Pool>,
    probes: Probes,
    names: HashMap<BackendTarget, AbortHandle>,
}

impl Drop for SupervisedPool {
    fn drop(&mut self) {
        lock(&self.probes).values().for_each(|(_, task)| task.abort());
        self.names.values().for_each(AbortHandle::abort);
    }
}

/// Starts it all, for as long as the runtime lives; `changed` is told when a reload has brought other pools.
pub(super) fn start(context: &PoolContext, changed: Arc<Notify>) {
    let supervised = context.begin();
    let live = Arc::clone(&context.live);
    // Without it, pools that reloads bring would never be probed.
    let following = follow(context.clone(), supervised, changed);
    tokio::spawn(failure::essential("the probes of pools that reloads bring", following));
    tokio::spawn(async move {
        // Without it no ejection would end.
        while let Err(error) = tokio::spawn(run_due(Arc::clone(&live))).await {
            tracing::error!(%error, "internal error while maintaining pools; it continues");
        }
    });
}

/// Goes on with the pools that each reload brings.
async fn follow(context: PoolContext, mut supervised: HashMap<String, SupervisedPool>, changed: Arc<Notify>) {
    loop {
        changed.notified().await;
        let snapshot = context.live.snapshot.load_full();
        let mut before = std::mem::take(&mut supervised);
        for pool in &snapshot.pools {
            let name = pool.label.name();
            let entry = before.remove(name).unwrap_or_else(|| SupervisedPool {
                pool: Arc::clone(pool),
                probes: Arc::default(),
                names: HashMap::new(),
            });
            supervised.insert(name.to_owned(), context.update(entry, pool));
        }
        // The tasks of the others end.
        drop(before);
    }
}

/// A backend that a task probes. Where the task panics, the start does not wait for its first probe any more.
struct ProbeGuard(Arc<Backend>);

impl Drop for ProbeGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(backend = self.0.label().name(), "internal error: a backend is no longer probed");
            self.0.give_up_first_probe();
        }
    }
}

/// The lookups of a name by a task. However that ends, the start waits no longer for the first.
struct LookupGuard(Option<Arc<LookupCounters>>);

impl Drop for LookupGuard {
    fn drop(&mut self) {
        self.0.iter().for_each(|lookups| lookups.finish_first());
    }
}

impl PoolContext {
    /// Looks after the first pools of all.
    fn begin(&self) -> HashMap<String, SupervisedPool> {
        let snapshot = self.live.snapshot.load_full();
        let is_probed = |pool: &&Arc<Pool>| pool.probe.is_some();
        let of = snapshot.pools.iter().filter(is_probed).map(|pool| pool.candidates().backends().len()).sum();
        let mut places = 0..;
        let supervised = |pool: &Arc<Pool>| {
            let probes = Probes::default();
            for backend in pool.candidates().backends().iter().filter(|_| pool.probe.is_some()) {
                let turn = ProbeStagger { place: places.next().unwrap_or(0), of };
                self.probe(&probes, pool, backend, turn);
            }
            let mut names = HashMap::new();
            for target in pool.names() {
                names.insert(target.clone(), self.look_up(&probes, pool, target));
            }
            (pool.label.name().to_owned(), SupervisedPool { pool: Arc::clone(pool), probes, names })
        };
        snapshot.pools.iter().map(supervised).collect()
    }

    /// Goes on with a pool, or the one in its place: probes and lookups of what is there still are not disturbed.
    fn update(&self, mut supervised: SupervisedPool, pool: &Arc<Pool>) -> SupervisedPool {
        let is_same = supervised.pool.probe == pool.probe && supervised.pool.sources == pool.sources;
        let names: HashSet<_> = pool.names().collect();
        supervised.names.retain(|target, task| {
            let stays = names.contains(target) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        let backends = pool.backends();
        let identities: HashMap<_, _> =
            backends.iter().map(|backend| (backend.address().0, backend.identity())).collect();
        let unprobed: Vec<_> = {
            let mut probes = lock(&supervised.probes);
            probes.retain(|address, (identity, task)| {
                let stays = is_same && identities.get(address) == Some(identity) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            let is_new = |backend: &&Arc<Backend>| !probes.contains_key(&backend.address().0);
            backends.iter().filter(|_| pool.probe.is_some()).filter(is_new).collect()
        };
        let of = unprobed.len();
        for (place, backend) in unprobed.into_iter().enumerate() {
            self.probe(&supervised.probes, pool, backend, ProbeStagger { place, of });
        }
        for target in names {
            if !supervised.names.contains_key(target) {
                let task = self.look_up(&supervised.probes, pool, target);
                supervised.names.insert(target.clone(), task);
            }
        }
        supervised.pool = Arc::clone(pool);
        supervised
    }

    /// Has a backend probed.
    fn probe(&self, probes: &Probes, pool: &Arc<Pool>, backend: &Arc<Backend>, turn: ProbeStagger) {
        let guard = ProbeGuard(Arc::clone(backend));
        let means = (Arc::clone(&self.probe_slots), Arc::clone(&self.live.ports));
        let probing = probe::run(Arc::clone(pool), Arc::clone(backend), turn, means);
        let task = tokio::spawn(async move {
            let _guard = guard;
            probing.await;
        });
        let before = lock(probes).insert(backend.address().0, (backend.identity(), task.abort_handle()));
        if let Some((_, before)) = before {
            before.abort();
        }
    }

    /// Looks a name up, and has probed what it leads to.
    fn look_up(&self, probes: &Probes, pool: &Arc<Pool>, target: &BackendTarget) -> AbortHandle {
        const AT_ONCE: ProbeStagger = ProbeStagger { place: 0, of: 1 };
        let (context, probes, pool) = (self.clone(), Arc::clone(probes), Arc::clone(pool));
        let target = target.clone();
        let place = pool.names().position(|other| *other == target);
        let looked_up = LookupGuard(place.and_then(|place| pool.lookups().nth(place).cloned()));
        let task = tokio::spawn(async move {
            let Some(resolver) = context.resolver.get().cloned() else { return };
            let fresh = |pool: &Arc<Pool>, backend: Arc<Backend>| {
                if pool.probe.is_some() {
                    context.probe(&probes, pool, &backend, AT_ONCE);
                }
            };
            let first = move || drop(looked_up);
            resolve::run(resolver, pool, target, &context.live.labels, first, fresh).await;
        });
        task.abort_handle()
    }
}

/// Does what is due in each pool, for ever. Costs one read for a pool where nothing is.
async fn run_due(live: Arc<LiveState>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut unswept = 0;
    loop {
        ticks.tick().await;
        live.ports.advance(clock::now());
        live.udp_ports.advance(clock::now());
        // Asked here too: pools that a later reload brings must not find it starting still.
        live.is_starting();
        unswept += 1;
        if unswept == SWEEPING {
            unswept = 0;
            let live = Arc::clone(&live);
            tokio::task::spawn_blocking(move || live.sweep());
        }
        for pool in &live.snapshot.load().pools {
            pool.run_due(clock::now()).iter().for_each(|change| change.log(pool));
        }
        let unused = live.unused();
        if !unused.is_empty() {
            // Not joined: what this thread does not free is freed when the process ends.
            let live = Arc::clone(&live);
            tokio::task::spawn_blocking(move || {
                drop(unused);
                live.forget_unused();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::config::Config;
    use crate::pool::Answers;
    use crate::state::{NotReady, ProcessLimits};

    const MOST: ProcessLimits = ProcessLimits { sessions: 10, pending: 10, pipes: 0 };

    /// A configuration with one pool, all of whose backends accept connections; each is probed once a minute.
    fn config(pool: &str, backends: &[SocketAddr]) -> Arc<Config> {
        let backends: Vec<_> = backends.iter().map(|address| format!("\"{address}\"")).collect();
        let text = format!(
            "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\npool = \"{pool}\"
             [[pool]]\nname = \"{pool}\"\nbackends = [{}]\nhealth = {{ interval = \"60s\", timeout = \"60s\" }}",
            backends.join(", ")
        );
        let text = format!("{text}\n[[tenant]]\nname = \"acme\"\n");
        Arc::new(Config::parse("test.toml", &text).unwrap())
    }

    #[tokio::test]
    async fn backends_of_a_reload_before_the_first_probes_are_probed() {
        let accepting: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<_> = accepting.iter().map(|socket| socket.local_addr().unwrap()).collect();
        // The first configuration has more backends than the one that replaces it, then fewer.
        for (first, second) in [(3, 1), (1, 3)] {
            let live = LiveState::of(config("app", &addresses[..first]), 1, MOST);
            let next = config("other", &addresses[..second]);
            let turn = live.begin_reload(&next).unwrap();
            let changes = turn.put(&next, vec![Vec::new()], &Answers::default(), clock::now());
            assert_eq!((changes.pools.added, changes.pools.removed), (1, 1));
            let context = PoolContext {
                live: Arc::clone(&live),
                probe_slots: Arc::new(ProbeSlots::new(1)),
                resolver: Arc::default(),
            };
            start(&context, Arc::new(Notify::new()));
            let ready = async {
                while live.readiness().is_err() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), ready).await.expect("the process to be ready");
        }
    }

    #[test]
    fn process_that_has_started_does_not_start_again() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let live = LiveState::of(config("app", &[address]), 1, MOST);
        assert_eq!(live.readiness(), Err(NotReady::Starting));
        let pool = Arc::clone(&live.snapshot.load().pools[0]);
        pool.backends()[0].give_up_first_probe();
        assert!(!live.is_starting(), "a backend that no task probes is not waited for");
        let next = config("other", &[address, "127.0.0.1:1".parse().unwrap()]);
        let changes =
            live.begin_reload(&next).unwrap().put(&next, vec![Vec::new()], &Answers::default(), clock::now());
        assert_eq!(changes.pools.added, 1);
        assert!(!live.is_starting());
    }
}
