//! In what order flows are looked at: a wheel for those that may have been idle for long, a list for each tenant.
//!
//! Both are lazy. A datagram only writes down when it came; where its flow hangs is put right when its turn comes.

use std::collections::{BTreeSet, HashMap};

use super::slab::{FlowList, FlowSlab, ListKind, NIL};
use crate::clock::Moment;
use crate::clock::wheel::Tick;

/// Buckets of the wheel: with ticks of 50 ms, a flow that is due later than in 204 s comes round more than once.
const BUCKETS: u32 = 4096;

/// How many of a tenant's flows are looked at for the one that was idle longest.
const LOOKED_AT: usize = 32;

#[derive(Debug)]
pub(super) struct IdleQueue {
    buckets: Vec<FlowList>,
    /// A bit for each bucket that has a flow.
    filled: [u64; BUCKETS as usize / 64],
    /// The tick whose bucket is looked at next.
    tick: u64,
    tenants: HashMap<u32, FlowList, foldhash::fast::FixedState>,
    /// How many flows each tenant has, and the tenant: the last one is the one that has most. Only an opening and an end
    /// change it, no datagram does.
    ranks: BTreeSet<(u32, u32)>,
}

impl Default for IdleQueue {
    fn default() -> Self {
        Self {
            buckets: vec![FlowList::EMPTY; BUCKETS as usize],
            filled: [0; BUCKETS as usize / 64],
            tick: 0,
            tenants: HashMap::default(),
            ranks: BTreeSet::new(),
        }
    }
}

/// The tick that a moment falls in.
fn tick(moment: Moment) -> u64 {
    moment.as_nanos() / nanos()
}

const fn nanos() -> u64 {
    // Half a tenth of a second fits.
    #[expect(clippy::cast_possible_truncation, reason = "milliseconds")]
    let nanos = Tick::SPAN.as_nanos() as u64;
    nanos
}

/// The bucket of a tick.
#[expect(clippy::cast_possible_truncation, reason = "less than the number of buckets")]
fn bucket(tick: u64) -> u32 {
    (tick % u64::from(BUCKETS)) as u32
}

impl IdleQueue {
    pub(super) fn of_tenant(&self, tenant: u32) -> usize {
        self.tenants.get(&tenant).map_or(0, |list| list.len as usize)
    }

    /// Lets the wheel go back with the clock. Flows are then looked at too early, or within a round, rather than
    /// never.
    pub(super) fn rewind(&mut self, now: Moment) {
        self.tick = self.tick.min(tick(now));
    }

    /// Takes in a new flow that is due then.
    pub(super) fn add<F>(&mut self, slab: &mut FlowSlab<F>, slot: u32, due: Moment) {
        let Some(tenant) = slab.at(slot).map(|flow| flow.tenant) else { return };
        if self.tenants.is_empty() {
            // The wheel was empty and stood still.
            self.tick = slab.at(slot).map_or(0, |flow| tick(flow.last));
        }
        let list = self.tenants.entry(tenant).or_insert(FlowList::EMPTY);
        slab.push(list, ListKind::Tenant, slot);
        let len = list.len;
        self.ranks.remove(&(len - 1, tenant));
        self.ranks.insert((len, tenant));
        self.schedule(slab, slot, due);
    }

    /// Takes a flow out.
    pub(super) fn remove<F>(&mut self, slab: &mut FlowSlab<F>, slot: u32) {
        let Some((tenant, bucket)) = slab.at(slot).map(|flow| (flow.tenant, flow.bucket)) else { return };
        self.unschedule(slab, slot, bucket);
        if let Some(list) = self.tenants.get_mut(&tenant) {
            self.ranks.remove(&(list.len, tenant));
            slab.unlink(list, ListKind::Tenant, slot);
            if list.len == 0 {
                self.tenants.remove(&tenant);
            } else {
                self.ranks.insert((list.len, tenant));
            }
        }
    }

