//! The old process's side: offers its sockets, stops accepting, and sends its sessions.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot, watch};

use crate::account::lock;
use crate::admission::quota::HeldSlots;
use crate::clock::{self, Moment};
use crate::handover::link::{HandoverLink, MOST_FDS, MOST_TAIL};
use crate::handover::message::{LinkMessage, OfferedSocket, SocketRole, VERSION};
use crate::handover::{PendingTransfer, TransferReply};
use crate::server::admin_socket::SocketFile;
use crate::server::drain::DrainStage;
use crate::server::notify;
use crate::server::reload::Reloader;
use crate::server::transfer::TransferControl;
use crate::server::worker_commands::WorkerCommands;
use crate::server::worker_loads::WorkerLoads;
use crate::state::LiveState;
use crate::tenant::Tenant;

/// How long the successor may take to be ready: it reads its configuration, looks names up and probes meanwhile.
const READY: Duration = Duration::from_secs(60);

/// How long the reply to a transfer may take. Beyond it the frozen sessions have waited long enough.
const ANSWER: Duration = Duration::from_secs(5);

/// How often is looked whether anything is left.
const LOOK: Duration = Duration::from_millis(5);

/// How often what is left is told.
const TELL: Duration = Duration::from_secs(2);

/// Why a handover failed.
#[derive(Debug, thiserror::Error)]
enum HandoverError {
    #[error("{0}")]
    Refused(String),
    #[error("the successor closed the link")]
    Gone,
    #[error("the successor does not answer")]
    Late,
    #[error("the configuration changed or a drain began during the takeover")]
    Overtaken,
    #[error("unexpected message from the successor")]
    Confused,
    #[error("the link to the successor failed: {0}")]
    Link(#[from] io::Error),
}

/// The state needed to hand over to a successor.
pub(in crate::server) struct Handover {
    pub(in crate::server) live: Arc<LiveState>,
    pub(in crate::server) loads: Arc<WorkerLoads>,
    pub(in crate::server) commands: WorkerCommands,
    pub(in crate::server) transfer: Arc<TransferControl>,
    /// Knows how addresses are configured.
    pub(in crate::server) reloader: Reloader,
    /// Sockets of the pages.
    pub(in crate::server) pages: Vec<(OfferedSocket, OwnedFd)>,
    /// Whether the pages are served here.
    pub(in crate::server) serving: watch::Sender<bool>,
    pub(in crate::server) stage: watch::Sender<DrainStage>,
    /// The file of the admin socket; it is the successor's once everything is.
    pub(in crate::server) file: Option<Arc<SocketFile>>,
    /// One takeover at a time.
    pub(in crate::server) busy: AtomicBool,
    /// Why a successor in the same PID namespace would end with this process, if it would.
    pub(in crate::server) obstacle: Option<String>,
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Giver").finish_non_exhaustive()
    }
}

/// Parcels that wait for their answer, each with the time since when.
type Pending = Mutex<HashMap<u32, (oneshot::Sender<TransferReply>, Moment)>>;

impl Handover {
    /// Whether a successor is being served.
    pub(in crate::server) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Serves a successor that has connected; returns when all is its, or when that has failed and this process goes on.
    pub(in crate::server) fn run(&self, stream: UnixStream) {
        let is_alone = !self.busy.swap(true, Ordering::AcqRel);
        // 0 is a process outside of this one's PID namespace (pid_namespaces(7)).
        let successor = getsockopt(&stream, PeerCredentials)
            .ok()
            .and_then(|peer| u32::try_from(peer.pid()).ok())
            .filter(|pid| *pid > 0);
        match self.give(stream, is_alone, successor.is_some()) {
            Ok(()) => {
                self.live.takeovers.count(true);
                tracing::info!(pid = successor, "handover complete: all sessions moved to the successor");
                // Not before: of a successor that fails it could not be taken back. Systemd believes it of the process that
                // it knows.
                if let Some(successor) = successor {
                    notify::main_pid(successor);
                }
                self.stage.send_replace(DrainStage::Over);
            }
            Err(error) => {
                self.live.takeovers.count(false);
                tracing::error!(%error, "takeover failed; this process continues");
                if is_alone {
                    self.busy.store(false, Ordering::Release);
                }
            }
        }
    }

