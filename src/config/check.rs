//! What the configuration means: one function for each rule, and every fault of every rule.

mod address;
mod dns;
mod limits;
mod listener;
mod names;
mod pool;
mod probe;
mod tenant;

use std::time::Duration;

use super::error::{ConfigError, ConfigErrors};
use super::raw::RawConfig;
use super::table::{Field, Headed, Kind};
use super::{Config, Fallback};
use names::NameIndex;

/// Checks the raw configuration and builds the checked one.
///
/// # Errors
/// Every fault, of form and of meaning, in the order of the files and their lines.
pub(super) fn check(mut written: RawConfig) -> Result<Config, ConfigErrors> {
    let mut faults = std::mem::take(&mut written.faults);
    let known = names_are_unique(&written, &mut faults);
    every_listener_names_a_known_pool_and_tenant(&written, &known, &mut faults);
    every_tenant_names_known_pools_and_listeners(&written, &known, &mut faults);
    there_is_a_listener(&written, &mut faults);
    listener::rules(&written, &mut faults);
    address::listener_addresses_do_not_overlap(&written, &mut faults);
    faults.extend(written.dns.as_ref().and_then(dns::min_ttl_is_at_most_max_ttl));
    pool::rules(&written, &mut faults);
    probe::probe_protocol_has_a_listener(&written, &mut faults);
    tenant::rules(&written, &mut faults);
    limits::rules(&written, &mut faults);
    if faults.is_empty() { Ok(build(written)) } else { Err(ConfigErrors::sorted(faults)) }
}

/// The names of listeners, pools and tenants.
struct KnownNames<'w> {
    listeners: NameIndex<'w>,
    pools: NameIndex<'w>,
    tenants: NameIndex<'w>,
}

fn names_are_unique<'w>(written: &'w RawConfig, faults: &mut Vec<ConfigError>) -> KnownNames<'w> {
    let (mut listeners, mut pools, mut tenants) =
        (NameIndex::new("listener"), NameIndex::new("pool"), NameIndex::new("tenant"));
    for listener in &written.listeners {
        listeners.add(&listener.head, &listener.name, faults);
    }
    for pool in &written.pools {
        pools.add(&pool.head, &pool.name, faults);
    }
    for tenant in &written.tenants {
        tenants.add(&tenant.head, &tenant.name, faults);
    }
    KnownNames { listeners, pools, tenants }
}

fn every_listener_names_a_known_pool_and_tenant(
    written: &RawConfig,
    known: &KnownNames<'_>,
    faults: &mut Vec<ConfigError>,
) {
    for listener in &written.listeners {
        let head = &listener.head;
        known.pools.require(head, "pool", listener.pool.spanned(), faults);
        known.tenants.require(head, "tenant", listener.tenant.spanned(), faults);
        for field in [&listener.on_no_endpoint, &listener.on_unknown_endpoint] {
            let Some(fallback) = field.spanned() else { continue };
            if let Fallback::Tenant(name) = fallback.get_ref() {
                let name = toml::Spanned::new(fallback.span(), name.clone());
                known.tenants.require(head, field.key.name, Some(&name), faults);
            }
        }
    }
}

fn every_tenant_names_known_pools_and_listeners(
    written: &RawConfig,
    known: &KnownNames<'_>,
    faults: &mut Vec<ConfigError>,
) {
    for tenant in &written.tenants {
        known.pools.require(&tenant.head, "pool", tenant.pool.spanned(), faults);
        for (listener, pool) in tenant.routes.given().into_iter().flat_map(|routes| &routes.0) {
            known.listeners.require(&tenant.head, "routes", Some(listener), faults);
            known.pools.require(&tenant.head, "routes", Some(pool), faults);
        }
    }
}

fn there_is_a_listener(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    if written.listeners.is_empty() {
        let message = "must be present at least once, with a name, a bind and trusted-sources, found none";
        faults.extend(written.head.as_ref().map(|head| head.fault("[[listener]]", message.to_owned())));
    }
}

/// Makes the configuration. Called where no fault was found.
fn build(written: RawConfig) -> Config {
    let defaults = written.tenant_defaults.map(|defaults| defaults.keys).unwrap_or_default();
    Config {
        process: keys(written.process).into(),
        admin: keys(written.admin).into(),
        health: keys(written.health).into(),
        log: keys(written.log).into(),
        timeouts: keys(written.timeouts).into(),
        drain: keys(written.drain).into(),
        dns: keys(written.dns).into(),
        listeners: written.listeners.into_iter().map(|listener| listener.keys.into()).collect(),
        pools: written.pools.into_iter().map(|pool| pool.keys.into()).collect(),
        tenants: written.tenants.into_iter().map(|own| own.keys.with_defaults(&defaults).into()).collect(),
    }
}

/// The keys of a table that stands once; where it is absent, all of them are.
fn keys<R: Default>(table: Option<Headed<R>>) -> R {
    table.map(|table| table.keys).unwrap_or_default()
}

/// The time that counts, in words, marked where it is the default.
fn shown<K: Kind<Parsed = Duration>>(field: &Field<K>) -> String {
    format!("{:?}{}", field.effective().unwrap_or_default(), field.default_note())
}
