//! `/status`: the state of the process, as JSON for scripts and as the content of the status page.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::account::{Direction, Label};
use crate::clock::{self, Moment};
use crate::outcome::EndedBy;
use crate::pool::backend::Backend;
use crate::pool::health::FULL;
use crate::state::{LiveState, NotReady};

/// Tenants shown: those with the most sessions now, then those with the most sessions ever. A bound, so that a page
/// of 100,000 tenants is not built for each look.
const TENANTS_SHOWN: usize = 500;

/// The whole status document.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    /// The version of the program.
    pub version: &'static str,
    /// Whether the health check is answered with 200.
    pub ready: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<&'static str>,
    /// While the process drains: how far that has come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Whether the last reload, or the start, put its configuration in force.
    pub last_reload_successful: bool,
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

/// The progress of a drain.
#[derive(Debug, Serialize)]
pub(crate) struct DrainStatus {
    /// `notice`: connections are still accepted; `closing`: listeners are closed.
    pub stage: &'static str,
    /// Sessions and flows that are left.
    pub sessions_left: u64,
    /// How long it has been going on.
    pub seconds: u64,
    /// In how many seconds what is left then is ended.
    pub seconds_to_deadline: u64,
}

/// One listener.
#[derive(Debug, Serialize)]
pub(crate) struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// The address.
    pub addresses: Vec<SocketAddr>,
    /// Connections so far.
    pub accepted: u64,
    /// Sessions without a whole header.
    pub pending: u64,
}

/// One pool.
#[derive(Debug, Serialize)]
pub(crate) struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Backends that get new sessions.
    pub usable: usize,
    /// Why those are used: `healthy`, `backup`, `unknown`, `ejected`, `panic`; or `none`.
    pub ground: &'static str,
    /// Sessions that wait for a backend with room.
    pub queued: usize,
    /// Attempts beyond a session's first that were made.
    pub retries: u64,
    /// Attempts that the retry budget had nothing left for.
    pub retries_refused: u64,
    /// All of them.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Debug, Serialize)]
pub(crate) struct BackendStatus {
    /// Its address.
    pub address: String,
    /// What probes say: `unknown`, `healthy` or `unhealthy`; or `ejected`, by sessions.
    pub state: &'static str,
    /// Why it was last put in or out.
    pub why: &'static str,
    /// How long ago that was.
    pub changed_seconds_ago: u64,
    /// While it is ejected, for how much longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ejected_seconds_more: Option<u64>,
    /// How often it was ejected.
    pub ejections: u64,
    /// Its weight as configured or resolved.
    pub weight: u32,
    /// The weight in force; 0 gets no new sessions.
    pub weight_in_force: f64,
    /// Whether it is used only where no other can be.
    pub backup: bool,
    /// The zone that it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Sessions now, those being connected included.
    pub sessions: u32,
    /// Sessions at most, where that is limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions_limit: Option<u32>,
    /// Sessions that it reset, or lost, before its first byte.
    pub early_resets: u64,
    /// How long its last probe took.
    pub probe_ms: f64,
    /// Probes that succeeded.
    pub probes_done: u64,
    /// Probes that failed.
    pub probes_failed: u64,
}

