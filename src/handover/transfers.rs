//! Has the workers freeze sessions and flows for another process, and thaw those that come from there.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

use super::records::{PendingTransfer, TransferError, TransferKind};
use crate::flow::FlowWorker;
use crate::flow::freeze::{FlowRecord, FrozenFlow};
use crate::frozen::{Departure, ThawError, TransferReply};
use crate::session::freeze::{FrozenSession, SessionRecord};
use crate::session::{self, SessionWorker};
use crate::state::worker_loads::{LoadGuard, WorkerLoads};

/// Sessions, and flows, that may wait for the other process: they stand still, and all others go on meanwhile.
const UNDER_WAY: usize = 64;

/// Orders that may wait for a worker.
const ORDERS: usize = 64;

/// A command to a worker.
#[derive(Debug)]
pub enum TransferCommand {
    /// Every session and flow leaves, through here; the flows' sender is dropped once all have been answered for.
    Leave(mpsc::Sender<Departure<SessionRecord>>, mpsc::Sender<Departure<FlowRecord>>),
    /// Those that have not left stay, and datagrams are heard again.
    Stay(bool),
    /// Datagrams wait in the listening sockets, for their flows are still to come; or they are heard.
    Hear(bool),
    /// A session of another process goes on here; it has been answered for.
    Session(Box<FrozenSession>, LoadGuard),
    /// A flow of another process goes on here, and is answered for; it comes back where its listening socket is another worker's.
    Flow(ArrivingFlow, FlowSocketMatch, oneshot::Sender<Option<ArrivingFlow>>),
}

/// A flow of another process, with where the reply goes.
type ArrivingFlow = Box<Departure<FlowRecord>>;

/// Which listening socket a flow may continue at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowSocketMatch {
    /// Behind the very socket that it came to.
    Same,
    /// Behind one of the same address.
    Alike,
}

/// What leaves all workers.
#[derive(Debug)]
pub struct Departures {
    sessions: mpsc::Receiver<Departure<SessionRecord>>,
    flows: mpsc::Receiver<Departure<FlowRecord>>,
    are_flows_gone: bool,
}

/// The next to leave.
#[derive(Debug)]
pub enum NextDeparture {
    /// A session or flow.
    Transfer(PendingTransfer),
    /// Every flow has been answered for.
    FlowsGone,
}

impl Departures {
    /// Those that wait to be sent.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.sessions.len() + self.flows.len()
    }

    /// The next to leave; `None` once nothing leaves any more.
    pub async fn next(&mut self) -> Option<NextDeparture> {
        loop {
            let packed = tokio::select! {
                Some(session) = self.sessions.recv() => PendingTransfer::pack(TransferKind::Session, session),
                flow = self.flows.recv(), if !self.are_flows_gone => {
                    let Some(flow) = flow else {
                        self.are_flows_gone = true;
                        return Some(NextDeparture::FlowsGone);
                    };
                    PendingTransfer::pack(TransferKind::Flow, flow)
                }
                else => return None,
            };
            // A session or flow that cannot be packed is dropped here and stays in its process.
            if let Ok(transfer) = packed {
                return Some(NextDeparture::Transfer(transfer));
            }
        }
    }
}

/// Sends transfer commands to all workers.
#[derive(Debug)]
pub struct TransferControl {
    loads: Arc<WorkerLoads>,
    commands: Vec<mpsc::Sender<TransferCommand>>,
    /// Whether it was told that something stays with the other process: of thousands, the first is.
    told: AtomicBool,
}

impl TransferControl {
    /// So many workers, and where each hears its orders.
    pub fn new(
        workers: usize,
        loads: &Arc<WorkerLoads>,
    ) -> (Arc<Self>, Vec<mpsc::Receiver<TransferCommand>>) {
        let (commands, heard) = (0..workers).map(|_| mpsc::channel(ORDERS)).unzip();
        (Arc::new(Self { loads: Arc::clone(loads), commands, told: AtomicBool::new(false) }), heard)
    }

