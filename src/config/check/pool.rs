//! The rules of a pool.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::config::error::Fault;
use crate::config::section::Field;
use crate::config::value::{Count, ProbeKind};
use crate::config::written::{Pool, Written};

use super::build::{PROBE_INTERVAL, PROBE_TIMEOUT};
use super::no_time;

/// Every rule, for every pool.
pub(super) fn rules(written: &Written, faults: &mut Vec<Fault>) {
    for pool in &written.pools {
        faults.extend(a_pool_has_a_backend(pool));
        no_backend_stands_twice(pool, faults);
        source_addresses_can_reach_a_backend(pool, faults);
        probes_take_time(pool, faults);
        faults.extend(a_probe_ends_before_the_next(pool));
        without_probes_nothing_is_said_of_them(pool, faults);
    }
}

fn a_pool_has_a_backend(pool: &Pool) -> Option<Fault> {
    let backends = pool.backends.spanned().filter(|backends| backends.get_ref().is_empty())?;
    let message = "must hold at least one backend, such as \"10.0.1.10:80\", found an empty list";
    Some(pool.head.fault_at(backends.span().start, "backends", message.to_owned()))
}

fn no_backend_stands_twice(pool: &Pool, faults: &mut Vec<Fault>) {
    let mut first: HashMap<SocketAddr, usize> = HashMap::new();
    for backend in pool.backends.given().map(|list| list.items.as_slice()).unwrap_or_default() {
        let (address, offset) = (backend.get_ref().0, backend.span().start);
        let place = *first.entry(address).or_insert(offset);
        if place != offset {
            let other = pool.head.place(place);
            let message = format!("must hold each address once, found {address} at {other} too");
            faults.push(pool.head.fault_at(offset, "backends", message));
        }
    }
}

fn source_addresses_can_reach_a_backend(pool: &Pool, faults: &mut Vec<Fault>) {
    let (Some(sources), Some(backends)) = (pool.source_addresses.given(), pool.backends.given()) else {
        return;
    };
    // A backend that could not be read, or none at all, is a fault already.
    if !backends.complete || backends.items.is_empty() {
        return;
    }
    for source in &sources.items {
        let address = source.get_ref();
        if !backends.items.iter().any(|backend| backend.get_ref().0.is_ipv4() == address.is_ipv4()) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let message = format!(
                "must be of a family that a backend has, found {address}, and no backend is {family}"
            );
            faults.push(pool.head.fault_at(source.span().start, "source-addresses", message));
        }
    }
}

fn probes_take_time(pool: &Pool, faults: &mut Vec<Fault>) {
    for (key, time) in [("health.interval", &pool.health.interval), ("health.timeout", &pool.health.timeout)]
    {
        faults.extend(no_time(time).map(|(offset, message)| pool.head.fault_at(offset, key, message)));
    }
}

fn a_probe_ends_before_the_next(pool: &Pool) -> Option<Fault> {
    let probe = &pool.health;
    let interval = *probe.interval.effective(&PROBE_INTERVAL)?;
    let timeout = *probe.timeout.effective(&PROBE_TIMEOUT)?;
    if timeout <= interval || interval.is_zero() {
        return None;
    }
    let said = |time: Duration, field: &Field<Duration>| {
        format!("{time:?}{}", if field.is_absent() { " (the default)" } else { "" })
    };
    let (key, at) = match (probe.timeout.spanned(), probe.interval.spanned()) {
        (Some(timeout), _) => ("health.timeout", timeout.span().start),
        (None, interval) => ("health.interval", interval?.span().start),
    };
    let message = format!(
        "must leave a probe time to end before the next begins, found a timeout of {} and an interval of {}",
        said(timeout, &probe.timeout),
        said(interval, &probe.interval)
    );
    Some(pool.head.fault_at(at, key, message))
}

fn without_probes_nothing_is_said_of_them(pool: &Pool, faults: &mut Vec<Fault>) {
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
    ];
    for (key, written) in keys {
        let Some((offset, found)) = written else { continue };
        let message =
            format!("must be absent where kind = \"none\", because nothing is probed, found {found}");
        faults.push(pool.head.fault_at(offset, key, message));
    }
}
