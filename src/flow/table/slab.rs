//! Where flows lie: in chunks, so that none ever moves, and found by number.

use super::{FlowClient, FlowPath};
use crate::clock::Moment;

/// Flows of a chunk, as a power of two.
const CHUNK_BITS: u32 = 8;

/// The id of a flow; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId(u64);

impl FlowId {
    pub(super) fn new(slot: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(slot))
    }

    /// As a number, for a poll to give back.
    #[must_use]
    pub const fn to_u64(self) -> u64 {
        self.0
    }

    /// Of such a number.
    #[must_use]
    pub const fn from_u64(number: u64) -> Self {
        Self(number)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    pub(super) const fn slot(self) -> u32 {
        self.0 as u32
    }

    const fn generation(self) -> u64 {
        self.0 >> 32
    }
}

/// No flow.
pub(super) const NIL: u32 = u32::MAX;

/// The lists that every flow is in.
#[derive(Clone, Copy)]
pub(super) enum ListKind {
    /// Those whose idleness is looked at together.
    Due,
    /// Those of one tenant.
    Tenant,
    /// Those of one path.
    Path,
}

/// The flows before and after one.
#[derive(Clone, Copy, Debug)]
struct ListLink {
    before: u32,
    after: u32,
}

/// A list of flows.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlowList {
    pub(super) head: u32,
    tail: u32,
    pub(super) len: u32,
}

impl FlowList {
    pub(super) const EMPTY: Self = Self { head: NIL, tail: NIL, len: 0 };
}

/// One slot: a flow, or free.
#[derive(Debug)]
pub(super) struct FlowSlot<F> {
    pub(super) path: FlowPath,
    pub(super) client: FlowClient,
    pub(super) last: Moment,
    pub(super) tenant: u32,
    pub(super) generation: u32,
    /// Whether its path has had another speaker while it lived.
    pub(super) shares_path: bool,
    /// Where it hangs on the wheel.
    pub(super) bucket: u32,
    links: [ListLink; 3],
    pub(super) flow: Option<F>,
}

impl<F> FlowSlot<F> {
    pub(super) fn new(path: FlowPath, who: FlowClient, tenant: u32, flow: F, now: Moment) -> Self {
        let links = [ListLink { before: NIL, after: NIL }; 3];
        Self {
            path,
            client: who,
            last: now,
            tenant,
            generation: 0,
            shares_path: false,
            bucket: 0,
            links,
            flow: Some(flow),
        }
    }
}

#[derive(Debug)]
pub(super) struct FlowSlab<F> {
    chunks: Vec<Vec<FlowSlot<F>>>,
    free: Vec<u32>,
}

impl<F> Default for FlowSlab<F> {
    fn default() -> Self {
        Self { chunks: Vec::new(), free: Vec::new() }
    }
}

impl<F> FlowSlab<F> {
    fn slot(&self, slot: u32) -> Option<&FlowSlot<F>> {
        self.chunks.get((slot >> CHUNK_BITS) as usize)?.get((slot & ((1 << CHUNK_BITS) - 1)) as usize)
    }

    fn slot_mut(&mut self, slot: u32) -> Option<&mut FlowSlot<F>> {
        self.chunks.get_mut((slot >> CHUNK_BITS) as usize)?.get_mut((slot & ((1 << CHUNK_BITS) - 1)) as usize)
    }

    /// A flow that is there.
    pub(super) fn at(&self, slot: u32) -> Option<&FlowSlot<F>> {
        self.slot(slot).filter(|slot| slot.flow.is_some())
    }

    /// A flow that is there, to be changed.
    pub(super) fn at_mut(&mut self, slot: u32) -> Option<&mut FlowSlot<F>> {
        self.slot_mut(slot).filter(|slot| slot.flow.is_some())
    }

    /// The flow of this name.
    pub(super) fn find(&mut self, id: FlowId) -> Option<&mut FlowSlot<F>> {
        self.at_mut(id.slot()).filter(|slot| u64::from(slot.generation) == id.generation())
    }

