//! What a pool's backends with `max-sessions` have room for, shared among its tenants by the rule of [`fair_share`].

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use arc_swap::ArcSwap;

use super::pick::PickError;
use crate::account::lock;
use crate::fair_share;

/// Which tenant holds how many places at a pool's backends. All are counted, limited or not: a reload may bring a limit, or a
/// second tenant.
#[derive(Debug, Default)]
pub(super) struct TenantShares {
    /// Whether several tenants may use the pool. One alone may have all of it.
    is_shared: AtomicBool,
    /// The number of sessions of each backend that gets any, and the most that it may have.
    rooms: ArcSwap<Vec<(Arc<AtomicU32>, u32)>>,
    counts: Mutex<ShareCounts>,
}

#[derive(Debug, Default)]
struct ShareCounts {
    /// By tenant.
    held: HashMap<u32, usize>,
    /// Places that are counted here, and perhaps not yet at a backend.
    entering: usize,
}

impl TenantShares {
    /// Whether several tenants may use the pool.
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed)
    }

    /// From now on one tenant may use the pool, or several may; whether several might before.
    pub(super) fn set_shared(&self, is_shared: bool) -> bool {
        self.is_shared.swap(is_shared, Ordering::Relaxed)
    }

    /// Sets the backends that get sessions, with their limits.
    pub(super) fn set_rooms(&self, rooms: Vec<(Arc<AtomicU32>, u32)>) {
        self.rooms.store(Arc::new(rooms));
    }

    /// What all backends together may have, and what of that is free; `None` where one has no limit, or no other tenant may
    /// use the pool. Reads each backend's count, as any of them may have become free.
    pub(super) fn room(&self) -> Option<(usize, usize)> {
        let rooms = self.rooms.load();
        if !self.is_shared() || rooms.is_empty() || rooms.iter().any(|(_, room)| *room == u32::MAX) {
            return None;
        }
        let free =
            |(load, room): &(Arc<AtomicU32>, u32)| room.saturating_sub(load.load(Ordering::SeqCst)) as usize;
        Some((rooms.iter().map(|(_, room)| *room as usize).sum(), rooms.iter().map(free).sum()))
    }

    /// Counts a place for the first of these tenants that may have one. It has to be [`settled`](Self::settle).
    ///
    /// # Errors
    /// Whether nothing is free, or each of them holds more than its share.
    pub(super) fn enter(&self, tenants: impl IntoIterator<Item = u32>) -> Result<u32, PickError> {
        let mut counts = lock(&self.counts);
        // Entering sessions first: one that reaches its backend meanwhile is counted twice rather than not at all.
        let entering = counts.entering;
        let room = self.room().map(|(capacity, free)| (capacity, free.saturating_sub(entering)));
        if room.is_some_and(|(_, free)| free == 0) {
            return Err(PickError::Free);
        }
        let may = |tenant: &u32| {
            let held = counts.held.get(tenant).copied().unwrap_or(0);
            let holders = counts.held.len() + usize::from(held == 0);
            room.is_none_or(|(capacity, free)| fair_share::is_allowed(held, holders, capacity, free - 1))
        };
        let tenant = tenants.into_iter().find(may).ok_or(PickError::Share)?;
        *counts.held.entry(tenant).or_default() += 1;
        counts.entering += 1;
        Ok(tenant)
    }

    /// A place that was counted is counted at a backend now, or given back.
    pub(super) fn settle(&self) {
        lock(&self.counts).entering -= 1;
    }

    /// Counts a place of a session that is in the pool already, whatever there is.
    pub(super) fn enter_anyway(&self, tenant: u32) {
        *lock(&self.counts).held.entry(tenant).or_default() += 1;
    }

    /// Releases a tenant's slot.
    pub(super) fn leave(&self, tenant: u32) {
        let mut counts = lock(&self.counts);
        match counts.held.get_mut(&tenant) {
            Some(held) if *held > 1 => *held -= 1,
            _ => drop(counts.held.remove(&tenant)),
        }
    }

    /// The slots that a tenant holds.
    pub(super) fn held(&self, tenant: u32) -> usize {
        lock(&self.counts).held.get(&tenant).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(room: u32) -> (TenantShares, Arc<AtomicU32>) {
        let (shares, load) = (TenantShares::default(), Arc::new(AtomicU32::new(0)));
        shares.set_rooms(vec![(Arc::clone(&load), room)]);
        shares.is_shared.store(true, Ordering::Relaxed);
        (shares, load)
    }

    /// A tenant takes every place that it gets; how many.
    fn fill(shares: &TenantShares, load: &AtomicU32, tenant: u32) -> usize {
        let gets = || shares.enter([tenant]).is_ok();
        let take = || {
            load.fetch_add(1, Ordering::SeqCst);
            shares.settle();
        };
        std::iter::from_fn(|| gets().then(take)).count()
    }

    #[test]
    fn each_tenant_that_comes_later_finds_a_place() {
        for (room, first) in [(1, 1), (2, 1), (10, 7), (100, 78), (1_000, 787)] {
            let (shares, load) = shares(room);
            assert_eq!(fill(&shares, &load, 0), first, "of {room}");
            for tenant in 1..room.div_ceil(16).min(20) {
                let own = fill(&shares, &load, tenant);
                assert!(own > 0, "tenant {tenant} of {room}");
                assert_eq!(shares.held(tenant), own);
            }
            for tenant in 0..20 {
                (0..shares.held(tenant)).for_each(|_| shares.leave(tenant));
            }
            assert!(lock(&shares.counts).held.is_empty());
        }
    }

    #[test]
    fn pool_of_one_tenant_or_with_an_unlimited_backend_is_counted_and_not_shared() {
        let (shares, load) = shares(2);
        shares.is_shared.store(false, Ordering::Relaxed);
        (0..3).for_each(|_| assert_eq!(shares.enter([1]), Ok(1)));
        (0..3).for_each(|_| shares.settle());
        shares.is_shared.store(true, Ordering::Relaxed);
        assert_eq!((shares.enter([1]), shares.held(1)), (Err(PickError::Share), 3));
        shares.set_rooms(vec![(Arc::clone(&load), 2), (load, u32::MAX)]);
        assert_eq!((shares.enter([1]), shares.held(1)), (Ok(1), 4));
    }

    #[test]
    fn place_that_is_not_yet_at_a_backend_is_not_free() {
        let (shares, load) = shares(3);
        assert_eq!((shares.enter([1]), shares.enter([1, 2])), (Ok(1), Ok(2)));
        assert_eq!(
            (shares.enter([1, 2]), shares.enter([3]), shares.enter([4])),
            (Err(PickError::Share), Ok(3), Err(PickError::Free))
        );
        load.store(2, Ordering::SeqCst);
        (0..3).for_each(|_| shares.settle());
        shares.leave(3);
        assert_eq!(shares.enter([1, 3]), Ok(3));
    }
}
