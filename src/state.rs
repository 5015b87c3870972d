//! The live state: the immutable snapshot that a session starts with, and the state that outlives it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::accept;
use crate::account::admin_connections::AdminConnections;
use crate::account::log::QUEUE;
use crate::account::log_queue::LogQueue;
use crate::account::session_metrics::{ConfiguredLabels, CounterShard};
use crate::account::{Label, Labels, lock};
use crate::addr::PeerAddr;
use crate::admission::ports::LocalPorts;
use crate::admission::quota::Quotas;
use crate::admission::slots::Slots;
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::config::{BareDatagrams, Config, Fallback, ListenerIdentity, Protocol};
use crate::connect;
use crate::forward::IdleTimeouts;
use crate::forward::buffer::BufferBudget;
use crate::forward::pipe::{self, PipeBudget};
use crate::header;
use crate::id::EndpointClaim;
use crate::pool::Pool;
use crate::tenant::{self, Tenant, TenantDirectory};

mod changes;
mod config_replacement;
pub mod drain_progress;
mod fold;
mod listener_rows;
pub(crate) mod rejection_log;
mod revocation;
mod shared_pools;
mod stopped_listeners;
mod takeovers;
mod worker_context;
pub mod worker_loads;

pub use self::changes::{ChangeCount, ConfigChanges};
pub use self::config_replacement::{ConfigReplacement, ReloadHistory, RestartNeeded};
use self::drain_progress::{DrainPhase, DrainProgress};
use self::listener_rows::ListenerRows;
use self::rejection_log::StrayLogLimit;
pub use self::stopped_listeners::{StoppedListener, StoppedListeners};
pub use self::takeovers::TakeoverCounters;
pub use self::worker_context::WorkerContext;

/// The immutable state of the configuration in force; replaced as a whole.
#[derive(Debug)]
pub struct Snapshot {
    /// By place: a name keeps its own for the process's life, and may be retired.
    pub listeners: Vec<ListenerState>,
    /// In the order of the configuration.
    pub pools: Vec<Arc<Pool>>,
    /// Whose traffic it is; shared with the snapshot before, where a reload changes none of it.
    pub directory: Arc<TenantDirectory>,
    /// One attempt at one backend.
    pub connect: TickSpan,
    /// The idle timeouts of a session.
    pub timeouts: IdleTimeouts,
    /// How long a flow may be silent.
    pub flow_idle: Duration,
    /// How many reloads may have taken an endpoint away from the tenant of a live session or flow: at another number each
    /// of them checks whether it still [belongs](Self::admits) to its tenant.
    pub revocations: u32,
}

/// A listener's rules.
#[derive(Clone, Debug)]
pub struct ListenerState {
    /// Its name.
    pub label: Label,
    /// The networks whose connections are accepted; empty means every network.
    pub trusted: Vec<IpNet>,
    /// What is asked of a header; `None` where there is none.
    pub header: Option<header::HeaderRules>,
    /// Whether a datagram without a header may belong to the one flow of its sender.
    pub follows_bare: bool,
    /// A tenant.
    pub tenants: tenant::TenantRules,
    /// The place of the pool of tenants that name none.
    pub pool: Option<u32>,
    /// Whether it takes connections; else it takes datagrams.
    pub is_tcp: bool,
    /// Whether it is configured no more.
    pub is_retired: bool,
    /// Its lines of the access log that tell of connections without a tenant.
    pub strays: Arc<StrayLogLimit>,
}

impl ListenerState {
    /// How many of its sessions may wait for their headers at once; `None` where none does.
    #[must_use]
    pub fn pending_limit(&self) -> Option<usize> {
        let waits = self.header.as_ref().filter(|_| self.is_tcp && !self.is_retired);
        waits.map(|header| header.pending.limit())
    }

    /// Whether it hears this peer.
    #[must_use]
    pub fn trusts(&self, peer: PeerAddr) -> bool {
        self.trusted.is_empty() || accept::is_trusted(peer, &self.trusted)
    }
}

