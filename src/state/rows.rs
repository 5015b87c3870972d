//! Listeners by name: each keeps its place for the process's life, for doors and flows know it by that alone.

use std::collections::HashMap;
use std::sync::Arc;

use crate::admission::slots::Slots;
use crate::config;

/// Every listener that there ever was, by place.
#[derive(Debug, Default)]
pub(super) struct Rows {
    all: Vec<Row>,
    places: HashMap<String, u32>,
}

/// One listener.
#[derive(Debug)]
pub(super) struct Row {
    /// As it was last configured.
    pub(super) listener: config::Listener,
    /// Sessions without a whole header.
    pub(super) pending: Arc<Slots>,
    /// Whether it is configured no more: what the kernel had accepted for it is served still, as its rules say.
    pub(super) is_retired: bool,
}

impl Rows {
    /// The place that a name has, or would get.
    pub(super) fn place(&self, name: &str, new: &mut u32) -> u32 {
        self.places.get(name).copied().unwrap_or_else(|| {
            let place = u32::try_from(self.all.len()).unwrap_or(u32::MAX).saturating_add(*new);
            *new += 1;
            place
        })
    }

    /// Puts these listeners in force, and retires all others.
    pub(super) fn set(&mut self, listeners: &[config::Listener]) {
        self.all.iter_mut().for_each(|row| row.is_retired = true);
        for listener in listeners {
            let place = self.place(&listener.name, &mut 0);
            if let Some(row) = self.all.get_mut(place as usize) {
                row.pending.set_limit(listener.max_pending);
                row.is_retired = false;
                row.listener = listener.clone();
            } else {
                let pending = Slots::new(listener.max_pending);
                self.all.push(Row { listener: listener.clone(), pending, is_retired: false });
                self.places.insert(listener.name.clone(), place);
            }
        }
    }

    pub(super) fn all(&self) -> &[Row] {
        &self.all
    }

    pub(super) fn places(&self) -> &HashMap<String, u32> {
        &self.places
    }
}
