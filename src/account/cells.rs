//! What one worker counts, and what a scrape reads of it.

use std::sync::{Arc, Mutex, OnceLock};

use super::attempt::Connect;
use super::latency::Recorder;
use super::loss::Loss;
use super::tally::Tally;
use super::{Cell64, EachWay, Label, lock};
use crate::outcome::Outcome;

/// What is counted for one listener, tenant and pool. Before a session's tenant is known, the two are empty.
#[derive(Debug)]
pub struct RouteCells {
    /// The listener.
    pub listener: Label,
    /// The tenant, or the empty name.
    pub tenant: Label,
    /// The pool, or the empty name.
    pub pool: Label,
    /// Sessions now.
    pub active: Cell64,
    /// Bytes forwarded.
    pub bytes: EachWay<Cell64>,
    /// By the places of outcomes.
    pub(super) ended: Tally,
    /// Once there is a datagram.
    pub(super) flows: OnceLock<Box<FlowCells>>,
}

/// What is counted of the datagrams of a route.
#[derive(Debug, Default)]
pub(super) struct FlowCells {
    pub(super) datagrams: EachWay<Cell64>,
    pub(super) lost: [EachWay<Cell64>; Loss::ALL.len()],
    pub(super) would_lose: [EachWay<Cell64>; Loss::LIMITS.len()],
}

impl RouteCells {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(listener: Label, tenant: Label, pool: Label) -> Self {
        Self {
            listener,
            tenant,
            pool,
            active: Cell64::default(),
            bytes: EachWay::default(),
            ended: Tally::default(),
            flows: OnceLock::new(),
        }
    }

    pub(super) fn flows(&self) -> &FlowCells {
        self.flows.get_or_init(Box::default)
    }

    /// Datagrams forwarded.
    #[must_use]
    pub fn datagrams(&self) -> EachWay<u64> {
        self.flows.get().map_or_else(EachWay::default, |flows| flows.datagrams.values())
    }

    /// Every limit that would have dropped datagrams, were it not only observed, with how many.
    pub fn would_lose(&self) -> impl Iterator<Item = (Loss, EachWay<u64>)> {
        let flows = self.flows.get().into_iter();
        flows.flat_map(|flows| Loss::LIMITS.into_iter().zip(flows.would_lose.iter().map(EachWay::values)))
    }

    /// Every reason to drop a datagram, with how many were.
    pub fn lost(&self) -> impl Iterator<Item = (Loss, EachWay<u64>)> {
        let flows = self.flows.get().into_iter();
        flows.flat_map(|flows| Loss::ALL.into_iter().zip(flows.lost.iter().map(EachWay::values)))
    }

    /// Every outcome that has occurred, with its count.
    pub fn ended(&self) -> impl Iterator<Item = (Outcome, u64)> {
        self.ended.counts().filter_map(|(place, count)| Some((*Outcome::ALL.get(place)?, count)))
    }
}

/// What is counted for one listener.
#[derive(Debug)]
pub struct ListenerCells {
    /// The listener.
    pub listener: Label,
    /// Connections accepted.
    pub accepted: Cell64,
    /// Sessions and flows that came from another process.
    pub taken_over: Cell64,
    /// Accept errors that were the peer's: it had gone already.
    pub errors_peer: Cell64,
    /// Accept errors for want of descriptors or memory.
    pub errors_shortage: Cell64,
    /// Accept errors that stopped the listener.
    pub errors_fatal: Cell64,
    /// Sessions without a whole header, now.
    pub pending: Cell64,
    /// Datagrams that the kernel dropped because a socket's queue was full, where the listener is UDP: to backends at the
    /// listening sockets, to clients at the flows' own.
    pub overflowed: OnceLock<EachWay<Cell64>>,
    /// From accept to the end, of the sessions that are logged.
    pub duration: Recorder,
}

/// What is counted for one backend of one pool.
#[derive(Debug)]
pub struct BackendCells {
    /// The pool.
    pub pool: Label,
    /// The backend.
    pub backend: Label,
    /// Sessions now.
    pub active: Cell64,
    /// Bytes forwarded.
    pub bytes: EachWay<Cell64>,
    pub(super) connects: [Cell64; Connect::ALL.len()],
}

