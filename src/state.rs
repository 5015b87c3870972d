//! The live state: one immutable snapshot that sessions are born with, and what outlives it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::accept;
use crate::account::meter::Shard;
use crate::account::{Label, Labels, lock};
use crate::addr::PeerAddr;
use crate::admission::quota::Quotas;
use crate::admission::slots::Slots;
use crate::clock::wheel::Span;
use crate::config::{Config, Fallback, Identity};
use crate::forward::Patience;
use crate::forward::pipe::{self, Budget};
use crate::header;
use crate::id::Claim;
use crate::pool::Pool;
use crate::tenant::{self, Directory, Tenant};

pub mod draining;
pub mod rejections;
mod reload;

use self::draining::{Draining, Phase};
pub use self::reload::{Frozen, Reloads};

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
#[derive(Clone, Debug)]
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

impl Listener {
    /// Whether it hears this peer.
    #[must_use]
    pub fn trusts(&self, peer: PeerAddr) -> bool {
        self.trusted.is_empty() || accept::is_trusted(peer, &self.trusted)
    }
}

impl Snapshot {
    /// Makes a snapshot of a configuration that passed its checks.
    #[must_use]
    pub fn new(config: &Config, labels: &Labels, quotas: &Quotas) -> Self {
        let pools = config.pools.iter().map(|pool| Arc::new(Pool::new(pool, labels))).collect();
        let listeners = config.listeners.iter().map(|listener| Listener {
            label: labels.intern(&listener.name),
            trusted: match &listener.identity {
                Identity::Header { trusted, .. } | Identity::Fixed { trusted, .. } => trusted.clone(),
            },
            header: header_rules(listener, config),
            tenants: tenant::Rules::Fixed(u32::MAX),
            pool: None,
        });
        let bare = Self {
            listeners: listeners.collect(),
            pools,
            directory: Directory::default(),
            connect: Span::of(config.timeouts.connect),
            patience: Patience {
                idle: Span::of(config.timeouts.idle),
                half_close: Span::of(config.timeouts.half_close),
            },
        };
        bare.with_tenants(config, labels, quotas)
    }

    /// The place of the tenant of this name, where there still is one: found by what its sessions claim nearly always,
    /// however many tenants there are.
    #[must_use]
    pub fn known_place(&self, name: &Label, claim: Claim, listener: &Label) -> Option<u32> {
        let tenants = self.directory.tenants();
        let is_it = |tenant: &Tenant| tenant.label.serial() == name.serial();
        let rules = self.listeners.iter().find(|own| own.label.serial() == listener.serial());
        let claimed = rules.and_then(|rules| self.directory.place(claim, rules.tenants).0);
        claimed.filter(|place| tenants.get(*place as usize).is_some_and(is_it)).or_else(|| {
            let place = tenants.iter().position(is_it)?;
            u32::try_from(place).ok()
        })
    }

    /// The same listeners and pools, with all that they count, and the tenants of another configuration.
    #[must_use]
    fn with_tenants(&self, config: &Config, labels: &Labels, quotas: &Quotas) -> Self {
        let pool_places = places(config.pools.iter().map(|pool| &pool.name));
        let tenant_places = places(config.tenants.iter().map(|tenant| &tenant.name));
        let listener_places = places(config.listeners.iter().map(|listener| &listener.name));
        let pool_of =
            |name: &Option<String>| name.as_ref().and_then(|name| pool_places.get(name.as_str()).copied());
        let route = |(listener, pool): (&String, &String)| {
            Some((*listener_places.get(listener.as_str())?, *pool_places.get(pool.as_str())?))
        };
        let tenants = config.tenants.iter().map(|tenant| {
            let label = labels.intern(&tenant.name);
            let quota = quotas.find(&label);
            quota.set(&tenant.limits);
            Tenant {
                label,
                labels: (!tenant.labels.is_empty()).then(|| Box::new(tenant.labels.clone())),
                enabled: tenant.enabled,
                pool: pool_of(&tenant.pool),
                routes: tenant.routes.iter().filter_map(route).collect(),
                quota,
            }
        });
        let endpoints = config.tenants.iter().zip(0_u32..);
        let endpoints =
            endpoints.flat_map(|(tenant, place)| tenant.endpoints.iter().map(move |id| (*id, place)));
        let listeners = self.listeners.iter().zip(&config.listeners).map(|(listener, config)| Listener {
            tenants: tenant_rules(&config.identity, &tenant_places),
            pool: pool_of(&config.pool),
            ..listener.clone()
        });
        Self {
            listeners: listeners.collect(),
            pools: self.pools.clone(),
            directory: Directory::new(tenants.collect(), endpoints),
            ..*self
        }
    }
}

