//! The flows of one worker: datagrams and the time in, what is to be done with them out. No socket, no clock.
//!
//! A flow is identified by the source of its datagrams and by their client and endpoint. Consumers have the same
//! addresses, and one load balancer forwards them all: client and endpoint are part of the key, so that two clients
//! never share a flow.

mod queue;
mod slab;
#[cfg(test)]
mod tests;

use std::hash::BuildHasher;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use self::queue::IdleQueue;
use self::slab::{FlowSlab, FlowSlot, ListKind, NIL};
use crate::addr::{ClientAddr, PeerAddr};
use crate::clock::Moment;
use crate::id::EndpointClaim;

pub use self::slab::FlowId;

/// The addresses of a datagram, and the socket for its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowPath {
    /// Which listening socket of the worker.
    pub socket: u16,
    /// The address that was asked, where the socket's own does not tell. Sockets are of one family each, so no IPv4
    /// address comes in the guise of IPv6.
    pub local: Option<IpAddr>,
    /// The sender, with its scope: an answer to a link-local address needs it. The kernel leaves the flow label zero.
    pub peer: PeerAddr,
}

/// The client and endpoint of a datagram, from its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowClient {
    /// The client's address, as it is written: an IPv4 one in the guise of IPv6 is another client. To tell apart what is one
    /// costs a flow; to take for one what is not would give a consumer another's answers.
    pub client: Option<ClientAddr>,
    /// Its endpoint.
    pub endpoint: EndpointClaim,
}

/// What to do with a client's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramAction {
    /// A flow is to be [opened](FlowTable::open).
    Open,
    /// It belongs to this flow, and is its backend's.
    ToBackend(FlowId),
    /// It belongs to no flow and opens none.
    Drop(StrayDatagram),
}

/// Why a datagram belongs to no flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrayDatagram {
    /// It has no header, and its path has no flow.
    NoHeader,
    /// It has no header, and its path has several flows, or had while the present one lived.
    Ambiguous,
}

/// The flow table. `F` is the value of each flow.
#[derive(Debug)]
pub struct FlowTable<F> {
    slab: FlowSlab<F>,
    /// Flows by path and speaker.
    index: HashTable<u32>,
    /// The first flow of each path; the others hang on it.
    paths: HashTable<u32>,
    random: RandomState,
    queue: IdleQueue,
    idle: Duration,
    /// From this number on, those there are may hang later than they are due: `idle` has become shorter.
    lagging: u32,
}

/// Flows that are hung anew in one call: some 40 us.
const HUNG_ANEW: u32 = 1024;

/// For each flow that is taken out: to look at one and put it off is so much cheaper than to close its socket.
const LOOKS: usize = 32;

impl<F> FlowTable<F> {
    /// No flows yet. One may be silent for `idle`.
    #[must_use]
    pub fn new(idle: Duration) -> Self {
        Self {
            slab: FlowSlab::default(),
            index: HashTable::new(),
            paths: HashTable::new(),
            random: RandomState::default(),
            queue: IdleQueue::default(),
            idle,
            lagging: NIL,
        }
    }

    /// The count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The number of a tenant's flows.
    #[must_use]
    pub fn of_tenant(&self, tenant: u32) -> usize {
        self.queue.of_tenant(tenant)
    }

    /// Takes in a datagram of a client's. `flow_client` is `None` where it does not say who speaks: then it belongs to the one
    /// flow that its path has, unless another speaker had a flow there while that one lived.
    pub fn on_datagram(
        &mut self,
        path: FlowPath,
        flow_client: Option<FlowClient>,
        now: Moment,
    ) -> DatagramAction {
        let slot = match flow_client {
            Some(flow_client) => match self.known(path, flow_client) {
                Some(slot) => slot,
                None => return DatagramAction::Open,
            },
            None => match self.first_of(path) {
                Some(slot) if self.slab.at(slot).is_some_and(|flow| !flow.shares_path) => slot,
                Some(_) => return DatagramAction::Drop(StrayDatagram::Ambiguous),
                None => return DatagramAction::Drop(StrayDatagram::NoHeader),
            },
        };
        self.queue.rewind(now);
        self.slab.at_mut(slot).map_or(DatagramAction::Open, |flow| {
            flow.last = now;
            DatagramAction::ToBackend(FlowId::new(slot, flow.generation))
        })
    }

