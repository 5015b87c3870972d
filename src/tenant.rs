//! The third step: finds the tenant by one table lookup.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::account::Label;
use crate::admission::quota::Quota;
use crate::id::{EndpointClaim, EndpointId};
use crate::outcome::{EndedAt, Outcome, Reason};

/// A tenant.
#[derive(Debug)]
pub struct Tenant {
    /// The name.
    pub label: Label,
    /// Carried into the access log.
    pub labels: Option<Box<BTreeMap<String, String>>>,
    /// Whether the traffic is carried.
    pub enabled: bool,
    /// The place of the pool that overrides the listener's.
    pub pool: Option<u32>,
    /// Places of listeners and of the pools that override both.
    pub routes: Box<[(u32, u32)]>,
    /// What it may take, and what it has taken; the same over reloads.
    pub quota: Arc<Quota>,
}

impl Tenant {
    /// Whether it may come in at all.
    ///
    /// # Errors
    /// The rejection of a disabled tenant.
    pub fn admit(&self) -> Result<(), Outcome> {
        if self.enabled {
            Ok(())
        } else {
            Err(Outcome::reject(EndedAt::Tenant, self.quota.reject(Reason::TenantDisabled)))
        }
    }

    /// The place of the pool for its traffic on `listener`: its route, else its pool, else the listener's.
    #[must_use]
    pub fn pool_on(&self, listener: u32, listeners_pool: Option<u32>) -> Option<u32> {
        let route = self.routes.iter().find(|(from, _)| *from == listener).map(|(_, pool)| *pool);
        route.or(self.pool).or(listeners_pool)
    }
}

/// How a listener finds the tenant of a header's endpoint ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenantRules {
    /// Every session is this tenant's.
    Fixed(u32),
    /// By the endpoint ID. The places are the tenants' of those without one, and of those with an unknown one;
    /// `None` rejects.
    ByEndpoint {
        /// The header names no endpoint.
        absent: Option<u32>,
        /// It names one that no tenant lists.
        unknown: Option<u32>,
    },
}

/// Every tenant, found by endpoint ID.
#[derive(Debug, Default)]
pub struct TenantDirectory {
    tenants: Vec<Tenant>,
    endpoints: HashMap<EndpointId, u32, foldhash::fast::RandomState>,
}

impl TenantDirectory {
    /// A directory of `tenants`; `endpoints` tells the place of each ID's tenant.
    #[must_use]
    pub fn new(tenants: Vec<Tenant>, endpoints: impl IntoIterator<Item = (EndpointId, u32)>) -> Self {
        Self { tenants, endpoints: endpoints.into_iter().collect() }
    }

    /// Every tenant, in the order of the configuration.
    #[must_use]
    pub fn tenants(&self) -> &[Tenant] {
        &self.tenants
    }

