//! The rules of a pool.

use std::collections::HashMap;

use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::{ParsedField, quoted};
use crate::config::table::Headed;
use crate::config::tables::{RawBackend, RawPool};
use crate::config::{BackendTarget, suggest};

use super::probe;

/// Addresses, and names, of one pool at most.
const MOST_ADDRESSES: usize = 32_000;
const MOST_NAMES: usize = 256;

/// Every rule, for every pool.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    for pool in &written.pools {
        faults.extend(a_pool_has_a_backend(pool));
        faults.extend(no_pool_has_more_than_can_be_told_apart(pool));
        no_backend_stands_twice(pool, faults);
        source_addresses_can_reach_a_backend(pool, faults);
        faults.extend(the_preferred_zone_has_a_backend(pool));
        faults.extend(queue_needs_max_sessions(pool));
        probe::rules(pool, faults);
    }
}

fn a_pool_has_a_backend(pool: &Headed<RawPool>) -> Option<ConfigError> {
    pool.backends.given().filter(|backends| backends.is_empty())?;
    let message = "must hold at least one backend, such as \"10.0.1.10:80\", found an empty list";
    Some(pool.fault(&pool.backends, message.to_owned()))
}

/// Backends are numbered in 16 bits, and each name has 128 numbers for its addresses to come and go.
fn no_pool_has_more_than_can_be_told_apart(pool: &Headed<RawPool>) -> Option<ConfigError> {
    pool.backends.given()?;
    let targets = || pool.backends().filter_map(|backend| backend.target.given());
    let addresses = targets().filter(|target| matches!(target, BackendTarget::Address(_))).count();
    let names = targets().count() - addresses;
    let message = format!(
        "must hold at most {MOST_ADDRESSES} addresses and {MOST_NAMES} names, found {addresses} and {names}; give a tenant or \
         a listener a pool of its own"
    );
    let fault = || pool.fault(&pool.backends, message);
    (addresses > MOST_ADDRESSES || names > MOST_NAMES).then(fault)
}

fn no_backend_stands_twice(pool: &Headed<RawPool>, faults: &mut Vec<ConfigError>) {
    let mut first: HashMap<&BackendTarget, usize> = HashMap::new();
    for address in pool.backends().filter_map(|backend| backend.target.spanned()) {
        let (target, offset) = (address.get_ref(), address.span().start);
        let place = *first.entry(target).or_insert(offset);
        if place != offset {
            let other = pool.head.place(place);
            let message = format!("must list each address once, found {target} at {other} too");
            faults.push(pool.fault_at(offset, &pool.backends, message));
        }
    }
}

fn source_addresses_can_reach_a_backend(pool: &Headed<RawPool>, faults: &mut Vec<ConfigError>) {
    let Some(sources) = pool.source_addresses.given() else { return };
    // An invalid backend or an empty list is already reported.
    let targets: Option<Vec<&BackendTarget>> =
        pool.backends().map(|backend| backend.target.given()).collect();
    let Some(targets) = targets.filter(|targets| !targets.is_empty()) else { return };
    // A name can resolve to addresses of both families, now or later.
    let may_be = |target: &BackendTarget, ipv4: bool| match target {
        BackendTarget::Address(address) => address.is_ipv4() == ipv4,
        BackendTarget::Host { .. } | BackendTarget::Service(_) => true,
    };
    for source in &sources.items {
        let address = source.get_ref();
        if !targets.iter().any(|target| may_be(target, address.is_ipv4())) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let message = format!(
                "must have the address family of a backend, found {address}, and no backend is {family}"
            );
            faults.push(pool.fault_at(source.span().start, &pool.source_addresses, message));
        }
    }
}

/// The values of a key of the backends; none where one of them is a fault already, or there is no backend at all.
fn of_each<T>(pool: &Headed<RawPool>, key: fn(&RawBackend) -> &ParsedField<T>) -> Option<Vec<&T>> {
    let faulty = |field: &&ParsedField<T>| matches!(field, ParsedField::Faulty);
    let fields: Vec<&ParsedField<T>> = pool.backends().map(key).collect();
    let readable = !fields.is_empty() && !fields.iter().any(faulty);
    readable.then(|| fields.into_iter().filter_map(ParsedField::given).collect())
}

fn the_preferred_zone_has_a_backend(pool: &Headed<RawPool>) -> Option<ConfigError> {
    let wanted = pool.prefer_zone.given()?.as_ref()?;
    let zones: Vec<&String> = of_each(pool, |backend| &backend.zone)?;
    if zones.contains(&wanted) {
        return None;
    }
    let hint = match suggest::closest(wanted, zones.iter().map(|zone| zone.as_str())) {
        Some(close) => format!(": did you mean \"{close}\"?"),
        None if zones.is_empty() => ": no backend has a zone".to_owned(),
        None => String::new(),
    };
    let message = format!("must be the zone of at least one backend, found {}{hint}", quoted(wanted));
    Some(pool.fault(&pool.prefer_zone, message))
}

fn queue_needs_max_sessions(pool: &Headed<RawPool>) -> Option<ConfigError> {
    let found = pool.queue.length.given().filter(|length| **length > 0)?;
    let most = of_each(pool, |backend| &backend.max_sessions)?;
    if !most.is_empty() {
        return None;
    }
    let message =
        format!("must be 0 where no backend has max-sessions, because no session ever waits, found {found}");
    Some(pool.fault(&pool.queue.length, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::config::test_text::LISTENER;

    fn fault(addresses: usize, names: usize) -> Option<String> {
        let address = |number: usize| format!("\"10.0.{}.{}:80\"", number / 256, number % 256);
        let name = |number: usize| format!("\"app-{number}.example.com:80\"");
        let backends: Vec<_> = (0..addresses).map(address).chain((0..names).map(name)).collect();
        let text = format!(
            "{LISTENER}[[pool]]\nname = \"app\"\nbackends = [{}]\n[[tenant]]\nname = \"acme\"\n",
            backends.join(", ")
        );
        Config::parse("test.toml", &text).err().map(|faults| faults.to_string())
    }

    #[test]
    fn largest_pool_is_accepted_and_one_more_backend_is_refused() {
        assert_eq!((fault(MOST_ADDRESSES, 0), fault(0, MOST_NAMES)), (None, None));
        for (addresses, names, found) in
            [(MOST_ADDRESSES + 1, 0, "found 32001 and 0"), (1, MOST_NAMES + 1, "found 1 and 257")]
        {
            let said = fault(addresses, names).unwrap();
            assert!(
                said.contains(
                    "test.toml:8: pool \"app\": backends: must hold at most 32000 addresses and 256 names"
                ),
                "{said}"
            );
            assert!(said.contains(found), "{said}");
        }
    }
}
