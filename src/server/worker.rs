//! A worker: one thread, one runtime, its own listening sockets and its own sessions.

use std::cell::OnceCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_local;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};

use super::drain::{self, DrainStage};
use super::failure::{self, EssentialTask};
use super::listen_sockets::BoundSocket;
use super::transfer;
use super::worker_loads::{LoadGuard, WorkerLoads};
use super::worker_sockets::{SocketCommand, WorkerSockets};
use crate::accept::AcceptedConnection;
use crate::account::log::{AccessLogger, LogSender};
use crate::account::session_metrics::WorkerMetrics;
use crate::admission::bandwidth::QUANTUM;
use crate::clock;
use crate::clock::wheel::Tick;
use crate::fault::{self, Syscall};
use crate::flow::FlowWorker;
use crate::session::{self, SessionWorker};
use crate::session_context::WorkerLocal;
use crate::state::LiveState;

/// Fresh connections that may be on their way to a worker; beyond it, they stay where they were accepted.
pub(super) const HANDED_OVER: usize = 256;

/// Ticks from one telling of what was left out of the access log to the next: a second.
const TELLING: u32 = 20;

/// A new connection, already counted for the worker that it goes to.
#[derive(Debug)]
pub(super) struct NewConnection {
    accepted: AcceptedConnection,
    /// The place of its listener.
    listener: u32,
    load: LoadGuard,
}

/// The inputs of a worker's start.
pub(super) struct WorkerSetup {
    pub(super) number: u16,
    pub(super) live: Arc<LiveState>,
    pub(super) loads: Arc<WorkerLoads>,
    pub(super) sockets: Vec<(u32, BoundSocket)>,
    /// Whether it accepts from the start.
    pub(super) accepts: bool,
    pub(super) others: Vec<mpsc::Sender<NewConnection>>,
    pub(super) handed_over: mpsc::Receiver<NewConnection>,
    pub(super) commands: mpsc::Receiver<SocketCommand>,
    pub(super) transfers: mpsc::Receiver<transfer::TransferCommand>,
    pub(super) stages: watch::Receiver<DrainStage>,
    pub(super) access_log: Option<LogSender>,
}

/// Starts a worker thread.
pub(super) fn spawn(setup: WorkerSetup) -> io::Result<JoinHandle<()>> {
    // A worker without a runtime would have the fewest sessions, and be given all: nothing starts without one.
    let (started, starts) = sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("worker-{}", setup.number)).spawn(move || {
        let build = || Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        let runtime = match fault::at(Syscall::WorkerStart).map_err(io::Error::from).and_then(|()| build()) {
            Ok(runtime) => runtime,
            Err(error) => return started.send(Err(error)).unwrap_or_default(),
        };
        started.send(Ok(())).unwrap_or_default();
        let (number, stages) = (setup.number, setup.stages.clone());
        let _vital = EssentialTask::of_worker(number, "the thread");
        runtime.block_on(work(setup));
        if failure::is_serving(&stages) {
            failure::end(&format!("the thread of worker {number}"));
        }
    })?;
    starts.recv().map_err(|_| io::Error::other("the thread ended"))??;
    Ok(thread)
}

/// The state shared by the tasks of one worker.
pub(super) struct WorkerContext {
    pub(super) worker: Rc<SessionWorker>,
    pub(super) live: Arc<LiveState>,
    pub(super) loads: Arc<WorkerLoads>,
    others: Vec<mpsc::Sender<NewConnection>>,
    /// Once a listener is UDP.
    flows: OnceCell<Rc<FlowWorker<LoadGuard>>>,
    access_log: Option<LogSender>,
}

impl WorkerContext {
    pub(super) fn essential_task(&self, what: &'static str) -> EssentialTask {
        EssentialTask::of_worker(self.worker.number, what)
    }

    fn number(&self) -> usize {
        usize::from(self.worker.number)
    }

    /// Starts a session for a new connection, or hands it to a worker with fewer sessions.
    pub(super) fn receive(&self, accepted: AcceptedConnection, listener: u32) {
        let Some(lighter) = self.loads.less_loaded(self.number()) else {
            return self.start(accepted, listener);
        };
        let fresh = NewConnection { accepted, listener, load: self.loads.count_session(lighter) };
        let Some(other) = self.others.get(lighter) else { return };
        match other.try_send(fresh) {
            Ok(()) => self.worker.shared.metrics.worker().handed_over.add(1),
            Err(mpsc::error::TrySendError::Full(fresh) | mpsc::error::TrySendError::Closed(fresh)) => {
                self.start(fresh.accepted, listener);
            }
        }
    }

    pub(super) fn start(&self, accepted: AcceptedConnection, listener: u32) {
        self.carry(NewConnection { accepted, listener, load: self.loads.count_session(self.number()) });
    }

    /// Flushes the lines of the access log to the writer.
    fn flush(&self) {
        self.worker.access_log.flush();
        self.existing_flows().iter().for_each(|flows| flows.flush());
    }

    /// Reports suppressed access log lines.
    fn report_suppressed(&self) {
        self.worker.rejections.report_suppressed();
        self.existing_flows().iter().for_each(|flows| {
            flows.report_suppressed();
            flows.count_all_drops();
        });
    }

    /// The worker's flows, if any exist.
    pub(super) fn existing_flows(&self) -> Option<&Rc<FlowWorker<LoadGuard>>> {
        self.flows.get()
    }

    /// The worker's flows, from the first UDP listener on.
    ///
    /// # Errors
    /// What is short for them now.
    pub(super) fn flows(&self) -> io::Result<Rc<FlowWorker<LoadGuard>>> {
        if let Some(flows) = self.existing_flows() {
            return Ok(Rc::clone(flows));
        }
        let flows = self.create_flows()?;
        self.flows.set(Rc::clone(&flows)).unwrap_or_default();
        Ok(flows)
    }

