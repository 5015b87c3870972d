//! From a datagram to its flow: client, tenant, limits and backend.

use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;

use super::entry::{ConnectedBackend, Flow, FlowLogContext, FlowLogDetails, NOWHERE};
use super::search::{BackendSearch, PortOwner};
use super::send_runs::{DatagramHeaders, drop_reason};
use super::socket::{self, ROOM, Span, UdpListenSocket};
use super::table::{DatagramAction, FlowClient, FlowId, FlowPath, StrayDatagram};
use super::{FlowWorkerState, Poll, TURN};
use crate::account::Direction;
use crate::account::session_metrics::{ConnectResult, SessionMetrics};
use crate::account::udp_drops::DatagramDrop;
use crate::addr::{ClientAddr, DestinationAddr};
use crate::admission::ports::PortSpace;
use crate::admission::quota::{DatagramVerdict, EvictionScope, FlowPermit, Quota};
use crate::admission::slots;
use crate::clock::Moment;
use crate::fault::{self, Syscall};
use crate::id::{EndpointClaim, SessionId};
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::pool::{Pool, TriedBackends};
use crate::proxy_protocol::{self, HeaderBuilder, MalformedHeader, ParsedHeader, SIGNATURE, Transport};

/// A flow that was silent for so long may lose its place to a new one, where all places are taken.
const GIVES_WAY: Duration = Duration::from_secs(5);

/// What a datagram starts with.
enum DatagramStart {
    /// A header of so many bytes.
    Header(FlowClient, usize),
    /// None.
    Bare,
    /// Nothing that leads to a flow.
    Invalid(Outcome),
}

/// Reads a datagram's header, where there is one.
fn read(datagram: &[u8], rules: proxy_protocol::ParserRules) -> DatagramStart {
    match proxy_protocol::parse(datagram, rules) {
        ParsedHeader::Done(header, _) if header.command() == proxy_protocol::HeaderCommand::Local => {
            DatagramStart::Invalid(Outcome::new(EndedBy::Client, EndedAt::Header, Reason::Local))
        }
        ParsedHeader::Done(header, len) => {
            let flow_client =
                FlowClient { client: header.client(), endpoint: EndpointClaim::from_tlv(header.endpoint()) };
            DatagramStart::Header(flow_client, len)
        }
        // Too short for a signature: payload, however it begins.
        ParsedHeader::Partial(_) if datagram.len() < SIGNATURE.len() => DatagramStart::Bare,
        ParsedHeader::Partial(_) => {
            DatagramStart::Invalid(Outcome::new(EndedBy::Client, EndedAt::Header, Reason::HeaderTruncated))
        }
        ParsedHeader::Malformed(MalformedHeader::NoSignature) => DatagramStart::Bare,
        ParsedHeader::Malformed(reason) => {
            DatagramStart::Invalid(Outcome::reject(EndedAt::Header, reason.into()))
        }
    }
}

/// A datagram from a client.
pub(super) struct ClientDatagram<'a> {
    pub(super) socket: &'a UdpListenSocket,
    pub(super) path: FlowPath,
    pub(super) room: &'a [u8],
    pub(super) span: Span,
}

