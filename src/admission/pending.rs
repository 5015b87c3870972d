//! Slots for connections without a complete header: bounded in number, and in time that shrinks as they fill up.
//!
//! A silent connection costs its sender nothing, so a full table must not keep others out: the newcomer gets the place of
//! the connection that has been silent longest, as the kernel's cache of half-open connections does (Lemon, "Resisting SYN
//! flood attacks with a SYN cache", 2002). Behind a load balancer the header comes a round trip after the connection; with 4,096 places and
//! 2,000 silent connections a second each has two seconds for that.
//!
//! One lock for each listener, over all workers, so that the longest-silent one is exactly that. Only a connection that has
//! to wait for its header takes it, which costs some system calls anyway.

use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;

use slab::Slab;

use crate::account::lock;
use crate::atomic::{AtomicUsize, Ordering};
use crate::clock::Moment;

/// The time that a connection has for its header where all places are taken.
pub(crate) const LEAST_TIME: Duration = Duration::from_secs(2);

/// The slots of one listener for connections without a complete header.
#[derive(Debug)]
pub struct PendingSlots {
    limit: AtomicUsize,
    /// How many are taken, readable without the lock.
    used: AtomicUsize,
    table: Mutex<PendingTable>,
}

/// The state of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PendingState {
    /// It waits for its header.
    Waits,
    /// A newer connection has it.
    Displaced,
    /// Its time is up, which was shorter because many wait.
    Expired,
}

/// No node.
const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct PendingNode {
    /// The one before, which has waited for longer.
    prev: u32,
    next: u32,
    since: Moment,
    standing: PendingState,
    waker: Waker,
}

/// The waiting connections, in order of arrival.
#[derive(Debug)]
struct PendingTable {
    /// Those that have lost their place and do not know it yet are here too.
    nodes: Slab<PendingNode>,
    oldest: u32,
    newest: u32,
    /// How many wait for their header.
    waiting: usize,
}

impl Default for PendingTable {
    fn default() -> Self {
        Self { nodes: Slab::new(), oldest: NIL, newest: NIL, waiting: 0 }
    }
}

impl PendingSlots {
    /// So many places, one at least.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit.max(1)),
            used: AtomicUsize::new(0),
            table: Mutex::default(),
        })
    }

    /// From now on so many, one at least. Those that are here stay until the next one comes.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit.max(1), Ordering::Release);
    }

    /// The number of slots.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// The slots in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// Takes a slot: a free one, or else that of the connection that has waited longest.
    #[must_use]
    pub fn enter(self: &Arc<Self>, now: Moment) -> PendingSlot {
        let limit = self.limit();
        let mut table = lock(&self.table);
        while table.waiting >= limit {
            table.end_oldest(PendingState::Displaced);
        }
        let number = table.add(now);
        self.used.store(table.waiting, Ordering::Release);
        drop(table);
        PendingSlot { places: Arc::clone(self), number }
    }

    /// Ends those that have waited for longer than a connection may while so many wait, where `timeout` is what it has
    /// while few do.
    pub fn expire(&self, timeout: Duration, now: Moment) {
        let limit = self.limit();
        if time_allowed(timeout, self.used(), limit) == timeout {
            // Each connection's own deadline covers the full timeout.
            return;
        }
        let mut table = lock(&self.table);
        while let Some(since) = table.oldest_since()
            && now.since(since) > time_allowed(timeout, table.waiting, limit)
        {
            table.end_oldest(PendingState::Expired);
        }
        self.used.store(table.waiting, Ordering::Release);
    }
}

/// How long a connection may take for its header: all of `timeout` while no more than half of the places are taken, then
/// the less the fewer are free, down to [`LEAST_TIME`].
fn time_allowed(timeout: Duration, used: usize, limit: usize) -> Duration {
    let half = limit / 2;
    let (beyond, range) = (used.saturating_sub(half), limit - half);
    if beyond == 0 || limit < 2 {
        return timeout;
    }
    let most_cut = timeout.saturating_sub(LEAST_TIME);
    let part = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    timeout.saturating_sub(most_cut / part(range) * part(beyond.min(range)))
}

impl PendingTable {
    fn oldest_since(&self) -> Option<Moment> {
        self.nodes.get(self.oldest as usize).map(|node| node.since)
    }

    fn add(&mut self, now: Moment) -> u32 {
        let node = PendingNode {
            prev: self.newest,
            next: NIL,
            since: now,
            standing: PendingState::Waits,
            waker: Waker::noop().clone(),
        };
        let number = u32::try_from(self.nodes.insert(node)).unwrap_or(NIL);
        match self.nodes.get_mut(self.newest as usize) {
            Some(before) => before.next = number,
            None => self.oldest = number,
        }
        self.newest = number;
        self.waiting += 1;
        number
    }

    /// Ends the connection that has waited longest, and wakes it.
    fn end_oldest(&mut self, standing: PendingState) {
        let number = self.oldest;
        self.unlink(number);
        if let Some(node) = self.nodes.get_mut(number as usize) {
            node.standing = standing;
            node.waker.wake_by_ref();
        }
    }

    /// Takes one out of the order.
    fn unlink(&mut self, number: u32) {
        let Some(node) = self.nodes.get(number as usize) else { return };
        let (prev, next) = (node.prev, node.next);
        match self.nodes.get_mut(prev as usize) {
            Some(before) => before.next = next,
            None => self.oldest = next,
        }
        match self.nodes.get_mut(next as usize) {
            Some(after) => after.prev = prev,
            None => self.newest = prev,
        }
        self.waiting -= 1;
    }

