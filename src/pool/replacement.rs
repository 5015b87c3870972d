//! A pool that takes another one's place in a reload: what it goes on with, and how the old one's sessions reach it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::backend::{Backend, BackendLoad, BackendSettings};
use super::backend_name::{MOST_ADDRESSES, ResolvedAddress};
use super::cause::ChangeCause;
use super::health::ProbeHealth;
use super::health_record::HealthRecord;
use super::queue::PoolQueue;
use super::retry::RetryBudget;
use super::tenant_shares::TenantShares;
use super::{NO_TENANT_YET, Pool};
use crate::account::{Labels, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;
use crate::config::BackendTarget;

/// The addresses of names, as far as they have been resolved.
pub type Answers = HashMap<BackendTarget, Vec<ResolvedAddress>>;

/// The state of a pool that outlives a reload.
#[derive(Debug)]
pub(super) struct PersistentState {
    /// The pool in force of this name, after a replacement.
    current: Mutex<Weak<Pool>>,
    /// The one tenant whose sessions came here so far, [`NO_TENANT_YET`], or `SEVERAL`.
    pub(super) tenant: AtomicU32,
    pub(super) retries: RetryBudget,
    pub(super) retried: AtomicU64,
    pub(super) not_retried: AtomicU64,
    /// Which tenant holds how many places at its backends.
    pub(super) shares: Arc<TenantShares>,
    /// Addresses that it has no more, with sessions that go on, or that are still to come of older pools.
    left: Mutex<Vec<(BackendAddr, Arc<BackendLoad>)>>,
}

impl PersistentState {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            current: Mutex::default(),
            tenant: AtomicU32::new(NO_TENANT_YET),
            retries: RetryBudget::default(),
            retried: AtomicU64::new(0),
            not_retried: AtomicU64::new(0),
            shares: Arc::default(),
            left: Mutex::default(),
        })
    }

    /// Its sessions are counted on, should its address come back before they end.
    pub(super) fn leave(&self, backend: &Backend) {
        let mut left = lock(&self.left);
        // As long as it is referenced: sessions that began before are still sent there.
        left.retain(|(_, load)| Arc::strong_count(load) > 1);
        left.push((backend.address(), Arc::clone(&backend.load)));
    }

    /// The sessions of an address that was here before.
    pub(super) fn load_of(&self, address: BackendAddr) -> Arc<BackendLoad> {
        let mut left = lock(&self.left);
        let place = left.iter().position(|(other, _)| *other == address);
        place.map_or_else(Arc::default, |place| left.swap_remove(place).1)
    }
}

/// Those of the pool before, by address.
type Before<'a> = HashMap<SocketAddr, &'a Arc<Backend>>;

impl Pool {
    /// The pool that a reload puts in the place of `before`, or that is new. Addresses that were there already keep what is
    /// known of them, and their sessions; names keep what they led to, and new ones lead to what `answers` has of them.
    ///
    /// New addresses are unknown until their first probe. If all are new, they count as healthy until then: no
    /// session else could take the traffic.
    ///
    /// From now on `before`, and all that were before it, tell this one what their sessions come to.
    #[must_use]
    pub fn replace(
        before: Option<&Arc<Self>>,
        config: &crate::config::PoolConfig,
        labels: &Labels,
        answers: &Answers,
        now: Moment,
    ) -> Arc<Self> {
        let persistent = before.map_or_else(PersistentState::new, |before| Arc::clone(&before.persistent));
        let line = before.and_then(|before| before.queue.clone());
        let line = line.or_else(|| (config.queue.length > 0).then(|| PoolQueue::new(config.queue.length)));
        let (mut pool, fixed) = Self::empty(config, labels, persistent, line);
        // Nothing changes there from here on: an answer or a result that comes now waits, and goes to the new one.
        let update = before.map(|before| lock(&before.update));
        let own = update.as_ref().and_then(|update| update.next.clone());
        let own =
            own.or_else(|| before.map(|before| before.candidates().backends().to_vec())).unwrap_or_default();
        let known: Before<'_> = own.iter().map(|backend| (backend.address().0, backend)).collect();
        if let Some(before) = before {
            // Starts from the previous candidates, so that their Maglev plan is reused.
            pool.candidates = arc_swap::ArcSwap::new(before.candidates());
        }
        let found = pool.keep_names(before.map(Arc::as_ref), answers);
        let all = fixed.into_iter().chain(found);
        let mut seen = HashSet::new();
        let all: Vec<_> = all.filter(|(address, ..)| seen.insert(*address)).collect();
        let is_alone = all.iter().all(|(address, ..)| !known.contains_key(address));
        let backends = all.into_iter().map(|(address, slot, settings)| {
            pool.replacement_at(address, slot, settings, known.get(&address).copied(), is_alone, labels, now)
        });
        let backends: Vec<_> = backends.collect();
        let pool = Arc::new(pool);
        if let Some(before) = before {
            pool.take_over_from(before, &own, &backends);
        }
        for backend in &backends {
            backend.load.hand_to(backend);
        }
        if let Some(before) = before {
            before.is_replaced.store(true, Ordering::Release);
        }
        // Only now: a caller that finds one of these retired also finds its replacement and its pool.
        for backend in &own {
            backend.retire();
        }
        drop(update);
        let mut own = lock(&pool.update);
        own.next = Some(backends);
        pool.rebuild(own, now);
        pool
    }