impl<A> FlowWorkerState<A> {
    /// Handles one datagram of a client.
    pub(super) fn take_in(&mut self, datagram: ClientDatagram<'_>, poll: &Poll, now: Moment) {
        let ClientDatagram { socket: listen_socket, path, room, span } = datagram;
        let bytes = room.get(span.clone()).unwrap_or_default();
        let peer = FlowClient { client: Some(ClientAddr(path.peer.0)), endpoint: EndpointClaim::Absent };
        let spoken =
            listen_socket.header.get().map_or(DatagramStart::Header(peer, 0), |rules| read(bytes, rules));
        let (flow_client, header_len) = match spoken {
            DatagramStart::Header(flow_client, len) => (Some(flow_client), len),
            DatagramStart::Bare if listen_socket.follows_bare.get() => (None, 0),
            DatagramStart::Bare => {
                return self.reject_datagram(
                    listen_socket,
                    path,
                    None,
                    Outcome::reject(EndedAt::Header, Reason::NoHeader),
                    now,
                );
            }
            DatagramStart::Invalid(outcome) => {
                return self.reject_datagram(listen_socket, path, None, outcome, now);
            }
        };
        let payload = span.start + header_len..span.end;
        match (self.table.on_datagram(path, flow_client, now), flow_client) {
            (DatagramAction::ToBackend(id), _) => self.add_to_run(id, payload, header_len),
            (DatagramAction::Open, Some(flow_client)) => {
                let header = bytes.get(..header_len).unwrap_or_default();
                let spoken = (header, payload.len());
                if let Some(id) = self.open(listen_socket, path, flow_client, spoken, poll, now) {
                    self.add_to_run(id, payload, header_len);
                }
            }
            (DatagramAction::Drop(StrayDatagram::Ambiguous), _) => {
                self.reject_datagram(
                    listen_socket,
                    path,
                    None,
                    Outcome::reject(EndedAt::Header, Reason::Ambiguous),
                    now,
                );
            }
            (DatagramAction::Drop(StrayDatagram::NoHeader) | DatagramAction::Open, _) => {
                self.reject_datagram(
                    listen_socket,
                    path,
                    None,
                    Outcome::reject(EndedAt::Header, Reason::NoHeader),
                    now,
                );
            }
        }
    }

    fn add_to_run(&mut self, id: FlowId, payload: Span, header_len: usize) {
        let wants_header =
            header_len > 0 && self.table.find(id).is_some_and(|(.., flow)| !flow.header.is_empty());
        if wants_header {
            self.runs.headers.add(payload.clone(), payload.start - header_len..payload.start);
        }
        self.runs.add(id, payload);
    }

    fn log_context(&self, listener: u32, now: Moment) -> Option<FlowLogContext> {
        let snapshot = self.context.snapshot();
        let rules = snapshot.listeners.get(listener as usize)?;
        let metrics = SessionMetrics::new(Rc::clone(&self.context.metrics), &rules.label);
        let session = SessionId::new(self.context.number, self.context.metrics.next_session());
        Some(FlowLogContext {
            snapshot,
            metrics,
            session,
            began: now.into(),
            listener,
            tenant: NOWHERE,
            pool: NOWHERE,
        })
    }

    /// Counts a datagram that belongs to no flow and opens none.
    fn reject_datagram(
        &mut self,
        listen_socket: &UdpListenSocket,
        path: FlowPath,
        flow_client: Option<FlowClient>,
        outcome: Outcome,
        now: Moment,
    ) {
        let Some(log_context) = self.log_context(listen_socket.listener(), now) else { return };
        let rules = log_context.snapshot.listeners.get(listen_socket.listener() as usize);
        let is_stranger = rules.is_some_and(|rules| !rules.trusts(path.peer));
        let outcome =
            if is_stranger { Outcome::reject(EndedAt::Accept, Reason::UntrustedSource) } else { outcome };
        self.reject(log_context, path, flow_client, outcome, now);
    }

    fn reject(
        &mut self,
        log_context: FlowLogContext,
        path: FlowPath,
        flow_client: Option<FlowClient>,
        outcome: Outcome,
        now: Moment,
    ) {
        log_context.end(outcome, FlowLogDetails::stray(path.peer, flow_client), &self.context, now);
    }

    /// Opens a flow for a datagram.
    fn open(
        &mut self,
        listen_socket: &UdpListenSocket,
        path: FlowPath,
        flow_client: FlowClient,
        (header, payload): (&[u8], usize),
        poll: &Poll,
        now: Moment,
    ) -> Option<FlowId> {
        let mut log_context = self.log_context(listen_socket.listener(), now)?;
        let steps = if listen_socket.is_closing() {
            Err(Outcome::reject(EndedAt::Header, Reason::Drained))
        } else {
            self.steps(&mut log_context, path, flow_client, payload, now)
        };
        match steps {
            Ok((found, permit, slot)) => {
                let send_proxy = log_context.pool().is_some_and(|pool| pool.send_proxy);
                let tenant = log_context.tenant().map_or(0, |tenant| tenant.label.serial());
                let mut flow = Flow::new(
                    found,
                    permit,
                    slot,
                    ((self.count_flow)(), Rc::clone(&listen_socket.flows)),
                    log_context,
                );
                flow.first_is_paid = true;
                if send_proxy {
                    flow.header = backend_header(listen_socket, path, flow_client, header).into();
                }
                let id = self.table.open(path, flow_client, tenant, flow, now);
                self.watch(id, poll, now).then_some(id)
            }
            Err(outcome) => {
                self.reject(log_context, path, Some(flow_client), outcome, now);
                None
            }
        }
    }

