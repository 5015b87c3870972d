//! `/status`: what the process is doing, as JSON for scripts and as the status page's content.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::account::{Direction, Label};
use crate::outcome::By;
use crate::state::{Live, NotReady};

/// Tenants shown: those with the most sessions now, then those with the most sessions ever. A bound, so that a page
/// of 100,000 tenants is not built for each look.
const TENANTS_SHOWN: usize = 500;

/// The whole page.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The version of the program.
    pub version: &'static str,
    /// Whether the health check is answered with 200.
    pub ready: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<&'static str>,
    /// Sessions now.
    pub sessions: u64,
    /// Sessions that the process takes at once.
    pub sessions_limit: u64,
    /// Sessions of each worker.
    pub workers: Vec<u64>,
    /// Every listener.
    pub listeners: Vec<ListenerStatus>,
    /// Every pool.
    pub pools: Vec<PoolStatus>,
    /// How many tenants there are.
    pub tenants_known: usize,
    /// Those that had sessions, at most 500, the busiest first.
    pub tenants: Vec<TenantStatus>,
    /// Sessions that ended before their tenant was known, by reason.
    pub unidentified: BTreeMap<&'static str, u64>,
}

/// One listener.
#[derive(Debug, Serialize)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// Where it accepts.
    pub addresses: Vec<SocketAddr>,
    /// Connections so far.
    pub accepted: u64,
    /// Sessions without a whole header.
    pub pending: u64,
}

/// One pool.
#[derive(Debug, Serialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Backends that may be used.
    pub usable: usize,
    /// All of them.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Debug, Serialize)]
pub struct BackendStatus {
    /// Its address.
    pub address: String,
    /// What probes say: `unknown`, `healthy` or `unhealthy`.
    pub state: &'static str,
    /// Sessions now, those being connected included.
    pub sessions: u32,
    /// Probes that succeeded.
    pub probes_done: u64,
    /// Probes that failed.
    pub probes_failed: u64,
}

/// One tenant, over all its listeners and pools.
#[derive(Debug, Default, Serialize)]
pub struct TenantStatus {
    /// Its name.
    pub name: String,
    /// Sessions now.
    pub sessions: u64,
    /// Sessions that ended.
    pub ended: u64,
    /// Sessions that the proxy itself ended: rejections, failed connects and timeouts.
    pub ended_by_proxy: u64,
    /// Sessions at most, where that is limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions_limit: Option<usize>,
    /// Sessions that were rejected at the step `tenant`.
    pub rejected: u64,
    /// Sessions that would have been, were the limits not only observed.
    pub would_reject: u64,
    /// Bytes forwarded to backends.
    pub to_backend: u64,
    /// Bytes forwarded to clients.
    pub to_client: u64,
}

impl Status {
    /// The status now.
    #[must_use]
    pub fn of(live: &Live) -> Self {
        let readiness = live.readiness();
        let snapshot = live.snapshot.load();
        let workers: Vec<u64> = live
            .shards
            .iter()
            .map(|shard| shard.routes().iter().map(|route| route.active.value()).sum())
            .collect();
        let (tenants, unidentified) = tenants(live);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            ready: readiness.is_ok(),
            not_ready: readiness.err().map(NotReady::word),
            sessions: workers.iter().sum(),
            sessions_limit: live.sessions.limit() as u64,
            workers,
            listeners: listeners(live),
            pools: pools(live),
            tenants_known: snapshot.directory.tenants().len(),
            tenants,
            unidentified,
        }
    }
}

fn listeners(live: &Live) -> Vec<ListenerStatus> {
    let cells: Vec<_> = live.shards.iter().flat_map(|shard| shard.listeners()).collect();
    let snapshot = live.snapshot.load();
    let bound = live.bound.get().map_or(&[][..], Vec::as_slice).iter();
    let listeners = snapshot.listeners.iter().zip(bound).map(|(listener, bound)| {
        let own = || cells.iter().filter(|cells| cells.listener.serial() == listener.label.serial());
        ListenerStatus {
            name: listener.label.name().to_owned(),
            addresses: bound.clone(),
            accepted: own().map(|cells| cells.accepted.value()).sum(),
            pending: own().map(|cells| cells.pending.value()).sum(),
        }
    });
    listeners.collect()
}

fn pools(live: &Live) -> Vec<PoolStatus> {
    let snapshot = live.snapshot.load();
    let pools = snapshot.pools.iter().map(|pool| PoolStatus {
        name: pool.label.name().to_owned(),
        usable: pool.usable(),
        backends: pool
            .backends()
            .iter()
            .map(|backend| {
                let (probes_done, probes_failed) = backend.probes();
                BackendStatus {
                    address: backend.address().to_string(),
                    state: backend.state().word(),
                    sessions: backend.load(),
                    probes_done,
                    probes_failed,
                }
            })
            .collect(),
    });
    pools.collect()
}

/// A tenant with what its quota says, and nothing of its traffic yet.
fn tenant(live: &Live, label: &Label) -> TenantStatus {
    let quota = live.quotas.known(label).unwrap_or_default();
    TenantStatus {
        name: label.name().to_owned(),
        sessions_limit: quota.sessions_limit(),
        rejected: quota.rejected().map(|(_, count)| count).sum(),
        would_reject: quota.would_reject().map(|(_, count)| count).sum(),
        ..TenantStatus::default()
    }
}

/// The busiest tenants, and what ended before anybody knew whose it was.
fn tenants(live: &Live) -> (Vec<TenantStatus>, BTreeMap<&'static str, u64>) {
    let mut tenants: BTreeMap<String, TenantStatus> = BTreeMap::new();
    let mut unidentified = BTreeMap::new();
    for route in live.shards.iter().flat_map(|shard| shard.routes()) {
        let ended = route.ended().filter(|(_, count)| *count > 0);
        if route.tenant.name().is_empty() {
            for (outcome, count) in ended {
                *unidentified.entry(outcome.why.word()).or_default() += count;
            }
            continue;
        }
        let name = route.tenant.name().to_owned();
        let tenant = tenants.entry(name).or_insert_with(|| tenant(live, &route.tenant));
        tenant.sessions += route.active.value();
        tenant.to_backend += route.bytes.way(Direction::ToBackend).value();
        tenant.to_client += route.bytes.way(Direction::ToClient).value();
        for (outcome, count) in ended {
            tenant.ended += count;
            if outcome.by == By::Proxy {
                tenant.ended_by_proxy += count;
            }
        }
    }
    let mut tenants: Vec<_> = tenants.into_values().collect();
    tenants.sort_by_key(|tenant| std::cmp::Reverse((tenant.sessions, tenant.ended)));
    tenants.truncate(TENANTS_SHOWN);
    (tenants, unidentified)
}