    /// One of its backends: of an address that was there before, with all that is known of it.
    #[expect(clippy::too_many_arguments, reason = "each is one thing that makes a backend")]
    fn replacement_at(
        &self,
        address: SocketAddr,
        slot: u32,
        settings: BackendSettings,
        before: Option<&Arc<Backend>>,
        is_alone: bool,
        labels: &Labels,
        now: Moment,
    ) -> Arc<Backend> {
        let address = BackendAddr(address);
        let (health, load) = before.map_or_else(
            || {
                let health = match (self.rules(), is_alone) {
                    (Some(rules), true) => ProbeHealth::presumed_healthy(rules),
                    _ => self.first_health(),
                };
                (
                    Arc::new(HealthRecord::new(health, (now, ChangeCause::Reload))),
                    self.persistent.load_of(address),
                )
            },
            |before| (Arc::clone(&before.health), Arc::clone(&before.load)),
        );
        let backend = self.new_backend(address, labels, slot, settings, health, load);
        if let Some(before) = before {
            backend.keep_operator_weight(before);
        }
        Arc::new(backend)
    }

    /// Gives each name what it led to before, or leads to now, and tells the slots of those addresses.
    fn keep_names(
        &mut self,
        before: Option<&Self>,
        answers: &Answers,
    ) -> Vec<(SocketAddr, u32, BackendSettings)> {
        let mut all = Vec::new();
        for name in &mut self.names {
            let mut led = before.iter().flat_map(|before| &before.names);
            let led = led.find(|led| led.target == name.target);
            if let Some(led) = led {
                name.lookups = Arc::clone(&led.lookups);
            }
            let led = led.map(|led| lock(&led.found).clone());
            let Some(found) = led.or_else(|| answers.get(&name.target).cloned()) else { continue };
            for resolved in found.iter().take(MOST_ADDRESSES as usize) {
                all.push((resolved.address, name.next_slot(), name.settings_of(resolved)));
            }
            *lock(&name.found) = found;
        }
        all
    }

    /// Becomes the pool in force of its name.
    fn take_over_from(self: &Arc<Self>, before: &Self, own: &[Arc<Backend>], backends: &[Arc<Backend>]) {
        let heirs: HashSet<_> = backends.iter().map(|replacement| Arc::as_ptr(&replacement.health)).collect();
        let (kept, gone): (Vec<_>, Vec<_>) =
            own.iter().partition(|backend| heirs.contains(&Arc::as_ptr(&backend.health)));
        for backend in kept {
            backend.health.follow(|health| match (&before.probe, self.rules()) {
                (Some(_), Some(rules)) => health.with_rules(rules),
                (None, Some(rules)) => ProbeHealth::presumed_healthy(rules),
                (_, None) => self.first_health(),
            });
        }
        for backend in gone {
            self.persistent.leave(backend);
        }
        *lock(&self.persistent.current) = Arc::downgrade(self);
    }

    /// The pool in force of its name, if it is another one.
    pub(super) fn current(&self) -> Option<Arc<Self>> {
        if self.is_replaced() { lock(&self.persistent.current).upgrade() } else { None }
    }

    /// The pool in force of this name; itself, where there is none any more.
    #[must_use]
    pub fn latest(self: &Arc<Self>) -> Arc<Self> {
        self.current().unwrap_or_else(|| Arc::clone(self))
    }

    /// Whether a reload has put another one in its place.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.is_replaced.load(Ordering::Acquire)
    }

    /// The replacement of one of its backends and its pool, if it was replaced.
    #[must_use]
    pub fn replacement_of(&self, backend: &Backend) -> Option<(Arc<Self>, Arc<Backend>)> {
        Some((self.current()?, backend.replacement()?))
    }

    /// The backend to probe in place of one of its own, and the pool of it; `None` where it is removed.
    #[must_use]
    pub fn follow(self: &Arc<Self>, backend: &Arc<Backend>) -> Option<(Arc<Self>, Arc<Backend>)> {
        if backend.is_removed() {
            None
        } else if backend.is_retired() {
            self.replacement_of(backend).filter(|(_, replacement)| !replacement.is_removed())
        } else {
            Some((Arc::clone(self), Arc::clone(backend)))
        }
    }
}
