//! The pipe store: each worker keeps a few empty pipes, and all workers together keep to one budget.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::buffer::spare_capacity;
use rustix::io::read;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use crate::admission::quota::Quota;
use crate::fault::{self, Syscall};
use crate::session_context::SessionContext;

/// The bytes that a pipe is asked to hold.
///
/// 256 KiB: a stream costs 0.18 s/GB, against 0.26 with the kernel's own 64 KiB. 1 MiB brings 0.14 for a stream without
/// pauses and little for chunks, and the same pipe memory would hold a quarter of the pipes (`cargo bench --bench
/// splice`, 2026-11-25, kernel 6.18).
pub const CAPACITY: usize = 256 * 1024;

/// A pipe with less is slower than copying. The kernel gives two pages once a user's pipes are over
/// `fs.pipe-user-pages-soft` (pipe(7)).
const USABLE: usize = 64 * 1024;

/// Empty pipes that a worker keeps, where the budget has that many: all workers together keep at most half of it.
const KEPT: usize = 16;

/// A pipe and its fill level.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    capacity: u32,
    /// Held for its drop.
    _share: PipeReservation,
}

/// Bounds the memory of all pipes of the process.
#[derive(Debug)]
pub struct PipeBudget {
    limit: u64,
    used: AtomicU64,
    /// Empty pipes that each worker may keep.
    kept: usize,
}

/// A pipe's part of the budget, released on drop.
#[derive(Debug)]
struct PipeReservation(Arc<PipeBudget>);

impl PipeBudget {
    /// A budget of `limit` bytes for so many workers.
    #[must_use]
    pub fn new(limit: u64, workers: usize) -> Arc<Self> {
        let pipes = usize::try_from(limit / CAPACITY as u64).unwrap_or(usize::MAX);
        let kept = (pipes / workers.max(1) / 2).min(KEPT);
        Arc::new(Self { limit, used: AtomicU64::new(0), kept })
    }

    /// The bytes of all pipes, held by sessions and kept.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The pipes that could still be opened.
    fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used()) / CAPACITY as u64
    }

    /// A pipe that is here already takes its part, whether there is room for it or not.
    fn share_anyway(self: &Arc<Self>) -> PipeReservation {
        self.used.fetch_add(CAPACITY as u64, Ordering::AcqRel);
        PipeReservation(Arc::clone(self))
    }

    fn share(self: &Arc<Self>) -> Option<PipeReservation> {
        let room = |used: u64| used.checked_add(CAPACITY as u64).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        Some(PipeReservation(Arc::clone(self)))
    }
}

impl Drop for PipeReservation {
    fn drop(&mut self) {
        self.0.used.fetch_sub(CAPACITY as u64, Ordering::AcqRel);
    }
}

impl Pipe {
    fn open(share: PipeReservation) -> Option<Box<Self>> {
        fault::at(Syscall::Pipe).ok()?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // Refused over the user's soft limit: then what the kernel gave decides.
        let enlarged = fault::at(Syscall::PipeSize).and_then(|()| fcntl_setpipe_size(&write, CAPACITY));
        let capacity = enlarged.or_else(|_| fcntl_getpipe_size(&write)).ok()?;
        let capacity = u32::try_from(capacity).ok().filter(|capacity| *capacity as usize >= USABLE)?;
        Some(Box::new(Self { read, write, held: 0, capacity, _share: share }))
    }

    /// Where it is read, and where it is written.
    pub(super) fn ends(&self) -> [&OwnedFd; 2] {
        [&self.read, &self.write]
    }

    /// Whether it is as large as those that are opened here.
    fn is_usual(&self) -> bool {
        (USABLE..=CAPACITY).contains(&self.capacity())
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// The bytes in it.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// The bytes that it may have.
    pub(super) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Moves what `source` has into the empty pipe, up to `most` bytes; 0 at its end.
    pub(super) fn fill(&mut self, source: impl AsFd, most: usize) -> io::Result<usize> {
        debug_assert!(self.is_empty(), "EAGAIN would have two meanings");
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        fault::at(Syscall::SpliceIn)?;
        self.held = splice(source, None, &self.write, None, self.capacity().min(most), flags)?;
        Ok(self.held)
    }

    /// Moves what is in the pipe to `sink`, as far as it takes it; how much.
    pub(super) fn empty_into(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        fault::at(Syscall::SpliceOut)?;
        let count = splice(&self.read, None, sink, None, self.held, flags)?;
        self.held = self.held.saturating_sub(count);
        Ok(count)
    }

    /// Takes out what is in the pipe, where it cannot go on from there.
    pub(super) fn take_out(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.held);
        while self.held > 0 {
            let count = read(&self.read, spare_capacity(&mut bytes))?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.held = self.held.saturating_sub(count);
        }
        Ok(bytes)
    }
}