    /// Hangs a flow where it is looked at when it is due: in a tick after that, and not in the one that is under way.
    fn schedule<F>(&mut self, slab: &mut FlowSlab<F>, slot: u32, due: Moment) {
        let at = (tick(due) + 1).clamp(self.tick + 1, self.tick + u64::from(BUCKETS) - 1);
        let place = bucket(at);
        if let Some(list) = self.buckets.get_mut(place as usize) {
            slab.push(list, ListKind::Due, slot);
        }
        if let Some(flow) = slab.at_mut(slot) {
            flow.bucket = place;
        }
        self.mark(place, true);
    }

    fn unschedule<F>(&mut self, slab: &mut FlowSlab<F>, slot: u32, place: u32) {
        let Some(list) = self.buckets.get_mut(place as usize) else { return };
        slab.unlink(list, ListKind::Due, slot);
        if list.len == 0 {
            self.mark(place, false);
        }
    }

    fn mark(&mut self, place: u32, filled: bool) {
        if let Some(word) = self.filled.get_mut(place as usize / 64) {
            let bit = 1 << (place % 64);
            *word = if filled { *word | bit } else { *word & !bit };
        }
    }

    /// Has a flow looked at when it is due.
    pub(super) fn reschedule<F>(&mut self, slab: &mut FlowSlab<F>, slot: u32, due: Moment) {
        let Some(place) = slab.at(slot).map(|flow| flow.bucket) else { return };
        self.unschedule(slab, slot, place);
        self.schedule(slab, slot, due);
    }

    /// The next flow that is to be looked at; `None` where there is none up to now. It stays where it is.
    pub(super) fn next_due<F>(&mut self, slab: &mut FlowSlab<F>, now: Moment) -> Option<u32> {
        self.rewind(now);
        let now = tick(now);
        // After more than a round without a look, each bucket is looked at once.
        self.tick = self.tick.max(now.saturating_sub(u64::from(BUCKETS) - 1));
        loop {
            self.tick = self.next_filled()?.min(now + 1);
            if self.tick > now {
                self.tick = now;
                return None;
            }
            let head = self.buckets.get(bucket(self.tick) as usize).map_or(NIL, |list| list.head);
            if slab.at(head).is_some() {
                return Some(head);
            }
            self.tick += 1;
        }
    }

    /// The first tick, from this on, whose bucket has a flow.
    fn next_filled(&self) -> Option<u64> {
        let start = bucket(self.tick);
        let words = self.filled.len();
        let (first, offset) = (start as usize / 64, start % 64);
        for step in 0..=words {
            let mut word = *self.filled.get((first + step) % words)?;
            if step == 0 {
                word &= u64::MAX << offset;
            } else if step == words {
                word &= !(u64::MAX << offset);
            }
            if word != 0 {
                let place = u64::try_from((first + step) * 64).ok()? + u64::from(word.trailing_zeros());
                return Some(self.tick + place - u64::from(start));
            }
        }
        None
    }

    /// When the next flow is to be looked at.
    pub(super) fn deadline(&self) -> Moment {
        Moment::from_nanos(self.next_filled().unwrap_or(self.tick).saturating_mul(nanos()))
    }

    /// The tenant that has most; of several, the one with the highest number.
    pub(super) fn fullest(&self) -> Option<u32> {
        self.ranks.last().map(|(_, tenant)| *tenant)
    }

    /// Of a tenant's flows the one that was idle longest, among the first of its list. Those that were looked at go to the
    /// list's end, so that the next look is at others.
    pub(super) fn longest_idle<F>(
        &mut self,
        slab: &mut FlowSlab<F>,
        tenant: u32,
        now: Moment,
    ) -> Option<u32> {
        let list = self.tenants.get_mut(&tenant)?;
        let mut longest = None;
        for _ in 0..LOOKED_AT.min(list.len as usize) {
            let slot = list.head;
            let idle = now.since(slab.at(slot)?.last);
            if longest.is_none_or(|(_, longest)| idle > longest) {
                longest = Some((slot, idle));
            }
            slab.unlink(list, ListKind::Tenant, slot);
            slab.push(list, ListKind::Tenant, slot);
        }
        longest.map(|(slot, _)| slot)
    }
}