    /// Forgets one that has gone. The caller drops it without the lock, for dropping a waker may run code of others.
    fn remove(&mut self, number: u32) -> Option<PendingNode> {
        if self.nodes.get(number as usize)?.standing == PendingState::Waits {
            self.unlink(number);
        }
        let node = self.nodes.try_remove(number as usize);
        if self.nodes.is_empty() {
            // Frees the memory of a past flood.
            *self = Self::default();
        }
        node
    }
}

/// The slot of one connection, released on drop.
#[derive(Debug)]
pub struct PendingSlot {
    places: Arc<PendingSlots>,
    number: u32,
}

impl PendingSlot {
    /// How it stands; `waker` is woken once that changes.
    #[must_use]
    pub fn poll(&self, waker: &Waker) -> PendingState {
        let mut table = lock(&self.places.table);
        let Some(node) = table.nodes.get_mut(self.number as usize) else { return PendingState::Displaced };
        node.waker.clone_from(waker);
        node.standing
    }
}

impl Drop for PendingSlot {
    fn drop(&mut self) {
        let mut table = lock(&self.places.table);
        let node = table.remove(self.number);
        self.places.used.store(table.waiting, Ordering::Release);
        drop(table);
        drop(node);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize as Counter;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(Counter);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos(ms * 1_000_000)
    }

    fn standing(place: &PendingSlot) -> PendingState {
        place.poll(Waker::noop())
    }

    #[test]
    fn new_connection_gets_the_slot_of_the_longest_waiting() {
        let (places, count) = (PendingSlots::new(2), Arc::new(Count::default()));
        let [first, second] = [0, 1].map(|ms| places.enter(at_ms(ms)));
        let waker = Waker::from(Arc::clone(&count));
        assert_eq!([&first, &second].map(|place| place.poll(&waker)), [PendingState::Waits; 2]);
        let third = places.enter(at_ms(2));
        assert_eq!(
            [&first, &second, &third].map(standing),
            [PendingState::Displaced, PendingState::Waits, PendingState::Waits]
        );
        assert_eq!((count.0.load(Ordering::Relaxed), places.used()), (1, 2));
        drop(second);
        let fourth = places.enter(at_ms(3));
        assert_eq!(
            (standing(&third), places.used()),
            (PendingState::Waits, 2),
            "a free place is taken first"
        );
        drop((third, fourth));
        assert_eq!(places.used(), 0);
        drop(first);
        assert_eq!(lock(&places.table).nodes.capacity(), 0, "a flood's memory goes back");
    }

    #[test]
    fn lowered_limit_ends_the_longest_waiting_when_the_next_one_comes() {
        let places = PendingSlots::new(5);
        let held: Vec<_> = (0..5).map(|ms| places.enter(at_ms(ms))).collect();
        places.set_limit(2);
        assert!(
            (places.limit(), places.used()) == (2, 5)
                && held.iter().all(|place| standing(place) == PendingState::Waits)
        );
        let next = places.enter(at_ms(5));
        let waits: Vec<_> = held.iter().map(|place| standing(place) == PendingState::Waits).collect();
        assert_eq!((waits, places.used()), (vec![false, false, false, false, true], 2));
        places.set_limit(0);
        assert_eq!(places.limit(), 1, "a newcomer always has a place");
        drop((held, next));
        assert_eq!(places.used(), 0);
    }

    #[test]
    fn time_shrinks_from_half_full_to_full() {
        let timeout = Duration::from_secs(60);
        let allowed = |used, limit| time_allowed(timeout, used, limit).as_millis();
        assert_eq!(
            [0, 50, 51, 75, 100, 200].map(|used| allowed(used, 100)),
            [60_000, 60_000, 58_840, 31_000, 2_000, 2_000]
        );
        assert_eq!(
            (allowed(1, 1), allowed(1, 2), allowed(2, 2), allowed(2, 3)),
            (60_000, 60_000, 2_000, 31_000)
        );
        assert_eq!(
            time_allowed(Duration::from_secs(1), 100, 100),
            Duration::from_secs(1),
            "it was shorter before"
        );
    }

    #[test]
    fn connections_that_wait_too_long_in_a_full_table_end() {
        let places = PendingSlots::new(4);
        let timeout = Duration::from_secs(10);
        let held: Vec<_> = (0..4).map(|second| places.enter(at_ms(second * 1_000))).collect();
        places.expire(timeout, at_ms(2_000));
        assert_eq!(places.used(), 4);
        // With four pending, each has 2 s; with three, 6 s, which none has waited.
        places.expire(timeout, at_ms(3_000));
        let standings: Vec<_> = held.iter().map(standing).collect();
        assert_eq!((standings[0], places.used()), (PendingState::Expired, 3));
        assert!(standings[1..].iter().all(|standing| *standing == PendingState::Waits));
        places.expire(timeout, at_ms(7_001));
        assert_eq!((standing(&held[1]), places.used()), (PendingState::Expired, 2));
        places.expire(timeout, at_ms(60_000));
        assert_eq!(places.used(), 2, "with half of the places free each has a deadline of its own");
        drop(held);
        assert_eq!((places.used(), lock(&places.table).nodes.len()), (0, 0));
    }

    #[test]
    fn threads_leave_nothing_behind() {
        let places = PendingSlots::new(3);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let places = &places;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(thread);
                    let mut own = Vec::new();
                    for step in 0..5_000 {
                        if random.bool() {
                            own.push(places.enter(at_ms(step)));
                            assert!(places.used() <= 3);
                        } else if !own.is_empty() {
                            let place = own.swap_remove(random.usize(..own.len()));
                            let _standing = place.poll(Waker::noop());
                        }
                        places.expire(Duration::from_secs(3), at_ms(step));
                    }
                });
            }
        });
        assert_eq!((places.used(), lock(&places.table).nodes.len()), (0, 0));
    }
}