impl ListenerCells {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(listener: Label) -> Self {
        Self {
            listener,
            accepted: Cell64::default(),
            taken_over: Cell64::default(),
            errors_peer: Cell64::default(),
            errors_shortage: Cell64::default(),
            errors_fatal: Cell64::default(),
            pending: Cell64::default(),
            overflowed: OnceLock::new(),
            duration: Recorder::default(),
        }
    }
}

impl PoolCells {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(pool: Label) -> Self {
        Self { pool, connect_time: Recorder::default() }
    }
}

impl BackendCells {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(pool: Label, backend: Label) -> Self {
        Self {
            pool,
            backend,
            active: Cell64::default(),
            bytes: EachWay::default(),
            connects: Default::default(),
        }
    }

    /// Counts an attempt to connect.
    pub(super) fn count(&self, result: Connect) {
        if let Some(count) = self.connects.get(result as usize) {
            count.add(1);
        }
    }

    /// Every result of an attempt to connect with its count.
    pub fn connects(&self) -> impl Iterator<Item = (Connect, u64)> {
        Connect::ALL.into_iter().zip(self.connects.iter().map(Cell64::value))
    }
}

/// What is counted for one pool.
#[derive(Debug)]
pub struct PoolCells {
    /// The pool.
    pub pool: Label,
    /// How long successful attempts to connect took.
    pub connect_time: Recorder,
}

/// What is counted for a worker.
#[derive(Debug, Default)]
pub struct WorkerCells {
    /// Sessions whose tenant was found: health checks and strangers are not among them.
    pub identified: Cell64,
    /// Bytes that went through a buffer.
    pub copied: EachWay<Cell64>,
    /// Bytes that went through a pipe, and never into user space.
    pub spliced: EachWay<Cell64>,
    /// Nanoseconds within the calls that begin a connection to a backend.
    pub connect_calls: Cell64,
    /// Pipes that sessions hold now.
    pub pipes: Cell64,
    /// Times that a session wanted a pipe and none was to be had: it went on copying.
    pub pipes_refused: Cell64,
    /// Reads that were kept small because the memory for slow readers was short.
    pub buffers_refused: Cell64,
    /// Fresh connections handed to a worker with fewer sessions.
    pub handed_over: Cell64,
    /// Cells that were made: for a listener, a tenant, a pool or a backend that had none here.
    pub cells_made: Cell64,
    /// Cells of what is configured no more that were added to an aggregate.
    pub cells_folded: Cell64,
    /// Passes over the cells that left some of what is gone, because they are in use.
    pub busy_passes: Cell64,
    /// Turns of its clock: it stands still where the worker does.
    pub ticks: Cell64,
}

/// One worker's cells, as a scrape reads them.
#[derive(Debug, Default)]
pub struct Shard {
    pub(super) routes: Mutex<Vec<Arc<RouteCells>>>,
    pub(super) listeners: Mutex<Vec<Arc<ListenerCells>>>,
    pub(super) backends: Mutex<Vec<Arc<BackendCells>>>,
    pub(super) pools: Mutex<Vec<Arc<PoolCells>>>,
    /// The worker's own.
    pub worker: WorkerCells,
}

impl Shard {
    /// All routes so far.
    #[must_use]
    pub fn routes(&self) -> Vec<Arc<RouteCells>> {
        lock(&self.routes).clone()
    }

    /// All listeners so far.
    #[must_use]
    pub fn listeners(&self) -> Vec<Arc<ListenerCells>> {
        lock(&self.listeners).clone()
    }

    /// All backends so far.
    #[must_use]
    pub fn backends(&self) -> Vec<Arc<BackendCells>> {
        lock(&self.backends).clone()
    }

    /// All pools so far.
    #[must_use]
    pub fn pools(&self) -> Vec<Arc<PoolCells>> {
        lock(&self.pools).clone()
    }
}
