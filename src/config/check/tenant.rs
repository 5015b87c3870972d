//! The rules of a tenant, and of a tenant on a listener.

use std::collections::HashMap;

use crate::config::OnRevoke;
use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::{ParsedField, TableHead};
use crate::config::table::{Field, Headed};
use crate::config::tables::{RawListener, RawTenant};
use crate::config::value::{Hours, ProxyProtocolMode};
use crate::id::EndpointId;

/// Every rule, for every tenant.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    an_endpoint_belongs_to_one_tenant(written, faults);
    every_tenant_has_a_pool_on_every_listener(written, faults);
    let defaults = written.tenant_defaults.as_ref();
    if let Some(table) = defaults {
        faults.extend(a_revoke_grace_is_used(table, &table.on_revoke, &table.revoke_grace));
    }
    for tenant in &written.tenants {
        let inherited = defaults.map(|defaults| &defaults.on_revoke).filter(|_| tenant.on_revoke.is_absent());
        let on_revoke = inherited.unwrap_or(&tenant.on_revoke);
        faults.extend(a_revoke_grace_is_used(tenant, on_revoke, &tenant.revoke_grace));
    }
}

/// A grace stands where sessions end.
fn a_revoke_grace_is_used<R>(
    table: &Headed<R>,
    on_revoke: &Field<OnRevoke>,
    grace: &Field<Hours<1>>,
) -> Option<ConfigError> {
    let found = grace.given().filter(|_| on_revoke.given() == Some(&OnRevoke::Keep))?;
    Some(table.fault(grace, format!("must be absent where on-revoke is \"keep\", found {found:?}")))
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
            faults.push(tenant.fault_at(offset, &tenant.endpoints, message));
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
        faults.push(tenant.fault(&tenant.pool, message));
    }
}

fn place(listener: &Headed<RawListener>) -> String {
    format!("{} ({})", listener.head.title(), listener.head.place(listener.head.offset()))
}

/// Whether a listener can carry a tenant's traffic; where that is a fault already, it is not judged.
fn arrives(tenant: &Headed<RawTenant>, listener: &Headed<RawListener>) -> bool {
    match listener.proxy_protocol.effective() {
        Some(ProxyProtocolMode::Require) => true,
        Some(ProxyProtocolMode::Off) => {
            listener.tenant.given().is_some_and(|name| tenant.head.name() == Some(name))
        }
        None => false,
    }
}

fn routed(tenant: &Headed<RawTenant>, listener: &Headed<RawListener>) -> bool {
    match (&*tenant.routes, listener.head.name()) {
        (ParsedField::Given(routes), Some(name)) => {
            routes.get_ref().0.iter().any(|(route, _)| route.get_ref() == name)
        }
        (ParsedField::Absent, Some(_)) => false,
        // An invalid route or name may be the missing one.
        (ParsedField::Faulty, _) | (_, None) => true,
    }
}
