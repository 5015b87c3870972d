//! Pure rules of a pool: which backends may be used, and which one is picked next.

pub mod backend;
mod backend_name;
pub(crate) mod candidates;
pub mod cause;
mod change;
pub mod ejection;
pub mod health;
mod health_record;
pub mod least;
pub mod maglev;
pub mod pick;
pub(crate) mod picked;
pub mod queue;
mod replacement;
pub mod retry;
pub mod selection;
mod tenant_pick;
mod tenant_shares;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use arc_swap::ArcSwap;

use self::backend::{Backend, BackendLoad, BackendSettings, WaitingSessions};
use self::backend_name::{BackendName, SLOTS};
pub use self::backend_name::{MOST_ADDRESSES, ResolvedAddress};
use self::candidates::PickState;
pub use self::candidates::{Candidates, TriedBackends};
use self::cause::ChangeCause;
pub use self::cause::SessionFailure;
pub use self::change::BackendChange;
use self::change::backend_change;
use self::health::{HealthRules, HealthState, ProbeHealth};
use self::health_record::HealthRecord;
pub use self::pick::PickError;
pub use self::picked::PickedBackend;
use self::queue::{PoolQueue, QueuePlace};
pub use self::replacement::Answers;
use self::replacement::PersistentState;
use crate::account::dns_counters::LookupCounters;
use crate::account::{Label, Labels, ProbeResult, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;
use crate::config::{BackendTarget, ProbeConfig};

const NO_TENANT_YET: u32 = u32::MAX - 1;
const SEVERAL: u32 = u32::MAX;

/// The least time between two rebuilds of a pool's candidates: thousands of first probes do not cause thousands of
/// rebuilds.
const RENEWAL: Duration = Duration::from_millis(100);

/// How long a backend takes to come back from an ejection where its pool has no slow start: what put it out were real
/// sessions, and all of them at once would do it again.
const GENTLE: Duration = Duration::from_secs(10);

/// A pool: interchangeable backends with one policy.
#[derive(Debug)]
pub struct Pool {
    /// Its name.
    pub label: Label,
    /// Backends tried before the first byte is forwarded.
    pub attempts: u32,
    /// Whether the client's header is passed on.
    pub send_proxy: bool,
    /// Local addresses to connect from; empty is the system's choice.
    pub sources: Vec<IpAddr>,
    /// The active check.
    pub probe: Option<ProbeConfig>,
    /// How long a session may wait for a backend with room.
    pub queue_timeout: Duration,
    pick_state: PickState,
    slow_start: Duration,
    panic_threshold: u32,
    ejection: ejection::EjectionRules,
    names: Vec<BackendName>,
    candidates: ArcSwap<Candidates>,
    queue: Option<Arc<PoolQueue>>,
    persistent: Arc<PersistentState>,
    /// Whether a reload has put another one in its place.
    is_replaced: AtomicBool,
    /// Held while the candidates are rebuilt.
    update: Mutex<CandidatesUpdate>,
    /// When [`run_due`](Self::run_due) has something to do, in nanoseconds.
    due: AtomicU64,
}

/// A pending rebuild of the candidates.
#[derive(Debug, Default)]
struct CandidatesUpdate {
    /// When it was last made anew.
    rebuilt: Moment,
    /// The next backends, where they differ from the present ones.
    next: Option<Vec<Arc<Backend>>>,
}

impl Pool {
    /// A pool as configured; its backends are unknown until their first probe, or healthy where there is none. Names lead
    /// nowhere until they are [resolved](Self::resolve).
    #[must_use]
    pub fn new(config: &crate::config::PoolConfig, labels: &Labels) -> Self {
        let queue = (config.queue.length > 0).then(|| PoolQueue::new(config.queue.length));
        let (pool, fixed) = Self::empty(config, labels, PersistentState::new(), queue);
        let start = (Moment::default(), ChangeCause::Start);
        let backends = fixed.into_iter().map(|(address, slot, settings)| {
            let health = Arc::new(HealthRecord::new(pool.first_health(), start));
            let backend =
                pool.new_backend(BackendAddr(address), labels, slot, settings, health, Arc::default());
            let backend = Arc::new(backend);
            backend.load.hand_to(&backend);
            backend
        });
        let backends = backends.collect();
        let mut update = lock(&pool.update);
        update.next = Some(backends);
        pool.rebuild(update, Moment::default());
        pool
    }

    /// A pool without backends, and the addresses that stand in its configuration, each with its slot.
    fn empty(
        config: &crate::config::PoolConfig,
        labels: &Labels,
        persistent: Arc<PersistentState>,
        queue: Option<Arc<PoolQueue>>,
    ) -> (Self, Vec<(SocketAddr, u32, BackendSettings)>) {
        let mut slots = 0;
        let (mut fixed, mut names) = (Vec::new(), Vec::new());
        for backend in &config.backends {
            let settings = BackendSettings {
                weight: backend.weight,
                is_backup: backend.backup,
                max_sessions: backend.max_sessions,
                is_preferred: backend.zone.is_some() && backend.zone == config.prefer_zone,
                zone: backend.zone.as_deref().map(Arc::from),
            };
            if let BackendTarget::Address(address) = backend.target {
                fixed.push((address, slots, settings));
                slots += 1;
            } else {
                names.push(BackendName::new(backend.target.clone(), slots, settings));
                slots += SLOTS;
            }
        }
        persistent.retries.set(config.retry_budget);
        if let Some(queue) = &queue {
            queue.set_length(config.queue.length);
        }
        let pool = Self {
            label: labels.intern(&config.name),
            attempts: config.attempts,
            send_proxy: config.send_proxy,
            sources: config.source_addresses.clone(),
            probe: config.health.clone(),
            queue_timeout: config.queue.timeout,
            pick_state: PickState::new(config.balance, slots),
            slow_start: config.slow_start,
            panic_threshold: config.panic_threshold,
            ejection: ejection::EjectionRules {
                consecutive_failures: config.ejection.consecutive_failures,
                base: config.ejection.base_time,
                max_percent: config.ejection.max_percent,
            },
            names,
            candidates: ArcSwap::default(),
            queue,
            persistent,
            is_replaced: AtomicBool::new(false),
            update: Mutex::default(),
            due: AtomicU64::new(u64::MAX),
        };
        (pool, fixed)
    }

    /// How many results in a row its probes need, where it has any.
    fn rules(&self) -> Option<HealthRules> {
        self.probe.as_ref().map(|probe| HealthRules { rise: probe.rise, fall: probe.fall })
    }

    /// The health of a backend before its first probe.
    fn first_health(&self) -> ProbeHealth {
        self.rules().map_or_else(
            || ProbeHealth::new(HealthRules { rise: 1, fall: 1 }, HealthState::Healthy),
            |rules| ProbeHealth::new(rules, HealthState::Unknown),
        )
    }

    fn new_backend(
        &self,
        address: BackendAddr,
        labels: &Labels,
        slot: u32,
        settings: BackendSettings,
        health: Arc<HealthRecord>,
        load: Arc<BackendLoad>,
    ) -> Backend {
        let label = labels.intern(&address.to_string());
        let mut backend = Backend::new(address, label, slot, settings, health, load);
        backend.tournament = self.pick_state.tournament();
        backend.queue = self.queue.clone().map(|queue| queue as Arc<dyn WaitingSessions>);
        backend.shares = Arc::clone(&self.persistent.shares);
        backend
    }

    /// The present backends.
    #[must_use]
    pub fn candidates(&self) -> Arc<Candidates> {
        self.candidates.load_full()
    }

    /// How many backends may be used.
    #[must_use]
    pub fn usable(&self) -> usize {
        self.candidates.load().used().len()
    }

    /// The names that lead to backends.
    pub fn names(&self) -> impl Iterator<Item = &BackendTarget> {
        self.names.iter().map(|name| &name.target)
    }

    /// How the lookups of each of these names ended.
    pub fn lookups(&self) -> impl Iterator<Item = &Arc<LookupCounters>> {
        self.names.iter().map(|name| &name.lookups)
    }

    /// The queued sessions.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.waiting())
    }

    /// Attempts beyond the first that were made, and that the budget had nothing left for.
    #[must_use]
    pub fn retries(&self) -> (u64, u64) {
        (self.persistent.retried.load(Ordering::Relaxed), self.persistent.not_retried.load(Ordering::Relaxed))
    }

    /// Counts a new session of a tenant, by its label's number.
    pub fn count_session(&self, tenant: u32) {
        self.persistent.retries.deposit();
        let known = self.persistent.tenant.load(Ordering::Relaxed);
        if known != tenant && known != SEVERAL {
            let first = known == NO_TENANT_YET;
            self.persistent.tenant.store(if first { tenant } else { SEVERAL }, Ordering::Relaxed);
        }
    }

    /// Whether several tenants may use it.
    fn is_shared(&self) -> bool {
        self.persistent.tenant.load(Ordering::Relaxed) == SEVERAL
    }

    /// Whether a session may make another attempt.
    #[must_use]
    pub fn may_retry(&self, now: Moment) -> bool {
        let may = self.persistent.retries.withdraw(now);
        let count = if may { &self.persistent.retried } else { &self.persistent.not_retried };
        count.fetch_add(1, Ordering::Relaxed);
        may
    }

    /// Records a probe's result.
    pub fn observe(
        &self,
        backend: &Backend,
        verdict: ProbeResult,
        took: Duration,
        now: Moment,
    ) -> Option<BackendChange> {
        let update = lock(&self.update);
        if let Some((pool, replacement)) = self.replacement_of(backend) {
            drop(update);
            return pool.observe(&replacement, verdict, took, now);
        }
        // Backends that DNS or a reload adds later join a pool that is already in use.
        let is_new = matches!(backend.summary().changed.1, ChangeCause::Resolved | ChangeCause::Reload);
        let is_late = is_new && self.usable() > 0;
        if !backend.health.observe(verdict, took, self.slow_start, is_late, now) {
            return None;
        }
        self.rebuild_soon(update, now);
        Some(backend_change(backend, None))
    }

    /// Takes in that a session failed at a backend before the backend's first byte. The backend gets no new session
    /// from now on if that ejects it; the candidates follow with the next [`run_due`](Self::run_due), as nothing of
    /// that size is made between two packets of a session.
    ///
    /// Where several tenants share the pool, resets of one tenant's in a row count once: it may be what that tenant sends, and
    /// the others must not pay for it.
    pub fn failed(&self, backend: &Backend, failed: SessionFailure, now: Moment) -> Option<BackendChange> {
        if let Some((pool, replacement)) = self.replacement_of(backend) {
            return pool.failed(&replacement, failed, now);
        }
        let most = self.ejection.consecutive_failures;
        if backend.health.failed(failed, self.is_shared()) < most || most == 0 || backend.is_ejected() {
            return None;
        }
        // A rebuild takes time, and a session does not wait for it: the next failure has the same result.
        let _turn = match self.update.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if self.is_replaced() {
            // It was replaced meanwhile; the next failure is counted at its replacement.
            return None;
        }
        let candidates = self.candidates();
        let out = candidates.backends().iter().filter(|other| other.is_ejected()).count();
        if backend.is_ejected()
            || backend.is_removed()
            || out >= self.ejection.most(candidates.backends().len())
        {
            return None;
        }
        let time = backend.eject(self.ejection, failed.into(), now);
        self.due.store(0, Ordering::Release);
        Some(backend_change(backend, Some(time)))
    }

    /// Runs due timers: ends ejections, and advances slow starts. Costs one read where nothing is due.
    pub fn run_due(&self, now: Moment) -> Vec<BackendChange> {
        if now.as_nanos() < self.due.load(Ordering::Acquire) {
            return Vec::new();
        }
        let update = lock(&self.update);
        let candidates = self.candidates();
        let gentle = self.slow_start.max(GENTLE);
        let over = candidates.backends().iter().filter(|backend| backend.health.expire(gentle, now));
        let changes = over.map(|backend| backend_change(backend, None)).collect();
        self.rebuild(update, now);
        changes
    }

    /// Gives a backend another weight, until a reload changes that backend; the weight before, and what to tell. `None` where
    /// there is no such backend.
    pub fn override_weight(
        &self,
        address: BackendAddr,
        weight: u32,
        now: Moment,
    ) -> Option<(u32, BackendChange)> {
        let update = lock(&self.update);
        // The pool may have been replaced while this waited for the lock.
        if let Some(current) = self.current() {
            drop(update);
            return current.override_weight(address, weight, now);
        }
        let all = update.next.as_deref().map_or_else(|| self.candidates().backends().to_vec(), <[_]>::to_vec);
        let backend = all.into_iter().find(|backend| backend.address() == address)?;
        let before = backend.set_operator_weight(weight, now);
        self.rebuild(update, now);
        Some((before, backend_change(&backend, None)))
    }

    /// The backends, including those of a pending rebuild.
    #[must_use]
    pub fn backends(&self) -> Vec<Arc<Backend>> {
        let update = lock(&self.update);
        update.next.as_deref().map_or_else(|| self.candidates().backends().to_vec(), <[_]>::to_vec)
    }

    /// Whether all that the first round of probes and lookups will say is known.
    #[must_use]
    pub fn first_round_is_over(&self) -> bool {
        let is_known = |backend: &Arc<Backend>| !backend.awaits_first_probe();
        self.lookups().all(|lookups| lookups.first_is_over())
            && (self.probe.is_none() || self.backends().iter().all(is_known))
    }

    /// Rebuilds the candidates, or schedules that; at once where there are none.
    fn rebuild_soon(&self, update: MutexGuard<'_, CandidatesUpdate>, now: Moment) {
        let next = update.rebuilt + RENEWAL;
        if now >= next || self.candidates.load().backends().is_empty() {
            self.rebuild(update, now);
        } else {
            self.due.fetch_min(next.as_nanos(), Ordering::AcqRel);
        }
    }

    fn rebuild(&self, mut update: MutexGuard<'_, CandidatesUpdate>, now: Moment) {
        let mut backends = update.next.take().unwrap_or_else(|| self.candidates().backends().to_vec());
        backends.sort_unstable_by_key(|backend| backend.slot());
        // Before any backend is looked at: one that is ejected from now on is due at once.
        self.due.store(u64::MAX, Ordering::Release);
        let mut due = u64::MAX;
        let mut look = |backend: Arc<Backend>| {
            let (seen, next) = backend.view(now);
            due = due.min(next.map_or(u64::MAX, Moment::as_nanos));
            (backend, seen)
        };
        let all = backends.into_iter().map(&mut look).collect();
        let candidates =
            Candidates::new(all, self.panic_threshold, &self.pick_state, &self.candidates.load());
        if !self.is_replaced() {
            self.persistent.shares.set_rooms(candidates.capacities());
        }
        self.candidates.store(Arc::new(candidates));
        self.due.fetch_min(due, Ordering::AcqRel);
        update.rebuilt = now;
        drop(update);
        self.serve_queue();
    }

    /// Serves the queue with free room: of backends in use first, then of spare ones.
    fn serve_queue(&self) {
        if let Some(pool) = self.current() {
            return pool.serve_queue();
        }
        if let Some(queue) = self.queue.as_ref().filter(|queue| queue.waiting() > 0) {
            let candidates = self.candidates.load();
            let spare = candidates.backends().iter().filter(|backend| backend.is_spare());
            // The tenant's share applies to the whole pool: without room at one backend there is none at another.
            let _ = candidates.used().iter().chain(spare).all(|backend| queue.serve(backend));
        }
    }

    /// A place for one of the tenant's sessions in the line for a backend with room; `None` where it is full, that tenant has
    /// its share of it and the pool is not only its own, or there is none.
    #[must_use]
    pub fn join_queue(&self, tenant: u32) -> Option<QueuePlace> {
        let place =
            self.queue.as_ref()?.join(tenant, self.is_shared() || self.persistent.shares.is_shared())?;
        self.serve_queue();
        Some(place)
    }

    /// What Maglev looks up: equal for the same client, or for the same endpoint. Others need none.
    #[must_use]
    pub fn key(&self, client: impl FnOnce() -> u64, endpoint: impl FnOnce() -> u64) -> u64 {
        self.pick_state.key(client, endpoint)
    }

    /// Picks a backend that was not tried yet, for no tenant, and takes it down as tried. `roll` is a random number.
    ///
    /// No lock: with 64 workers each pick reads one set of candidates and, for round-robin, adds to one counter.
    ///
    /// # Errors
    /// Why no backend can be picked.
    pub fn pick(&self, key: u64, roll: u64, tried: &mut TriedBackends) -> Result<PickedBackend, PickError> {
        self.pick_skipping_queue(false, key, roll, tried)
    }

    fn pick_skipping_queue(
        &self,
        line: bool,
        key: u64,
        roll: u64,
        tried: &mut TriedBackends,
    ) -> Result<PickedBackend, PickError> {
        let candidates = self.candidates.load();
        let picked = if tried.is_empty() {
            // Waiting sessions came first; but where no backend is in use, the queue is skipped.
            if !line && self.waiting() > 0 && !candidates.used().is_empty() {
                return Err(PickError::Free);
            }
            let first = candidates.first(&self.pick_state, key, roll);
            // Sessions may have ejected it since the candidates were built.
            first.filter(|backend| backend.is_used()).and_then(PickedBackend::take)
        } else {
            None
        };
        let picked = picked.map_or_else(|| candidates.next(&self.pick_state, key, roll, tried), Ok)?;
        tried.add(&picked);
        Ok(picked)
    }
}

#[cfg(test)]
mod tests;
