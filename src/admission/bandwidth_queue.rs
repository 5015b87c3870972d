//! The sessions of one worker that wait for a tenant's bandwidth, served several times in each tick.
//!
//! Pure: time comes in as a [`Moment`], and a session is a [`Waker`]. A session joins when it is refused, and stays
//! for as long as it has something to read: while it waits, and while it uses what it was granted. For all that time
//! its part of the income is put aside, whatever its worker does.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;

use super::bandwidth::{BandwidthBudget, PARTS};
use super::quota::Quota;
use crate::account::Direction;
use crate::clock::Moment;

/// Identifies a waiter until it leaves. It is the number plus one, so that `Option` needs no extra byte.
#[derive(Debug, PartialEq, Eq)]
pub struct WaiterKey(NonZeroU32);

impl WaiterKey {
    const fn new(place: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(place))
    }

    const fn place(&self) -> u32 {
        self.0.get() - 1
    }
}

/// No waiter.
const NIL: u32 = u32::MAX;

/// Whose queue it is: the address of a quota, which the queue keeps alive, and the direction.
type Name = (usize, Direction);

/// One session and direction that waits or uses a grant.
#[derive(Debug)]
struct Waiter {
    name: Name,
    /// What is left of what it was granted.
    granted: u64,
    /// Since when it waits; `None` while it uses what it was granted.
    since: Option<Moment>,
    prev: u32,
    next: u32,
    waker: Waker,
}

/// The waiters of one budget on this worker.
#[derive(Debug)]
struct WaiterList {
    quota: Arc<Quota>,
    direction: Direction,
    /// The waiters.
    waiter_count: u64,
    /// Whose turn is next; they stand in a ring.
    first: u32,
    /// The total distributed to each waiter when this worker last looked.
    level: u64,
    /// What was dealt to this worker's sessions and is not granted yet, in parts of a byte.
    kept: u64,
}

/// One worker's queues.
#[derive(Debug, Default)]
pub struct BandwidthQueue {
    queues: HashMap<Name, WaiterList, foldhash::fast::RandomState>,
    waiters: Slab<Waiter>,
}

impl WaiterList {
    fn new(quota: &Arc<Quota>, direction: Direction) -> Self {
        Self { quota: Arc::clone(quota), direction, waiter_count: 0, first: NIL, level: 0, kept: 0 }
    }

    fn budget(&self) -> &BandwidthBudget {
        self.quota.budget(self.direction)
    }

    /// Collects what this worker's sessions have got since the last call.
    fn collect(&mut self, level: u64) {
        let dealt = level.wrapping_sub(self.level) & BandwidthBudget::LEVELS;
        self.kept += dealt * self.waiter_count;
        self.level = level;
    }

    /// Gives back what is kept beyond `most`.
    fn give_back(&mut self, most: u64) {
        let more = self.kept.saturating_sub(most) / PARTS;
        self.kept -= more * PARTS;
        self.budget().give_back(more);
    }
}

impl BandwidthQueue {
    /// Whether no session and direction has joined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Adds a session's direction to the end of a budget's queue.
    pub fn join(
        &mut self,
        quota: &Arc<Quota>,
        direction: Direction,
        waker: &Waker,
        now: Moment,
    ) -> WaiterKey {
        let name = (Arc::as_ptr(quota).addr(), direction);
        let waiter =
            Waiter { name, granted: 0, since: Some(now), prev: NIL, next: NIL, waker: waker.clone() };
        let number = u32::try_from(self.waiters.insert(waiter)).unwrap_or(NIL);
        let queue = self.queues.entry(name).or_insert_with(|| WaiterList::new(quota, direction));
        let level = queue.budget().join();
        queue.collect(level);
        queue.waiter_count += 1;
        let first = queue.first;
        if first == NIL {
            queue.first = number;
        }
        self.link(number, first);
        WaiterKey::new(number)
    }

    /// How much the direction may still read; `None` while it waits, and `waker` is woken later.
    pub fn poll(&mut self, key: &WaiterKey, waker: &Waker, now: Moment) -> Option<u64> {
        let waiter = self.waiters.get_mut(key.place() as usize)?;
        if waiter.granted > 0 {
            return Some(waiter.granted);
        }
        waiter.waker.clone_from(waker);
        waiter.since.get_or_insert(now);
        None
    }

    /// Records the used part of a grant.
    pub fn spend(&mut self, key: &WaiterKey, bytes: u64) {
        if let Some(waiter) = self.waiters.get_mut(key.place() as usize) {
            waiter.granted = waiter.granted.saturating_sub(bytes);
        }
    }

