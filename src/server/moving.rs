//! How live sessions and flows leave this process, and come from another one: what the process tells its workers.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

use super::crew::{LoadGuard, WorkerLoads};
use super::worker::WorkerContext;
use crate::flow::{self, FlowWorker};
use crate::session::{
    self,
    moved::{self, TransferredSession},
};
use crate::takeover::{PendingTransfer, TransferError, TransferKind, TransferReply};

/// Parcels that may wait for the other process: the sessions in them stand still, and all others go on meanwhile.
const UNDER_WAY: usize = 64;

/// Orders that may wait for a worker.
const ORDERS: usize = 64;

/// What a worker is told.
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

/// Where a flow goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowSocketMatch {
    /// Behind the very socket that it came to.
    Same,
    /// Behind one of the same address.
    Alike,
}

/// The workers, as those who move sessions see them.
#[derive(Debug)]
pub(super) struct TransferControl {
    crew: Arc<WorkerLoads>,
    orders: Vec<mpsc::Sender<TransferCommand>>,
    /// Whether it was told that something stays with the other process: of thousands, the first is.
    told: AtomicBool,
}

impl TransferControl {
    /// So many workers, and where each hears its orders.
    pub(super) fn new(
        workers: usize,
        crew: &Arc<WorkerLoads>,
    ) -> (Self, Vec<mpsc::Receiver<TransferCommand>>) {
        let (orders, heard) = (0..workers).map(|_| mpsc::channel(ORDERS)).unzip();
        (Self { crew: Arc::clone(crew), orders, told: AtomicBool::new(false) }, heard)
    }

    /// From now on every session and flow leaves. The second channel ends once all flows have been answered for.
    pub(super) async fn start(&self) -> (mpsc::Receiver<PendingTransfer>, mpsc::Receiver<()>) {
        let (departures, leaving) = mpsc::channel(UNDER_WAY);
        let (flows, flows_left) = mpsc::channel(1);
        for worker in &self.orders {
            // A worker that has ended has nothing that could leave.
            worker.send(TransferCommand::Leave(departures.clone(), flows.clone())).await.unwrap_or_default();
        }
        (leaving, flows_left)
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    pub(super) async fn stop(&self, hear: bool) {
        for worker in &self.orders {
            // As in `start`.
            worker.send(TransferCommand::Stay(hear)).await.unwrap_or_default();
        }
    }

    /// Has all hear datagrams, or leave them where they are.
    pub(super) async fn hear_datagrams(&self, hear: bool) {
        for worker in &self.orders {
            // As in `start`.
            worker.send(TransferCommand::Hear(hear)).await.unwrap_or_default();
        }
    }

    /// Gives what comes from another process to a worker, and answers. Where there is none, dropping it is an answer.
    pub(super) async fn take_over(&self, leaving: PendingTransfer) {
        match leaving.parcel.kind() {
            Ok(TransferKind::Session) => {
                let PendingTransfer { parcel, answer } = leaving;
                match moved::decode(parcel) {
                    // Who waits for no answer any more has it still.
                    Ok(moved) if answer.send(TransferReply::Taken).is_ok() => self.carry(moved).await,
                    Ok(_) => {}
                    Err(refused) => self.stays(&refused),
                }
            }
            Ok(TransferKind::Flow) => self.take_flow(leaving).await,
            Err(refused) => self.stays(&refused),
        }
    }

    /// Gives a session of another process, which has been told so, to the worker with the fewest.
    pub(super) async fn carry(&self, moved: Box<TransferredSession>) {
        let Some(lightest) = self.crew.lightest() else { return };
        let Some(worker) = self.orders.get(lightest) else { return };
        // A worker that has ended ends its sessions.
        worker.send(TransferCommand::Session(moved, self.crew.board(lightest))).await.unwrap_or_default();
    }

    /// The worker of the same number as before has a flow's listening socket most likely, and else one of the others; one of the
    /// same address is for a flow whose own is nowhere.
    async fn take_flow(&self, mut leaving: PendingTransfer) {
        let first = flow::moved::worker(&leaving.parcel).map_or(0, usize::from);
        for door in [FlowSocketMatch::Same, FlowSocketMatch::Alike] {
            for step in 0..self.orders.len() {
                let Some(worker) = self.orders.get((first + step) % self.orders.len()) else { return };
                let (back, comes_back) = oneshot::channel();
                if worker.send(TransferCommand::Flow(leaving, door, back)).await.is_err() {
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

/// Does what a worker is told, until nobody tells it anything any more.
pub(super) async fn obey(shop: Rc<WorkerContext>, mut orders: mpsc::Receiver<TransferCommand>) {
    let _vital = shop.vital("orders to move sessions");
    let mut told = false;
    while let Some(order) = orders.recv().await {
        match order {
            TransferCommand::Leave(departures, flows) => shop.start_moving(departures, flows),
            TransferCommand::Stay(hear) => shop.stop_moving(hear),
            TransferCommand::Hear(hear) => shop.hear(hear),
            TransferCommand::Session(moved, aboard) => {
                spawn_local(Box::pin(session::resume(Rc::clone(&shop.worker), moved, aboard)));
            }
            TransferCommand::Flow(leaving, door, back) => {
                let is_here = |flows: &&Rc<FlowWorker<LoadGuard>>| {
                    flows.has_door(&leaving.parcel, door == FlowSocketMatch::Same)
                };
                let (taken, again) = match shop.known_flows().filter(is_here) {
                    Some(flows) => (take_flow(flows, leaving), None),
                    None => (Ok(()), Some(leaving)),
                };
                // Nobody waits for it where the process ends.
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
    tracing::warn!(%refused, "a session of the other process stays there, and others may, too");
}

impl WorkerContext {
    /// From now on every session and flow leaves, through here.
    pub(super) fn start_moving(
        &self,
        departures: mpsc::Sender<PendingTransfer>,
        flows_left: mpsc::Sender<()>,
    ) {
        *self.worker.departures.borrow_mut() = Some(departures.clone());
        self.worker.local.start_moving();
        if let Some(flows) = self.known_flows().cloned() {
            // Here, and not in the task: an order to hear may be the next.
            flows.pause();
            spawn_local(async move {
                flows.move_out(departures).await;
                drop(flows_left);
            });
        }
    }

    /// Whatever has not left stays. Datagrams are heard again, or not.
    pub(super) fn stop_moving(&self, hear: bool) {
        *self.worker.departures.borrow_mut() = None;
        self.worker.local.stop_moving();
        // Those of this worker's sessions, too: none that leaves after this keeps its place.
        self.live.quotas.keep_none();
        self.hear(hear);
    }

    fn hear(&self, hear: bool) {
        self.known_flows().iter().for_each(|flows| if hear { flows.go_on() } else { flows.pause() });
    }
}

/// Goes on with a flow of another process.
fn take_flow(flows: &FlowWorker<LoadGuard>, leaving: PendingTransfer) -> Result<(), TransferError> {
    let PendingTransfer { parcel, answer } = leaving;
    // Who waits for no answer any more has it still.
    if !answer.is_closed() {
        flows.take_over(flow::moved::decode(parcel)?)?;
        answer.send(TransferReply::Taken).unwrap_or_default();
    }
    Ok(())
}
