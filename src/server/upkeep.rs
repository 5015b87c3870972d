//! What the control thread does for pools: probes, lookups, and what is due by time alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::clock;
use crate::pool::Pool;
use crate::pool::backend::Backend;
use crate::probe::{self, Lanes, Turn};
use crate::resolve::{self, Resolver};
use crate::state::Live;

/// How often pools are looked at: an ejection reaches a pool's weights within this, and a slow start goes on.
const EVERY: Duration = Duration::from_millis(100);

/// What a pool's backends are looked after with.
#[derive(Clone, Debug)]
struct Tools {
    live: Arc<Live>,
    lanes: Arc<Lanes>,
}

/// Starts it all, for as long as the runtime lives. `resolver` is there where a pool has names.
pub(super) fn start(live: &Arc<Live>, lanes: &Arc<Lanes>, resolver: Option<&Arc<Resolver>>) {
    let tools = Tools { live: Arc::clone(live), lanes: Arc::clone(lanes) };
    let snapshot = live.snapshot.load();
    let probed = snapshot.pools.iter().filter(|pool| pool.probe.is_some());
    let probed =
        probed.flat_map(|pool| pool.roster().backends().to_vec().into_iter().map(move |own| (pool, own)));
    let probed: Vec<_> = probed.collect();
    let of = probed.len();
    for (place, (pool, backend)) in probed.into_iter().enumerate() {
        tools.probe(pool, backend, Turn { place, of }, known(live));
    }
    for pool in &snapshot.pools {
        for (place, resolver) in (0..pool.names().count()).zip(std::iter::repeat(resolver)) {
            let Some(resolver) = resolver.cloned() else { continue };
            tokio::spawn(tools.clone().follow(resolver, Arc::clone(pool), place));
        }
    }
    let live = Arc::clone(live);
    tokio::spawn(async move {
        // Without it no ejection would end.
        while let Err(error) = tokio::spawn(tend(Arc::clone(&live))).await {
            tracing::error!(%error, "a fault in vestibule itself while pools were tended; it goes on");
        }
    });
}

/// What is called when the first word of a backend or a name is in. It counts when it is dropped, whatever happened: the
/// process must not be starting for ever.
fn known(live: &Arc<Live>) -> impl FnOnce() + Send + use<> {
    let awaited = Awaited(Arc::clone(live));
    move || drop(awaited)
}

struct Awaited(Arc<Live>);

impl Drop for Awaited {
    fn drop(&mut self) {
        self.0.unprobed.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Tools {
    fn probe(
        &self,
        pool: &Arc<Pool>,
        backend: Arc<Backend>,
        turn: Turn,
        first: impl FnOnce() + Send + 'static,
    ) {
        tokio::spawn(probe::run(Arc::clone(pool), backend, turn, Arc::clone(&self.lanes), first));
    }

    /// Looks a name up, and has probed what it leads to. The process is starting until those of the first answer are
    /// known too.
    async fn follow(self, resolver: Arc<Resolver>, pool: Arc<Pool>, place: usize) {
        const AT_ONCE: Turn = Turn { place: 0, of: 1 };
        let Some(lookups) = pool.lookups().nth(place).cloned() else { return };
        let (is_known, name_known) = (AtomicBool::new(false), known(&self.live));
        let fresh = |backend: Arc<Backend>| {
            if pool.probe.is_none() {
                return;
            }
            if is_known.load(Ordering::Acquire) {
                self.probe(&pool, backend, AT_ONCE, || ());
            } else {
                self.live.unprobed.fetch_add(1, Ordering::AcqRel);
                self.probe(&pool, backend, AT_ONCE, known(&self.live));
            }
        };
        let first = || {
            is_known.store(true, Ordering::Release);
            name_known();
        };
        resolve::run(resolver, Arc::clone(&pool), place, lookups, &self.live.labels, first, fresh).await;
    }
}

/// Does what is due in each pool, for ever. Costs one read for a pool where nothing is.
async fn tend(live: Arc<Live>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for pool in &live.snapshot.load().pools {
            pool.tend(clock::now()).iter().for_each(|change| change.log(pool));
        }
    }
}