    fn give(&self, stream: UnixStream, is_alone: bool, shares_namespace: bool) -> Result<(), HandoverError> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let link = HandoverLink::new(stream, ANSWER)?;
        match link.receive()?.map(|frame| frame.message) {
            Some(LinkMessage::Hello { version: VERSION, program }) => {
                tracing::info!(program, "a successor requests the sockets");
            }
            Some(LinkMessage::Hello { version, program }) => {
                let own = env!("CARGO_PKG_VERSION");
                return refuse(
                    &link,
                    format!(
                        "{program} speaks version {version} of the takeover, and {own} speaks {VERSION}: restart instead"
                    ),
                );
            }
            Some(_) => return Err(HandoverError::Confused),
            None => return Err(HandoverError::Gone),
        }
        if let Some(obstacle) = self.obstacle.as_ref().filter(|_| shares_namespace) {
            return refuse(&link, obstacle.clone());
        }
        if !is_alone {
            return refuse(&link, "another takeover is in progress".to_owned());
        }
        if self.live.takeovers.is_receiving() {
            return refuse(&link, "the previous takeover is not finished".to_owned());
        }
        if self.live.is_draining() {
            return refuse(&link, "the previous process is already draining".to_owned());
        }
        let reloads = self.live.reloads.done();
        self.send_listeners(&link)?;
        link.set_read_timeout(Some(READY))?;
        match link.receive()?.map(|frame| frame.message) {
            Some(LinkMessage::Ready) => {}
            Some(_) => return Err(HandoverError::Confused),
            None => return Err(HandoverError::Gone),
        }
        // It has read what was in force before. A reload that is under way is over then, or refused.
        let no_reloads = self.reloader.pause_reloads();
        if self.live.is_draining() || self.live.reloads.done() != reloads {
            return Err(HandoverError::Overtaken);
        }
        let stopped = PausedService::new(self, &runtime);
        link.send(&LinkMessage::Stopped, &self.held_slots()?, &[])?;
        self.send_sessions(&link, &runtime)?;
        stopped.commit();
        // This process ends.
        std::mem::forget(no_reloads);
        Ok(())
    }

    /// What is held of the limits, as it is told. Of more tenants than can be told those with the fewest are left out.
    fn held_slots(&self) -> io::Result<Vec<u8>> {
        let snapshot = self.live.snapshot.load_full();
        let held = |tenant: &Tenant| {
            let (sessions, flows) = (tenant.quota.sessions(), tenant.quota.flows());
            (sessions + flows > 0).then(|| (tenant.label.name().to_owned(), sessions, flows))
        };
        let mut tenants: Vec<_> = snapshot.directory.tenants().iter().filter_map(held).collect();
        tenants.sort_unstable_by_key(|(_, sessions, flows)| std::cmp::Reverse(sessions + flows));
        let mut holding = HeldSlots { all: self.live.sessions.present(), tenants };
        loop {
            let told = serde_json::to_vec(&holding)?;
            if told.len() <= MOST_TAIL {
                return Ok(told);
            }
            holding.tenants.truncate(holding.tenants.len() / 2);
        }
    }

    /// Sends every listening socket.
    fn send_listeners(&self, link: &HandoverLink) -> Result<(), HandoverError> {
        let (snapshot, held) = (self.live.snapshot.load_full(), self.reloader.listeners());
        let configured = |bound: SocketAddr, listener: u32, udp: bool| {
            let is_it = |held: &&crate::server::listen_sockets::BoundListener| {
                let listen_socket = held.socket;
                listen_socket.address == bound
                    && listen_socket.listener == listener
                    && listen_socket.is_udp() == udp
            };
            held.iter().find(is_it).map_or(bound, |held| held.configured)
        };
        let mut sockets = Vec::new();
        for (listen_socket, socket) in self.commands.clone_sockets() {
            let Some(listener) = snapshot.listeners.get(listen_socket.listener as usize) else { continue };
            let role = SocketRole::Listener {
                name: listener.label.name().to_owned(),
                udp: listen_socket.is_udp(),
                configured: configured(listen_socket.address, listen_socket.listener, listen_socket.is_udp()),
            };
            sockets.push((OfferedSocket { role, bound: Some(listen_socket.address) }, socket));
        }
        for (offered, socket) in &self.pages {
            sockets.push((offered.clone(), socket.try_clone()?));
        }
        for some in sockets.chunks(MOST_FDS) {
            let (offered, fds): (Vec<_>, Vec<_>) =
                some.iter().map(|(offered, socket)| (offered.clone(), socket.as_fd())).unzip();
            link.send(&LinkMessage::Sockets(offered), &[], &fds)?;
        }
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let program = env!("CARGO_PKG_VERSION").to_owned();
        link.send(&LinkMessage::AllSockets { program, pid }, &[], &[])?;
        Ok(())
    }

    /// Sends every session and flow, each as soon as it can be transferred.
    fn send_sessions(&self, link: &HandoverLink, runtime: &Runtime) -> Result<(), HandoverError> {
        let (pending, gone) = (Pending::default(), AtomicBool::new(false));
        link.set_read_timeout(None)?;
        let (ended, end) = sync_channel(1);
        std::thread::scope(|scope| {
            let (leaving, mut flows_left) = runtime.block_on(self.transfer.start());
            scope.spawn(|| send_transfers(link, leaving, &pending, &gone));
            scope.spawn(move || {
                while flows_left.blocking_recv().is_some() {}
                // Where it cannot be said, the others will notice.
                link.send(&LinkMessage::FlowsSent, &[], &[]).unwrap_or_default();
            });
            scope.spawn(|| receive_replies(link, &pending, &gone, &ended));
            let result = self.watch(&pending, &gone, &end);
            let result = result.and_then(|()| Ok(link.send(&LinkMessage::Done, &[], &[])?));
            // Replies so far count; sessions without a reply stay. The threads end with their senders.
            if result.is_ok() {
                link.stop_receiving();
            } else {
                link.shut_down();
            }
            runtime.block_on(self.transfer.stop(result.is_err()));
            result
        })
    }

    /// Waits until nothing is left, or the successor is gone.
    fn watch(&self, pending: &Pending, gone: &AtomicBool, end: &Receiver<()>) -> Result<(), HandoverError> {
        let start = clock::now();
        let deadline = self.live.config.load().drain.deadline;
        let mut told = start;
        loop {
            let ended = end.recv_timeout(LOOK);
            if gone.load(Ordering::Acquire) || !matches!(ended, Err(RecvTimeoutError::Timeout)) {
                return Err(HandoverError::Gone);
            }
            let (now, left) = (clock::now(), self.loads.total());
            if left == 0 {
                return Ok(());
            }
            if lock(pending).values().any(|(_, since)| now.since(*since) > ANSWER) {
                return Err(HandoverError::Late);
            }
            if now.since(told) >= TELL {
                told = now;
                let pending = usize::try_from(self.live.pending()).unwrap_or(usize::MAX);
                tracing::info!(
                    left,
                    without_a_whole_header = pending.min(left),
                    waiting_for_a_backend = left.saturating_sub(pending),
                    "sessions that cannot be handed over yet continue in this process"
                );
            }
            if now.since(start) > deadline {
                tracing::warn!(
                    left,
                    "the drain deadline passed: sessions that cannot be handed over are closed"
                );
                return Ok(());
            }
        }
    }
}