    /// Has the poll watch a flow's socket.
    pub(super) fn watch(&mut self, id: FlowId, poll: &Poll, now: Moment) -> bool {
        let Some((_, _, flow)) = self.table.find(id) else { return false };
        // By level, not on the edge: asking a socket whether it has more is cheaper than to receive nothing from it.
        let (mark, flags) = (epoll::EventData::new_u64(id.to_u64()), epoll::EventFlags::IN);
        let added =
            fault::at(Syscall::Register).and_then(|()| epoll::add(poll.get_ref(), &flow.socket, mark, flags));
        if added.is_err() {
            self.end(id, Outcome::reject(EndedAt::Connect, Reason::Shortage), now);
        }
        added.is_ok()
    }

    /// The steps of a flow up to the connected backend.
    fn steps(
        &mut self,
        log_context: &mut FlowLogContext,
        path: FlowPath,
        flow_client: FlowClient,
        payload: usize,
        now: Moment,
    ) -> Result<(ConnectedBackend, FlowPermit, slots::SlotPermit), Outcome> {
        let snapshot = Arc::clone(&log_context.snapshot);
        let rules = snapshot.listeners.get(log_context.listener as usize);
        let rules = rules.ok_or(Outcome::reject(EndedAt::Tenant, Reason::NoPool))?;
        if !rules.trusts(path.peer) {
            return Err(Outcome::reject(EndedAt::Accept, Reason::UntrustedSource));
        }
        if self.context.local.is_draining() {
            return Err(Outcome::reject(EndedAt::Header, Reason::Drained));
        }
        let (place, why) = snapshot.directory.place(flow_client.endpoint, rules.tenants);
        let tenant = place.and_then(|place| snapshot.directory.tenants().get(place as usize));
        let tenant = tenant.ok_or(Outcome::reject(EndedAt::Tenant, why))?;
        let pool_place = tenant.pool_on(log_context.listener, rules.pool);
        let pool = pool_place.and_then(|place| snapshot.pools.get(place as usize));
        log_context.metrics.assign_tenant(&tenant.label, pool.map(|pool| &pool.label));
        (log_context.tenant, log_context.pool) = (place.unwrap_or(NOWHERE), pool_place.unwrap_or(NOWHERE));
        tenant.admit()?;
        let pool = pool.ok_or(Outcome::reject(EndedAt::Tenant, Reason::NoPool))?;
        charge_first(&tenant.quota, payload, &mut log_context.metrics, now)?;
        let mut slot = self.context.live.sessions.take();
        let permit = tenant.quota.admit_flow(|room| {
            let evicted =
                self.evict((room == EvictionScope::OfTenant).then(|| tenant.label.serial()), |_| true, now);
            if slot.is_none() && evicted {
                // The place that this left, before the tenant's share is reckoned with what is free.
                slot = self.context.live.sessions.take();
            }
            evicted
        });
        let permit = permit.map_err(|why| Outcome::reject(EndedAt::Tenant, why))?;
        // Only now: a flow that its tenant's limit or share rejects must not evict another one.
        let slot = slot.or_else(|| self.slot(now));
        let slot = slot.ok_or_else(|| Outcome::reject(EndedAt::Tenant, tenant.quota.reject(Reason::Shed)))?;
        pool.count_session(tenant.label.serial());
        let found =
            self.find_backend(pool, flow_client, tenant.label.serial(), &mut log_context.metrics, now);
        Ok((found?, permit, slot))
    }

