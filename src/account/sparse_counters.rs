//! Sparse counters: few of the possible keys are ever used.

use std::sync::OnceLock;

use super::Counter64;

/// Counters of one worker, readable by any thread. A counter gets its own node at its first use: of some sixty
/// reasons to end a tenant's sessions meet two or three, and there is a list for each tenant and worker.
#[derive(Debug, Default)]
pub(super) struct SparseCounters(OnceLock<Box<SparseNode>>);

#[derive(Debug)]
struct SparseNode {
    key: u8,
    count: Counter64,
    next: SparseCounters,
}

impl SparseCounters {
    /// Adds; only the worker itself may.
    pub(super) fn add(&self, key: usize, amount: u64) {
        let Ok(key) = u8::try_from(key) else { return };
        let mut list = self;
        loop {
            let fresh = || Box::new(SparseNode { key, count: Counter64::default(), next: Self::default() });
            let node = list.0.get_or_init(fresh);
            if node.key == key {
                return node.count.add(amount);
            }
            list = &node.next;
        }
    }

    /// Every count that was used, in the order of first use.
    pub(super) fn counts(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let nodes = std::iter::successors(self.0.get(), |node| node.next.0.get());
        nodes.map(|node| (usize::from(node.key), node.count.value()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_its_own_count() {
        let tally = SparseCounters::default();
        for (key, amount) in [(7, 1), (0, 2), (7, 3), (255, 4), (256, 5)] {
            tally.add(key, amount);
        }
        assert_eq!(tally.counts().collect::<Vec<_>>(), [(7, 4), (0, 2), (255, 4)]);
        assert!(size_of::<SparseNode>() <= 32 && size_of::<SparseCounters>() <= 16);
    }
}
