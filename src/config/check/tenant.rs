//! The rules of a tenant, and of a tenant on a listener.

use std::collections::HashMap;

use crate::config::error::Fault;
use crate::config::section::{Field, Head};
use crate::config::value::ProxyProtocol;
use crate::config::written::{Listener, Tenant, Written};
use crate::id::EndpointId;

/// Every rule, for every tenant.
pub(super) fn rules(written: &Written, faults: &mut Vec<Fault>) {
    an_endpoint_belongs_to_one_tenant(written, faults);
    every_tenant_has_a_pool_on_every_listener(written, faults);
}

fn an_endpoint_belongs_to_one_tenant(written: &Written, faults: &mut Vec<Fault>) {
    let mut owners: HashMap<EndpointId, (&Head, usize), foldhash::fast::RandomState> = HashMap::default();
    for tenant in &written.tenants {
        for endpoint in tenant.endpoints.given().map(|list| list.items.as_slice()).unwrap_or_default() {
            let (id, offset) = (*endpoint.get_ref(), endpoint.span().start);
            let Some((owner, place)) = owners.insert(id, (&tenant.head, offset)) else { continue };
            let message = format!(
                "must belong to one tenant and stand once, found {id} in {} ({}) too",
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
fn every_tenant_has_a_pool_on_every_listener(written: &Written, faults: &mut Vec<Fault>) {
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

fn place(listener: &Listener) -> String {
    format!("{} ({})", listener.head.title(), listener.head.place(listener.head.offset()))
}

/// Whether a listener can carry a tenant's traffic; where that is a fault already, it is not judged.
fn arrives(tenant: &Tenant, listener: &Listener) -> bool {
    match listener.proxy_protocol.effective(&ProxyProtocol::Require) {
        Some(ProxyProtocol::Require) => true,
        Some(ProxyProtocol::Off) => {
            listener.tenant.given().is_some_and(|name| tenant.head.name() == Some(name))
        }
        None => false,
    }
}

fn routed(tenant: &Tenant, listener: &Listener) -> bool {
    match (&tenant.routes, listener.head.name()) {
        (Field::Given(routes), Some(name)) => {
            routes.get_ref().iter().any(|(route, _)| route.get_ref() == name)
        }
        (Field::Absent, Some(_)) => false,
        // A route or a name that could not be read may well be the missing one.
        (Field::Faulty, _) | (_, None) => true,
    }
}
