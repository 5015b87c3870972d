//! Revocation: whether a live session or flow still belongs to its tenant after a reload.

use std::collections::{HashMap, HashSet};

use super::{ChangeCount, ConfigChanges, Snapshot};
use crate::account::Label;
use crate::config::{Config, Fallback, ListenerIdentity, TenantConfig};
use crate::id::EndpointClaim;
use crate::tenant::TenantRules;

impl Snapshot {
    /// Whether what a session or a flow of this listener claims still leads to this tenant, and the tenant is enabled.
    #[must_use]
    pub fn admits(&self, listener: &Label, claim: EndpointClaim, tenant: &Label) -> bool {
        let rules = self.listeners.iter().find(|own| own.label.serial() == listener.serial());
        let found = match (rules, claim) {
            (Some(rules), _) => self.directory.find(claim, rules.tenants).ok(),
            // A successor may not have the listener; the endpoint must still belong to the tenant.
            (None, EndpointClaim::Id(_)) => {
                self.directory.find(claim, TenantRules::ByEndpoint { absent: None, unknown: None }).ok()
            }
            (None, EndpointClaim::Absent | EndpointClaim::Malformed) => {
                self.directory.tenants().iter().find(|own| own.label.serial() == tenant.serial())
            }
        };
        found.is_some_and(|found| found.enabled && found.label.serial() == tenant.serial())
    }
}

impl ConfigChanges {
    /// Whether the change between these configurations may take an endpoint away from the tenant of a live session or
    /// flow. A tenant or an endpoint that is only added takes nothing away, unless a listener gives unknown endpoints to a
    /// tenant.
    #[must_use]
    pub fn takes_away(&self, before: &Config, after: &Config) -> bool {
        if self.listeners != ChangeCount::default() {
            return true;
        }
        if self.tenants == ChangeCount::default() {
            return false;
        }
        let has_fallback = after.listeners.iter().any(|listener| {
            let ListenerIdentity::Header { on_unknown_endpoint, .. } = &listener.identity else {
                return false;
            };
            *on_unknown_endpoint != Fallback::Reject
        });
        let is_lost = |before: &TenantConfig, after: Option<&TenantConfig>| {
            after.is_none_or(|after| {
                loses(before, after) || has_fallback && before.endpoints != after.endpoints
            })
        };
        // Most entries have the same position as before and need no lookup table.
        let same = before.tenants.iter().zip(&after.tenants);
        let first = same.clone().take_while(|(before, after)| before.name == after.name).count();
        let known: HashMap<_, _> =
            after.tenants.iter().skip(first).map(|tenant| (tenant.name.as_str(), tenant)).collect();
        same.take(first).any(|(before, after)| is_lost(before, Some(after)))
            || before
                .tenants
                .iter()
                .skip(first)
                .any(|tenant| is_lost(tenant, known.get(&*tenant.name).copied()))
            || has_fallback && self.tenants.added > 0
    }
}

/// Whether the tenant is disabled, has lost an endpoint, or treats its revoked sessions in another way.
fn loses(before: &TenantConfig, after: &TenantConfig) -> bool {
    let lost = || {
        let kept: HashSet<_> = after.endpoints.iter().collect();
        before.endpoints.iter().any(|endpoint| !kept.contains(endpoint))
    };
    before.enabled && !after.enabled
        || (before.on_revoke, before.revoke_grace) != (after.on_revoke, after.revoke_grace)
        || before.endpoints != after.endpoints && lost()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_text::{LISTENER, POOL};

    const TENANTS: &str = r#"
        [[tenant]]
        name = "acme"
        endpoints = ["vpce-00000001", "vpce-00000002"]
        [[tenant]]
        name = "globex"
        endpoints = ["vpce-00000003"]
    "#;

    fn text() -> String {
        [LISTENER, POOL, TENANTS].concat()
    }

    fn takes_away(text: &str, from: &str, to: &str) -> bool {
        assert!(text.contains(from), "{from}");
        let [before, after] =
            [text, &text.replacen(from, to, 1)].map(|text| Config::parse("test.toml", text).unwrap());
        ConfigChanges::between(&before, &after).takes_away(&before, &after)
    }

    #[test]
    fn change_that_takes_an_endpoint_away_is_detected_and_an_addition_is_not() {
        for (from, to) in [
            ("\"vpce-00000001\", ", ""),
            ("name = \"acme\"", "name = \"initech\""),
            ("name = \"acme\"", "name = \"acme\"\nstate = \"disabled\""),
            ("name = \"acme\"", "name = \"acme\"\nrevoke-grace = \"1s\""),
            ("8080", "8082"),
            ("[[tenant]]\n        name = \"globex\"\n        endpoints = [\"vpce-00000003\"]", ""),
        ] {
            assert!(takes_away(&text(), from, to), "{from} -> {to}");
        }
        for (from, to) in [
            ("\"vpce-00000001\"", "\"vpce-00000009\", \"vpce-00000001\""),
            ("\"vpce-00000001\", \"vpce-00000002\"", "\"vpce-00000002\", \"vpce-00000001\""),
            ("name = \"acme\"", "name = \"acme\"\nlimits = { sessions = 5 }"),
            ("[[tenant]]", "[[tenant]]\nname = \"initech\"\n[[tenant]]"),
            ("10.0.1.10", "10.0.1.11"),
        ] {
            assert!(!takes_away(&text(), from, to), "{from} -> {to}");
        }
    }

    #[test]
    fn added_endpoint_is_detected_if_unknown_endpoints_have_a_tenant() {
        let text = text().replace("pool = \"app\"", "pool = \"app\"\non-unknown-endpoint = \"tenant:acme\"");
        for (from, to) in [
            ("[[tenant]]", "[[tenant]]\nname = \"initech\"\nendpoints = [\"vpce-00000008\"]\n[[tenant]]"),
            ("\"vpce-00000003\"", "\"vpce-00000003\", \"vpce-00000004\""),
        ] {
            assert!(takes_away(&text, from, to), "{from} -> {to}");
        }
        assert!(!takes_away(&text, "10.0.1.10", "10.0.1.11"));
    }
}