    /// The place of each endpoint's tenant.
    pub fn places(&self) -> impl Iterator<Item = u32> + '_ {
        self.endpoints.values().copied()
    }

    /// Whose traffic it is: one hash lookup, however many tenants there are.
    ///
    /// # Errors
    /// The rejection, where no tenant matches.
    #[inline]
    pub fn find(&self, claim: EndpointClaim, rules: TenantRules) -> Result<&Tenant, Outcome> {
        let (place, why) = self.place(claim, rules);
        let tenant = place.and_then(|place| self.tenants.get(place as usize));
        tenant.ok_or(Outcome::reject(EndedAt::Tenant, why))
    }

    /// The index of the tenant, and the rejection reason where no tenant matches.
    #[inline]
    #[must_use]
    pub fn place(&self, claim: EndpointClaim, rules: TenantRules) -> (Option<u32>, Reason) {
        match rules {
            TenantRules::Fixed(place) => (Some(place), Reason::NoEndpoint),
            TenantRules::ByEndpoint { absent, unknown } => match claim {
                EndpointClaim::Absent => (absent, Reason::NoEndpoint),
                EndpointClaim::Malformed => (unknown, Reason::UnknownEndpoint),
                EndpointClaim::Id(id) => {
                    (self.endpoints.get(&id).copied().or(unknown), Reason::UnknownEndpoint)
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;

    fn id(text: &str) -> EndpointClaim {
        EndpointClaim::from_tlv(Some(text.as_bytes()))
    }

    fn directory() -> TenantDirectory {
        let labels = Labels::default();
        let tenants = ["acme", "globex"].into_iter().map(|name| Tenant {
            label: labels.intern(name),
            labels: None,
            enabled: name == "acme",
            pool: None,
            routes: Box::default(),
            quota: Arc::default(),
        });
        let endpoints = [("vpce-00000001", 0), ("vpce-00000002", 1)];
        TenantDirectory::new(tenants.collect(), endpoints.map(|(text, place)| (text.parse().unwrap(), place)))
    }

    fn name(found: Result<&Tenant, Outcome>) -> Result<String, Reason> {
        found.map(|tenant| tenant.label.name().to_owned()).map_err(|outcome| outcome.why)
    }

    #[test]
    fn endpoint_id_finds_its_tenant_and_nothing_else_does() {
        let directory = directory();
        let strict = TenantRules::ByEndpoint { absent: None, unknown: None };
        assert_eq!(name(directory.find(id("vpce-00000002"), strict)), Ok("globex".to_owned()));
        assert_eq!(name(directory.find(id("vpce-00000003"), strict)), Err(Reason::UnknownEndpoint));
        assert_eq!(name(directory.find(id("nonsense"), strict)), Err(Reason::UnknownEndpoint));
        assert_eq!(name(directory.find(EndpointClaim::Absent, strict)), Err(Reason::NoEndpoint));
        assert_eq!(directory.tenants().len(), 2);
    }

    #[test]
    fn fallbacks_take_unlisted_endpoints() {
        let directory = directory();
        let lenient = TenantRules::ByEndpoint { absent: Some(0), unknown: Some(1) };
        assert_eq!(name(directory.find(EndpointClaim::Absent, lenient)), Ok("acme".to_owned()));
        assert_eq!(name(directory.find(EndpointClaim::Malformed, lenient)), Ok("globex".to_owned()));
        assert_eq!(name(directory.find(id("vpce-00000009"), lenient)), Ok("globex".to_owned()));
        assert_eq!(name(directory.find(id("vpce-00000001"), lenient)), Ok("acme".to_owned()));
        assert_eq!(name(directory.find(id("vpce-00000002"), TenantRules::Fixed(0))), Ok("acme".to_owned()));
    }

    #[test]
    fn endpoint_with_a_stale_tenant_index_is_rejected() {
        let directory = TenantDirectory::new(Vec::new(), [("vpce-00000001".parse().unwrap(), 7)]);
        let lenient = TenantRules::ByEndpoint { absent: Some(7), unknown: Some(7) };
        assert_eq!(name(directory.find(id("vpce-00000001"), lenient)), Err(Reason::UnknownEndpoint));
        assert_eq!(name(directory.find(EndpointClaim::Absent, lenient)), Err(Reason::NoEndpoint));
        assert_eq!(
            name(directory.find(EndpointClaim::Absent, TenantRules::Fixed(7))),
            Err(Reason::NoEndpoint)
        );
    }

    #[test]
    fn disabled_tenant_is_found_and_not_admitted() {
        let directory = directory();
        assert_eq!(directory.tenants()[0].admit(), Ok(()));
        let rejected = directory.tenants()[1].admit();
        assert_eq!(rejected, Err(Outcome::reject(EndedAt::Tenant, Reason::TenantDisabled)));
    }

    #[test]
    fn pool_comes_from_route_then_tenant_then_listener() {
        let tenant = |pool, routes: &[(u32, u32)]| Tenant {
            label: Labels::default().intern("acme"),
            labels: None,
            enabled: true,
            pool,
            routes: routes.into(),
            quota: Arc::default(),
        };
        assert_eq!(tenant(None, &[]).pool_on(0, None), None);
        assert_eq!(tenant(None, &[]).pool_on(0, Some(1)), Some(1));
        assert_eq!(tenant(Some(2), &[]).pool_on(0, Some(1)), Some(2));
        assert_eq!(tenant(Some(2), &[(0, 3)]).pool_on(0, Some(1)), Some(3));
        assert_eq!(tenant(Some(2), &[(0, 3)]).pool_on(1, Some(1)), Some(2));
    }
}
