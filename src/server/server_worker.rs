//! What the server's tasks of one worker share, and where a new connection goes.

use std::cell::OnceCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::spawn_local;

use super::failure::{self, EssentialTask};
use crate::accept::AcceptedConnection;
use crate::flow::FlowWorker;
use crate::handover::transfers::WorkerTransfers;
use crate::session::{self, SessionWorker};
use crate::state::WorkerContext;
use crate::state::worker_loads::{LoadGuard, WorkerLoads};

/// Fresh connections that may be on their way to a worker; beyond it, they stay where they were accepted.
pub(super) const HANDED_OVER: usize = 256;

/// A new connection, already counted for the worker that it goes to.
#[derive(Debug)]
pub(super) struct NewConnection {
    accepted: AcceptedConnection,
    /// The place of its listener.
    listener: u32,
    load: LoadGuard,
}

/// What only the server's tasks of a worker use: its sessions, its flows, and the other workers.
pub(super) struct ServerWorker {
    pub(super) context: Rc<WorkerContext>,
    pub(super) sessions: Rc<SessionWorker>,
    pub(super) loads: Arc<WorkerLoads>,
    others: Vec<mpsc::Sender<NewConnection>>,
    /// Once a listener is UDP.
    flows: Rc<OnceCell<Rc<FlowWorker<LoadGuard>>>>,
}

impl ServerWorker {
    pub(super) fn new(
        context: Rc<WorkerContext>,
        loads: Arc<WorkerLoads>,
        others: Vec<mpsc::Sender<NewConnection>>,
    ) -> Rc<Self> {
        let sessions = SessionWorker::new(&context);
        Rc::new(Self { context, sessions, loads, others, flows: Rc::default() })
    }

    /// What has to leave in a takeover, and what comes.
    pub(super) fn transfers(&self) -> WorkerTransfers {
        WorkerTransfers { sessions: Rc::clone(&self.sessions), flows: Rc::clone(&self.flows) }
    }

    pub(super) fn essential_task(&self, what: &'static str) -> EssentialTask {
        EssentialTask::of_worker(self.context.number, what)
    }

    fn number(&self) -> usize {
        usize::from(self.context.number)
    }

    /// Starts a session for a new connection, or hands it to a worker with fewer sessions.
    pub(super) fn receive(&self, accepted: AcceptedConnection, listener: u32) {
        let Some(lighter) = self.loads.less_loaded(self.number()) else {
            return self.start(accepted, listener);
        };
        let fresh = NewConnection { accepted, listener, load: self.loads.count_session(lighter) };
        let Some(other) = self.others.get(lighter) else { return };
        match other.try_send(fresh) {
            Ok(()) => self.context.metrics.worker().handed_over.add(1),
            Err(mpsc::error::TrySendError::Full(fresh) | mpsc::error::TrySendError::Closed(fresh)) => {
                self.start(fresh.accepted, listener);
            }
        }
    }

    pub(super) fn start(&self, accepted: AcceptedConnection, listener: u32) {
        self.carry(NewConnection { accepted, listener, load: self.loads.count_session(self.number()) });
    }

    /// Flushes the lines of the access log to the writer.
    pub(super) fn flush(&self) {
        self.context.access_log.flush();
    }

    /// Reports suppressed access log lines.
    pub(super) fn report_suppressed(&self) {
        self.context.rejections.report_suppressed();
        self.existing_flows().iter().for_each(|flows| flows.count_all_drops());
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
        let (loads, number) = (Arc::clone(&self.loads), self.number());
        let count_flow = Box::new(move || loads.count_session(number));
        let flows = FlowWorker::new(&self.context, count_flow)?;
        let worker = self.context.number;
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

    /// Carries a connection that is counted for this worker.
    pub(super) fn carry(&self, fresh: NewConnection) {
        let sessions = Rc::clone(&self.sessions);
        // Boxed, because a task moves what it runs three times at its end.
        spawn_local(Box::pin(session::run(sessions, fresh.accepted, fresh.listener, fresh.load)));
    }
}
