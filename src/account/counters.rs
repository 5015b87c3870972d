//! The counters of one worker, as written by it and read by a scrape.

use std::sync::{Arc, Mutex, OnceLock};

use super::connect_counters::ConnectResult;
use super::latency::LatencyRecorder;
use super::sparse_counters::SparseCounters;
use super::udp_drops::DatagramDrop;
use super::{Counter64, Label, PerDirection, lock};
use crate::outcome::Outcome;

/// Counters of one listener, tenant and pool. Tenant and pool are empty until a session's tenant is known.
#[derive(Debug)]
pub struct RouteCounters {
    /// The listener.
    pub listener: Label,
    /// The tenant, or the empty name.
    pub tenant: Label,
    /// The pool, or the empty name.
    pub pool: Label,
    /// Sessions now.
    pub active: Counter64,
    /// Bytes forwarded.
    pub bytes: PerDirection<Counter64>,
    /// By the places of outcomes.
    pub(super) ended: SparseCounters,
    /// Once there is a datagram.
    pub(super) flows: OnceLock<Box<FlowCounters>>,
}

/// Datagram counters of a route.
#[derive(Debug, Default)]
pub(super) struct FlowCounters {
    pub(super) datagrams: PerDirection<Counter64>,
    pub(super) dropped: [PerDirection<Counter64>; DatagramDrop::ALL.len()],
    pub(super) would_drop: [PerDirection<Counter64>; DatagramDrop::LIMITS.len()],
}

impl RouteCounters {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(listener: Label, tenant: Label, pool: Label) -> Self {
        Self {
            listener,
            tenant,
            pool,
            active: Counter64::default(),
            bytes: PerDirection::default(),
            ended: SparseCounters::default(),
            flows: OnceLock::new(),
        }
    }

    pub(super) fn flows(&self) -> &FlowCounters {
        self.flows.get_or_init(Box::default)
    }

    /// Datagrams forwarded.
    #[must_use]
    pub fn datagrams(&self) -> PerDirection<u64> {
        self.flows.get().map_or_else(PerDirection::default, |flows| flows.datagrams.values())
    }

    /// Datagrams that each limit would have dropped in enforce mode.
    pub fn would_drop(&self) -> impl Iterator<Item = (DatagramDrop, PerDirection<u64>)> {
        let flows = self.flows.get().into_iter();
        flows.flat_map(|flows| {
            DatagramDrop::LIMITS.into_iter().zip(flows.would_drop.iter().map(PerDirection::values))
        })
    }

    /// Dropped datagrams by reason.
    pub fn dropped(&self) -> impl Iterator<Item = (DatagramDrop, PerDirection<u64>)> {
        let flows = self.flows.get().into_iter();
        flows.flat_map(|flows| {
            DatagramDrop::ALL.into_iter().zip(flows.dropped.iter().map(PerDirection::values))
        })
    }

    /// Ended sessions by outcome.
    pub fn ended(&self) -> impl Iterator<Item = (Outcome, u64)> {
        self.ended.counts().filter_map(|(place, count)| Some((*Outcome::ALL.get(place)?, count)))
    }
}

/// Counters of one listener.
#[derive(Debug)]
pub struct ListenerCounters {
    /// The listener.
    pub listener: Label,
    /// Connections accepted.
    pub accepted: Counter64,
    /// Sessions and flows that came from another process.
    pub taken_over: Counter64,
    /// Accept errors that were the peer's: it had gone already.
    pub errors_peer: Counter64,
    /// Accept errors for want of descriptors or memory.
    pub errors_shortage: Counter64,
    /// Accept errors that stopped the listener.
    pub errors_fatal: Counter64,
    /// Sessions without a whole header, now.
    pub pending: Counter64,
    /// Datagrams that the kernel dropped because a socket's queue was full, where the listener is UDP: to backends at the
    /// listening sockets, to clients at the flows' own.
    pub overflowed: OnceLock<PerDirection<Counter64>>,
    /// From accept to the end, of the sessions that are logged.
    pub duration: LatencyRecorder,
}

