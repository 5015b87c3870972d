//! How many sessions and flows there are now, by what a change may be of.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use super::{ActiveConfig, ChangeKind, ChangedObject, ConfigChange};
use crate::config::{Config, OnRevoke, TenantConfig};

/// Sessions or flows of a listener, a tenant and a pool now. Before a session's tenant is known, the two are empty.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct RouteUsage {
    pub listener: String,
    pub tenant: String,
    pub pool: String,
    pub now: u64,
}

/// Sessions and flows of a backend now.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct BackendUsage {
    pub pool: String,
    pub backend: String,
    pub now: u64,
}

/// A number of sessions and flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct LiveCount {
    pub sessions: u64,
    pub flows: u64,
}

impl LiveCount {
    /// Whether there is none of either.
    #[must_use]
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

impl AddAssign for LiveCount {
    fn add_assign(&mut self, other: Self) {
        self.sessions += other.sessions;
        self.flows += other.flows;
    }
}

impl fmt::Display for LiveCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |count: u64, noun: &str| {
            if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
        };
        let (sessions, flows) = (counted(self.sessions, "session"), counted(self.flows, "flow"));
        match (self.sessions, self.flows) {
            (_, 0) => f.write_str(&sessions),
            (0, _) => f.write_str(&flows),
            (_, _) => write!(f, "{sessions} and {flows}"),
        }
    }
}

/// Sessions and flows, added up by name.
pub(super) struct LiveCounts<'n> {
    routes: Vec<(&'n RouteUsage, LiveCount)>,
    listeners: HashMap<&'n str, LiveCount>,
    pools: HashMap<&'n str, LiveCount>,
    tenants: HashMap<&'n str, LiveCount>,
    /// Of each tenant at each listener.
    at_listeners: HashMap<(&'n str, &'n str), LiveCount>,
    backends: HashMap<(&'n str, &'n str), u64>,
    /// Pools whose sessions are flows: a backend's row does not tell.
    flows: HashSet<&'n str>,
}