/// One tenant, over all its listeners and pools.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TenantStatus {
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
    pub(crate) fn of(live: &LiveState) -> Self {
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
            not_ready: readiness.err().map(NotReady::as_str),
            drain: drain(live, workers.iter().sum()),
            last_reload_successful: live.reloads.last_was_successful(),
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

fn drain(live: &LiveState, sessions_left: u64) -> Option<DrainStatus> {
    let (took, left) = live.draining.time(clock::now())?;
    Some(DrainStatus {
        stage: live.draining.phase().as_str(),
        sessions_left,
        seconds: took.as_secs(),
        seconds_to_deadline: left.as_secs(),
    })
}

fn listeners(live: &LiveState) -> Vec<ListenerStatus> {
    let counters: Vec<_> = live.shards.iter().flat_map(|shard| shard.listeners()).collect();
    let snapshot = live.snapshot.load();
    let bound = live.bound.load();
    let listeners = snapshot.listeners.iter().zip(bound.iter()).filter(|(listener, _)| !listener.is_retired);
    let listeners = listeners.map(|(listener, bound)| {
        let own = || counters.iter().filter(|counters| counters.listener.serial() == listener.label.serial());
        ListenerStatus {
            name: listener.label.name().to_owned(),
            addresses: bound.clone(),
            accepted: own().map(|counters| counters.accepted.value()).sum(),
            pending: own().map(|counters| counters.pending.value()).sum(),
        }
    });
    listeners.collect()
}

fn pools(live: &LiveState) -> Vec<PoolStatus> {
    let (snapshot, now) = (live.snapshot.load(), clock::now());
    let pools = snapshot.pools.iter().map(|pool| {
        let (candidates, (retries, retries_refused)) = (pool.candidates(), pool.retries());
        PoolStatus {
            name: pool.label.name().to_owned(),
            usable: candidates.used().len(),
            ground: candidates.tier().as_str(),
            queued: pool.waiting(),
            retries,
            retries_refused,
            backends: candidates.backends().iter().map(|backend| self::backend(backend, now)).collect(),
        }
    });
    pools.collect()
}

fn backend(backend: &Backend, now: Moment) -> BackendStatus {
    let summary = backend.summary();
    let (changed, cause) = summary.changed;
    let probes = |success| {
        let probes = backend.probes().filter(|(verdict, _)| verdict.is_success() == Some(success));
        probes.map(|(_, count)| count).sum()
    };
    BackendStatus {
        address: backend.address().to_string(),
        state: if backend.is_ejected() { "ejected" } else { backend.state().as_str() },
        why: cause.as_str(),
        changed_seconds_ago: now.since(changed).as_secs(),
        ejected_seconds_more: summary.ejected_until.map(|until| until.since(now).as_secs()),
        ejections: backend.ejections(),
        weight: summary.weight,
        weight_in_force: f64::from(backend.weight()) / f64::from(FULL),
        backup: summary.is_backup,
        zone: backend.zone().map(str::to_owned),
        sessions: backend.load(),
        sessions_limit: backend.max_sessions(),
        early_resets: backend.early_resets(),
        probe_ms: f64::from(backend.probe_us()) / 1000.0,
        probes_done: probes(true),
        probes_failed: probes(false),
    }
}

/// A tenant with what its quota says, and nothing of its traffic yet.
fn tenant(live: &LiveState, label: &Label) -> TenantStatus {
    let quota = live.quotas.known(label).unwrap_or_default();
    TenantStatus {
        name: label.name().to_owned(),
        sessions_limit: quota.sessions_limit(),
        rejected: quota.rejected().map(|(_, count)| count).sum(),
        would_reject: quota.would_reject().map(|(_, count)| count).sum(),
        ..TenantStatus::default()
    }
}

/// The busiest tenants, and the sessions that ended before their tenant was known.
fn tenants(live: &LiveState) -> (Vec<TenantStatus>, BTreeMap<&'static str, u64>) {
    let mut tenants: BTreeMap<String, TenantStatus> = BTreeMap::new();
    let mut unidentified = BTreeMap::new();
    for route in live.shards.iter().flat_map(|shard| shard.routes()) {
        let ended = route.ended().filter(|(_, count)| *count > 0);
        if route.tenant.name().is_empty() {
            for (outcome, count) in ended {
                *unidentified.entry(outcome.why.as_str()).or_default() += count;
            }
            continue;
        }
        let name = route.tenant.name().to_owned();
        let tenant = tenants.entry(name).or_insert_with(|| tenant(live, &route.tenant));
        tenant.sessions += route.active.value();
        tenant.to_backend += route.bytes.of(Direction::ToBackend).value();
        tenant.to_client += route.bytes.of(Direction::ToClient).value();
        for (outcome, count) in ended {
            tenant.ended += count;
            if outcome.by == EndedBy::Proxy {
                tenant.ended_by_proxy += count;
            }
        }
    }
    let mut tenants: Vec<_> = tenants.into_values().collect();
    tenants.sort_by_key(|tenant| std::cmp::Reverse((tenant.sessions, tenant.ended)));
    tenants.truncate(TENANTS_SHOWN);
    (tenants, unidentified)
}
