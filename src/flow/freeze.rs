//! Freezes flows for another process, and thaws those that came from there.
//!
//! A flow that leaves is out of the table and the poll until the reply comes: nothing is sent, received or expired.
//! The listening sockets must not be read meanwhile, or a datagram would open another flow: it waits in the sockets,
//! which both processes have.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::timeout;

use super::drops::KernelDrops;
use super::entry::{ConnectedBackend, Flow, FlowLogContext, NOWHERE, ReceiveMode};
use super::socket::UdpListenSocket;
use super::table::{DatagramAction, FlowClient, FlowId, FlowPath};
use super::{FlowWorker, FlowWorkerState, Poll};
use crate::account::PerDirection;
use crate::account::session_metrics::SessionMetrics;
use crate::addr::{ClientAddr, PeerAddr};
use crate::admission::ports::EVERY_BACKEND;
use crate::admission::quota::RevokePolicy;
use crate::clock::wheel::Tick;
use crate::clock::{self, Moment, StartTime};
use crate::frozen::{Departure, Frozen, ThawError, TransferReply};
use crate::id::{EndpointClaim, SessionId};
use crate::outcome::{EndedAt, Outcome, Reason};
use crate::pool::TriedBackends;

/// Flows that are under way to another process at once: each is silent for as long as its answer takes, and all that the
/// worker does for them in one go stays well under a millisecond.
const AT_ONCE: usize = 32;

/// The record of a flow that moves to another process.
#[derive(Debug, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "what is told of a flow, each by its name")]
pub struct FlowRecord {
    worker: u16,
    listener: String,
    tenant: String,
    pool: String,
    backend: SocketAddr,
    /// The kernel's own number of the listening socket, and its address.
    #[serde(rename = "door")]
    listen_socket: u64,
    address: SocketAddr,
    local: Option<IpAddr>,
    peer: SocketAddr,
    client: Option<SocketAddr>,
    /// What it claims; empty where that is no endpoint's ID.
    endpoint: Option<String>,
    session: u64,
    /// What happens to it where its tenant is not there any more. An older process does not say it.
    #[serde(default)]
    revocation: RevokePolicy,
    attempts: u32,
    is_answered: bool,
    /// Whether its path has had another speaker. An older process does not say it.
    #[serde(default)]
    shares_path: bool,
    /// Whether the kernel puts together what its socket receives.
    together: bool,
    beyond: bool,
    would_delay: bool,
    bytes: PerDirection<u64>,
    datagrams: PerDirection<u64>,
    age_us: u64,
    silent_us: u64,
    /// The bytes of what goes in front of its datagrams; they lie in the tail.
    header: usize,
    /// The bytes of its first datagram, as long as that may be asked of another backend; they come next.
    first: Option<usize>,
}

/// A flow of another process, which can go on here.
#[derive(Debug)]
pub struct FrozenFlow {
    record: FlowRecord,
    socket: UdpSocket,
    header: Box<[u8]>,
    first: Option<Box<[u8]>>,
}

/// A flow that waits for the reply of the other process.
struct DepartingFlow<A> {
    path: FlowPath,
    client: FlowClient,
    flow: Flow<A>,
    last: Moment,
    shares_path: bool,
}

impl FlowRecord {
    /// The number of the worker that carried the flow: the one that most likely has its listening socket here, too.
    #[must_use]
    pub fn worker(&self) -> u16 {
        self.worker
    }
}

