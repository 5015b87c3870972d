//! Pure rules of a pool: which backends may be used, and which one is next.

pub mod backend;
pub mod cause;
mod change;
pub mod ejection;
pub mod health;
pub mod least;
pub mod maglev;
mod naming;
pub mod pick;
pub mod picked;
pub mod queue;
pub mod retry;
pub mod roster;
mod shares;
pub mod standing;
mod succession;
mod vitals;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use arc_swap::ArcSwap;

use self::backend::{Backend, BackendSettings};
use self::cause::ChangeCause;
pub use self::cause::SessionFailure;
pub use self::change::BackendChange;
use self::change::change;
use self::health::{HealthRules, HealthState, ProbeHealth};
use self::naming::{BackendName, SLOTS};
pub use self::naming::{MOST_ADDRESSES, ResolvedAddress};
pub use self::picked::PickedBackend;
use self::queue::{PoolQueue, QueuePlace};
use self::roster::PickState;
pub use self::roster::{Candidates, PickError, TriedBackends};
pub use self::succession::Answers;
use self::succession::PersistentState;
use self::vitals::{BackendLoad, HealthRecord};
use crate::account::lookup::LookupCounters;
use crate::account::{Label, Labels, ProbeResult, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;
use crate::config::{BackendTarget, ProbeConfig};

const NOBODY_YET: u32 = u32::MAX - 1;
const SEVERAL: u32 = u32::MAX;

/// The least time from one roster of a pool to its next: thousands of first probes do not make thousands of them.
const RENEWAL: Duration = Duration::from_millis(100);

/// How long a backend takes to come back from an ejection where its pool has no slow start: what put it out were real
/// sessions, and all of them at once would do it again.
const GENTLE: Duration = Duration::from_secs(10);

/// Interchangeable backends with one policy.
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
    way: PickState,
    slow_start: Duration,
    panic_threshold: u32,
    ejection: ejection::EjectionRules,
    names: Vec<BackendName>,
    roster: ArcSwap<Candidates>,
    queue: Option<Arc<PoolQueue>>,
    lasting: Arc<PersistentState>,
    /// Whether a reload has put another one in its place.
    is_replaced: AtomicBool,
    /// Held while the roster is made anew.
    changing: Mutex<CandidatesUpdate>,
    /// When [`tend`](Self::tend) has something to do, in nanoseconds.
    due: AtomicU64,
}

