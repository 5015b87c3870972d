//! The search for a flow's backend, and for a local port towards it.

use std::net::UdpSocket;
use std::sync::Arc;

use super::entry::{ConnectedBackend, Flow};
use super::socket;
use super::table::FlowClient;
use crate::account::session_metrics::{ConnectResult, SessionMetrics};
use crate::admission::ports::{EVERY_BACKEND, LocalPort, LocalPorts, PortSpace};
use crate::clock::Moment;
use crate::connect::{self, ConnectError};
use crate::outcome::{EndedAt, Outcome, Reason};
use crate::pool::{PickError, PickedBackend, Pool, SessionFailure, TriedBackends, pick};

/// The flow that a local port is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum PortOwner<'a> {
    /// A new one of this tenant.
    Tenant(u32),
    /// One that has this port, and gives it back for another.
    Holder(&'a LocalPort),
}

impl PortOwner<'_> {
    /// The tenant, by its label's serial number.
    fn tenant(self) -> u32 {
        match self {
            Self::Tenant(tenant) => tenant,
            Self::Holder(port) => port.tenant(),
        }
    }
}

/// The search for a backend.
pub(super) struct BackendSearch<'a> {
    pool: &'a Pool,
    client: FlowClient,
    ports: &'a LocalPorts,
    holder: PortOwner<'a>,
    now: Moment,
    /// The local ports that the last attempt found none free of.
    pub(super) short: Option<Arc<PortSpace>>,
}

impl<'a> BackendSearch<'a> {
    pub(super) fn new(
        pool: &'a Pool,
        flow_client: FlowClient,
        (ports, holder): (&'a LocalPorts, PortOwner<'a>),
        now: Moment,
    ) -> Self {
        Self { pool, client: flow_client, ports, holder, now, short: None }
    }

    /// Another backend for a flow whose own is not there; none for one from another process whose pool is unknown here.
    pub(super) fn again<A>(
        flow: &mut Flow<A>,
        flow_client: FlowClient,
        ports: &'a LocalPorts,
        now: Moment,
    ) -> Option<ConnectedBackend> {
        let born = flow.log_context.pool()?;
        // The present backends; tried ones are known by their slots in its own pool.
        let own = born.latest();
        if !Arc::ptr_eq(&own, born) {
            flow.tried = TriedBackends::default();
        }
        flow.log_context.metrics.count_assumed(ConnectResult::Refused);
        flow.picked.iter().for_each(|picked| report_failure(&own, picked, now));
        let mut search = BackendSearch::new(&own, flow_client, (ports, PortOwner::Holder(&flow.port)), now);
        search.run(std::mem::take(&mut flow.tried), flow.attempts, &mut flow.log_context.metrics).ok()
    }

    /// A backend, and a socket to it.
    pub(super) fn run(
        &mut self,
        mut tried: TriedBackends,
        mut attempts: u32,
        metrics: &mut SessionMetrics,
    ) -> Result<ConnectedBackend, Outcome> {
        let (pool, flow_client) = (self.pool, self.client);
        let key = pool.key(
            || pick::by_client(flow_client.client),
            || pick::by_endpoint(flow_client.endpoint, flow_client.client),
        );
        let mut failed = Outcome::reject(EndedAt::Pool, Reason::NoBackend);
        while attempts < pool.attempts {
            let (tenant, roll) = (self.holder.tenant(), fastrand::u64(..));
            let picked = if attempts == 0 {
                pool.pick_for(tenant, key, roll, &mut tried)
            } else {
                pool.pick_again(tenant, key, roll, &mut tried)
            };
            let picked = match picked {
                Ok(picked) => picked,
                // A datagram does not wait in line.
                Err(PickError::Free) if attempts == 0 => {
                    return Err(Outcome::reject(EndedAt::Pool, Reason::PoolFull));
                }
                Err(PickError::Share) if attempts == 0 => {
                    return Err(Outcome::reject(EndedAt::Pool, Reason::PoolShare));
                }
                Err(PickError::Free | PickError::Share | PickError::Usable) => break,
            };
            if attempts > 0 && !pool.may_retry(self.now) {
                break;
            }
            attempts += 1;
            match self.connect(&picked) {
                Ok((socket, port)) => {
                    metrics.assume_backend(picked.label());
                    return Ok(ConnectedBackend { socket, port, picked: Some(picked), tried, attempts });
                }
                Err(result) => {
                    metrics.count_connect(picked.label(), result);
                    failed = ConnectError::Backend(result).outcome();
                    if result == ConnectResult::Shortage {
                        break;
                    }
                    // A port that is missing is not the backend's fault: towards one of the other family there may be one.
                    if result != ConnectResult::NoLocalPort {
                        report_failure(pool, &picked, self.now);
                    }
                }
            }
        }
        Err(failed)
    }

    /// A socket to a backend, from the first source address that has a local port left.
    pub(super) fn connect(
        &mut self,
        picked: &PickedBackend,
    ) -> Result<(UdpSocket, LocalPort), ConnectResult> {
        let address = picked.address();
        let start = fastrand::usize(..);
        self.short = None;
        for source in connect::sources(&self.pool.sources, address, start) {
            let space = self.ports.space(source, EVERY_BACKEND);
            let port = match self.holder {
                PortOwner::Tenant(tenant) => space.take(tenant),
                PortOwner::Holder(held) => space.exchange(held),
            };
            if let Some(port) = port {
                match socket::connect(address, source).map_err(|error| connect::classify(&error)) {
                    Ok(socket) => {
                        self.short = None;
                        return Ok((socket, port));
                    }
                    Err(ConnectResult::NoLocalPort) => port.refused(),
                    Err(result) => {
                        self.short = None;
                        return Err(result);
                    }
                }
            }
            self.short = Some(space);
        }
        Err(ConnectResult::NoLocalPort)
    }
}

pub(super) fn report_failure(pool: &Pool, picked: &PickedBackend, now: Moment) {
    pool.failed(picked, SessionFailure::Connect, now).iter().for_each(|change| change.log(pool));
}
