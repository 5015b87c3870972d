//! The bandwidth limit of one direction of a session: what it may read next, and what it has used.
//!
//! A direction that asks for little gets it at once, even while others wait: up to its share of each tick it goes
//! into the tenant's debt. One that asks for more takes what is there while none waits; else it joins the queue.

use std::sync::Arc;
use std::task::Waker;

use super::bandwidth_queue::{BandwidthQueue, WaiterKey};
use super::quota::Quota;
use crate::account::Direction;
use crate::clock::Moment;
use crate::clock::wheel::Tick;

/// The bandwidth state of one direction of a session.
#[derive(Debug, Default)]
pub struct DirectionLimiter {
    /// Its place in the queue, while it has one.
    key: Option<WaiterKey>,
    /// The tick of its last read, and the bytes that it has had in it.
    window: Tick,
    used: u32,
    /// Bytes that it has read and its sink does not take.
    held: u32,
}

/// The permission to read a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadGrant {
    /// As much as it likes.
    Free,
    /// As much as it likes, and it is counted what would have been.
    Watched,
    /// So many bytes, of the bucket.
    Taken(u64),
    /// So many bytes, of what it was granted in the queue.
    Queued(u64),
}

impl ReadGrant {
    /// The granted bytes.
    #[must_use]
    pub fn most(self) -> usize {
        match self {
            Self::Free | Self::Watched => usize::MAX,
            Self::Taken(bytes) | Self::Queued(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
        }
    }
}

/// The tenant's budget and this worker's queue for it.
#[derive(Debug)]
pub struct BandwidthContext<'a> {
    /// The tenant's.
    pub quota: &'a Arc<Quota>,
    /// The worker's.
    pub queue: &'a mut BandwidthQueue,
    /// Which of the two budgets.
    pub direction: Direction,
}

impl DirectionLimiter {
    /// Whether it is in the queue: it waits or uses its grant.
    #[must_use]
    pub fn has_joined(&self) -> bool {
        self.key.is_some()
    }

    /// Whether it waits.
    #[must_use]
    pub fn is_waiting(&self, queue: &BandwidthQueue) -> bool {
        self.key.as_ref().is_some_and(|key| queue.is_waiting(key))
    }

    /// Requests up to `want` bytes; `None` if it has to wait; `waker` is woken then. Call it only if there is
    /// something to read asks.
    pub fn request(
        &mut self,
        context: &mut BandwidthContext<'_>,
        want: u64,
        waker: &Waker,
        tick: Tick,
        now: Moment,
    ) -> Option<ReadGrant> {
        let budget = context.quota.budget(context.direction);
        if self.window != tick {
            (self.window, self.used) = (tick, 0);
        }
        if context.quota.is_observing() || !budget.is_limited() {
            self.leave(context.queue, now);
            return Some(if budget.is_limited() { ReadGrant::Watched } else { ReadGrant::Free });
        }
        if let Some(key) = &self.key {
            return context.queue.poll(key, waker, now).map(|granted| ReadGrant::Queued(granted.min(want)));
        }
        let mut taken = 0;
        if budget.waiters() == 0 {
            taken = budget.take(want, budget.least_useful(want), now);
        }
        let left = budget.share(context.quota.sessions() as u64).saturating_sub(self.used.into());
        if taken == 0 && left > 0 {
            taken = budget.overdraw(want.min(left), now);
        }
        if taken > 0 {
            return Some(ReadGrant::Taken(taken));
        }
        self.key = Some(context.queue.join(context.quota, context.direction, waker, now));
        None
    }

    /// Takes down that of a grant `count` bytes were read; whether they would have had to wait, were the limit in
    /// force.
    pub fn settle(
        &mut self,
        context: &mut BandwidthContext<'_>,
        grant: ReadGrant,
        count: u64,
        now: Moment,
    ) -> bool {
        let budget = context.quota.budget(context.direction);
        let used = self.used;
        self.used = used.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        match grant {
            ReadGrant::Free => {}
            ReadGrant::Watched => {
                let share = budget.share(context.quota.sessions() as u64);
                let waits = count > 0 && !budget.charge(count, now) && u64::from(self.used) > share;
                if waits {
                    budget.add_would_delay();
                }
                return waits;
            }
            ReadGrant::Taken(bytes) => budget.give_back(bytes.saturating_sub(count)),
            ReadGrant::Queued(_) => {
                if let Some(key) = &self.key {
                    context.queue.spend(key, count);
                }
            }
        }
        false
    }

