//! Flows whose endpoint no longer belongs to their tenant.

use std::time::Duration;

use super::table::FlowId;
use super::{FlowWorker, FlowWorkerState};
use crate::clock::Moment;
use crate::outcome::{EndedAt, Outcome, Reason};

impl<A> FlowWorker<A> {
    /// Ends every flow whose endpoint a reload has taken away from its tenant, at once or after the tenant's grace.
    pub fn visit(&self, now: Moment) {
        let mut state = self.state.borrow_mut();
        for id in state.table.ids() {
            state.check(id, now);
        }
    }
}

impl<A> FlowWorkerState<A> {
    /// Ends a flow whose endpoint is no longer its tenant's, now or once its grace is over.
    pub(super) fn check(&mut self, id: FlowId, now: Moment) {
        let snapshot = self.context.snapshot();
        let Some((_, flow_client, flow)) = self.table.find(id) else { return };
        let [listener, tenant, _] = flow.log_context.metrics.labels();
        let is_admitted = snapshot.admits(listener, flow_client.endpoint, tenant);
        match flow.permit.quota().revocation().grace().filter(|_| !is_admitted) {
            None => drop(self.revoked.remove(&id)),
            Some(Duration::ZERO) => self.revoke(id, now),
            Some(grace) => {
                let ends = *self.revoked.entry(id).or_insert(now + grace);
                if ends <= now {
                    self.revoke(id, now);
                }
            }
        }
    }

    fn revoke(&mut self, id: FlowId, now: Moment) {
        self.revoked.remove(&id);
        self.end(id, Outcome::reject(EndedAt::Forward, Reason::Revoked), now);
    }

    /// Ends the flows whose grace is over.
    pub(super) fn end_revoked(&mut self, now: Moment) {
        let due: Vec<_> = self.revoked.iter().filter(|(_, ends)| **ends <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.check(id, now);
            self.revoked.remove(&id);
        }
    }
}
