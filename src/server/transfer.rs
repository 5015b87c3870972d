//! Commands to workers that transfer live sessions and flows to another process, or take them over.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

use super::worker_context::WorkerContext;
use super::worker_loads::{LoadGuard, WorkerLoads};
use crate::flow::{self, FlowWorker};
use crate::handover::{PendingTransfer, TransferError, TransferKind, TransferReply};
use crate::session::{
    self,
    transfer::{self, TransferredSession},
};

/// Parcels that may wait for the other process: the sessions in them stand still, and all others go on meanwhile.
const UNDER_WAY: usize = 64;

/// Orders that may wait for a worker.
const ORDERS: usize = 64;

/// A command to a worker.
#[derive(Debug)]
pub(super) enum TransferCommand {
    /// Every session and flow leaves, through here; the other one is dropped once all flows have been answered for.
    Leave(mpsc::Sender<PendingTransfer>, mpsc::Sender<()>),
    /// Those that have not left stay, and datagrams are heard again.
    Stay(bool),
    /// Datagrams wait in the listening sockets, for their flows are still to come; or they are heard.
    Hear(bool),
    /// A session of another process goes on here; it has been answered for.
    Session(Box<TransferredSession>, LoadGuard),
    /// A flow of another process goes on here, and is answered for; it comes back where its listening socket is another worker's.
    Flow(PendingTransfer, FlowSocketMatch, oneshot::Sender<Option<PendingTransfer>>),
}

/// Which listening socket a flow may continue at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowSocketMatch {
    /// Behind the very socket that it came to.
    Same,
    /// Behind one of the same address.
    Alike,
}

/// Sends transfer commands to all workers.
#[derive(Debug)]
pub(super) struct TransferControl {
    loads: Arc<WorkerLoads>,
    commands: Vec<mpsc::Sender<TransferCommand>>,
    /// Whether it was told that something stays with the other process: of thousands, the first is.
    told: AtomicBool,
}

impl TransferControl {
    /// So many workers, and where each hears its orders.
    pub(super) fn new(
        workers: usize,
        loads: &Arc<WorkerLoads>,
    ) -> (Self, Vec<mpsc::Receiver<TransferCommand>>) {
        let (commands, heard) = (0..workers).map(|_| mpsc::channel(ORDERS)).unzip();
        (Self { loads: Arc::clone(loads), commands, told: AtomicBool::new(false) }, heard)
    }

