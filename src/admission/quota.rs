//! The limits of one tenant and their usage, found again by name after a reload.

mod flows;
mod reserved;
mod stalled;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::bandwidth::BandwidthBudget;
use super::rate_limiter::RateLimiter;
use super::session_share::SessionShare;
use super::slots::Slots;
use crate::account::{Direction, Label, PerDirection, lock};
use crate::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::clock::Moment;
use crate::config::{LimitMode, OnRevoke, TenantConfig, TenantLimits};
use crate::outcome::Reason;

pub use self::flows::{DatagramVerdict, EvictionScope, ExceededLimit, FlowPermit};
pub use self::reserved::{HeldSlots, ReservedSlots};

/// One tenant's limits and what is in use of them.
///
/// The limits live here and not in the snapshot, so that a reload reaches sessions that were born before it.
#[derive(Debug, Default)]
pub struct Quota {
    sessions: Slots,
    rate: RateLimiter,
    flows: Slots,
    datagrams: RateLimiter,
    budgets: PerDirection<BandwidthBudget>,
    /// Splice pipes that its sessions hold.
    pub pipes: AtomicU32,
    /// KiB that its sessions have read and that their other ends have not taken, beside those in pipes.
    pub buffered: AtomicU32,
    /// Pages of 4 KiB in the kernel's socket queues of those sessions, as last seen.
    pub queued: AtomicU32,
    /// How its sessions end once they are revoked, as a [`RevokePolicy`].
    revocation: AtomicU16,
    observing: AtomicBool,
    limited: AtomicBool,
    share: Option<Arc<SessionShare>>,
    rejected: [AtomicU64; Quota::REASONS.len()],
    would_reject: [AtomicU64; Quota::OBSERVED],
    /// The bucket of the lines that tell of rejections.
    lines_full_at: AtomicU32,
    left_out: AtomicU32,
}

/// What happens to a session or a flow whose tenant is removed or disabled, or whose endpoint no longer belongs to the
/// tenant: it ends after so many tenths of a second, or never. By default it ends at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokePolicy(u16);

impl RevokePolicy {
    /// It continues until it ends by itself.
    pub const KEEP: Self = Self(u16::MAX);

    const UNIT: Duration = Duration::from_millis(100);

    /// Ends sessions after this grace, rounded up; after an hour and three quarters at the latest.
    #[must_use]
    pub fn end_after(grace: Duration) -> Self {
        let units = grace.as_millis().div_ceil(Self::UNIT.as_millis());
        Self(u16::try_from(units).unwrap_or(u16::MAX).min(u16::MAX - 1))
    }

    /// The grace; `None` if sessions continue.
    #[must_use]
    pub fn grace(self) -> Option<Duration> {
        (self != Self::KEEP).then(|| Self::UNIT * u32::from(self.0))
    }
}

impl From<&TenantConfig> for RevokePolicy {
    fn from(tenant: &TenantConfig) -> Self {
        match tenant.on_revoke {
            OnRevoke::End => Self::end_after(tenant.revoke_grace),
            OnRevoke::Keep => Self::KEEP,
        }
    }
}

/// Lines of the access log that tell of one tenant's rejections: so many in a second ...
const LINES_INTERVAL: u64 = 100_000_000;
/// ... and so many at once.
pub const LINES_BURST: u64 = 20;

impl Quota {
    /// The reasons for which a tenant's session or flow is rejected; the first three may be only observed.
    pub const REASONS: [Reason; 5] =
        [Reason::SessionLimit, Reason::SessionRate, Reason::FlowLimit, Reason::Shed, Reason::TenantDisabled];
    const OBSERVED: usize = 3;

    /// The quota of a tenant without limits, that has a share of the process.
    #[must_use]
    pub fn new(share: Arc<SessionShare>) -> Arc<Self> {
        Arc::new(Self { share: Some(share), ..Self::default() })
    }

    /// Sets the limits from `now` on. Existing usage stays.
    pub fn set(&self, limits: &TenantLimits, now: Moment) {
        let none = TenantLimits { mode: limits.mode, ..TenantLimits::default() };
        self.observing.store(limits.mode == LimitMode::Observe, Ordering::Relaxed);
        self.limited.store(*limits != none, Ordering::Relaxed);
        self.sessions.set_limit(limits.sessions.unwrap_or(Slots::UNLIMITED));
        self.rate.set(limits.session_rate);
        self.flows.set_limit(limits.flows.unwrap_or(Slots::UNLIMITED));
        self.datagrams.set(limits.datagram_rate);
        self.budgets.to_backend.set(limits.to_backend, now);
        self.budgets.to_client.set(limits.to_client, now);
    }

