//! A session or flow at rest, on its way to another process: what tells of it, and the other process's reply.

use std::os::fd::OwnedFd;

use tokio::sync::oneshot;

use crate::forward::freeze::RestoreError;

/// A session or flow at rest.
#[derive(Debug)]
pub struct Frozen<R> {
    /// What is told of it.
    pub record: R,
    /// The bytes that it holds.
    pub held: Vec<u8>,
    /// Its sockets, and its pipes where they hold bytes, in the record's order.
    pub fds: Vec<OwnedFd>,
}

/// A session or flow that waits for its reply; dropping the sender of the reply means [`TransferReply::Stays`].
#[derive(Debug)]
pub struct Departure<R> {
    /// What leaves.
    pub frozen: Frozen<R>,
    /// Where the reply goes.
    pub reply: oneshot::Sender<TransferReply>,
}

/// The other side's reply to a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferReply {
    /// It carries what was in it from here on.
    Taken,
    /// It does not, and never will.
    Stays,
}

/// Why a session or flow cannot go on in this process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThawError {
    /// Its record is none.
    #[error("the record is malformed: {0}")]
    Malformed(String),
    /// What came with the record is not what it says.
    #[error(transparent)]
    Misfit(#[from] RestoreError),
    /// A flow whose listening socket this worker does not have.
    #[error("this process has no listening socket for the flow")]
    NoListenSocket,
    /// A flow whose socket the worker's poll has no room for.
    #[error("out of descriptors or memory")]
    Shortage,
}