/// One worker's pipes.
#[derive(Debug)]
pub struct PipeCache {
    budget: Arc<PipeBudget>,
    #[expect(clippy::vec_box, reason = "a session holds it boxed, and takes it as it is")]
    kept: RefCell<Vec<Box<Pipe>>>,
}

impl PipeCache {
    /// A store without pipes: they are opened when they are first wanted.
    #[must_use]
    pub fn new(budget: Arc<PipeBudget>) -> Self {
        Self { budget, kept: RefCell::default() }
    }

    /// An empty pipe; `None` where the tenant has enough of them, or where the budget, the descriptors or the
    /// kernel's own limit are spent: then copying goes on.
    pub(super) fn take(&self, tenant: &Quota, session: &SessionContext) -> Option<Box<Pipe>> {
        let pipe = if self.hold(tenant) {
            let pipe = self.kept.borrow_mut().pop().or_else(|| self.budget.share().and_then(Pipe::open));
            if pipe.is_none() {
                release(tenant);
            }
            pipe
        } else {
            None
        };
        let worker = session.metrics.worker();
        if pipe.is_some() { &worker.pipes } else { &worker.pipes_refused }.add(1);
        pipe
    }

    /// Takes in a pipe of another process, with so many bytes in it: they are the tenant's, whatever the bounds say.
    pub(super) fn adopt(
        &self,
        [read, write]: [OwnedFd; 2],
        held: usize,
        tenant: &Quota,
        session: &SessionContext,
    ) -> Pipe {
        tenant.pipes.fetch_add(1, Ordering::AcqRel);
        session.metrics.worker().pipes.add(1);
        let capacity = fcntl_getpipe_size(&write).ok().and_then(|size| u32::try_from(size).ok()).unwrap_or(0);
        Pipe { read, write, held, capacity, _share: self.budget.share_anyway() }
    }

    /// Counts one pipe more for a tenant, if it may have one.
    ///
    /// A tenant holds no more than are free (Choudhury and Hahne, "Dynamic queue length thresholds", 1998, with alpha
    /// 1): half of all where it is alone, a third each where two want more, and the last ones are left for others.
    fn hold(&self, tenant: &Quota) -> bool {
        let free = self.budget.free() + self.kept.borrow().len() as u64;
        let room = |held: u32| (u64::from(held) < free.max(1)).then(|| held.saturating_add(1));
        tenant.pipes.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok()
    }

    /// Takes a pipe of a tenant back. One with bytes in it is closed: they were another session's.
    pub(super) fn give_back(&self, pipe: Option<Box<Pipe>>, tenant: &Quota, session: &SessionContext) {
        let Some(pipe) = pipe else { return };
        release(tenant);
        session.metrics.worker().pipes.sub(1);
        let mut kept = self.kept.borrow_mut();
        if pipe.is_empty() && pipe.is_usual() && kept.len() < self.budget.kept {
            kept.push(pipe);
        }
    }
}