    /// Leaves the queue, if it has joined.
    pub fn leave(&mut self, queue: &mut BandwidthQueue, now: Moment) {
        if let Some(key) = self.key.take() {
            queue.leave(key, now);
        }
    }

    /// Whether held bytes are recorded.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.held > 0
    }

    /// Records the bytes that it holds because its sink does not take them.
    pub fn hold(&mut self, quota: &Quota, direction: Direction, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if bytes != self.held {
            quota.budget(direction).hold(self.held, bytes);
            self.held = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{BandwidthLimit, LimitMode, TenantLimits};

    const WAY: Direction = Direction::ToBackend;

    /// What a read brings at most.
    const READ: u64 = 64 * 1024;

    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos((60_000 + ms) * 1_000_000)
    }

    fn tick(ms: u64) -> Tick {
        Tick::at(Duration::from_millis(ms))
    }

    struct Bench {
        quota: Arc<Quota>,
        queue: BandwidthQueue,
    }

    impl Bench {
        fn new(mode: LimitMode, limit: Option<BandwidthLimit>) -> Self {
            let quota = Arc::new(Quota::default());
            quota.set(&TenantLimits { mode, to_backend: limit, ..TenantLimits::default() }, at_ms(0));
            Self { quota, queue: BandwidthQueue::default() }
        }

        fn context(&mut self) -> BandwidthContext<'_> {
            BandwidthContext { quota: &self.quota, queue: &mut self.queue, direction: WAY }
        }

        fn ask(&mut self, limiter: &mut DirectionLimiter, ms: u64) -> Option<ReadGrant> {
            limiter.request(&mut self.context(), READ, Waker::noop(), tick(ms), at_ms(ms))
        }

        /// Asks and reads so much; whether it would have had to wait.
        fn read(&mut self, limiter: &mut DirectionLimiter, count: u64, ms: u64) -> bool {
            let grant = self.ask(limiter, ms).unwrap();
            assert!(grant.most() as u64 >= count, "{grant:?}");
            limiter.settle(&mut self.context(), grant, count, at_ms(ms))
        }
    }

    /// 200,000 bytes a second, of which a tenth at once: a tick's share is 10,000.
    const LIMIT: Option<BandwidthLimit> = Some(BandwidthLimit { bytes_per_second: 200_000, burst: 20_000 });

    #[test]
    fn session_without_a_limit_asks_for_no_grant() {
        let (mut bench, mut limiter) = (Bench::new(LimitMode::Enforce, None), DirectionLimiter::default());
        assert_eq!(bench.ask(&mut limiter, 0), Some(ReadGrant::Free));
        assert!(!bench.read(&mut limiter, READ, 0));
        assert_eq!(ReadGrant::Free.most(), usize::MAX);
    }

    #[test]
    fn greedy_session_gets_the_burst_then_its_share_then_waits() {
        let (mut bench, mut limiter) = (Bench::new(LimitMode::Enforce, LIMIT), DirectionLimiter::default());
        assert_eq!(bench.ask(&mut limiter, 0), Some(ReadGrant::Taken(20_000)));
        // It reads half, and finds the rest again.
        limiter.settle(&mut bench.context(), ReadGrant::Taken(20_000), 10_000, at_ms(0));
        assert_eq!(bench.ask(&mut limiter, 0), Some(ReadGrant::Taken(10_000)));
        limiter.settle(&mut bench.context(), ReadGrant::Taken(10_000), 10_000, at_ms(0));
        // The share of this tick is used up, too.
        assert_eq!(bench.ask(&mut limiter, 10), None);
        assert!(limiter.has_joined() && limiter.is_waiting(&bench.queue));
        bench.queue.advance(at_ms(50));
        assert!(!limiter.is_waiting(&bench.queue));
        assert_eq!(bench.ask(&mut limiter, 50), Some(ReadGrant::Queued(10_000)));
        limiter.settle(&mut bench.context(), ReadGrant::Queued(10_000), 4_000, at_ms(50));
        assert_eq!(bench.ask(&mut limiter, 51), Some(ReadGrant::Queued(6_000)));
        limiter.leave(&mut bench.queue, at_ms(51));
        assert!(!limiter.has_joined() && bench.queue.is_empty());
    }

    #[test]
    fn light_session_passes_waiting_ones_up_to_its_share() {
        let (mut bench, mut greedy, mut light) =
            (Bench::new(LimitMode::Enforce, LIMIT), DirectionLimiter::default(), DirectionLimiter::default());
        bench.read(&mut greedy, 20_000, 0);
        assert_eq!(bench.ask(&mut greedy, 0), None);
        for message in 0..9 {
            assert_eq!(bench.ask(&mut light, message), Some(ReadGrant::Taken(10_000 - message * 1_000)));
            let granted = ReadGrant::Taken(10_000 - message * 1_000);
            assert!(!light.settle(&mut bench.context(), granted, 1_000, at_ms(message)));
        }
        assert_eq!(bench.ask(&mut light, 49), Some(ReadGrant::Taken(1_000)));
        light.settle(&mut bench.context(), ReadGrant::Taken(1_000), 1_000, at_ms(49));
        assert_eq!(bench.ask(&mut light, 49), None, "more than its share waits in line");
        assert_eq!(bench.quota.budget(WAY).waiters(), 2);
        light.leave(&mut bench.queue, at_ms(49));
        assert_eq!(
            bench.ask(&mut light, 50),
            Some(ReadGrant::Taken(10_000)),
            "the next tick has a share of its own"
        );
        light.settle(&mut bench.context(), ReadGrant::Taken(10_000), 0, at_ms(50));
        greedy.leave(&mut bench.queue, at_ms(50));
        assert_eq!(bench.quota.budget(WAY).waiters(), 0);
    }

    #[test]
    fn observed_session_never_waits() {
        let (mut bench, mut limiter) = (Bench::new(LimitMode::Observe, LIMIT), DirectionLimiter::default());
        assert_eq!(bench.ask(&mut limiter, 0), Some(ReadGrant::Watched));
        assert!(!bench.read(&mut limiter, 20_000, 0));
        assert!(bench.read(&mut limiter, READ, 0), "the burst is used up");
        assert!(!bench.read(&mut limiter, 10_000, 50), "its share of another tick");
        assert!(bench.read(&mut limiter, 1, 50));
        assert!(!bench.read(&mut limiter, 0, 50), "an end costs nothing");
        assert_eq!(bench.quota.budget(WAY).would_delay(), 2);
    }

    #[test]
    fn waiters_continue_when_the_limit_is_removed() {
        let (mut bench, mut limiter) = (Bench::new(LimitMode::Enforce, LIMIT), DirectionLimiter::default());
        bench.read(&mut limiter, 20_000, 0);
        assert_eq!(bench.ask(&mut limiter, 0), None);
        bench.quota.set(&TenantLimits::default(), at_ms(1));
        assert_eq!(bench.ask(&mut limiter, 1), Some(ReadGrant::Free));
        assert!(!limiter.has_joined());
    }

    #[test]
    fn held_bytes_are_counted_once() {
        let (bench, mut limiter) = (Bench::new(LimitMode::Enforce, LIMIT), DirectionLimiter::default());
        for held in [0, 5, 5, 3] {
            limiter.hold(&bench.quota, WAY, held);
            assert_eq!((bench.quota.budget(WAY).held(), limiter.holds()), (held as u64, held > 0));
        }
        limiter.hold(&bench.quota, WAY, 0);
        assert_eq!(bench.quota.budget(WAY).held(), 0);
    }

    #[test]
    fn direction_limiter_is_small() {
        assert!(size_of::<DirectionLimiter>() <= 16);
    }
}
