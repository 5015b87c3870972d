//! One address of a pool: what probes and sessions say of it, and how many sessions it has over all workers.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::cause::ChangeCause;
use super::health::{FULL, HealthState};
#[cfg(test)]
use super::health::{HealthRules, ProbeHealth};
use super::health_record::HealthRecord;
use super::least::Tournament;
use super::selection::SelectionState;
use super::tenant_shares::TenantShares;
use crate::account::{Label, ProbeResult, lock};
use crate::addr::BackendAddr;
use crate::clock::Moment;

/// The settings of a backend, from the configuration or DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSettings {
    /// Its share in relation to the others'; 0 gives it no new sessions.
    pub weight: u32,
    /// Whether it is used only where no other can be.
    pub is_backup: bool,
    /// Sessions at once.
    pub max_sessions: Option<u32>,
    /// The zone.
    pub zone: Option<Arc<str>>,
    /// Whether that is the zone that is preferred.
    pub is_preferred: bool,
}

impl Default for BackendSettings {
    fn default() -> Self {
        Self { weight: 100, is_backup: false, max_sessions: None, zone: None, is_preferred: false }
    }
}

/// The sessions of an address, including connecting ones: kept over reloads for the backend of that address.
#[derive(Debug, Default)]
pub(super) struct BackendLoad {
    pub(super) sessions: Arc<AtomicU32>,
    /// The present backend of the address.
    holder: Mutex<Weak<Backend>>,
}

impl BackendLoad {
    /// The backend of the address, while there is one.
    fn holder(&self) -> Option<Arc<Backend>> {
        lock(&self.holder).upgrade()
    }

    /// From now on this one stands for the address.
    pub(super) fn hand_to(&self, backend: &Arc<Backend>) {
        *lock(&self.holder) = Arc::downgrade(backend);
    }
}

/// The sessions that wait for room at a backend of their pool.
pub(super) trait WaitingSessions: fmt::Debug + Send + Sync {
    /// Gives away what room a backend has; of one whose pool was replaced, none. `false` where some is left that none of those
    /// that wait may have, because their tenants hold their shares.
    fn serve(&self, backend: &Arc<Backend>) -> bool;
}

/// A backend.
#[derive(Debug)]
pub struct Backend {
    address: BackendAddr,
    label: Label,
    /// Its number within its pool, for life.
    slot: u32,
    max_sessions: Option<u32>,
    zone: Option<Arc<str>>,
    is_preferred: bool,
    /// Its weight as configured or resolved, and whether it is a backup.
    base_weight: AtomicU32,
    /// The operator's weight, which counts instead.
    operator_weight: AtomicU32,
    is_backup: AtomicBool,
    is_removed: AtomicBool,
    is_retired: AtomicBool,
    is_spare: AtomicBool,
    /// The weight in force, in [`FULL`]ths of a unit, and the sessions that it may have.
    weight: AtomicU32,
    pub(super) room: AtomicU32,
    /// Its health and its sessions: shared with the backend of the same address after a reload.
    pub(super) health: Arc<HealthRecord>,
    pub(super) load: Arc<BackendLoad>,
    /// Where its pool looks for the least loaded.
    pub(super) tournament: Option<Arc<Tournament>>,
    pub(super) queue: Option<Arc<dyn WaitingSessions>>,
    /// Which tenant holds how many places at the pool's backends.
    pub(super) shares: Arc<TenantShares>,
}

/// No weight of an operator's: it could not be so large.
const NOT_ORDERED: u32 = u32::MAX;

/// A backend's state for the status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendSummary {
    /// Its weight as ordered, configured or resolved.
    pub weight: u32,
    /// Whether it is a backup.
    pub is_backup: bool,
    /// While it is ejected, when that ends.
    pub ejected_until: Option<Moment>,
    /// When it was last treated in another way, and why.
    pub changed: (Moment, ChangeCause),
}