    fn known(&self, path: FlowPath, flow_client: FlowClient) -> Option<u32> {
        let is_it = |slot: &u32| {
            self.slab.at(*slot).is_some_and(|flow| flow.path == path && flow.client == flow_client)
        };
        self.index.find(self.random.hash_one((path, flow_client)), is_it).copied()
    }

    fn first_of(&self, path: FlowPath) -> Option<u32> {
        let is_it = |slot: &u32| self.slab.at(*slot).is_some_and(|flow| flow.path == path);
        self.paths.find(self.random.hash_one(path), is_it).copied()
    }

    /// Opens a flow that [`on_datagram`](Self::on_datagram) asked for, and that there is not yet.
    pub fn open(
        &mut self,
        path: FlowPath,
        flow_client: FlowClient,
        tenant: u32,
        flow: F,
        now: Moment,
    ) -> FlowId {
        debug_assert!(self.known(path, flow_client).is_none());
        let first = self.first_of(path);
        let (slot, generation) = self.slab.insert(FlowSlot::new(path, flow_client, tenant, flow, now));
        let (slab, random) = (&self.slab, &self.random);
        let by_key = |slot: &u32| slab.at(*slot).map_or(0, |flow| random.hash_one((flow.path, flow.client)));
        self.index.insert_unique(random.hash_one((path, flow_client)), slot, by_key);
        if let Some(first) = first {
            // Behind the first, so that the path still leads there.
            self.slab.push_shared(first, slot);
            for slot in [first, slot] {
                self.slab.at_mut(slot).into_iter().for_each(|flow| flow.shares_path = true);
            }
        } else {
            let by_path = |slot: &u32| slab.at(*slot).map_or(0, |flow| random.hash_one(flow.path));
            self.paths.insert_unique(random.hash_one(path), slot, by_path);
        }
        self.queue.rewind(now);
        self.queue.add(&mut self.slab, slot, now + self.idle);
        FlowId::new(slot, generation)
    }

    /// Takes in a flow that has been open elsewhere, and was last heard of then.
    pub fn take_in(
        &mut self,
        path: FlowPath,
        flow_client: FlowClient,
        tenant: u32,
        flow: F,
        last: Moment,
        now: Moment,
    ) -> FlowId {
        let id = self.open(path, flow_client, tenant, flow, now);
        if let Some(slot) = self.slab.at_mut(id.slot()) {
            slot.last = last.min(now);
        }
        self.queue.reschedule(&mut self.slab, id.slot(), last + self.idle);
        id
    }

    /// Whether a flow's path has had another speaker while the flow lived.
    pub fn shares_path(&mut self, id: FlowId) -> bool {
        self.slab.find(id).is_some_and(|flow| flow.shares_path)
    }

    /// A flow's path has had another speaker where the flow was before.
    pub fn set_shares_path(&mut self, id: FlowId) {
        if let Some(flow) = self.slab.find(id) {
            flow.shares_path = true;
        }
    }

    /// The time of a flow's last datagram.
    pub fn last(&mut self, id: FlowId) -> Option<Moment> {
        self.slab.find(id).map(|flow| flow.last)
    }

    /// The names of all.
    #[must_use]
    pub fn ids(&self) -> Vec<FlowId> {
        let id = |slot| self.slab.at(slot).map(|flow| FlowId::new(slot, flow.generation));
        self.slab.slots().filter_map(id).collect()
    }

    /// A datagram came from a flow's backend: where it goes, and the flow.
    pub fn answer(&mut self, id: FlowId, now: Moment) -> Option<(FlowPath, FlowClient, &mut F)> {
        let flow = self.slab.find(id)?;
        self.queue.rewind(now);
        flow.last = now;
        Some((flow.path, flow.client, flow.flow.as_mut()?))
    }

    /// A flow, with nothing said of it.
    pub fn find(&mut self, id: FlowId) -> Option<(FlowPath, FlowClient, &mut F)> {
        let flow = self.slab.find(id)?;
        Some((flow.path, flow.client, flow.flow.as_mut()?))
    }

    /// Takes a flow out.
    pub fn close(&mut self, id: FlowId) -> Option<(FlowPath, FlowClient, F)> {
        self.slab.find(id)?;
        self.take_out(id.slot())
    }

