//! The memory of a tenant's sessions whose other ends accept no bytes.

use super::Quota;
use crate::atomic::Ordering;

impl Quota {
    /// The unit in which bytes that were read are counted, in bytes.
    pub const KIB: u64 = 1024;

    /// The unit in which the kernel's socket queues are counted, in bytes.
    pub const PAGE: u64 = 4096;

    /// Bytes held for its sessions whose other ends accept none: those that were read, and the kernel's socket queues.
    #[must_use]
    pub fn stalled_memory(&self) -> u64 {
        let [buffered, queued] =
            [&self.buffered, &self.queued].map(|held| u64::from(held.load(Ordering::Relaxed)));
        buffered * Self::KIB + queued * Self::PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalled_memory_is_the_sum_of_both_in_bytes() {
        let quota = Quota::default();
        quota.buffered.store(3, Ordering::Relaxed);
        quota.queued.store(5, Ordering::Relaxed);
        assert_eq!(quota.stalled_memory(), 3 * 1024 + 5 * 4096);
    }
}
