//! What a worker keeps for one flow, and how it ends.

use std::io;
use std::net::UdpSocket;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use quinn_udp::RecvMeta;

use crate::account::log::{AccessLogRecord, LogFlags};
use crate::account::session_metrics::SessionMetrics;
use crate::account::{Direction, Label, PerDirection};
use crate::addr::{BackendAddr, PeerAddr};
use crate::admission::ports::LocalPort;
use crate::admission::quota::FlowPermit;
use crate::admission::slots::SlotPermit;
use crate::clock::{self, Moment, StartTime};
use crate::id::SessionId;
use crate::outcome::Outcome;
use crate::pool::{PickedBackend, Pool, TriedBackends};
use crate::state::rejection_log::LogLine;
use crate::state::{Snapshot, WorkerContext};
use crate::tenant::Tenant;

use super::drops::KernelDrops;
use super::socket::{self, ROOM, Span, UdpListenSocket, datagrams};
use super::table::FlowClient;

/// One flow. The guards count it at its worker and at its listening socket.
#[derive(Debug)]
pub(super) struct Flow<A> {
    /// Where a backend was found for it. Closing it takes it off the poll.
    pub(super) socket: UdpSocket,
    /// The local port of the socket.
    pub(super) port: LocalPort,
    /// Its backend, where the pool has it: a flow of another process may have one that is unknown here.
    pub(super) picked: Option<PickedBackend>,
    pub(super) tried: TriedBackends,
    pub(super) attempts: u32,
    /// When it looks again for a backend in use, while its own is not.
    pub(super) next_search: Moment,
    /// Whether the backend has answered, whatever became of the answer.
    pub(super) is_answered: bool,
    /// Whether the limits have let its first datagram pass, which is still to come.
    pub(super) first_is_paid: bool,
    pub(super) receive_mode: ReceiveMode,
    /// What the kernel has dropped at its socket, as far as it is counted.
    pub(super) drops: KernelDrops,
    /// The first datagram, while it is the only one and unanswered: it may be sent to another backend.
    pub(super) first: Option<Box<[u8]>>,
    /// The header of the first datagram, for those that come without one; empty where the pool wants none.
    pub(super) header: Box<[u8]>,
    pub(super) datagrams: PerDirection<u64>,
    pub(super) permit: FlowPermit,
    pub(super) log_context: FlowLogContext,
    _slot: SlotPermit,
    _counted: (A, Rc<()>),
}

/// How a flow's answers are received. Most come one by one, and the least that takes one is a plain `recv`. To take
/// those that the kernel has coalesced (GRO) needs more work, and pays off for flows with many answers.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReceiveMode {
    /// One at a time; so many until it is looked for a second one.
    Singly(u8),
    /// All that there are. It stays so: the kernel does not take apart again what it has put together.
    Together,
}

impl Default for ReceiveMode {
    fn default() -> Self {
        Self::Singly(Self::EVERY)
    }
}

impl ReceiveMode {
    /// Looking for a datagram that is not there costs about a fifth of what one costs.
    const EVERY: u8 = 16;

    /// Takes what has come in at a flow's socket, and puts down where each datagram lies; `listen_socket` knows how to take many.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn receive(
        &mut self,
        socket: &UdpSocket,
        listen_socket: &UdpListenSocket,
        room: &mut [u8],
        metas: &mut [RecvMeta],
        spans: &mut Vec<Span>,
    ) -> io::Result<()> {
        spans.clear();
        if let Self::Together = self {
            let count = listen_socket.receive_from(socket, room, metas)?;
            for (meta, place) in metas.iter().take(count).zip(0..) {
                spans.extend(datagrams(place * ROOM, meta.len, meta.stride));
            }
            return Ok(());
        }
        let len = socket::receive_one(socket, room.get_mut(..ROOM).unwrap_or_default())?;
        spans.push(0..len);
        // An error that is met here is as good as lost; where it still holds, the next datagram brings it back.
        if self.count_received()
            && let Ok(len) = socket::receive_one(socket, room.get_mut(ROOM..2 * ROOM).unwrap_or_default())
        {
            spans.push(ROOM..ROOM + len);
            *self = Self::Together;
            socket::enable_gro(socket);
        }
        Ok(())
    }

    /// One has come; whether to look for another one now.
    fn count_received(&mut self) -> bool {
        let Self::Singly(left) = self else { return false };
        *left -= 1;
        let looks = *left == 0;
        if looks {
            *left = Self::EVERY;
        }
        looks
    }
}

/// What is known about a flow for its log line.
#[derive(Debug)]
pub(super) struct FlowLogContext {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) metrics: SessionMetrics,
    pub(super) session: SessionId,
    pub(super) began: StartTime,
    pub(super) listener: u32,
    /// The places of its tenant and pool in the snapshot; beyond the last while they are not known.
    pub(super) tenant: u32,
    pub(super) pool: u32,
}

