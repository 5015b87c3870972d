//! When workers may close the sockets of an address that was removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of workers that still have flows at a removed address.
///
/// They close their sockets together: the kernel spreads datagrams over those that there are, and where one goes, those of
/// other workers' flows would come to the wrong one.
#[derive(Debug)]
pub struct SocketRetirement(AtomicUsize);

impl SocketRetirement {
    /// Of so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(workers)))
    }

    /// One more has flows there.
    pub(super) fn add_worker(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// One worker has no flow left.
    pub fn worker_done(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether no worker has a flow left.
    pub(super) fn is_complete(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}
