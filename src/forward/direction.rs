//! One direction of a session: what it holds, how far it has come, and whether it copies or splices.

use std::io;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::bandwidth::TenantResources;
use super::buffer::{self, FIRST, LEAST};
use super::copy::{self, PendingWrite};
use super::pipe::Pipe;
use super::splice;
use crate::account::Direction;
use crate::account::session_metrics::SessionMetrics;
use crate::admission::bandwidth::QUANTUM;
use crate::admission::direction_limiter::DirectionLimiter;
use crate::admission::quota::Quota;
use crate::clock::wheel::Tick;
use crate::session_context::{SCRATCH, SessionContext, WorkerLocal};
use crate::socket_options;

/// A read that fills at least this much of the scratch buffer is a large one.
///
/// 32 KiB: from there on a splice is cheaper than a copy, 0.58 s/GB against 0.67; at 16 KiB they are within a tenth, and
/// below they are equal (`cargo bench --bench splice`, 2026-11-25, kernel 6.18).
const LARGE: usize = SCRATCH / 2;

// A grant to a waiter is worth a splice, if each gets 64 KiB a second or more.
const _: () = assert!(LARGE as u64 <= QUANTUM);

/// The kernel's memory for queued bytes is about so many times the bytes, where the reader's window is small: a segment of 1,000
/// bytes takes 2,304 (`SKB_TRUESIZE` in include/linux/skbuff.h).
const OVERHEAD: usize = 2;

/// So many large reads in a row, and a direction goes over to splice: the second shows that the first was no burst.
const LARGE_READS: u8 = 2;

/// After so many measured reads in a row what the kernel queues for the sink is bounded. One alone is the rest of a message.
const MEASURED_READS: u8 = 2;

/// A peer that has acknowledged so many bytes reads them: while nothing is read, the receive queue of a connection takes 64 to
/// 128 KiB with the usual settings (131,072 bytes in `net.ipv4.tcp_rmem`).
const READ_BYTES: u64 = 256 * 1024;

/// So many small splices in a row, and it goes back to copying: a splice is two calls more than a copy of a
/// small message is worth.
const SMALL_SPLICES: u8 = 3;

/// One direction.
#[derive(Debug)]
pub(super) struct DirectionState {
    /// Bytes that were read and could not be written at once.
    pub(super) pending_write: PendingWrite,
    /// Held while the direction splices. Never has bytes while `pending_write` has. Boxed, because most sessions
    /// never splice.
    pub(super) pipe: Option<Box<Pipe>>,
    /// Large reads in a row while copying, small splices in a row while splicing.
    pub(super) streak: u8,
    /// Reads in a row while copying that were filled or large, or left bytes over, or for which the sink had little room: the next
    /// brings no more than what the sink takes.
    measured: u8,
    /// Whether the kernel takes a bounded number of unsent bytes for the sink.
    bounded: bool,
    pub(super) phase: DirectionPhase,
    /// Whether the sink has TCP_NODELAY.
    pub(super) prompt: bool,
    /// When bytes last moved.
    pub(super) last_progress: Tick,
    /// The sink's send queue when it was last looked at, while bytes are held.
    queued: u32,
    /// What the kernel's queues are counted as for the tenant, in its pages.
    pages: u16,
    /// What the tenant's bandwidth has for it.
    pub(super) limiter: DirectionLimiter,
}

/// The phase of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DirectionPhase {
    /// Bytes go.
    Open,
    /// The source has ended; what it had sent before is still on its way.
    Draining,
    /// Everything has been passed on, and so has the end.
    Shut,
    /// The sink takes nothing any more.
    Dead,
}

/// The end of a direction that failed, and the error.
pub(super) enum EndError {
    Source(io::Error),
    Sink(io::Error),
}

