//! The number of sessions of each worker, for balancing new connections between workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of sessions of each worker.
#[derive(Debug)]
pub struct WorkerLoads {
    sessions: Vec<AtomicUsize>,
    open_sockets: AtomicUsize,
}

/// Counts one open listening socket until dropped.
#[derive(Debug)]
pub struct OpenSocket(Arc<WorkerLoads>);

/// Counts one session of a worker until dropped.
#[derive(Debug)]
pub struct LoadGuard {
    loads: Arc<WorkerLoads>,
    worker: usize,
}

impl WorkerLoads {
    /// Of so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Arc<Self> {
        let sessions = (0..workers).map(|_| AtomicUsize::new(0)).collect();
        Arc::new(Self { sessions, open_sockets: AtomicUsize::new(0) })
    }

    /// Counts an open listening socket.
    #[must_use]
    pub fn count_socket(self: &Arc<Self>) -> OpenSocket {
        self.open_sockets.fetch_add(1, Ordering::AcqRel);
        OpenSocket(Arc::clone(self))
    }

    /// The open listening sockets.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.open_sockets.load(Ordering::Acquire)
    }

    /// Counts a session of a worker.
    #[must_use]
    pub fn count_session(self: &Arc<Self>, worker: usize) -> LoadGuard {
        if let Some(count) = self.sessions.get(worker) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        LoadGuard { loads: Arc::clone(self), worker }
    }

    /// The sessions of a worker.
    #[must_use]
    pub fn count(&self, worker: usize) -> usize {
        self.sessions.get(worker).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The sessions of all workers.
    #[must_use]
    pub fn total(&self) -> usize {
        (0..self.sessions.len()).map(|worker| self.count(worker)).sum()
    }

    /// The worker with the fewest sessions.
    #[must_use]
    pub fn least_loaded(&self) -> Option<usize> {
        (0..self.sessions.len()).min_by_key(|worker| self.count(*worker))
    }

    /// The worker that a fresh connection should go to instead of `own`, where the difference is worth a hand-over.
    ///
    /// SO_REUSEPORT spreads connections by a hash of their addresses, and a load balancer has few of them; left
    /// alone, one worker can have twice the sessions of another.
    #[must_use]
    pub fn less_loaded(&self, own: usize) -> Option<usize> {
        let mine = self.count(own);
        let lightest = self.least_loaded()?;
        let least = self.count(lightest);
        (mine > least + least / 4 + 16).then_some(lightest)
    }
}

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.0.open_sockets.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        if let Some(count) = self.loads.sessions.get(self.worker) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_handed_over_beyond_a_quarter_and_sixteen_sessions() {
        let loads = WorkerLoads::new(2);
        let mut aboard: Vec<_> = (0..16).map(|_| loads.count_session(0)).collect();
        assert_eq!((loads.less_loaded(0), loads.less_loaded(1)), (None, None));
        aboard.push(loads.count_session(0));
        assert_eq!(loads.less_loaded(0), Some(1));
        aboard.extend((0..100).map(|_| loads.count_session(1)));
        assert_eq!((loads.count(0), loads.count(1), loads.total()), (17, 100, 117));
        assert_eq!(loads.less_loaded(1), Some(0));
        drop(aboard);
        assert_eq!(loads.total(), 0);
        let listen_socket = loads.count_socket();
        assert_eq!(loads.open_sockets(), 1);
        drop(listen_socket);
        assert_eq!(loads.open_sockets(), 0);
    }
}
