//! The last step: forwards bytes in both directions until both sides have ended.
//!
//! Small messages are copied through the worker's scratch buffer, large transfers are spliced through a pipe that
//! the session borrows. An idle session owns neither.

pub(crate) mod bandwidth;
pub(crate) mod buffer;
mod copy;
mod direction;
pub mod freeze;
pub mod pipe;
mod socket;
mod splice;

use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;

use self::bandwidth::TenantResources;
use self::copy::PendingWrite;
use self::direction::{DirectionPhase, DirectionState, EndError};
use self::socket::{ends, keepalive, reason, shut_down};
use crate::account::{Direction, PerDirection};
use crate::clock::wheel::{Tick, TickSpan};
use crate::fault;
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::session_context::{Cancelled, SessionContext};

/// The bytes that one direction may move in one turn; then the worker's other sessions get theirs.
const TURN: usize = 512 * 1024;

/// A pipe that nothing went through for so long goes back to the store.
const PIPE_REST: TickSpan = TickSpan::of(Duration::from_secs(1));

/// While bytes are held, or wait for bandwidth, how often both sockets are asked whether they were reset.
const LOOK: TickSpan = TickSpan::of(Duration::from_secs(2));

/// A session that has lived so long gets keepalive on both its sides: a short one is spared eight calls, or two
/// timers of the kernel's where a listening socket hands it down.
const SETTLED: TickSpan = TickSpan::of(Duration::from_secs(5));

/// The connections to a client and to its backend.
#[derive(Debug)]
pub struct ConnectionPair {
    /// The client's connection.
    pub client: TcpStream,
    /// The backend's.
    pub backend: TcpStream,
    /// What has been read of the client already, and goes to the backend first.
    pub first: Vec<u8>,
}

/// The idle timeouts of a session.
#[derive(Clone, Copy, Debug)]
pub struct IdleTimeouts {
    /// No byte in either direction.
    pub idle: TickSpan,
    /// One side has ended and the other sends nothing.
    pub half_close: TickSpan,
    /// How long the kernel waits for an acknowledgement, in either direction; zero leaves it to the kernel's own rules.
    pub tcp_user_timeout: Duration,
    /// Bytes are held in one direction and its sink takes none of them; `None` leaves it to the other times.
    pub stall: Option<TickSpan>,
    /// Bytes that the kernel takes for one connection beyond what it has sent; zero leaves it to the kernel.
    pub unsent: u32,
}

/// Forwards in both directions until both sides have ended, or the session has to end.
///
/// A half-close is passed on when everything before it has been; a reset on one side is a reset on the other.
pub fn relay<'a>(
    pair: ConnectionPair,
    timeouts: &'a IdleTimeouts,
    resources: TenantResources<'a>,
    session: &'a mut SessionContext,
) -> Relay<'a> {
    let now = session.tick();
    let mut directions =
        PerDirection { to_backend: DirectionState::new(now), to_client: DirectionState::new(now) };
    // The client's socket has TCP_NODELAY from the listening socket.
    directions.to_client.prompt = true;
    directions.to_backend.pending_write = PendingWrite::new(pair.first, resources);
    Relay::new([pair.client, pair.backend], directions, timeouts, resources, session)
}

/// Forwards a session in both directions, as one hand-written future.
#[derive(Debug)]
pub struct Relay<'a> {
    client: TcpStream,
    backend: TcpStream,
    directions: PerDirection<DirectionState>,
    timeouts: &'a IdleTimeouts,
    /// When the session will have settled, until it has.
    settles: Tick,
    /// When both sockets are asked for an error, while bytes are held.
    looks_at: Tick,
    /// The side that ended first, if any.
    first_end: Option<EndedBy>,
    /// Whose connection broke, and how, while the other direction was still to be emptied.
    broken: Option<(EndedBy, Reason)>,
    ended: bool,
    /// How many visits of the worker to its sessions it knows of.
    visits: u32,
    /// While its endpoint is no longer its tenant's: when it ends.
    revoked_at: Tick,
    resources: TenantResources<'a>,
    session: &'a mut SessionContext,
}

