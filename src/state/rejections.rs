//! Rejections in the logs: a flood of them has a few lines, and the count of the others.

use std::cell::RefCell;
use std::sync::Arc;

use crate::account::Label;
use crate::admission::quota::Quota;
use crate::clock::Moment;
use crate::outcome::{At, By, Outcome};
use crate::tenant::Tenant;

/// Tenants that one telling names; of the others it says how many there are.
const NAMED: usize = 20;

/// What a worker has left out of the access log and not told yet.
#[derive(Debug, Default)]
pub struct Rejections {
    untold: RefCell<Vec<(Label, Arc<Quota>)>>,
}

impl Rejections {
    /// Whether a session's end has its line: each has, but for a tenant's rejections beyond so many in a second. Tells
    /// how many were left out before this one; `None` where this one is, too.
    #[must_use]
    pub fn line(&self, outcome: Outcome, tenant: Option<&Tenant>, now: Moment) -> Option<u64> {
        let rejected = outcome.by == By::Proxy && outcome.at == At::Tenant;
        let Some(tenant) = tenant.filter(|_| rejected) else { return Some(0) };
        match tenant.quota.has_line(now) {
            Ok(()) => Some(tenant.quota.take_left_out()),
            Err(is_first) => {
                if is_first {
                    self.untold.borrow_mut().push((tenant.label.clone(), Arc::clone(&tenant.quota)));
                }
                None
            }
        }
    }

    /// Tells the process log what was left out and stands on no line yet. To be called once in a second or so.
    pub fn tell(&self) {
        let untold = self.untold.take();
        let mut left_out = untold
            .iter()
            .map(|(tenant, quota)| (tenant, quota.take_left_out()))
            .filter(|(_, lines)| *lines > 0);
        for (tenant, lines) in left_out.by_ref().take(NAMED) {
            tracing::warn!(tenant = tenant.name(), lines, "rejections were left out of the access log");
        }
        let (tenants, lines) = left_out.fold((0, 0), |(tenants, sum), (_, lines)| (tenants + 1, sum + lines));
        if tenants > 0 {
            tracing::warn!(tenants, lines, "rejections of more tenants were left out of the access log");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;
    use crate::admission::quota::LINES_BURST;
    use crate::outcome::Why;

    fn tenant() -> Tenant {
        Tenant {
            label: Labels::default().intern("acme"),
            labels: None,
            enabled: true,
            pool: None,
            routes: Box::default(),
            quota: Arc::default(),
        }
    }

    #[test]
    fn a_flood_has_a_few_lines_and_the_rest_is_told_once() {
        let (rejections, acme, start) = (Rejections::default(), tenant(), Moment::from_nanos(0));
        let rejected = Outcome::reject(At::Tenant, Why::SessionRate);
        let line = |now| rejections.line(rejected, Some(&acme), now);
        let lines = (0..100).filter(|_| line(start) == Some(0)).count();
        assert_eq!(u64::try_from(lines).unwrap(), LINES_BURST);
        assert_eq!(rejections.untold.borrow().len(), 1, "noted once");
        let later = Moment::from_nanos(100_000_000);
        assert_eq!((line(later), line(later)), (Some(80), None));
        rejections.tell();
        assert_eq!((acme.quota.take_left_out(), rejections.untold.borrow().len()), (0, 0));
    }

    #[test]
    fn every_other_end_has_its_line() {
        let (rejections, acme, start) = (Rejections::default(), tenant(), Moment::from_nanos(0));
        let done = Outcome::new(By::Client, At::Forward, Why::Done);
        let empty = Outcome::reject(At::Pool, Why::NoBackend);
        let unknown = Outcome::reject(At::Tenant, Why::UnknownEndpoint);
        assert!((0..100).all(|_| rejections.line(done, Some(&acme), start) == Some(0)));
        assert!((0..100).all(|_| rejections.line(empty, Some(&acme), start) == Some(0)));
        assert!((0..100).all(|_| rejections.line(unknown, None, start) == Some(0)));
    }
}
