//! Removed names: workers fold their counters, then the names are dropped.

use std::sync::Arc;

use super::LiveState;
use crate::account::lock;
use crate::account::session_metrics::{ConfiguredLabels, WorkerCounters};
use crate::pool::Pool;

/// Decides whether a fold may be needed: any value differs from the last pass.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FoldTrigger {
    reloads: u64,
    /// Where each pool's backends lie in memory: they are moved where one comes or goes.
    candidates: Vec<usize>,
    made: u64,
    busy_passes: u64,
    folded: u64,
}

impl LiveState {
    /// Forgets the quotas and the names of what is gone.
    pub fn forget_unused(&self) {
        self.quotas.forget_unused();
        self.labels.forget_unused(|number| self.quotas.is_known(number));
    }

    /// Has the workers fold the counts of what is gone, where something may be, and forgets names that are not used any more. To
    /// be called once in a second, by one thread, where that keeps no traffic waiting: with 100,000 tenants it takes
    /// milliseconds.
    pub fn sweep(&self) {
        let snapshot = self.snapshot.load_full();
        let sum =
            |count: fn(&WorkerCounters) -> u64| self.shards.iter().map(|shard| count(&shard.worker)).sum();
        let now = FoldTrigger {
            reloads: self.reloads.done(),
            candidates: snapshot.pools.iter().map(|pool| Arc::as_ptr(&pool.candidates()).addr()).collect(),
            made: sum(|worker| worker.counters_made.value()),
            busy_passes: sum(|worker| worker.busy_passes.value()),
            folded: sum(|worker| worker.counters_folded.value()),
        };
        let mut last = lock(&self.swept);
        if *last == now {
            return;
        }
        if (last.folded, last.reloads) != (now.folded, now.reloads) {
            self.forget_unused();
        }
        let listeners = snapshot.listeners.iter().filter(|listener| !listener.is_retired);
        let listeners: Vec<_> = listeners.map(|listener| listener.label.serial()).collect();
        let tenants = snapshot.directory.tenants().iter().map(|tenant| tenant.label.serial()).collect();
        let pools = snapshot.pools.iter().map(|pool| pool.label.serial()).collect();
        let backends = |pool: &Arc<Pool>| {
            let number = pool.label.serial();
            let backends = pool.candidates().backends().to_vec();
            backends.into_iter().map(move |backend| (number, backend.label().serial()))
        };
        let turn = self.configured.load().pass() + 1;
        let numbers = [listeners, tenants, pools].map(Vec::into_iter);
        let backends = snapshot.pools.iter().flat_map(backends);
        self.configured.store(Arc::new(ConfiguredLabels::new(&self.labels, turn, numbers, backends)));
        *last = now;
    }
}