    /// Whether the direction waits without a grant.
    #[must_use]
    pub fn is_waiting(&self, key: &WaiterKey) -> bool {
        self.waiters.get(key.place() as usize).is_some_and(|waiter| waiter.since.is_some())
    }

    /// Removes the direction from the queue, and returns the rest of its grant.
    #[expect(clippy::needless_pass_by_value, reason = "a key ends with its place")]
    pub fn leave(&mut self, key: WaiterKey, now: Moment) {
        let number = key.place();
        let next = self.unlink(number);
        let Some(waiter) = self.waiters.try_remove(number as usize) else { return };
        let Waiter { name, granted, since, .. } = waiter;
        let delay = since.map_or(Duration::ZERO, |since| now.since(since));
        if let Some(queue) = self.queues.get_mut(&name) {
            let level = queue.budget().leave();
            queue.collect(level);
            queue.waiter_count -= 1;
            if queue.first == number {
                queue.first = next;
            }
            queue.budget().give_back(granted);
            queue.budget().add_delay(delay);
            if queue.waiter_count == 0 {
                queue.give_back(0);
                self.queues.remove(&name);
            }
        }
        if self.waiters.is_empty() {
            // Frees the memory of a past burst of waiters.
            *self = Self::default();
        }
    }

    /// Grants what has come in by `now` to the waiters, and wakes them.
    ///
    /// All waiters get equal parts, in the order in which they joined. Where that would be too little to be
    /// worth a read, the first get enough, and the others keep their turn.
    pub fn advance(&mut self, now: Moment) {
        let Self { queues, waiters } = self;
        for queue in queues.values_mut() {
            let level = queue.budget().distribute(now);
            queue.collect(level);
            let is_over = queue.quota.is_observing() || !queue.budget().is_limited();
            // Waiters that still use their last grant keep their part.
            let part = queue.kept.checked_div(queue.waiter_count).unwrap_or(0) / PARTS;
            let each = part.max(queue.budget().least_grant());
            let mut delay = Duration::ZERO;
            for _ in 0..queue.waiter_count {
                let Some(waiter) = waiters.get_mut(queue.first as usize) else { break };
                if !is_over && queue.kept < each * PARTS {
                    break;
                }
                queue.first = waiter.next;
                let Some(since) = waiter.since.take() else { continue };
                delay += now.since(since);
                if !is_over {
                    queue.kept -= each * PARTS;
                    waiter.granted = each;
                }
                waiter.waker.wake_by_ref();
            }
            if !delay.is_zero() {
                queue.budget().add_delay(delay);
            }
            queue.give_back(queue.budget().most_kept());
        }
    }

