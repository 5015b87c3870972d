//! A bound on how many there may be at once, exact over all workers: permits that give themselves back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// So many at once, and not one more.
#[derive(Debug)]
pub struct Slots {
    limit: AtomicUsize,
    used: AtomicUsize,
}

impl Slots {
    /// `limit` slots, all free.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: AtomicUsize::new(limit), used: AtomicUsize::new(0) })
    }

    /// Takes a slot; `None` where all are taken.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Permit> {
        self.reserve().then(|| Permit(Arc::clone(self)))
    }

    /// Exact both ways: nobody comes in over the limit, and nobody is refused because somebody else just was.
    fn reserve(&self) -> bool {
        let room = |used: usize| (used < self.limit()).then_some(used + 1);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok()
    }

    /// How many there may be.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// How many there are.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }
}

/// One slot, given back on drop.
#[derive(Debug)]
pub struct Permit(Arc<Slots>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_is_admitted_and_the_next_rejected() {
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