/// Counters of one backend of one pool.
#[derive(Debug)]
pub struct BackendCounters {
    /// The pool.
    pub pool: Label,
    /// The backend.
    pub backend: Label,
    /// Sessions now.
    pub active: Counter64,
    /// Bytes forwarded.
    pub bytes: PerDirection<Counter64>,
    pub(super) connects: [Counter64; ConnectResult::ALL.len()],
}

impl ListenerCounters {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(listener: Label) -> Self {
        Self {
            listener,
            accepted: Counter64::default(),
            taken_over: Counter64::default(),
            errors_peer: Counter64::default(),
            errors_shortage: Counter64::default(),
            errors_fatal: Counter64::default(),
            pending: Counter64::default(),
            overflowed: OnceLock::new(),
            duration: LatencyRecorder::default(),
        }
    }
}

impl PoolCounters {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(pool: Label) -> Self {
        Self { pool, connect_time: LatencyRecorder::default() }
    }
}

impl BackendCounters {
    /// Cells in which nothing is counted yet.
    pub(super) fn new(pool: Label, backend: Label) -> Self {
        Self {
            pool,
            backend,
            active: Counter64::default(),
            bytes: PerDirection::default(),
            connects: Default::default(),
        }
    }

    /// Counts an attempt to connect.
    pub(super) fn count(&self, result: ConnectResult) {
        if let Some(count) = self.connects.get(result as usize) {
            count.add(1);
        }
    }

    /// Connection attempts by result.
    pub fn connects(&self) -> impl Iterator<Item = (ConnectResult, u64)> {
        ConnectResult::ALL.into_iter().zip(self.connects.iter().map(Counter64::value))
    }
}

/// Counters of one pool.
#[derive(Debug)]
pub struct PoolCounters {
    /// The pool.
    pub pool: Label,
    /// How long successful attempts to connect took.
    pub connect_time: LatencyRecorder,
}

/// Counters of one worker.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Sessions whose tenant was found: health checks and strangers are not among them.
    pub identified: Counter64,
    /// Bytes that went through a buffer.
    pub copied: PerDirection<Counter64>,
    /// Bytes that went through a pipe, and never into user space.
    pub spliced: PerDirection<Counter64>,
    /// Nanoseconds within the calls that begin a connection to a backend.
    pub connect_calls: Counter64,
    /// Pipes that sessions hold now.
    pub pipes: Counter64,
    /// Times that a session wanted a pipe and none was to be had: it went on copying.
    pub pipes_refused: Counter64,
    /// Reads that were kept small because the memory for slow readers was short.
    pub buffers_refused: Counter64,
    /// Fresh connections handed to a worker with fewer sessions.
    pub handed_over: Counter64,
    /// Cells that were made: for a listener, a tenant, a pool or a backend that had none here.
    pub counters_made: Counter64,
    /// Cells of what is configured no more that were added to an aggregate.
    pub counters_folded: Counter64,
    /// Passes that left some counters of removed names, because they are in use.
    pub busy_passes: Counter64,
    /// Turns of its clock: it stands still where the worker does.
    pub ticks: Counter64,
}

/// One worker's counters, as a scrape reads them.
#[derive(Debug, Default)]
pub struct CounterShard {
    pub(super) routes: Mutex<Vec<Arc<RouteCounters>>>,
    pub(super) listeners: Mutex<Vec<Arc<ListenerCounters>>>,
    pub(super) backends: Mutex<Vec<Arc<BackendCounters>>>,
    pub(super) pools: Mutex<Vec<Arc<PoolCounters>>>,
    /// The worker's own.
    pub worker: WorkerCounters,
}

impl CounterShard {
    /// All routes so far.
    #[must_use]
    pub fn routes(&self) -> Vec<Arc<RouteCounters>> {
        lock(&self.routes).clone()
    }

    /// All listeners so far.
    #[must_use]
    pub fn listeners(&self) -> Vec<Arc<ListenerCounters>> {
        lock(&self.listeners).clone()
    }

    /// All backends so far.
    #[must_use]
    pub fn backends(&self) -> Vec<Arc<BackendCounters>> {
        lock(&self.backends).clone()
    }

    /// All pools so far.
    #[must_use]
    pub fn pools(&self) -> Vec<Arc<PoolCounters>> {
        lock(&self.pools).clone()
    }
}