    /// From now on this happens to sessions and flows that are revoked. It outlives the tenant as long as they live.
    pub fn set_revocation(&self, revocation: RevokePolicy) {
        self.revocation.store(revocation.0, Ordering::Relaxed);
    }

    /// What happens to a session or a flow that is revoked.
    #[must_use]
    pub fn revocation(&self) -> RevokePolicy {
        RevokePolicy(self.revocation.load(Ordering::Relaxed))
    }

    /// Admits one more session. The rate is checked last: a session that is rejected for another reason takes
    /// nothing of it.
    ///
    /// # Errors
    /// Why not; nothing is held then.
    pub fn admit(self: &Arc<Self>, now: Moment) -> Result<SessionPermit, Reason> {
        let (held, mut beyond) = match self.sessions.enter() {
            Ok(held) => (held, None),
            Err(_) if self.is_observing() => (self.sessions.enter_anyway(), Some(Reason::SessionLimit)),
            Err(_) => return Err(self.reject(Reason::SessionLimit)),
        };
        if held == 0 {
            self.share.iter().for_each(|share| share.join());
        }
        let mut permit = SessionPermit { quota: Arc::clone(self), would_reject: None };
        // Observe mode applies to the tenant's own limits. The limit of the process is enforced for every tenant.
        if self.share.as_ref().is_some_and(|share| !share.allows(held + self.flows.used())) {
            return Err(self.reject(Reason::Shed));
        }
        if beyond.is_none() && !self.rate.admit(now) {
            if !self.is_observing() {
                return Err(self.reject(Reason::SessionRate));
            }
            beyond = Some(Reason::SessionRate);
        }
        if let Some(why) = beyond {
            add(&self.would_reject, why);
            permit.would_reject = beyond;
        }
        Ok(permit)
    }

    /// Adopts a session that another process has admitted, regardless of the limits, and nothing is taken of the
    /// rate. It has a place that is kept, where there is one.
    pub fn adopt(self: &Arc<Self>, would_reject: Option<Reason>) -> SessionPermit {
        if self.sessions.enter_reserved() {
            self.share.iter().for_each(|share| share.join());
        }
        SessionPermit { quota: Arc::clone(self), would_reject }
    }

    /// Counts a rejection, and returns the reason.
    pub fn reject(&self, why: Reason) -> Reason {
        add(&self.rejected, why);
        why
    }

    /// Whether there is any limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Whether the limits are in observe mode.
    #[must_use]
    pub fn is_observing(&self) -> bool {
        self.observing.load(Ordering::Relaxed)
    }

