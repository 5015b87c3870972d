//! How a tenant's bandwidth holds a direction back: what is not granted is not read, and stays with its sender.
//!
//! A direction that waits is asked for nothing: neither its socket nor a timer. It is woken at the tick that grants
//! it something. What it has read goes on unhindered, and the end after it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::LOOK;
use super::buffer::BufferBudget;
use super::pipe::{Pipe, PipeCache};
use crate::account::Direction;
use crate::admission::bandwidth_queue::BandwidthQueue;
use crate::admission::direction_limiter::{BandwidthContext, DirectionLimiter, ReadGrant};
use crate::admission::quota::Quota;
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::session_context::{Cancelled, SessionContext};

/// Pipes of a tenant that peers may hold that read nothing. They have send queues without a bound, 4 MiB each with the kernel's
/// default for `net.ipv4.tcp_wmem`; a session that takes one early has what a fast peer needs from the start.
const FEW_PIPES: u32 = 8;

/// What the sessions of one worker share.
#[derive(Debug)]
pub struct WorkerResources {
    /// The worker's pipes.
    pub pipes: PipeCache,
    /// The memory of the process for bytes that wait for a slow reader.
    pub buffers: Arc<BufferBudget>,
    /// The worker's queues for bandwidth.
    pub bandwidth: RefCell<BandwidthQueue>,
}

/// The same for the sessions of one tenant: two words, as each session keeps it.
#[derive(Clone, Copy, Debug)]
pub struct TenantResources<'a> {
    /// What the worker's sessions share.
    pub worker: &'a WorkerResources,
    /// The tenant's limits.
    pub quota: &'a Arc<Quota>,
}