/// No place in a snapshot.
pub(super) const NOWHERE: u32 = u32::MAX;

/// A connected backend of a flow.
pub(super) struct ConnectedBackend {
    pub(super) socket: UdpSocket,
    pub(super) port: LocalPort,
    pub(super) picked: Option<PickedBackend>,
    pub(super) tried: TriedBackends,
    pub(super) attempts: u32,
}

impl FlowLogContext {
    pub(super) fn tenant(&self) -> Option<&Tenant> {
        self.snapshot.directory.tenants().get(self.tenant as usize)
    }

    /// The serial number of its tenant's label.
    pub(super) fn tenant_number(&self) -> u32 {
        self.metrics.labels()[1].serial()
    }

    pub(super) fn pool(&self) -> Option<&Arc<Pool>> {
        self.snapshot.pools.get(self.pool as usize)
    }

    /// Counts the end, and writes its line, where it has one.
    pub(super) fn end(
        self,
        outcome: Outcome,
        flow_client: FlowLogDetails,
        worker: &WorkerContext,
        now: Moment,
    ) {
        let took = self.began.age(now);
        if outcome.is_logged() && worker.access_log.is_on() {
            let rules = self.snapshot.listeners.get(self.listener as usize);
            let strays = rules.map(|rules| &*rules.strays);
            match worker.rejections.line(outcome, self.tenant(), strays, now) {
                Ok(line) => self.write(outcome, flow_client, worker, line, took),
                Err(class) => worker.access_log.leave_out(class),
            }
        }
        self.metrics.end(outcome, took);
    }

    fn write(
        &self,
        outcome: Outcome,
        flow_client: FlowLogDetails,
        worker: &WorkerContext,
        line: LogLine,
        took: Duration,
    ) {
        let labels = self.tenant().and_then(|tenant| tenant.labels.as_deref());
        let number = self.metrics.labels()[1].serial();
        // By their names here: they need not be in any snapshot.
        let [listener, tenant, pool] = self.metrics.labels().map(Label::name);
        let known = |name| Some(name).filter(|name: &&str| !name.is_empty());
        let record = AccessLogRecord {
            time: clock::wall(),
            session: self.session,
            listener,
            tenant: known(tenant),
            endpoint: flow_client.client.and_then(|flow_client| flow_client.endpoint.id()),
            client: flow_client.client.and_then(|flow_client| flow_client.client),
            peer: flow_client.peer,
            pool: known(pool),
            backend: flow_client.backend,
            attempts: flow_client.attempts,
            bytes: self.metrics.bytes(),
            datagrams: Some(flow_client.datagrams),
            connect_ms: None,
            total_ms: took,
            outcome,
            flags: LogFlags {
                left_out: u32::try_from(line.left_out).unwrap_or(u32::MAX),
                would_reject: flow_client.would_reject,
                ..LogFlags::default()
            },
            labels,
        };
        worker.access_log.write(line.class, number, &record);
    }
}

/// The addresses and counts of a flow's log line.
#[derive(Clone, Copy)]
pub(super) struct FlowLogDetails {
    pub(super) peer: PeerAddr,
    pub(super) client: Option<FlowClient>,
    pub(super) backend: Option<BackendAddr>,
    pub(super) attempts: u32,
    pub(super) datagrams: PerDirection<u64>,
    pub(super) would_reject: Option<crate::outcome::Reason>,
}

impl FlowLogDetails {
    /// Of a datagram that belongs to no flow.
    pub(super) fn stray(peer: PeerAddr, flow_client: Option<FlowClient>) -> Self {
        let datagrams = PerDirection::default();
        Self { peer, client: flow_client, backend: None, attempts: 0, datagrams, would_reject: None }
    }
}

impl<A> Flow<A> {
    pub(super) fn new(
        found: ConnectedBackend,
        permit: FlowPermit,
        slot: SlotPermit,
        guard: (A, Rc<()>),
        log_context: FlowLogContext,
    ) -> Self {
        Self {
            socket: found.socket,
            port: found.port,
            picked: found.picked,
            tried: found.tried,
            attempts: found.attempts,
            next_search: Moment::default(),
            is_answered: false,
            first_is_paid: false,
            receive_mode: ReceiveMode::default(),
            drops: KernelDrops::default(),
            first: None,
            header: Box::default(),
            datagrams: PerDirection::default(),
            permit,
            log_context,
            _slot: slot,
            _counted: guard,
        }
    }

