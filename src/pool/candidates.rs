//! The backends of a pool, those in use, and the pick of one for a session.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::backend::Backend;
use super::health::{FULL, HealthState};
use super::least::Tournament;
use super::maglev::{MaglevEntry, MaglevPlan, MaglevTable};
use super::pick::{self, PickError, WeightTable};
use super::picked::PickedBackend;
use super::selection::{SelectionState, SelectionTier, effective_weights};
use crate::config::Balance;

/// Times that Maglev asks its table for another backend, before all that are left are looked at.
const REHASHES: u64 = 8;

/// The backends of a pool, and those in use. Immutable: replaced as a whole.
#[derive(Debug, Default)]
pub struct Candidates {
    /// All of them, by rising slots.
    backends: Vec<Arc<Backend>>,
    used: Vec<Arc<Backend>>,
    shares: WeightTable,
    /// What the table is made of, as long as the backends are the same.
    plan: Arc<MaglevPlan>,
    table: MaglevTable,
    tier: SelectionTier,
}

/// The balancing algorithm and its state between picks.
#[derive(Debug)]
pub(super) struct PickState {
    balance: Balance,
    turn: AtomicUsize,
    tournament: Option<Arc<Tournament>>,
}

/// The backends that a session has tried, by slot. Small, as a session has room for it while it connects.
#[derive(Debug)]
pub struct TriedBackends {
    /// Most sessions try one, and need no list; [`TriedBackends::NO_SLOT`] at first.
    first: u32,
    #[expect(clippy::box_collection, reason = "nearly always there is none")]
    others: Option<Box<Vec<u32>>>,
}

impl Default for TriedBackends {
    fn default() -> Self {
        Self { first: Self::NO_SLOT, others: None }
    }
}

impl TriedBackends {
    /// No slot: there are fewer.
    const NO_SLOT: u32 = u32::MAX;

    /// The count.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(!self.is_empty()) + self.others.as_ref().map_or(0, |others| others.len())
    }

    /// Whether none was tried.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first == Self::NO_SLOT
    }

    fn has(&self, backend: &Backend) -> bool {
        let is_other = || self.others.as_ref().is_some_and(|others| others.contains(&backend.slot()));
        self.first == backend.slot() || is_other()
    }

    /// Takes down one that was not picked here.
    #[must_use]
    pub fn add_picked(&mut self, picked: PickedBackend) -> PickedBackend {
        self.add(&picked);
        picked
    }

    pub(super) fn add(&mut self, backend: &Backend) {
        if self.is_empty() {
            self.first = backend.slot();
        } else {
            self.others.get_or_insert_default().push(backend.slot());
        }
    }
}

impl PickState {
    /// A way for at most so many backends.
    pub(super) fn new(balance: Balance, slots: u32) -> Self {
        let slots = usize::try_from(slots).unwrap_or(usize::MAX);
        let tournament = (balance == Balance::LeastSessions).then(|| Arc::new(Tournament::new(slots)));
        Self { balance, turn: AtomicUsize::new(0), tournament }
    }

    /// Where a backend says that its load has changed.
    pub(super) fn tournament(&self) -> Option<Arc<Tournament>> {
        self.tournament.clone()
    }

    /// What Maglev looks up: equal for the same client, or for the same endpoint. Others need none.
    pub(super) fn key(&self, client: impl FnOnce() -> u64, endpoint: impl FnOnce() -> u64) -> u64 {
        match self.balance {
            Balance::Maglev => client(),
            Balance::MaglevEndpoint => endpoint(),
            Balance::RoundRobin | Balance::LeastSessions | Balance::P2c => 0,
        }
    }

    fn is_maglev(&self) -> bool {
        matches!(self.balance, Balance::Maglev | Balance::MaglevEndpoint)
    }
}

impl Candidates {
    /// Selects the backends of `all`, ordered by slot, that are used, and sets their weights.
    pub(super) fn new(
        all: Vec<(Arc<Backend>, SelectionState)>,
        panic_threshold: u32,
        state: &PickState,
        before: &Self,
    ) -> Self {
        let (backends, seen): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let (tier, weights) = effective_weights(&seen, panic_threshold);
        if let Some(tournament) = &state.tournament {
            let weights = seen.iter().zip(&weights).filter(|(_, weight)| **weight > 0);
            // The whole weight of those in use: one that comes back is a small part of its own.
            let least = weights.map(|(seen, _)| seen.weight).min().unwrap_or(1);
            tournament.count_by(least * FULL);
        }
        // Room grows with the backend that is furthest in its slow start: if all are, there is room for all sessions
        // at once.
        let ramps = seen.iter().zip(&weights).filter(|(_, weight)| **weight > 0).map(|(seen, _)| seen.ramp);
        let lead = ramps.max().unwrap_or(FULL).max(1);
        let mut used = Vec::new();
        let mut of_used = Vec::new();
        for ((backend, seen), weight) in backends.iter().zip(&seen).zip(weights) {
            let ramp = if tier == SelectionTier::Panic { FULL } else { (seen.ramp * FULL / lead).min(FULL) };
            // Of another zone, and as sound as those in use: where all of these are full, it helps out.
            let is_spare =
                tier == SelectionTier::Healthy && weight == 0 && seen.is_of(tier) && !seen.is_backup;
            backend.set(weight, backend.room_at(ramp), is_spare && seen.weight > 0);
            if weight > 0 {
                used.push(Arc::clone(backend));
                of_used.push(weight);
            }
        }
        let (plan, table) = if state.is_maglev() {
            let entries = entries(&backends, &seen);
            let is_same = before.plan.is_of(&entries) && !entries.is_empty();
            let plan = if is_same { Arc::clone(&before.plan) } else { Arc::new(MaglevPlan::new(&entries)) };
            let table = MaglevTable::of(&plan, &entries);
            (plan, table)
        } else {
            Default::default()
        };
        Self { backends, used, shares: WeightTable::new(&of_used), plan, table, tier }
    }