impl FrozenFlow {
    /// Puts together what arrived. The flow is unchanged so far.
    ///
    /// # Errors
    /// Why it cannot go on here.
    pub fn new(frozen: Frozen<FlowRecord>) -> Result<Self, ThawError> {
        let malformed = |what: &str| ThawError::Malformed(what.to_owned());
        let Frozen { record, held, fds } = frozen;
        let (header, rest) =
            held.split_at_checked(record.header).ok_or_else(|| malformed("incomplete header"))?;
        if rest.len() != record.first.unwrap_or(0) {
            return Err(malformed("incomplete datagram"));
        }
        let (header, first) = (Box::from(header), record.first.map(|_| Box::from(rest)));
        let [socket] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| malformed("expected one descriptor"))?;
        Ok(Self { record, socket: socket.into(), header, first })
    }

    fn client(&self) -> FlowClient {
        let endpoint = EndpointClaim::from_tlv(self.record.endpoint.as_ref().map(String::as_bytes));
        FlowClient { client: self.record.client.map(ClientAddr), endpoint }
    }
}

impl<A> FlowWorker<A> {
    /// Freezes every flow and sends it off, some at once, while sessions are transferred. Those that stay go on.
    /// Receiving stops when this starts, and the caller decides whether it is resumed
    /// [again](Self::resume).
    pub async fn freeze_all(&self, departures: mpsc::Sender<Departure<FlowRecord>>) {
        self.pause();
        let ids = self.state.borrow().table.ids();
        for some in ids.chunks(AT_ONCE) {
            let mut under_way = Vec::with_capacity(some.len());
            for id in some {
                let Ok(turn) = departures.reserve().await else { break };
                let sent = {
                    let mut state = self.state.borrow_mut();
                    if !state.context.local.is_transferring() {
                        break;
                    }
                    state.freeze(*id, &self.sockets.borrow(), &self.poll)
                };
                let Some((departing, frozen)) = sent else { continue };
                let (reply, answered) = oneshot::channel();
                turn.send(Departure { frozen, reply });
                under_way.push((departing, answered));
            }
            for (departing, answered) in under_way {
                let answer = self.wait(answered).await;
                self.state.borrow_mut().settle(departing, answer, &self.poll);
            }
            // Yield to the other tasks in between.
            yield_now().await;
        }
    }

    /// The answer; `None` where the process is over before it.
    async fn wait(&self, mut answered: oneshot::Receiver<TransferReply>) -> Option<TransferReply> {
        loop {
            match timeout(Tick::SPAN, &mut answered).await {
                Ok(answer) => return Some(answer.unwrap_or(TransferReply::Stays)),
                Err(_) if self.state.borrow().context.local.is_over() => return None,
                Err(_) => {}
            }
        }
    }

    /// Continues a flow of another process.
    ///
    /// # Errors
    /// Why not; it is still the other's then, and comes back.
    pub fn thaw(&self, flow: FrozenFlow) -> Result<(), ThawError> {
        let sockets = self.sockets.borrow();
        let place = place(&sockets, &flow.record).ok_or(ThawError::NoListenSocket)?;
        let Some(Some(listen_socket)) = sockets.get(usize::from(place)) else {
            return Err(ThawError::NoListenSocket);
        };
        self.state.borrow_mut().adopt(flow, place, listen_socket, &self.poll)
    }

    /// Whether the listening socket of a flow that comes is here: the very same, or one of the same address.
    #[must_use]
    pub fn has_socket(&self, record: &FlowRecord, the_same: bool) -> bool {
        let sockets = self.sockets.borrow();
        if the_same {
            sockets.iter().flatten().any(|listen_socket| listen_socket.cookie == record.listen_socket)
        } else {
            place(&sockets, record).is_some()
        }
    }
}

/// The index of a flow's listening socket: the same socket, or else one of the same address.
fn place(sockets: &[Option<Rc<UdpListenSocket>>], record: &FlowRecord) -> Option<u16> {
    let find = |is_it: &dyn Fn(&UdpListenSocket) -> bool| {
        sockets.iter().position(|listen_socket| listen_socket.as_deref().is_some_and(is_it))
    };
    let same = find(&|listen_socket| listen_socket.cookie == record.listen_socket);
    let place = same.or_else(|| find(&|listen_socket| listen_socket.address() == record.address));
    place.and_then(|place| u16::try_from(place).ok())
}

