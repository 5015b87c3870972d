//! A bound on how many there may be at once, exact over all workers: permits that give themselves back.

use std::sync::Arc;

use crate::atomic::{AtomicUsize, Ordering};

/// A bounded number of slots.
#[derive(Debug)]
pub struct Slots {
    limit: AtomicUsize,
    used: AtomicUsize,
    /// Those of `used` that are reserved for sessions to be taken over, or that have moved to another process.
    reserved: AtomicUsize,
}

impl Slots {
    /// The limit that is none.
    pub const UNLIMITED: usize = usize::MAX;

    /// `limit` slots, all free.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: AtomicUsize::new(limit), ..Self::default() })
    }

    /// Sets the limit. Slots in use stay in use; no slot is given out until there is room.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Release);
    }

    /// Takes a slot; `None` where all are taken.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<SlotPermit> {
        self.reserve().then(|| SlotPermit(Arc::clone(self)))
    }

    /// Takes a reserved slot, or else one beyond the limit, for a session that exists already. No new one is admitted
    /// until there is room again.
    #[must_use]
    pub fn take_anyway(self: &Arc<Self>) -> SlotPermit {
        self.enter_reserved();
        SlotPermit(Arc::clone(self))
    }

    /// Exact both ways: none is admitted over the limit, and none is refused because another one just was.
    fn reserve(&self) -> bool {
        self.enter().is_ok()
    }

    /// Takes a slot, and returns how many were taken before, also on failure. Call [`leave`](Self::leave) for each
    /// slot.
    pub(super) fn enter(&self) -> Result<usize, usize> {
        let room = |used: usize| (used < self.limit()).then_some(used + 1);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room)
    }

    /// Takes a slot even beyond the limit, and tells how many were taken before.
    pub(super) fn enter_anyway(&self) -> usize {
        self.used.fetch_add(1, Ordering::AcqRel)
    }

    /// Takes a slot that is kept, or else one even beyond the limit, and tells whether none was taken before.
    pub(super) fn enter_reserved(&self) -> bool {
        let one = |kept: usize| kept.checked_sub(1);
        match self.reserved.fetch_update(Ordering::AcqRel, Ordering::Acquire, one) {
            // A reserved slot is already counted as taken.
            Ok(_) => false,
            Err(_) => self.enter_anyway() == 0,
        }
    }

    /// Keeps so many more, even beyond the limit, and tells how many were taken before.
    pub fn reserve_more(&self, count: usize) -> usize {
        let before = self.used.fetch_add(count, Ordering::AcqRel);
        self.reserved.fetch_add(count, Ordering::AcqRel);
        before
    }

    /// Gives back those that are kept, if any, and tells how many are taken still.
    pub fn release_reserved(&self) -> Option<usize> {
        let kept = Some(self.reserved.swap(0, Ordering::AcqRel)).filter(|kept| *kept > 0)?;
        Some(self.used.fetch_sub(kept, Ordering::AcqRel) - kept)
    }

    /// Gives a slot back, and tells how many are taken still.
    pub(super) fn leave(&self) -> usize {
        self.used.fetch_sub(1, Ordering::AcqRel) - 1
    }

    /// How many there may be.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// How many are taken, with those that are kept.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// How many are here.
    #[must_use]
    pub fn present(&self) -> usize {
        self.used().saturating_sub(self.reserved.load(Ordering::Acquire))
    }
}

impl Default for Slots {
    /// As many as may be.
    fn default() -> Self {
        Self {
            limit: AtomicUsize::new(Self::UNLIMITED),
            used: AtomicUsize::new(0),
            reserved: AtomicUsize::new(0),
        }
    }
}

/// One slot, released on drop.
#[derive(Debug)]
pub struct SlotPermit(Arc<Slots>);

impl Drop for SlotPermit {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_within_the_limit_is_admitted_and_the_next_is_rejected() {
        let slots = Slots::new(2);
        let first = slots.take().unwrap();
        let _second = slots.take().unwrap();
        assert_eq!((slots.used(), slots.limit()), (2, 2));
        assert!(slots.take().is_none());
        assert_eq!(slots.used(), 2);
        drop(first);
        assert_eq!(slots.used(), 1);
        assert!(slots.take().is_some());
        assert!(Slots::new(0).take().is_none());
    }

    #[test]
    fn lowered_limit_keeps_held_slots() {
        let slots = Slots::new(3);
        let mut held: Vec<_> = (0..3).map(|_| slots.take().unwrap()).collect();
        slots.set_limit(1);
        assert_eq!((slots.used(), slots.limit()), (3, 1));
        for left in (1..3).rev() {
            assert!(slots.take().is_none(), "{left}");
            held.pop();
        }
        assert!(slots.take().is_none());
        held.pop();
        held.extend(slots.take());
        assert_eq!(slots.used(), 1);
        slots.set_limit(Slots::UNLIMITED);
        assert!(slots.take().is_some());
        assert_eq!(Slots::default().limit(), Slots::UNLIMITED);
    }

    #[test]
    fn forced_slot_is_counted_beyond_the_limit() {
        let slots = Slots::new(1);
        assert_eq!(slots.enter(), Ok(0));
        assert_eq!((slots.enter(), slots.enter_anyway(), slots.used()), (Err(1), 1, 2));
        assert_eq!((slots.leave(), slots.leave()), (1, 0));
        let held = [0; 2].map(|_| slots.take_anyway());
        assert!(slots.used() == 2 && slots.take().is_none());
        drop(held);
        assert_eq!(slots.used(), 0);
    }

    #[test]
    fn reserved_slot_is_taken_by_its_session_and_released_once() {
        let slots = Slots::new(3);
        assert_eq!((slots.reserve_more(2), slots.used(), slots.present()), (0, 2, 0));
        let _new = slots.take().unwrap();
        assert!(slots.take().is_none(), "reserved slots are not given out");
        let came = slots.take_anyway();
        assert_eq!((slots.used(), slots.present()), (3, 2));
        assert_eq!((slots.release_reserved(), slots.used(), slots.present()), (Some(2), 2, 2));
        assert_eq!(slots.release_reserved(), None);
        let _late = slots.take_anyway();
        assert_eq!((slots.enter_reserved(), slots.leave()), (false, 3));
        drop(came);
        assert_eq!((slots.used(), slots.reserve_more(0)), (2, 2));
    }

    #[test]
    fn threads_never_hold_more_than_the_limit_and_leak_none() {
        let slots = Slots::new(3);
        let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        if let Some(permit) = slots.take() {
                            most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            held.fetch_sub(1, Ordering::SeqCst);
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert!((1..=3).contains(&most.load(Ordering::SeqCst)));
        assert_eq!(slots.used(), 0);
    }
}