impl DirectionState {
    pub(super) fn new(now: Tick) -> Self {
        Self {
            pending_write: PendingWrite::default(),
            pipe: None,
            streak: 0,
            measured: 0,
            bounded: false,
            phase: DirectionPhase::Open,
            prompt: false,
            last_progress: now,
            queued: 0,
            pages: 0,
            limiter: DirectionLimiter::default(),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, DirectionPhase::Shut | DirectionPhase::Dead)
    }

    /// The bytes that were read and not passed on.
    pub(super) fn held(&self) -> usize {
        self.pending_write.len() + self.pipe.as_ref().map_or(0, |pipe| pipe.held())
    }

    pub(super) fn pending(&self) -> bool {
        !self.pending_write.is_empty() || self.pipe.as_ref().is_some_and(|pipe| !pipe.is_empty())
    }

    /// What the next read or splice brings at most.
    pub(super) fn read_size(&self, sink: &TcpStream, unsent: u32, is_short: bool) -> usize {
        if let Some(pipe) = &self.pipe {
            return pipe.capacity();
        }
        if is_short {
            return LEAST;
        }
        if self.measured == 0 {
            return FIRST;
        }
        let unsent = if self.bounded { unsent } else { 0 };
        buffer::room(sink, unsent).map_or(SCRATCH, |room| room / OVERHEAD).clamp(LEAST, SCRATCH)
    }

    /// Reads or splices once, up to `most` bytes, and after a read writes what the sink takes; how much came. 0 is
    /// the source's end, or with a pipe perhaps not: then it has to be read.
    pub(super) fn read_once(
        &mut self,
        direction: Direction,
        (source, sink): (&mut TcpStream, &mut TcpStream),
        most: usize,
        resources: TenantResources<'_>,
        (local, metrics): (&WorkerLocal, &mut SessionMetrics),
        context: &mut Context<'_>,
    ) -> Poll<Result<usize, EndError>> {
        if let Some(pipe) = &mut self.pipe {
            let spliced = ready!(splice::poll_in(source, pipe, most, context));
            return Poll::Ready(match spliced {
                Err(error) if splice::is_refused(&error) => {
                    metrics.worker().pipes_refused.add(1);
                    Ok(0)
                }
                count => count.map_err(EndError::Source),
            });
        }
        let mut scratch = local.scratch.borrow_mut();
        let most = most.min(scratch.len());
        let room = scratch.get_mut(..most).unwrap_or_default();
        let read = ready!(copy::poll_read(source, room, context)).map_err(EndError::Source)?;
        if !read.is_empty() {
            self.set_nodelay(sink, metrics);
            let count = self
                .pending_write
                .poll_write_first(read, sink, resources, context)
                .map_err(EndError::Sink)?;
            metrics.count_bytes(direction, count, false);
        }
        Poll::Ready(Ok(read.len()))
    }

    /// Sets TCP_NODELAY before the second write to the backend; the first leaves at once without it.
    pub(super) fn set_nodelay(&mut self, backend: &TcpStream, metrics: &SessionMetrics) {
        if !self.prompt && metrics.bytes().to_backend > 0 {
            self.prompt = true;
            // A connection that has gone says so when it is written to.
            backend.set_nodelay(true).unwrap_or_default();
        }
    }

    /// While bytes are held: counts for the tenant what the kernel holds beside them, and takes a send queue that has become
    /// smaller since the last look for progress, too. A slow reader may take for long from the kernel before that takes more
    /// of us.
    pub(super) fn note_queues(&mut self, (source, sink): (&TcpStream, &TcpStream), quota: &Quota, now: Tick) {
        if !self.pending() {
            self.forget_queues(quota);
            return;
        }
        let [queue, behind] = [sink, source].map(|socket| socket_options::memory(socket).unwrap_or_default());
        if queue.sending < self.queued {
            self.last_progress = now;
        }
        self.queued = queue.sending;
        let pages = (u64::from(queue.sending) + u64::from(behind.received)).div_ceil(Quota::PAGE);
        self.count_pages(u16::try_from(pages).unwrap_or(u16::MAX), quota);
    }