    /// From now on every session and flow leaves. The second channel ends once all flows have been answered for.
    pub(super) async fn start(&self) -> (mpsc::Receiver<PendingTransfer>, mpsc::Receiver<()>) {
        let (departures, leaving) = mpsc::channel(UNDER_WAY);
        let (flows, flows_left) = mpsc::channel(1);
        for worker in &self.commands {
            // A worker that has ended has nothing that could leave.
            worker.send(TransferCommand::Leave(departures.clone(), flows.clone())).await.unwrap_or_default();
        }
        (leaving, flows_left)
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    pub(super) async fn stop(&self, hear: bool) {
        for worker in &self.commands {
            // As in `start`.
            worker.send(TransferCommand::Stay(hear)).await.unwrap_or_default();
        }
    }

    /// Has all hear datagrams, or leave them where they are.
    pub(super) async fn set_receiving(&self, hear: bool) {
        for worker in &self.commands {
            // As in `start`.
            worker.send(TransferCommand::Hear(hear)).await.unwrap_or_default();
        }
    }

    /// Gives what comes from another process to a worker, and answers. Where there is none, dropping it is an answer.
    pub(super) async fn take_over(&self, leaving: PendingTransfer) {
        match leaving.transfer.kind() {
            Ok(TransferKind::Session) => {
                let PendingTransfer { transfer, answer } = leaving;
                match transfer::decode(transfer) {
                    // If the receiver has given up, the session stays there.
                    Ok(transfer) if answer.send(TransferReply::Taken).is_ok() => self.carry(transfer).await,
                    Ok(_) => {}
                    Err(refused) => self.stays(&refused),
                }
            }
            Ok(TransferKind::Flow) => self.take_flow(leaving).await,
            Err(refused) => self.stays(&refused),
        }
    }

    /// Gives a session of another process, which has been told so, to the worker with the fewest.
    pub(super) async fn carry(&self, transfer: Box<TransferredSession>) {
        let Some(lightest) = self.loads.least_loaded() else { return };
        let Some(worker) = self.commands.get(lightest) else { return };
        // A worker that has ended ends its sessions.
        worker
            .send(TransferCommand::Session(transfer, self.loads.count_session(lightest)))
            .await
            .unwrap_or_default();
    }

    /// The worker of the same number as before has a flow's listening socket most likely, and else one of the others; one of the
    /// same address is for a flow whose own is nowhere.
    async fn take_flow(&self, mut leaving: PendingTransfer) {
        let first = flow::transfer::worker(&leaving.transfer).map_or(0, usize::from);
        for listen_socket in [FlowSocketMatch::Same, FlowSocketMatch::Alike] {
            for step in 0..self.commands.len() {
                let Some(worker) = self.commands.get((first + step) % self.commands.len()) else { return };
                let (back, comes_back) = oneshot::channel();
                if worker.send(TransferCommand::Flow(leaving, listen_socket, back)).await.is_err() {
                    return;
                }
                match comes_back.await {
                    Ok(Some(again)) => leaving = again,
                    Ok(None) | Err(_) => return,
                }
            }
        }
        self.stays(&TransferError::NoDoor);
    }

    fn stays(&self, refused: &TransferError) {
        if !self.told.swap(true, Ordering::Relaxed) {
            warn(refused);
        }
    }
}

/// Carries out a worker's transfer commands until the channel closes.
pub(super) async fn run_commands(context: Rc<WorkerContext>, mut commands: mpsc::Receiver<TransferCommand>) {
    let _vital = context.essential_task("orders to move sessions");
    let mut told = false;
    while let Some(command) = commands.recv().await {
        match command {
            TransferCommand::Leave(departures, flows) => context.start_transfer(departures, flows),
            TransferCommand::Stay(hear) => context.stop_transfer(hear),
            TransferCommand::Hear(hear) => context.set_receiving(hear),
            TransferCommand::Session(transfer, load) => {
                spawn_local(Box::pin(session::resume(Rc::clone(&context.worker), transfer, load)));
            }
            TransferCommand::Flow(leaving, listen_socket, back) => {
                let is_here = |flows: &&Rc<FlowWorker<LoadGuard>>| {
                    flows.has_socket(&leaving.transfer, listen_socket == FlowSocketMatch::Same)
                };
                let (taken, again) = match context.existing_flows().filter(is_here) {
                    Some(flows) => (take_flow(flows, leaving), None),
                    None => (Ok(()), Some(leaving)),
                };
                // The receiver is gone when the process ends.
                back.send(again).unwrap_or_default();
                if let Err(refused) = taken
                    && !std::mem::replace(&mut told, true)
                {
                    warn(&refused);
                }
            }
        }
    }
}

fn warn(refused: &TransferError) {
    tracing::warn!(%refused, "a session cannot be taken over and stays with the previous process; others may follow");
}

impl WorkerContext {
    /// From now on every session and flow leaves, through here.
    pub(super) fn start_transfer(
        &self,
        departures: mpsc::Sender<PendingTransfer>,
        flows_left: mpsc::Sender<()>,
    ) {
        *self.worker.departures.borrow_mut() = Some(departures.clone());
        self.worker.shared.start_transfer();
        if let Some(flows) = self.existing_flows().cloned() {
            // Here, and not in the task: an order to hear may be the next.
            flows.pause();
            spawn_local(async move {
                flows.transfer_out(departures).await;
                drop(flows_left);
            });
        }
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    pub(super) fn stop_transfer(&self, hear: bool) {
        *self.worker.departures.borrow_mut() = None;
        self.worker.shared.stop_transfer();
        // Those of this worker's sessions, too: none that leaves after this keeps its place.
        self.live.quotas.release_reserved();
        self.set_receiving(hear);
    }

    fn set_receiving(&self, hear: bool) {
        self.existing_flows().iter().for_each(|flows| if hear { flows.resume() } else { flows.pause() });
    }
}

/// Goes on with a flow of another process.
fn take_flow(flows: &FlowWorker<LoadGuard>, leaving: PendingTransfer) -> Result<(), TransferError> {
    let PendingTransfer { transfer, answer } = leaving;
    // If the receiver has given up, the session stays there.
    if !answer.is_closed() {
        flows.take_over(flow::transfer::decode(transfer)?)?;
        answer.send(TransferReply::Taken).unwrap_or_default();
    }
    Ok(())
}