impl Backend {
    /// A backend that is not in use before its pool says so.
    #[must_use]
    pub(super) fn new(
        address: BackendAddr,
        label: Label,
        slot: u32,
        settings: BackendSettings,
        health: Arc<HealthRecord>,
        load: Arc<BackendLoad>,
    ) -> Self {
        Self {
            address,
            label,
            slot,
            max_sessions: settings.max_sessions,
            zone: settings.zone,
            is_preferred: settings.is_preferred,
            base_weight: AtomicU32::new(settings.weight),
            operator_weight: AtomicU32::new(NOT_ORDERED),
            is_backup: AtomicBool::new(settings.is_backup),
            is_removed: AtomicBool::new(false),
            is_retired: AtomicBool::new(false),
            is_spare: AtomicBool::new(false),
            weight: AtomicU32::new(0),
            room: AtomicU32::new(u32::MAX),
            health,
            load,
            tournament: None,
            queue: None,
            shares: Arc::default(),
        }
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> BackendAddr {
        self.address
    }

    /// The metric label: the address.
    #[must_use]
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Its number within its pool.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The zone.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Sessions that it may have at once.
    #[must_use]
    pub fn max_sessions(&self) -> Option<u32> {
        self.max_sessions
    }

    /// Its sessions now, over all workers, those being connected included.
    #[must_use]
    pub fn load(&self) -> u32 {
        self.load.sessions.load(Ordering::SeqCst)
    }

    /// The weight in force, in [`FULL`]ths of a unit; 0 gives it no new sessions.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::SeqCst)
    }

    /// Whether a flow may stay there: it is in use, or it is sound and others are only preferred. Costs a few reads.
    #[must_use]
    pub fn keeps_flows(&self) -> bool {
        let is_sound =
            || self.state() == HealthState::Healthy && !self.is_ejected() && self.base_weight() > 0;
        !self.is_retired() && !self.is_removed() && (self.is_used() || is_sound())
    }

