//! What a takeover asks of this process: its sockets, and to pause, go on or end.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::admin_socket::SocketFile;
use super::drain::WorkerStage;
use super::listen_sockets::{BoundListener, ListenSocketId};
use super::notify;
use super::reload::Reloader;
use crate::config::Config;
use crate::handover::ServerProcess;
use crate::handover::message::{OfferedSocket, SocketRole};
use crate::state::LiveState;

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

/// The parts of the process that a takeover concerns.
#[derive(Debug)]
pub(super) struct TakeoverProcess {
    pub(super) live: Arc<LiveState>,
    /// Knows how addresses are configured.
    pub(super) reloader: Reloader,
    pub(super) pages: Pages,
    /// Whether the pages are served here.
    pub(super) serving: watch::Sender<bool>,
    pub(super) stage: watch::Sender<WorkerStage>,
    pub(super) drain: watch::Sender<bool>,
    /// The file of the admin socket; it is the successor's once everything is.
    pub(super) file: Option<SocketFile>,
}

impl ServerProcess for TakeoverProcess {
    fn sockets(&self) -> io::Result<Vec<(OfferedSocket, OwnedFd)>> {
        let (snapshot, held) = (self.live.snapshot.load_full(), self.reloader.listeners());
        let configured = |id: ListenSocketId| {
            let is_it = |held: &&BoundListener| held.socket == id;
            held.iter().find(is_it).map_or(id.address, |held| held.configured)
        };
        let mut sockets = Vec::new();
        for (id, socket) in self.reloader.commands().clone_sockets() {
            let Some(listener) = snapshot.listeners.get(id.listener as usize) else { continue };
            let name = listener.label.name().to_owned();
            let role = SocketRole::Listener { name, udp: id.is_udp(), configured: configured(id) };
            sockets.push((OfferedSocket { role, bound: Some(id.address) }, socket));
        }
        for (offered, socket) in &self.pages {
            sockets.push((offered.clone(), socket.try_clone()?));
        }
        Ok(sockets)
    }

    fn allow_reloads(&self, are_allowed: bool) {
        self.reloader.allow(are_allowed);
    }

    fn serve(&self, is_serving: bool) {
        let commands = self.reloader.commands();
        if is_serving {
            commands.resume();
            self.serving.send_replace(true);
        } else {
            self.serving.send_replace(false);
            commands.pause();
        }
    }

    fn own_socket_file(&self, is_own: bool) {
        self.file.iter().for_each(|file| if is_own { file.own() } else { file.keep() });
    }

    fn drain(&self) {
        self.drain.send_replace(true);
    }

    fn end(&self, successor: Option<u32>) {
        // systemd accepts MAINPID= only from the main process that it knows.
        if let Some(successor) = successor {
            notify::main_pid(successor);
        }
        self.stage.send_replace(WorkerStage::Over);
    }
}
