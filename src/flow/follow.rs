//! A flow follows its pool: where its backend is no longer in use, the next datagram goes to one that is.
//!
//! A load balancer's flow lives as long as its client sends, so a flow that stayed with its backend would outlive the backend
//! by any time. The flow's socket is replaced with its backend: answers of the old backend that come later are not passed on.

use std::sync::Arc;
use std::time::Duration;

use super::life::{ConnectedBackend, Flow};
use super::search::{BackendSearch, PortOwner, blame};
use super::table::{FlowClient, FlowId};
use super::{FlowWorkerState, Poll};
use crate::account::meter::ConnectResult;
use crate::admission::ports::LocalPorts;
use crate::clock::Moment;
use crate::pool::{Pool, TriedBackends, pick};

/// The time from one search for a backend in use that found none to the next.
const SEARCH_AGAIN: Duration = Duration::from_millis(500);

impl<A> FlowWorkerState<A> {
    /// Moves a flow to a backend in use where its own is unhealthy, ejected, has weight 0, or is no longer in the pool. Where
    /// none is in use it stays.
    pub(super) fn follow_pool(&mut self, id: FlowId, poll: &Poll, now: Moment) {
        let Some((_, who, flow)) = self.table.find(id) else { return };
        if flow.picked.as_ref().is_some_and(|picked| picked.keeps_flows()) || now < flow.searches_at {
            return;
        }
        flow.searches_at = now + SEARCH_AGAIN;
        let Some(latest) = flow.story.pool().map(Pool::latest) else { return };
        if flow.stays_over_reload() {
            return;
        }
        let Some(found) = flow.search(&latest, who, &self.live.udp_ports, &mut self.rolls, now) else {
            return;
        };
        flow.move_to(found);
        (flow.is_answered, flow.first, flow.searches_at) = (false, None, Moment::default());
        self.watch(id, poll, now);
    }
}

impl<A> Flow<A> {
    /// Whether a reload has replaced its pool, and its backend's address is in use there: it is counted there from now on.
    fn stays_over_reload(&mut self) -> bool {
        let Some(picked) = self.picked.as_ref().filter(|picked| picked.is_retired()) else { return false };
        let heir = self.story.pool().and_then(|pool| pool.heir_of(picked.backend()));
        let Some((_, heir)) = heir.filter(|(_, heir)| heir.keeps_flows()) else { return false };
        self.picked = Some(picked.follow(&heir));
        self.tried = TriedBackends::default();
        self.searches_at = Moment::default();
        true
    }

    /// Another backend, which is in use, and a socket to it.
    fn search(
        &mut self,
        pool: &Arc<Pool>,
        who: FlowClient,
        ports: &LocalPorts,
        rolls: &mut fastrand::Rng,
        now: Moment,
    ) -> Option<ConnectedBackend> {
        let key = pool.key(|| pick::by_client(who.client), || pick::by_endpoint(who.endpoint, who.client));
        let mut tried = TriedBackends::default();
        let tenant = self.story.tenant_number();
        let picked = pool.pick_again(tenant, key, rolls.u64(..), &mut tried).ok();
        let picked = picked.filter(|picked| picked.keeps_flows())?;
        match BackendSearch::new(pool, who, (ports, PortOwner::Holder(&self.port)), rolls, now)
            .connect(&picked)
        {
            Ok((socket, port)) => {
                self.story.meter.leave();
                self.story.meter.assume(picked.label());
                Some(ConnectedBackend { socket, port, picked: Some(picked), tried, attempts: 1 })
            }
            Err(result) => {
                self.story.meter.failed(picked.label(), result);
                if !matches!(result, ConnectResult::NoLocalPort | ConnectResult::Shortage) {
                    blame(pool, &picked, now);
                }
                None
            }
        }
    }
}