    /// Whether new sessions may go there.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.weight() > 0
    }

    /// Whether it gets the sessions that those in use have no room for. Not where probes or sessions have said since the
    /// candidates were built that it is down: a spare backend must be healthy.
    #[must_use]
    pub fn is_spare(&self) -> bool {
        self.is_spare.load(Ordering::SeqCst) && self.state() == HealthState::Healthy && !self.is_ejected()
    }

    /// Whether it has room for a session more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.load() < self.room.load(Ordering::SeqCst)
    }

    /// What probes say of it.
    #[must_use]
    pub fn state(&self) -> HealthState {
        self.health.state()
    }

    /// Whether its first probe is still to come.
    #[must_use]
    pub fn awaits_first_probe(&self) -> bool {
        self.state() == HealthState::Unknown && !self.health.was_probed()
    }

    /// Nothing waits for its first probe any more: no task will make it.
    pub fn give_up_first_probe(&self) {
        self.health.end_first_probe();
    }

    /// Whether sessions have put it out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.health.is_ejected()
    }

    /// Whether its name no longer resolves to it: then it is not probed.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::Acquire)
    }

    /// Whether its pool has been replaced: the new pool may have the same address; this one gets no new sessions.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::SeqCst)
    }

    /// Identifies the health record: the same for a replacement that keeps it, different for every other live
    /// backend.
    #[must_use]
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.health).addr()
    }

    /// The backend that has replaced it, if any.
    #[must_use]
    pub(super) fn replacement(&self) -> Option<Arc<Self>> {
        if self.is_retired() || self.is_removed() {
            self.load.holder().filter(|holder| !std::ptr::eq(&raw const **holder, self))
        } else {
            None
        }
    }

    /// Marks its pool as replaced.
    pub(super) fn retire(&self) {
        self.is_retired.store(true, Ordering::SeqCst);
    }

    /// How many sessions it reset, or lost, before its first byte.
    #[must_use]
    pub fn early_resets(&self) -> u64 {
        self.health.early_resets.load(Ordering::Relaxed)
    }

    /// How often it was ejected.
    #[must_use]
    pub fn ejections(&self) -> u64 {
        self.health.ejections.load(Ordering::Relaxed)
    }

    /// Its probes by result.
    pub fn probes(&self) -> impl Iterator<Item = (ProbeResult, u64)> + '_ {
        let counts = self.health.probes.iter().map(|count| count.load(Ordering::Relaxed));
        ProbeResult::ALL.into_iter().zip(counts)
    }

    /// How long the last probe took, in microseconds.
    #[must_use]
    pub fn probe_us(&self) -> u32 {
        self.health.probe_us.load(Ordering::Relaxed)
    }

    /// Its state for the status page.
    #[must_use]
    pub fn summary(&self) -> BackendSummary {
        let (ejected_until, changed) = self.health.summary();
        BackendSummary {
            weight: self.base_weight(),
            is_backup: self.is_backup.load(Ordering::Acquire),
            ejected_until,
            changed,
        }
    }

    /// Records a successful connect. Nearly always there is no failure to reset, and nothing is written.
    pub fn connected(&self) {
        self.health.connected();
    }

    /// Records that a session got an answer.
    pub fn answered(&self) {
        self.health.answered();
    }

    /// Ejects it; returns for how long.
    pub(super) fn eject(
        &self,
        rules: super::ejection::EjectionRules,
        cause: ChangeCause,
        now: Moment,
    ) -> Duration {
        let time = self.health.eject(rules, cause, now);
        self.set(0, self.room.load(Ordering::SeqCst), false);
        time
    }

    /// Gives it the weight that its name says now; whether that is another one.
    pub(super) fn set_resolved_weight(&self, weight: u32, is_backup: bool, now: Moment) -> bool {
        let is_same = self.base_weight.swap(weight, Ordering::AcqRel) == weight;
        let is_same = self.is_backup.swap(is_backup, Ordering::AcqRel) == is_backup && is_same;
        if !is_same {
            self.health.set_cause(now, ChangeCause::Resolved);
        }
        !is_same
    }

    /// Gives it the operator's weight, whatever its name says; the one that counted before.
    pub(super) fn set_operator_weight(&self, weight: u32, now: Moment) -> u32 {
        let before = self.base_weight();
        self.operator_weight.store(weight, Ordering::Release);
        self.health.set_cause(now, ChangeCause::Ordered);
        before
    }

    /// Keeps an operator's weight over a reload that says of it what was said before.
    pub(super) fn keep_operator_weight(&self, before: &Self) {
        let is_same = self.base_weight.load(Ordering::Acquire) == before.base_weight.load(Ordering::Acquire)
            && self.is_backup.load(Ordering::Acquire) == before.is_backup.load(Ordering::Acquire)
            && (self.max_sessions, &self.zone) == (before.max_sessions, &before.zone);
        if is_same {
            self.operator_weight.store(before.operator_weight.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Its weight, as the operator, its name or the configuration says.
    fn base_weight(&self) -> u32 {
        let ordered = self.operator_weight.load(Ordering::Acquire);
        if ordered == NOT_ORDERED { self.base_weight.load(Ordering::Acquire) } else { ordered }
    }

    /// Its name does not lead to it any more: its sessions may finish.
    pub(super) fn remove(&self, now: Moment) {
        self.health.set_cause(now, ChangeCause::NotResolved);
        self.is_removed.store(true, Ordering::Release);
        self.set(0, 0, false);
    }

    /// What is known of it, and when time alone will change that.
    pub(super) fn view(&self, now: Moment) -> (SelectionState, Option<Moment>) {
        let health = self.health.view(now);
        let seen = SelectionState {
            state: health.state,
            is_ejected: health.is_ejected,
            weight: self.base_weight(),
            ramp: health.ramp,
            is_backup: self.is_backup.load(Ordering::Acquire),
            is_preferred: self.is_preferred,
        };
        (seen, health.due)
    }

    /// How many sessions it may have while that much of it is back; at least one.
    pub(super) fn room_at(&self, ramp: u32) -> u32 {
        let part = |most: u32| u64::from(most) * u64::from(ramp) / u64::from(FULL);
        self.max_sessions.map_or(u32::MAX, |most| u32::try_from(part(most).max(1)).unwrap_or(u32::MAX))
    }

    /// Puts a weight and a room in force, and whether it helps out where those in use are full.
    pub(super) fn set(&self, weight: u32, room: u32, is_spare: bool) {
        self.is_spare.store(is_spare, Ordering::SeqCst);
        self.weight.store(weight, Ordering::SeqCst);
        self.room.store(room, Ordering::SeqCst);
        self.update_load();
    }

    /// Has its pool know what its sessions are now.
    pub(super) fn update_load(&self) {
        if let Some(seat) = &self.tournament {
            seat.changed(self.slot as usize, || self.load_and_weight());
        }
    }

    /// Its sessions, and its weight where it has room.
    pub(super) fn load_and_weight(&self) -> (u32, u32) {
        let load = self.load();
        let weight = if load < self.room.load(Ordering::SeqCst) { self.weight() } else { 0 };
        (load, weight)
    }
}

#[cfg(test)]
impl Backend {
    /// A healthy backend that is in no pool and may be used.
    pub(super) fn standalone(address: &str, settings: BackendSettings) -> Self {
        let label = crate::account::Labels::default().intern(address);
        let health = ProbeHealth::new(HealthRules { rise: 1, fall: 1 }, HealthState::Healthy);
        let health = Arc::new(HealthRecord::new(health, (Moment::default(), ChangeCause::Start)));
        let address = BackendAddr(address.parse().unwrap());
        let backend = Self::new(address, label, 0, settings, health, Arc::default());
        backend.set(100 * FULL, backend.room_at(FULL), false);
        backend
    }
}
