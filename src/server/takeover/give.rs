//! The old process's side: it shows its sockets, stops, and sends away what lives.

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
use crate::server::crew::WorkerLoads;
use crate::server::drain::DrainStage;
use crate::server::moving::TransferControl;
use crate::server::notify;
use crate::server::reload::Reloader;
use crate::server::socket::SocketFile;
use crate::server::team::WorkerCommands;
use crate::state::LiveState;
use crate::takeover::link::{HandoverLink, MOST_FDS, MOST_TAIL};
use crate::takeover::message::{LinkMessage, OfferedSocket, SocketRole, VERSION};
use crate::takeover::{PendingTransfer, TransferReply};
use crate::tenant::Tenant;

/// How long the successor may take to be ready: it reads its configuration, looks names up and probes meanwhile.
const READY: Duration = Duration::from_secs(60);

/// How long it may take to answer for a parcel. Beyond it the sessions of this process have stood still for long enough.
const ANSWER: Duration = Duration::from_secs(5);

/// How often is looked whether anything is left.
const LOOK: Duration = Duration::from_millis(5);

/// How often what is left is told.
const TELL: Duration = Duration::from_secs(2);

/// Why a takeover came to nothing.
#[derive(Debug, thiserror::Error)]
enum HandoverError {
    #[error("{0}")]
    Refused(String),
    #[error("the successor has gone")]
    Gone,
    #[error("the successor does not answer")]
    Late,
    #[error("the configuration was changed, or the end ordered, after the successor had asked")]
    Overtaken,
    #[error("the successor said something else than was expected")]
    Confused,
    #[error("the link to the successor broke: {0}")]
    Link(#[from] io::Error),
}

/// All that a process gives away.
pub(in crate::server) struct Handover {
    pub(in crate::server) live: Arc<LiveState>,
    pub(in crate::server) crew: Arc<WorkerLoads>,
    pub(in crate::server) team: WorkerCommands,
    pub(in crate::server) movers: Arc<TransferControl>,
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
    pub(in crate::server) tie: Option<String>,
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
        let heir = getsockopt(&stream, PeerCredentials)
            .ok()
            .and_then(|peer| u32::try_from(peer.pid()).ok())
            .filter(|pid| *pid > 0);
        match self.give(stream, is_alone, heir.is_some()) {
            Ok(()) => {
                self.live.takeovers.count(true);
                tracing::info!("everything is the successor's");
                // Not before: of a successor that fails it could not be taken back. Systemd believes it of the process that
                // it knows.
                if let Some(heir) = heir {
                    notify::main_pid(heir);
                }
                self.stage.send_replace(DrainStage::Over);
            }
            Err(error) => {
                self.live.takeovers.count(false);
                tracing::error!(%error, "the takeover failed; this process goes on");
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
                tracing::info!(program, "a successor asks for the sockets");
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
        if let Some(tie) = self.tie.as_ref().filter(|_| shares_namespace) {
            return refuse(&link, tie.clone());
        }
        if !is_alone {
            return refuse(&link, "another takeover is under way".to_owned());
        }
        if self.live.takeovers.is_receiving() {
            return refuse(&link, "the takeover before this one is not over".to_owned());
        }
        if self.live.is_draining() {
            return refuse(&link, "the old process is draining already".to_owned());
        }
        let reloads = self.live.reloads.done();
        self.show(&link)?;
        link.set_patience(Some(READY))?;
        match link.receive()?.map(|frame| frame.message) {
            Some(LinkMessage::Ready) => {}
            Some(_) => return Err(HandoverError::Confused),
            None => return Err(HandoverError::Gone),
        }
        // It has read what was in force before. A reload that is under way is over then, or refused.
        let no_reloads = self.reloader.no_reloads();
        if self.live.is_draining() || self.live.reloads.done() != reloads {
            return Err(HandoverError::Overtaken);
        }
        let stopped = PausedService::new(self, &runtime);
        link.send(&LinkMessage::Stopped, &self.holding()?, &[])?;
        self.send_away(&link, &runtime)?;
        stopped.stays_so();
        // This process ends.
        std::mem::forget(no_reloads);
        Ok(())
    }

    /// What is held of the limits, as it is told. Of more tenants than can be told those with the fewest are left out.
    fn holding(&self) -> io::Result<Vec<u8>> {
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

    /// Shows every listening socket.
    fn show(&self, link: &HandoverLink) -> Result<(), HandoverError> {
        let (snapshot, held) = (self.live.snapshot.load_full(), self.reloader.held());
        let configured = |bound: SocketAddr, listener: u32, udp: bool| {
            let is_it = |held: &&crate::server::listen::BoundListener| {
                let door = held.door;
                door.address == bound && door.listener == listener && door.is_udp() == udp
            };
            held.iter().find(is_it).map_or(bound, |held| held.configured)
        };
        let mut sockets = Vec::new();
        for (door, socket) in self.team.lend() {
            let Some(listener) = snapshot.listeners.get(door.listener as usize) else { continue };
            let role = SocketRole::Listener {
                name: listener.label.name().to_owned(),
                udp: door.is_udp(),
                configured: configured(door.address, door.listener, door.is_udp()),
            };
            sockets.push((OfferedSocket { role, bound: Some(door.address) }, socket));
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

    /// Sends away every session and flow, as each comes to where it can go.
    fn send_away(&self, link: &HandoverLink, runtime: &Runtime) -> Result<(), HandoverError> {
        let (pending, gone) = (Pending::default(), AtomicBool::new(false));
        link.set_patience(None)?;
        let (ended, end) = sync_channel(1);
        std::thread::scope(|scope| {
            let (leaving, mut flows_left) = runtime.block_on(self.movers.start());
            scope.spawn(|| post(link, leaving, &pending, &gone));
            scope.spawn(move || {
                while flows_left.blocking_recv().is_some() {}
                // Where it cannot be said, the others will notice.
                link.send(&LinkMessage::FlowsSent, &[], &[]).unwrap_or_default();
            });
            scope.spawn(|| hear(link, &pending, &gone, &ended));
            let result = self.watch(&pending, &gone, &end);
            let result = result.and_then(|()| Ok(link.send(&LinkMessage::Done, &[], &[])?));
            // What was answered until now counts, and who had no answer stays. The threads end with their senders.
            if result.is_ok() {
                link.stop_hearing();
            } else {
                link.break_off();
            }
            runtime.block_on(self.movers.stop(result.is_err()));
            result
        })
    }

    /// Looks until nothing is left, or the successor is gone.
    fn watch(&self, pending: &Pending, gone: &AtomicBool, end: &Receiver<()>) -> Result<(), HandoverError> {
        let start = clock::now();
        let deadline = self.live.config.load().drain.deadline;
        let mut told = start;
        loop {
            let ended = end.recv_timeout(LOOK);
            if gone.load(Ordering::Acquire) || !matches!(ended, Err(RecvTimeoutError::Timeout)) {
                return Err(HandoverError::Gone);
            }
            let (now, left) = (clock::now(), self.crew.total());
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
                    "sessions that cannot move yet are finished here"
                );
            }
            if now.since(start) > deadline {
                tracing::warn!(left, "the drain's deadline has passed: what cannot move is ended");
                return Ok(());
            }
        }
    }
}

fn refuse(link: &HandoverLink, why: String) -> Result<(), HandoverError> {
    link.send(&LinkMessage::Refused { why: why.clone() }, &[], &[])?;
    Err(HandoverError::Refused(why))
}

/// Sends parcels.
fn post(
    link: &HandoverLink,
    mut leaving: mpsc::Receiver<PendingTransfer>,
    pending: &Pending,
    gone: &AtomicBool,
) {
    for id in 0.. {
        let Some(PendingTransfer { parcel, answer }) = leaving.blocking_recv() else { return };
        if gone.load(Ordering::Acquire) {
            // Dropped without an answer: it stays.
            continue;
        }
        // Known before it is sent: the answer may be faster than we are.
        lock(pending).insert(id, (answer, clock::now()));
        let fds: Vec<_> = parcel.fds.iter().map(AsFd::as_fd).collect();
        if let Err(error) = link.send(&LinkMessage::Parcel { id }, &parcel.record, &fds) {
            // Not a whole frame has come: it stays.
            lock(pending).remove(&id);
            if !gone.swap(true, Ordering::AcqRel) {
                tracing::warn!(%error, "a session could not be sent to the successor");
            }
        }
    }
}

/// Passes answers on until the link ends; then all that had none stay.
fn hear(link: &HandoverLink, pending: &Pending, gone: &AtomicBool, ended: &SyncSender<()>) {
    while let Ok(Some(frame)) = link.receive() {
        let (id, answer) = match frame.message {
            LinkMessage::Taken { id } => (id, TransferReply::Taken),
            LinkMessage::Stays { id, why } => {
                tracing::warn!(why, "a session stays: the successor cannot carry it");
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
            tracing::debug!(id, "an answer came for a session that has ended");
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
    fn new(giver: &'a Handover, runtime: &'a Runtime) -> Self {
        giver.serving.send_replace(false);
        giver.team.pause();
        // Also where this process ends meanwhile: the successor is asked there then.
        giver.file.iter().for_each(|file| file.keep());
        Self(Some((giver, runtime)))
    }

    fn stays_so(mut self) {
        self.0 = None;
    }
}

impl Drop for PausedService<'_> {
    fn drop(&mut self) {
        if let Some((giver, runtime)) = self.0 {
            giver.team.resume();
            runtime.block_on(giver.movers.hear_datagrams(true));
            giver.file.iter().for_each(|file| file.own());
            giver.serving.send_replace(true);
        }
    }
}
