//! Slots that are reserved while sessions and flows move from one process to the other, so that new ones do not take
//! them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Quota, Quotas, Slots, lock};

/// The slots in use of the process and of each tenant, as sent to the successor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSlots {
    /// Sessions and flows of the process.
    pub all: usize,
    /// Each tenant that has any: its name, its sessions, its flows.
    pub tenants: Vec<(String, usize, usize)>,
}

/// Slots reserved for sessions that are still to be taken over. Unused ones are released when the last holder is
/// dropped.
#[derive(Debug)]
pub struct ReservedSlots {
    slots: Arc<Slots>,
    quotas: Vec<Arc<Quota>>,
}

impl ReservedSlots {
    /// Keeps so many of the process's slots, and of each tenant so many sessions and flows.
    pub fn new(slots: &Arc<Slots>, all: usize, tenants: Vec<(Arc<Quota>, usize, usize)>) -> Arc<Self> {
        slots.reserve_more(all);
        let keep = |(quota, sessions, flows): (Arc<Quota>, usize, usize)| {
            quota.reserve(&quota.sessions, sessions);
            quota.reserve(&quota.flows, flows);
            quota
        };
        Arc::new(Self { slots: Arc::clone(slots), quotas: tenants.into_iter().map(keep).collect() })
    }
}

impl Drop for ReservedSlots {
    fn drop(&mut self) {
        self.slots.release_reserved();
        self.quotas.iter().for_each(|quota| quota.release_reserved());
    }
}

impl Quota {
    /// Keeps the place of a session that has gone to another process.
    pub fn reserve_session(&self) {
        self.reserve(&self.sessions, 1);
    }

    /// Keeps so many more of these places, even beyond the limit.
    fn reserve(&self, slots: &Slots, count: usize) {
        if count > 0 && slots.reserve_more(count) == 0 {
            self.share.iter().for_each(|share| share.join());
        }
    }

    /// Gives back every place that is kept.
    fn release_reserved(&self) {
        for slots in [&self.sessions, &self.flows] {
            if slots.release_reserved() == Some(0) {
                self.share.iter().for_each(|share| share.part());
            }
        }
    }
}

impl Quotas {
    /// Gives back every place that is kept of any tenant.
    pub fn release_reserved(&self) {
        lock(&self.known).values().for_each(|quota| quota.release_reserved());
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{START, quota};
    use super::*;
    use crate::config::TenantLimits;
    use crate::outcome::Reason;

    #[test]
    fn reserved_slots_serve_taken_over_sessions_and_the_rest_is_released() {
        let slots = Slots::new(10);
        let quota = quota(TenantLimits { sessions: Some(2), flows: Some(1), ..TenantLimits::default() });
        let holders = || quota.share.as_ref().unwrap().holders();
        let kept = ReservedSlots::new(&slots, 4, vec![(Arc::clone(&quota), 2, 1)]);
        assert_eq!((slots.used(), slots.present(), quota.sessions(), quota.flows()), (4, 0, 0, 0));
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionLimit);
        assert_eq!(quota.admit_flow(|_| false).unwrap_err(), Reason::FlowLimit);
        assert_eq!(holders(), 2, "one for its sessions, one for its flows");
        let came = (slots.take_anyway(), quota.adopt(None));
        assert_eq!((slots.used(), slots.present(), quota.sessions(), holders()), (4, 1, 1, 2));
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionLimit);
        drop(kept);
        assert_eq!((slots.used(), quota.sessions(), holders()), (1, 1, 1));
        let new = quota.admit(START).unwrap();
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionLimit);
        drop((came, new));
        assert_eq!((slots.used(), quota.sessions(), quota.flows(), holders()), (0, 0, 0, 0));
    }
}
