//! Fair shares of a scarce resource: when it runs short, the tenants that hold most get no more.
//!
//! The rule is the dynamic threshold of Choudhury and Hahne (IEEE/ACM Transactions on Networking 6(2), 1998), which
//! shared switches' memory among their ports: a tenant may hold so many times what is free. The more there are, the
//! less each gets.
//!
//! Nothing is taken from a tenant for another one, so what tenants hold already does not come back for one that comes
//! new: a [`ShareReserve`] is kept for those that hold little.

/// How many times what is free beyond the reserve a tenant may hold that has more than an equal share.
const TIMES_FREE: usize = 9;

/// The part of all slots that is reserved for tenants that hold few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareReserve {
    /// While no more than so many are free, a tenant gets another one only if it holds less than what is free. So each that
    /// comes new gets half of what is left.
    pub all: usize,
    /// While no more than so many are free, only if it holds less than `few`.
    pub last: usize,
    /// A tenant that holds less gets another one as long as one is free. One is free as long as no more than
    /// `last / few` tenants hold any: that many, and never less than 64 where there are 1,024 places, cannot use up `last`.
    pub few: usize,
}

impl ShareReserve {
    /// That of so many places.
    #[must_use]
    pub const fn of(limit: usize) -> Self {
        let few = limit / 1024;
        Self { all: limit.div_ceil(8), last: limit.div_ceil(16), few: if few == 0 { 1 } else { few } }
    }
}

/// Whether so many are less than an equal share, which is reckoned with one tenant more than there are, for there has to be
/// room for it.
#[must_use]
pub fn is_equal(held: usize, holders: usize, limit: usize) -> bool {
    held < limit / (holders + 1)
}

/// Whether a tenant that holds `held` places of `limit` may have one more; `free` is what is left once it has that.
#[must_use]
pub fn is_allowed(held: usize, holders: usize, limit: usize, free: usize) -> bool {
    let reserve = ShareReserve::of(limit);
    let beyond = free.saturating_sub(reserve.all);
    (free >= reserve.all && is_equal(held, holders, limit))
        || held < beyond.saturating_mul(TIMES_FREE)
        || (free >= reserve.last && held < free)
        || held < reserve.few
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
    fn single_tenant_leaves_a_fifth() {
        assert_eq!((settle(1000, 1), settle(10, 1), settle(3, 1)), (vec![787], vec![7], vec![1]));
        assert!(is_allowed(786, 1, 1000, 213) && !is_allowed(787, 1, 1000, 212));
    }

    #[test]
    fn many_tenants_get_equal_shares_and_leave_room() {
        for tenants in 2..50 {
            let held = settle(1000, tenants);
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            assert!(most - least <= 9, "{held:?}");
            assert!(held.iter().sum::<usize>() < 1000, "{held:?}");
        }
    }

    #[test]
    fn each_later_tenant_finds_half_of_the_rest() {
        let (limit, mut held) = (10_000, Vec::new());
        for tenant in 0..200 {
            held.push(0);
            let mut free = limit - held.iter().sum::<usize>();
            while free > 0 && is_allowed(held[tenant], tenant + 1, limit, free - 1) {
                held[tenant] += 1;
                free -= 1;
            }
        }
        assert_eq!(held[..5], [7_875, 1_062, 438, 9, 9]);
        let reserve = ShareReserve::of(limit);
        assert_eq!(reserve, ShareReserve { all: 1_250, last: 625, few: 9 });
        assert!(held[..reserve.last / reserve.few].iter().all(|held| *held >= reserve.few), "{held:?}");
    }

    #[test]
    fn one_below_its_share_is_shed_only_in_the_reserve() {
        assert!(is_allowed(332, 2, 1000, 125) && !is_allowed(333, 2, 1000, 125));
        assert!(!is_allowed(332, 2, 1000, 124) && is_allowed(123, 2, 1000, 124));
        assert!(is_allowed(62, 2, 1000, 63) && !is_allowed(1, 2, 1000, 62));
        assert!(is_allowed(0, 999, 1000, 0) && !is_allowed(1, 999, 1000, 0));
        assert!(is_allowed(usize::MAX - 1, 1, usize::MAX, usize::MAX));
    }
}
