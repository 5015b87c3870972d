//! The pipe store: each worker keeps a few empty pipes, and all workers together keep to one budget.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use crate::life::Life;

/// The bytes that a pipe is asked to hold.
///
/// 256 KiB: measured on loopback at 0.21 s/GB, against 0.32 with the kernel's own 64 KiB; 1 MiB brought nothing more.
pub const CAPACITY: usize = 256 * 1024;

/// A pipe with less is slower than copying. The kernel gives two pages once a user's pipes are over
/// `fs.pipe-user-pages-soft` (pipe(7)).
const USABLE: usize = 64 * 1024;

/// Empty pipes that a worker keeps, where the budget has that many: all workers together keep at most half of it.
const KEPT: usize = 16;

/// A pipe, and how much is in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    capacity: u32,
    /// Held for its drop.
    _share: Share,
}

/// The bound on the memory of all pipes of the process.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
    /// Empty pipes that each worker may keep.
    kept: usize,
}

/// A pipe's part of the budget, given back on drop.
#[derive(Debug)]
struct Share(Arc<Budget>);

impl Budget {
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

    fn share(self: &Arc<Self>) -> Option<Share> {
        let room = |used: u64| used.checked_add(CAPACITY as u64).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        Some(Share(Arc::clone(self)))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.used.fetch_sub(CAPACITY as u64, Ordering::AcqRel);
    }
}

impl Pipe {
    fn open(share: Share) -> Option<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // Refused over the user's soft limit: then what the kernel gave decides.
        let capacity = fcntl_setpipe_size(&write, CAPACITY).or_else(|_| fcntl_getpipe_size(&write)).ok()?;
        let capacity = u32::try_from(capacity).ok().filter(|capacity| *capacity as usize >= USABLE)?;
        Some(Self { read, write, held: 0, capacity, _share: share })
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what `source` has into the empty pipe; 0 at its end.
    pub(super) fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        debug_assert!(self.is_empty(), "EAGAIN would have two meanings");
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        self.held = splice(source, None, &self.write, None, self.capacity as usize, flags)?;
        Ok(self.held)
    }

    /// Moves what is in the pipe to `sink`, as far as it takes it; how much.
    pub(super) fn empty_into(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let count = splice(&self.read, None, sink, None, self.held, flags)?;
        self.held = self.held.saturating_sub(count);
        Ok(count)
    }
}

/// One worker's pipes.
#[derive(Debug)]
pub struct Pipes {
    budget: Arc<Budget>,
    kept: RefCell<Vec<Pipe>>,
}

impl Pipes {
    /// A store without pipes: they are opened when they are first wanted.
    #[must_use]
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, kept: RefCell::default() }
    }

    /// An empty pipe; `None` where the budget, the descriptors or the kernel's own limit are spent: then copying
    /// goes on.
    pub(super) fn take(&self, life: &Life) -> Option<Pipe> {
        let pipe = self.kept.borrow_mut().pop().or_else(|| self.budget.share().and_then(Pipe::open));
        let worker = life.meter.worker();
        if pipe.is_some() { &worker.pipes } else { &worker.pipes_refused }.add(1);
        pipe
    }

    /// Takes a pipe back. One with bytes in it is closed: they were another session's.
    pub(super) fn give_back(&self, pipe: Option<Pipe>, life: &Life) {
        let Some(pipe) = pipe else { return };
        life.meter.worker().pipes.sub(1);
        let mut kept = self.kept.borrow_mut();
        if pipe.is_empty() && kept.len() < self.budget.kept {
            kept.push(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::account::Labels;
    use crate::account::meter::{Ledger, Meter, Shard};
    use crate::clock::Moment;
    use crate::life::Local;
    use crate::outcome::{At, Outcome, Why};

    fn life(shard: &Arc<Shard>) -> Life {
        let labels = Labels::default();
        let ledger = Ledger::new(Arc::clone(shard), labels.intern(""));
        let local = Local::new(Rc::clone(&ledger), Moment::default());
        Life::new(local, Meter::new(ledger, &labels.intern("web")), Moment::default())
    }

    #[test]
    fn the_budget_holds_to_the_pipe() {
        let shard = Arc::new(Shard::default());
        let life = life(&shard);
        let budget = Budget::new(2 * CAPACITY as u64, 1);
        let pipes = Pipes::new(Arc::clone(&budget));
        let one = pipes.take(&life).unwrap();
        let two = pipes.take(&life).unwrap();
        assert!(pipes.take(&life).is_none());
        assert_eq!(shard.worker.pipes.value(), 2);
        assert_eq!(shard.worker.pipes_refused.value(), 1);
        pipes.give_back(Some(one), &life);
        pipes.give_back(None, &life);
        assert_eq!(budget.used(), 2 * CAPACITY as u64, "a kept pipe still has its memory");
        pipes.give_back(pipes.take(&life), &life);
        pipes.give_back(Some(two), &life);
        assert_eq!(budget.used(), CAPACITY as u64, "a worker keeps half of the budget at most");
        assert_eq!(shard.worker.pipes.value(), 0);
        drop(pipes);
        assert_eq!(budget.used(), 0);
        assert!(Pipes::new(Budget::new(CAPACITY as u64 - 1, 1)).take(&life).is_none());
        assert_eq!(life.end(Outcome::reject(At::Forward, Why::Drained), Moment::default()), Duration::ZERO);
    }

    #[test]
    fn a_pipe_with_bytes_in_it_is_never_used_again() {
        let shard = Arc::new(Shard::default());
        let life = life(&shard);
        let pipes = Pipes::new(Budget::new(CAPACITY as u64, 1));
        let mut pipe = pipes.take(&life).unwrap();
        let (source, sink) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &sink, b"secret").unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 6);
        assert!(!pipe.is_empty());
        pipes.give_back(Some(pipe), &life);
        assert!(pipes.kept.borrow().is_empty());
        let mut pipe = pipes.take(&life).expect("its share of the budget came back");
        assert!(pipe.is_empty());
        std::io::Write::write_all(&mut &sink, b"plain").unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 5);
        assert_eq!(pipe.empty_into(&source).unwrap(), 5);
        assert!(pipe.is_empty());
    }

    #[test]
    fn a_worker_keeps_few() {
        let shard = Arc::new(Shard::default());
        let life = life(&shard);
        let budget = Budget::new(u64::MAX, 1);
        let pipes = Pipes::new(Arc::clone(&budget));
        let taken: Vec<_> = (0..=KEPT).map(|_| pipes.take(&life)).collect();
        for pipe in taken {
            assert!(pipe.is_some());
            pipes.give_back(pipe, &life);
        }
        assert_eq!(budget.used(), (KEPT * CAPACITY) as u64);
    }
}
