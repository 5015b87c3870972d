//! Which calls fail, with which error and how often.
//!
//! EAGAIN is not injected where a wake-up follows only an edge: the kernel returns it for an empty queue, and the runtime then waits
//! for the next edge. If bytes are still there, none comes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use rustix::io::Errno;

use super::Syscall;

/// An error to inject, and how often.
#[derive(Debug)]
pub struct InjectedFault {
    call: Syscall,
    answers: Vec<Errno>,
    per_million: u64,
    first: u64,
    most: u64,
    seen: AtomicU64,
    injected: AtomicU64,
}

/// The injected errors in force.
#[derive(Debug)]
struct InjectionPlan {
    seed: u64,
    faults: Vec<InjectedFault>,
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static PLAN: ArcSwapOption<InjectionPlan> = ArcSwapOption::const_empty();

/// The error of the next call, which is nearly always none.
#[inline]
pub(super) fn next(call: Syscall) -> Result<(), Errno> {
    if is_on() { inject(call) } else { Ok(()) }
}

/// Whether errors are injected now.
#[inline]
pub(super) fn is_on() -> bool {
    IS_ON.load(Ordering::Relaxed)
}

#[cold]
fn inject(call: Syscall) -> Result<(), Errno> {
    let plan = PLAN.load();
    let Some(plan) = plan.as_ref() else { return Ok(()) };
    let of_call = plan.faults.iter().filter(|fault| fault.call == call);
    of_call.map(|fault| fault.next(plan.seed)).find(Result::is_err).unwrap_or(Ok(()))
}

impl InjectedFault {
    /// Every call of this kind fails with one of these errors.
    ///
    /// # Panics
    /// If no errno is given, or one that would leave a socket without its next edge.
    #[must_use]
    pub fn new(call: Syscall, answers: &[Errno]) -> Self {
        assert!(!answers.is_empty(), "a fault without an errno");
        assert!(
            call == Syscall::SendDatagram || !answers.contains(&Errno::AGAIN),
            "EAGAIN where a wake-up follows only an edge"
        );
        let (seen, injected) = Default::default();
        Self {
            call,
            answers: answers.to_vec(),
            per_million: 1_000_000,
            first: 0,
            most: u64::MAX,
            seen,
            injected,
        }
    }

    /// Of a million calls, this many fail.
    #[must_use]
    pub fn per_million(self, per_million: u64) -> Self {
        Self { per_million, ..self }
    }

    /// The first calls do not fail.
    #[must_use]
    pub fn after(self, first: u64) -> Self {
        Self { first, ..self }
    }

    /// At most this many calls fail.
    #[must_use]
    pub fn at_most(self, most: u64) -> Self {
        Self { most, ..self }
    }

    /// The result of the next call. It depends on the seed and on the number of earlier calls only.
    fn next(&self, seed: u64) -> Result<(), Errno> {
        let number = self.seen.fetch_add(1, Ordering::Relaxed);
        let mut rolls = fastrand::Rng::with_seed(seed ^ ((self.call as u64 + 1) << 56) ^ number);
        if number < self.first || rolls.u64(..1_000_000) >= self.per_million {
            return Ok(());
        }
        let one_more = |injected: u64| (injected < self.most).then_some(injected + 1);
        let injected = self.injected.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        match rolls.choice(&self.answers) {
            Some(errno) if injected.is_ok() => Err(*errno),
            _ => Ok(()),
        }
    }
}

/// Injects errors in the whole process until it is dropped.
#[must_use]
pub struct Injection(Arc<InjectionPlan>);

impl Injection {
    /// Starts to inject.
    ///
    /// # Panics
    /// If errors are injected already: there is one set per process.
    pub fn new(seed: u64, faults: impl IntoIterator<Item = InjectedFault>) -> Self {
        let plan = Arc::new(InjectionPlan { seed, faults: faults.into_iter().collect() });
        let others = PLAN.compare_and_swap(&None::<Arc<InjectionPlan>>, Some(Arc::clone(&plan)));
        assert!(others.is_none(), "faults are already injected");
        IS_ON.store(true, Ordering::SeqCst);
        Self(plan)
    }

    /// The number of calls of this kind that have failed so far.
    #[must_use]
    pub fn count(&self, call: Syscall) -> u64 {
        let of_call = self.0.faults.iter().filter(|fault| fault.call == call);
        of_call.map(|fault| fault.injected.load(Ordering::Relaxed)).sum()
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        IS_ON.store(false, Ordering::SeqCst);
        PLAN.store(None);
    }
}

impl fmt::Debug for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(seed: u64, fault: &InjectedFault) -> Vec<Option<Errno>> {
        (0..10_000).map(|_| fault.next(seed).err()).collect()
    }

    /// Without an `Injection`, which would affect the other tests of this process.
    #[test]
    fn one_seed_is_one_row_of_faults_at_the_rate_that_was_asked_for() {
        let fault = || InjectedFault::new(Syscall::Accept, &[Errno::MFILE, Errno::NFILE]).per_million(10_000);
        let first = answers(7, &fault());
        assert_eq!(first, answers(7, &fault()));
        assert_ne!(first, answers(8, &fault()));
        let count = |errno| first.iter().filter(|answer| **answer == Some(errno)).count();
        let (one, other) = (count(Errno::MFILE), count(Errno::NFILE));
        assert!((70..=130).contains(&(one + other)), "{one} and {other}");
        assert!(one > 20 && other > 20, "{one} and {other}");
    }

    #[test]
    fn no_more_than_were_asked_for() {
        let fault = InjectedFault::new(Syscall::Send, &[Errno::NOBUFS]).at_most(2);
        let failed = answers(1, &fault).into_iter().map(|answer| answer.is_some());
        assert_eq!(failed.clone().take(3).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(failed.filter(|failed| *failed).count(), 2);
    }

    #[test]
    #[should_panic(expected = "follows only an edge")]
    fn no_socket_is_left_without_its_next_edge() {
        drop(InjectedFault::new(Syscall::Receive, &[Errno::AGAIN]));
    }
}