/// Why a relay returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayStop {
    /// Its end.
    Ended(Outcome),
    /// The worker visits its sessions, or the grace of this one is over: the session checks what has changed for it. Polled
    /// again, the relay continues.
    Visit,
}

impl Future for Relay<'_> {
    type Output = RelayStop;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RelayStop> {
        let this = &mut *self;
        let visits = this.session.worker().visits();
        if visits != this.visits {
            this.visits = visits;
            return Poll::Ready(RelayStop::Visit);
        }
        fault::panic_where_injected();
        for direction in Direction::ALL {
            let mut left = TURN;
            let pumped = this.pump(direction, &mut left, context);
            if let Poll::Ready(Err(broken)) = &pumped
                && let Some(outcome) = this.on_error(direction, broken)
            {
                return Poll::Ready(RelayStop::Ended(this.reset(outcome)));
            }
            this.end_turn(direction, pumped.is_pending() && left == 0);
        }
        if this.directions.to_backend.is_over() && this.directions.to_client.is_over() {
            return Poll::Ready(RelayStop::Ended(this.both_ended()));
        }
        this.poll_time(context).map_or(Poll::Pending, Poll::Ready)
    }
}

impl<'a> Relay<'a> {
    /// One that has just begun: it settles later, and neither end has ended or broken.
    fn new(
        [client, backend]: [TcpStream; 2],
        directions: PerDirection<DirectionState>,
        timeouts: &'a IdleTimeouts,
        resources: TenantResources<'a>,
        session: &'a mut SessionContext,
    ) -> Self {
        Self {
            client,
            backend,
            directions,
            timeouts,
            settles: session.tick().after(SETTLED),
            looks_at: Tick::NEVER,
            first_end: None,
            broken: None,
            ended: false,
            visits: 0,
            revoked_at: Tick::NEVER,
            resources,
            session,
        }
    }
}

