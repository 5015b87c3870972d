//! Balancing algorithms as pure functions over weighted places.

use std::net::IpAddr;

use crate::addr::ClientAddr;
use crate::id::EndpointClaim;

/// Why no backend was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PickError {
    /// No backend may be used, or each that may was tried.
    Usable,
    /// Each that may be used has as many sessions as it may have.
    Free,
    /// The tenant holds its share of what they have room for.
    Share,
}

/// Cumulative weights: a number below their sum selects an entry, in proportion to its weight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightTable {
    /// For each place the sum of the weights up to it and with it.
    ends: Vec<u32>,
    /// The one weight that all have, where they do.
    equal: Option<u32>,
    /// The smallest weight.
    least: u32,
}

impl WeightTable {
    /// The shares of these weights, none of which is 0; their sum must be one of 32 bits.
    #[must_use]
    pub fn new(weights: &[u32]) -> Self {
        let mut sum = 0_u32;
        let add = |weight: &u32| {
            sum = sum.saturating_add(*weight);
            sum
        };
        let equal = weights.first().copied().filter(|first| weights.iter().all(|weight| weight == first));
        let least = weights.iter().copied().min().unwrap_or(0);
        Self { ends: weights.iter().map(add).collect(), equal, least }
    }

    /// The number of slots.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn total(&self) -> u32 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The numbers of a place: the first, and how many.
    fn numbers(&self, place: usize) -> (u32, u32) {
        let end = self.ends.get(place).copied().unwrap_or(0);
        let start = place.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        (start, end - start)
    }

    fn at(&self, number: u32) -> usize {
        match self.equal {
            Some(weight) => usize::try_from(number / weight.max(1)).unwrap_or(usize::MAX),
            None => self.ends.partition_point(|end| *end <= number),
        }
    }
}

/// 2^64 over the golden ratio: of all steps around a circle, the one whose points lie most evenly at any time (Knuth, "The
/// Art of Computer Programming", volume 3, section 6.4).
pub const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A hash that is the same in every process and every release: what it places stays where it is over restarts (XXH3).
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

/// The same for the same client, whatever its port, and whether an IPv4 address is written as such or as an IPv4-mapped one.
#[must_use]
pub fn by_client(client: Option<ClientAddr>) -> u64 {
    match client.map(|client| client.canonical().0.ip()) {
        Some(IpAddr::V4(ip)) => hash(&ip.octets()),
        Some(IpAddr::V6(ip)) => hash(&ip.octets()),
        None => 0,
    }
}

/// The same for the same endpoint; where there is none, for the same client.
#[must_use]
pub fn by_endpoint(endpoint: EndpointClaim, client: Option<ClientAddr>) -> u64 {
    endpoint.id().map_or_else(|| by_client(client), |id| hash(&id.number().to_be_bytes()))
}

/// Each in turn, as often as its weight; `turn` counts up and may wrap.
///
/// Equal weights rotate. Otherwise turns are spread over the weights by the golden ratio, so that a heavy place's turns
/// lie among the others' and not in a row, without a schedule that would have to be kept or locked.
#[must_use]
pub fn round_robin(turn: usize, shares: &WeightTable) -> Option<usize> {
    if shares.equal.is_some() {
        return turn.checked_rem(shares.len());
    }
    let spread = (turn as u64).wrapping_mul(GOLDEN);
    Some(shares.at(scale(spread >> 32, shares.total())?))
}

/// The less loaded of two different places, drawn by their weights with the two halves of `roll`; of equals, the first
/// drawn. A load counts in relation to its place's weight: as so many whole sessions of the smallest weight, a part of one
/// by chance. Without chance one session on a small weight would count for more than it is, or on a large one, and where
/// sessions are few, shares would be off by a tenth.
///
/// Mitzenmacher, "The power of two choices in randomized load balancing", 1996: the longest queue grows with
/// log log n instead of log n, and no worker needs to look at more than two loads.
#[must_use]
pub fn p2c(roll: u64, shares: &WeightTable, load: impl Fn(usize) -> u32) -> Option<usize> {
    let first = shares.at(scale(roll >> 32, shares.total())?);
    let (start, weight) = shares.numbers(first);
    // The second is drawn from the numbers that are not the first's.
    let Some(number) = scale(roll & 0xFFFF_FFFF, shares.total() - weight) else { return Some(first) };
    let second = shares.at(if number < start { number } else { number + weight });
    let lighter = if shares.equal.is_some() {
        load(second) < load(first)
    } else {
        // Other bits than those that drew the two.
        let chance = (roll ^ roll >> 32).wrapping_mul(GOLDEN);
        let whole = |place: usize, weight: u32, chance: u64| {
            let part = scale(chance, weight).unwrap_or(0);
            (u64::from(load(place)) * u64::from(shares.least) + u64::from(part)) / u64::from(weight.max(1))
        };
        let (_, weight_of_second) = shares.numbers(second);
        whole(second, weight_of_second, chance >> 32) < whole(first, weight, chance & 0xFFFF_FFFF)
    };
    Some(if lighter { second } else { first })
}

