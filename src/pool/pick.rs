//! Who is next: algorithms as pure functions over places.

/// Each in turn; `turn` counts up and may wrap.
#[must_use]
pub fn round_robin(turn: usize, len: usize) -> Option<usize> {
    turn.checked_rem(len)
}

/// The less loaded of two different places, drawn by the two halves of `roll`; of equals, the first drawn.
///
/// Mitzenmacher, "The power of two choices in randomized load balancing", 1996: the longest queue grows with
/// log log n instead of log n, and no worker needs to look at more than two loads.
#[must_use]
pub fn p2c(roll: u64, len: usize, load: impl Fn(usize) -> u32) -> Option<usize> {
    let first = scale(roll >> 32, len)?;
    let Some(step) = scale(roll & 0xFFFF_FFFF, len - 1) else { return Some(first) };
    let second = (first + 1 + step) % len;
    Some(if load(second) < load(first) { second } else { first })
}

/// Spreads 32 random bits over `len` places without a division; the bias is at most `len / 2^32`.
fn scale(bits: u64, len: usize) -> Option<usize> {
    let place = (u128::from(bits) * len as u128) >> 32;
    usize::try_from(place).ok().filter(|place| *place < len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_picked_from_nobody() {
        assert_eq!(round_robin(7, 0), None);
        assert_eq!(p2c(u64::MAX, 0, |_| 0), None);
    }

    #[test]
    fn turns_wrap() {
        assert_eq!(round_robin(usize::MAX, 10), Some(usize::MAX % 10));
        assert_eq!(round_robin(0, 1), Some(0));
    }

    #[test]
    fn one_is_picked_from_one() {
        for roll in [0, 1, u64::MAX] {
            assert_eq!(p2c(roll, 1, |_| 9), Some(0));
        }
    }

    #[test]
    fn two_places_are_never_the_same_and_the_less_loaded_wins() {
        for high in [0_u64, 1 << 30, 1 << 31, u64::from(u32::MAX)] {
            for low in [0, 1 << 30, 1 << 31, u64::from(u32::MAX)] {
                let looked = std::cell::RefCell::new(Vec::new());
                let picked = p2c(high << 32 | low, 5, |place| {
                    looked.borrow_mut().push(place);
                    [5, 4, 3, 2, 1][place]
                });
                let looked = looked.into_inner();
                assert_ne!(looked[0], looked[1]);
                assert_eq!(picked, looked.iter().copied().max());
            }
        }
    }

    #[test]
    fn of_equals_the_first_drawn_is_taken_so_that_all_get_their_share() {
        let mut shares = [0_u32; 4];
        let mut roll = 1_u64;
        for _ in 0..40_000 {
            roll = roll.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            shares[p2c(roll, 4, |_| 0).unwrap()] += 1;
        }
        assert!(shares.iter().all(|share| (9_500..10_500).contains(share)), "{shares:?}");
    }
}
