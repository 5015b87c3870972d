//! One address of a pool: its health, and how many sessions it has over all workers.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::health::{Health, Rules, State};
use crate::account::{Label, lock};
use crate::addr::BackendAddr;

/// A backend.
#[derive(Debug)]
pub struct Backend {
    address: BackendAddr,
    label: Label,
    /// Only probes write it.
    health: Mutex<Health>,
    /// `health`'s state, for those who only read.
    state: AtomicU8,
    load: AtomicU32,
    probes_done: AtomicU64,
    probes_failed: AtomicU64,
}

impl Backend {
    /// A backend without sessions.
    #[must_use]
    pub fn new(address: BackendAddr, label: Label, rules: Rules, state: State) -> Self {
        Self {
            address,
            label,
            health: Mutex::new(Health::new(rules, state)),
            state: AtomicU8::new(state as u8),
            load: AtomicU32::new(0),
            probes_done: AtomicU64::new(0),
            probes_failed: AtomicU64::new(0),
        }
    }

    /// Where it accepts.
    #[must_use]
    pub fn address(&self) -> BackendAddr {
        self.address
    }

    /// Its name in metrics: the address.
    #[must_use]
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Its sessions now, over all workers, those being connected included.
    #[must_use]
    pub fn load(&self) -> u32 {
        self.load.load(Ordering::Relaxed)
    }

    /// What is believed of it.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            state if state == State::Healthy as u8 => State::Healthy,
            state if state == State::Unhealthy as u8 => State::Unhealthy,
            _ => State::Unknown,
        }
    }

    /// Takes in one probe's result; the new state, where it changed.
    pub fn observe(&self, success: bool) -> Option<State> {
        let count = if success { &self.probes_done } else { &self.probes_failed };
        count.fetch_add(1, Ordering::Relaxed);
        let changed = lock(&self.health).observe(success);
        if let Some(state) = changed {
            self.state.store(state as u8, Ordering::Release);
        }
        changed
    }

    /// Probes that succeeded, and probes that failed.
    #[must_use]
    pub fn probes(&self) -> (u64, u64) {
        (self.probes_done.load(Ordering::Relaxed), self.probes_failed.load(Ordering::Relaxed))
    }
}

/// A backend that carries one session more as long as this lives.
#[derive(Debug)]
pub struct Picked(Arc<Backend>);

impl Picked {
    pub(super) fn new(backend: &Arc<Backend>) -> Self {
        backend.load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(backend))
    }
}

impl std::ops::Deref for Picked {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.0
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;

    #[test]
    fn its_load_is_its_sessions_and_its_state_is_what_probes_say() {
        let address = BackendAddr("10.0.0.1:80".parse().unwrap());
        let rules = Rules { rise: 1, fall: 1 };
        let backend =
            Arc::new(Backend::new(address, Labels::default().intern("10.0.0.1:80"), rules, State::Unknown));
        assert_eq!((backend.state(), backend.load(), backend.probes()), (State::Unknown, 0, (0, 0)));
        let picked = Picked::new(&backend);
        assert_eq!((picked.load(), picked.address(), picked.label().name()), (1, address, "10.0.0.1:80"));
        drop(picked);
        assert_eq!(backend.load(), 0);
        assert_eq!((backend.observe(true), backend.state()), (Some(State::Healthy), State::Healthy));
        assert_eq!((backend.observe(false), backend.state()), (Some(State::Unhealthy), State::Unhealthy));
        assert_eq!((backend.observe(false), backend.probes()), (None, (1, 2)));
    }
}
