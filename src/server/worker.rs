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
use super::server_worker::{NewConnection, ServerWorker};
use super::worker_sockets::{SocketCommand, WorkerSockets};
use crate::account::log::LogSender;
use crate::admission::bandwidth::QUANTUM;
use crate::clock;
use crate::clock::wheel::Tick;
use crate::fault::{self, Syscall};
use crate::handover::transfers::TransferCommand;
use crate::state::worker_loads::WorkerLoads;
use crate::state::{LiveState, WorkerContext};

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

async fn work(mut setup: WorkerSetup) {
    let number = usize::from(setup.number);
    let Some(context) = WorkerContext::new(setup.number, &setup.live, setup.access_log) else { return };
    let local = Rc::clone(&context.local);
    let worker = ServerWorker::new(context, Arc::clone(&setup.loads), setup.others);
    spawn_local(tick(Rc::clone(&worker)));
    let sockets = WorkerSockets::new(&worker, &setup.stages, setup.accepts);
    for (listener, socket) in setup.sockets {
        sockets.open(listener, socket);
    }
    spawn_local(sockets.run_commands(setup.commands));
    let (transfers, vital) = (worker.transfers(), worker.essential_task("orders to move sessions"));
    let commands = spawn_local(async move {
        let _vital = vital;
        transfers.run_commands(setup.transfers).await;
    });
    let handed_over = {
        let worker = Rc::clone(&worker);
        spawn_local(async move {
            let _vital = worker.essential_task("taking connections of other workers");
            while let Some(fresh) = setup.handed_over.recv().await {
                worker.carry(fresh);
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
        drain::over(&mut setup.stages).await;
    }
    local.end_all();
    worker.existing_flows().iter().for_each(|flows| flows.end_all());
    handed_over.abort();
    commands.abort();
    while setup.loads.count(number) > 0 {
        sleep(Tick::SPAN / 10).await;
    }
    worker.report_suppressed();
    worker.flush();
}

/// While sessions wait for their tenant's bandwidth, it is granted whenever about so many bytes have come in: the least
/// that is worth a read. The other sessions wait until everything granted at once is done, and what comes in during a
/// whole tick can be milliseconds of work.
const PARCEL: u64 = QUANTUM;

/// How often at most, which is as fine as the runtime's timers are, and at least.
const OFTEN: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(5);

/// Drives the worker's coarse time, and hands its lines of the access log on.
async fn tick(worker: Rc<ServerWorker>) {
    let _vital = worker.essential_task("the timers");
    let mut ticks = interval(Tick::SPAN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut untold = 0;
    loop {
        next(&mut ticks, &worker).await;
        fault::panic_at(Syscall::WorkerPanic);
        worker.context.metrics.worker().ticks.add(1);
        let now = clock::now();
        worker.context.local.advance(now);
        // A worker without sessions keeps no old one.
        let is_visit = worker.sessions.renew(now);
        if is_visit {
            worker.context.local.visit();
            worker.existing_flows().iter().for_each(|flows| flows.visit(now));
        }
        worker.sessions.end_late_headers(now);
        worker.sessions.resources.bandwidth.borrow_mut().advance(now);
        worker.existing_flows().iter().for_each(|flows| flows.advance(now));
        worker.context.metrics.fold(&worker.context.live.configured.load());
        worker.flush();
        untold += 1;
        if untold == TELLING {
            untold = 0;
            worker.report_suppressed();
        }
    }
}

/// Waits for the next tick, and grants bandwidth to waiters meanwhile.
async fn next(ticks: &mut Interval, worker: &ServerWorker) {
    let queue = &worker.sessions.resources.bandwidth;
    while !queue.borrow().is_empty() {
        let span = queue.borrow().span_of(PARCEL).clamp(OFTEN, SELDOM);
        if timeout(span, ticks.tick()).await.is_ok() {
            return;
        }
        queue.borrow_mut().advance(clock::now());
    }
    ticks.tick().await;
}