impl Relay<'_> {
    /// Its endpoint is revoked: it ends after this grace, which begins with the first call; its end, where
    /// that is now.
    pub fn revoke(&mut self, grace: Duration) -> Option<Outcome> {
        let now = self.session.tick();
        if self.revoked_at == Tick::NEVER && !grace.is_zero() {
            self.revoked_at = now.after(TickSpan::of(grace));
        }
        let is_over = grace.is_zero() || self.revoked_at <= now;
        is_over.then(|| self.reset(Outcome::reject(EndedAt::Forward, Reason::Revoked)))
    }

    /// Its first poll is a visit: what may have changed for it is checked before any byte is forwarded.
    pub fn visit_first(&mut self) {
        self.visits = self.session.worker().visits().wrapping_sub(1);
    }

    /// Its endpoint is still valid.
    pub fn confirm(&mut self) {
        self.revoked_at = Tick::NEVER;
    }

    /// Moves one direction's bytes until one of its ends, or the tenant's bandwidth, has to be waited for, or nothing
    /// is `left` of its turn. Ready once there is nothing left to do.
    fn pump(
        &mut self,
        direction: Direction,
        left: &mut usize,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), EndError>> {
        let resources = self.resources;
        let other_over = self.directions.of(direction.opposite()).is_over();
        let (source, sink) = match direction {
            Direction::ToBackend => (&mut self.client, &mut self.backend),
            Direction::ToClient => (&mut self.backend, &mut self.client),
        };
        let state = self.directions.of_mut(direction);
        loop {
            // 1. What is held goes first: nothing is read, and no end passed on, before it has gone.
            if !state.pending_write.is_empty() {
                state.set_nodelay(sink, &self.session.metrics);
                let count = ready!(state.pending_write.poll_write(sink, context)).map_err(EndError::Sink)?;
                self.session.metrics.count_bytes(direction, count, false);
                state.last_progress = self.session.tick();
                continue;
            }
            if let Some(pipe) = state.pipe.as_mut().filter(|pipe| !pipe.is_empty()) {
                let count = match ready!(splice::poll_out(pipe, sink, context)) {
                    Err(error) if splice::is_refused(&error) => {
                        state.take_out(resources, self.session).map_err(EndError::Sink)?;
                        continue;
                    }
                    count => count.map_err(EndError::Sink)?,
                };
                self.session.metrics.count_bytes(direction, count, true);
                state.last_progress = self.session.tick();
                continue;
            }
            match state.phase {
                DirectionPhase::Shut | DirectionPhase::Dead => return Poll::Ready(Ok(())),
                DirectionPhase::Draining => {
                    // When the other direction is over too, the close that follows says the same with a call less.
                    if !other_over {
                        shut_down(sink).map_err(EndError::Sink)?;
                    }
                    self.first_end.get_or_insert(ends(direction).0);
                    state.shut(resources, self.session);
                    return Poll::Ready(Ok(()));
                }
                DirectionPhase::Open => {}
            }
            state.adapt(sink, self.timeouts.unsent, resources, self.session);
            if *left == 0 {
                // Woken only after the worker has looked at its sockets. A plain wake-up would have this session
                // polled up to 61 times before (tokio's event interval): 30 MiB, and the others wait for all of it.
                ready!(pin!(tokio::task::yield_now()).poll(context));
                *left = TURN;
            }
            let is_short = state.pipe.is_none() && resources.is_short(self.session);
            if state.pipe.is_some() || is_short {
                // A pipe is not filled for a sink that takes nothing: it would only be held. A copy finds out by its
                // write, which takes everything nearly always, and asks no socket before.
                ready!(sink.poll_write_ready(context)).map_err(EndError::Sink)?;
            }
            // 2. What comes next, and no more than the tenant's bandwidth has for it.
            let want = state.read_size(sink, self.timeouts.unsent, is_short);
            let grant =
                resources.poll_grant(direction, &mut state.limiter, want, source, self.session, context);
            let grant = ready!(grant).map_err(EndError::Source)?;
            let parts = self.session.parts();
            let most = grant.most().min(want);
            let read = state.read_once(direction, (source, sink), most, resources, parts, context);
            self.session.metrics.would_delay |= resources.settle(direction, &mut state.limiter, grant, &read);
            let count = ready!(read)?;
            if count == 0 && state.pipe.is_some() {
                // The end, or an urgent byte before it: the kernel's splice stops there and says 0. Or it was refused.
                // A read knows the one, passes the other, and needs no splice.
                state.stop_splicing(resources, self.session);
                continue;
            }
            *left = left.saturating_sub(count);
            if count == 0 {
                state.phase = DirectionPhase::Draining;
            } else {
                state.last_progress = self.session.tick();
                state.note_read(count, want);
            }
        }
    }

    /// At the end of a direction's turn: it leaves the queue for bandwidth, unless it waits there or `goes_on`.
    fn end_turn(&mut self, direction: Direction, goes_on: bool) {
        let state = self.directions.of_mut(direction);
        let held = state.held();
        if self.resources.end_turn(direction, &mut state.limiter, held, goes_on) {
            // What it waited was not its silence.
            state.last_progress = self.session.tick();
        }
    }

    /// One end of a direction failed. An outcome, unless the other direction may still hold an answer.
    fn on_error(&mut self, direction: Direction, broken: &EndError) -> Option<Outcome> {
        let (source, sink) = ends(direction);
        match broken {
            // A source fails only when nothing of it is held, and a broken connection sends nothing more.
            EndError::Source(error) => {
                let (by, why) = self.broken.unwrap_or((source, reason(error)));
                Some(Outcome::new(by, EndedAt::Forward, why))
            }
            // A sink that takes nothing may have sent its answer before: it is read to its end, then the source
            // learns that its bytes were lost.
            EndError::Sink(error) => {
                let why = reason(error);
                if why == Reason::Shortage {
                    // The connection stands, and its other end may wait for what it will never get.
                    return Some(Outcome::new(sink, EndedAt::Forward, why));
                }
                let state = self.directions.of_mut(direction);
                state.phase = DirectionPhase::Dead;
                state.pending_write = PendingWrite::default();
                self.resources.give_back(state.pipe.take(), self.session);
                self.broken.get_or_insert((sink, why));
                None
            }
        }
    }

    /// Both directions are over: a clean end, unless one failed.
    fn both_ended(&mut self) -> Outcome {
        if let Some((by, why)) = self.broken {
            return self.reset(Outcome::new(by, EndedAt::Forward, why));
        }
        self.ended = true;
        Outcome::new(self.first_end.unwrap_or(EndedBy::Client), EndedAt::Forward, Reason::Done)
    }

    /// Looks at the time: gives back pipes that rest, and ends a session that was silent for too long.
    fn poll_time(&mut self, context: &Context<'_>) -> Option<RelayStop> {
        let (timeouts, why) = if self.first_end.is_some() || self.broken.is_some() {
            (self.timeouts.half_close, Reason::HalfCloseTimeout)
        } else {
            (self.timeouts.idle, Reason::IdleTimeout)
        };
        loop {
            let now = self.session.tick();
            // A session that waits for bandwidth is not idle by its own fault.
            let moved = if self.waits() {
                now
            } else {
                self.directions.to_backend.last_progress.max(self.directions.to_client.last_progress)
            };
            let allowed = self.session.idle(timeouts);
            let deadline = moved.after(allowed);
            if deadline <= now {
                if let Some((by, why)) = self.broken {
                    // What was lost is why it ends, and whose bytes they were has to learn it.
                    return Some(RelayStop::Ended(self.reset(Outcome::new(by, EndedAt::Forward, why))));
                }
                let why = if allowed < timeouts { Reason::Drained } else { why };
                return Some(RelayStop::Ended(self.expire(Outcome::reject(EndedAt::Forward, why))));
            }
            if let Some(outcome) = self.look_for_resets(now).or_else(|| self.stalled(now)) {
                return Some(RelayStop::Ended(self.reset(outcome)));
            }
            if self.revoked_at <= now {
                return Some(RelayStop::Visit);
            }
            let next = deadline.min(self.settle(now)).min(self.release_idle_pipes(now)).min(self.looks_at);
            let next = next.min(self.revoked_at);
            self.session.wake_at(next);
            match self.session.poll_cancelled(context) {
                None => return None,
                // It may be in the middle of an answer, and a plain end would say that this was all of it.
                Some(Cancelled::Drained) => {
                    let outcome = Outcome::reject(EndedAt::Forward, Reason::Drained);
                    return Some(RelayStop::Ended(self.reset(outcome)));
                }
                Some(Cancelled::Expired) => {}
            }
        }
    }

    /// Whether a direction waits for its tenant's bandwidth.
    fn waits(&self) -> bool {
        self.directions.to_backend.limiter.has_joined() || self.directions.to_client.limiter.has_joined()
    }

    /// While bytes are held for a sink that takes none, or wait for bandwidth, their source is not read, and its reset
    /// would not be noticed before the session has been silent for too long: so it is asked from time to time.
    fn look_for_resets(&mut self, now: Tick) -> Option<Outcome> {
        if !self.directions.to_backend.pending() && !self.directions.to_client.pending() && !self.waits() {
            if self.looks_at != Tick::NEVER {
                self.forget_queues();
            }
            self.looks_at = Tick::NEVER;
            return None;
        }
        let due = self.looks_at;
        self.looks_at = due.min(now.after(LOOK));
        if due > now {
            return None;
        }
        self.looks_at = now.after(LOOK);
        let (client, backend) = (&self.client, &self.backend);
        self.directions.to_backend.note_queues((client, backend), self.resources.quota, now);
        self.directions.to_client.note_queues((backend, client), self.resources.quota, now);
        let failed = |socket: &TcpStream| socket.take_error().ok().flatten();
        let (by, error) = match (failed(&self.client), failed(&self.backend)) {
            (Some(error), _) => (EndedBy::Client, error),
            (None, Some(error)) => (EndedBy::Backend, error),
            (None, None) => return None,
        };
        Some(Outcome::new(by, EndedAt::Forward, reason(&error)))
    }

    fn forget_queues(&mut self) {
        for direction in Direction::ALL {
            self.directions.of_mut(direction).forget_queues(self.resources.quota);
        }
    }

    /// Its end, where a sink, and the kernel's queue before it, took none of the bytes held for it for too long.
    fn stalled(&self, now: Tick) -> Option<Outcome> {
        let limit = self.timeouts.stall?;
        let is_stalled = |state: &DirectionState| state.pending() && state.last_progress.after(limit) <= now;
        let is_any = is_stalled(&self.directions.to_backend) || is_stalled(&self.directions.to_client);
        is_any.then(|| Outcome::reject(EndedAt::Forward, Reason::Stalled))
    }

    /// Turns keepalive on and bounds how long sent bytes may stay unacknowledged, once the session is no short one; when that
    /// will be.
    ///
    /// Keepalive alone does not find a dead host while bytes are unacknowledged (`tcp_keepalive_timer` in
    /// net/ipv4/`tcp_timer.c`): the kernel retransmits for a quarter of an hour (`tcp_retries2`). `TCP_USER_TIMEOUT`, tcp(7), is
    /// read each time that timer runs, so it holds for what was sent before, too.
    fn settle(&mut self, now: Tick) -> Tick {
        if self.settles <= now {
            self.settles = Tick::NEVER;
            for socket in [&self.client, &self.backend] {
                // A connection that cannot be asked is found dead by its timeouts.
                let socket = socket2::SockRef::from(socket);
                socket.set_tcp_keepalive(&keepalive()).unwrap_or_default();
                let limit = self.timeouts.tcp_user_timeout;
                if !limit.is_zero() {
                    socket.set_tcp_user_timeout(Some(limit)).unwrap_or_default();
                }
            }
        }
        self.settles
    }

    /// Releases idle pipes; returns when the next is due.
    fn release_idle_pipes(&mut self, now: Tick) -> Tick {
        let mut next = Tick::NEVER;
        for direction in Direction::ALL {
            let state = self.directions.of_mut(direction);
            let Some(pipe) = &state.pipe else { continue };
            let rested = state.last_progress.after(PIPE_REST);
            if rested > now {
                next = next.min(rested);
            } else if pipe.is_empty() {
                state.stop_splicing(self.resources, self.session);
            }
        }
        next
    }

    /// Ends a silent session: with a reset where bytes are held that will not arrive.
    fn expire(&mut self, outcome: Outcome) -> Outcome {
        if self.directions.to_backend.pending() || self.directions.to_client.pending() {
            return self.reset(outcome);
        }
        self.ended = true;
        outcome
    }

    /// Makes the coming close a reset on both sides.
    fn reset(&mut self, outcome: Outcome) -> Outcome {
        for socket in [&self.client, &self.backend] {
            // The only error is that the connection is closed already; then there is nothing to do.
            socket.set_zero_linger().unwrap_or_default();
        }
        self.ended = true;
        outcome
    }
}

impl Drop for Relay<'_> {
    /// A session that did not come to its end must not look as if it had: not after a panic, and not when the
    /// process ends. Pipes go back, or are closed where they hold bytes.
    fn drop(&mut self) {
        if !self.ended {
            self.reset(Outcome::reject(EndedAt::Forward, Reason::Drained));
        }
        self.forget_queues();
        for direction in Direction::ALL {
            let state = self.directions.of_mut(direction);
            self.resources.give_back(state.pipe.take(), self.session);
            self.resources.end(direction, &mut state.limiter);
        }
    }
}
