//! The rules of a pool's active check.

use std::collections::HashSet;
use std::time::Duration;

use crate::config::Protocol;
use crate::config::error::ConfigError;
use crate::config::raw::{RawConfig, RawListener, RawPool};
use crate::config::section::quoted;
use crate::config::value::{Count, ProbeKind};

use super::build::{PROBE_INTERVAL, PROBE_TIMEOUT};
use super::{no_time, shown};

/// Every rule, for one pool.
pub(super) fn rules(pool: &RawPool, faults: &mut Vec<ConfigError>) {
    probes_take_time(pool, faults);
    faults.extend(a_probe_ends_before_the_next(pool));
    keys_need_probes(pool, faults);
    keys_belong_to_the_kind(pool, faults);
    faults.extend(an_exchange_expects_something(pool));
    faults.extend(some_status_is_good(pool));
}

fn probes_take_time(pool: &RawPool, faults: &mut Vec<ConfigError>) {
    for (key, time) in [("health.interval", &pool.health.interval), ("health.timeout", &pool.health.timeout)]
    {
        faults.extend(no_time(time).map(|(offset, message)| pool.head.fault_at(offset, key, message)));
    }
}

fn a_probe_ends_before_the_next(pool: &RawPool) -> Option<ConfigError> {
    let probe = &pool.health;
    let interval = *probe.interval.effective(&PROBE_INTERVAL)?;
    let timeout = *probe.timeout.effective(&PROBE_TIMEOUT)?;
    if timeout <= interval || interval.is_zero() {
        return None;
    }
    let (key, at) = match (probe.timeout.spanned(), probe.interval.spanned()) {
        (Some(timeout), _) => ("health.timeout", timeout.span().start),
        (None, interval) => ("health.interval", interval?.span().start),
    };
    let message = format!(
        "must let a probe end before the next one begins, found a timeout of {} and an interval of {}",
        shown(timeout, &probe.timeout),
        shown(interval, &probe.interval)
    );
    Some(pool.head.fault_at(at, key, message))
}

fn keys_need_probes(pool: &RawPool, faults: &mut Vec<ConfigError>) {
    let probe = &pool.health;
    if probe.kind.given() != Some(&ProbeKind::None) {
        return;
    }
    let time = |time: &Duration| format!("{time:?}");
    let count = |count: &Count<1>| count.0.to_string();
    let keys = [
        ("health.interval", probe.interval.said(time)),
        ("health.timeout", probe.timeout.said(time)),
        ("health.rise", probe.rise.said(count)),
        ("health.fall", probe.fall.said(count)),
        ("health.port", probe.port.said(|port| port.0.to_string())),
        ("health.send-proxy", probe.send_proxy.said(bool::to_string)),
    ];
    for (key, written) in keys {
        let Some((offset, found)) = written else { continue };
        let message =
            format!("must be absent where kind = \"none\", because nothing is probed, found {found}");
        faults.push(pool.head.fault_at(offset, key, message));
    }
}

fn keys_belong_to_the_kind(pool: &RawPool, faults: &mut Vec<ConfigError>) {
    use ProbeKind::{Exchange, Http};
    let probe = &pool.health;
    let Some(kind) = probe.kind.effective(&ProbeKind::Tcp) else { return };
    let keys = [
        (Http, "health.path", probe.path.said(|path| quoted(&path.0))),
        (Http, "health.host", probe.host.said(|host| quoted(&host.0))),
        (Http, "health.expect-status", probe.expect_status.said(|_| "a list".to_owned())),
        (Exchange, "health.protocol", probe.protocol.said(|protocol| quoted(protocol_name(*protocol)))),
        (Exchange, "health.send", probe.send.said(|bytes| counted(&bytes.0))),
        (Exchange, "health.expect", probe.expect.said(|bytes| counted(&bytes.0))),
        (Exchange, "health.match", probe.matching.said(|way| quoted(way.as_str()))),
    ];
    let default = if probe.kind.is_absent() { " (the default)" } else { "" };
    for (owner, key, written) in keys {
        let Some((offset, found)) = written.filter(|_| owner != *kind) else { continue };
        let message = format!(
            "must be absent where kind = \"{}\"{default}, because it belongs to kind = \"{}\", found {found}",
            kind.as_str(),
            owner.as_str()
        );
        faults.push(pool.head.fault_at(offset, key, message));
    }
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// A pool that only UDP listeners use may have no TCP listener at its ports.
pub(super) fn probe_protocol_has_a_listener(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let (by_udp, by_tcp) = (reached(written, Protocol::Udp), reached(written, Protocol::Tcp));
    for pool in &written.pools {
        let Some(name) = pool.name.given().map(|name| name.0.as_str()) else { continue };
        let probe = &pool.health;
        let kind = probe.kind.effective(&ProbeKind::Tcp);
        let is_datagram = probe.protocol.given() == Some(&Protocol::Udp);
        let asks_elsewhere =
            kind.is_none_or(|kind| *kind == ProbeKind::None) || !probe.port.is_absent() || is_datagram;
        if asks_elsewhere || !by_udp.contains(name) || by_tcp.contains(name) {
            continue;
        }
        let (at, default) = match probe.kind.spanned() {
            Some(kind) => (kind.span().start, ""),
            None => (pool.head.offset(), " (the default)"),
        };
        let message = format!(
            "must probe by UDP or at another port, because only UDP listeners use this pool, found \
             \"{}\"{default} at the traffic's port: kind = \"exchange\" with protocol = \"udp\", or port = \
             8080, or kind = \"none\"",
            kind.map_or("tcp", |kind| kind.as_str())
        );
        faults.push(pool.head.fault_at(at, "health.kind", message));
    }
}

/// The names of the pools that a listener of this protocol may lead to.
fn reached(written: &RawConfig, protocol: Protocol) -> HashSet<&str> {
    let is_it = |listener: &&RawListener| listener.protocol.effective(&Protocol::Tcp) == Some(&protocol);
    let listeners: Vec<_> = written.listeners.iter().filter(is_it).collect();
    if listeners.is_empty() {
        return HashSet::new();
    }
    let names: HashSet<_> =
        listeners.iter().filter_map(|listener| Some(listener.name.given()?.0.as_str())).collect();
    let of_listeners = listeners.iter().filter_map(|listener| listener.pool.given());
    let of_tenants = written.tenants.iter().filter_map(|tenant| tenant.pool.given());
    let routes = written.tenants.iter().flat_map(|tenant| tenant.routes.given().into_iter().flatten());
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

fn an_exchange_expects_something(pool: &RawPool) -> Option<ConfigError> {
    let probe = &pool.health;
    let kind = probe.kind.spanned().filter(|kind| *kind.get_ref() == ProbeKind::Exchange)?;
    let message = "must be present where kind = \"exchange\", such as expect = \"PONG\", found none";
    let fault = pool.head.fault_at(kind.span().start, "health.expect", message.to_owned());
    probe.expect.is_absent().then_some(fault)
}

fn some_status_is_good(pool: &RawPool) -> Option<ConfigError> {
    // Of another kind, it is a fault already that there is a list.
    let statuses = pool.health.expect_status.spanned().filter(|statuses| statuses.get_ref().is_empty())?;
    pool.health.kind.given().filter(|kind| **kind == ProbeKind::Http)?;
    let message = "must hold at least one status, such as \"200-399\", found an empty list";
    Some(pool.head.fault_at(statuses.span().start, "health.expect-status", message.to_owned()))
}