fn refuse(link: &HandoverLink, why: String) -> Result<(), HandoverError> {
    link.send(&LinkMessage::Refused { why: why.clone() }, &[], &[])?;
    Err(HandoverError::Refused(why))
}

/// Sends transfers.
fn send_transfers(
    link: &HandoverLink,
    mut leaving: mpsc::Receiver<PendingTransfer>,
    pending: &Pending,
    gone: &AtomicBool,
) {
    for id in 0.. {
        let Some(PendingTransfer { transfer, answer }) = leaving.blocking_recv() else { return };
        if gone.load(Ordering::Acquire) {
            // Dropped without an answer: it stays.
            continue;
        }
        // Known before it is sent: the answer may be faster than we are.
        lock(pending).insert(id, (answer, clock::now()));
        let fds: Vec<_> = transfer.fds.iter().map(AsFd::as_fd).collect();
        if let Err(error) = link.send(&LinkMessage::Parcel { id }, &transfer.record, &fds) {
            // Not a whole frame has come: it stays.
            lock(pending).remove(&id);
            if !gone.swap(true, Ordering::AcqRel) {
                tracing::warn!(%error, "cannot send a session to the successor");
            }
        }
    }
}

/// Forwards replies until the link ends; sessions without a reply stay.
fn receive_replies(link: &HandoverLink, pending: &Pending, gone: &AtomicBool, ended: &SyncSender<()>) {
    while let Ok(Some(frame)) = link.receive() {
        let (id, answer) = match frame.message {
            LinkMessage::Taken { id } => (id, TransferReply::Taken),
            LinkMessage::Stays { id, why } => {
                tracing::warn!(why, "a session stays in this process: the successor refused it");
                (id, TransferReply::Stays)
            }
            LinkMessage::Hello { .. }
            | LinkMessage::Refused { .. }
            | LinkMessage::Sockets(_)
            | LinkMessage::AllSockets { .. }
            | LinkMessage::Ready
            | LinkMessage::Stopped
            | LinkMessage::Parcel { .. }
            | LinkMessage::FlowsSent
            | LinkMessage::Done => break,
        };
        let waits = lock(pending).remove(&id);
        if waits.is_some_and(|(sender, _)| sender.send(answer).is_err()) {
            tracing::debug!(id, "the successor answered for a session that ended");
        }
    }
    gone.store(true, Ordering::Release);
    lock(pending).clear();
    ended.try_send(()).unwrap_or_default();
}

/// The time in which this process accepts nothing, serves no page and leaves the admin socket's file where it is: it goes
/// on with all of that, unless everything has gone.
struct PausedService<'a>(Option<(&'a Handover, &'a Runtime)>);

impl<'a> PausedService<'a> {
    fn new(handover: &'a Handover, runtime: &'a Runtime) -> Self {
        handover.serving.send_replace(false);
        handover.commands.pause();
        // Also where this process ends meanwhile: the successor is asked there then.
        handover.file.iter().for_each(|file| file.keep());
        Self(Some((handover, runtime)))
    }

    fn commit(mut self) {
        self.0 = None;
    }
}

impl Drop for PausedService<'_> {
    fn drop(&mut self) {
        if let Some((handover, runtime)) = self.0 {
            handover.commands.resume();
            runtime.block_on(handover.transfer.set_receiving(true));
            handover.file.iter().for_each(|file| file.own());
            handover.serving.send_replace(true);
        }
    }
}
