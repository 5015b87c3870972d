//! The differences between two configurations and the sessions that they affect: what a reload would change.

mod impact;
pub(super) mod render;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use self::impact::LiveCounts;
pub(crate) use self::impact::{BackendUsage, LiveCount, RouteUsage};
use self::render::keys;
use super::table::{RawTable, Table};
use super::tables::{RawAdmin, RawDns, RawDrain, RawHealth, RawLog, RawProcess, RawTimeouts};
use super::{BackendConfig, Config, ListenerConfig, PoolConfig, Protocol, TenantConfig, TenantLimits};

/// The configuration in force, and the sessions that use it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ActiveConfig<C = Config> {
    /// The version of the program that it is in force in.
    pub version: String,
    /// The configuration as checked.
    pub config: C,
    /// Sessions and flows now. Rows without any are left out.
    pub routes: Vec<RouteUsage>,
    /// Sessions and flows of each backend now. Rows without any are left out.
    pub backends: Vec<BackendUsage>,
}

/// The object of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ChangedObject {
    Table,
    Listener,
    Pool,
    Backend,
    Tenant,
}

/// The kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ChangeKind {
    /// It comes.
    Added,
    /// It goes.
    Removed,
    /// It stays, with other keys.
    Changed,
    /// A tenant's: other endpoints, or another pool, of its own or by a route or a listener.
    Moved,
    /// A tenant's.
    Limits,
    /// A tenant's: it is enabled or disabled.
    State,
    /// A reload would refuse it, and all else with it: it needs a restart or a takeover.
    Refused,
}

/// A key whose value differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct KeyChange {
    /// The key as the file has it.
    pub key: String,
    /// What is in force; none where that is nothing.
    pub from: Option<String>,
    /// What would be.
    pub to: Option<String>,
}

/// One changed object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ConfigChange {
    /// What it is.
    pub what: ChangedObject,
    /// Its name; of a backend its address, of a table its name in brackets.
    pub name: String,
    /// A backend's pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The kind of change.
    pub kind: ChangeKind,
    /// What is different.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyChange>,
    /// Sessions and flows that it concerns now.
    #[serde(flatten)]
    pub now: LiveCount,
}

/// The changes of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ConfigDiff {
    /// Each of it: tables, listeners, pools with their backends, tenants.
    pub changes: Vec<ConfigChange>,
    /// Sessions and flows that any of it concerns now, each counted once.
    #[serde(flatten)]
    pub now: LiveCount,
    /// Sessions and flows that a reload would end at most, because their tenant or their endpoint is taken away.
    pub ends: LiveCount,
}

impl ConfigDiff {
    /// The changes if `next` replaced the configuration in force.
    #[must_use]
    pub(crate) fn between(now: &ActiveConfig, next: &Config) -> Self {
        let uses = LiveCounts::of(now);
        let mut changes = tables(&now.config, next, &uses);
        listeners(&now.config, next, &uses, &mut changes);
        pools(&now.config, next, &uses, &mut changes);
        tenants(&now.config, next, &uses, &mut changes);
        let concerned = uses.concerned(&changes);
        let ends = uses.revoked(&now.config, next);
        Self { changes, now: concerned, ends }
    }

    /// Whether a reload would be refused.
    #[must_use]
    pub(crate) fn is_refused(&self) -> bool {
        self.changes.iter().any(|change| change.kind == ChangeKind::Refused)
    }
}

impl ConfigChange {
    fn new(what: ChangedObject, name: &str, kind: ChangeKind, now: LiveCount) -> Self {
        Self { what, name: name.to_owned(), pool: None, kind, keys: Vec::new(), now }
    }

    fn with(self, keys: Vec<KeyChange>) -> Self {
        Self { keys, ..self }
    }
}

impl fmt::Display for ConfigChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.what, &self.pool) {
            (ChangedObject::Table, _) => f.write_str(&self.name)?,
            (ChangedObject::Listener, _) => write!(f, "listener \"{}\"", self.name)?,
            (ChangedObject::Pool, _) => write!(f, "pool \"{}\"", self.name)?,
            (ChangedObject::Backend, pool) => {
                write!(f, "pool \"{}\": backend {}", pool.as_deref().unwrap_or_default(), self.name)?;
            }
            (ChangedObject::Tenant, _) => write!(f, "tenant \"{}\"", self.name)?,
        }
        f.write_str(match self.kind {
            ChangeKind::Added => ": added",
            ChangeKind::Removed => ": removed",
            ChangeKind::Changed => ": changed",
            ChangeKind::Moved => ": moved",
            ChangeKind::Limits => ": limits",
            ChangeKind::State => ": state",
            ChangeKind::Refused => ": refused, needs a restart or a takeover",
        })?;
        for (number, key) in self.keys.iter().enumerate() {
            f.write_str(if number == 0 { ": " } else { ", " })?;
            fmt::Display::fmt(key, f)?;
        }
        if self.now.is_nothing() { Ok(()) } else { write!(f, "; {} now", self.now) }
    }
}

