//! After a reload that may revoke endpoints, each session checks that it is still allowed.

use std::time::Duration;

use super::{LogContext, SessionWorker};
use crate::admission::quota::SessionPermit;
use crate::clock::Moment;
use crate::forward::Relay;
use crate::outcome::Outcome;

/// The least time from one visit of all sessions because of reloads to the next.
const VISIT_INTERVAL: Duration = Duration::from_millis(250);

impl SessionWorker {
    /// Lets go of a snapshot that is no more in force. Whether sessions are to be visited, because a reload may have taken
    /// their endpoint away from their tenant; at most once in `VISIT_INTERVAL`, however many reloads there are.
    pub fn renew(&self, now: Moment) -> bool {
        let revocations = self.context.with_snapshot(|snapshot| snapshot.revocations);
        let is_due = revocations != self.revocations.get() && now >= self.next_visit.get();
        if is_due {
            self.revocations.set(revocations);
            self.next_visit.set(now + VISIT_INTERVAL);
        }
        is_due
    }

    /// Checks whether a session's endpoint still belongs to its tenant; its end, where it does not.
    pub(super) fn check(
        &self,
        relay: &mut Relay<'_>,
        log_context: &LogContext<'_>,
        permit: &SessionPermit,
    ) -> Option<Outcome> {
        let [listener, tenant, _] = relay.session().metrics.labels();
        let is_admitted =
            self.context.with_snapshot(|snapshot| snapshot.admits(listener, log_context.endpoint, tenant));
        let grace = permit.quota().revocation().grace().filter(|_| !is_admitted);
        if grace.is_none() {
            relay.confirm();
        }
        grace.and_then(|grace| relay.revoke(grace))
    }
}
