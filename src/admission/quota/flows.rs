//! What a tenant's flows may take: so many at once, so many datagrams, and the bytes that its sessions have, too.

use std::sync::Arc;

use super::{Quota, Slots, add};
use crate::account::Direction;
use crate::clock::Moment;
use crate::outcome::Reason;

impl Quota {
    /// Admits one more flow. Where there is no room `make_room` is asked to end a silent one, and tells whether it did: one of
    /// the tenant's own at its limit, any where the process has none for it and it holds less than an equal share. It is not
    /// asked where the new one would be shed all the same.
    ///
    /// # Errors
    /// Why not; nothing is held then.
    pub fn admit_flow(
        self: &Arc<Self>,
        mut make_room: impl FnMut(EvictionScope) -> bool,
    ) -> Result<FlowPermit, Reason> {
        let mut replaces = false;
        let entered = match self.flows.enter() {
            Err(held) if !self.is_observing() && self.may_have(held.saturating_sub(1)) => {
                replaces = make_room(EvictionScope::OfTenant);
                self.flows.enter()
            }
            entered => entered,
        };
        let (held, beyond) = match entered {
            Ok(held) => (held, false),
            Err(_) if self.is_observing() => (self.flows.enter_anyway(), true),
            Err(_) => return Err(self.reject(Reason::FlowLimit)),
        };
        if held == 0 {
            self.share.iter().for_each(|share| share.join());
        }
        let permit = FlowPermit { quota: Arc::clone(self), beyond };
        let fits = replaces
            || self.has_share(held)
            || (self.has_equal_share(held) && make_room(EvictionScope::OfProcess));
        if !fits {
            return Err(self.reject(Reason::Shed));
        }
        if beyond {
            add(&self.would_reject, Reason::FlowLimit);
        }
        Ok(permit)
    }

    /// Adopts a flow that another process has admitted, regardless of the limits. It has a slot that is kept, where
    /// there is one.
    pub fn adopt_flow(self: &Arc<Self>, beyond: bool) -> FlowPermit {
        if self.flows.enter_reserved() {
            self.share.iter().for_each(|share| share.join());
        }
        FlowPermit { quota: Arc::clone(self), beyond }
    }

    /// Whether the process has room for one more beside so many flows. Its sessions take room, too.
    fn has_share(&self, flows: usize) -> bool {
        self.share.as_ref().is_none_or(|share| share.allows(flows + self.sessions.used()))
    }

    /// Whether it holds less than an equal share of the process.
    fn has_equal_share(&self, flows: usize) -> bool {
        self.share.as_ref().is_none_or(|share| share.is_equal(flows + self.sessions.used()))
    }

    /// Whether one more beside so many flows has a place, or the place of another one.
    fn may_have(&self, flows: usize) -> bool {
        self.has_share(flows) || self.has_equal_share(flows)
    }

    /// Whether one datagram of so many bytes may pass now. Datagrams do not wait: one beyond a limit is dropped and
    /// uses nothing.
    pub fn pass(&self, direction: Direction, bytes: u64, now: Moment) -> DatagramVerdict {
        let budget = self.budget(direction);
        let excess = if !budget.take_whole(bytes, now) {
            ExceededLimit::Bandwidth
        } else if !self.datagrams.admit(now) {
            budget.give_back(bytes);
            ExceededLimit::Rate
        } else {
            return DatagramVerdict::Free;
        };
        if self.is_observing() { DatagramVerdict::Observed(excess) } else { DatagramVerdict::Dropped(excess) }
    }

    /// Flows now.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.flows.present()
    }

    /// Flows at most.
    #[must_use]
    pub fn flows_limit(&self) -> Option<usize> {
        Some(self.flows.limit()).filter(|limit| *limit != Slots::UNLIMITED)
    }
}

/// Which flows may be evicted for a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictionScope {
    /// The tenant's own.
    OfTenant,
    /// Any tenant's.
    OfProcess,
}

/// The verdict of the tenant's limits on a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramVerdict {
    /// It passes.
    Free,
    /// It passes, and would not, were the limits not only observed.
    Observed(ExceededLimit),
    /// It is dropped.
    Dropped(ExceededLimit),
}

/// The limit that a datagram exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExceededLimit {
    /// `datagram-rate`.
    Rate,
    /// `to-backend` or `to-client`.
    Bandwidth,
}

/// The admission of one flow of a tenant, released on drop.
#[derive(Debug)]
pub struct FlowPermit {
    quota: Arc<Quota>,
    beyond: bool,
}

impl FlowPermit {
    /// The tenant's quota.
    #[must_use]
    pub fn quota(&self) -> &Arc<Quota> {
        &self.quota
    }

    /// The reason for which it would have been rejected in enforce mode.
    #[must_use]
    pub fn would_reject(&self) -> Option<Reason> {
        self.beyond.then_some(Reason::FlowLimit)
    }
}