impl fmt::Display for KeyChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.from, &self.to) {
            (None, Some(to)) => write!(f, "{} +{to}", self.key),
            (Some(from), None) => write!(f, "{} -{from}", self.key),
            (from, to) => {
                let [from, to] = [from, to].map(|side| side.as_deref().unwrap_or("none"));
                write!(f, "{} {from} -> {to}", self.key)
            }
        }
    }
}

/// The tables that stand once and differ, with the keys that do.
pub(crate) fn changed_tables(now: &Config, next: &Config) -> Vec<(Table, Vec<KeyChange>)> {
    // Every field by name, so that a new one is not forgotten here.
    let Config { process, admin, health, log, timeouts, drain, dns, listeners: _, pools: _, tenants: _ } =
        now;
    let tables = [
        changed(RawProcess::TABLE, process, &next.process),
        changed(RawAdmin::TABLE, admin, &next.admin),
        changed(RawHealth::TABLE, health, &next.health),
        changed(RawLog::TABLE, log, &next.log),
        changed(RawDns::TABLE, dns, &next.dns),
        changed(RawTimeouts::TABLE, timeouts, &next.timeouts),
        changed(RawDrain::TABLE, drain, &next.drain),
    ];
    tables.into_iter().flatten().collect()
}

fn changed<T: PartialEq + Serialize>(table: Table, now: &T, next: &T) -> Option<(Table, Vec<KeyChange>)> {
    (now != next).then(|| (table, keys(now, next)))
}

fn tables(now: &Config, next: &Config, uses: &LiveCounts<'_>) -> Vec<ConfigChange> {
    let change = |(table, keys): (Table, _)| {
        let kind = if table.needs_restart { ChangeKind::Refused } else { ChangeKind::Changed };
        // Timeouts apply to new sessions; the other tables affect no existing session.
        let now = if table.heading == RawTimeouts::TABLE.heading { uses.all() } else { LiveCount::default() };
        ConfigChange::new(ChangedObject::Table, table.heading, kind, now).with(keys)
    };
    changed_tables(now, next).into_iter().map(change).collect()
}

/// The same thing before and after, where it is there.
type Pair<'c, T> = (Option<&'c T>, Option<&'c T>);

/// What there is of a kind before and after, by its name: in the order of the new file, then what is gone.
fn pairs<'c, T, N>(now: &'c [T], next: &'c [T], name: impl Fn(&'c T) -> &'c N) -> Vec<Pair<'c, T>>
where
    N: Eq + Hash + 'c,
{
    let mut before: HashMap<&N, &T> = now.iter().map(|item| (name(item), item)).collect();
    let mut pairs: Vec<_> = next.iter().map(|item| (before.remove(name(item)), Some(item))).collect();
    pairs.extend(now.iter().filter(|item| before.contains_key(name(item))).map(|item| (Some(item), None)));
    pairs
}

fn listeners(now: &Config, next: &Config, uses: &LiveCounts<'_>, changes: &mut Vec<ConfigChange>) {
    for pair in pairs(&now.listeners, &next.listeners, |listener| &listener.name) {
        let change = |listener: &ListenerConfig, kind| {
            ConfigChange::new(ChangedObject::Listener, &listener.name, kind, uses.listener(&listener.name))
        };
        match pair {
            (Some(gone), None) => changes.push(change(gone, ChangeKind::Removed)),
            (None, Some(new)) => {
                let addresses = one_by_one("bind", &[], &new.bind);
                changes.push(change(new, ChangeKind::Added).with(addresses));
            }
            (Some(before), Some(after)) if before != after => {
                let without =
                    |listener: &ListenerConfig| ListenerConfig { bind: Vec::new(), ..listener.clone() };
                let mut differing = one_by_one("bind", &before.bind, &after.bind);
                differing.extend(keys(&without(before), &without(after)));
                changes.push(change(after, ChangeKind::Changed).with(differing));
            }
            _ => {}
        }
    }
}

fn pools(now: &Config, next: &Config, uses: &LiveCounts<'_>, changes: &mut Vec<ConfigChange>) {
    for pair in pairs(&now.pools, &next.pools, |pool| &pool.name) {
        let change = |pool: &PoolConfig, kind| {
            ConfigChange::new(ChangedObject::Pool, &pool.name, kind, uses.pool(&pool.name))
        };
        match pair {
            (Some(gone), None) => changes.push(change(gone, ChangeKind::Removed)),
            (None, Some(new)) => changes.push(change(new, ChangeKind::Added)),
            (Some(before), Some(after)) if before != after => {
                let without = |pool: &PoolConfig| PoolConfig { backends: Vec::new(), ..pool.clone() };
                let differing = keys(&without(before), &without(after));
                if !differing.is_empty() {
                    changes.push(change(after, ChangeKind::Changed).with(differing));
                }
                backends(before, after, uses, changes);
            }
            _ => {}
        }
    }
}

