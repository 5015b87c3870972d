//! The messages between an old process and its successor.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The version of all that is said. Both sides must speak the same one: between two that do not, listening sockets are not
/// handed on either, and the successor says so and ends.
pub const VERSION: u32 = 1;

/// A message; the variant's doc names its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkMessage {
    /// Sent by the successor: its version.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// The version of the program.
        program: String,
    },
    /// Old: it does not go.
    Refused {
        /// Why, for people.
        why: String,
    },
    /// Old: some of its sockets; the descriptors are in the same order.
    Sockets(Vec<OfferedSocket>),
    /// Old: these were all.
    AllSockets {
        /// The version of the program.
        program: String,
        /// Its process, for a successor that has to know whether it lives.
        pid: i32,
    },
    /// New: it could serve now.
    Ready,
    /// Old: it accepts no more, and hears no datagram any more. The tail is what it holds of its limits, as JSON; it is empty
    /// where an older program says this, and left alone where one hears it.
    Stopped,
    /// Old: a session or flow. The record is the tail.
    Parcel {
        /// Its number on this link.
        id: u32,
    },
    /// Old: every flow has been sent and answered for.
    FlowsSent,
    /// New: from here on it is mine.
    Taken {
        /// Its number.
        id: u32,
    },
    /// New: this one has to stay.
    Stays {
        /// Its number.
        id: u32,
        /// Why, for people.
        why: String,
    },
    /// Old: there is nothing left.
    Done,
}

/// A socket that is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedSocket {
    /// What it is for.
    pub role: SocketRole,
    /// Where it is bound; `None` for a path.
    pub bound: Option<SocketAddr>,
}

/// What a socket is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketRole {
    /// A listener's, of one worker.
    Listener {
        /// The listener's name.
        name: String,
        /// Whether it hears datagrams.
        udp: bool,
        /// The address as it is configured: the port may be 0.
        configured: SocketAddr,
    },
    /// The read-only pages.
    Admin {
        /// The address as it is configured.
        configured: SocketAddr,
    },
    /// The health check.
    Health {
        /// The address as it is configured.
        configured: SocketAddr,
    },
    /// What changes things: the unix socket on which this is said.
    Control {
        /// Its path.
        path: PathBuf,
        /// Whether it is for the process to remove the file.
        has_file: bool,
    },
}
