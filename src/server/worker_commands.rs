//! The workers' doors, as a thread sees them that may wait.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::worker_sockets::{Lent, SocketCommand};

/// The way to each worker's ear. A worker that has ended hears nothing, and is left out.
#[derive(Clone, Debug)]
pub(super) struct WorkerCommands(Arc<[mpsc::Sender<SocketCommand>]>);

impl WorkerCommands {
    pub(super) fn new(commands: &[mpsc::Sender<SocketCommand>]) -> Self {
        Self(commands.into())
    }

    /// Tells all of them, and waits for all their answers.
    fn ask<T>(&self, command: impl Fn(oneshot::Sender<T>) -> SocketCommand) -> Vec<T> {
        let ask = |worker: &mpsc::Sender<SocketCommand>| {
            let (sender, answer) = oneshot::channel();
            worker.blocking_send(command(sender)).unwrap_or_default();
            answer
        };
        let answers: Vec<_> = self.0.iter().map(ask).collect();
        answers.into_iter().filter_map(|answer| answer.blocking_recv().ok()).collect()
    }

    /// All listening sockets, those of each worker together, in the order of the workers.
    pub(super) fn clone_sockets(&self) -> Vec<Lent> {
        self.ask(SocketCommand::Lend).into_iter().flatten().collect()
    }

    /// Returns once nobody accepts any more.
    pub(super) fn pause(&self) {
        self.ask(SocketCommand::Pause);
    }

    pub(super) fn resume(&self) {
        self.0.iter().for_each(|worker| worker.blocking_send(SocketCommand::Resume).unwrap_or_default());
    }
}
