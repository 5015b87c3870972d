//! The rules of a pool's active check.

use super::shown;
use crate::config::Protocol;
use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::quoted;
use crate::config::table::Headed;
use crate::config::tables::{RawListener, RawPool};
use crate::config::value::{Keyword, MatchKind, ProbeKind};
use std::collections::HashSet;

/// Every rule, for one pool.
pub(super) fn rules(pool: &Headed<RawPool>, faults: &mut Vec<ConfigError>) {
    faults.extend(a_probe_ends_before_the_next(pool));
    keys_need_probes(pool, faults);
    keys_belong_to_the_kind(pool, faults);
    faults.extend(an_exchange_expects_something(pool));
    faults.extend(some_status_is_good(pool));
}

fn a_probe_ends_before_the_next(pool: &Headed<RawPool>) -> Option<ConfigError> {
    let probe = &pool.health;
    if probe.timeout.effective()? <= probe.interval.effective()? {
        return None;
    }
    let field = if probe.timeout.is_absent() { &probe.interval } else { &probe.timeout };
    let message = format!(
        "must let a probe end before the next one begins, found a timeout of {} and an interval of {}",
        shown(&probe.timeout),
        shown(&probe.interval)
    );
    Some(pool.fault(field, message))
}

fn keys_need_probes(pool: &Headed<RawPool>, faults: &mut Vec<ConfigError>) {
    let probe = &pool.health;
    if probe.kind.given() != Some(&ProbeKind::None) {
        return;
    }
    let keys = [
        probe.interval.written(|time| format!("{time:?}")),
        probe.timeout.written(|time| format!("{time:?}")),
        probe.rise.written(u32::to_string),
        probe.fall.written(u32::to_string),
        probe.port.written(u16::to_string),
        probe.send_proxy.written(bool::to_string),
    ];
    for (key, offset, found) in keys.into_iter().flatten() {
        let message =
            format!("must be absent where kind = \"none\", because nothing is probed, found {found}");
        faults.push(pool.head.fault_at(offset, &key, message));
    }
}

fn keys_belong_to_the_kind(pool: &Headed<RawPool>, faults: &mut Vec<ConfigError>) {
    use ProbeKind::{Exchange, Http};
    let probe = &pool.health;
    let Some(kind) = probe.kind.effective() else { return };
    let keys = [
        (Http, probe.path.written(|path| quoted(path))),
        (Http, probe.host.written(|host| quoted(host))),
        (Http, probe.expect_status.written(|_| "a list".to_owned())),
        (Exchange, probe.protocol.written(Protocol::word)),
        (Exchange, probe.send.written(|bytes| counted(bytes))),
        (Exchange, probe.expect.written(|bytes| counted(bytes))),
        (Exchange, probe.matching.written(MatchKind::word)),
    ];
    let default = probe.kind.default_note();
    for (owner, written) in keys {
        let Some((key, offset, found)) = written.filter(|_| owner != kind) else { continue };
        let message = format!(
            "must be absent where kind = {}{default}, because it belongs to kind = {}, found {found}",
            ProbeKind::word(&kind),
            ProbeKind::word(&owner)
        );
        faults.push(pool.head.fault_at(offset, &key, message));
    }
}

/// A pool that only UDP listeners use may have no TCP listener at its ports.
pub(super) fn probe_protocol_has_a_listener(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let (by_udp, by_tcp) = (reached(written, Protocol::Udp), reached(written, Protocol::Tcp));
    for pool in &written.pools {
        let Some(name) = pool.name.given().map(String::as_str) else { continue };
        let probe = &pool.health;
        let kind = probe.kind.effective();
        let is_datagram = probe.protocol.given() == Some(&Protocol::Udp);
        let asks_elsewhere =
            kind.is_none_or(|kind| kind == ProbeKind::None) || !probe.port.is_absent() || is_datagram;
        if asks_elsewhere || !by_udp.contains(name) || by_tcp.contains(name) {
            continue;
        }
        let message = format!(
            "must probe by UDP or at another port, because only UDP listeners use this pool, found {}{} \
             at the traffic's port: kind = \"exchange\" with protocol = \"udp\", or port = \
             8080, or kind = \"none\"",
            kind.as_ref().map_or_else(String::new, ProbeKind::word),
            probe.kind.default_note()
        );
        faults.push(pool.fault(&probe.kind, message));
    }
}

/// The names of the pools that a listener of this protocol may lead to.
fn reached(written: &RawConfig, protocol: Protocol) -> HashSet<&str> {
    let is_it = |listener: &&Headed<RawListener>| listener.protocol.effective() == Some(protocol);
    let listeners: Vec<_> = written.listeners.iter().filter(is_it).collect();
    if listeners.is_empty() {
        return HashSet::new();
    }
    let names: HashSet<_> =
        listeners.iter().filter_map(|listener| listener.name.given().map(String::as_str)).collect();
    let of_listeners = listeners.iter().filter_map(|listener| listener.pool.given());
    let of_tenants = written.tenants.iter().filter_map(|tenant| tenant.pool.given());
    let routes = written
        .tenants
        .iter()
        .flat_map(|tenant| tenant.routes.given().into_iter().flat_map(|routes| &routes.0));
    let routes = routes.filter(|(listener, _)| names.contains(listener.get_ref().as_str()));
    of_listeners
        .chain(of_tenants)
        .map(String::as_str)
        .chain(routes.map(|(_, pool)| pool.get_ref().as_str()))
        .collect()
}

fn counted(bytes: &[u8]) -> String {
    format!("a text of {} bytes", bytes.len())
}

fn an_exchange_expects_something(pool: &Headed<RawPool>) -> Option<ConfigError> {
    let probe = &pool.health;
    let kind = probe.kind.spanned().filter(|kind| *kind.get_ref() == ProbeKind::Exchange)?;
    let message = "must be present where kind = \"exchange\", such as expect = \"PONG\", found none";
    let fault = pool.fault_at(kind.span().start, &probe.expect, message.to_owned());
    probe.expect.is_absent().then_some(fault)
}

fn some_status_is_good(pool: &Headed<RawPool>) -> Option<ConfigError> {
    // For another kind, the key itself is already reported.
    pool.health.expect_status.given().filter(|statuses| statuses.is_empty())?;
    pool.health.kind.given().filter(|kind| **kind == ProbeKind::Http)?;
    let message = "must hold at least one status, such as \"200-399\", found an empty list";
    Some(pool.fault(&pool.health.expect_status, message.to_owned()))
}
