//! Limits the log lines of rejections and strays: a few lines, and the count of the others.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::account::Label;
use crate::account::log_queue::LineClass;
use crate::admission::quota::{LINES_BURST, Quota};
use crate::admission::rate_limiter::RateLimiter;
use crate::clock::Moment;
use crate::config;
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::tenant::Tenant;

/// Tenants that one telling names; of the others it says how many there are.
const NAMED: usize = 20;

/// Suppressed access log lines that are not reported yet.
#[derive(Debug, Default)]
pub struct RejectionLog {
    unreported: RefCell<Vec<(Label, Arc<Quota>)>>,
}

/// The lines of one listener that tell of connections and datagrams whose tenant is not known: for each reason a few at
/// once, then so many in a second, over all workers. A flood of them is free to send, and must not fill the disk.
#[derive(Debug)]
pub struct StrayLogLimit(Box<[LogBucket]>);

#[derive(Debug, Default)]
struct LogBucket {
    rate: RateLimiter,
    left_out: AtomicU64,
}

/// As for the rejections of a tenant.
const STRAY_LINES: config::RateLimit =
    config::RateLimit { interval: Duration::from_millis(100), burst: LINES_BURST };

impl Default for StrayLogLimit {
    fn default() -> Self {
        let bucket = |_| {
            let bucket = LogBucket::default();
            bucket.rate.set(Some(STRAY_LINES));
            bucket
        };
        Self(Reason::ALL.iter().map(bucket).collect())
    }
}

impl StrayLogLimit {
    /// Whether one more has a line now, and how many had none before it.
    fn line(&self, why: Reason, now: Moment) -> Option<u64> {
        let bucket = self.0.get(why as usize)?;
        if bucket.rate.admit(now) {
            return Some(bucket.left_out.swap(0, Ordering::AcqRel));
        }
        bucket.left_out.fetch_add(1, Ordering::AcqRel);
        None
    }
}

/// The access log line of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// What it tells of.
    pub class: LineClass,
    /// How many of its kind had none before it.
    pub left_out: u64,
}

impl RejectionLog {
    /// The line of an end, which each has, but for a tenant's rejections, and a listener's strays, beyond so many in a
    /// second.
    ///
    /// # Errors
    /// It has none, and is of this class.
    pub fn line(
        &self,
        outcome: Outcome,
        tenant: Option<&Tenant>,
        strays: Option<&StrayLogLimit>,
        now: Moment,
    ) -> Result<LogLine, LineClass> {
        // A session of another process may have a tenant that is unknown here, and is no stray.
        let is_early = outcome.at <= EndedAt::Tenant;
        match (tenant, strays) {
            (None, Some(strays)) if is_early => {
                let class = LineClass::Stray;
                strays.line(outcome.why, now).map(|left_out| LogLine { class, left_out }).ok_or(class)
            }
            (Some(tenant), _) if outcome.by == EndedBy::Proxy && outcome.at == EndedAt::Tenant => {
                let class = LineClass::Rejection;
                match tenant.quota.has_line(now) {
                    Ok(()) => Ok(LogLine { class, left_out: tenant.quota.take_left_out() }),
                    Err(is_first) => {
                        if is_first {
                            let untold = (tenant.label.clone(), Arc::clone(&tenant.quota));
                            self.unreported.borrow_mut().push(untold);
                        }
                        Err(class)
                    }
                }
            }
            _ => Ok(LogLine { class: LineClass::Session, left_out: 0 }),
        }
    }

    /// Tells the process log what was left out and stands on no line yet. To be called once in a second or so.
    pub fn report_suppressed(&self) {
        let untold = self.unreported.take();
        let mut left_out = untold
            .iter()
            .map(|(tenant, quota)| (tenant, quota.take_left_out()))
            .filter(|(_, lines)| *lines > 0);
        for (tenant, lines) in left_out.by_ref().take(NAMED) {
            tracing::warn!(tenant = tenant.name(), lines, "access log lines of rejections suppressed");
        }
        let (tenants, lines) = left_out.fold((0, 0), |(tenants, sum), (_, lines)| (tenants + 1, sum + lines));
        if tenants > 0 {
            tracing::warn!(tenants, lines, "access log lines of rejections of more tenants suppressed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;

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

    const START: Moment = Moment::from_nanos(0);
    const LATER: Moment = Moment::from_nanos(100_000_000);

    fn line(class: LineClass, left_out: u64) -> LogLine {
        LogLine { class, left_out }
    }

    #[test]
    fn flood_of_rejections_logs_few_lines_and_one_count() {
        let (rejections, acme) = (RejectionLog::default(), tenant());
        let rejected = Outcome::reject(EndedAt::Tenant, Reason::SessionRate);
        let ask = |now| rejections.line(rejected, Some(&acme), Some(&StrayLogLimit::default()), now);
        let lines = (0..100).filter(|_| ask(START) == Ok(line(LineClass::Rejection, 0))).count();
        assert_eq!(u64::try_from(lines).unwrap(), LINES_BURST);
        assert_eq!(rejections.unreported.borrow().len(), 1, "noted once");
        assert_eq!((ask(LATER), ask(LATER)), (Ok(line(LineClass::Rejection, 80)), Err(LineClass::Rejection)));
        rejections.report_suppressed();
        assert_eq!((acme.quota.take_left_out(), rejections.unreported.borrow().len()), (0, 0));
    }

    #[test]
    fn flood_of_unidentified_sessions_logs_few_lines_per_reason_and_listener() {
        let rejections = RejectionLog::default();
        let [web, dns] = [(); 2].map(|()| StrayLogLimit::default());
        let ask = |strays, at, why, now| rejections.line(Outcome::reject(at, why), None, Some(strays), now);
        for (at, why) in [
            (EndedAt::Accept, Reason::Shed),
            (EndedAt::Accept, Reason::UntrustedSource),
            (EndedAt::Header, Reason::PendingLimit),
            (EndedAt::Header, Reason::NoSignature),
            (EndedAt::Tenant, Reason::UnknownEndpoint),
        ] {
            for strays in [&web, &dns] {
                let lines =
                    (0..100).filter(|_| ask(strays, at, why, START) == Ok(line(LineClass::Stray, 0))).count();
                assert_eq!(u64::try_from(lines).unwrap(), LINES_BURST, "{why:?}");
            }
            assert_eq!(ask(&web, at, why, LATER), Ok(line(LineClass::Stray, 80)), "{why:?}");
            assert_eq!(ask(&web, at, why, LATER), Err(LineClass::Stray), "{why:?}");
        }
    }

    #[test]
    fn every_other_outcome_is_logged() {
        let (rejections, acme, strays) = (RejectionLog::default(), tenant(), StrayLogLimit::default());
        let done = Outcome::new(EndedBy::Client, EndedAt::Forward, Reason::Done);
        let shed = Outcome::reject(EndedAt::Pool, Reason::NoBackend);
        for (outcome, tenant) in [(done, Some(&acme)), (shed, Some(&acme)), (done, None)] {
            let is_line =
                |_| rejections.line(outcome, tenant, Some(&strays), START) == Ok(line(LineClass::Session, 0));
            assert!((0..100).all(is_line), "{outcome}");
        }
        let left = Outcome::reject(EndedAt::Tenant, Reason::UnknownEndpoint);
        assert_eq!(rejections.line(left, None, None, START), Ok(line(LineClass::Session, 0)));
    }
}
