//! A worker: one thread, one runtime, its own listening sockets, its own sessions.

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

use super::crew::{LoadGuard, WorkerLoads};
use super::doors::{SocketCommand, WorkerSockets};
use super::drain::{self, DrainStage};
use super::failure::{self, EssentialTask};
use super::listen::BoundSocket;
use super::moving;
use crate::accept::AcceptedConnection;
use crate::account::log::{AccessLogger, LogSender};
use crate::account::meter::WorkerMetrics;
use crate::admission::budget::QUANTUM;
use crate::clock;
use crate::clock::wheel::Tick;
use crate::fault::{self, Syscall};
use crate::flow::FlowWorker;
use crate::life::WorkerLocal;
use crate::session::{self, SessionWorker};
use crate::state::LiveState;

/// Fresh connections that may be on their way to a worker; beyond it, they stay where they were accepted.
pub(super) const HANDED_OVER: usize = 256;

/// Ticks from one telling of what was left out of the access log to the next: a second.
const TELLING: u32 = 20;

/// A fresh connection, already counted as a session of the worker that it goes to.
#[derive(Debug)]
pub(super) struct NewConnection {
    accepted: AcceptedConnection,
    /// The place of its listener.
    listener: u32,
    aboard: LoadGuard,
}

/// What a worker is given at its start.
pub(super) struct WorkerSetup {
    pub(super) number: u16,
    pub(super) live: Arc<LiveState>,
    pub(super) crew: Arc<WorkerLoads>,
    pub(super) doors: Vec<(u32, BoundSocket)>,
    /// Whether the doors are heard from the start.
    pub(super) accepts: bool,
    pub(super) others: Vec<mpsc::Sender<NewConnection>>,
    pub(super) handed_over: mpsc::Receiver<NewConnection>,
    pub(super) orders: mpsc::Receiver<SocketCommand>,
    pub(super) moves: mpsc::Receiver<moving::TransferCommand>,
    pub(super) stages: watch::Receiver<DrainStage>,
    pub(super) journal: Option<LogSender>,
}

/// Starts the thread of a worker.
pub(super) fn spawn(post: WorkerSetup) -> io::Result<JoinHandle<()>> {
    // A worker without a runtime would have the fewest sessions, and be given all: nothing starts without one.
    let (started, starts) = sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("worker-{}", post.number)).spawn(move || {
        let build = || Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        let runtime = match fault::at(Syscall::WorkerStart).map_err(io::Error::from).and_then(|()| build()) {
            Ok(runtime) => runtime,
            Err(error) => return started.send(Err(error)).unwrap_or_default(),
        };
        started.send(Ok(())).unwrap_or_default();
        let (number, stages) = (post.number, post.stages.clone());
        let _vital = EssentialTask::of_worker(number, "the thread");
        runtime.block_on(work(post));
        if failure::is_serving(&stages) {
            failure::end(&format!("the thread of worker {number}"));
        }
    })?;
    starts.recv().map_err(|_| io::Error::other("the thread has ended"))??;
    Ok(thread)
}

/// What the tasks of one worker share.
pub(super) struct WorkerContext {
    pub(super) worker: Rc<SessionWorker>,
    pub(super) live: Arc<LiveState>,
    pub(super) crew: Arc<WorkerLoads>,
    others: Vec<mpsc::Sender<NewConnection>>,
    /// Once a listener is UDP.
    flows: OnceCell<Rc<FlowWorker<LoadGuard>>>,
    journal: Option<LogSender>,
}

impl WorkerContext {
    pub(super) fn vital(&self, what: &'static str) -> EssentialTask {
        EssentialTask::of_worker(self.worker.number, what)
    }

    fn number(&self) -> usize {
        usize::from(self.worker.number)
    }

    /// Takes a fresh connection in, or hands it to a worker with fewer sessions.
    pub(super) fn receive(&self, accepted: AcceptedConnection, listener: u32) {
        let Some(lighter) = self.crew.lighter(self.number()) else { return self.start(accepted, listener) };
        let fresh = NewConnection { accepted, listener, aboard: self.crew.board(lighter) };
        let Some(other) = self.others.get(lighter) else { return };
        match other.try_send(fresh) {
            Ok(()) => self.worker.local.ledger.worker().handed_over.add(1),
            Err(mpsc::error::TrySendError::Full(fresh) | mpsc::error::TrySendError::Closed(fresh)) => {
                self.start(fresh.accepted, listener);
            }
        }
    }

    pub(super) fn start(&self, accepted: AcceptedConnection, listener: u32) {
        self.carry(NewConnection { accepted, listener, aboard: self.crew.board(self.number()) });
    }

    /// Hands the lines of the access log on.
    fn flush(&self) {
        self.worker.journal.flush();
        self.known_flows().iter().for_each(|flows| flows.flush());
    }

    /// Tells what was left out of the access log.
    fn tell(&self) {
        self.worker.rejections.tell();
        self.known_flows().iter().for_each(|flows| {
            flows.tell();
            flows.count_all_drops();
        });
    }

    /// The worker's flows, where there may be any.
    pub(super) fn known_flows(&self) -> Option<&Rc<FlowWorker<LoadGuard>>> {
        self.flows.get()
    }

    /// The worker's flows, from the first UDP listener on.
    ///
    /// # Errors
    /// What is short for them now.
    pub(super) fn flows(&self) -> io::Result<Rc<FlowWorker<LoadGuard>>> {
        if let Some(flows) = self.known_flows() {
            return Ok(Rc::clone(flows));
        }
        let flows = self.begin_flows()?;
        self.flows.set(Rc::clone(&flows)).unwrap_or_default();
        Ok(flows)
    }