/// What is to become of a roster.
#[derive(Debug, Default)]
struct CandidatesUpdate {
    /// When it was last made anew.
    renewed: Moment,
    /// Who will be in it, where that are not those who are.
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
        let backends = fixed.into_iter().map(|(address, slot, traits)| {
            let vitals = Arc::new(HealthRecord::new(pool.first_health(), start));
            let backend =
                pool.new_backend(BackendAddr(address), labels, slot, traits, vitals, Arc::default());
            let backend = Arc::new(backend);
            backend.load.hand_to(&backend);
            backend
        });
        let backends = backends.collect();
        let mut changing = lock(&pool.changing);
        changing.next = Some(backends);
        pool.renew(changing, Moment::default());
        pool
    }

    /// A pool without backends, and the addresses that stand in its configuration, each with its slot.
    fn empty(
        config: &crate::config::PoolConfig,
        labels: &Labels,
        lasting: Arc<PersistentState>,
        queue: Option<Arc<PoolQueue>>,
    ) -> (Self, Vec<(SocketAddr, u32, BackendSettings)>) {
        let mut slots = 0;
        let (mut fixed, mut names) = (Vec::new(), Vec::new());
        for backend in &config.backends {
            let traits = BackendSettings {
                weight: backend.weight,
                is_backup: backend.backup,
                max_sessions: backend.max_sessions,
                is_preferred: backend.zone.is_some() && backend.zone == config.prefer_zone,
                zone: backend.zone.as_deref().map(Arc::from),
            };
            if let BackendTarget::Address(address) = backend.target {
                fixed.push((address, slots, traits));
                slots += 1;
            } else {
                names.push(BackendName::new(backend.target.clone(), slots, traits));
                slots += SLOTS;
            }
        }
        lasting.retries.set(config.retry_budget);
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
            way: PickState::new(config.balance, slots),
            slow_start: config.slow_start,
            panic_threshold: config.panic_threshold,
            ejection: ejection::EjectionRules {
                consecutive_failures: config.ejection.consecutive_failures,
                base: config.ejection.base_time,
                max_percent: config.ejection.max_percent,
            },
            names,
            roster: ArcSwap::default(),
            queue,
            lasting,
            is_replaced: AtomicBool::new(false),
            changing: Mutex::default(),
            due: AtomicU64::new(u64::MAX),
        };
        (pool, fixed)
    }

    /// How many results in a row its probes need, where it has any.
    fn rules(&self) -> Option<HealthRules> {
        self.probe.as_ref().map(|probe| HealthRules { rise: probe.rise, fall: probe.fall })
    }

    /// What is believed of a backend that nobody has heard of.
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
        traits: BackendSettings,
        vitals: Arc<HealthRecord>,
        load: Arc<BackendLoad>,
    ) -> Backend {
        let label = labels.intern(&address.to_string());
        let mut backend = Backend::new(address, label, slot, traits, vitals, load);
        (backend.seat, backend.queue) = (self.way.seat(), self.queue.clone());
        backend.shares = Arc::clone(&self.lasting.shares);
        backend
    }

    /// Who is in it now.
    #[must_use]
    pub fn roster(&self) -> Arc<Candidates> {
        self.roster.load_full()
    }

    /// How many backends may be used.
    #[must_use]
    pub fn usable(&self) -> usize {
        self.roster.load().used().len()
    }

    /// The names that lead to backends.
    pub fn names(&self) -> impl Iterator<Item = &BackendTarget> {
        self.names.iter().map(|name| &name.target)
    }

    /// How the lookups of each of these names ended.
    pub fn lookups(&self) -> impl Iterator<Item = &Arc<LookupCounters>> {
        self.names.iter().map(|name| &name.lookups)
    }

    /// How many sessions wait for a backend with room.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.waiting())
    }

    /// Attempts beyond the first that were made, and that the budget had nothing left for.
    #[must_use]
    pub fn retries(&self) -> (u64, u64) {
        (self.lasting.retried.load(Ordering::Relaxed), self.lasting.not_retried.load(Ordering::Relaxed))
    }

    /// Takes in a new session of a tenant, by its label's serial number.
    pub fn arrived(&self, tenant: u32) {
        self.lasting.retries.deposit();
        let known = self.lasting.tenant.load(Ordering::Relaxed);
        if known != tenant && known != SEVERAL {
            let first = known == NOBODY_YET;
            self.lasting.tenant.store(if first { tenant } else { SEVERAL }, Ordering::Relaxed);
        }
    }

    /// Whether several tenants use it.
    fn is_shared(&self) -> bool {
        self.lasting.tenant.load(Ordering::Relaxed) == SEVERAL
    }

    /// Whether a session may make another attempt.
    #[must_use]
    pub fn may_retry(&self, now: Moment) -> bool {
        let may = self.lasting.retries.withdraw(now);
        let count = if may { &self.lasting.retried } else { &self.lasting.not_retried };
        count.fetch_add(1, Ordering::Relaxed);
        may
    }

    /// Takes in one probe's result.
    pub fn observe(
        &self,
        backend: &Backend,
        verdict: ProbeResult,
        took: Duration,
        now: Moment,
    ) -> Option<BackendChange> {
        let changing = lock(&self.changing);
        if let Some((pool, heir)) = self.heir_of(backend) {
            drop(changing);
            return pool.observe(&heir, verdict, took, now);
        }
        // What a name leads to later, or a reload adds, comes into a pool that already works.
        let is_new = matches!(backend.summary().changed.1, ChangeCause::Resolved | ChangeCause::Reload);
        let is_late = is_new && self.usable() > 0;
        if !backend.vitals.observe(verdict, took, self.slow_start, is_late, now) {
            return None;
        }
        self.renew_soon(changing, now);
        Some(change(backend, None))
    }

    /// Takes in that a session failed at a backend before the backend's first byte. The backend gets no new session from now
    /// on where that ejects it; the roster follows with the next [`tend`](Self::tend), for nothing of its size is made
    /// between two packets of a session.
    ///
    /// Where several tenants share the pool, resets of one tenant's in a row count once: it may be what that tenant sends, and
    /// the others must not pay for it.
    pub fn failed(&self, backend: &Backend, failed: SessionFailure, now: Moment) -> Option<BackendChange> {
        if let Some((pool, heir)) = self.heir_of(backend) {
            return pool.failed(&heir, failed, now);
        }
        let most = self.ejection.consecutive_failures;
        if backend.vitals.failed(failed, self.is_shared()) < most || most == 0 || backend.is_ejected() {
            return None;
        }
        // A roster takes its time, and a session waits for none: the next failure comes to the same end.
        let _turn = match self.changing.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if self.is_replaced() {
            // Only just now: the next failure reaches who has replaced it.
            return None;
        }
        let roster = self.roster();
        let out = roster.backends().iter().filter(|other| other.is_ejected()).count();
        if backend.is_ejected() || backend.is_gone() || out >= self.ejection.most(roster.backends().len()) {
            return None;
        }
        let time = backend.eject(self.ejection, failed.into(), now);
        self.due.store(0, Ordering::Release);
        Some(change(backend, Some(time)))
    }

    /// Does what is due by now: ends ejections, and goes on with slow starts. Costs one read where nothing is due.
    pub fn tend(&self, now: Moment) -> Vec<BackendChange> {
        if now.as_nanos() < self.due.load(Ordering::Acquire) {
            return Vec::new();
        }
        let changing = lock(&self.changing);
        let roster = self.roster();
        let gentle = self.slow_start.max(GENTLE);
        let over = roster.backends().iter().filter(|backend| backend.vitals.expire(gentle, now));
        let changes = over.map(|backend| change(backend, None)).collect();
        self.renew(changing, now);
        changes
    }

    /// Gives a backend another weight, until a reload changes that backend; the weight before, and what to tell. `None` where
    /// there is no such backend.
    pub fn order(&self, address: BackendAddr, weight: u32, now: Moment) -> Option<(u32, BackendChange)> {
        let changing = lock(&self.changing);
        // Another one may have come into force while the lock was waited for.
        if let Some(current) = self.current() {
            drop(changing);
            return current.order(address, weight, now);
        }
        let all = changing.next.as_deref().map_or_else(|| self.roster().backends().to_vec(), <[_]>::to_vec);
        let backend = all.into_iter().find(|backend| backend.address() == address)?;
        let before = backend.order(weight, now);
        self.renew(changing, now);
        Some((before, change(&backend, None)))
    }

    /// Who is in it, or will be once its roster is made anew.
    #[must_use]
    pub fn backends(&self) -> Vec<Arc<Backend>> {
        let changing = lock(&self.changing);
        changing.next.as_deref().map_or_else(|| self.roster().backends().to_vec(), <[_]>::to_vec)
    }

    /// Whether all that the first round of probes and lookups will say is known.
    #[must_use]
    pub fn first_round_is_over(&self) -> bool {
        let is_known = |backend: &Arc<Backend>| !backend.awaits_first_probe();
        self.lookups().all(|lookups| lookups.first_is_over())
            && (self.probe.is_none() || self.backends().iter().all(is_known))
    }

    /// Makes the roster anew, or has it made when its time has come; at once where there is nobody in it.
    fn renew_soon(&self, changing: MutexGuard<'_, CandidatesUpdate>, now: Moment) {
        let next = changing.renewed + RENEWAL;
        if now >= next || self.roster.load().backends().is_empty() {
            self.renew(changing, now);
        } else {
            self.due.fetch_min(next.as_nanos(), Ordering::AcqRel);
        }
    }

    fn renew(&self, mut changing: MutexGuard<'_, CandidatesUpdate>, now: Moment) {
        let mut backends = changing.next.take().unwrap_or_else(|| self.roster().backends().to_vec());
        backends.sort_unstable_by_key(|backend| backend.slot());
        // Before anybody is looked at: who is ejected from now on is due at once.
        self.due.store(u64::MAX, Ordering::Release);
        let mut due = u64::MAX;
        let mut look = |backend: Arc<Backend>| {
            let (seen, next) = backend.seen(now);
            due = due.min(next.map_or(u64::MAX, Moment::as_nanos));
            (backend, seen)
        };
        let all = backends.into_iter().map(&mut look).collect();
        let roster = Candidates::new(all, self.panic_threshold, &self.way, &self.roster.load());
        if !self.is_replaced() {
            self.lasting.shares.set_rooms(roster.rooms());
        }
        self.roster.store(Arc::new(roster));
        self.due.fetch_min(due, Ordering::AcqRel);
        changing.renewed = now;
        drop(changing);
        self.serve();
    }

    /// Gives those who wait what room there is: of those in use first, then of those who help out.
    fn serve(&self) {
        if let Some(pool) = self.current() {
            return pool.serve();
        }
        if let Some(queue) = self.queue.as_ref().filter(|queue| queue.waiting() > 0) {
            let roster = self.roster.load();
            let spare = roster.backends().iter().filter(|backend| backend.is_spare());
            // Whom one backend's room is not for, another one's is not for either.
            let _ = roster.used().iter().chain(spare).all(|backend| queue.serve(backend));
        }
    }

    /// A place for one of the tenant's sessions in the line for a backend with room; `None` where it is full, that tenant has
    /// its share of it and the pool is not only its own, or there is none.
    #[must_use]
    pub fn wait(&self, tenant: u32) -> Option<QueuePlace> {
        let place = self.queue.as_ref()?.join(tenant, self.is_shared() || self.lasting.shares.is_shared())?;
        self.serve();
        Some(place)
    }

    /// What Maglev looks up: equal for the same client, or for the same endpoint. Others need none.
    #[must_use]
    pub fn key(&self, client: impl FnOnce() -> u64, endpoint: impl FnOnce() -> u64) -> u64 {
        self.way.key(client, endpoint)
    }

    /// Picks a backend that was not tried yet, for no tenant, and takes it down as tried. `roll` is a random number.
    ///
    /// No lock: with 64 workers each pick reads one roster and, for round-robin, adds to one counter.
    ///
    /// # Errors
    /// Why there is nobody.
    pub fn pick(&self, key: u64, roll: u64, tried: &mut TriedBackends) -> Result<PickedBackend, PickError> {
        self.pick_past(false, key, roll, tried)
    }

    fn pick_past(
        &self,
        line: bool,
        key: u64,
        roll: u64,
        tried: &mut TriedBackends,
    ) -> Result<PickedBackend, PickError> {
        let roster = self.roster.load();
        let picked = if tried.is_empty() {
            // Who waits already was here before; but where nobody is in use, nobody needs to wait.
            if !line && self.waiting() > 0 && !roster.used().is_empty() {
                return Err(PickError::Free);
            }
            let first = roster.first(&self.way, key, roll);
            // Sessions may have put it out since the roster was made.
            first.filter(|backend| backend.is_used()).and_then(PickedBackend::take)
        } else {
            None
        };
        let picked = picked.map_or_else(|| roster.next(&self.way, key, roll, tried), Ok)?;
        tried.add(&picked);
        Ok(picked)
    }
}

#[cfg(test)]
mod tests;
