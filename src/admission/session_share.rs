//! The process's sessions, shared fairly among tenants by the rule of [`fair_share`].

use std::sync::Arc;

use super::slots::Slots;
use crate::atomic::{AtomicUsize, Ordering};
use crate::fair_share;

/// The process's session slots, and the number of tenants that hold any.
#[derive(Debug)]
pub struct SessionShare {
    slots: Arc<Slots>,
    holders: AtomicUsize,
}

impl SessionShare {
    /// The shares of these slots, which each session has taken one of already.
    #[must_use]
    pub fn new(slots: Arc<Slots>) -> Arc<Self> {
        Arc::new(Self { slots, holders: AtomicUsize::new(0) })
    }

    /// Tenants that hold a session now.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.holders.load(Ordering::Acquire)
    }

    /// A tenant has its first session.
    pub(super) fn join(&self) {
        self.holders.fetch_add(1, Ordering::AcqRel);
    }

    /// A tenant's last session has ended.
    pub(super) fn part(&self) {
        self.holders.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether a tenant that holds `held` sessions, beside the new one, may have that one too.
    #[must_use]
    pub(super) fn allows(&self, held: usize) -> bool {
        let (limit, used) = (self.slots.limit(), self.slots.used());
        fair_share::is_allowed(held, self.holders(), limit, limit.saturating_sub(used))
    }

    /// Whether a tenant that holds `held` sessions, beside the new one, holds less than an equal share.
    #[must_use]
    pub(super) fn is_equal(&self, held: usize) -> bool {
        fair_share::is_equal(held, self.holders(), self.slots.limit())
    }
}