    /// Continues with another backend.
    pub(super) fn move_to(&mut self, found: ConnectedBackend) {
        self.count_drops();
        self.drops = KernelDrops::default();
        // The socket goes, and with it its place on the poll.
        (self.socket, self.port, self.picked) = (found.socket, found.port, found.picked);
        (self.tried, self.attempts) = (found.tried, found.attempts);
        self.receive_mode = ReceiveMode::default();
    }

    /// Counts the answers that the kernel has dropped at its socket since the last time.
    pub(super) fn count_drops(&mut self) {
        let drops = self.drops.take(&self.socket);
        if drops > 0 {
            self.log_context.metrics.count_overflow(drops);
        }
    }

    /// Remembers the first datagram, while it is the only one: where its backend is not there, another one gets it.
    pub(super) fn keep_first(&mut self, spans: &[Span], room: &[u8]) {
        let is_first = self.datagrams.to_backend == 0 && self.first.is_none();
        self.first = match spans {
            [only] if is_first => room.get(only.clone()).map(Box::from),
            _ => None,
        };
    }

    /// Sends the first datagram again to the new backend. The old one did not receive it, so it is counted once.
    pub(super) fn repeat_first(&self) {
        if let Some(first) = self.first.as_ref().filter(|_| self.datagrams.to_backend > 0)
            && let Err(error) = socket::send(&self.socket, &self.header, first)
        {
            self.log_context.metrics.count_dropped(Direction::ToBackend, socket::drop_reason(&error), 1);
        }
    }

    /// The backend's address.
    pub(super) fn backend(&self) -> Option<BackendAddr> {
        let picked = self.picked.as_ref().map(|picked| picked.address());
        picked.or_else(|| self.socket.peer_addr().ok().map(BackendAddr))
    }

    /// Ends it, counts it and writes its log line.
    pub(super) fn end(
        mut self,
        outcome: Outcome,
        peer: PeerAddr,
        flow_client: FlowClient,
        worker: &WorkerContext,
        now: Moment,
    ) {
        self.count_drops();
        if self.is_answered {
            self.picked.iter().for_each(|picked| picked.answered());
        }
        let told = FlowLogDetails {
            peer,
            client: Some(flow_client),
            backend: self.backend(),
            attempts: self.attempts,
            datagrams: self.datagrams,
            would_reject: self.permit.would_reject(),
        };
        self.log_context.end(outcome, told, worker, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_answer_is_looked_for_periodically() {
        let mut listening = ReceiveMode::default();
        let looks: Vec<_> = (1..=40).filter(|_| listening.count_received()).collect();
        assert_eq!(looks.len(), 2);
        assert!(!ReceiveMode::Together.count_received());
    }

    #[tokio::test]
    async fn two_answers_at_once_are_taken_together_from_then_on_and_none_is_joined_or_lost() {
        let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
        let flow = socket::connect(BackendAddr(backend.local_addr().unwrap()), None).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_nonblocking(true).unwrap();
        let listen_socket = UdpListenSocket::new(client, 0).unwrap();
        backend.connect(flow.local_addr().unwrap()).unwrap();
        let (mut listening, mut spans) = (ReceiveMode::default(), Vec::new());
        let (mut room, mut metas) = (vec![0; 4 * ROOM], [RecvMeta::default(); 4]);
        let mut heard = Vec::new();
        let mut hear = |listening: &mut ReceiveMode, heard: &mut Vec<Vec<u8>>| {
            listening.receive(&flow, &listen_socket, &mut room, &mut metas, &mut spans).unwrap();
            heard.extend(spans.iter().map(|span| room[span.clone()].to_vec()));
        };
        // On loopback what was sent is there.
        let singly: Vec<_> =
            (0..=ReceiveMode::EVERY).map(|number| vec![number; usize::from(number)]).collect();
        for answer in &singly {
            backend.send(answer).unwrap();
        }
        for _ in 0..ReceiveMode::EVERY {
            assert!(matches!(listening, ReceiveMode::Singly(_)));
            hear(&mut listening, &mut heard);
        }
        assert!(matches!(listening, ReceiveMode::Together));
        let parts = [b"one".as_slice(), b"two", b"3"].map(std::io::IoSlice::new);
        socket::send_segments(&backend, &parts, 3).unwrap();
        backend.send(b"").unwrap();
        while heard.len() < singly.len() + 4 {
            hear(&mut listening, &mut heard);
        }
        let together = [&b"one"[..], b"two", b"3", b""].map(<[u8]>::to_vec);
        assert_eq!(heard, [singly, together.to_vec()].concat());
    }

    #[test]
    fn flow_is_small() {
        assert!(size_of::<Flow<[usize; 2]>>() <= 320, "{} bytes", size_of::<Flow<[usize; 2]>>());
    }
}