/// Spreads 32 random bits over numbers below `len` without a division; the bias is at most `len / 2^32`. None where
/// there are no numbers.
fn scale(bits: u64, len: u32) -> Option<u32> {
    let number = (bits * u64::from(len)) >> 32;
    u32::try_from(number).ok().filter(|number| *number < len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equal(len: usize) -> WeightTable {
        WeightTable::new(&vec![7; len])
    }

    fn roll(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state ^ (*state >> 29)
    }

    #[test]
    fn empty_table_picks_none() {
        assert_eq!(round_robin(7, &equal(0)), None);
        assert_eq!(p2c(u64::MAX, &equal(0), |_| 0), None);
        assert!(equal(0).is_empty() && equal(2).len() == 2);
    }

    #[test]
    fn ipv4_client_and_its_mapped_form_have_one_key() {
        let key = |text: &str| by_client(Some(ClientAddr(text.parse().unwrap())));
        assert_eq!(key("10.0.0.1:1"), key("[::ffff:10.0.0.1]:2"));
        assert_ne!(key("10.0.0.1:1"), key("[::10.0.0.1]:1"));
        assert_ne!(key("10.0.0.1:1"), key("10.0.0.2:1"));
    }

    #[test]
    fn equal_turns_rotate_and_wrap() {
        assert_eq!(round_robin(usize::MAX, &equal(10)), Some(usize::MAX % 10));
        assert_eq!(round_robin(0, &equal(1)), Some(0));
    }

    #[test]
    fn turns_go_by_weight_and_lie_apart() {
        let weights = [500, 100, 1, 399];
        let shares = WeightTable::new(&weights);
        let mut counts = [0_u32; 4];
        let mut in_a_row = 0;
        for turn in 0..100_000 {
            let place = round_robin(turn, &shares).unwrap();
            counts[place] += 1;
            in_a_row = if place == 0 { in_a_row + 1 } else { 0 };
            assert!(in_a_row <= 2, "half of the turns, and three of them in a row at {turn}");
            for (count, weight) in counts.iter().zip(weights) {
                let due = f64::from(weight) / 1_000.0 * f64::from(u32::try_from(turn).unwrap() + 1);
                assert!((f64::from(*count) - due).abs() < 6.0, "{counts:?} at {turn}");
            }
        }
    }

    #[test]
    fn one_is_picked_from_one() {
        for roll in [0, 1, u64::MAX] {
            assert_eq!(p2c(roll, &equal(1), |_| 9), Some(0));
        }
    }

    #[test]
    fn two_choices_differ_and_the_less_loaded_wins() {
        for shares in [equal(5), WeightTable::new(&[1, 1000, 3, 40, 7])] {
            for high in [0_u64, 1 << 30, 1 << 31, u64::from(u32::MAX)] {
                for low in [0, 1 << 30, 1 << 31, u64::from(u32::MAX)] {
                    let looked = std::cell::RefCell::new(Vec::new());
                    let picked = p2c(high << 32 | low, &shares, |place| {
                        looked.borrow_mut().push(place);
                        0
                    });
                    let looked = looked.into_inner();
                    assert_ne!(looked[0], looked[1]);
                    assert_eq!(picked, Some(looked[1]), "of equals the first drawn");
                }
            }
        }
        let loads = [5, 4, 3, 2, 1];
        let mut state = 1;
        for _ in 0..1_000 {
            let looked = std::cell::RefCell::new(Vec::new());
            let picked = p2c(roll(&mut state), &equal(5), |place| {
                looked.borrow_mut().push(place);
                loads[place]
            });
            assert_eq!(picked, looked.into_inner().iter().copied().max());
        }
    }

    #[test]
    fn load_is_divided_by_weight() {
        let shares = WeightTable::new(&[100, 300]);
        let mut state = 1;
        for (loads, second_of_a_thousand) in
            [([1, 0], 1_000..=1_000), ([1, 6], 0..=0), ([2, 3], 1_000..=1_000)]
        {
            let picks = (0..1_000).map(|_| p2c(roll(&mut state), &shares, |place| loads[place]).unwrap());
            let second = picks.filter(|place| *place == 1).count();
            assert!(second_of_a_thousand.contains(&second), "{second} for {loads:?}");
        }
        // Two thirds of a session against one: less in a third of all cases, and in the others the first drawn.
        let picks = (0..30_000).map(|_| p2c(roll(&mut state), &shares, |place| [1, 2][place]).unwrap());
        let second = picks.filter(|place| *place == 1).count();
        let due = 30_000 / 3 + 20_000 * 3 / 4;
        assert!(second.abs_diff(due) < 500, "{second} for {due}");
    }

    #[test]
    fn where_sessions_are_few_shares_go_by_weight_all_the_same() {
        let weights = [100, 150, 200, 250, 100, 150, 200, 250];
        let shares = WeightTable::new(&weights);
        for at_once in [2, 4, 8, 40] {
            let (mut loads, mut counts, mut state) = ([0_u32; 8], [0_u32; 8], 1);
            let mut held = std::collections::VecDeque::new();
            for _ in 0..200_000 {
                let place = p2c(roll(&mut state), &shares, |place| loads[place]).unwrap();
                (loads[place], counts[place]) = (loads[place] + 1, counts[place] + 1);
                held.push_back(place);
                if held.len() == at_once {
                    loads[held.pop_front().unwrap()] -= 1;
                }
            }
            for (count, weight) in counts.iter().zip(weights) {
                let due = 200_000 * weight / 1_400;
                assert!(
                    count.abs_diff(due) <= due / 33,
                    "{count} for {due} with {at_once} at once: {counts:?}"
                );
            }
        }
    }

    #[test]
    fn without_load_all_get_their_share() {
        let weights = [10, 20, 30, 40];
        let shares = WeightTable::new(&weights);
        let (mut counts, mut state) = ([0_u32; 4], 1);
        for _ in 0..100_000 {
            counts[p2c(roll(&mut state), &shares, |_| 0).unwrap()] += 1;
        }
        for (count, weight) in counts.iter().zip(weights) {
            assert!(count.abs_diff(weight * 1_000) < 1_000, "{counts:?}");
        }
    }
}