fn backends(before: &PoolConfig, after: &PoolConfig, uses: &LiveCounts<'_>, changes: &mut Vec<ConfigChange>) {
    for pair in pairs(&before.backends, &after.backends, |backend| &backend.target) {
        let change = |backend: &BackendConfig, kind| {
            let name = backend.target.to_string();
            let now = uses.backend(&after.name, &name);
            let pool = Some(after.name.clone());
            ConfigChange { pool, ..ConfigChange::new(ChangedObject::Backend, &name, kind, now) }
        };
        match pair {
            (Some(gone), None) => changes.push(change(gone, ChangeKind::Removed)),
            (None, Some(new)) => changes.push(change(new, ChangeKind::Added)),
            (Some(one), Some(other)) if one != other => {
                changes.push(change(other, ChangeKind::Changed).with(keys(one, other)));
            }
            _ => {}
        }
    }
}

fn tenants(now: &Config, next: &Config, uses: &LiveCounts<'_>, changes: &mut Vec<ConfigChange>) {
    let both = pairs(&now.listeners, &next.listeners, |listener| &listener.name);
    let both: Vec<_> = both.into_iter().filter_map(|(before, after)| before.zip(after)).collect();
    for pair in pairs(&now.tenants, &next.tenants, |tenant| &tenant.name) {
        match pair {
            (Some(gone), None) => changes.push(of_tenant(gone, ChangeKind::Removed, uses)),
            (None, Some(new)) => changes.push(of_tenant(new, ChangeKind::Added, uses)),
            (Some(before), Some(after)) => tenant(before, after, &both, uses, changes),
            (None, None) => {}
        }
    }
}

fn of_tenant(tenant: &TenantConfig, kind: ChangeKind, uses: &LiveCounts<'_>) -> ConfigChange {
    ConfigChange::new(ChangedObject::Tenant, &tenant.name, kind, uses.tenant(&tenant.name))
}

fn tenant(
    before: &TenantConfig,
    after: &TenantConfig,
    listeners: &[(&ListenerConfig, &ListenerConfig)],
    uses: &LiveCounts<'_>,
    changes: &mut Vec<ConfigChange>,
) {
    // Even of a tenant that is the same, a listener's pool may be another.
    let moves: Vec<_> = listeners
        .iter()
        .map(|(old, new)| (&new.name, pool_of(before, old), pool_of(after, new)))
        .filter(|(_, from, to)| from != to)
        .collect();
    let is_moved = !moves.is_empty() || before.endpoints != after.endpoints;
    if is_moved {
        let mut now = LiveCount::default();
        let mut differing = one_by_one("endpoints", &before.endpoints, &after.endpoints);
        for (listener, from, to) in moves {
            now += uses.tenant_at(&after.name, listener);
            let [from, to] = [from, to].map(|pool| pool.unwrap_or("none").to_owned());
            differing.push(KeyChange { key: listener.clone(), from: Some(from), to: Some(to) });
        }
        if before.endpoints != after.endpoints {
            now = uses.tenant(&after.name);
        }
        if !differing.is_empty() {
            changes.push(ConfigChange { now, ..of_tenant(after, ChangeKind::Moved, uses) }.with(differing));
        }
    }
    if before == after {
        return;
    }
    let limits = keys(&before.limits, &after.limits);
    if !limits.is_empty() {
        changes.push(of_tenant(after, ChangeKind::Limits, uses).with(limits));
    }
    if before.enabled != after.enabled {
        let [from, to] = [before, after].map(|tenant| if tenant.enabled { "enabled" } else { "disabled" });
        let key = KeyChange { key: "state".to_owned(), from: Some(from.to_owned()), to: Some(to.to_owned()) };
        changes.push(of_tenant(after, ChangeKind::State, uses).with(vec![key]));
    }
    // What is left when all of the above is equal.
    let rest = |tenant: &TenantConfig| TenantConfig {
        endpoints: Vec::new(),
        pool: None,
        routes: BTreeMap::new(),
        enabled: true,
        limits: TenantLimits::default(),
        ..tenant.clone()
    };
    let others = keys(&rest(before), &rest(after));
    if !others.is_empty() {
        changes.push(of_tenant(after, ChangeKind::Changed, uses).with(others));
    }
}

/// The pool of a tenant's sessions at a listener.
fn pool_of<'c>(tenant: &'c TenantConfig, listener: &'c ListenerConfig) -> Option<&'c str> {
    let own = tenant.routes.get(&listener.name).or(tenant.pool.as_ref());
    own.or(listener.pool.as_ref()).map(String::as_str)
}

/// What is new in a list, and what is gone. Another order makes no difference.
fn one_by_one<T: Ord + ToString>(key: &str, before: &[T], after: &[T]) -> Vec<KeyChange> {
    let [old, new] = [before, after].map(|list| list.iter().collect::<BTreeSet<_>>());
    let side = |from: Option<&T>, to: Option<&T>| KeyChange {
        key: key.to_owned(),
        from: from.map(ToString::to_string),
        to: to.map(ToString::to_string),
    };
    let gone = old.difference(&new).map(|item| side(Some(item), None));
    gone.chain(new.difference(&old).map(|item| side(None, Some(item)))).collect()
}

impl ListenerConfig {
    /// Whether what goes on there are flows.
    fn has_flows(&self) -> bool {
        self.protocol == Protocol::Udp
    }
}
