//! Listeners by name: each keeps its index for the process's life, as sockets and flows refer to it by index.

use std::collections::HashMap;
use std::sync::Arc;

use crate::admission::pending::PendingSlots;
use crate::config::{self, ListenerIdentity, Protocol};
use crate::state::rejection_log::StrayLogLimit;

/// All listeners of the process's life, by index.
#[derive(Debug, Default)]
pub(super) struct ListenerRows {
    all: Vec<ListenerRow>,
    places: HashMap<String, u32>,
    /// Places for sessions without a whole header that the process has, for all listeners together.
    most_pending: usize,
}

/// One listener.
#[derive(Debug)]
pub(super) struct ListenerRow {
    /// As it was last configured.
    pub(super) listener: config::ListenerConfig,
    /// Sessions without a whole header.
    pub(super) pending: Arc<PendingSlots>,
    /// Its lines of the access log that tell of connections without a tenant.
    pub(super) strays: Arc<StrayLogLimit>,
    /// Whether it is configured no more: what the kernel had accepted for it is served still, as its rules say.
    pub(super) is_retired: bool,
}

/// Whether sessions of a listener may wait for their headers.
fn has_pending(listener: &config::ListenerConfig) -> bool {
    listener.protocol == Protocol::Tcp && matches!(listener.identity, ListenerIdentity::Header { .. })
}

impl ListenerRows {
    /// None yet, of a process with so many places for sessions without a whole header.
    pub(super) fn new(most_pending: usize) -> Self {
        Self { most_pending, ..Self::default() }
    }

    /// The place that a name has, or would get.
    pub(super) fn place(&self, name: &str, new: &mut u32) -> u32 {
        self.places.get(name).copied().unwrap_or_else(|| {
            let place = u32::try_from(self.all.len()).unwrap_or(u32::MAX).saturating_add(*new);
            *new += 1;
            place
        })
    }

    /// Puts these listeners in force, and retires all others.
    pub(super) fn set(&mut self, listeners: &[config::ListenerConfig]) {
        self.all.iter_mut().for_each(|row| row.is_retired = true);
        let asked = listeners.iter().filter(|listener| has_pending(listener));
        let asked = asked.map(|listener| listener.max_pending as u128).sum::<u128>();
        // If listeners ask for more than the process has, each gets its proportion.
        let limit = |listener: &config::ListenerConfig| {
            let part = listener.max_pending as u128 * self.most_pending as u128 / asked.max(1);
            listener.max_pending.min(usize::try_from(part).unwrap_or(usize::MAX))
        };
        let limits: Vec<_> = listeners.iter().map(limit).collect();
        for (listener, limit) in listeners.iter().zip(limits) {
            let place = self.place(&listener.name, &mut 0);
            if let Some(row) = self.all.get_mut(place as usize) {
                row.pending.set_limit(limit);
                row.is_retired = false;
                row.listener = listener.clone();
            } else {
                let pending = PendingSlots::new(limit);
                self.all.push(ListenerRow {
                    listener: listener.clone(),
                    pending,
                    strays: Arc::default(),
                    is_retired: false,
                });
                self.places.insert(listener.name.clone(), place);
            }
        }
    }

    pub(super) fn all(&self) -> &[ListenerRow] {
        &self.all
    }

    pub(super) fn places(&self) -> &HashMap<String, u32> {
        &self.places
    }
}