    fn take_out(&mut self, slot: u32) -> Option<(FlowPath, FlowClient, F)> {
        self.queue.remove(&mut self.slab, slot);
        let &FlowSlot { path, client: flow_client, .. } = self.slab.at(slot)?;
        let next = self.slab.after(slot, ListKind::Path);
        if let Ok(entry) =
            self.index.find_entry(self.random.hash_one((path, flow_client)), |other| *other == slot)
        {
            entry.remove();
        }
        // Where it is the first of its path, the next one is that.
        match self.paths.find_entry(self.random.hash_one(path), |first| *first == slot) {
            Ok(first) if next == NIL => drop(first.remove()),
            Ok(mut first) => *first.get_mut() = next,
            Err(_) => {}
        }
        self.slab.unlink_shared(slot);
        Some((path, flow_client, self.slab.remove(slot)?))
    }

    /// Takes out flows that were idle for long, at most `most` in one call, and looks at no more than 32 times as many: others
    /// are left for the next.
    pub fn expire(&mut self, now: Moment, most: usize, mut closed: impl FnMut(FlowPath, FlowClient, F)) {
        self.catch_up();
        let mut left = most;
        for _ in 0..most.saturating_mul(LOOKS) {
            if left == 0 {
                return;
            }
            let Some(slot) = self.queue.next_due(&mut self.slab, now) else { return };
            let Some(flow) = self.slab.at_mut(slot) else { continue };
            // A clock that went back must not let it live for ever.
            flow.last = flow.last.min(now);
            if now.since(flow.last) >= self.idle {
                left -= 1;
                self.take_out(slot)
                    .into_iter()
                    .for_each(|(path, flow_client, flow)| closed(path, flow_client, flow));
            } else {
                let due = flow.last + self.idle;
                self.queue.reschedule(&mut self.slab, slot, due);
            }
        }
    }

    /// When [`expire`](Self::expire) has something to look at; perhaps only to see that a flow has spoken since. Never later
    /// than a tick after a flow has been idle for long, unless the clock went back: then within a round of the wheel.
    #[must_use]
    pub fn deadline(&self) -> Option<Moment> {
        match self.lagging {
            _ if self.is_empty() => None,
            NIL => Some(self.queue.deadline()),
            _ => Some(Moment::from_nanos(0)),
        }
    }

    /// Takes out a flow that was idle for at least `idle`: of this tenant, or else of the one that has most. Of some
    /// that began long ago it is the one that was idle longest. If all of those were active just now it takes none,
    /// though another of the tenant's may be idle: the next call looks at others.
    pub fn evict(
        &mut self,
        tenant: Option<u32>,
        idle: Duration,
        now: Moment,
    ) -> Option<(FlowPath, FlowClient, F)> {
        self.evict_if(tenant, idle, now, |_| true)
    }

    /// As [`evict`](Self::evict), where the flow that it would take is one of these.
    pub fn evict_if(
        &mut self,
        tenant: Option<u32>,
        idle: Duration,
        now: Moment,
        is_it: impl FnOnce(&F) -> bool,
    ) -> Option<(FlowPath, FlowClient, F)> {
        let tenant = tenant.or_else(|| self.queue.fullest())?;
        let slot = self.queue.longest_idle(&mut self.slab, tenant, now)?;
        let found = self.slab.at(slot)?;
        let gives_way = now.since(found.last) >= idle && found.flow.as_ref().is_some_and(is_it);
        if gives_way { self.take_out(slot) } else { None }
    }

    /// How long a flow may be silent.
    #[must_use]
    pub fn idle(&self) -> Duration {
        self.idle
    }

    /// From now on flows may be silent for this long. Where that is shorter, [`expire`](Self::expire) has something to do at
    /// once.
    pub fn set_idle(&mut self, idle: Duration) {
        if idle < self.idle {
            self.lagging = 0;
        }
        self.idle = idle;
    }

    /// Reschedules some flows that may be scheduled later than they are due.
    fn catch_up(&mut self) {
        let end = self.lagging.saturating_add(HUNG_ANEW);
        for slot in self.lagging..end.min(self.slab.end()) {
            if let Some(last) = self.slab.at(slot).map(|flow| flow.last) {
                self.queue.reschedule(&mut self.slab, slot, last + self.idle);
            }
        }
        self.lagging = if end < self.slab.end() { end } else { NIL };
    }

    /// Takes out all of them.
    pub fn drain(&mut self) -> impl Iterator<Item = (FlowPath, FlowClient, F)> {
        let all: Vec<_> = self.slab.slots().collect();
        all.into_iter().filter_map(|slot| self.take_out(slot))
    }
}