impl Snapshot {
    /// Makes a snapshot of a configuration that passed its checks, but for its pools. It has this directory, where there is
    /// one: that of before, of which nothing changes.
    fn new(
        config: &Config,
        labels: &Labels,
        quotas: &Quotas,
        rows: &ListenerRows,
        directory: Option<Arc<TenantDirectory>>,
    ) -> Self {
        let pool_places = places(config.pools.iter().map(|pool| &pool.name));
        let tenant_places = places(config.tenants.iter().map(|tenant| &tenant.name));
        let pool_of =
            |name: &Option<String>| name.as_ref().and_then(|name| pool_places.get(name.as_str()).copied());
        let directory = directory
            .unwrap_or_else(|| Arc::new(self::directory(config, labels, quotas, rows, &pool_places)));
        let listeners = rows.all().iter().map(|row| ListenerState {
            label: labels.intern(&row.listener.name),
            trusted: match &row.listener.identity {
                ListenerIdentity::Header { trusted, .. } | ListenerIdentity::Fixed { trusted, .. } => {
                    trusted.clone()
                }
            },
            header: header_rules(row, config),
            follows_bare: matches!(
                row.listener.identity,
                ListenerIdentity::Header { bare_datagrams: BareDatagrams::Follow, .. }
            ),
            tenants: tenant_rules(&row.listener.identity, &tenant_places),
            pool: pool_of(&row.listener.pool),
            is_tcp: row.listener.protocol == Protocol::Tcp,
            is_retired: row.is_retired,
            strays: Arc::clone(&row.strays),
        });
        Self {
            listeners: listeners.collect(),
            pools: Vec::new(),
            directory,
            connect: TickSpan::of(config.timeouts.connect),
            timeouts: IdleTimeouts {
                idle: TickSpan::of(config.timeouts.idle),
                half_close: TickSpan::of(config.timeouts.half_close),
                tcp_user_timeout: config.timeouts.tcp_user_timeout,
                stall: (!config.timeouts.stall.is_zero()).then(|| TickSpan::of(config.timeouts.stall)),
                unsent: u32::try_from(config.process.unsent_memory).unwrap_or(u32::MAX),
            },
            flow_idle: config.timeouts.flow_idle,
            revocations: 0,
        }
    }

    /// The lines of a listener's strays.
    #[must_use]
    pub fn strays(&self, listener: &Label) -> Option<&StrayLogLimit> {
        let rules = self.listeners.iter().find(|own| own.label.serial() == listener.serial());
        rules.map(|rules| &*rules.strays)
    }

    /// The place of the tenant of this name, where there still is one: found by what its sessions claim nearly always,
    /// however many tenants there are.
    #[must_use]
    pub fn known_place(&self, name: &Label, claim: EndpointClaim, listener: &Label) -> Option<u32> {
        let tenants = self.directory.tenants();
        let is_it = |tenant: &Tenant| tenant.label.serial() == name.serial();
        let rules = self.listeners.iter().find(|own| own.label.serial() == listener.serial());
        let claimed = rules.and_then(|rules| self.directory.place(claim, rules.tenants).0);
        claimed.filter(|place| tenants.get(*place as usize).is_some_and(is_it)).or_else(|| {
            let place = tenants.iter().position(is_it)?;
            u32::try_from(place).ok()
        })
    }
}

/// Every tenant; the pools are given by their places.
fn directory(
    config: &Config,
    labels: &Labels,
    quotas: &Quotas,
    rows: &ListenerRows,
    pools: &HashMap<&str, u32>,
) -> TenantDirectory {
    let route = |(listener, pool): (&String, &String)| {
        Some((*rows.places().get(listener.as_str())?, *pools.get(pool.as_str())?))
    };
    let now = clock::now();
    let tenants = config.tenants.iter().map(|tenant| {
        let label = labels.intern(&tenant.name);
        let quota = quotas.find(&label);
        quota.set(&tenant.limits, now);
        quota.set_revocation(tenant.into());
        Tenant {
            label,
            labels: (!tenant.labels.is_empty()).then(|| Box::new(tenant.labels.clone())),
            enabled: tenant.enabled,
            pool: tenant.pool.as_ref().and_then(|name| pools.get(name.as_str()).copied()),
            routes: tenant.routes.iter().filter_map(route).collect(),
            quota,
        }
    });
    let endpoints = config.tenants.iter().zip(0_u32..);
    let endpoints = endpoints.flat_map(|(tenant, place)| tenant.endpoints.iter().map(move |id| (*id, place)));
    TenantDirectory::new(tenants.collect(), endpoints)
}

/// Names and their places.
fn places<'a>(names: impl Iterator<Item = &'a String>) -> HashMap<&'a str, u32> {
    names.map(String::as_str).zip(0..).collect()
}

fn header_rules(row: &listener_rows::ListenerRow, config: &Config) -> Option<header::HeaderRules> {
    match row.listener.identity {
        ListenerIdentity::Header { verify_crc, .. } => Some(header::HeaderRules {
            verify_crc,
            timeout: TickSpan::of(config.timeouts.header),
            pending: Arc::clone(&row.pending),
        }),
        ListenerIdentity::Fixed { .. } => None,
    }
}

