//! A worker: one thread, one runtime, its own listening sockets and its own sessions.

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

use super::drain::{self, WorkerStage};
use super::failure::{self, EssentialTask};
use super::listen_sockets::BoundSocket;
use super::worker_context::{NewConnection, WorkerContext};
use super::worker_sockets::{SocketCommand, WorkerSockets};
use crate::account::log::{AccessLogger, LogSender};
use crate::account::session_metrics::WorkerMetrics;
use crate::admission::bandwidth::QUANTUM;
use crate::clock;
use crate::clock::wheel::Tick;
use crate::fault::{self, Syscall};
use crate::handover::transfers::TransferCommand;
use crate::session::SessionWorker;
use crate::session_context::WorkerLocal;
use crate::state::LiveState;
use crate::state::worker_loads::WorkerLoads;

/// Ticks from one telling of what was left out of the access log to the next: a second.
const TELLING: u32 = 20;

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
    pub(super) transfers: mpsc::Receiver<TransferCommand>,
    pub(super) stages: watch::Receiver<WorkerStage>,
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
    let context = WorkerContext::new(worker, Arc::clone(&setup.loads), setup.others, setup.access_log);
    spawn_local(tick(Rc::clone(&context)));
    let sockets = WorkerSockets::new(&context, &setup.stages, setup.accepts);
    for (listener, socket) in setup.sockets {
        sockets.open(listener, socket);
    }
    spawn_local(sockets.run_commands(setup.commands));
    let (transfers, vital) = (context.transfers(), context.essential_task("orders to move sessions"));
    let commands = spawn_local(async move {
        let _vital = vital;
        transfers.run_commands(setup.transfers).await;
    });
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
        .wait_for(|stage| *stage != WorkerStage::Serving)
        .await
        .map_or(WorkerStage::Over, |stage| *stage);
    if let WorkerStage::Closing { idle } = reached {
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
        context.worker.shared.metrics.fold(&context.worker.live.configured.load());
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