impl TenantResources<'_> {
    /// A pipe, where there is one for the tenant.
    pub(super) fn take_pipe(self, session: &SessionContext) -> Option<Box<Pipe>> {
        self.worker.pipes.take(self.quota, session)
    }

    /// Whether the tenant has so few pipes that a session takes one whether its peer reads or not.
    pub(super) fn has_few_pipes(self) -> bool {
        self.quota.pipes.load(Ordering::Relaxed) < FEW_PIPES
    }

    /// Takes a pipe back.
    pub(super) fn give_back(self, pipe: Option<Box<Pipe>>, session: &SessionContext) {
        self.worker.pipes.give_back(pipe, self.quota, session);
    }

    /// Whether the tenant's part of the buffer memory is used up, so that a session reads little; counted as a refusal.
    pub(super) fn is_short(self, session: &SessionContext) -> bool {
        let is_short = self.worker.buffers.is_short(self.quota);
        if is_short {
            session.metrics.worker().buffers_refused.add(1);
        }
        is_short
    }

    /// Asks how much of `want` a direction may read: once there is something to read, and something for it.
    #[inline]
    pub(super) fn poll_grant(
        self,
        direction: Direction,
        limiter: &mut DirectionLimiter,
        want: usize,
        source: &TcpStream,
        session: &SessionContext,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<ReadGrant>> {
        if !limiter.has_joined() {
            if !self.quota.budget(direction).is_limited() {
                return Poll::Ready(Ok(ReadGrant::Free));
            }
            // A direction without bytes to read must not hold the queue.
            ready!(source.poll_read_ready(context))?;
        }
        let mut queue_context =
            BandwidthContext { quota: self.quota, queue: &mut self.worker.bandwidth.borrow_mut(), direction };
        let granted =
            limiter.request(&mut queue_context, want as u64, context.waker(), session.tick(), clock::now());
        granted.map_or(Poll::Pending, |grant| Poll::Ready(Ok(grant)))
    }

    /// Takes down what was read of a grant; nothing, where it is pending or failed. Whether it would have had to wait,
    /// were the limit not only observed.
    pub(super) fn settle<E>(
        self,
        direction: Direction,
        limiter: &mut DirectionLimiter,
        grant: ReadGrant,
        read: &Poll<Result<usize, E>>,
    ) -> bool {
        if grant == ReadGrant::Free {
            return false;
        }
        let count = if let Poll::Ready(Ok(count)) = read { *count as u64 } else { 0 };
        let now = if grant == ReadGrant::Watched { clock::now() } else { clock::Moment::default() };
        let mut queue_context =
            BandwidthContext { quota: self.quota, queue: &mut self.worker.bandwidth.borrow_mut(), direction };
        limiter.settle(&mut queue_context, grant, count, now)
    }

    /// Waits until the tenant's bandwidth has paid for the bytes that came with the header: they have been read already, and
    /// without this a tenant would send all that it has in short sessions. Before the dial, so that a session that waits holds
    /// no place of a backend. `failed` asks the client's socket for an error; a client that has sent its end still waits.
    ///
    /// # Errors
    /// The client is gone, has waited for as long as a session may be idle, or the process drains.
    pub async fn charge_first(
        self,
        bytes: usize,
        idle: TickSpan,
        failed: impl Fn() -> Option<io::Error>,
        session: &mut SessionContext,
    ) -> Result<(), Outcome> {
        if bytes == 0 || !self.quota.budget(Direction::ToBackend).is_limited() {
            return Ok(());
        }
        let mut unpaid =
            UnpaidBytes { resources: self, limiter: DirectionLimiter::default(), left: bytes as u64 };
        let since = session.tick();
        let mut looks_at = since.after(LOOK);
        poll_fn(|context| {
            if unpaid.poll_paid(session, context).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let (now, allowed) = (session.tick(), session.idle(idle));
            let deadline = since.after(allowed);
            if deadline <= now {
                let why = if allowed < idle { Reason::Drained } else { Reason::IdleTimeout };
                return Poll::Ready(Err(Outcome::reject(EndedAt::Tenant, why)));
            }
            if looks_at <= now {
                looks_at = now.after(LOOK);
                if let Some(error) = failed() {
                    let why = if super::reason(&error) == Reason::Reset {
                        Reason::Reset
                    } else {
                        Reason::Unanswered
                    };
                    return Poll::Ready(Err(Outcome::new(EndedBy::Client, EndedAt::Tenant, why)));
                }
            }
            session.wake_at(deadline.min(looks_at));
            match session.poll_cancelled(context) {
                Some(Cancelled::Drained) => {
                    Poll::Ready(Err(Outcome::reject(EndedAt::Tenant, Reason::Drained)))
                }
                // Neither time has come, as both lie ahead.
                Some(Cancelled::Expired) | None => Poll::Pending,
            }
        })
        .await
    }

    /// At the end of a turn: takes down what is held, and has a direction leave the queue that cannot use its grant,
    /// because one of its sockets has to be waited for or because it is over. Whether it left.
    pub(super) fn end_turn(
        self,
        direction: Direction,
        limiter: &mut DirectionLimiter,
        held: usize,
        goes_on: bool,
    ) -> bool {
        if limiter.holds() || self.quota.budget(direction).is_limited() {
            limiter.hold(self.quota, direction, held);
        }
        // A task that has used up its turn, ours or tokio's, comes back at once, and wants to find its grant.
        if !limiter.has_joined() || goes_on || !tokio::task::coop::has_budget_remaining() {
            return false;
        }
        let mut bandwidth = self.worker.bandwidth.borrow_mut();
        let leaves = !limiter.is_waiting(&bandwidth);
        if leaves {
            limiter.leave(&mut bandwidth, clock::now());
        }
        leaves
    }

    /// At the end of a session: nothing is held, and nothing waited for.
    pub(super) fn end(self, direction: Direction, limiter: &mut DirectionLimiter) {
        limiter.hold(self.quota, direction, 0);
        if limiter.has_joined() {
            limiter.leave(&mut self.worker.bandwidth.borrow_mut(), clock::now());
        }
    }
}

/// Charges the first bytes to the bandwidth limit. Dropping it leaves the queue.
struct UnpaidBytes<'a> {
    resources: TenantResources<'a>,
    limiter: DirectionLimiter,
    left: u64,
}

impl UnpaidBytes<'_> {
    fn poll_paid(&mut self, session: &mut SessionContext, context: &Context<'_>) -> Poll<()> {
        let (mut bandwidth, now) = (self.resources.worker.bandwidth.borrow_mut(), clock::now());
        let mut queue_context = BandwidthContext {
            quota: self.resources.quota,
            queue: &mut bandwidth,
            direction: Direction::ToBackend,
        };
        while self.left > 0 {
            let granted =
                self.limiter.request(&mut queue_context, self.left, context.waker(), session.tick(), now);
            let Some(grant) = granted else { return Poll::Pending };
            let count = self.left.min(grant.most() as u64);
            session.metrics.would_delay |= self.limiter.settle(&mut queue_context, grant, count, now);
            self.left -= count;
        }
        Poll::Ready(())
    }
}

impl Drop for UnpaidBytes<'_> {
    fn drop(&mut self) {
        self.resources.end(Direction::ToBackend, &mut self.limiter);
    }
}
