//! How live things go from a process to its successor: what is said, and the link it is said on.

pub mod link;
pub mod message;

use std::os::fd::OwnedFd;

use tokio::sync::oneshot;

/// A session or flow on its way: its record, and the descriptors that go with it, in the record's order.
#[derive(Debug)]
pub struct Parcel {
    /// What its owner wrote down of it.
    pub record: Vec<u8>,
    /// In the record's order.
    pub fds: Vec<OwnedFd>,
}

/// What the other side says of a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is the other side's now.
    Taken,
    /// It is ours, as before.
    Stays,
}

/// A parcel that waits for its answer; dropping the sender of the answer means that it stays.
#[derive(Debug)]
pub struct Leaving {
    /// What would go.
    pub parcel: Parcel,
    /// Where the answer is awaited.
    pub answer: oneshot::Sender<Answer>,
}
