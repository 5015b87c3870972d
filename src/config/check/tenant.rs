//! The rules of a tenant, and of a tenant on a listener.

use std::collections::HashMap;
use std::time::Duration;

use super::limits::own_or_default;
use crate::config::OnRevoke;
use crate::config::error::ConfigError;
use crate::config::raw::{RawConfig, RawListener, RawRevoke, RawTenant};
use crate::config::section::{ParsedField, TableHead};
use crate::config::value::ProxyProtocolMode;
use crate::id::EndpointId;

/// Every rule, for every tenant.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    an_endpoint_belongs_to_one_tenant(written, faults);
    every_tenant_has_a_pool_on_every_listener(written, faults);
    if let Some(head) = &written.defaults {
        a_revoke_grace_is_used(head, &written.tenant_defaults.revoke, &RawRevoke::default(), faults);
    }
    for tenant in &written.tenants {
        a_revoke_grace_is_used(&tenant.head, &tenant.revoke, &written.tenant_defaults.revoke, faults);
    }
}

/// The longest grace that a session or a flow may have after its endpoint was taken away.
const LONGEST_GRACE: Duration = Duration::from_secs(3600);

/// What holds for a tenant.
pub(super) fn on_revoke(own: &RawRevoke, defaults: &RawRevoke) -> OnRevoke {
    own_or_default(&own.on_revoke, &defaults.on_revoke).given().copied().unwrap_or_default()
}

/// A grace has an end, and stands where sessions end.
fn a_revoke_grace_is_used(
    head: &TableHead,
    own: &RawRevoke,
    defaults: &RawRevoke,
    faults: &mut Vec<ConfigError>,
) {
    let Some(grace) = own.grace.spanned() else { return };
    let (offset, grace) = (grace.span().start, *grace.get_ref());
    let message = if grace > LONGEST_GRACE {
        format!("must be at most 1h, found {grace:?}")
    } else if on_revoke(own, defaults) == OnRevoke::Keep {
        format!("must be absent where on-revoke is \"keep\", found {grace:?}")
    } else {
        return;
    };
    faults.push(head.fault_at(offset, "revoke-grace", message));
}

fn an_endpoint_belongs_to_one_tenant(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let mut owners: HashMap<EndpointId, (&TableHead, usize), foldhash::fast::RandomState> =
        HashMap::default();
    for tenant in &written.tenants {
        for endpoint in tenant.endpoints.given().map(|list| list.items.as_slice()).unwrap_or_default() {
            let (id, offset) = (*endpoint.get_ref(), endpoint.span().start);
            let Some((owner, place)) = owners.insert(id, (&tenant.head, offset)) else { continue };
            let message = format!(
                "must belong to one tenant and be listed once, found {id} in {} ({}) too",
                owner.title(),
                owner.place(place)
            );
            faults.push(tenant.head.fault_at(offset, "endpoints", message));
        }
    }
}

/// How many listeners a message names before it counts the rest.
const NAMED: usize = 3;

/// A session needs a pool: that of the tenant's route, of the tenant or of the listener.
fn every_tenant_has_a_pool_on_every_listener(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let bare: Vec<_> = written.listeners.iter().filter(|listener| listener.pool.is_absent()).collect();
    if bare.is_empty() {
        return;
    }
    for tenant in written.tenants.iter().filter(|tenant| tenant.pool.is_absent()) {
        let lost: Vec<_> =
            bare.iter().filter(|listener| arrives(tenant, listener) && !routed(tenant, listener)).collect();
        if lost.is_empty() {
            continue;
        }
        let mut named: Vec<String> = lost.iter().take(NAMED).map(|listener| place(listener)).collect();
        if lost.len() > NAMED {
            named.push(format!("and {} more", lost.len() - NAMED));
        }
        let message = format!(
            "must be present, or a route for the listener, or a pool of the listener, found none of them on {}",
            named.join(", ")
        );
        faults.push(tenant.head.fault("pool", message));
    }
}

fn place(listener: &RawListener) -> String {
    format!("{} ({})", listener.head.title(), listener.head.place(listener.head.offset()))
}

/// Whether a listener can carry a tenant's traffic; where that is a fault already, it is not judged.
fn arrives(tenant: &RawTenant, listener: &RawListener) -> bool {
    match listener.proxy_protocol.effective(&ProxyProtocolMode::Require) {
        Some(ProxyProtocolMode::Require) => true,
        Some(ProxyProtocolMode::Off) => {
            listener.tenant.given().is_some_and(|name| tenant.head.name() == Some(name))
        }
        None => false,
    }
}

fn routed(tenant: &RawTenant, listener: &RawListener) -> bool {
    match (&tenant.routes, listener.head.name()) {
        (ParsedField::Given(routes), Some(name)) => {
            routes.get_ref().iter().any(|(route, _)| route.get_ref() == name)
        }
        (ParsedField::Absent, Some(_)) => false,
        // A route or a name that could not be read may well be the missing one.
        (ParsedField::Faulty, _) | (_, None) => true,
    }
}
