//! What the configuration means: one function for each rule, and every fault of every rule.

mod address;
mod build;
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
use super::section::ParsedField;
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
    timeouts_are_more_than_0s(&written, &mut faults);
    tcp_user_timeout_is_one_that_the_kernel_takes(&written, &mut faults);
    there_is_a_listener(&written, &mut faults);
    listener::rules(&written, &mut faults);
    address::listener_addresses_do_not_overlap(&written, &mut faults);
    dns::rules(&written, &mut faults);
    pool::rules(&written, &mut faults);
    probe::probe_protocol_has_a_listener(&written, &mut faults);
    tenant::rules(&written, &mut faults);
    limits::rules(&written, &mut faults);
    if faults.is_empty() { Ok(build::config(written)) } else { Err(ConfigErrors::sorted(faults)) }
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
        let fallbacks = [
            ("on-no-endpoint", &listener.on_no_endpoint),
            ("on-unknown-endpoint", &listener.on_unknown_endpoint),
        ];
        for (key, fallback) in fallbacks {
            let Some(fallback) = fallback.spanned() else { continue };
            if let Fallback::Tenant(name) = fallback.get_ref() {
                let name = toml::Spanned::new(fallback.span(), name.clone());
                known.tenants.require(head, key, Some(&name), faults);
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
        for (listener, pool) in tenant.routes.given().into_iter().flatten() {
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

fn timeouts_are_more_than_0s(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let timeouts = &written.timeouts;
    let Some(head) = &timeouts.head else { return };
    let keys = [
        ("header", &timeouts.header),
        ("connect", &timeouts.connect),
        ("idle", &timeouts.idle),
        ("half-close", &timeouts.half_close),
        ("flow-idle", &timeouts.flow_idle),
    ];
    for (key, timeout) in keys {
        faults.extend(no_time(timeout).map(|(offset, message)| head.fault_at(offset, key, message)));
    }
}

/// The longest `tcp-user-timeout`: the kernel counts it in milliseconds and keeps it in 31 bits (tcp(7)).
const LONGEST_USER_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

fn tcp_user_timeout_is_one_that_the_kernel_takes(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let timeouts = &written.timeouts;
    let (Some(head), Some(time)) = (&timeouts.head, timeouts.tcp_user_timeout.spanned()) else { return };
    let longest = LONGEST_USER_TIMEOUT;
    if *time.get_ref() > longest {
        let message =
            format!("must be at most 24h, or 0s for the kernel's own rules, found {:?}", time.get_ref());
        faults.push(head.fault_at(time.span().start, "tcp-user-timeout", message));
    }
}

/// A time in words, marked where it is the default.
fn shown(time: Duration, field: &ParsedField<Duration>) -> String {
    format!("{time:?}{}", if field.is_absent() { " (the default)" } else { "" })
}

/// What is wrong with a time that must not be 0.
fn no_time(field: &ParsedField<Duration>) -> Option<(usize, String)> {
    let time = field.spanned().filter(|time| time.get_ref().is_zero())?;
    Some((time.span().start, "must be more than 0s, found 0s".to_owned()))
}