impl Drop for FlowPermit {
    fn drop(&mut self) {
        if self.quota.flows.leave() == 0 {
            self.quota.share.iter().for_each(|share| share.part());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::SessionShare;
    use super::super::tests::{START, at_ms, counts, quota, rate};
    use super::*;
    use crate::config::{self, LimitMode, TenantLimits};

    #[test]
    fn last_flow_within_the_limit_is_admitted_and_the_next_is_not() {
        let quota = quota(TenantLimits { flows: Some(2), ..TenantLimits::default() });
        let first = quota.admit_flow(|_| false).unwrap();
        let second = quota.admit_flow(|_| false).unwrap();
        assert_eq!(quota.admit_flow(|_| false).unwrap_err(), Reason::FlowLimit);
        let mut second = Some(second);
        let third = quota.admit_flow(|_| second.take().is_some()).unwrap();
        assert_eq!(third.would_reject(), None);
        assert!(second.is_none(), "the second has made room");
        assert!(quota.admit(START).is_ok(), "sessions have a limit of their own");
        drop(first);
        assert_eq!(
            (quota.flows(), quota.flows_limit(), quota.admit_flow(|_| false).is_ok()),
            (1, Some(2), true)
        );
        quota.set(
            &TenantLimits { mode: LimitMode::Observe, flows: Some(1), ..TenantLimits::default() },
            START,
        );
        assert_eq!(quota.admit_flow(|_| false).unwrap().would_reject(), Some(Reason::FlowLimit));
        assert_eq!(
            (counts(quota.rejected()), counts(quota.would_reject())),
            (vec![0, 0, 1, 0, 0], vec![0, 0, 1])
        );
    }

    #[test]
    fn silent_flow_of_another_tenant_ends_for_one_below_its_equal_share() {
        let slots = Slots::new(12);
        let share = SessionShare::new(Arc::clone(&slots));
        let [acme, globex] = [0; 2].map(|_| Quota::new(Arc::clone(&share)));
        let mut greedy: Vec<_> =
            (0..9).map(|_| (slots.take().unwrap(), acme.admit_flow(|_| false).unwrap())).collect();
        let mut own: Vec<_> = (0..2).map(|_| (slots.take().unwrap(), globex.admit_flow(|_| false))).collect();
        assert!(own.iter().map(|(_, flow)| flow.is_ok()).eq([true, false]), "the reserve");
        own.pop();
        let slot = slots.take().unwrap();
        let mut asked = Vec::new();
        let mut end_one = |room| {
            asked.push(room);
            greedy.pop().is_some()
        };
        own.push((slot, globex.admit_flow(&mut end_one)));
        assert!(own.iter().all(|(_, flow)| flow.is_ok()));
        let slot = slots.take().unwrap();
        assert_eq!(acme.admit_flow(&mut end_one).unwrap_err(), Reason::Shed, "it holds more than its share");
        drop(slot);
        // At its own limit a tenant ends one of its own, and no other.
        globex.set(&TenantLimits { flows: Some(2), ..TenantLimits::default() }, START);
        assert_eq!(
            globex.admit_flow(|room| room == EvictionScope::OfProcess).unwrap_err(),
            Reason::FlowLimit
        );
        let third = globex.admit_flow(|room| {
            assert_eq!(room, EvictionScope::OfTenant);
            own.pop().is_some()
        });
        assert!(third.is_ok());
        assert_eq!((asked, greedy.len()), (vec![EvictionScope::OfProcess], 8));
    }

    #[test]
    fn last_datagram_within_the_limit_passes_and_the_next_uses_nothing() {
        let bandwidth = |bytes_per_second, burst| Some(config::BandwidthLimit { bytes_per_second, burst });
        let limits = TenantLimits {
            datagram_rate: Some(rate(100, 3)),
            to_backend: bandwidth(100_000, 1_000),
            ..TenantLimits::default()
        };
        let quota = quota(limits);
        let pass = |direction, bytes, now| quota.pass(direction, bytes, now);
        let (there, back) = (Direction::ToBackend, Direction::ToClient);
        // What two ticks bring is kept, however small the burst.
        assert_eq!(pass(there, 9_000, START), DatagramVerdict::Free);
        assert_eq!(pass(there, 1_001, START), DatagramVerdict::Dropped(ExceededLimit::Bandwidth));
        assert_eq!(pass(there, 1_000, START), DatagramVerdict::Free);
        assert_eq!(pass(back, 60_000, START), DatagramVerdict::Free, "the other way has no bandwidth");
        for _ in 0..10 {
            assert_eq!(pass(back, 1, START), DatagramVerdict::Dropped(ExceededLimit::Rate));
        }
        assert_eq!(pass(back, 1, at_ms(100)), DatagramVerdict::Free);
        assert_eq!(
            pass(there, 10_000, at_ms(200)),
            DatagramVerdict::Free,
            "those that were dropped took nothing"
        );
        quota.set(&TenantLimits { mode: LimitMode::Observe, ..limits }, at_ms(200));
        assert_eq!(pass(there, 1, at_ms(200)), DatagramVerdict::Observed(ExceededLimit::Bandwidth));
    }

    #[test]
    fn datagram_longer_than_the_burst_passes_a_full_bucket() {
        let bandwidth = Some(config::BandwidthLimit { bytes_per_second: 10_000, burst: 1_000 });
        let quota = quota(TenantLimits { to_client: bandwidth, ..TenantLimits::default() });
        let pass = |now| quota.pass(Direction::ToClient, 20_000, now);
        assert_eq!(
            (pass(START), pass(at_ms(1_999))),
            (DatagramVerdict::Free, DatagramVerdict::Dropped(ExceededLimit::Bandwidth))
        );
        assert_eq!(pass(at_ms(2_000)), DatagramVerdict::Free);
    }
}
