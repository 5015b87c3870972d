//! The process's sessions, shared fairly: when room gets scarce, those who hold most are shed first.

use std::sync::Arc;

use super::slots::Slots;
use crate::atomic::{AtomicUsize, Ordering};

/// The process's slots, and how many tenants hold any.
///
/// The rule is the dynamic threshold of Choudhury and Hahne (IEEE/ACM Transactions on Networking 6(2), 1998), which
/// shared switches' memory among their ports: a tenant may hold so many times what is free. The more there are, the
/// less each gets, and a little always stays free for one who comes new.
#[derive(Debug)]
pub struct Share {
    slots: Arc<Slots>,
    holders: AtomicUsize,
}

/// How many times what is free a tenant may hold: one alone gets at most nine tenths.
const TIMES_FREE: usize = 9;

impl Share {
    /// The shares of these slots, which each session has taken one of already.
    #[must_use]
    pub fn new(slots: Arc<Slots>) -> Arc<Self> {
        Arc::new(Self { slots, holders: AtomicUsize::new(0) })
    }

    /// Tenants that hold a session now.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.holders.load(Ordering::Acquire)
    }

    /// A tenant has its first session.
    pub(super) fn join(&self) {
        self.holders.fetch_add(1, Ordering::AcqRel);
    }

    /// A tenant's last session has ended.
    pub(super) fn part(&self) {
        self.holders.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether a tenant that holds `held` sessions, beside the new one, may have that one too.
    #[must_use]
    pub(super) fn allows(&self, held: usize) -> bool {
        let (limit, used) = (self.slots.limit(), self.slots.used());
        is_allowed(held, self.holders(), limit, limit.saturating_sub(used))
    }
}

/// The rule. The equal share is reckoned with one tenant more than there are, for there has to be room for it.
fn is_allowed(held: usize, holders: usize, limit: usize, free: usize) -> bool {
    held < limit / (holders + 1) || held < free.saturating_mul(TIMES_FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many sessions each gets of `limit`, where each wants all it can get, in turn.
    fn settle(limit: usize, tenants: usize) -> Vec<usize> {
        let mut held = vec![0_usize; tenants];
        loop {
            let before = held.clone();
            for place in 0..tenants {
                let used: usize = held.iter().sum();
                if used >= limit {
                    return held;
                }
                let holders = held.iter().enumerate().filter(|(at, held)| **held > 0 || *at == place).count();
                if is_allowed(held[place], holders, limit, limit - used - 1) {
                    held[place] += 1;
                }
            }
            if held == before {
                return held;
            }
        }
    }

    #[test]
    fn one_alone_gets_nine_tenths_and_the_last_of_them_is_shed() {
        assert_eq!(settle(1000, 1), [900]);
        assert_eq!(settle(10, 1), [9]);
        assert!(is_allowed(899, 1, 1000, 100) && !is_allowed(900, 1, 1000, 99));
    }

    #[test]
    fn many_get_equal_shares_and_leave_room() {
        for tenants in 2..50 {
            let held = settle(1000, tenants);
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            assert!(most - least <= 9, "{held:?}");
            assert!(held.iter().sum::<usize>() < 1000, "{held:?}");
        }
    }

    #[test]
    fn one_below_its_share_is_never_shed() {
        assert!(is_allowed(332, 2, 1000, 0));
        assert!(!is_allowed(333, 2, 1000, 0));
        assert!(is_allowed(0, 999, 1000, 0));
        assert!(is_allowed(usize::MAX - 1, 1, usize::MAX, usize::MAX));
    }
}
