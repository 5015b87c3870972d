//! The live state: one immutable snapshot that sessions are born with, and what outlives it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::account::meter::Shard;
use crate::account::{Label, Labels};
use crate::addr::BackendAddr;
use crate::admission::slots::Slots;
use crate::clock::wheel::Span;
use crate::config::{Config, Fallback, Identity, Probe};
use crate::forward::Patience;
use crate::forward::pipe::{self, Budget};
use crate::header;
use crate::pool::Pool;
use crate::pool::backend::Backend;
use crate::pool::health::{Rules, State};
use crate::tenant::{self, Directory, Tenant};

/// What is in force. It never changes; a new one takes its place.
#[derive(Debug)]
pub struct Snapshot {
    /// In the order of the configuration.
    pub listeners: Vec<Listener>,
    /// In the order of the configuration.
    pub pools: Vec<Arc<Pool>>,
    /// Whose traffic it is.
    pub directory: Directory,
    /// One attempt at one backend.
    pub connect: Span,
    /// How long a session may be silent.
    pub patience: Patience,
}

/// A listener's rules.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub label: Label,
    /// Whose connections are accepted; empty is everybody's.
    pub trusted: Vec<IpNet>,
    /// What is asked of a header; `None` where there is none.
    pub header: Option<header::Rules>,
    /// Whose traffic it is.
    pub tenants: tenant::Rules,
    /// The place of the pool of tenants that name none.
    pub pool: Option<u32>,
}

impl Snapshot {
    /// Makes a snapshot of a configuration that passed its checks.
    #[must_use]
    pub fn new(config: &Config, labels: &Labels) -> Self {
        let pools: Vec<_> = config.pools.iter().map(|pool| Arc::new(new_pool(pool, labels))).collect();
        let pool_places = places(config.pools.iter().map(|pool| &pool.name));
        let tenant_places = places(config.tenants.iter().map(|tenant| &tenant.name));
        let listener_places = places(config.listeners.iter().map(|listener| &listener.name));
        let pool_of =
            |name: &Option<String>| name.as_ref().and_then(|name| pool_places.get(name.as_str()).copied());
        let tenants = config.tenants.iter().map(|tenant| Tenant {
            label: labels.intern(&tenant.name),
            labels: (!tenant.labels.is_empty()).then(|| Box::new(tenant.labels.clone())),
            enabled: tenant.enabled,
            pool: pool_of(&tenant.pool),
            routes: tenant
                .routes
                .iter()
                .filter_map(|(listener, pool)| {
                    Some((*listener_places.get(listener.as_str())?, *pool_places.get(pool.as_str())?))
                })
                .collect(),
        });
        let endpoints = config.tenants.iter().zip(0_u32..);
        let endpoints =
            endpoints.flat_map(|(tenant, place)| tenant.endpoints.iter().map(move |id| (*id, place)));
        let listeners = config.listeners.iter().map(|listener| Listener {
            label: labels.intern(&listener.name),
            trusted: match &listener.identity {
                Identity::Header { trusted, .. } | Identity::Fixed { trusted, .. } => trusted.clone(),
            },
            header: header_rules(listener, config),
            tenants: tenant_rules(&listener.identity, &tenant_places),
            pool: pool_of(&listener.pool),
        });
        Self {
            listeners: listeners.collect(),
            pools,
            directory: Directory::new(tenants.collect(), endpoints),
            connect: Span::of(config.timeouts.connect),
            patience: Patience {
                idle: Span::of(config.timeouts.idle),
                half_close: Span::of(config.timeouts.half_close),
            },
        }
    }
}

/// Names and their places.
fn places<'a>(names: impl Iterator<Item = &'a String>) -> HashMap<&'a str, u32> {
    names.map(String::as_str).zip(0..).collect()
}

fn new_pool(config: &crate::config::Pool, labels: &Labels) -> Pool {
    let (rules, state) = match config.health {
        Probe::None => (Rules { rise: 1, fall: 1 }, State::Healthy),
        Probe::Tcp { rise, fall, .. } => (Rules { rise, fall }, State::Unknown),
    };
    let backends = config.backends.iter().map(|address| {
        Arc::new(Backend::new(BackendAddr(*address), labels.intern(&address.to_string()), rules, state))
    });
    Pool::new(labels.intern(&config.name), config, backends.collect())
}

