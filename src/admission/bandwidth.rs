//! A bandwidth of one tenant in one direction, shared by all its sessions on all workers: a bucket of bytes that may
//! go into a bounded debt, and the sessions that wait for it.
//!
//! The bucket is a generic cell rate algorithm over bytes on one atomic number, the moment up to which everything
//! that was taken has been paid for. A waiter gets an equal part of all that comes in while it waits: the first
//! worker to look distributes it to all waiters, and each worker grants its sessions their part at its own tick.
//! So it does not matter when the workers' ticks come, nor how many of the sessions each of them has.

use std::time::Duration;

use crate::atomic::{AtomicU64, Ordering};
use crate::clock::Moment;
use crate::clock::wheel::Tick;
use crate::config::BandwidthLimit;

/// Time is counted in parts of a nanosecond: at 10 GB/s a byte takes a tenth of one.
const FINE: u64 = 64;

/// A second in those parts.
const SECOND: u128 = 1_000_000_000 * FINE as u128;

/// However small the burst: what comes in during two ticks is kept. A new waiter is served at the next tick, and a
/// smaller bucket would run over in between.
const KEPT: u64 = 2 * fine(Tick::SPAN);

/// While sessions wait, so much is kept: a worker that is late for its tick still finds what came in.
const LATE: u64 = 10 * fine(Tick::SPAN);

/// How far light sessions may go into debt, beyond the burst.
const DEBT: u64 = 2 * fine(Tick::SPAN);

/// How far bytes that have come already may; then they are free.
const MOST_DEBT: u64 = 20 * fine(Tick::SPAN);

/// The bounds of what a session may have in each tick without waiting: a message, and not more than one read.
const LEAST_SHARE: u64 = 1024;
const MOST_SHARE: u64 = 64 * 1024;

/// The least grant, as far as the burst allows: small reads cost as much as large ones, which are spliced from here on.
pub const QUANTUM: u64 = 32 * 1024;

/// A session whose part is less than that in half a second reads less, down to [`LEAST_TURN`], at the same interval:
/// shares are equal over seconds then, not only over minutes, for two reads a second of each.
const TURNS_A_SECOND: u64 = 2;

/// However many share a small rate: a page is the least that is worth a read.
const LEAST_TURN: u64 = 4096;

/// The low bits of `waiters` count them. The high bits are the total distributed to each, in sixteenths of a byte.
const HEADS: u32 = 24;

/// Distribution counts in parts of a byte, so that many waiters get parts of a small rate too.
pub const PARTS: u64 = 16;

/// A bandwidth limit, or none. It can be changed at any time.
#[derive(Debug, Default)]
pub struct BandwidthBudget {
    /// Up to when everything that was taken has been paid for.
    due: AtomicU64,
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
    /// How far `due` may lie ahead: the burst, as time.
    tolerance: AtomicU64,
    /// How many wait, on all workers, and what each of them has been dealt since ever.
    waiters: AtomicU64,
    delayed: AtomicU64,
    would_delay: AtomicU64,
    held: AtomicU64,
}

/// Spans here are of seconds at most.
#[expect(clippy::cast_possible_truncation, reason = "a second is far from the end of it")]
const fn fine(span: Duration) -> u64 {
    span.as_nanos() as u64 * FINE
}

fn at(now: Moment) -> u64 {
    now.as_nanos().saturating_mul(FINE)
}

/// The present rate and burst of a limit.
#[derive(Clone, Copy)]
struct BucketTerms {
    rate: u128,
    tolerance: u64,
}

impl BucketTerms {
    /// How long so many bytes take, rounded up: rounding never adds bandwidth.
    fn span(self, bytes: u64) -> u64 {
        u64::try_from((u128::from(bytes) * SECOND).div_ceil(self.rate)).unwrap_or(u64::MAX)
    }

    /// The whole bytes that come in during this time.
    fn bytes(self, span: u64) -> u64 {
        u64::try_from(u128::from(span).saturating_mul(self.rate) / SECOND).unwrap_or(u64::MAX)
    }
}

impl BandwidthBudget {
    /// What each has been dealt comes round after so many parts.
    pub(super) const LEVELS: u64 = u64::MAX >> HEADS;