    /// The time until about so many bytes have come in for the waiters here, over all budgets.
    #[must_use]
    pub fn span_of(&self, bytes: u64) -> Duration {
        let rate: u64 = self
            .queues
            .values()
            .map(|queue| queue.budget().rate_of(queue.waiter_count))
            .fold(0, u64::saturating_add);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Links a new waiter in, as the last of its queue.
    fn link(&mut self, number: u32, first: u32) {
        let last = self.waiters.get(first as usize).map_or(number, |waiter| waiter.prev);
        let next = if last == number { number } else { first };
        if let Some(waiter) = self.waiters.get_mut(number as usize) {
            (waiter.prev, waiter.next) = (last, next);
        }
        if let Some(waiter) = self.waiters.get_mut(last as usize) {
            waiter.next = number;
        }
        if let Some(waiter) = self.waiters.get_mut(next as usize) {
            waiter.prev = number;
        }
    }

    /// Removes a waiter from its ring; returns the next one, if any.
    fn unlink(&mut self, number: u32) -> u32 {
        let Some(waiter) = self.waiters.get(number as usize) else { return NIL };
        let (prev, next) = (waiter.prev, waiter.next);
        if let Some(before) = self.waiters.get_mut(prev as usize) {
            before.next = next;
        }
        if let Some(after) = self.waiters.get_mut(next as usize) {
            after.prev = prev;
        }
        if next == number { NIL } else { next }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::task::Wake;

    use super::super::bandwidth::QUANTUM;
    use super::*;
    use crate::config::{BandwidthLimit, LimitMode, TenantLimits};

    const WAY: Direction = Direction::ToClient;

    #[derive(Default)]
    struct Count(AtomicU64);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos((60_000 + ms) * 1_000_000)
    }

    /// A quota whose bucket is empty at 0 ms.
    fn quota(bytes_per_second: u64) -> Arc<Quota> {
        let quota = Arc::new(Quota::default());
        quota.budget(WAY).set(Some(BandwidthLimit { bytes_per_second, burst: 1 }), at_ms(0));
        quota.budget(WAY).take(u64::MAX >> 32, 1, at_ms(0));
        quota
    }

    fn poll(queue: &mut BandwidthQueue, key: &WaiterKey, ms: u64) -> Option<u64> {
        queue.poll(key, Waker::noop(), at_ms(ms))
    }

    #[test]
    fn waiters_are_woken_at_a_tick_with_the_incoming_bandwidth() {
        let (quota, mut queue, count) =
            (quota(1_000_000), BandwidthQueue::default(), Arc::new(Count::default()));
        let waker = Waker::from(Arc::clone(&count));
        let key = queue.join(&quota, WAY, &waker, at_ms(10));
        assert!(queue.is_waiting(&key));
        assert_eq!(queue.poll(&key, &waker, at_ms(20)), None);
        queue.advance(at_ms(50));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(quota.budget(WAY).delayed(), Duration::from_millis(40));
        assert!(!queue.is_waiting(&key));
        assert_eq!(poll(&mut queue, &key, 51), Some(50_000));
        queue.spend(&key, 20_000);
        assert_eq!(poll(&mut queue, &key, 52), Some(30_000));
        // While it does, it is not served again.
        queue.advance(at_ms(100));
        assert_eq!((count.0.load(Ordering::Relaxed), poll(&mut queue, &key, 100)), (1, Some(30_000)));
        queue.spend(&key, 30_000);
        assert_eq!(queue.poll(&key, &waker, at_ms(110)), None);
        queue.advance(at_ms(150));
        assert_eq!(poll(&mut queue, &key, 150), Some(100_000), "what came in meanwhile was put aside");
        queue.spend(&key, 1);
        queue.leave(key, at_ms(150));
        assert!(queue.is_empty() && queue.queues.is_empty() && quota.budget(WAY).waiters() == 0);
        assert_eq!(quota.budget(WAY).take(u64::MAX >> 32, 1, at_ms(150)), 99_999, "the rest came back");
        assert_eq!(Arc::strong_count(&quota), 1);
    }

    #[test]
    fn scarce_bandwidth_is_granted_in_order_in_useful_parts() {
        let (quota, mut queue) = (quota(800_000), BandwidthQueue::default());
        let keys: Vec<_> = (0..5).map(|_| queue.join(&quota, WAY, Waker::noop(), at_ms(0))).collect();
        let mut served = vec![0; keys.len()];
        for tick in 1..=10 {
            // 40,000 bytes, of which one gets 32 KiB; at times there is enough for a second.
            queue.advance(at_ms(tick * 50));
            // In which order they come back does not matter.
            for (key, sum) in keys.iter().zip(&mut served).rev() {
                if let Some(granted) = poll(&mut queue, key, tick * 50) {
                    assert_eq!(granted, QUANTUM);
                    *sum += granted;
                    queue.spend(key, granted);
                    assert_eq!(poll(&mut queue, key, tick * 50), None);
                }
            }
            let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
            assert!(most - least <= QUANTUM, "{served:?}");
        }
        assert_eq!(served.iter().sum::<u64>() / QUANTUM, 400_000 / QUANTUM);
    }

    #[test]
    fn left_waiter_does_not_block_the_queue() {
        let (quota, mut queue) = (quota(800_000), BandwidthQueue::default());
        let mut keys: Vec<_> =
            (0..6).map(|_| Some(queue.join(&quota, WAY, Waker::noop(), at_ms(0)))).collect();
        // The first, one in the middle, and the last.
        for gone in [0, 2, 5] {
            queue.leave(keys[gone].take().unwrap(), at_ms(10));
        }
        assert_eq!((queue.waiters.len(), quota.budget(WAY).waiters()), (3, 3));
        assert_eq!(quota.budget(WAY).delayed(), Duration::from_millis(30), "three times 10 ms");
        let again = queue.join(&quota, WAY, Waker::noop(), at_ms(10));
        let order = [keys[1].take().unwrap(), keys[3].take().unwrap(), keys[4].take().unwrap(), again];
        for (turn, key) in order.iter().enumerate() {
            queue.advance(at_ms(50 * (turn as u64 + 1)));
            for (place, other) in order.iter().enumerate() {
                assert_eq!(queue.is_waiting(other), place > turn, "{place} after {turn}");
            }
            assert_eq!(poll(&mut queue, key, 0), Some(QUANTUM));
        }
        for key in order {
            queue.leave(key, at_ms(300));
        }
        assert_eq!(queue.waiters.capacity(), 0, "a flood's memory goes back");
    }

    #[test]
    fn removed_limit_releases_all_waiters() {
        let (quota, mut queue) = (quota(1000), BandwidthQueue::default());
        let keys = [0, 1].map(|_| queue.join(&quota, WAY, Waker::noop(), at_ms(0)));
        quota.budget(WAY).set(None, at_ms(1));
        queue.advance(at_ms(1));
        assert!(keys.iter().all(|key| !queue.is_waiting(key)));
        let limit = Some(BandwidthLimit { bytes_per_second: 1000, burst: 1 });
        quota.set(&TenantLimits { to_client: limit, ..TenantLimits::default() }, at_ms(1));
        for key in &keys {
            assert_eq!(poll(&mut queue, key, 1), None, "it had come back in time for the next limit");
        }
        queue.advance(at_ms(2));
        assert!(keys.iter().all(|key| queue.is_waiting(key)));
        quota.set(
            &TenantLimits { to_client: limit, mode: LimitMode::Observe, ..TenantLimits::default() },
            at_ms(2),
        );
        queue.advance(at_ms(3));
        assert!(keys.iter().all(|key| !queue.is_waiting(key)));
        for key in keys {
            queue.leave(key, at_ms(3));
        }
        assert_eq!(quota.budget(WAY).waiters(), 0);
    }

    #[test]
    fn tenants_and_directions_have_independent_queues() {
        let (one, two, mut queue) = (quota(1_000_000), quota(2_000_000), BandwidthQueue::default());
        let other_way = Direction::ToBackend;
        one.budget(other_way).set(Some(BandwidthLimit { bytes_per_second: 4_000_000, burst: 1 }), at_ms(0));
        one.budget(other_way).take(u64::MAX >> 32, 1, at_ms(0));
        let keys = [(&one, WAY), (&two, WAY), (&one, other_way)]
            .map(|(quota, way)| queue.join(quota, way, Waker::noop(), at_ms(0)));
        // 2 of the 7 MB/s belong to a session on another worker.
        let mut elsewhere = BandwidthQueue::default();
        let away = elsewhere.join(&one, other_way, Waker::noop(), at_ms(0));
        assert_eq!([&queue, &elsewhere].map(|queue| queue.span_of(10_000).as_millis()), [2, 5]);
        elsewhere.leave(away, at_ms(0));
        assert_eq!(elsewhere.span_of(1), Duration::from_secs(1), "no bandwidth comes in without waiters");
        one.budget(other_way).set(None, at_ms(0));
        assert_eq!(queue.span_of(3_000), Duration::from_millis(1), "a limit that has gone does not count");
        one.budget(other_way).set(Some(BandwidthLimit { bytes_per_second: 4_000_000, burst: 1 }), at_ms(0));
        queue.advance(at_ms(50));
        let granted = [0, 1, 2].map(|place: usize| poll(&mut queue, &keys[place], 50));
        assert_eq!(granted, [Some(50_000), Some(100_000), Some(200_000)]);
        for key in keys {
            queue.leave(key, at_ms(50));
        }
    }

    #[test]
    fn threads_share_a_budget_to_the_byte() {
        const RATE: u64 = 10_000_000;
        let (quota, clock) = (quota(RATE), AtomicU64::new(0));
        let work = |sessions: usize| {
            let mut queue = BandwidthQueue::default();
            let mut keys: Vec<_> = (0..sessions).map(|_| None).collect();
            let mut used = 0;
            for round in 0..3000_usize {
                let ms = clock.fetch_add(1, Ordering::Relaxed);
                queue.advance(at_ms(ms));
                for key in &mut keys {
                    let key = key.get_or_insert_with(|| queue.join(&quota, WAY, Waker::noop(), at_ms(ms)));
                    if let Some(granted) = queue.poll(key, Waker::noop(), at_ms(ms)) {
                        queue.spend(key, granted);
                        used += granted;
                    }
                }
                // Sessions leave now and then, and join again.
                if let Some(key) = keys.get_mut(round % 7).and_then(Option::take) {
                    queue.leave(key, at_ms(ms));
                }
            }
            for key in keys.into_iter().flatten() {
                queue.leave(key, at_ms(clock.load(Ordering::Relaxed)));
            }
            used
        };
        let used: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> =
                [3, 9].map(|sessions| scope.spawn(move || work(sessions))).into_iter().collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        let came = RATE / 1000 * clock.load(Ordering::Relaxed);
        assert!(used <= came, "{used} of {came}");
        let left = quota.budget(WAY).take(u64::MAX >> 32, 1, at_ms(clock.load(Ordering::Relaxed)));
        // Rounding costs a byte at each take and each return.
        assert!(used + left.max(RATE / 10) + 20_000 >= came, "{used} and {left} of {came}");
        assert_eq!(quota.budget(WAY).waiters(), 0);
    }
}