    /// Sessions now.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.present()
    }

    /// Sessions at most.
    #[must_use]
    pub fn sessions_limit(&self) -> Option<usize> {
        Some(self.sessions.limit()).filter(|limit| *limit != Slots::UNLIMITED)
    }

    /// The bytes of one direction.
    #[must_use]
    pub fn budget(&self, direction: Direction) -> &BandwidthBudget {
        self.budgets.of(direction)
    }

    /// Rejected sessions by reason.
    pub fn rejected(&self) -> impl Iterator<Item = (Reason, u64)> {
        Self::REASONS.into_iter().zip(self.rejected.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Sessions that would have been rejected in enforce mode, by reason.
    pub fn would_reject(&self) -> impl Iterator<Item = (Reason, u64)> {
        Self::REASONS.into_iter().zip(self.would_reject.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Whether a rejection is logged in the access log: the first few are, then so many in a second.
    ///
    /// # Errors
    /// It has not, and is counted as left out. Tells whether it is the first of those.
    pub fn has_line(&self, now: Moment) -> Result<(), bool> {
        // Counted in intervals since the process started; 32 bits overflow after 13 years.
        let now = u32::try_from(now.as_nanos() / LINES_INTERVAL).unwrap_or(u32::MAX);
        let one_more = |full_at: u32| {
            let from = full_at.max(now);
            (u64::from(from - now) < LINES_BURST).then(|| from.saturating_add(1))
        };
        let taken = self.lines_full_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more);
        taken.map(drop).map_err(|_| self.left_out.fetch_add(1, Ordering::AcqRel) == 0)
    }

    /// Returns the suppressed lines since the last call.
    #[must_use]
    pub fn take_left_out(&self) -> u64 {
        u64::from(self.left_out.swap(0, Ordering::AcqRel))
    }
}

fn add(counts: &[AtomicU64], why: Reason) {
    let place = Quota::REASONS.iter().position(|reason| *reason == why);
    if let Some(count) = place.and_then(|place| counts.get(place)) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// The admission of one session of a tenant, released on drop.
#[derive(Debug)]
pub struct SessionPermit {
    quota: Arc<Quota>,
    would_reject: Option<Reason>,
}

impl SessionPermit {
    /// The tenant's quota.
    #[must_use]
    pub fn quota(&self) -> &Arc<Quota> {
        &self.quota
    }

    /// The reason for which it would have been rejected in enforce mode.
    #[must_use]
    pub fn would_reject(&self) -> Option<Reason> {
        self.would_reject
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        if self.quota.sessions.leave() == 0 {
            self.quota.share.iter().for_each(|share| share.part());
        }
    }
}

/// Every tenant's quota, by the number of its label.
#[derive(Debug)]
pub struct Quotas {
    share: Arc<SessionShare>,
    known: Mutex<HashMap<u32, Arc<Quota>, foldhash::fast::RandomState>>,
}

impl Quotas {
    /// None yet; all will share these slots of the process.
    #[must_use]
    pub fn new(slots: Arc<Slots>) -> Self {
        Self { share: SessionShare::new(slots), known: Mutex::default() }
    }

    /// The quota of a tenant, new or known.
    #[must_use]
    pub fn find(&self, tenant: &Label) -> Arc<Quota> {
        let mut known = lock(&self.known);
        let new = || Quota::new(Arc::clone(&self.share));
        Arc::clone(known.entry(tenant.serial()).or_insert_with(new))
    }

    /// The quota of a tenant that has one.
    #[must_use]
    pub fn known(&self, tenant: &Label) -> Option<Arc<Quota>> {
        lock(&self.known).get(&tenant.serial()).map(Arc::clone)
    }

    /// Whether there is a quota by this number: until it is forgotten, the number must not be given to another tenant.
    #[must_use]
    pub fn is_known(&self, number: u32) -> bool {
        lock(&self.known).contains_key(&number)
    }

    /// Tenants that hold a session now.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.share.holders()
    }

    /// Drops the quotas of removed tenants without sessions.
    pub fn forget_unused(&self) {
        let mut known = lock(&self.known);
        known.retain(|_, quota| Arc::strong_count(quota) > 1);
        known.shrink_to_fit();
    }

    /// The number of known ones.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.known).len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::account::Labels;
    use crate::config;

    pub(super) const START: Moment = Moment::from_nanos(0);

    pub(super) fn at_ms(ms: u64) -> Moment {
        START + Duration::from_millis(ms)
    }

    pub(super) fn quota(limits: TenantLimits) -> Arc<Quota> {
        let quota = Quota::new(SessionShare::new(Slots::new(1_000_000)));
        quota.set(&limits, START);
        quota
    }

    pub(super) fn rate(ms: u64, burst: u64) -> config::RateLimit {
        config::RateLimit { interval: Duration::from_millis(ms), burst }
    }

    pub(super) fn counts(reasons: impl Iterator<Item = (Reason, u64)>) -> Vec<u64> {
        reasons.map(|(_, count)| count).collect()
    }

    #[test]
    fn session_limit_rejects_first_and_uses_no_rate() {
        let quota = quota(TenantLimits {
            sessions: Some(1),
            session_rate: Some(rate(100, 2)),
            ..TenantLimits::default()
        });
        assert!(quota.is_limited());
        let first = quota.admit(START).unwrap();
        for _ in 0..10 {
            assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionLimit);
        }
        drop(first);
        assert_eq!((quota.sessions(), quota.sessions_limit()), (0, Some(1)));
        drop(quota.admit(START).unwrap());
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionRate);
        assert_eq!(quota.sessions(), 0, "who the rate rejects gives its slot back");
        assert!(quota.admit(at_ms(100)).is_ok());
        assert_eq!(counts(quota.rejected()), [10, 1, 0, 0, 0]);
        assert_eq!(counts(quota.would_reject()), [0, 0, 0]);
    }

    #[test]
    fn session_that_is_shed_takes_nothing_of_the_rate() {
        let slots = Slots::new(10);
        let quota = Quota::new(SessionShare::new(Arc::clone(&slots)));
        quota.set(&TenantLimits { session_rate: Some(rate(1_000, 1)), ..TenantLimits::default() }, START);
        let held: Vec<_> = (0..9).map(|_| (slots.take().unwrap(), quota.adopt(None))).collect();
        let tenth = slots.take().unwrap();
        for _ in 0..3 {
            assert_eq!(quota.admit(START).unwrap_err(), Reason::Shed);
        }
        drop((held, tenth));
        let _slot = slots.take().unwrap();
        assert!(quota.admit(START).is_ok(), "the rate has its one still");
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionRate);
        assert_eq!(counts(quota.rejected()), [0, 1, 0, 3, 0]);
    }

    #[test]
    fn taken_over_session_is_counted_beyond_the_limit_and_uses_no_rate() {
        let limits = TenantLimits {
            sessions: Some(1),
            session_rate: Some(rate(100, 1)),
            flows: Some(0),
            ..TenantLimits::default()
        };
        let quota = quota(limits);
        let moved = [0; 3].map(|_| quota.adopt(Some(Reason::SessionRate)));
        let flow = quota.adopt_flow(false);
        assert_eq!(
            (quota.sessions(), quota.flows(), moved[0].would_reject()),
            (3, 1, Some(Reason::SessionRate))
        );
        assert_eq!(quota.admit(START).unwrap_err(), Reason::SessionLimit);
        assert_eq!(quota.share.as_ref().unwrap().holders(), 2, "one for its sessions, one for its flows");
        drop((moved, flow));
        assert_eq!((quota.sessions(), quota.flows(), quota.share.as_ref().unwrap().holders()), (0, 0, 0));
        assert!(quota.admit(START).is_ok(), "the rate has its one still");
        assert_eq!((counts(quota.rejected())[0], counts(quota.would_reject())), (1, vec![0, 0, 0]));
    }

    #[test]
    fn observe_mode_counts_and_admits() {
        let limits = TenantLimits {
            mode: LimitMode::Observe,
            sessions: Some(1),
            session_rate: Some(rate(100, 2)),
            ..TenantLimits::default()
        };
        let quota = quota(limits);
        let first = quota.admit(START).unwrap();
        assert_eq!(first.would_reject(), None);
        let second = quota.admit(START).unwrap();
        assert_eq!(second.would_reject(), Some(Reason::SessionLimit));
        assert_eq!(second.quota().sessions(), 2);
        drop((first, second));
        let passed: Vec<_> = (0..3).map(|_| quota.admit(START).unwrap().would_reject()).collect();
        assert_eq!(passed, [None, Some(Reason::SessionRate), Some(Reason::SessionRate)]);
        assert_eq!(counts(quota.would_reject()), [1, 2, 0]);
        assert_eq!(counts(quota.rejected()), [0, 0, 0, 0, 0]);
        assert_eq!(quota.sessions(), 0);
    }

    #[test]
    fn tenant_is_a_holder_from_its_first_session_to_its_last() {
        let slots = Slots::new(10);
        let (quotas, labels) = (Quotas::new(Arc::clone(&slots)), Labels::default());
        let [acme, globex] = ["acme", "globex"].map(|name| quotas.find(&labels.intern(name)));
        let held: Vec<_> = (0..7).map(|_| (slots.take().unwrap(), acme.admit(START).unwrap())).collect();
        assert_eq!(quotas.holders(), 1);
        let slot = slots.take().unwrap();
        assert_eq!(acme.admit(START).unwrap_err(), Reason::Shed);
        let other = globex.admit(START).unwrap();
        assert_eq!((quotas.holders(), globex.sessions()), (2, 1));
        drop((held, other, slot));
        assert_eq!(quotas.holders(), 0);
        assert_eq!(counts(acme.rejected()), [0, 0, 0, 1, 0]);
    }

    #[test]
    fn quota_is_kept_while_a_session_holds_it() {
        let (quotas, labels) = (Quotas::new(Slots::new(10)), Labels::default());
        let acme = labels.intern("acme");
        let permit = quotas.find(&acme).admit(START).unwrap();
        quotas.forget_unused();
        assert_eq!((quotas.count(), quotas.find(&acme).sessions()), (1, 1));
        drop(permit);
        quotas.forget_unused();
        assert_eq!(quotas.count(), 0);
    }

    #[test]
    fn few_of_many_rejections_are_logged_and_the_rest_counted() {
        let quota = Quota::default();
        let lines = (0..100).filter(|_| quota.has_line(START).is_ok()).count();
        assert_eq!(u64::try_from(lines).unwrap(), LINES_BURST);
        assert_eq!(quota.has_line(START), Err(false));
        assert_eq!((quota.take_left_out(), quota.take_left_out()), (81, 0));
        assert_eq!(quota.has_line(START), Err(true), "the first since it was told");
        assert_eq!(quota.has_line(at_ms(100)), Ok(()));
    }

    #[test]
    fn panic_releases_held_slots() {
        let quota = quota(TenantLimits::default());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _permit = quota.admit(START).unwrap();
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert_eq!((quota.sessions(), quota.is_limited(), quota.sessions_limit()), (0, false, None));
        assert!(!quota.budget(Direction::ToClient).is_limited());
    }

    #[test]
    fn quota_is_small() {
        // With the counts of its Arc, the allocator gives it 320.
        assert!(size_of::<Quota>() <= 304, "{}", size_of::<Quota>());
    }
}
