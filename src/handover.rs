//! Takeover: a successor gets the listening sockets, then every live session and flow; the old process ends.
//!
//! No connection is accepted twice and no session moves twice: the old process stops before the successor starts, and
//! a transfer belongs to the process that holds its reply. Until the successor has reported that it is ready, nothing
//! has changed; if it exits later, the old process goes on with all that was not taken.
//!
//! The old process [gives](give), the successor [takes](take). Both speak [messages](message) over a [link]; a session or flow
//! travels as a [record](records). What [sessions](crate::session) and [flows](crate::flow) have to do for that is to freeze
//! and thaw, for which the workers have their [orders](transfers).

mod container;
pub mod give;
pub mod link;
pub mod message;
pub mod records;
pub mod take;
pub mod transfers;

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;

pub use self::container::takeover_obstacle;
use self::message::OfferedSocket;
pub use self::take::{TakeoverError, TakeoverOffer};

/// What a takeover asks of the process around the sessions.
pub trait ServerProcess: Debug + Send + Sync {
    /// Copies of all of its sockets.
    ///
    /// # Errors
    /// Where there is no descriptor left for a copy.
    fn sockets(&self) -> io::Result<Vec<(OfferedSocket, OwnedFd)>>;

    /// Lets reloads through, or refuses them and returns once one that is under way has ended.
    fn allow_reloads(&self, are_allowed: bool);

    /// Accepts and serves the pages, or does neither and returns once that holds.
    fn serve(&self, is_serving: bool);

    /// Whether this process removes the admin socket's file at its end.
    fn own_socket_file(&self, is_own: bool);

    /// Starts to drain.
    fn drain(&self);

    /// Ends: everything is the successor's, whose process this is where it is known.
    fn end(&self, successor: Option<u32>);
}
