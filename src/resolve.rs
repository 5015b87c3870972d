//! Names as backends: each is looked up as long as its answers hold, by a task of the control thread.

mod address_filter;
pub mod answer;
mod query;
pub(crate) mod schedule;
mod server;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::time::sleep;

pub use self::address_filter::Own;
use self::answer::{LastAnswers, NameResolution};
pub use self::query::{NoServers, Resolver};
use self::schedule::{LookupSchedule, spread};
use crate::account::Labels;
pub use crate::account::dns_counters::{LookupCounters, LookupResult};
use crate::clock;
use crate::config::BackendTarget;
use crate::pool::Pool;
use crate::pool::backend::Backend;

/// Refused addresses of one lookup that are logged.
const SHOWN: usize = 8;

/// Resolves a name of `pool` and of its replacements after reloads, until the pool no longer has it. Each new
/// backend is given
/// to `fresh`, with its pool, which has it probed; after the first lookup, whatever its end, and after those of its backends, `first` is called.
///
/// A lookup that fails, or finds nothing, leaves the backends as they are: what a name led to last is a better guess than
/// nothing at all.
pub async fn run(
    resolver: Arc<Resolver>,
    pool: Arc<Pool>,
    target: BackendTarget,
    labels: &Labels,
    first: impl FnOnce(),
    fresh: impl Fn(&Arc<Pool>, Arc<Backend>),
) {
    let place = |pool: &Pool| pool.names().position(|other| *other == target);
    let lookups = place(&pool).and_then(|place| pool.lookups().nth(place).cloned());
    let Some(lookups) = lookups else { return first() };
    let (min, max) = resolver.bounds();
    let mut times = LookupSchedule::new(min, max);
    let mut teller =
        ChangeReporter { pool: &pool, name: name(&target), left_out: 0, refused: BTreeSet::new() };
    let (mut memory, mut first) = (LastAnswers::default(), Some(first));
    loop {
        let result = resolver.look_up(&target, &mut memory).await;
        teller.refused(&memory.refused);
        lookups.count(result.as_ref().map_or_else(|lookup| *lookup, |_| LookupResult::Found));
        let wait = match result {
            Ok(answer) => {
                teller.found(&answer, times.is_failing());
                let pool = pool.latest();
                let Some(place) = place(&pool) else { break };
                let (backends, changes) = pool.resolve(place, &answer.found, labels, clock::now());
                for change in changes {
                    change.log(&pool);
                }
                let pool = pool.latest();
                for backend in backends {
                    fresh(&pool, backend);
                }
                times.found(answer.ttl)
            }
            Err(lookup) => {
                teller.failed(lookup, times.is_failing());
                times.failed()
            }
        };
        if let Some(first) = first.take() {
            first();
        }
        sleep(spread(wait, fastrand::f64())).await;
    }
    if let Some(first) = first {
        first();
    }
}

fn name(target: &BackendTarget) -> String {
    match target {
        BackendTarget::Address(address) => address.to_string(),
        BackendTarget::Host { name, .. } | BackendTarget::Service(name) => name.clone(),
    }
}

/// Logs changes of a name's resolution.
struct ChangeReporter<'a> {
    pool: &'a Pool,
    name: String,
    /// Addresses of the last answer that are not used.
    left_out: usize,
    /// Addresses of the last answers that were refused.
    refused: BTreeSet<IpAddr>,
}

impl ChangeReporter<'_> {
    fn found(&mut self, answer: &NameResolution, was_failing: bool) {
        let (pool, name, addresses) = (self.pool.label.name(), self.name.as_str(), answer.found.len());
        if was_failing {
            tracing::info!(pool, name, addresses, "name resolved again");
        }
        if answer.left_out > 0 && self.left_out == 0 {
            let left_out = answer.left_out;
            tracing::warn!(
                pool,
                name,
                addresses,
                left_out,
                "name has more addresses than the limit; the rest are ignored"
            );
        }
        self.left_out = answer.left_out;
    }

    fn refused(&mut self, now: &BTreeSet<IpAddr>) {
        if !now.is_subset(&self.refused) {
            let (pool, name) = (self.pool.label.name(), self.name.as_str());
            let addresses: Vec<_> = now.iter().take(SHOWN).map(ToString::to_string).collect();
            let addresses = addresses.join(" ");
            tracing::warn!(
                pool,
                name,
                addresses,
                "a DNS answer contains addresses that are refused (this machine's own, loopback, \
                 link-local, multicast): to allow them, list their network in dns.allow-answers, or write \
                 them as backends themselves"
            );
        }
        self.refused.clone_from(now);
    }

    fn failed(&self, lookup: LookupResult, was_failing: bool) {
        if !was_failing {
            let (pool, name, reason) = (self.pool.label.name(), self.name.as_str(), lookup.as_str());
            tracing::warn!(pool, name, reason, "cannot resolve a name: its backends stay as they are");
        }
    }
}
