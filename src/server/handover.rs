//! Takeover: a successor gets the listening sockets, then every live session and flow; the old process ends.
//!
//! No connection is accepted twice and no session moves twice: the old process stops before the successor starts, and
//! a transfer belongs to the process that holds its reply. Until the successor has reported that it is ready, nothing
//! has changed; if it exits later, the old process goes on with all that was not taken.

mod container;
mod give;
mod take;

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, park_timeout};
use std::time::Duration;

pub(super) use self::container::takeover_obstacle;
pub(super) use self::give::Handover;
pub use self::take::{TakeoverError, TakeoverOffer};
use super::Server;
use crate::clock;
use crate::config::Config;
use crate::handover::message::{OfferedSocket, SocketRole};

/// How long a successor waits for its backends to be known; a backend that is not by then is unknown to it at first.
const PROBES: Duration = Duration::from_secs(30);

/// How often it looks whether they are.
const LOOK: Duration = Duration::from_millis(5);

/// Sockets with what they are for.
pub(super) type Pages = Vec<(OfferedSocket, OwnedFd)>;

/// Copies of the sockets of the pages.
pub(super) fn pages(
    config: &Config,
    [admin, health]: [&TcpListener; 2],
    control: Option<&(UnixListener, PathBuf)>,
    has_file: bool,
) -> io::Result<Pages> {
    let mut pages = Vec::new();
    for (socket, role) in [
        (admin, SocketRole::Admin { configured: config.admin.bind }),
        (health, SocketRole::Health { configured: config.health.bind }),
    ] {
        let bound = Some(socket.local_addr()?);
        pages.push((OfferedSocket { role, bound }, socket.as_fd().try_clone_to_owned()?));
    }
    if let Some((socket, path)) = control {
        let role = SocketRole::Control { path: path.clone(), has_file };
        pages.push((OfferedSocket { role, bound: None }, socket.as_fd().try_clone_to_owned()?));
    }
    Ok(pages)
}

impl Server {
    /// From now on a successor may ask for everything.
    pub(super) fn allow_takeover(&self, pages: Pages, obstacle: Option<String>) {
        let handover = Handover {
            live: Arc::clone(&self.live),
            loads: Arc::clone(&self.loads),
            commands: self.reloader.commands(),
            transfer: Arc::clone(&self.transfer),
            reloader: self.reloader.clone(),
            pages,
            serving: self.serving.clone(),
            stage: self.stage.clone(),
            file: self.socket.clone(),
            busy: AtomicBool::new(false),
            obstacle,
        };
        // It is set once.
        self.control.handover.set(Arc::new(handover)).unwrap_or_default();
    }

    /// Takes over from the process whose [offer](super::StartOptions::takeover) this one was started with: returns
    /// once that accepts no more, and this one does. What lives there comes meanwhile. Nothing where there is none.
    ///
    /// # Errors
    /// The old process does not stop, and goes on as if nothing had happened.
    pub fn take_over(&mut self) -> Result<(), TakeoverError> {
        let Some(takeover) = self.takeover.take() else { return Ok(()) };
        let start = clock::now();
        // Sessions arrive at once, and must not find backends that are not probed or resolved.
        while self.live.is_starting() && clock::now().since(start) < PROBES {
            park_timeout(LOOK);
        }
        let arrivals = takeover.ready(&self.live)?;
        let (live, transfer, commands) =
            (Arc::clone(&self.live), Arc::clone(&self.transfer), self.reloader.commands());
        let (serving, drain, socket) = (self.serving.clone(), self.drain.clone(), self.socket.clone());
        live.takeovers.set_receiving(true);
        // First: where the takeover fails, nothing may be accepted after that.
        self.reloader.commands().resume();
        self.serving.send_replace(true);
        // Not one of the threads that the end waits for: it ends with the old process.
        thread::Builder::new().name("takeover".to_owned()).spawn(move || {
            let all = arrivals.run(&live, &transfer);
            live.takeovers.set_receiving(false);
            match all {
                // Not before: an old process that goes on needs its file, however this one ends.
                Ok(()) => socket.iter().for_each(|socket| socket.own()),
                Err(why) => {
                    // The old one accepts again: this one finishes what it has.
                    tracing::error!(why, "the previous process continues; this one drains");
                    serving.send_replace(false);
                    commands.pause();
                    drain.send_replace(true);
                }
            }
        })?;
        Ok(())
    }
}
