//! A flow follows its pool: where its backend is no longer in use, the next datagram goes to one that is.
//!
//! A load balancer's flow lives as long as its client sends, so a flow that stayed with its backend would outlive the backend
//! by any time. The flow's socket is replaced with its backend: answers of the old backend that come later are not passed on.

use std::sync::Arc;
use std::time::Duration;

use super::entry::{ConnectedBackend, Flow};
use super::search::{BackendSearch, PortOwner, report_failure};
use super::table::{FlowClient, FlowId};
use super::{FlowWorkerState, Poll};
use crate::account::session_metrics::ConnectResult;
use crate::admission::ports::LocalPorts;
use crate::clock::Moment;
use crate::pool::{Pool, TriedBackends, pick};

/// The time from one search for a backend in use that found none to the next.
const SEARCH_AGAIN: Duration = Duration::from_millis(500);

impl<A> FlowWorkerState<A> {
    /// Moves a flow to a backend in use where its own is unhealthy, ejected, has weight 0, or is no longer in the pool. Where
    /// none is in use it stays.
    pub(super) fn follow_pool(&mut self, id: FlowId, poll: &Poll, now: Moment) {
        let Some((_, flow_client, flow)) = self.table.find(id) else { return };
        if flow.picked.as_ref().is_some_and(|picked| picked.keeps_flows()) || now < flow.next_search {
            return;
        }
        flow.next_search = now + SEARCH_AGAIN;
        let Some(latest) = flow.log_context.pool().map(Pool::latest) else { return };
        if flow.stays_over_reload() {
            return;
        }
        let Some(found) = flow.search(&latest, flow_client, &self.context.live.udp_ports, now) else {
            return;
        };
        flow.move_to(found);
        (flow.is_answered, flow.first, flow.next_search) = (false, None, Moment::default());
        self.watch(id, poll, now);
    }
}

impl<A> Flow<A> {
    /// Whether a reload has replaced its pool, and its backend's address is in use there: it is counted there from now on.
    fn stays_over_reload(&mut self) -> bool {
        let Some(picked) = self.picked.as_ref().filter(|picked| picked.is_retired()) else { return false };
        let replacement = self.log_context.pool().and_then(|pool| pool.replacement_of(picked.backend()));
        let Some((_, replacement)) = replacement.filter(|(_, replacement)| replacement.keeps_flows()) else {
            return false;
        };
        self.picked = Some(picked.follow(&replacement));
        self.tried = TriedBackends::default();
        self.next_search = Moment::default();
        true
    }

    /// Another backend, which is in use, and a socket to it.
    fn search(
        &mut self,
        pool: &Arc<Pool>,
        flow_client: FlowClient,
        ports: &LocalPorts,
        now: Moment,
    ) -> Option<ConnectedBackend> {
        let key = pool.key(
            || pick::by_client(flow_client.client),
            || pick::by_endpoint(flow_client.endpoint, flow_client.client),
        );
        let mut tried = TriedBackends::default();
        let tenant = self.log_context.tenant_number();
        let picked = pool.pick_again(tenant, key, fastrand::u64(..), &mut tried).ok();
        let picked = picked.filter(|picked| picked.keeps_flows())?;
        match BackendSearch::new(pool, flow_client, (ports, PortOwner::Holder(&self.port)), now)
            .connect(&picked)
        {
            Ok((socket, port)) => {
                self.log_context.metrics.leave_backend();
                self.log_context.metrics.assume_backend(picked.label());
                Some(ConnectedBackend { socket, port, picked: Some(picked), tried, attempts: 1 })
            }
            Err(result) => {
                self.log_context.metrics.count_failed_connect(picked.label(), result);
                if !matches!(result, ConnectResult::NoLocalPort | ConnectResult::Shortage) {
                    report_failure(pool, &picked, now);
                }
                None
            }
        }
    }
}