impl<A> FlowWorkerState<A> {
    /// Takes a flow out of the table and off the poll; `None` where it has to stay, or is gone.
    fn freeze(
        &mut self,
        id: FlowId,
        sockets: &[Option<Rc<UdpListenSocket>>],
        poll: &Poll,
    ) -> Option<(DepartingFlow<A>, Frozen<FlowRecord>)> {
        let last = self.table.last(id)?;
        let shares_path = self.table.shares_path(id);
        let (path, flow_client, flow) = self.table.close(id)?;
        let departing = DepartingFlow { path, client: flow_client, flow, last, shares_path };
        // Not by closing it: the other process's copy would keep it on the poll.
        let packed = epoll::delete(poll.get_ref(), &departing.flow.socket).ok();
        let packed = packed.and_then(|()| departing.pack(self.context.number, sockets));
        if packed.is_none() {
            self.restore(departing, poll);
            return None;
        }
        packed.map(|frozen| (departing, frozen))
    }

    fn restore(&mut self, departing: DepartingFlow<A>, poll: &Poll) {
        let now = clock::now();
        if let DatagramAction::ToBackend(_) =
            self.table.on_datagram(departing.path, Some(departing.client), now)
        {
            // Listening sockets were heard after all, and another one has begun.
            return self.finish(departing, Reason::Evicted);
        }
        let [_, tenant, _] = departing.flow.log_context.metrics.labels();
        let tenant = tenant.serial();
        let id =
            self.table.take_in(departing.path, departing.client, tenant, departing.flow, departing.last, now);
        if departing.shares_path {
            self.table.set_shares_path(id);
        }
        self.watch(id, poll, now);
    }

    fn settle(&mut self, departing: DepartingFlow<A>, answer: Option<TransferReply>, poll: &Poll) {
        let why = match answer {
            Some(TransferReply::Stays) if !self.context.local.is_over() => {
                return self.restore(departing, poll);
            }
            Some(TransferReply::Taken) => Reason::Moved,
            Some(TransferReply::Stays) | None => Reason::Drained,
        };
        self.finish(departing, why);
    }

    fn finish(&self, departing: DepartingFlow<A>, why: Reason) {
        departing.flow.end(
            Outcome::reject(EndedAt::Forward, why),
            departing.path.peer,
            departing.client,
            &self.context,
            clock::now(),
        );
    }

