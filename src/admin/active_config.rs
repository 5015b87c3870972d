//! `/config`: the configuration in force, and the sessions that use it.

use std::collections::BTreeMap;

use crate::config::diff::{ActiveConfig, BackendUsage, RouteUsage};
use crate::state::LiveState;

/// The page, as JSON.
///
/// # Errors
/// What serde says; no configuration that passed its checks comes to that.
pub(super) fn json(live: &LiveState) -> serde_json::Result<Vec<u8>> {
    let config = live.config.load_full();
    let mut routes: BTreeMap<[String; 3], u64> = BTreeMap::new();
    let mut backends: BTreeMap<[String; 2], u64> = BTreeMap::new();
    for shard in &live.shards {
        for route in shard.routes().iter().filter(|route| route.active.value() > 0) {
            let names = [&route.listener, &route.tenant, &route.pool].map(|label| label.name().to_owned());
            *routes.entry(names).or_default() += route.active.value();
        }
        for counters in shard.backends().iter().filter(|counters| counters.active.value() > 0) {
            let names = [&counters.pool, &counters.backend].map(|label| label.name().to_owned());
            *backends.entry(names).or_default() += counters.active.value();
        }
    }
    let route =
        |([listener, tenant, pool], now): ([String; 3], u64)| RouteUsage { listener, tenant, pool, now };
    serde_json::to_vec(&ActiveConfig {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config: &*config,
        routes: routes.into_iter().map(route).collect(),
        backends: backends
            .into_iter()
            .map(|([pool, backend], now)| BackendUsage { pool, backend, now })
            .collect(),
    })
}