    /// A backend for a new flow of this tenant, where need be with the local port of a silent flow.
    fn find_backend(
        &mut self,
        pool: &Pool,
        flow_client: FlowClient,
        tenant: u32,
        metrics: &mut SessionMetrics,
        now: Moment,
    ) -> Result<ConnectedBackend, Outcome> {
        let live = Arc::clone(&self.context.live);
        let ports = (&*live.udp_ports, PortOwner::Tenant(tenant));
        let mut search = BackendSearch::new(pool, flow_client, ports, now);
        let found = search.run(TriedBackends::default(), 0, metrics);
        let Some(short) = search.short.take().filter(|short| self.free_port(tenant, short, now)) else {
            return found;
        };
        short.search_again();
        BackendSearch::new(pool, flow_client, ports, now).run(TriedBackends::default(), 0, metrics)
    }

    /// Ends a silent flow that uses one of these local ports: of this tenant, or else, where the tenant holds less than an
    /// equal share of them, of the one that has most flows. Whether there was one.
    fn free_port(&mut self, tenant: u32, ports: &Arc<PortSpace>, now: Moment) -> bool {
        self.evict(Some(tenant), |flow| flow.port.is_of(ports), now)
            || (ports.holds_little(tenant) && self.evict(None, |flow| flow.port.is_of(ports), now))
    }

    /// A place in the process, where need be that of the flow that was silent longest.
    fn slot(&mut self, now: Moment) -> Option<slots::SlotPermit> {
        let slot = self.context.live.sessions.take();
        slot.or_else(
            || if self.evict(None, |_| true, now) { self.context.live.sessions.take() } else { None },
        )
    }

    /// Ends the flow of this tenant, or of the one that has most, that was silent longest, if it is one of these; whether it
    /// did.
    fn evict(&mut self, tenant: Option<u32>, is_it: impl FnOnce(&Flow<A>) -> bool, now: Moment) -> bool {
        let evicted = self.table.evict_if(tenant, GIVES_WAY, now, is_it);
        let Some((path, flow_client, flow)) = evicted else { return false };
        flow.end(
            Outcome::reject(EndedAt::Forward, Reason::Evicted),
            path.peer,
            flow_client,
            &self.context,
            now,
        );
        true
    }

    /// Sends the batch to the backends.
    pub(super) fn send_runs(&mut self, poll: &Poll, room: &[u8], now: Moment) {
        let (mut runs, mut spans) = (std::mem::take(&mut self.runs), std::mem::take(&mut self.spans));
        let mut headers = std::mem::take(&mut runs.headers);
        runs.take_by_flow(&mut spans, |id, spans| self.send_run(id, spans, (room, &headers), poll, now));
        headers.clear();
        runs.headers = headers;
        (self.runs, self.spans) = (runs, spans);
    }

    fn send_run(
        &mut self,
        id: FlowId,
        spans: &mut Vec<Span>,
        (room, headers): (&[u8], &DatagramHeaders),
        poll: &Poll,
        now: Moment,
    ) {
        self.turn = Some(id);
        self.follow_pool(id, poll, now);
        let Some((_, _, flow)) = self.table.find(id) else { return };
        fault::panic_where_injected();
        flow.apply_limits(spans, Direction::ToBackend, now);
        flow.keep_first(spans, room);
        let mut done = 0;
        // Each time around another backend is asked, or the flow is over.
        while let Some((_, _, flow)) = self.table.find(id) {
            let rest = spans.get(done..).unwrap_or_default();
            match flow.send_to_backend(rest, room, headers, &mut self.together) {
                Ok(()) => return,
                Err(refused) => done += refused.done,
            }
            self.refused(id, spans.len() - done, poll, now);
        }
    }

    /// The backend's host has answered with port unreachable: another backend is tried while the flow is unanswered.
    /// So many datagrams are there that it would have got.
    fn refused(&mut self, id: FlowId, unsent: usize, poll: &Poll, now: Moment) {
        let Some((_, flow_client, flow)) = self.table.find(id) else { return };
        let is_answered = flow.is_answered;
        let ports = &self.context.live.udp_ports;
        let found = if is_answered { None } else { BackendSearch::again(flow, flow_client, ports, now) };
        if let Some(found) = found {
            flow.move_to(found);
            if self.watch(id, poll, now)
                && let Some((_, _, flow)) = self.table.find(id)
            {
                flow.repeat_first();
            }
            return;
        }
        flow.log_context.metrics.count_dropped(Direction::ToBackend, DatagramDrop::Refused, unsent as u64);
        let (at, why) = if is_answered {
            (EndedAt::Forward, Reason::Reset)
        } else {
            (EndedAt::Connect, Reason::ConnectRefused)
        };
        self.end(id, Outcome::new(EndedBy::Backend, at, why), now);
    }