/// Names and their places.
fn places<'a>(names: impl Iterator<Item = &'a String>) -> HashMap<&'a str, u32> {
    names.map(String::as_str).zip(0..).collect()
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
    /// What it was made of.
    pub config: ArcSwap<Config>,
    /// Every name.
    pub labels: Labels,
    /// Each worker's cells.
    pub shards: Vec<Arc<Shard>>,
    /// Sessions of the process.
    pub sessions: Arc<Slots>,
    /// What each tenant may take, and what is in use.
    pub quotas: Quotas,
    /// How long a flow may be silent.
    pub flow_idle: Duration,
    /// Memory of splice pipes.
    pub pipes: Arc<Budget>,
    /// Lines of the access log that its writer could not write.
    pub log_lost: Arc<AtomicU64>,
    /// Listening sockets that broke.
    pub stopped_doors: AtomicUsize,
    /// Every address of each listener, by the listener's place, once it is bound.
    pub bound: OnceLock<Vec<Vec<SocketAddr>>>,
    /// Backends whose first probe is still out, and names that were not yet looked up.
    pub unprobed: AtomicUsize,
    /// How often another configuration took its place.
    pub reloads: Reloads,
    /// How far the process has come to its end.
    pub draining: Draining,
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
        let sessions = Slots::new(max_sessions);
        let quotas = Quotas::new(Arc::clone(&sessions));
        let snapshot = Snapshot::new(config, &labels, &quotas);
        let unknown = |pool: &Arc<Pool>| {
            let probed = if pool.probe.is_some() { pool.roster().backends().len() } else { 0 };
            probed + pool.names().count()
        };
        let unprobed = snapshot.pools.iter().map(unknown).sum();
        Arc::new(Self {
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
            config: ArcSwap::from_pointee(config.clone()),
            labels,
            shards: (0..workers).map(|_| Arc::default()).collect(),
            sessions,
            quotas,
            flow_idle: config.timeouts.flow_idle,
            pipes: Budget::new(pipes * pipe::CAPACITY as u64, workers),
            log_lost: Arc::default(),
            stopped_doors: AtomicUsize::new(0),
            bound: OnceLock::new(),
            unprobed: AtomicUsize::new(unprobed),
            reloads: Reloads::new(config),
            draining: Draining::default(),
        })
    }

    /// Puts another configuration in force: its tenants, their endpoints, routes, labels and limits. Sessions keep what
    /// they were born with, but for the limits, which hold for them too.
    ///
    /// # Errors
    /// What else differs; nothing has changed then.
    pub fn reload(&self, config: &Config) -> Result<(), Frozen> {
        // One at a time, so that the last one that was asked for is in force.
        let _turn = lock(&self.reloads.turn);
        if let Err(frozen) = self.reloads.judge(config) {
            self.reloads.refuse();
            return Err(frozen);
        }
        let next = self.snapshot.load().with_tenants(config, &self.labels, &self.quotas);
        self.snapshot.store(Arc::new(next));
        self.config.store(Arc::new(config.clone()));
        self.quotas.forget_unused();
        self.reloads.accept();
        Ok(())
    }

    /// Sessions and flows now, over all workers.
    #[must_use]
    pub fn sessions_now(&self) -> u64 {
        let routes = self.shards.iter().flat_map(|shard| shard.routes());
        routes.map(|route| route.active.value()).sum()
    }

    /// Whether the process is going.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.phase() > Phase::Serving
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