    /// No bytes are held any more: the kernel's queues are no longer counted for the tenant.
    pub(super) fn forget_queues(&mut self, quota: &Quota) {
        self.queued = 0;
        self.count_pages(0, quota);
    }

    fn count_pages(&mut self, pages: u16, quota: &Quota) {
        if pages != self.pages {
            // Its own part is in the sum, so that this does not go below zero.
            quota.queued.fetch_add(pages.into(), Ordering::Relaxed);
            quota.queued.fetch_sub(self.pages.into(), Ordering::Relaxed);
            self.pages = pages;
        }
    }

    /// Goes back to copying with what the pipe holds, where splicing it on was refused.
    ///
    /// # Errors
    /// Where the bytes cannot be had back.
    pub(super) fn take_out(
        &mut self,
        resources: TenantResources<'_>,
        session: &SessionContext,
    ) -> io::Result<()> {
        if let Some(pipe) = &mut self.pipe {
            self.pending_write = PendingWrite::new(pipe.take_out()?, resources);
        }
        session.metrics.worker().pipes_refused.add(1);
        self.stop_splicing(resources, session);
        Ok(())
    }

    /// Its end is passed on. Only called with nothing held.
    pub(super) fn shut(&mut self, resources: TenantResources<'_>, session: &SessionContext) {
        self.phase = DirectionPhase::Shut;
        resources.give_back(self.pipe.take(), session);
        self.last_progress = session.tick();
    }

    /// Goes back to copying. Only called with nothing in the pipe.
    pub(super) fn stop_splicing(&mut self, resources: TenantResources<'_>, session: &SessionContext) {
        resources.give_back(self.pipe.take(), session);
        self.streak = 0;
    }

    /// Records how much one read or splice brought of the `want` that was asked for. A read that the tenant's bandwidth made
    /// smaller says nothing of the sink's room.
    pub(super) fn note_read(&mut self, count: usize, want: usize) {
        let counts = if self.pipe.is_some() { count < LARGE } else { count >= LARGE };
        self.streak = if counts { self.streak.saturating_add(1) } else { 0 };
        let had_little_room = self.measured > 0 && want < FIRST;
        let is_measured = had_little_room || count >= want.min(FIRST) || !self.pending_write.is_empty();
        self.measured = if is_measured { self.measured.saturating_add(1) } else { 0 };
    }

    /// Goes over from copy to splice, or back. Only called with nothing held: bytes in both would change their order.
    pub(super) fn adapt(
        &mut self,
        sink: &TcpStream,
        unsent: u32,
        resources: TenantResources<'_>,
        session: &SessionContext,
    ) {
        if self.pipe.is_some() {
            if self.streak >= SMALL_SPLICES {
                self.stop_splicing(resources, session);
            }
        } else if self.streak >= LARGE_READS && (resources.has_few_pipes() || has_read(sink)) {
            self.pipe = resources.take_pipe(session);
            self.streak = 0;
        }
        self.bound_queue(sink, unsent);
    }

    /// Bounds what the kernel holds for a slow sink. A short session makes no call for it. One with a pipe
    /// has no bound: it needs twice the CPU with one, as the kernel then wakes it for small parts, and pipes, of which each
    /// tenant has a share, bound how many such queues there are.
    fn bound_queue(&mut self, sink: &TcpStream, unsent: u32) {
        let is_due = self.pipe.is_none() && (self.bounded || self.measured >= MEASURED_READS);
        if unsent > 0 && is_due != self.bounded {
            self.bounded = is_due;
            buffer::bound_unsent(sink, if is_due { unsent } else { 0 });
        }
    }
}

/// Whether the sink's peer has acknowledged more than its receive queue takes while it reads nothing. A splice to a peer that
/// does not read holds a pipe, and a send queue without a bound.
fn has_read(sink: &TcpStream) -> bool {
    socket_options::acknowledged(sink).is_none_or(|bytes| bytes >= READ_BYTES)
}
