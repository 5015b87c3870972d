//! How many attempts beyond the first a pool's sessions may make together, so that a dead pool does not double its load.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;

/// A retry costs so many parts of the balance; a session brings in as many as the budget has percent.
const COST: i64 = 100;
/// What is saved up, at most: so many retries at once after a long time without any.
const MOST: i64 = 1_000 * COST;
/// What a new pool has.
const FIRST: i64 = 100 * COST;
/// What comes in without any session: a pool with few of them must be able to retry at all. Ten a second, as Finagle's
/// `RetryBudget` has it.
const TRICKLE: Duration = Duration::from_millis(100);

/// The retry budget of one pool.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// Parts for each session.
    percent: AtomicI64,
    balance: AtomicI64,
    /// Nanoseconds up to which the trickle has been taken in.
    trickled: AtomicU64,
}

impl RetryBudget {
    /// A budget of so many retries for each hundred sessions; 0 is no retry at all.
    #[must_use]
    pub fn new(percent: u32) -> Self {
        let budget = Self::default();
        budget.set(percent);
        budget
    }

    /// From now on so many for each hundred sessions; what is saved up stays, unless it is none.
    pub fn set(&self, percent: u32) {
        let before = self.percent.swap(percent.into(), Ordering::AcqRel);
        if percent == 0 {
            self.balance.store(0, Ordering::Release);
        } else if before == 0 {
            self.balance.store(FIRST, Ordering::Release);
        }
    }

    fn percent(&self) -> i64 {
        self.percent.load(Ordering::Relaxed)
    }

    /// Counts a new session. A full budget is only read: then no worker waits for another's cache line.
    pub fn deposit(&self) {
        if self.balance.load(Ordering::Relaxed) < MOST && self.percent() > 0 {
            self.balance.fetch_add(self.percent(), Ordering::Relaxed);
        }
    }

    /// Takes one retry from the budget, if there is enough.
    #[must_use]
    pub fn withdraw(&self, now: Moment) -> bool {
        self.trickle(now);
        self.balance
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |balance| {
                (balance >= COST).then(|| balance - COST)
            })
            .is_ok()
    }

    fn trickle(&self, now: Moment) {
        let now = u64::try_from(now.since(Moment::default()).as_nanos()).unwrap_or(u64::MAX);
        let step = u64::try_from(TRICKLE.as_nanos()).unwrap_or(u64::MAX);
        let before = self.trickled.load(Ordering::Acquire);
        let steps = now.saturating_sub(before) / step;
        if steps == 0 || self.percent() == 0 {
            return;
        }
        let after = before + steps * step;
        // One thread wins and adds the time, once.
        if self.trickled.compare_exchange(before, after, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let income = i64::try_from(steps).unwrap_or(MOST).saturating_mul(COST);
            let room = (MOST - self.balance.load(Ordering::Relaxed)).max(0);
            self.balance.fetch_add(income.min(room).min(FIRST), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Moment {
        Moment::default() + Duration::from_millis(milliseconds)
    }

    fn retries(budget: &RetryBudget, now: Moment) -> usize {
        (0..2_000).take_while(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn fifth_of_sessions_may_retry_and_unused_retries_are_saved() {
        let budget = RetryBudget::new(20);
        assert_eq!(retries(&budget, at(0)), 100, "what a new pool has");
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(retries(&budget, at(0)), 10);
        assert!(!budget.withdraw(at(99)));
        assert!(budget.withdraw(at(100)) && !budget.withdraw(at(100)), "ten a second without any session");
        (0..1_000_000).for_each(|_| budget.deposit());
        assert_eq!(retries(&budget, at(100)), 1_000, "and no more than that is saved");
    }

    #[test]
    fn long_silence_restores_a_hundred_retries() {
        let budget = RetryBudget::new(100);
        assert_eq!(retries(&budget, at(0)), 100);
        assert_eq!(retries(&budget, at(3_600_000)), 100);
        budget.deposit();
        assert_eq!(retries(&budget, at(3_600_000)), 1);
    }

    #[test]
    fn changed_retry_budget_keeps_saved_retries() {
        let budget = RetryBudget::new(20);
        assert!(budget.withdraw(at(0)));
        budget.set(50);
        budget.deposit();
        budget.deposit();
        assert_eq!(retries(&budget, at(0)), 100);
        budget.set(0);
        budget.deposit();
        assert_eq!(retries(&budget, at(60_000)), 0);
        budget.set(20);
        assert!(retries(&budget, at(60_000)) >= 100);
    }

    #[test]
    fn zero_retry_budget_allows_no_retry() {
        let budget = RetryBudget::new(0);
        (0..1_000).for_each(|_| budget.deposit());
        assert!(!budget.withdraw(at(0)) && !budget.withdraw(at(60_000)));
    }
}