fn release(tenant: &Quota) {
    tenant.pipes.fetch_sub(1, Ordering::AcqRel);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;
    use crate::account::session_metrics::{CounterShard, SessionMetrics, WorkerMetrics};
    use crate::clock::Moment;
    use crate::session_context::WorkerLocal;

    fn session(shard: &Arc<CounterShard>) -> SessionContext {
        let labels = Labels::default();
        let worker_metrics = WorkerMetrics::new(Arc::clone(shard), labels.intern(""));
        let metrics = SessionMetrics::new(worker_metrics, &labels.intern("web"));
        SessionContext::new(WorkerLocal::new(Moment::default()), metrics, Moment::default())
    }

    #[test]
    fn budget_limits_the_number_of_pipes() {
        let shard = Arc::new(CounterShard::default());
        let (session, tenant, other) = (session(&shard), Quota::default(), Quota::default());
        let budget = PipeBudget::new(2 * CAPACITY as u64, 1);
        let pipes = PipeCache::new(Arc::clone(&budget));
        let one = pipes.take(&tenant, &session).unwrap();
        let two = pipes.take(&other, &session).unwrap();
        assert!(pipes.take(&Quota::default(), &session).is_none());
        assert_eq!(shard.worker.pipes.value(), 2);
        assert_eq!(shard.worker.pipes_refused.value(), 1);
        pipes.give_back(Some(one), &tenant, &session);
        pipes.give_back(None, &tenant, &session);
        assert_eq!(budget.used(), 2 * CAPACITY as u64, "a kept pipe still has its memory");
        pipes.give_back(pipes.take(&tenant, &session), &tenant, &session);
        pipes.give_back(Some(two), &other, &session);
        assert_eq!([&tenant, &other].map(|tenant| tenant.pipes.load(Ordering::Relaxed)), [0, 0]);
        assert_eq!(budget.used(), CAPACITY as u64, "a worker keeps half of the budget at most");
        assert_eq!(shard.worker.pipes.value(), 0);
        drop(pipes);
        assert_eq!(budget.used(), 0);
        assert!(PipeCache::new(PipeBudget::new(CAPACITY as u64 - 1, 1)).take(&tenant, &session).is_none());
    }

    #[test]
    fn tenant_holds_no_more_pipes_than_are_free() {
        let session = session(&Arc::default());
        let pipes = PipeCache::new(PipeBudget::new(8 * CAPACITY as u64, 1));
        let tenants = [0; 4].map(|_| Quota::default());
        let mut held = Vec::new();
        for tenant in &tenants {
            while let Some(pipe) = pipes.take(tenant, &session) {
                held.push((tenant, pipe));
            }
        }
        let counts = || tenants.each_ref().map(|tenant| tenant.pipes.load(Ordering::Relaxed));
        assert_eq!(
            counts(),
            [4, 2, 1, 1],
            "each finds half of what the others left, and one if there is one"
        );
        for (tenant, pipe) in held.drain(..) {
            pipes.give_back(Some(pipe), tenant, &session);
        }
        assert_eq!(counts(), [0; 4]);
        let kept: Vec<_> = (0..4).map(|_| pipes.take(&tenants[3], &session)).collect();
        assert!(kept.iter().all(Option::is_some), "those that the worker keeps are free, too");
        assert!(pipes.take(&tenants[3], &session).is_none());
    }

    #[test]
    fn pipe_that_holds_bytes_is_closed_and_not_reused() {
        let shard = Arc::new(CounterShard::default());
        let (session, tenant) = (session(&shard), Quota::default());
        let pipes = PipeCache::new(PipeBudget::new(CAPACITY as u64, 1));
        let mut pipe = pipes.take(&tenant, &session).unwrap();
        let (source, sink) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &sink, b"secret").unwrap();
        assert_eq!(pipe.fill(&source, usize::MAX).unwrap(), 6);
        assert!(!pipe.is_empty());
        pipes.give_back(Some(pipe), &tenant, &session);
        assert!(pipes.kept.borrow().is_empty());
        let mut pipe = pipes.take(&tenant, &session).expect("its share of the budget came back");
        assert!(pipe.is_empty());
        std::io::Write::write_all(&mut &sink, b"plain").unwrap();
        assert_eq!(pipe.fill(&source, usize::MAX).unwrap(), 5);
        assert_eq!(pipe.empty_into(&source).unwrap(), 5);
        assert!(pipe.is_empty());
    }

    #[test]
    fn worker_keeps_at_most_its_part_of_empty_pipes() {
        let shard = Arc::new(CounterShard::default());
        let (session, tenant) = (session(&shard), Quota::default());
        let budget = PipeBudget::new(u64::MAX, 1);
        let pipes = PipeCache::new(Arc::clone(&budget));
        let taken: Vec<_> = (0..=KEPT).map(|_| pipes.take(&tenant, &session)).collect();
        for pipe in taken {
            assert!(pipe.is_some());
            pipes.give_back(pipe, &tenant, &session);
        }
        assert_eq!(budget.used(), (KEPT * CAPACITY) as u64);
    }
}