    /// Every flow's number.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        let all = (0..).zip(self.chunks.iter().flatten());
        all.filter(|(_, slot)| slot.flow.is_some()).map(|(number, _)| number)
    }

    /// Beyond every flow's number.
    pub(super) fn end(&self) -> u32 {
        let last = self.chunks.last().map_or(0, Vec::len);
        u32::try_from((self.chunks.len().saturating_sub(1) << CHUNK_BITS) + last).unwrap_or(NIL)
    }

    /// Puts a flow in; its number and generation.
    pub(super) fn insert(&mut self, flow: FlowSlot<F>) -> (u32, u32) {
        if let Some(number) = self.free.pop()
            && let Some(slot) = self.slot_mut(number)
        {
            let generation = slot.generation;
            *slot = FlowSlot { generation, ..flow };
            return (number, generation);
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() >> CHUNK_BITS > 0) {
            self.chunks.push(Vec::with_capacity(1 << CHUNK_BITS));
        }
        let number = self.end();
        let Some(chunk) = self.chunks.last_mut() else { return (NIL, 0) };
        chunk.push(flow);
        (number, 0)
    }

    /// Removes a flow that is in no list any more. Its id is never used again.
    pub(super) fn remove(&mut self, number: u32) -> Option<F> {
        let slot = self.slot_mut(number)?;
        let flow = slot.flow.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(number);
        Some(flow)
    }

    fn link(&mut self, slot: u32, kind: ListKind) -> Option<&mut ListLink> {
        self.slot_mut(slot)?.links.get_mut(kind as usize)
    }

    /// The flow behind one.
    pub(super) fn after(&self, slot: u32, kind: ListKind) -> u32 {
        self.slot(slot).and_then(|slot| slot.links.get(kind as usize)).map_or(NIL, |link| link.after)
    }

    fn before(&self, slot: u32, kind: ListKind) -> u32 {
        self.slot(slot).and_then(|slot| slot.links.get(kind as usize)).map_or(NIL, |link| link.before)
    }

    fn set(&mut self, slot: u32, kind: ListKind, before: u32, after: u32) {
        if let Some(link) = self.link(slot, kind) {
            *link = ListLink { before, after };
        }
    }

    fn join(&mut self, before: u32, after: u32, kind: ListKind) {
        if let Some(link) = self.link(before, kind) {
            link.after = after;
        }
        if let Some(link) = self.link(after, kind) {
            link.before = before;
        }
    }

    /// Puts a flow at a list's end.
    pub(super) fn push(&mut self, list: &mut FlowList, kind: ListKind, slot: u32) {
        self.set(slot, kind, list.tail, NIL);
        self.join(list.tail, slot, kind);
        if list.head == NIL {
            list.head = slot;
        }
        list.tail = slot;
        list.len += 1;
    }

    /// Takes a flow out of a list.
    pub(super) fn unlink(&mut self, list: &mut FlowList, kind: ListKind, slot: u32) {
        let (before, after) = (self.before(slot, kind), self.after(slot, kind));
        self.join(before, after, kind);
        if list.head == slot {
            list.head = after;
        }
        if list.tail == slot {
            list.tail = before;
        }
        list.len -= 1;
        self.set(slot, kind, NIL, NIL);
    }

    /// Puts a flow behind the first of its path.
    pub(super) fn push_shared(&mut self, first: u32, slot: u32) {
        let second = self.after(first, ListKind::Path);
        self.set(slot, ListKind::Path, first, second);
        self.join(slot, second, ListKind::Path);
        self.join(first, slot, ListKind::Path);
    }

    /// Takes a flow out of those of its path.
    pub(super) fn unlink_shared(&mut self, slot: u32) {
        let (before, after) = (self.before(slot, ListKind::Path), self.after(slot, ListKind::Path));
        self.join(before, after, ListKind::Path);
    }
}