    /// From now on every session and flow leaves.
    pub async fn start(&self) -> Departures {
        let (sessions, leaving_sessions) = mpsc::channel(UNDER_WAY);
        let (flows, leaving_flows) = mpsc::channel(UNDER_WAY);
        for worker in &self.commands {
            // A worker that has ended has no sessions.
            worker.send(TransferCommand::Leave(sessions.clone(), flows.clone())).await.unwrap_or_default();
        }
        Departures { sessions: leaving_sessions, flows: leaving_flows, are_flows_gone: false }
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    pub async fn stop(&self, hear: bool) {
        for worker in &self.commands {
            // As in `start`.
            worker.send(TransferCommand::Stay(hear)).await.unwrap_or_default();
        }
    }

    /// Has all hear datagrams, or leave them where they are.
    pub async fn set_receiving(&self, hear: bool) {
        for worker in &self.commands {
            // As in `start`.
            worker.send(TransferCommand::Hear(hear)).await.unwrap_or_default();
        }
    }

    /// Gives what comes from another process to a worker, and answers. Where there is none, dropping it is an answer.
    pub async fn take_over(&self, PendingTransfer { transfer, answer }: PendingTransfer) {
        let result = match transfer.kind() {
            Ok(TransferKind::Session) => match transfer.session() {
                // If the receiver is gone, the session stays in the other process.
                Ok(session) if answer.send(TransferReply::Taken).is_ok() => {
                    self.carry(session).await;
                    Ok(())
                }
                Ok(_) => Ok(()),
                Err(refused) => Err(refused),
            },
            Ok(TransferKind::Flow) => match transfer.read(TransferKind::Flow) {
                Ok(frozen) => self.take_flow(Box::new(Departure { frozen, reply: answer })).await,
                Err(refused) => Err(refused),
            },
            Err(refused) => Err(refused),
        };
        if let Err(refused) = result
            && !self.told.swap(true, Ordering::Relaxed)
        {
            warn(&refused);
        }
    }

    /// Gives a session of another process, which has been told so, to the worker with the fewest.
    pub async fn carry(&self, session: Box<FrozenSession>) {
        let Some(lightest) = self.loads.least_loaded() else { return };
        let Some(worker) = self.commands.get(lightest) else { return };
        // A worker that has ended ends its sessions.
        let command = TransferCommand::Session(session, self.loads.count_session(lightest));
        worker.send(command).await.unwrap_or_default();
    }

    /// The worker of the same number as before has a flow's listening socket most likely, and else one of the others; one of the
    /// same address is for a flow whose own is nowhere.
    async fn take_flow(&self, mut flow: ArrivingFlow) -> Result<(), TransferError> {
        let first = usize::from(flow.frozen.record.worker());
        for listen_socket in [FlowSocketMatch::Same, FlowSocketMatch::Alike] {
            for step in 0..self.commands.len() {
                let place = (first + step) % self.commands.len();
                let Some(worker) = self.commands.get(place) else { return Ok(()) };
                let (back, comes_back) = oneshot::channel();
                if worker.send(TransferCommand::Flow(flow, listen_socket, back)).await.is_err() {
                    return Ok(());
                }
                match comes_back.await {
                    Ok(Some(again)) => flow = again,
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
        }
        Err(ThawError::NoListenSocket.into())
    }
}

/// The sessions and flows of one worker.
#[derive(Debug)]
pub struct WorkerTransfers {
    /// What its sessions use.
    pub sessions: Rc<SessionWorker>,
    /// Its flows, once it has any.
    pub flows: Rc<OnceCell<Rc<FlowWorker<LoadGuard>>>>,
}

impl WorkerTransfers {
    /// Carries out commands until the channel closes.
    pub async fn run_commands(self, mut commands: mpsc::Receiver<TransferCommand>) {
        let mut told = false;
        while let Some(command) = commands.recv().await {
            match command {
                TransferCommand::Leave(sessions, flows) => self.start(sessions, flows),
                TransferCommand::Stay(hear) => self.stop(hear),
                TransferCommand::Hear(hear) => self.set_receiving(hear),
                TransferCommand::Session(session, load) => {
                    spawn_local(Box::pin(session::thaw(Rc::clone(&self.sessions), session, load)));
                }
                TransferCommand::Flow(flow, listen_socket, back) => {
                    let is_here = |flows: &&Rc<FlowWorker<LoadGuard>>| {
                        flows.has_socket(&flow.frozen.record, listen_socket == FlowSocketMatch::Same)
                    };
                    let (taken, again) = match self.flows.get().filter(is_here) {
                        Some(flows) => (take_flow(flows, flow), None),
                        None => (Ok(()), Some(flow)),
                    };
                    // The receiver is gone when the process ends.
                    back.send(again).unwrap_or_default();
                    if let Err(refused) = taken
                        && !std::mem::replace(&mut told, true)
                    {
                        warn(&refused.into());
                    }
                }
            }
        }
    }

    /// From now on every session and flow leaves, through here.
    fn start(
        &self,
        sessions: mpsc::Sender<Departure<SessionRecord>>,
        flows_leave: mpsc::Sender<Departure<FlowRecord>>,
    ) {
        *self.sessions.departures.borrow_mut() = Some(sessions);
        self.sessions.context.local.start_transfer();
        if let Some(flows) = self.flows.get().cloned() {
            // Here, and not in the task: an order to hear may be the next.
            flows.pause();
            spawn_local(async move { flows.freeze_all(flows_leave).await });
        }
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    fn stop(&self, hear: bool) {
        *self.sessions.departures.borrow_mut() = None;
        self.sessions.context.local.stop_transfer();
        // Those of this worker's sessions, too: none that leaves after this keeps its place.
        self.sessions.context.live.quotas.release_reserved();
        self.set_receiving(hear);
    }

    fn set_receiving(&self, hear: bool) {
        self.flows.get().into_iter().for_each(|flows| if hear { flows.resume() } else { flows.pause() });
    }
}

/// Goes on with a flow of another process.
fn take_flow(flows: &FlowWorker<LoadGuard>, flow: ArrivingFlow) -> Result<(), ThawError> {
    let Departure { frozen, reply } = *flow;
    // If the receiver is gone, the flow stays in the other process.
    if !reply.is_closed() {
        flows.thaw(FrozenFlow::new(frozen)?)?;
        reply.send(TransferReply::Taken).unwrap_or_default();
    }
    Ok(())
}

fn warn(refused: &TransferError) {
    tracing::warn!(%refused, "a session cannot be taken over and stays with the previous process; others may follow");
}
