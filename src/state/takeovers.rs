//! How often everything was to go from one process to another.

use std::sync::atomic::{AtomicU64, Ordering};

/// Takeovers that this process was part of, on either side.
#[derive(Debug, Default)]
pub struct Takeovers {
    done: AtomicU64,
    failed: AtomicU64,
}

impl Takeovers {
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