    fn adopt(
        &mut self,
        moved: FrozenFlow,
        socket: u16,
        listen_socket: &UdpListenSocket,
        poll: &Poll,
    ) -> Result<(), ThawError> {
        let (snapshot, now, flow_client) = (self.context.snapshot(), clock::now(), moved.client());
        let FrozenFlow { record, socket: connected, header, first } = moved;
        let labels = &self.context.live.labels;
        let [own, tenant, to] =
            [&record.listener, &record.tenant, &record.pool].map(|name| labels.intern(name));
        let backend = labels.intern(&record.backend.to_string());
        let worker_metrics = Rc::clone(&self.context.metrics);
        let mut metrics =
            SessionMetrics::taken_over(worker_metrics, [&own, &tenant, &to, &backend], record.bytes);
        metrics.would_delay = record.would_delay;
        let tenant_place = snapshot.known_place(&tenant, flow_client.endpoint, &own);
        let known = tenant_place.and_then(|place| snapshot.directory.tenants().get(place as usize));
        let gone = || {
            let quota = self.context.live.quotas.find(&tenant);
            quota.set_revocation(record.revocation);
            quota
        };
        let quota = known.map_or_else(gone, |known| Arc::clone(&known.quota));
        let pool_place = snapshot.pools.iter().position(|known| known.label.serial() == to.serial());
        let own_pool = pool_place.and_then(|place| snapshot.pools.get(place));
        let picked = own_pool.and_then(|pool| pool.adopt(record.backend, tenant.serial()));
        let local = connected.local_addr().ok().map(|local| local.ip());
        let source = local.filter(|ip| own_pool.is_some_and(|pool| pool.sources.contains(ip)));
        let port = self.context.live.udp_ports.space(source, EVERY_BACKEND).adopt(tenant.serial());
        let mut tried = TriedBackends::default();
        let picked = picked.map(|picked| tried.add_picked(picked));
        let log_context = FlowLogContext {
            snapshot,
            metrics,
            session: SessionId::of_number(record.session),
            began: StartTime::before(now, Duration::from_micros(record.age_us)),
            listener: listen_socket.listener(),
            tenant: tenant_place.unwrap_or(NOWHERE),
            pool: pool_place.and_then(|place| u32::try_from(place).ok()).unwrap_or(NOWHERE),
        };
        let permit = quota.adopt_flow(record.beyond);
        let found = ConnectedBackend { socket: connected, port, picked, tried, attempts: record.attempts };
        let guard = ((self.count_flow)(), Rc::clone(&listen_socket.flows));
        let mut flow = Flow::new(found, permit, self.context.live.sessions.take_anyway(), guard, log_context);
        (flow.is_answered, flow.first, flow.header) = (record.is_answered, first, header);
        flow.datagrams = record.datagrams;
        flow.drops = KernelDrops::new(&flow.socket);
        if record.together {
            flow.receive_mode = ReceiveMode::Together;
        }
        let path = FlowPath { socket, local: record.local, peer: PeerAddr(record.peer) };
        // Began here since: the older one has its backend, which may have much to remember.
        if let DatagramAction::ToBackend(younger) = self.table.on_datagram(path, Some(flow_client), now) {
            self.end(younger, Outcome::reject(EndedAt::Forward, Reason::Evicted), now);
        }
        let last = now.before(Duration::from_micros(record.silent_us));
        let id = self.table.take_in(path, flow_client, tenant.serial(), flow, last, now);
        if record.shares_path {
            self.table.set_shares_path(id);
        }
        if !self.watch(id, poll, now) {
            return Err(ThawError::Shortage);
        }
        self.check(id, now);
        Ok(())
    }
}

impl<A> DepartingFlow<A> {
    fn pack(&self, worker: u16, sockets: &[Option<Rc<UdpListenSocket>>]) -> Option<Frozen<FlowRecord>> {
        let (flow, log_context, now) = (&self.flow, &self.flow.log_context, clock::now());
        let listen_socket = sockets.get(usize::from(self.path.socket))?.as_ref()?;
        let micros = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        let [listener, tenant, pool] = log_context.metrics.labels().map(|label| label.name().to_owned());
        let record = FlowRecord {
            worker,
            listener,
            tenant,
            pool,
            backend: flow.backend()?.0,
            listen_socket: listen_socket.cookie,
            address: listen_socket.address(),
            local: self.path.local,
            peer: self.path.peer.0,
            client: self.client.client.map(|client| client.0),
            endpoint: self.client.endpoint.to_record(),
            session: log_context.session.number(),
            revocation: flow.permit.quota().revocation(),
            attempts: flow.attempts,
            is_answered: flow.is_answered,
            shares_path: self.shares_path,
            together: matches!(flow.receive_mode, ReceiveMode::Together),
            beyond: flow.permit.would_reject().is_some(),
            would_delay: log_context.metrics.would_delay,
            bytes: log_context.metrics.bytes(),
            datagrams: flow.datagrams,
            age_us: micros(log_context.began.age(now)),
            silent_us: micros(now.since(self.last)),
            header: flow.header.len(),
            first: flow.first.as_ref().map(|first| first.len()),
        };
        let held = [&flow.header[..], flow.first.as_deref().unwrap_or_default()].concat();
        let socket = flow.socket.try_clone().ok()?;
        Some(Frozen { record, held, fds: vec![socket.into()] })
    }
}