impl<'n> LiveCounts<'n> {
    pub(super) fn of(now: &'n ActiveConfig) -> Self {
        let udp = now.config.listeners.iter().filter(|listener| listener.has_flows());
        let udp: HashSet<&str> = udp.map(|listener| listener.name.as_str()).collect();
        let routes = now.routes.iter().map(|route| {
            let flows = udp.contains(route.listener.as_str());
            let (sessions, flows) = if flows { (0, route.now) } else { (route.now, 0) };
            (route, LiveCount { sessions, flows })
        });
        let routes: Vec<_> = routes.collect();
        let sum = |key: fn(&'n RouteUsage) -> &'n str| {
            let mut sums: HashMap<&'n str, LiveCount> = HashMap::new();
            for (route, now) in &routes {
                *sums.entry(key(route)).or_default() += *now;
            }
            sums
        };
        let pools = sum(|route| &route.pool);
        let mut at_listeners: HashMap<_, LiveCount> = HashMap::new();
        for (route, now) in &routes {
            *at_listeners.entry((route.tenant.as_str(), route.listener.as_str())).or_default() += *now;
        }
        let mut backends = HashMap::new();
        for row in &now.backends {
            *backends.entry((row.pool.as_str(), row.backend.as_str())).or_default() += row.now;
        }
        Self {
            listeners: sum(|route| &route.listener),
            tenants: sum(|route| &route.tenant),
            flows: pools.iter().filter(|(_, now)| now.sessions == 0).map(|(pool, _)| *pool).collect(),
            pools,
            at_listeners,
            backends,
            routes,
        }
    }

    pub(super) fn all(&self) -> LiveCount {
        let mut all = LiveCount::default();
        self.routes.iter().for_each(|(_, now)| all += *now);
        all
    }

    pub(super) fn listener(&self, name: &str) -> LiveCount {
        self.listeners.get(name).copied().unwrap_or_default()
    }

    pub(super) fn pool(&self, name: &str) -> LiveCount {
        self.pools.get(name).copied().unwrap_or_default()
    }

    pub(super) fn tenant(&self, name: &str) -> LiveCount {
        self.tenants.get(name).copied().unwrap_or_default()
    }

    pub(super) fn tenant_at(&self, tenant: &str, listener: &str) -> LiveCount {
        self.at_listeners.get(&(tenant, listener)).copied().unwrap_or_default()
    }

    pub(super) fn backend(&self, pool: &str, backend: &str) -> LiveCount {
        let now = self.backends.get(&(pool, backend)).copied().unwrap_or_default();
        let (sessions, flows) = if self.flows.contains(pool) { (0, now) } else { (now, 0) };
        LiveCount { sessions, flows }
    }

    /// The most sessions that would end, because a tenant is removed or disabled, an endpoint is taken from it, or a
    /// listener gives its traffic to another tenant. Where only some of a tenant's endpoints go, all of its sessions
    /// count: a row of a route does not say which endpoint.
    pub(super) fn revoked(&self, now: &Config, next: &Config) -> LiveCount {
        let after: HashMap<&str, &TenantConfig> =
            next.tenants.iter().map(|tenant| (tenant.name.as_str(), tenant)).collect();
        let ends = |tenant: &TenantConfig| tenant.on_revoke == OnRevoke::End;
        let loses = |before: &TenantConfig| match after.get(before.name.as_str()) {
            None => true,
            Some(after) => {
                let kept: HashSet<_> = after.endpoints.iter().collect();
                before.enabled && !after.enabled || before.endpoints.iter().any(|own| !kept.contains(own))
            }
        };
        let last =
            |before: &'_ TenantConfig| ends(after.get(before.name.as_str()).copied().unwrap_or(before));
        let ending = || now.tenants.iter().filter(|before| last(before));
        let ending_tenants: HashSet<&str> = ending().map(|tenant| tenant.name.as_str()).collect();
        let deprived: HashSet<&str> =
            ending().filter(|tenant| loses(tenant)).map(|tenant| tenant.name.as_str()).collect();
        let listeners = now.listeners.iter().filter(|before| {
            let after = next.listeners.iter().find(|after| after.name == before.name);
            after.is_some_and(|after| after.identity.tenants() != before.identity.tenants())
        });
        let listeners: HashSet<&str> = listeners.map(|listener| listener.name.as_str()).collect();
        let mut sum = LiveCount::default();
        for (route, now) in &self.routes {
            let is_of_listener = listeners.contains(route.listener.as_str());
            let tenant = route.tenant.as_str();
            if deprived.contains(tenant) || is_of_listener && ending_tenants.contains(tenant) {
                sum += *now;
            }
        }
        sum
    }

    /// The sessions affected by any of these changes, each counted once. Of a changed backend its whole pool, for a
    /// row of a route does not say which backend.
    pub(super) fn concerned(&self, changes: &[ConfigChange]) -> LiveCount {
        let (mut names, mut at_listeners) = (HashSet::new(), HashSet::new());
        let mut all_affected = false;
        for change in changes.iter().filter(|change| !change.now.is_nothing()) {
            let name = change.name.as_str();
            let moves = || change.keys.iter().filter(|key| key.from.is_some() && key.to.is_some());
            match (change.what, &change.pool) {
                (ChangedObject::Table, _) => all_affected = true,
                (ChangedObject::Backend, Some(pool)) => {
                    names.insert((ChangedObject::Pool, pool.as_str()));
                }
                (ChangedObject::Tenant, _)
                    if change.kind == ChangeKind::Moved && moves().count() == change.keys.len() =>
                {
                    at_listeners.extend(moves().map(|key| (name, key.key.as_str())));
                }
                (what, _) => drop(names.insert((what, name))),
            }
        }
        let is_concerned = |route: &RouteUsage| {
            let (listener, tenant) = (route.listener.as_str(), route.tenant.as_str());
            all_affected
                || names.contains(&(ChangedObject::Listener, listener))
                || names.contains(&(ChangedObject::Pool, route.pool.as_str()))
                || names.contains(&(ChangedObject::Tenant, tenant))
                || at_listeners.contains(&(tenant, listener))
        };
        let mut sum = LiveCount::default();
        self.routes.iter().filter(|(route, _)| is_concerned(route)).for_each(|(_, now)| sum += *now);
        sum
    }
}
