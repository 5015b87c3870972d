//! UDP: a shell around the pure flow table. Datagrams of a worker come in here and go out again, and every flow is
//! accounted for.

mod closing;
mod drops;
mod entry;
mod follow;
pub mod freeze;
mod open;
mod retirement;
mod revoke;
mod search;
mod send_runs;
mod socket;
pub mod table;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use quinn_udp::RecvMeta;
use rustix::event::{Timespec, epoll};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep;

use self::entry::Flow;
use self::open::ClientDatagram;
pub use self::retirement::SocketRetirement;
use self::send_runs::SendRuns;
use self::socket::{BATCH, ROOM, Span, UdpListenSocket, datagrams};
use self::table::{FlowId, FlowPath, FlowTable};
use crate::accept::PAUSE;
use crate::account::PerDirection;
use crate::account::session_metrics::ListenerCounters;
use crate::account::udp_drops::DatagramDrop;
use crate::addr::PeerAddr;
use crate::clock::{self, Moment};
use crate::outcome::{EndedAt, Outcome, Reason};
use crate::proxy_protocol::{self, Transport};
use crate::state::WorkerContext;

/// Flows that are closed for their idleness in one go: a tenth of a millisecond.
const EXPIRED_AT_ONCE: usize = 32;

/// How long the next ones wait. The kernel frees closed sockets later, all that it has by then at once and on this core
/// (`SOCK_RCU_FREE`, `rcu_do_batch` in kernel/rcu/tree.c): of thousands that were closed without a rest that took 3 ms
/// (benches/flows.rs).
const REST: Duration = Duration::from_millis(1);

/// Events of flows that are taken in one call.
const EVENTS: usize = 64;

/// Datagrams after which others have their turn: half a millisecond of sends.
const MUCH: usize = 256;

/// Messages that one flow is given in its turn, so that a greedy one does not keep the others waiting.
const TURN: usize = 16;

/// Which flows have something to say.
type Poll = AsyncFd<OwnedFd>;

/// The UDP side of one worker. `A` is a guard that each flow holds while it lives.
pub struct FlowWorker<A> {
    state: RefCell<FlowWorkerState<A>>,
    /// The sockets of all flows: one event source for the runtime, however many there are.
    poll: Poll,
    sockets: RefCell<Vec<Option<Rc<UdpListenSocket>>>>,
    /// Whether receiving is paused; datagrams then wait in the listening sockets.
    paused: Cell<bool>,
    resumed: Notify,
    /// Once flows may have been idle for long.
    is_due: Notify,
}

struct FlowWorkerState<A> {
    context: Rc<WorkerContext>,
    table: FlowTable<Flow<A>>,
    count_flow: Box<dyn Fn() -> A>,
    room: Vec<u8>,
    metas: Vec<RecvMeta>,
    runs: SendRuns,
    spans: Vec<Span>,
    copy: Vec<u8>,
    /// Whether datagrams go to backends together; not where the kernel or a driver has refused that.
    together: bool,
    /// Whose turn it is.
    turn: Option<FlowId>,
    /// Flows that are revoked and have a grace: when each ends. No more than there are flows.
    revoked: HashMap<FlowId, Moment>,
}

impl<A> fmt::Debug for FlowWorker<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flows").finish_non_exhaustive()
    }
}