    /// All of them.
    #[must_use]
    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// Those that are used.
    #[must_use]
    pub fn used(&self) -> &[Arc<Backend>] {
        &self.used
    }

    /// The sessions of each that gets any, and the most that it may have.
    pub(super) fn capacities(&self) -> Vec<(Arc<AtomicU32>, u32)> {
        let spare = self.backends.iter().filter(|backend| backend.is_spare());
        let rooms = self.used.iter().chain(spare);
        rooms
            .map(|backend| (Arc::clone(&backend.load.sessions), backend.room.load(Ordering::SeqCst)))
            .collect()
    }

    /// Why they are used.
    #[must_use]
    pub fn tier(&self) -> SelectionTier {
        self.tier
    }

    /// The first choice; it may have no room.
    pub(super) fn first(&self, state: &PickState, key: u64, roll: u64) -> Option<&Arc<Backend>> {
        let used = |place: usize| self.used.get(place);
        match state.balance {
            Balance::RoundRobin => {
                used(pick::round_robin(state.turn.fetch_add(1, Ordering::Relaxed), &self.shares)?)
            }
            Balance::P2c => {
                let load = |place: usize| used(place).map_or(u32::MAX, |backend| backend.load());
                used(pick::p2c(roll, &self.shares, load)?)
            }
            Balance::Maglev | Balance::MaglevEndpoint => {
                self.backends.get(usize::from(self.table.find(key)?))
            }
            Balance::LeastSessions => {
                let winner = state.tournament.as_ref()?.winner()?;
                let slot = u32::try_from(winner).ok()?;
                // Slots are places as long as no name's address has left.
                let is_there = |backend: &&Arc<Backend>| backend.slot() == slot;
                self.backends.get(winner).filter(is_there).or_else(|| {
                    let place = self.backends.binary_search_by_key(&slot, |backend| backend.slot()).ok()?;
                    self.backends.get(place)
                })
            }
        }
    }

    /// The next choice, with room and not tried yet.
    ///
    /// It takes no turn of round-robin: that would be the turn of the next session, and with one dead backend of two
    /// every session would start with the dead one.
    pub(super) fn next(
        &self,
        state: &PickState,
        key: u64,
        roll: u64,
        tried: &TriedBackends,
    ) -> Result<PickedBackend, PickError> {
        if state.is_maglev() {
            // The same client finds the same second backend.
            for turn in 1..=REHASHES {
                let place = self.table.find(key.wrapping_add(turn.wrapping_mul(pick::GOLDEN)));
                let backend = place.and_then(|place| self.backends.get(usize::from(place)));
                let is_left = |backend: &&Arc<Backend>| backend.is_used() && !tried.has(backend);
                let picked = backend.filter(is_left).and_then(PickedBackend::take);
                if let Some(picked) = picked {
                    return Ok(picked);
                }
            }
        }
        let is_left = |backend: &&Arc<Backend>| !tried.has(backend);
        let mut left: Vec<_> = self.used.iter().filter(is_left).filter(|backend| backend.is_used()).collect();
        if left.is_empty() {
            // All candidates in use were tried or are ejected by now. Any other backend that is not known to be down
            // is better than a session that fails.
            let others = self.backends.iter().filter(|backend| {
                let is_down = backend.state() == HealthState::Unhealthy || backend.is_removed();
                !backend.is_used() && !is_down && backend.summary().weight > 0
            });
            left = others.filter(is_left).collect();
            if left.iter().any(|backend| !backend.is_ejected()) {
                left.retain(|backend| !backend.is_ejected());
            }
        }
        if left.is_empty() {
            return Err(PickError::Usable);
        }
        any_with_room(left, roll)
            .or_else(|| {
                let spare = self.backends.iter().filter(|backend| backend.is_spare());
                any_with_room(spare.filter(is_left).collect(), roll)
            })
            .ok_or(PickError::Free)
    }
}

/// One of these that has room, the less loaded of two; another one if its room was taken meanwhile.
fn any_with_room(mut all: Vec<&Arc<Backend>>, roll: u64) -> Option<PickedBackend> {
    all.retain(|backend| backend.has_room());
    loop {
        let weights: Vec<u32> = all.iter().map(|backend| backend.weight().max(1)).collect();
        let load = |place: usize| all.get(place).map_or(u32::MAX, |backend| backend.load());
        let place = pick::p2c(roll, &WeightTable::new(&weights), load)?;
        if let Some(picked) = all.get(place).and_then(|backend| PickedBackend::take(backend)) {
            return Some(picked);
        }
        all.swap_remove(place);
    }
}

fn entries(backends: &[Arc<Backend>], seen: &[SelectionState]) -> Vec<MaglevEntry> {
    let entries = backends.iter().zip(seen).map(|(backend, seen)| MaglevEntry {
        name: pick::hash(backend.label().name().as_bytes()),
        whole: if seen.is_backup { 0 } else { seen.weight * FULL },
        weight: backend.weight(),
    });
    entries.collect()
}