    fn begin_flows(&self) -> io::Result<Rc<FlowWorker<LoadGuard>>> {
        let (crew, number, live) = (Arc::clone(&self.crew), self.number(), Arc::clone(&self.live));
        let board = Box::new(move || crew.board(number));
        let (worker, local) = (self.worker.number, Rc::clone(&self.worker.local));
        let flows = FlowWorker::new(worker, &live, local, self.journal.clone(), board)?;
        let (answering, vital) = (Rc::clone(&flows), self.vital("receiving from backends"));
        spawn_local(async move {
            let _vital = vital;
            if let Err(error) = answering.answer().await {
                tracing::error!(worker, %error, "a worker cannot receive from the backends of its flows");
                failure::end(&format!("receiving from backends of worker {worker}"));
            }
        });
        let (ending, vital) = (Rc::clone(&flows), self.vital("ending idle flows"));
        spawn_local(async move {
            let _vital = vital;
            ending.end_idle().await;
        });
        Ok(flows)
    }

    fn carry(&self, fresh: NewConnection) {
        let worker = Rc::clone(&self.worker);
        // Boxed, because a task moves what it runs three times at its end.
        spawn_local(Box::pin(session::run(worker, fresh.accepted, fresh.listener, fresh.aboard)));
    }
}

/// The number of a process's first session: beyond all that the process before it has given, which would have had to take on
/// 65,536 in each second.
fn first_session() -> u64 {
    clock::unix().as_secs() << 16
}

async fn work(mut post: WorkerSetup) {
    let number = usize::from(post.number);
    let Some(shard) = post.live.shards.get(number) else { return };
    let ledger = WorkerMetrics::new(Arc::clone(shard), post.live.labels.intern(""));
    ledger.number_from(first_session());
    let local = WorkerLocal::new(ledger, clock::now());
    let worker = SessionWorker::new(
        post.number,
        &post.live,
        Rc::clone(&local),
        AccessLogger::new(post.journal.clone()),
    );
    let shop = Rc::new(WorkerContext {
        worker: Rc::new(worker),
        live: Arc::clone(&post.live),
        crew: Arc::clone(&post.crew),
        others: post.others,
        flows: OnceCell::new(),
        journal: post.journal,
    });
    spawn_local(tick(Rc::clone(&shop)));
    let doors = WorkerSockets::new(&shop, &post.stages, post.accepts);
    for (listener, socket) in post.doors {
        doors.open(listener, socket);
    }
    spawn_local(doors.obey(post.orders));
    let orders = spawn_local(moving::obey(Rc::clone(&shop), post.moves));
    let handed_over = {
        let shop = Rc::clone(&shop);
        spawn_local(async move {
            let _vital = shop.vital("taking connections of other workers");
            while let Some(fresh) = post.handed_over.recv().await {
                shop.carry(fresh);
            }
        })
    };
    // A closed channel is the process's own end.
    let reached = post
        .stages
        .wait_for(|stage| *stage != DrainStage::Serving)
        .await
        .map_or(DrainStage::Over, |stage| *stage);
    if let DrainStage::Closing { idle } = reached {
        local.drain(idle);
        shop.known_flows().iter().for_each(|flows| flows.drain(idle.duration()));
        drain::over(&mut post.stages).await;
    }
    local.end_all();
    shop.known_flows().iter().for_each(|flows| flows.end_all());
    handed_over.abort();
    orders.abort();
    while post.crew.count(number) > 0 {
        sleep(Tick::SPAN / 10).await;
    }
    shop.tell();
    shop.flush();
}

/// While sessions wait for their tenant's bandwidth, it is granted whenever about so many bytes have come in: the least
/// that is worth a read. Everybody else's sessions wait for the end of what is granted at once, and what comes in during a
/// whole tick can be milliseconds of work.
const PARCEL: u64 = QUANTUM;

/// How often at most, which is as fine as the runtime's timers are, and at least.
const OFTEN: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(5);

/// Drives the worker's coarse time, and hands its lines of the access log on.
async fn tick(shop: Rc<WorkerContext>) {
    let _vital = shop.vital("the timers");
    let mut ticks = interval(Tick::SPAN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut untold = 0;
    loop {
        next(&mut ticks, &shop).await;
        fault::panic_at(Syscall::WorkerPanic);
        shop.worker.local.ledger.worker().ticks.add(1);
        let now = clock::now();
        shop.worker.local.advance(now);
        // A worker without sessions keeps no old one.
        let is_visit = shop.worker.renew(now);
        if is_visit {
            shop.worker.local.visit();
            shop.known_flows().iter().for_each(|flows| flows.visit(now));
        }
        shop.worker.end_late_headers(now);
        shop.worker.pacer.borrow_mut().advance(now);
        shop.known_flows().iter().for_each(|flows| flows.advance(now));
        shop.worker.local.ledger.fold(&shop.live.configured.load());
        shop.flush();
        untold += 1;
        if untold == TELLING {
            untold = 0;
            shop.tell();
        }
    }
}

/// Waits for the next tick, and grants bandwidth meanwhile to those who wait for it.
async fn next(ticks: &mut Interval, shop: &WorkerContext) {
    let pacer = &shop.worker.pacer;
    while !pacer.borrow().is_empty() {
        let span = pacer.borrow().span_of(PARCEL).clamp(OFTEN, SELDOM);
        if timeout(span, ticks.tick()).await.is_ok() {
            return;
        }
        pacer.borrow_mut().advance(clock::now());
    }
    ticks.tick().await;
}