fn tenant_rules(identity: &ListenerIdentity, places: &HashMap<&str, u32>) -> tenant::TenantRules {
    let place = |name: &String| places.get(name.as_str()).copied();
    let fallback = |fallback: &Fallback| match fallback {
        Fallback::Reject => None,
        Fallback::Tenant(name) => place(name),
    };
    match identity {
        ListenerIdentity::Header { on_no_endpoint, on_unknown_endpoint, .. } => {
            tenant::TenantRules::ByEndpoint {
                absent: fallback(on_no_endpoint),
                unknown: fallback(on_unknown_endpoint),
            }
        }
        // The check has found the tenant; a place out of range would reject, never mistake.
        ListenerIdentity::Fixed { tenant, .. } => {
            tenant::TenantRules::Fixed(place(tenant).unwrap_or(u32::MAX))
        }
    }
}

/// The process-wide limits.
#[derive(Clone, Copy, Debug)]
pub struct ProcessLimits {
    /// Sessions and flows of tenants.
    pub sessions: usize,
    /// Connections that have not yet sent a whole header.
    pub pending: usize,
    /// Splice pipes.
    pub pipes: u64,
}

/// The live state that workers, probes and pages share.
#[derive(Debug)]
pub struct LiveState {
    /// What is in force.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// What it was made of.
    pub config: ArcSwap<Config>,
    /// Every name.
    pub labels: Labels,
    /// Each worker's counters.
    pub shards: Vec<Arc<CounterShard>>,
    /// Sessions of the process.
    pub sessions: Arc<Slots>,
    /// What each tenant may take, and what is in use.
    pub quotas: Quotas,
    /// Local ports of connections to backends.
    pub ports: Arc<LocalPorts>,
    /// Local ports of UDP flows.
    pub udp_ports: Arc<LocalPorts>,
    /// Memory of splice pipes.
    pub pipes: Arc<PipeBudget>,
    /// Memory of bytes that wait for a slow reader.
    pub buffers: Arc<BufferBudget>,
    /// The lines of the access log that wait for its writer, and those that are missing.
    pub log: Arc<LogQueue>,
    /// Listening sockets that broke and are not open again yet.
    pub stopped_listeners: StoppedListeners,
    /// Every address of each listener, by the listener's place, once it is bound.
    pub bound: ArcSwap<Vec<Vec<SocketAddr>>>,
    /// Where the admin pages and the health check are served, once that is bound.
    pub pages: OnceLock<[SocketAddr; 2]>,
    /// Whether the first round of probes and lookups is over.
    started: AtomicBool,
    /// How often another configuration took its place.
    pub reloads: ReloadHistory,
    /// Snapshots that sessions may still hold. No worker is the last to hold one, and has to free it.
    replaced: Mutex<Vec<Arc<Snapshot>>>,
    /// How often everything was to go to another process, or come from one.
    pub takeovers: TakeoverCounters,
    /// Connections of the health port, the admin address and the admin socket.
    pub admin_connections: AdminConnections,
    /// How far the process has come to its end.
    pub draining: DrainProgress,
    /// What is configured, for the workers to fold the counts of all else.
    pub configured: ArcSwap<ConfiguredLabels>,
    swept: Mutex<fold::FoldTrigger>,
}

/// Why the process should get no new traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The first round of probes is not over.
    Starting,
    /// The process is draining.
    Draining,
    /// A listening socket broke.
    ListenerStopped,
    /// No backend of any pool may be used.
    NoBackend,
}

impl NotReady {
    /// The reason that the health check shows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Draining => "draining",
            Self::ListenerStopped => "listener_stopped",
            Self::NoBackend => "no_backend",
        }
    }
}

impl LiveState {
    /// The state of a process that starts: `workers` shards, and at most so much of everything.
    #[must_use]
    pub fn new(config: &Config, workers: usize, most: ProcessLimits) -> Arc<Self> {
        Self::of(Arc::new(config.clone()), workers, most)
    }