    /// Sets or removes the limit. The bytes taken so far stay counted, and no more than all of the new burst: what is
    /// owed is kept as time, and a slow rate's seconds are a moment of a fast one.
    pub fn set(&self, limit: Option<BandwidthLimit>, now: Moment) {
        let Some(limit) = limit else { return self.rate.store(0, Ordering::Relaxed) };
        let rate = limit.bytes_per_second.max(1);
        let burst = BucketTerms { rate: u128::from(rate), tolerance: 0 }.span(limit.burst).max(KEPT);
        let tolerance = self.tolerance.swap(burst, Ordering::Relaxed);
        let before = self.rate.swap(rate, Ordering::Relaxed);
        if (before, tolerance) != (rate, burst) {
            self.rescale(before, rate, burst, now);
        }
    }

    /// Converts the debt from the old rate to the new one.
    fn rescale(&self, before: u64, rate: u64, burst: u64, now: Moment) {
        let now = at(now);
        let convert = |due: u64| {
            let ahead = u128::from(due.saturating_sub(now));
            // If there was no limit before, the rate of the debt is unknown.
            let owed = if before == 0 { ahead } else { ahead * u128::from(before) / u128::from(rate) };
            Some(now.saturating_add(u64::try_from(owed).unwrap_or(u64::MAX).min(burst))).filter(|_| ahead > 0)
        };
        // An error means that nothing is owed, so nothing changes.
        self.due.fetch_update(Ordering::AcqRel, Ordering::Acquire, convert).unwrap_or_default();
    }

