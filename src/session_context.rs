//! What a session carries through all its steps, its deadline on the worker's wheel and its counters; and that wheel.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::account::session_metrics::SessionMetrics;
use crate::clock::wheel::{Tick, TickSpan, TimerKey, TimerWheel};
use crate::clock::{Moment, StartTime};

/// The bytes of a worker's scratch buffer: one read at most.
///
/// 64 KiB: a copy of 64 KiB chunks costs 0.47 s/GB, against 0.68 through 16 KiB and 0.50 through 256 KiB; what comes in
/// larger chunks goes over to splice, and it stays within the second-level cache (`cargo bench --bench splice`,
/// 2026-11-25, kernel 6.18).
pub const SCRATCH: usize = 64 * 1024;

/// What a worker's coarse time starts with: a session may come from another process, and have been silent since before
/// this one began.
const HEAD_START: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the steps of one worker's sessions share. It is never borrowed across an await.
#[derive(Debug)]
pub struct WorkerLocal {
    /// The buffer that every read goes to first.
    pub scratch: RefCell<Box<[u8]>>,
    wheel: RefCell<TimerWheel>,
    started: Moment,
    /// While draining: how long a session may be silent.
    drain_idle: Cell<Option<TickSpan>>,
    /// Set when the drain's deadline has passed.
    is_over: Cell<bool>,
    /// Whether sessions are being transferred.
    is_transferring: Cell<bool>,
    /// How often every session was visited.
    visits: Cell<u32>,
}

impl WorkerLocal {
    /// That of a new worker.
    #[must_use]
    pub fn new(now: Moment) -> Rc<Self> {
        let mut wheel = TimerWheel::default();
        wheel.advance(Tick::at(HEAD_START), std::task::Waker::wake_by_ref);
        Rc::new(Self {
            scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
            wheel: RefCell::new(wheel),
            started: now,
            drain_idle: Cell::new(None),
            is_over: Cell::new(false),
            is_transferring: Cell::new(false),
            visits: Cell::new(0),
        })
    }

    /// Starts the transfer of every forwarding session to another process. All are woken, to find out.
    pub fn start_transfer(&self) {
        self.is_transferring.set(true);
        self.visit();
    }

    /// Visits every session once: each that forwards checks what has changed for it. All are woken.
    pub fn visit(&self) {
        self.visits.set(self.visits.get().wrapping_add(1));
        self.wheel.borrow().wake_all(std::task::Waker::wake_by_ref);
    }

    /// How often every session was visited. A session that knows another number has a visit before it.
    #[inline]
    #[must_use]
    pub fn visits(&self) -> u32 {
        self.visits.get()
    }

    /// Stops the transfer of sessions that have not been sent yet.
    pub fn stop_transfer(&self) {
        self.is_transferring.set(false);
        self.wheel.borrow().wake_all(std::task::Waker::wake_by_ref);
    }

    /// Whether sessions are being transferred.
    #[must_use]
    pub fn is_transferring(&self) -> bool {
        self.is_transferring.get()
    }

    /// Advances to `now` and wakes every session whose deadline has come.
    pub fn advance(&self, now: Moment) {
        let tick = Tick::at(HEAD_START + now.since(self.started));
        self.wheel.borrow_mut().advance(tick, std::task::Waker::wake_by_ref);
    }

    /// Starts draining: no flow begins, and a session or flow that is idle for `idle` is ended.
    pub fn drain(&self, idle: TickSpan) {
        self.drain_idle.set(Some(idle));
        self.wheel.borrow().wake_all(std::task::Waker::wake_by_ref);
    }

    /// Whether the worker is draining, or over.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.drain_idle.get().is_some() || self.is_over.get()
    }

    /// While draining: how long a session or flow may be silent.
    #[must_use]
    pub fn drain_idle(&self) -> Option<TickSpan> {
        self.drain_idle.get()
    }

    /// Ends every session at its next step.
    pub fn end_all(&self) {
        self.is_over.set(true);
        self.wheel.borrow().wake_all(std::task::Waker::wake_by_ref);
    }

    /// Whether every session is ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over.get()
    }

    /// How many sessions wait for something.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.wheel.borrow().len()
    }
}

/// Why a step was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// Its time is up.
    Expired,
    /// The process is draining, and cannot wait for it.
    Drained,
}

/// One session's timer; removed on drop.
#[derive(Debug)]
struct SessionTimer {
    worker: Rc<WorkerLocal>,
    key: Option<TimerKey>,
}

impl Drop for SessionTimer {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.worker.wheel.borrow_mut().remove(key);
        }
    }
}

/// Deadline and counters of one session. Dropping it removes its timer and counts its end.
#[derive(Debug)]
pub struct SessionContext {
    timer: SessionTimer,
    /// When the connection was accepted.
    pub started: StartTime,
    /// The session's counters.
    pub metrics: SessionMetrics,
}

impl SessionContext {
    /// A life that starts at `now`.
    #[must_use]
    pub fn new(local: Rc<WorkerLocal>, metrics: SessionMetrics, now: Moment) -> Self {
        Self::resumed(local, metrics, now.into())
    }

    /// The context of a session that began elsewhere.
    #[must_use]
    pub fn resumed(local: Rc<WorkerLocal>, metrics: SessionMetrics, started: StartTime) -> Self {
        Self { timer: SessionTimer { worker: local, key: None }, started, metrics }
    }

    /// What the sessions share, and the session's own counters.
    #[must_use]
    pub fn parts(&mut self) -> (&WorkerLocal, &mut SessionMetrics) {
        (&self.timer.worker, &mut self.metrics)
    }

    /// What the worker's sessions share.
    #[must_use]
    pub fn worker(&self) -> &Rc<WorkerLocal> {
        &self.timer.worker
    }

