//! Finds the pools that several tenants may use: no tenant may fill all backends of such a pool.

use super::Snapshot;
use crate::tenant::TenantRules;

/// Tells each pool of a snapshot whether several enabled tenants may use it, by their routes, their pools and the listeners'.
pub(super) fn update_pools(snapshot: &Snapshot) {
    let directory = &snapshot.directory;
    let mut by_endpoint = vec![false; directory.tenants().len()];
    for place in directory.places() {
        by_endpoint.get_mut(place as usize).into_iter().for_each(|has| *has = true);
    }
    let mut users: Vec<Option<u32>> = vec![None; snapshot.pools.len()];
    let mut is_shared = vec![false; snapshot.pools.len()];
    let listeners: Vec<_> =
        snapshot.listeners.iter().zip(0_u32..).filter(|(listener, _)| !listener.is_retired).collect();
    for ((tenant, has_endpoint), place) in directory.tenants().iter().zip(by_endpoint).zip(0_u32..) {
        if !tenant.enabled {
            continue;
        }
        for (listener, listener_place) in &listeners {
            let reaches = match listener.tenants {
                TenantRules::Fixed(only) => only == place,
                TenantRules::ByEndpoint { absent, unknown } => {
                    has_endpoint || absent == Some(place) || unknown == Some(place)
                }
            };
            let pool = tenant.pool_on(*listener_place, listener.pool).filter(|_| reaches);
            let Some(pool) = pool.map(|pool| pool as usize) else { continue };
            if let (Some(user), Some(shared)) = (users.get_mut(pool), is_shared.get_mut(pool)) {
                *shared |= *user.get_or_insert(place) != place;
            }
        }
    }
    for (pool, is_shared) in snapshot.pools.iter().zip(is_shared) {
        pool.set_shared(is_shared);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{LiveState, ProcessLimits};
    use crate::config::Config;
    use crate::pool::{Pool, TriedBackends};

    /// Whether a second session of one tenant gets the second of two places: only where others may not use the pool.
    fn is_shared(pool: &Pool) -> bool {
        let pick = || pool.pick_for(9, 0, 0, &mut TriedBackends::default());
        let _held = pick().unwrap();
        pick().is_err()
    }

    #[test]
    fn pool_is_shared_where_several_enabled_tenants_reach_it() {
        let pools = ["listeners", "own", "routed", "fixed", "disabled", "unused"].map(|name| {
            let backend = "backends = [{ address = \"10.0.0.1:80\", max-sessions = 2 }]";
            format!("[[pool]]\nname = \"{name}\"\n{backend}\nhealth = {{ kind = \"none\" }}\n")
        });
        let tenants = [
            ("a", "endpoints = [\"vpce-0000000a\"]\nroutes = { other = \"routed\" }"),
            ("b", "endpoints = [\"vpce-0000000b\"]"),
            ("c", "endpoints = [\"vpce-0000000c\"]\npool = \"own\""),
            ("d", "endpoints = [\"vpce-0000000d\"]\npool = \"disabled\""),
            ("e", "endpoints = [\"vpce-0000000e\"]\npool = \"disabled\"\nstate = \"disabled\""),
            // Without endpoints it is used only by the listener that names the tenant.
            ("f", ""),
        ];
        let tenants = tenants.map(|(name, keys)| format!("[[tenant]]\nname = \"{name}\"\n{keys}\n"));
        let listener = |name: &str, port: u16, keys: &str| {
            let bind = format!("bind = \"127.0.0.1:{port}\"\ntrusted-sources = [\"10.0.0.0/8\"]");
            format!("[[listener]]\nname = \"{name}\"\n{bind}\n{keys}\n")
        };
        let text = [
            listener("web", 8080, "pool = \"listeners\""),
            listener("other", 8083, "pool = \"listeners\""),
            listener("plain", 8082, "pool = \"fixed\"\nproxy-protocol = \"off\"\ntenant = \"f\""),
            pools.concat(),
            tenants.concat(),
        ];
        let config = Arc::new(Config::parse("test.toml", &text.concat()).unwrap());
        let live = LiveState::of(config, 1, ProcessLimits { sessions: 10, pending: 10, pipes: 0 });
        let snapshot = live.snapshot.load_full();
        let shared = snapshot.pools.iter().filter(|pool| is_shared(pool));
        let shared: Vec<_> = shared.map(|pool| pool.label.name().to_owned()).collect();
        assert_eq!(shared, ["listeners"]);
    }
}
