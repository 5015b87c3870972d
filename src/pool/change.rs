//! A change of how a backend is used, as the operator sees it in the process log.

use std::time::Duration;

use super::Pool;
use super::backend::Backend;
use crate::account::Label;

/// A change of how a backend is used, for the process log.
#[derive(Clone, Debug)]
pub struct BackendChange {
    /// The backend.
    pub backend: Label,
    /// The new state: a word of [`HealthState`](super::health::HealthState), or `ejected`.
    pub state: &'static str,
    /// Why: a word of [`ChangeCause`](super::cause::ChangeCause).
    pub why: &'static str,
    /// The length of the ejection, where it is ejected.
    pub out_for: Option<Duration>,
}

impl BackendChange {
    /// Writes the change to the process log.
    pub fn log(&self, pool: &Pool) {
        tracing::info!(
            pool = pool.label.name(),
            backend = self.backend.name(),
            state = self.state,
            why = self.why,
            out_for = self.out_for.map(tracing::field::debug),
            usable = pool.current().map_or_else(|| pool.usable(), |pool| pool.usable()),
            "backend changed"
        );
    }
}

/// Describes the present state of a backend.
pub(super) fn backend_change(backend: &Backend, out_for: Option<Duration>) -> BackendChange {
    let state = if backend.is_removed() {
        "gone"
    } else if backend.is_ejected() {
        "ejected"
    } else {
        backend.state().as_str()
    };
    BackendChange {
        backend: backend.label().clone(),
        state,
        why: backend.summary().changed.1.as_str(),
        out_for,
    }
}