fn header_rules(listener: &crate::config::Listener, config: &Config) -> Option<header::Rules> {
    match listener.identity {
        Identity::Header { verify_crc, .. } => Some(header::Rules {
            verify_crc,
            timeout: Span::of(config.timeouts.header),
            pending: Slots::new(listener.max_pending),
        }),
        Identity::Fixed { .. } => None,
    }
}

fn tenant_rules(identity: &Identity, places: &HashMap<&str, u32>) -> tenant::Rules {
    let place = |name: &String| places.get(name.as_str()).copied();
    let fallback = |fallback: &Fallback| match fallback {
        Fallback::Reject => None,
        Fallback::Tenant(name) => place(name),
    };
    match identity {
        Identity::Header { on_no_endpoint, on_unknown_endpoint, .. } => tenant::Rules::ByEndpoint {
            absent: fallback(on_no_endpoint),
            unknown: fallback(on_unknown_endpoint),
        },
        // The check has found the tenant; a place out of range would reject, never mistake.
        Identity::Fixed { tenant, .. } => tenant::Rules::Fixed(place(tenant).unwrap_or(u32::MAX)),
    }
}

/// Everything that workers, probes and pages share.
#[derive(Debug)]
pub struct Live {
    /// What is in force.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Every name.
    pub labels: Labels,
    /// Each worker's cells.
    pub shards: Vec<Arc<Shard>>,
    /// Sessions of the process.
    pub sessions: Arc<Slots>,
    /// Memory of splice pipes.
    pub pipes: Arc<Budget>,
    /// Lines of the access log that its writer could not write.
    pub log_lost: Arc<AtomicU64>,
    /// Listening sockets that broke.
    pub stopped_doors: AtomicUsize,
    /// Every address of each listener, by the listener's place, once it is bound.
    pub bound: OnceLock<Vec<Vec<SocketAddr>>>,
    /// Backends whose first probe is still out.
    pub unprobed: AtomicUsize,
    draining: AtomicBool,
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
    pub const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Draining => "draining",
            Self::ListenerStopped => "listener_stopped",
            Self::NoBackend => "no_backend",
        }
    }
}

impl Live {
    /// The state of a process that starts: `workers` shards, at most `max_sessions` sessions and `pipes` pipes.
    #[must_use]
    pub fn new(config: &Config, workers: usize, max_sessions: usize, pipes: u64) -> Arc<Self> {
        let labels = Labels::default();
        let snapshot = Snapshot::new(config, &labels);
        let unprobed = snapshot.pools.iter().filter(|pool| pool.probe != Probe::None);
        let unprobed = unprobed.map(|pool| pool.backends().len()).sum();
        Arc::new(Self {
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
            labels,
            shards: (0..workers).map(|_| Arc::default()).collect(),
            sessions: Slots::new(max_sessions),
            pipes: Budget::new(pipes * pipe::CAPACITY as u64, workers),
            log_lost: Arc::default(),
            stopped_doors: AtomicUsize::new(0),
            bound: OnceLock::new(),
            unprobed: AtomicUsize::new(unprobed),
            draining: AtomicBool::new(false),
        })
    }

    /// From now on the health check says that the process is going.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether the process is going.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Whether the load balancer should send traffic here.
    ///
    /// # Errors
    /// Why not.
    pub fn readiness(&self) -> Result<(), NotReady> {
        let usable = || self.snapshot.load().pools.iter().any(|pool| pool.usable() > 0);
        if self.is_draining() {
            Err(NotReady::Draining)
        } else if self.stopped_doors.load(Ordering::Acquire) > 0 {
            Err(NotReady::ListenerStopped)
        } else if self.unprobed.load(Ordering::Acquire) > 0 {
            Err(NotReady::Starting)
        } else if usable() {
            Ok(())
        } else {
            Err(NotReady::NoBackend)
        }
    }
}
