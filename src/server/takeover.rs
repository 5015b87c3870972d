//! Takeover: a successor gets the listening sockets, then every live session and flow, and the old process ends.
//!
//! Nobody accepts twice and nothing moves twice: the old process stops before the successor starts, and a parcel belongs to
//! the one who holds its answer. Until the successor has said that it is ready, nothing has changed; if it goes later, the old
//! process goes on with all that was not taken.

pub(super) mod give;
pub(super) mod take;

use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, oneshot};

use super::crew::Aboard;
use crate::takeover::message::Offered;
use crate::takeover::{Leaving, Parcel};

/// Parcels of one worker that wait to be sent, or for their answer.
pub(super) const ON_THEIR_WAY: usize = 32;

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Order {
    /// To show its listening sockets.
    Lend(oneshot::Sender<Vec<(Offered, OwnedFd)>>),
    /// To accept and hear nothing, until it may again.
    Pause(oneshot::Sender<()>),
    /// To go on accepting.
    Resume,
    /// To send its sessions and flows away.
    Depart(mpsc::Sender<Leaving>),
    /// To keep those that are left.
    Stay,
    /// To take one in.
    Arrive(Parcel, Aboard),
}
