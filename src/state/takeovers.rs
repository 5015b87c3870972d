//! Counts of takeovers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Takeovers of this process, on either side.
#[derive(Debug, Default)]
pub struct TakeoverCounters {
    done: AtomicU64,
    failed: AtomicU64,
    receiving: AtomicBool,
}

impl TakeoverCounters {
    /// Whether another process's sessions may still come.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        self.receiving.load(Ordering::Acquire)
    }

    /// From now on they may, or not any more.
    pub fn set_receiving(&self, receiving: bool) {
        self.receiving.store(receiving, Ordering::Release);
    }

    /// Counts one that is over.
    pub fn count(&self, is_done: bool) {
        if is_done { &self.done } else { &self.failed }.fetch_add(1, Ordering::AcqRel);
    }

    /// Each result with how often there was one.
    #[must_use]
    pub fn results(&self) -> [(&'static str, u64); 2] {
        let count = |count: &AtomicU64| count.load(Ordering::Acquire);
        [("done", count(&self.done)), ("failed", count(&self.failed))]
    }
}
