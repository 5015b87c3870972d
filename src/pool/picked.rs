//! A backend that a session was given: what it carries, and the room that it gives back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::backend::Backend;

/// A picked backend, counted as one session until dropped.
#[derive(Debug)]
pub struct PickedBackend(Box<PickedState>);

/// Boxed: a session has room for it for its whole life.
#[derive(Debug)]
struct PickedState {
    backend: Arc<Backend>,
    /// The tenant whose place is counted among the pool's shares.
    tenant: Option<u32>,
}

impl PickedBackend {
    /// A session more, where there is room for it.
    #[must_use]
    pub fn take(backend: &Arc<Backend>) -> Option<Self> {
        let room = backend.room.load(Ordering::SeqCst);
        if room == u32::MAX {
            backend.load.sessions.fetch_add(1, Ordering::SeqCst);
        } else {
            let more = |load: u32| (load < room).then_some(load + 1);
            backend.load.sessions.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        }
        Some(Self::seated(backend))
    }

    /// One session more, even beyond the limit: it is connected already. No other session gets room before it
    /// is there again.
    #[must_use]
    pub fn adopt(backend: &Arc<Backend>) -> Self {
        backend.load.sessions.fetch_add(1, Ordering::SeqCst);
        Self::seated(backend)
    }

    /// Tells the pool of a session that is counted already.
    fn seated(backend: &Arc<Backend>) -> Self {
        // The leaf of a removed backend may belong to another one.
        if backend.is_retired() || backend.is_removed() {
            backend.replacement().iter().for_each(|replacement| replacement.update_load());
        } else if let Some(seat) = &backend.tournament {
            seat.picked(backend.slot() as usize, || backend.load_and_weight());
        }
        Self(Box::new(PickedState { backend: Arc::clone(backend), tenant: None }))
    }

    /// The same for a tenant, whose place is counted already.
    #[must_use]
    pub(super) fn of(mut self, tenant: u32) -> Self {
        self.0.tenant = Some(tenant);
        self
    }

    /// The same session at the backend that a reload has put in the place of its own.
    #[must_use]
    pub fn follow(&self, replacement: &Arc<Backend>) -> Self {
        let picked = Self::adopt(replacement);
        let Some(tenant) = self.0.tenant else { return picked };
        replacement.shares.enter_anyway(tenant);
        picked.of(tenant)
    }

    /// The backend, which may outlive the session.
    #[must_use]
    pub fn backend(&self) -> &Arc<Backend> {
        &self.0.backend
    }
}

impl std::ops::Deref for PickedBackend {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.0.backend
    }
}

impl Drop for PickedBackend {
    fn drop(&mut self) {
        let backend = &self.0.backend;
        // Before its room is offered to the queue: the sessions of its tenant decide which one gets it.
        self.0.tenant.iter().for_each(|tenant| backend.shares.leave(*tenant));
        backend.load.sessions.fetch_sub(1, Ordering::SeqCst);
        // Only now: the replacement exists before it is retired, and reads the load after that. The leaf of one that
        // is gone may be another's.
        if backend.is_retired() || backend.is_removed() {
            backend.replacement().iter().for_each(give_back);
        } else {
            give_back(backend);
        }
    }
}

/// There may be room at a backend: updates the least-loaded tree, and serves the queue.
fn give_back(backend: &Arc<Backend>) {
    backend.update_load();
    if let Some(queue) = &backend.queue {
        queue.serve(backend);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::backend::BackendSettings;
    use crate::pool::health::FULL;

    fn backend(max_sessions: Option<u32>) -> Arc<Backend> {
        Arc::new(Backend::standalone(
            "10.0.0.1:80",
            BackendSettings { max_sessions, ..BackendSettings::default() },
        ))
    }

    #[test]
    fn load_of_a_backend_is_its_session_count() {
        let backend = backend(None);
        let picked = PickedBackend::take(&backend).unwrap();
        assert_eq!((picked.load(), picked.label().name()), (1, "10.0.0.1:80"));
        drop(picked);
        assert_eq!(backend.load(), 0);
    }

    #[test]
    fn last_session_within_max_sessions_is_admitted_and_the_next_is_not() {
        let backend = backend(Some(2));
        let held: Vec<_> = (0..2).map(|_| PickedBackend::take(&backend).unwrap()).collect();
        assert!(PickedBackend::take(&backend).is_none() && !backend.has_room());
        let moved = PickedBackend::adopt(&backend);
        assert_eq!(backend.load(), 3);
        drop(held);
        assert!(backend.has_room() && backend.load() == 1);
        drop(moved);
        assert!(backend.has_room() && backend.load() == 0);
        assert_eq!((backend.room_at(FULL), backend.room_at(FULL / 2), backend.room_at(1)), (2, 1, 1));
    }
}