    /// Gives a flow that has something to say its turn.
    pub(super) fn pass_answer(
        &mut self,
        id: FlowId,
        sockets: &[Option<Rc<UdpListenSocket>>],
        poll: &Poll,
        now: Moment,
    ) {
        let Some((path, _, flow)) = self.table.find(id) else { return };
        self.turn = Some(id);
        let Some(Some(listen_socket)) = sockets.get(usize::from(path.socket)) else {
            // The flow is gone: read its answers, else they would wake the worker forever.
            return self.end(id, Outcome::reject(EndedAt::Forward, Reason::Drained), now);
        };
        let room = self.room.get_mut(..TURN * ROOM).unwrap_or_default();
        let metas = self.metas.get_mut(..TURN).unwrap_or_default();
        let mut hear =
            || flow.receive_mode.receive(&flow.socket, listen_socket, room, metas, &mut self.spans);
        // An error comes before the answers that are there already.
        let (heard, is_refused) = match hear() {
            Err(error) if socket::is_peer_error(&error) => (hear(), true),
            heard => (heard, false),
        };
        match heard {
            Ok(()) => {}
            Err(_) if is_refused => return self.refused(id, 0, poll, now),
            Err(error) if error.kind() == ErrorKind::WouldBlock || socket::is_too_long(&error) => return,
            Err(error) => {
                let why = if socket::drop_reason(&error) == DatagramDrop::Shortage {
                    Reason::Shortage
                } else {
                    Reason::Unanswered
                };
                return self.end(id, Outcome::new(EndedBy::Backend, EndedAt::Forward, why), now);
            }
        }
        let Some((path, _, flow)) = self.table.answer(id, now) else { return };
        if self.spans.len() >= TURN {
            // So many wait that some may have had no room.
            flow.count_drops();
        }
        flow.first = None;
        if !std::mem::replace(&mut flow.is_answered, true) {
            flow.log_context.metrics.count_assumed(ConnectResult::Done);
            if let Some(picked) = &flow.picked {
                picked.connected();
                picked.answered();
            }
        }
        let spans = &mut self.spans;
        flow.apply_limits(spans, Direction::ToClient, now);
        flow.send_to_client(spans, &self.room, &mut self.copy, listen_socket, path);
        if is_refused {
            self.refused(id, 0, poll, now);
        }
    }
}

/// Asks the tenant's limits whether a datagram may begin a flow: before anything is taken, and before another flow ends.
fn charge_first(
    quota: &Quota,
    payload: usize,
    metrics: &mut SessionMetrics,
    now: Moment,
) -> Result<(), Outcome> {
    if !quota.is_limited() {
        return Ok(());
    }
    match quota.pass(Direction::ToBackend, payload as u64, now) {
        DatagramVerdict::Free => Ok(()),
        DatagramVerdict::Observed(excess) => {
            metrics.count_would_drop(Direction::ToBackend, drop_reason(excess));
            Ok(())
        }
        DatagramVerdict::Dropped(_) => Err(Outcome::reject(EndedAt::Tenant, Reason::DatagramLimit)),
    }
}

/// What goes in front of a flow's datagrams where the pool wants a header.
fn backend_header(
    listen_socket: &UdpListenSocket,
    path: FlowPath,
    flow_client: FlowClient,
    header: &[u8],
) -> Vec<u8> {
    if let Some(rules) = listen_socket.header.get()
        && let ParsedHeader::Done(header, _) = proxy_protocol::parse(header, rules)
    {
        return proxy_protocol::reseal(&header);
    }
    let builder = flow_client.client.map_or_else(HeaderBuilder::unspecified, |client| {
        HeaderBuilder::proxy(Transport::Datagram, client, DestinationAddr(listen_socket.destination(path)))
    });
    // A header of addresses alone is far from its bound.
    builder.crc().map(HeaderBuilder::build).unwrap_or_default()
}
