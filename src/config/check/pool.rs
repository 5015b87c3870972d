//! The rules of a pool.

use std::collections::HashMap;

use crate::config::error::Fault;
use crate::config::section::{Field, quoted};
use crate::config::value::{Name, PreferZone};
use crate::config::written::{Backend, Pool, Written};
use crate::config::{Target, suggest};

use super::{no_time, probe};

/// Every rule, for every pool.
pub(super) fn rules(written: &Written, faults: &mut Vec<Fault>) {
    for pool in &written.pools {
        faults.extend(a_pool_has_a_backend(pool));
        no_backend_stands_twice(pool, faults);
        source_addresses_can_reach_a_backend(pool, faults);
        faults.extend(the_preferred_zone_has_a_backend(pool));
        waiting_and_ejection_take_time(pool, faults);
        faults.extend(who_waits_waits_for_a_backend_that_was_full(pool));
        probe::rules(pool, faults);
    }
}

fn a_pool_has_a_backend(pool: &Pool) -> Option<Fault> {
    let backends = pool.backends.spanned().filter(|backends| backends.get_ref().is_empty())?;
    let message = "must hold at least one backend, such as \"10.0.1.10:80\", found an empty list";
    Some(pool.head.fault_at(backends.span().start, "backends", message.to_owned()))
}

fn no_backend_stands_twice(pool: &Pool, faults: &mut Vec<Fault>) {
    let mut first: HashMap<&Target, usize> = HashMap::new();
    for address in pool.backends().filter_map(|backend| backend.address.spanned()) {
        let (target, offset) = (address.get_ref(), address.span().start);
        let place = *first.entry(target).or_insert(offset);
        if place != offset {
            let other = pool.head.place(place);
            let message = format!("must hold each address once, found {target} at {other} too");
            faults.push(pool.head.fault_at(offset, "backends", message));
        }
    }
}

fn source_addresses_can_reach_a_backend(pool: &Pool, faults: &mut Vec<Fault>) {
    let Some(sources) = pool.source_addresses.given() else { return };
    // Where a backend could not be read, or there is none at all, that is a fault already.
    let targets: Option<Vec<&Target>> = pool.backends().map(|backend| backend.address.given()).collect();
    let Some(targets) = targets.filter(|targets| !targets.is_empty()) else { return };
    // A name may have addresses of both families, and others tomorrow.
    let may_be = |target: &Target, ipv4: bool| match target {
        Target::Address(address) => address.is_ipv4() == ipv4,
        Target::Host { .. } | Target::Service(_) => true,
    };
    for source in &sources.items {
        let address = source.get_ref();
        if !targets.iter().any(|target| may_be(target, address.is_ipv4())) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let message = format!(
                "must be of a family that a backend has, found {address}, and no backend is {family}"
            );
            faults.push(pool.head.fault_at(source.span().start, "source-addresses", message));
        }
    }
}

/// The values of a key of the backends; none where one of them is a fault already, or there is no backend at all.
fn of_each<T>(pool: &Pool, key: fn(&Backend) -> &Field<T>) -> Option<Vec<&T>> {
    let faulty = |field: &&Field<T>| matches!(field, Field::Faulty);
    let fields: Vec<&Field<T>> = pool.backends().map(key).collect();
    let readable = !fields.is_empty() && !fields.iter().any(faulty);
    readable.then(|| fields.into_iter().filter_map(Field::given).collect())
}

fn the_preferred_zone_has_a_backend(pool: &Pool) -> Option<Fault> {
    let prefer = pool.prefer_zone.spanned()?;
    let PreferZone(Some(wanted)) = prefer.get_ref() else { return None };
    let zones: Vec<&Name> = of_each(pool, |backend| &backend.zone)?;
    if zones.iter().any(|zone| zone.0 == *wanted) {
        return None;
    }
    let hint = match suggest::closest(wanted, zones.iter().map(|zone| zone.0.as_str())) {
        Some(close) => format!(": did you mean \"{close}\"?"),
        None if zones.is_empty() => ": no backend has a zone at all".to_owned(),
        None => String::new(),
    };
    let message = format!("must be the zone of at least one backend, found {}{hint}", quoted(wanted));
    Some(pool.head.fault_at(prefer.span().start, "prefer-zone", message))
}

fn waiting_and_ejection_take_time(pool: &Pool, faults: &mut Vec<Fault>) {
    let keys = [("queue.timeout", &pool.queue.timeout), ("ejection.base-time", &pool.ejection.base_time)];
    for (key, time) in keys {
        faults.extend(no_time(time).map(|(offset, message)| pool.head.fault_at(offset, key, message)));
    }
}

fn who_waits_waits_for_a_backend_that_was_full(pool: &Pool) -> Option<Fault> {
    let length = pool.queue.length.spanned().filter(|length| length.get_ref().0 > 0)?;
    let most = of_each(pool, |backend| &backend.max_sessions)?;
    if !most.is_empty() {
        return None;
    }
    let found = length.get_ref().0;
    let message = format!(
        "must be 0 where no backend has max-sessions, because none is ever full and nobody waits, found {found}"
    );
    Some(pool.head.fault_at(length.span().start, "queue.length", message))
}
