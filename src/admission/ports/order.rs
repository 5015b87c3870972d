//! The order in which the ports of a range are used for the first time.

use super::LocalPortRange;

/// The order of one backend, in each half of the range.
///
/// Neighbours in a half are far from each other in this order: a process before this one has left ports in TIME_WAIT in an
/// order of its own, and those that the kernel refuses for that are not to follow each other here.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortOrder {
    start: usize,
    strides: [usize; 2],
}

/// How many ports of each half have been used at least once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsedPorts([usize; 2]);

impl PortOrder {
    /// An order that depends on the hash alone.
    pub(super) fn new(range: &LocalPortRange, hash: u64) -> Self {
        let start = usize::try_from(hash >> 40).unwrap_or(0);
        let strides = halves(range)
            .map(|half| stride(half.len(), usize::try_from(hash >> 16 & 0xFF_FFFF).unwrap_or(0)));
        Self { start, strides }
    }
}

impl UsedPorts {
    /// The next port that was not used before, of the second half first where `is_second` says so; the kernel's own order
    /// is every second port, then the rest (see [`LocalPortRange`]).
    pub(super) fn next(&mut self, range: &LocalPortRange, order: &PortOrder, is_second: bool) -> Option<u16> {
        let mut turns = [0, 1];
        if is_second {
            turns.reverse();
        }
        let halves = halves(range);
        turns.into_iter().find_map(|turn| {
            let (half, used) = (halves.get(turn)?, self.0.get_mut(turn)?);
            if *used >= half.len() {
                return None;
            }
            let place = (order.start + *used * order.strides.get(turn)?) % half.len();
            *used += 1;
            half.get(place).copied()
        })
    }
}

fn halves(range: &LocalPortRange) -> [&[u16]; 2] {
    let (first, second) = range.0.split_at(range.len().div_ceil(2));
    [first, second]
}

/// A step that comes to each of so many places once before it is back: one without a common divisor, a quarter to three
/// quarters of them.
fn stride(count: usize, random: usize) -> usize {
    let mut stride = (count / 4 + random % (count / 2).max(1)).max(1);
    while greatest_common_divisor(stride, count) > 1 {
        stride += 1;
    }
    stride
}

fn greatest_common_divisor(one: usize, other: usize) -> usize {
    if other == 0 { one } else { greatest_common_divisor(other, one % other) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_comes_once_and_the_first_half_before_the_second() {
        for (count, hash) in
            (0..70).flat_map(|count| [(count, 0), (count, u64::MAX), (count, 0x1234_5678_9ABC_DEF0)])
        {
            let range = LocalPortRange::new(1_000, 999 + count, |_| false);
            let order = PortOrder::new(&range, hash);
            for is_second in [false, true] {
                let mut used = UsedPorts::default();
                let all: Vec<_> = std::iter::from_fn(|| used.next(&range, &order, is_second)).collect();
                let mut sorted = all.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (1_000..1_000 + count).collect::<Vec<_>>(), "{count} {hash}");
                let first = if is_second { usize::from(count) / 2 } else { usize::from(count).div_ceil(2) };
                assert!(all.iter().take(first).all(|port| (port % 2 == 1) == is_second), "{count} {hash}");
            }
        }
    }

    #[test]
    fn ports_that_another_order_used_are_spread() {
        let range = LocalPortRange::default();
        let [old, new] =
            [0x1111_2222_3333_4444, 0x0F0E_0D0C_0B0A_0908].map(|hash| PortOrder::new(&range, hash));
        let mut used = UsedPorts::default();
        // 78 % of the range: the first half, and more than half of the second.
        let taken: std::collections::HashSet<_> =
            (0..range.len() * 78 / 100).filter_map(|_| used.next(&range, &old, false)).collect();
        let mut used = UsedPorts::default();
        let (mut row, mut longest) = (0, 0);
        for _ in 0..range.len() / 2 {
            let port = used.next(&range, &new, true).unwrap();
            row = if taken.contains(&port) { row + 1 } else { 0 };
            longest = longest.max(row);
        }
        assert!(longest < 32, "{longest}");
    }
}