    /// The worker's coarse time.
    #[must_use]
    pub fn tick(&self) -> Tick {
        self.timer.worker.wheel.borrow().now()
    }

    /// How long a session may be silent: `idle`, or less while the process drains.
    #[must_use]
    pub fn idle(&self, idle: TickSpan) -> TickSpan {
        self.timer.worker.drain_idle.get().map_or(idle, |drain| drain.min(idle))
    }

    /// Whether the drain's deadline has passed, and every session is ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.timer.worker.is_over.get()
    }

    /// Sets the deadline.
    pub fn wake_at(&mut self, deadline: Tick) {
        let mut wheel = self.timer.worker.wheel.borrow_mut();
        match &self.timer.key {
            Some(key) => wheel.set(key, deadline),
            None => self.timer.key = Some(wheel.insert(deadline)),
        }
    }

    /// Has `context`'s task woken at the deadline; tells whether that is now, or the process cannot wait.
    #[must_use]
    pub fn poll_cancelled(&self, context: &Context<'_>) -> Option<Cancelled> {
        if self.is_over() {
            return Some(Cancelled::Drained);
        }
        let key = self.timer.key.as_ref()?;
        let mut wheel = self.timer.worker.wheel.borrow_mut();
        wheel.wake_with(key, context.waker());
        wheel.is_due(key).then_some(Cancelled::Expired)
    }

    /// Runs `step` until it ends or the deadline comes. The step goes first: what is there is taken, however late.
    pub fn watch<F: Future + Unpin>(&self, step: F) -> WithDeadline<'_, F> {
        WithDeadline { session: self, step }
    }
}

/// A future that is cancelled at the session's deadline.
#[derive(Debug)]
pub struct WithDeadline<'a, F> {
    session: &'a SessionContext,
    step: F,
}

impl<F: Future + Unpin> Future for WithDeadline<'_, F> {
    type Output = Result<F::Output, Cancelled>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = Pin::new(&mut self.step).poll(context) {
            return Poll::Ready(Ok(output));
        }
        self.session.poll_cancelled(context).map_or(Poll::Pending, |cut| Poll::Ready(Err(cut)))
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::Arc;
    use std::task::Waker;

    use super::*;
    use crate::account::Labels;
    use crate::account::session_metrics::{CounterShard, WorkerMetrics};

    fn at_ms(ms: u64) -> Moment {
        Moment::from_nanos(ms * 1_000_000)
    }

    fn span_ms(ms: u64) -> TickSpan {
        TickSpan::of(Duration::from_millis(ms))
    }

    fn session(labels: &Labels, shard: &Arc<CounterShard>) -> SessionContext {
        let worker_metrics = WorkerMetrics::new(Arc::clone(shard), labels.intern(""));
        let metrics = SessionMetrics::new(worker_metrics, &labels.intern("web"));
        SessionContext::new(WorkerLocal::new(at_ms(0)), metrics, at_ms(0))
    }

    fn poll<F: Future + Unpin>(step: &mut F) -> Poll<F::Output> {
        Pin::new(step).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn step_runs_until_its_deadline() {
        let (labels, shard) = (Labels::default(), Arc::default());
        let mut session = session(&labels, &shard);
        let deadline = session.tick().after(span_ms(100));
        session.wake_at(deadline);
        assert_eq!(poll(&mut session.watch(ready(7))), Poll::Ready(Ok(7)));
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Pending);
        assert_eq!(session.worker().waiting(), 1);
        session.worker().advance(at_ms(149));
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Pending);
        session.worker().advance(at_ms(150));
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Ready(Err(Cancelled::Expired)));
        assert_eq!(poll(&mut session.watch(ready(7))), Poll::Ready(Ok(7)), "what is there is taken");
        let deadline = session.tick().after(span_ms(1000));
        session.wake_at(deadline);
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Pending);
        let local = Rc::clone(session.worker());
        assert_eq!(session.started.age(at_ms(150)), Duration::from_millis(150));
        drop(session);
        assert_eq!(local.waiting(), 0);
    }

    #[test]
    fn step_without_a_deadline_waits() {
        let (labels, shard) = (Labels::default(), Arc::default());
        let session = session(&labels, &shard);
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Pending);
        assert_eq!(session.worker().waiting(), 0);
    }

    #[test]
    fn waiting_sessions_are_woken_when_a_transfer_starts_and_stops() {
        let (labels, shard) = (Labels::default(), Arc::default());
        let session = session(&labels, &shard);
        let local = Rc::clone(session.worker());
        assert!(!local.is_transferring() && local.visits() == 0);
        local.start_transfer();
        assert_eq!((local.is_transferring(), local.visits()), (true, 1));
        local.stop_transfer();
        assert!(!local.is_transferring());
        local.start_transfer();
        assert_eq!((local.is_transferring(), local.visits()), (true, 2), "it is another time");
        local.visit();
        assert_eq!(local.visits(), 3);
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(
            session.tick().since(session.tick().before(day)),
            day,
            "silent since before the process began"
        );
    }

    #[test]
    fn drain_shortens_the_idle_timeout_and_its_deadline_ends_everything() {
        let (labels, shard) = (Labels::default(), Arc::default());
        let mut session = session(&labels, &shard);
        session.wake_at(session.tick().after(span_ms(9000)));
        assert_eq!(session.idle(span_ms(5000)), span_ms(5000));
        session.worker().drain(span_ms(1000));
        assert_eq!(session.idle(span_ms(5000)), span_ms(1000));
        assert_eq!(session.idle(span_ms(5)), span_ms(5));
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Pending);
        assert!(!session.is_over());
        session.worker().end_all();
        assert!(session.is_over());
        assert_eq!(poll(&mut session.watch(pending::<()>())), Poll::Ready(Err(Cancelled::Drained)));
    }
}
