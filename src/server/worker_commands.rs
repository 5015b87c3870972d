//! Blocking commands to all workers, about their listening sockets.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::worker_sockets::{ClonedSocket, SocketCommand};

/// Sends commands to all workers. A worker that has ended is skipped.
#[derive(Clone, Debug)]
pub(super) struct WorkerCommands(Arc<[mpsc::Sender<SocketCommand>]>);

impl WorkerCommands {
    pub(super) fn new(commands: &[mpsc::Sender<SocketCommand>]) -> Self {
        Self(commands.into())
    }

    /// Sends a command to all workers, and waits for all replies.
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
    pub(super) fn clone_sockets(&self) -> Vec<ClonedSocket> {
        self.ask(SocketCommand::Lend).into_iter().flatten().collect()
    }

    /// Returns once no worker accepts any more.
    pub(super) fn pause(&self) {
        self.ask(SocketCommand::Pause);
    }

    pub(super) fn resume(&self) {
        self.0.iter().for_each(|worker| worker.blocking_send(SocketCommand::Resume).unwrap_or_default());
    }
}
