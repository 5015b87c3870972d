//! Names as backends: the addresses of each come and go as its answers say.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::backend::{Backend, BackendSettings};
use super::cause::ChangeCause;
use super::health_record::HealthRecord;
use super::{BackendChange, Pool, backend_change};
use crate::account::dns_counters::LookupCounters;
use crate::account::{Labels, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;
use crate::config::BackendTarget;

/// Addresses that one name may lead to.
pub const MOST_ADDRESSES: u32 = 64;

/// Slots of one name: more than addresses, so that one can rest.
pub(super) const SLOTS: u32 = 2 * MOST_ADDRESSES;

/// A backend given by name.
#[derive(Debug)]
pub(super) struct BackendName {
    pub(super) target: BackendTarget,
    /// The first slot of its addresses.
    first: u32,
    /// How many slots were given: a slot rests before its next backend, as sessions of the one before may still end.
    given: AtomicU32,
    /// What holds for all of its addresses.
    settings: BackendSettings,
    pub(super) lookups: Arc<LookupCounters>,
    /// What it led to last.
    pub(super) found: Mutex<Vec<ResolvedAddress>>,
}

/// One address of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedAddress {
    /// The address.
    pub address: SocketAddr,
    /// Its weight, where the name says one.
    pub weight: Option<u32>,
    /// Whether the name says that it is a backup.
    pub is_backup: bool,
}

impl BackendName {
    pub(super) fn new(target: BackendTarget, first: u32, settings: BackendSettings) -> Self {
        let (given, lookups, found) = (AtomicU32::new(0), Arc::default(), Mutex::default());
        Self { target, first, given, settings, lookups, found }
    }

    /// The slot after the last that was given.
    pub(super) fn next_slot(&self) -> u32 {
        self.first + self.given.fetch_add(1, Ordering::Relaxed) % SLOTS
    }

    /// What holds for one of its addresses. A weight of 0 drains all of them.
    pub(super) fn settings_of(&self, resolved: &ResolvedAddress) -> BackendSettings {
        let own = &self.settings;
        let weight = if own.weight == 0 { 0 } else { resolved.weight.unwrap_or(own.weight) };
        BackendSettings { weight, is_backup: own.is_backup || resolved.is_backup, ..own.clone() }
    }
}

impl Pool {
    /// Takes in what the name at `place` of [`names`](Self::names) leads to: the backends that are new, to be probed.
    pub fn resolve(
        &self,
        place: usize,
        found: &[ResolvedAddress],
        labels: &Labels,
        now: Moment,
    ) -> (Vec<Arc<Backend>>, Vec<BackendChange>) {
        let (mut fresh, mut changes) = (Vec::new(), Vec::new());
        let Some(name) = self.names.get(place) else { return (fresh, changes) };
        let slots = name.first..name.first + SLOTS;
        let mut update = lock(&self.update);
        if let Some(pool) = self.current() {
            drop(update);
            let place = pool.names().position(|target| *target == name.target);
            return place.map_or((fresh, changes), |place| pool.resolve(place, found, labels, now));
        }
        let all = update.next.take().unwrap_or_else(|| self.candidates().backends().to_vec());
        let (own, mut all): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|backend| slots.contains(&backend.slot()));
        let found = found.get(..found.len().min(MOST_ADDRESSES as usize)).unwrap_or_default();
        *lock(&name.found) = found.to_vec();
        let mut kept: Vec<Arc<Backend>> = Vec::new();
        for backend in own {
            let Some(resolved) = found.iter().find(|resolved| resolved.address == backend.address().0) else {
                backend.remove(now);
                self.persistent.leave(&backend);
                changes.push(backend_change(&backend, None));
                continue;
            };
            let settings = name.settings_of(resolved);
            if backend.set_resolved_weight(settings.weight, settings.is_backup, now) {
                changes.push(backend_change(&backend, None));
            }
            kept.push(backend);
        }
        let mut known: HashSet<SocketAddr> = kept.iter().map(|backend| backend.address().0).collect();
        if found.iter().any(|resolved| !known.contains(&resolved.address)) {
            known.extend(all.iter().map(|backend| backend.address().0));
        }
        for resolved in found.iter().filter(|resolved| known.insert(resolved.address)) {
            let is_free = |slot: &u32| kept.iter().all(|backend| backend.slot() != *slot);
            let Some(slot) = slots.clone().map(|_| name.next_slot()).find(is_free) else { break };
            let address = BackendAddr(resolved.address);
            let settings = name.settings_of(resolved);
            let health = Arc::new(HealthRecord::new(self.first_health(), (now, ChangeCause::Resolved)));
            let load = self.persistent.load_of(address);
            let backend = Arc::new(self.new_backend(address, labels, slot, settings, health, load));
            backend.load.hand_to(&backend);
            changes.push(backend_change(&backend, None));
            fresh.push(Arc::clone(&backend));
            kept.push(backend);
        }
        all.append(&mut kept);
        update.next = Some(all);
        if !changes.is_empty() {
            self.rebuild_soon(update, now);
        }
        (fresh, changes)
    }
}
