//! Counts listening sockets that failed and are not open again yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The count.
#[derive(Debug, Default)]
pub struct StoppedListeners(Arc<AtomicUsize>);

/// One of them, counted as long as this lives.
#[derive(Debug)]
pub struct StoppedListener(Arc<AtomicUsize>);

impl StoppedListeners {
    /// Counts one more until what is returned is dropped.
    #[must_use]
    pub fn stop(&self) -> StoppedListener {
        self.0.fetch_add(1, Ordering::AcqRel);
        StoppedListener(Arc::clone(&self.0))
    }

    /// The open connections.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl Drop for StoppedListener {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