    /// [`new`](Self::new), with a configuration that is kept as it is: of 100,000 tenants a second one would be felt.
    #[must_use]
    pub fn of(config: Arc<Config>, workers: usize, most: ProcessLimits) -> Arc<Self> {
        let labels = Labels::default();
        let sessions = Slots::new(most.sessions);
        let quotas = Quotas::new(Arc::clone(&sessions));
        let mut rows = ListenerRows::new(most.pending);
        rows.set(&config.listeners);
        let pools: Vec<_> = config.pools.iter().map(|pool| Arc::new(Pool::new(pool, &labels))).collect();
        let snapshot = Snapshot { pools, ..Snapshot::new(&config, &labels, &quotas, &rows, None) };
        shared_pools::update_pools(&snapshot);
        let configured = ArcSwap::from_pointee(ConfiguredLabels::none(&labels));
        let buffers = BufferBudget::new(config.process.buffer_memory);
        let ports = connect::system_ports();
        let udp_ports = Arc::new(LocalPorts::udp(ports.range().clone()));
        Arc::new(Self {
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
            config: ArcSwap::new(config),
            labels,
            shards: (0..workers).map(|_| Arc::default()).collect(),
            sessions,
            quotas,
            buffers,
            pipes: PipeBudget::new(most.pipes * pipe::CAPACITY as u64, workers),
            ports: Arc::new(ports),
            udp_ports,
            log: Arc::new(LogQueue::new(workers.max(1) * QUEUE)),
            stopped_listeners: StoppedListeners::default(),
            bound: ArcSwap::default(),
            pages: OnceLock::new(),
            started: AtomicBool::new(false),
            reloads: ReloadHistory::new(rows),
            replaced: Mutex::default(),
            takeovers: TakeoverCounters::default(),
            admin_connections: AdminConnections::default(),
            draining: DrainProgress::default(),
            configured,
            swept: Mutex::default(),
        })
    }

    /// Begins to apply another configuration. Others wait while the returned value lives.
    ///
    /// # Errors
    /// What it must not change.
    pub fn begin_reload(&self, config: &Config) -> Result<ConfigReplacement<'_>, RestartNeeded> {
        // One at a time, so that the last one that was asked for is in force.
        let turn = self.reloads.turn(self);
        RestartNeeded::judge(&self.config.load(), config)?;
        Ok(turn)
    }

    /// The replaced snapshots without references, to be freed on a thread that may take its time: with
    /// 100,000 tenants it takes milliseconds.
    #[must_use]
    pub fn unused(&self) -> Vec<Arc<Snapshot>> {
        let mut replaced = lock(&self.replaced);
        // A new reference is only taken from the present snapshot: an unreferenced one stays unreferenced.
        replaced.extract_if(.., |snapshot| Arc::strong_count(snapshot) == 1).collect()
    }

    /// Snapshots that were replaced and are not freed yet.
    #[must_use]
    pub fn replaced(&self) -> usize {
        lock(&self.replaced).len()
    }

    /// Sessions that have not yet sent a whole header, over all workers.
    #[must_use]
    pub fn pending(&self) -> u64 {
        self.shards.iter().flat_map(|shard| shard.listeners()).map(|listener| listener.pending.value()).sum()
    }

    /// Sessions and flows now, over all workers.
    #[must_use]
    pub fn sessions_now(&self) -> u64 {
        let routes = self.shards.iter().flat_map(|shard| shard.routes());
        routes.map(|route| route.active.value()).sum()
    }

    /// What tells the addresses at which the process listens: every listener's, the admin pages' and the health check's.
    #[must_use]
    pub fn own_addresses(self: &Arc<Self>) -> Box<dyn Fn() -> Vec<SocketAddr> + Send + Sync> {
        let live = Arc::clone(self);
        Box::new(move || {
            let bound = live.bound.load();
            bound.iter().flatten().chain(live.pages.get().into_iter().flatten()).copied().collect()
        })
    }

    /// Whether the process is going.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.phase() > DrainPhase::Serving
    }

    /// Whether the first round of probes and lookups is not over, of the pools that are in force now. Once it is, the process
    /// never starts again: a reload brings backends into pools that already work.
    pub fn is_starting(&self) -> bool {
        let is_over = || self.snapshot.load().pools.iter().all(|pool| pool.first_round_is_over());
        if !self.started.load(Ordering::Acquire) && is_over() {
            self.started.store(true, Ordering::Release);
        }
        !self.started.load(Ordering::Acquire)
    }

    /// Whether the load balancer should send traffic here.
    ///
    /// # Errors
    /// Why not.
    pub fn readiness(&self) -> Result<(), NotReady> {
        let usable = || self.snapshot.load().pools.iter().any(|pool| pool.usable() > 0);
        if self.is_draining() {
            Err(NotReady::Draining)
        } else if self.stopped_listeners.count() > 0 {
            Err(NotReady::ListenerStopped)
        } else if self.is_starting() {
            Err(NotReady::Starting)
        } else if usable() {
            Ok(())
        } else {
            Err(NotReady::NoBackend)
        }
    }
}