    /// Whether there is a limit.
    #[inline]
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) != 0
    }

    fn terms(&self) -> Option<BucketTerms> {
        let rate = self.rate.load(Ordering::Relaxed);
        let tolerance = self.tolerance.load(Ordering::Relaxed);
        (rate != 0).then_some(BucketTerms { rate: rate.into(), tolerance })
    }

    /// Takes up to `want` bytes; none at all where there are fewer than `least`.
    pub fn take(&self, want: u64, least: u64, now: Moment) -> u64 {
        let Some(terms) = self.terms() else { return want };
        let now = at(now);
        self.spend(want, least, terms, now, now.saturating_add(terms.tolerance))
    }

    /// Takes all of `bytes`, or nothing; whether it did. Where others wait, all that comes in is theirs: then it may go as
    /// far into debt as light sessions. More than the burst is taken if the bucket was full.
    pub fn take_whole(&self, bytes: u64, now: Moment) -> bool {
        let Some(terms) = self.terms() else { return true };
        let now = at(now);
        let room = if self.waiters() > 0 { terms.tolerance + DEBT } else { terms.tolerance };
        let end = now.saturating_add(room.max(terms.span(bytes)));
        bytes == 0 || self.spend(bytes, bytes, terms, now, end) == bytes
    }

    /// Takes up to `want` bytes in advance, within the bounded debt.
    pub fn overdraw(&self, want: u64, now: Moment) -> u64 {
        let Some(terms) = self.terms() else { return want };
        let now = at(now);
        self.spend(want, 1, terms, now, now.saturating_add(terms.tolerance + DEBT))
    }

    /// Takes up to `want` bytes such that `due` stays within `end`; nothing was kept that came in before `start`.
    fn spend(&self, want: u64, least: u64, terms: BucketTerms, start: u64, end: u64) -> u64 {
        let mut taken = 0;
        let pay = |due: u64| {
            let due = due.max(start);
            taken = terms.bytes(end.saturating_sub(due)).min(want);
            (taken >= least.max(1)).then(|| due.saturating_add(terms.span(taken)))
        };
        match self.due.fetch_update(Ordering::AcqRel, Ordering::Acquire, pay) {
            Ok(_) => taken,
            Err(_) => 0,
        }
    }

    /// Returns unused bytes.
    pub fn give_back(&self, bytes: u64) {
        let Some(terms) = self.terms().filter(|_| bytes > 0) else { return };
        let span = u64::try_from(u128::from(bytes) * SECOND / terms.rate).unwrap_or(u64::MAX);
        let pay_back = |due: u64| Some(due.saturating_sub(span));
        // The update cannot fail: the closure never returns `None`.
        self.due.fetch_update(Ordering::AcqRel, Ordering::Acquire, pay_back).unwrap_or_default();
    }

    /// Charges bytes that have arrived already; returns whether there was enough.
    pub fn charge(&self, bytes: u64, now: Moment) -> bool {
        let Some(terms) = self.terms() else { return true };
        let now = at(now);
        let end = now.saturating_add(terms.tolerance);
        let mut within = true;
        let pay = |due: u64| {
            let paid = due.max(now).saturating_add(terms.span(bytes));
            within = paid <= end;
            Some(paid.min(end.saturating_add(MOST_DEBT)).max(due))
        };
        // The update cannot fail: the closure never returns `None`.
        self.due.fetch_update(Ordering::AcqRel, Ordering::Acquire, pay).is_ok() && within
    }

    /// What a session may have in each tick without waiting, where `sessions` are open: all of them together have
    /// the rate.
    #[must_use]
    pub fn share(&self, sessions: u64) -> u64 {
        let Some(terms) = self.terms() else { return u64::MAX };
        let share = terms.bytes(fine(Tick::SPAN)) / sessions.max(1);
        share.clamp(LEAST_SHARE, MOST_SHARE)
    }

    /// The least grant to a waiter, in bytes.
    pub(super) fn least_grant(&self) -> u64 {
        let part = self.rate_of(1) / TURNS_A_SECOND;
        self.least_useful(part.clamp(LEAST_TURN, QUANTUM)).max(1)
    }

    /// The least useful read: `want`, or half of the burst if that is less.
    #[must_use]
    pub fn least_useful(&self, want: u64) -> u64 {
        self.terms().map_or(0, |terms| terms.bytes(terms.tolerance / 2).min(want))
    }

    /// The part of the rate, in bytes per second, of so many waiters; 0 without a limit.
    pub(super) fn rate_of(&self, heads: u64) -> u64 {
        let part = u128::from(self.rate.load(Ordering::Relaxed)) * u128::from(heads)
            / u128::from(self.waiters().max(1));
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// Sessions and directions that wait or use their grant.
    #[must_use]
    pub fn waiters(&self) -> u64 {
        waiter_count(self.waiters.load(Ordering::Acquire))
    }

    /// Adds a waiter; returns the total that each has got before.
    pub fn join(&self) -> u64 {
        self.waiters.fetch_add(1, Ordering::AcqRel) >> HEADS
    }

    /// Removes a waiter; returns the total that each has got by now.
    pub fn leave(&self) -> u64 {
        self.waiters.fetch_sub(1, Ordering::AcqRel) >> HEADS
    }

    /// Distributes what has come in to the waiters; returns the total that each has got by now.
    pub fn distribute(&self, now: Moment) -> u64 {
        let Some(terms) = self.terms() else { return self.waiters.load(Ordering::Acquire) >> HEADS };
        let now = at(now);
        let start = now.saturating_sub(LATE.saturating_sub(terms.tolerance));
        let income = self.spend(Self::LEVELS / PARTS, 1, terms, start, now.saturating_add(terms.tolerance));
        let mut dealt = 0;
        let mut level = 0;
        let each = |crowd: u64| {
            let heads = waiter_count(crowd);
            // One atomic holds the level and the number of waiters: a join or leave is before or after this, never
            // between.
            let part = (income * PARTS).checked_div(heads).unwrap_or(0);
            dealt = (part * heads).div_ceil(PARTS);
            let next = crowd.wrapping_add(part << HEADS);
            level = next >> HEADS;
            Some(next)
        };
        self.waiters.fetch_update(Ordering::AcqRel, Ordering::Acquire, each).unwrap_or_default();
        self.give_back(income.saturating_sub(dealt));
        level
    }

    /// The parts of a byte that a worker may keep for those of its sessions that wait; what is more goes back.
    pub(super) fn most_kept(&self) -> u64 {
        self.terms().map_or(0, |terms| terms.bytes(LATE.max(terms.tolerance)).saturating_mul(PARTS))
    }

    /// Adds the time that a session waited.
    pub fn add_delay(&self, span: Duration) {
        self.delayed.fetch_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The summed waiting time of all sessions.
    #[must_use]
    pub fn delayed(&self) -> Duration {
        Duration::from_nanos(self.delayed.load(Ordering::Relaxed))
    }

    /// Counts a read that would have waited in enforce mode.
    pub fn add_would_delay(&self) {
        self.would_delay.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads that would have waited in enforce mode.
    #[must_use]
    pub fn would_delay(&self) -> u64 {
        self.would_delay.load(Ordering::Relaxed)
    }

    /// Takes down that a session which held `before` bytes that its other end does not take holds `now`.
    pub fn hold(&self, before: u32, now: u32) {
        self.held.fetch_add(u64::from(now).wrapping_sub(before.into()), Ordering::Relaxed);
    }

    /// The bytes that sessions hold because their sinks do not take them.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }
}

fn waiter_count(crowd: u64) -> u64 {
    crowd & ((1 << HEADS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not at the clock's start, where nothing can have been kept.
    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos((60_000 + ms) * 1_000_000)
    }

    fn budget(bytes_per_second: u64, burst: u64) -> BandwidthBudget {
        let budget = BandwidthBudget::default();
        budget.set(Some(BandwidthLimit { bytes_per_second, burst }), at_ms(0));
        budget
    }

    const ALL: u64 = u64::MAX >> 32;

    #[test]
    fn without_a_limit_everything_is_granted_and_nothing_counted() {
        let budget = BandwidthBudget::default();
        assert!(!budget.is_limited());
        assert_eq!((budget.take(7, 7, at_ms(0)), budget.overdraw(7, at_ms(0))), (7, 7));
        assert!(budget.charge(ALL, at_ms(0)));
        budget.give_back(7);
        assert_eq!((budget.share(3), budget.least_useful(7), budget.most_kept()), (u64::MAX, 0, 0));
        budget.set(Some(BandwidthLimit { bytes_per_second: 1000, burst: 200 }), at_ms(0));
        assert_eq!(budget.take(ALL, 1, at_ms(0)), 200, "nothing had been taken");
        budget.set(None, at_ms(0));
        assert_eq!(budget.take(7, 7, at_ms(0)), 7);
    }

    #[test]
    fn bucket_grants_exactly_its_burst() {
        let budget = budget(1000, 500);
        assert_eq!(budget.take(499, 1, at_ms(0)), 499);
        assert_eq!(budget.take(2, 2, at_ms(0)), 0, "half of it would be worth nothing");
        assert_eq!(budget.take(2, 1, at_ms(0)), 1);
        assert_eq!(budget.take(1, 1, at_ms(0)), 0);
        assert_eq!(budget.take(2, 1, at_ms(1)), 1, "a byte in a millisecond");
        budget.give_back(1);
        assert_eq!(budget.take(2, 1, at_ms(1)), 1);
        assert_eq!(budget.take(ALL, 1, at_ms(400)), 399);
        assert_eq!(budget.take(ALL, 1, at_ms(10_000)), 500, "more is not kept");
    }

    #[test]
    fn minimum_burst_is_two_ticks_of_the_rate() {
        assert_eq!(budget(1000, 1).take(ALL, 1, at_ms(0)), 100);
        assert_eq!(budget(1000, 100).take(ALL, 1, at_ms(0)), 100);
        assert_eq!(budget(1000, 101).take(ALL, 1, at_ms(0)), 101);
        assert_eq!(budget(1000, 101).least_useful(64), 50);
        assert_eq!(budget(1000, 101).least_useful(49), 49);
    }

    #[test]
    fn highest_and_lowest_rates_are_exact() {
        let fast = budget(u64::MAX, u64::MAX);
        assert!(fast.take(ALL, 1, at_ms(0)) == ALL && fast.charge(u64::MAX / 2, at_ms(0)));
        for rate in [3, 999_999_937, 25_000_000_000] {
            let budget = budget(rate, rate);
            assert_eq!(budget.take(ALL * 16, 1, at_ms(0)), rate);
            let in_small_pieces: u64 = (1..=2000).map(|half| budget.take(ALL, 1, at_ms(half * 5))).sum();
            assert!(in_small_pieces <= 10 * rate && in_small_pieces + 2000 >= 10 * rate, "{in_small_pieces}");
        }
    }

    #[test]
    fn debt_is_bounded_and_paid_first() {
        let budget = budget(1000, 500);
        assert_eq!(budget.overdraw(ALL, at_ms(0)), 600);
        assert_eq!(budget.overdraw(1, at_ms(0)), 0);
        assert_eq!(budget.take(1, 1, at_ms(100)), 0);
        assert_eq!(budget.take(1, 1, at_ms(101)), 1);
        // What has come already is charged beyond that, and in the end for nothing.
        assert!(!budget.charge(5000, at_ms(101)));
        assert_eq!(budget.take(ALL, 1, at_ms(101 + 1000)), 0);
        assert_eq!(budget.take(ALL, 1, at_ms(101 + 1002)), 2);
        assert!(budget.charge(10, at_ms(3000)));
    }

    #[test]
    fn debt_of_a_slow_rate_does_not_stall_a_raised_one() {
        let budget = budget(1_000, 1_000);
        assert!(!budget.charge(50_000, at_ms(0)));
        assert_eq!(budget.take(ALL, 1, at_ms(1_000)), 0, "a second of debt beyond the burst");
        let raised = Some(BandwidthLimit { bytes_per_second: 1_000_000, burst: 1_000_000 });
        budget.set(raised, at_ms(1_000));
        assert_eq!(budget.take(ALL, 1, at_ms(1_000)), 999_000, "1,000 bytes are owed");
        budget.set(raised, at_ms(1_000));
        assert_eq!(budget.take(ALL, 1, at_ms(1_000)), 0, "the same limit once more gives nothing");
        budget.set(Some(BandwidthLimit { bytes_per_second: 1_000, burst: 500 }), at_ms(1_000));
        assert_eq!(budget.take(ALL, 1, at_ms(1_000)), 0, "what was taken stays taken");
        assert_eq!(budget.take(ALL, 1, at_ms(1_500)), 500, "but no more than all of the new burst");
        budget.set(None, at_ms(1_500));
        budget.set(raised, at_ms(1_500));
        assert_eq!(budget.take(ALL, 1, at_ms(1_500)), 500_000, "half a second of a rate that is not known");
    }

    #[test]
    fn shares_add_up_to_the_rate_within_their_bounds() {
        let budget = budget(2_000_000, 1);
        assert_eq!(
            [0, 1, 2, 50, 100, 1000].map(|sessions| budget.share(sessions)),
            [65_536, 65_536, 50_000, 2_000, 1_024, 1_024]
        );
    }

    #[test]
    fn least_grant_is_half_a_second_of_the_share_between_a_page_and_a_read() {
        let turn = |heads: u64, rate: u64, burst: u64| {
            let budget = budget(rate, burst);
            (0..heads).for_each(|_| _ = budget.join());
            budget.least_grant()
        };
        let slow = |heads| turn(heads, 1_000_000, 1_000_000);
        assert_eq!(
            [1, 15, 16, 50, 122, 123, 5000].map(slow),
            [QUANTUM, QUANTUM, 31_250, 10_000, 4_098, 4_096, 4_096]
        );
        assert_eq!(turn(0, 1_000_000, 1_000_000), QUANTUM, "no session waits any more");
        assert_eq!((turn(1, 100_000, 1), turn(50, 60_000, 1)), (5_000, 3_000), "half of a small burst");
        assert_eq!((turn(1, 10, 1), turn(1, 1, 1), BandwidthBudget::default().least_grant()), (1, 1, 1));
    }

    #[test]
    fn incoming_bandwidth_is_distributed_to_all_waiters() {
        let budget = budget(16_000, 1600);
        assert_eq!(budget.take(ALL, 1, at_ms(0)), 1600);
        assert_eq!((budget.join(), budget.waiters()), (0, 1));
        assert_eq!(budget.distribute(at_ms(1)), 16 * PARTS);
        assert_eq!(budget.join(), 16 * PARTS);
        assert_eq!(budget.distribute(at_ms(2)), (16 + 8) * PARTS);
        assert_eq!(budget.distribute(at_ms(2)), (16 + 8) * PARTS, "nothing has come in");
        assert_eq!(budget.join(), 24 * PARTS);
        // 15 bytes in parts: 80 to each of three. What cannot be dealt stays.
        assert_eq!(budget.distribute(at_ms(3)), 24 * PARTS + 16 * PARTS / 3);
        for left in [2, 1, 0] {
            budget.leave();
            assert_eq!(budget.waiters(), left);
        }
        budget.distribute(at_ms(4));
        assert_eq!(budget.take(ALL, 1, at_ms(4)), 16, "without waiters it stays in the bucket");
    }

    #[test]
    fn late_tick_grants_all_that_came_in() {
        let budget = budget(1000, 1);
        assert_eq!(budget.take(ALL, 1, at_ms(0)), 100);
        budget.join();
        assert_eq!(budget.distribute(at_ms(499)), 499 * PARTS);
        assert_eq!(
            budget.distribute(at_ms(499 + 1000)),
            (499 + 500) * PARTS,
            "but it is kept for ten ticks at most"
        );
    }

    #[test]
    fn threads_take_no_more_than_there_is_and_lose_nothing() {
        let budget = budget(1_000_000, 1_000_000);
        let taken: u64 = std::thread::scope(|scope| {
            let take = |seed: u64| {
                let mut sum = 0;
                for step in 0..20_000 {
                    let got = budget.take((seed * 31 + step) % 60, 1, at_ms(0));
                    budget.give_back(got / 2);
                    sum += got - got / 2;
                }
                sum
            };
            let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || take(seed))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 1_000_000);
    }

    #[test]
    fn counted_values_are_reported() {
        let budget = BandwidthBudget::default();
        budget.add_delay(Duration::from_millis(7));
        budget.add_would_delay();
        budget.hold(0, 10);
        budget.hold(10, 4);
        assert_eq!((budget.delayed(), budget.would_delay(), budget.held()), (Duration::from_millis(7), 1, 4));
    }
}