impl<A> FlowWorker<A> {
    /// No flows yet. `count_flow` counts one at its worker, and what it returns is held as long as the flow lives.
    ///
    /// # Errors
    /// Where the system has no descriptor left.
    pub fn new(context: &Rc<WorkerContext>, count_flow: Box<dyn Fn() -> A>) -> io::Result<Rc<Self>> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an OwnedFd keeps its descriptor, as both ask"
        )]
        let poll = AsyncFd::new(poll)?;
        let state = FlowWorkerState {
            context: Rc::clone(context),
            table: FlowTable::new(context.with_snapshot(|snapshot| snapshot.flow_idle)),
            count_flow,
            room: vec![0; BATCH * ROOM],
            metas: vec![RecvMeta::default(); BATCH],
            runs: SendRuns::default(),
            spans: Vec::new(),
            copy: Vec::new(),
            together: true,
            turn: None,
            revoked: HashMap::new(),
        };
        Ok(Rc::new(Self {
            state: RefCell::new(state),
            poll,
            sockets: RefCell::default(),
            paused: Cell::new(false),
            resumed: Notify::new(),
            is_due: Notify::new(),
        }))
    }

    /// Stops receiving from clients: datagrams wait in the listening socket, as long as there is room.
    pub fn pause(&self) {
        self.paused.set(true);
    }

    /// A duplicate of each listening socket, with its listener index and address.
    #[must_use]
    pub fn clone_sockets(&self) -> Vec<(u32, SocketAddr, OwnedFd)> {
        let sockets = self.sockets.borrow();
        let open = sockets.iter().flatten().filter(|listen_socket| !listen_socket.is_closing());
        open.filter_map(|listen_socket| {
            Some((listen_socket.listener(), listen_socket.address(), listen_socket.try_clone()?))
        })
        .collect()
    }

    /// Receives from clients again.
    pub fn resume(&self) {
        self.paused.set(false);
        self.resumed.notify_waiters();
    }

    /// The number of flows.
    #[must_use]
    pub fn count(&self) -> usize {
        self.state.borrow().table.len()
    }

    /// Hears what comes in at a bound socket of a listener, by its place, and answers from there, until it is
    /// [closed](Self::close).
    ///
    /// Where the socket breaks, `mend` gives another one in its place, or none where the listener's address is given up; it is told
    /// what is wrong, and how to find out whether the socket is to be closed.
    ///
    /// # Errors
    /// The socket cannot be used at all.
    pub async fn serve_socket(
        &self,
        socket: UdpSocket,
        listener: u32,
        mend: &impl AsyncFn(&io::Error, &dyn Fn() -> bool) -> Option<UdpSocket>,
    ) -> io::Result<()> {
        if self.reopen(listener, socket.local_addr()?) {
            return Ok(());
        }
        let mut listen_socket = Rc::new(UdpListenSocket::new(socket, listener)?);
        self.count_drops(&listen_socket);
        let place = {
            let mut sockets = self.sockets.borrow_mut();
            // The place of one that is closed has no flows.
            let place = sockets.iter().position(Option::is_none).unwrap_or(sockets.len());
            if place == sockets.len() {
                sockets.push(None);
            }
            sockets.get_mut(place).into_iter().for_each(|free| *free = Some(Rc::clone(&listen_socket)));
            u16::try_from(place).map_err(|_| io::ErrorKind::InvalidInput)?
        };
        let mut short = false;
        while !listen_socket.is_closed() {
            // A socket that closes is not given to another listener.
            let waits = |listen_socket: &UdpListenSocket| self.paused.get() && !listen_socket.is_closing();
            while waits(&listen_socket) {
                self.resumed.notified().await;
            }
            match listen_socket
                .readable(|listen_socket| {
                    if waits(listen_socket) { Ok(false) } else { self.receive_batch(listen_socket, place) }
                })
                .await
            {
                Ok(()) => short = false,
                Err(error) if socket::drop_reason(&error) == DatagramDrop::Shortage => {
                    self.count_error(listen_socket.listener(), |cells| cells.errors_shortage.add(1));
                    if !std::mem::replace(&mut short, true) {
                        tracing::warn!(listener = listen_socket.listener(), %error, "receiving pauses");
                    }
                    sleep(PAUSE).await;
                }
                Err(error) => {
                    self.count_error(listen_socket.listener(), |cells| cells.errors_fatal.add(1));
                    // It stays until there is another: its flows answer from it.
                    let Some(socket) = mend(&error, &|| listen_socket.is_closing()).await else {
                        return Ok(());
                    };
                    // Where that fails, the old one fails again.
                    if let Ok(fresh) = listen_socket.replaced_by(socket) {
                        listen_socket = Rc::new(fresh);
                        let mut sockets = self.sockets.borrow_mut();
                        sockets
                            .get_mut(usize::from(place))
                            .into_iter()
                            .for_each(|own| *own = Some(Rc::clone(&listen_socket)));
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts what the kernel has dropped at a listening socket since the last time: in another process it may have been
    /// another's, whose counter goes on here.
    fn count_drops(&self, listen_socket: &UdpListenSocket) {
        let context = &self.state.borrow().context;
        if let Some(label) = context.listener_label(listen_socket.listener()) {
            let cells = context.metrics.listener(&label);
            cells.overflowed.get_or_init(PerDirection::default).to_backend.add(listen_socket.take_drops());
        }
    }

    /// Counts what the kernel has dropped at the listening sockets since the last time.
    pub fn count_all_drops(&self) {
        for listen_socket in self.sockets.borrow().iter().flatten() {
            self.count_drops(listen_socket);
        }
    }

    /// Counts what went wrong at a listener. What could not be received is still in the socket's queue, or is lost there and
    /// counted by the kernel.
    fn count_error(&self, listener: u32, add: impl FnOnce(&ListenerCounters)) {
        let context = &self.state.borrow().context;
        if let Some(label) = context.listener_label(listener) {
            add(&context.metrics.listener(&label));
        }
    }

    /// Receives one batch of datagrams from clients; returns whether the queue is empty.
    fn receive_batch(&self, listen_socket: &UdpListenSocket, place: u16) -> io::Result<bool> {
        let mut state = self.state.borrow_mut();
        let rules = state.header_rules(listen_socket.listener());
        listen_socket.header.set(rules.map(|(rules, _)| rules));
        listen_socket.follows_bare.set(rules.is_some_and(|(_, follows_bare)| follows_bare));
        let (mut room, mut metas) = (std::mem::take(&mut state.room), std::mem::take(&mut state.metas));
        let received = listen_socket.receive(&mut room, &mut metas);
        if let Ok(count) = received {
            let now = clock::now();
            state.catch_panic(now, |state| {
                for (meta, at) in metas.iter().take(count).zip(0..) {
                    let path = FlowPath {
                        socket: place,
                        local: listen_socket.local_address(meta),
                        peer: PeerAddr(meta.addr),
                    };
                    for span in datagrams(at * ROOM, meta.len, meta.stride) {
                        state.take_in(
                            ClientDatagram { socket: listen_socket, path, room: &room, span },
                            &self.poll,
                            now,
                        );
                    }
                }
                state.send_runs(&self.poll, &room, now);
            });
        }
        (state.room, state.metas) = (room, metas);
        received.map(|count| count < BATCH)
    }

    /// Forwards backends' answers, forever.
    ///
    /// # Errors
    /// What broke the poll.
    pub async fn answer(&self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let mut ready = self.poll.readable().await?;
            // The poll tells of a flow that has more to say, too: it is empty once it says so.
            if self.collect(&mut events)? == 0 {
                ready.clear_ready();
                continue;
            }
            drop(ready);
            let mut rest = &events[..];
            while !rest.is_empty() {
                rest = self.pass_answers(rest);
                // Clients have their turn, and what they bring may be answered by then.
                tokio::task::yield_now().await;
            }
        }
    }

    /// The flows with readable sockets, without waiting.
    fn collect(&self, events: &mut Vec<epoll::Event>) -> io::Result<usize> {
        events.clear();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(self.poll.get_ref(), rustix::buffer::spare_capacity(events), Some(&at_once))?;
        Ok(events.len())
    }

    /// Gives flows that have something to say their turns, until that is much; those whose turn has not come.
    fn pass_answers<'a>(&self, events: &'a [epoll::Event]) -> &'a [epoll::Event] {
        let (mut state, sockets, now) = (self.state.borrow_mut(), self.sockets.borrow(), clock::now());
        let (mut events, mut passed) = (events, 0);
        while let Some((event, rest)) = events.split_first().filter(|_| passed < MUCH) {
            state.catch_panic(now, |state| {
                state.pass_answer(FlowId::from_u64(event.data.u64()), &sockets, &self.poll, now);
            });
            (events, passed) = (rest, passed + state.spans.len());
        }
        events
    }

    /// Goes on to `now`, for [`end_idle`](Self::end_idle).
    pub fn advance(&self, now: Moment) {
        let mut state = self.state.borrow_mut();
        state.follow_idle();
        state.end_revoked(now);
        if state.is_due(now) {
            self.is_due.notify_one();
        }
        drop(state);
        self.close_vacant();
    }

    /// Ends flows that were idle for long, some at a time; for ever.
    pub async fn end_idle(&self) {
        loop {
            self.is_due.notified().await;
            while self.state.borrow_mut().expire(clock::now()) {
                sleep(REST).await;
            }
        }
    }

    /// Ends every flow.
    pub fn end_all(&self) {
        let (mut state, now) = (self.state.borrow_mut(), clock::now());
        let outcome = Outcome::reject(EndedAt::Forward, Reason::Drained);
        let FlowWorkerState { table, context, .. } = &mut *state;
        for (path, flow_client, flow) in table.drain() {
            flow.end(outcome, path.peer, flow_client, context, now);
        }
    }
}

impl<A> FlowWorkerState<A> {
    /// What is asked of a header at a listener, and whether a datagram may come without one; `None` where there is none.
    fn header_rules(&self, listener: u32) -> Option<(proxy_protocol::ParserRules, bool)> {
        self.context.with_snapshot(|snapshot| {
            let listener = snapshot.listeners.get(listener as usize)?;
            let verify_crc = listener.header.as_ref()?.verify_crc;
            let rules = proxy_protocol::ParserRules { transport: Transport::Datagram, verify_crc };
            Some((rules, listener.follows_bare))
        })
    }

    /// How long a flow may be silent now.
    fn follow_idle(&mut self) {
        let idle = self.context.with_snapshot(|snapshot| snapshot.flow_idle);
        let idle = self.context.local.drain_idle().map_or(idle, |drain| drain.duration().min(idle));
        if idle != self.table.idle() {
            self.table.set_idle(idle);
        }
    }

    /// Whether there is a flow that may have been idle for long.
    fn is_due(&self, now: Moment) -> bool {
        self.table.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Ends some idle flows; returns whether there may be more.
    fn expire(&mut self, now: Moment) -> bool {
        let Self { table, context, .. } = self;
        let why = if context.local.is_draining() { Reason::Drained } else { Reason::IdleTimeout };
        table.expire(now, EXPIRED_AT_ONCE, |path, flow_client, flow| {
            flow.end(Outcome::reject(EndedAt::Forward, why), path.peer, flow_client, context, now);
        });
        self.is_due(now)
    }

    /// Runs `work`. A panic in it ends the current flow and no other; what came in the same batch is lost.
    fn catch_panic(&mut self, now: Moment, work: impl FnOnce(&mut Self)) {
        // What it leaves half done is that flow's, which ends, and the batch's, which is thrown away.
        if catch_unwind(AssertUnwindSafe(|| work(self))).is_err() {
            self.runs = SendRuns::default();
            if let Some(id) = self.turn {
                self.end(id, Outcome::reject(EndedAt::Forward, Reason::Internal), now);
            }
        }
        self.turn = None;
    }

    /// Ends one flow.
    fn end(&mut self, id: FlowId, outcome: Outcome, now: Moment) {
        if !self.revoked.is_empty() {
            self.revoked.remove(&id);
        }
        if let Some((path, flow_client, flow)) = self.table.close(id) {
            flow.end(outcome, path.peer, flow_client, &self.context, now);
        }
    }
}