    fn create_flows(&self) -> io::Result<Rc<FlowWorker<LoadGuard>>> {
        let (loads, number, live) = (Arc::clone(&self.loads), self.number(), Arc::clone(&self.live));
        let board = Box::new(move || loads.count_session(number));
        let (worker, local) = (self.worker.number, Rc::clone(&self.worker.shared));
        let flows = FlowWorker::new(worker, &live, local, self.access_log.clone(), board)?;
        let (answering, vital) = (Rc::clone(&flows), self.essential_task("receiving from backends"));
        spawn_local(async move {
            let _vital = vital;
            if let Err(error) = answering.answer().await {
                tracing::error!(worker, %error, "a worker cannot receive datagrams from backends");
                failure::end(&format!("receiving from backends of worker {worker}"));
            }
        });
        let (ending, vital) = (Rc::clone(&flows), self.essential_task("ending idle flows"));
        spawn_local(async move {
            let _vital = vital;
            ending.end_idle().await;
        });
        Ok(flows)
    }

    fn carry(&self, fresh: NewConnection) {
        let worker = Rc::clone(&self.worker);
        // Boxed, because a task moves what it runs three times at its end.
        spawn_local(Box::pin(session::run(worker, fresh.accepted, fresh.listener, fresh.load)));
    }
}

/// The number of a process's first session: beyond all that the process before it has given, which would have had to take on
/// 65,536 in each second.
fn first_session() -> u64 {
    clock::unix().as_secs() << 16
}

async fn work(mut setup: WorkerSetup) {
    let number = usize::from(setup.number);
    let Some(shard) = setup.live.shards.get(number) else { return };
    let worker_metrics = WorkerMetrics::new(Arc::clone(shard), setup.live.labels.intern(""));
    worker_metrics.start_session_numbers_at(first_session());
    let local = WorkerLocal::new(worker_metrics, clock::now());
    let worker = SessionWorker::new(
        setup.number,
        &setup.live,
        Rc::clone(&local),
        AccessLogger::new(setup.access_log.clone()),
    );
    let context = Rc::new(WorkerContext {
        worker: Rc::new(worker),
        live: Arc::clone(&setup.live),
        loads: Arc::clone(&setup.loads),
        others: setup.others,
        flows: OnceCell::new(),
        access_log: setup.access_log,
    });
    spawn_local(tick(Rc::clone(&context)));
    let sockets = WorkerSockets::new(&context, &setup.stages, setup.accepts);
    for (listener, socket) in setup.sockets {
        sockets.open(listener, socket);
    }
    spawn_local(sockets.run_commands(setup.commands));
    let commands = spawn_local(transfer::run_commands(Rc::clone(&context), setup.transfers));
    let handed_over = {
        let context = Rc::clone(&context);
        spawn_local(async move {
            let _vital = context.essential_task("taking connections of other workers");
            while let Some(fresh) = setup.handed_over.recv().await {
                context.carry(fresh);
            }
        })
    };
    // A closed channel is the process's own end.
    let reached = setup
        .stages
        .wait_for(|stage| *stage != DrainStage::Serving)
        .await
        .map_or(DrainStage::Over, |stage| *stage);
    if let DrainStage::Closing { idle } = reached {
        local.drain(idle);
        context.existing_flows().iter().for_each(|flows| flows.drain(idle.duration()));
        drain::over(&mut setup.stages).await;
    }
    local.end_all();
    context.existing_flows().iter().for_each(|flows| flows.end_all());
    handed_over.abort();
    commands.abort();
    while setup.loads.count(number) > 0 {
        sleep(Tick::SPAN / 10).await;
    }
    context.report_suppressed();
    context.flush();
}

/// While sessions wait for their tenant's bandwidth, it is granted whenever about so many bytes have come in: the least
/// that is worth a read. The other sessions wait until everything granted at once is done, and what comes in during a
/// whole tick can be milliseconds of work.
const PARCEL: u64 = QUANTUM;

/// How often at most, which is as fine as the runtime's timers are, and at least.
const OFTEN: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(5);

/// Drives the worker's coarse time, and hands its lines of the access log on.
async fn tick(context: Rc<WorkerContext>) {
    let _vital = context.essential_task("the timers");
    let mut ticks = interval(Tick::SPAN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut untold = 0;
    loop {
        next(&mut ticks, &context).await;
        fault::panic_at(Syscall::WorkerPanic);
        context.worker.shared.metrics.worker().ticks.add(1);
        let now = clock::now();
        context.worker.shared.advance(now);
        // A worker without sessions keeps no old one.
        let is_visit = context.worker.renew(now);
        if is_visit {
            context.worker.shared.visit();
            context.existing_flows().iter().for_each(|flows| flows.visit(now));
        }
        context.worker.end_late_headers(now);
        context.worker.resources.bandwidth.borrow_mut().advance(now);
        context.existing_flows().iter().for_each(|flows| flows.advance(now));
        context.worker.shared.metrics.fold(&context.live.configured.load());
        context.flush();
        untold += 1;
        if untold == TELLING {
            untold = 0;
            context.report_suppressed();
        }
    }
}

/// Waits for the next tick, and grants bandwidth to waiters meanwhile.
async fn next(ticks: &mut Interval, context: &WorkerContext) {
    let queue = &context.worker.resources.bandwidth;
    while !queue.borrow().is_empty() {
        let span = queue.borrow().span_of(PARCEL).clamp(OFTEN, SELDOM);
        if timeout(span, ticks.tick()).await.is_ok() {
            return;
        }
        queue.borrow_mut().advance(clock::now());
    }
    ticks.tick().await;
}
