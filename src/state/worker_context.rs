//! What the sessions, flows and tasks of one worker share.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use super::rejection_log::RejectionLog;
use super::{LiveState, Snapshot};
use crate::account::Label;
use crate::account::log::{AccessLogger, LogSender};
use crate::account::session_metrics::WorkerMetrics;
use crate::clock;
use crate::session_context::WorkerLocal;

/// What one worker thread has once, for its sessions, its flows and the server's tasks.
#[derive(Debug)]
pub struct WorkerContext {
    /// Its number, from 0.
    pub number: u16,
    /// What all workers share.
    pub live: Arc<LiveState>,
    /// Its counters.
    pub metrics: Rc<WorkerMetrics>,
    /// Its timing wheel, its scratch buffer, and how far its drain and its transfer are. Apart, because every session's
    /// [context](crate::session_context::SessionContext) holds it on floors below the live state.
    pub local: Rc<WorkerLocal>,
    /// Its end of the access log.
    pub access_log: AccessLogger,
    /// What it has left out of that.
    pub rejections: RejectionLog,
    snapshot: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
}

impl WorkerContext {
    /// The context of the worker with this number; `None` where there are fewer workers.
    #[must_use]
    pub fn new(number: u16, live: &Arc<LiveState>, access_log: Option<LogSender>) -> Option<Rc<Self>> {
        let shard = live.shards.get(usize::from(number))?;
        let metrics = WorkerMetrics::new(Arc::clone(shard), live.labels.intern(""));
        // Beyond all numbers that the process before this one has given, which would have had to take on 65,536 sessions in
        // each second.
        metrics.start_session_numbers_at(clock::unix().as_secs() << 16);
        Some(Rc::new(Self {
            number,
            live: Arc::clone(live),
            metrics,
            local: WorkerLocal::new(clock::now()),
            access_log: AccessLogger::new(access_log),
            rejections: RejectionLog::default(),
            snapshot: RefCell::new(Cache::new(Arc::clone(&live.snapshot))),
        }))
    }

    /// The snapshot in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(self.snapshot.borrow_mut().load())
    }

    /// Looks something up in the snapshot in force, without a reference to it: all workers count those in one place.
    pub fn with_snapshot<T>(&self, look_up: impl FnOnce(&Snapshot) -> T) -> T {
        look_up(self.snapshot.borrow_mut().load())
    }

    /// The name of the listener at this place.
    pub fn listener_label(&self, listener: u32) -> Option<Label> {
        self.with_snapshot(|snapshot| Some(snapshot.listeners.get(listener as usize)?.label.clone()))
    }
}
