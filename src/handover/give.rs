//! The old process's side: offers its sockets, stops accepting, and sends its sessions.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::ServerProcess;
use super::link::{HandoverLink, MOST_FDS, MOST_TAIL};
use super::message::{LinkMessage, VERSION};
use super::records::PendingTransfer;
use super::transfers::{Departures, NextDeparture, TransferControl};
use crate::account::lock;
use crate::admission::quota::HeldSlots;
use crate::clock::{self, Moment};
use crate::frozen::TransferReply;
use crate::state::LiveState;
use crate::state::worker_loads::WorkerLoads;
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

/// Hands everything over to a successor that asks for it.
#[derive(Debug)]
pub struct Handover {
    live: Arc<LiveState>,
    loads: Arc<WorkerLoads>,
    transfers: Arc<TransferControl>,
    process: Arc<dyn ServerProcess>,
    /// One takeover at a time.
    busy: AtomicBool,
    /// Why a successor in the same PID namespace would end with this process, if it would.
    obstacle: Option<String>,
}

/// Parcels that wait for their answer, each with the time since when.
type Pending = Mutex<HashMap<u32, (oneshot::Sender<TransferReply>, Moment)>>;

impl Handover {
    /// Of this process.
    #[must_use]
    pub fn new(
        live: &Arc<LiveState>,
        loads: &Arc<WorkerLoads>,
        transfers: &Arc<TransferControl>,
        process: Arc<dyn ServerProcess>,
        obstacle: Option<String>,
    ) -> Self {
        let (live, loads, transfers) = (Arc::clone(live), Arc::clone(loads), Arc::clone(transfers));
        Self { live, loads, transfers, process, busy: AtomicBool::new(false), obstacle }
    }

    /// Whether a successor is being served.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Why a successor in the same PID namespace would end with this process, if it would.
    #[must_use]
    pub fn obstacle(&self) -> Option<&str> {
        self.obstacle.as_deref()
    }

    /// Serves a successor that has connected; returns when all is its, or when that has failed and this process goes on.
    pub fn run(&self, stream: UnixStream) {
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
                // Only after success: systemd's main PID cannot be taken back from a successor that fails.
                self.process.end(successor);
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
        self.send_sockets(&link)?;
        link.set_read_timeout(Some(READY))?;
        match link.receive()?.map(|frame| frame.message) {
            Some(LinkMessage::Ready) => {}
            Some(_) => return Err(HandoverError::Confused),
            None => return Err(HandoverError::Gone),
        }
        // The successor has read the configuration that was in force before. From here on reloads are refused; one in
        // progress has ended or is refused.
        let no_reloads = ReloadsRefused::new(&*self.process);
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

    /// Sends every socket.
    fn send_sockets(&self, link: &HandoverLink) -> Result<(), HandoverError> {
        let sockets = self.process.sockets()?;
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
            let leaving = runtime.block_on(self.transfers.start());
            scope.spawn(|| send_transfers(link, runtime, leaving, &pending, &gone));
            scope.spawn(|| receive_replies(link, &pending, &gone, &ended));
            let result = self.watch(&pending, &gone, &end);
            let result = result.and_then(|()| Ok(link.send(&LinkMessage::Done, &[], &[])?));
            // Replies received so far are processed; sessions without a reply stay. The threads end when their senders are
            // dropped.
            if result.is_ok() {
                link.stop_receiving();
            } else {
                link.shut_down();
            }
            runtime.block_on(self.transfers.stop(result.is_err()));
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

/// Sends what leaves.
fn send_transfers(
    link: &HandoverLink,
    runtime: &Runtime,
    mut leaving: Departures,
    pending: &Pending,
    gone: &AtomicBool,
) {
    let mut id = 0;
    while let Some(next) = runtime.block_on(leaving.next()) {
        let PendingTransfer { transfer, answer } = match next {
            NextDeparture::Transfer(transfer) => transfer,
            NextDeparture::FlowsGone => {
                // If the link is broken, the other threads detect it.
                link.send(&LinkMessage::FlowsSent, &[], &[]).unwrap_or_default();
                continue;
            }
        };
        if gone.load(Ordering::Acquire) {
            // Dropped without an answer, so the session or flow stays in this process.
            continue;
        }
        // Inserted before it is sent, because the reply may arrive at once.
        lock(pending).insert(id, (answer, clock::now()));
        let fds: Vec<_> = transfer.fds.iter().map(AsFd::as_fd).collect();
        if let Err(error) = link.send(&LinkMessage::Parcel { id }, &transfer.record, &fds) {
            // The successor has no complete frame, so the session or flow stays in this process.
            lock(pending).remove(&id);
            if !gone.swap(true, Ordering::AcqRel) {
                tracing::warn!(%error, "cannot send a session to the successor");
            }
        }
        id += 1;
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

/// The time in which reloads are refused.
struct ReloadsRefused<'a>(&'a dyn ServerProcess);

impl<'a> ReloadsRefused<'a> {
    /// Returns once a reload that is under way has ended.
    fn new(process: &'a dyn ServerProcess) -> Self {
        process.allow_reloads(false);
        Self(process)
    }
}

impl Drop for ReloadsRefused<'_> {
    fn drop(&mut self) {
        self.0.allow_reloads(true);
    }
}

/// The time in which this process accepts nothing, serves no page and leaves the admin socket's file where it is: it goes
/// on with all of that, unless everything has gone.
struct PausedService<'a>(Option<(&'a Handover, &'a Runtime)>);

impl<'a> PausedService<'a> {
    fn new(handover: &'a Handover, runtime: &'a Runtime) -> Self {
        handover.process.serve(false);
        // Keeps the socket file even if this process ends meanwhile: then the successor answers there.
        handover.process.own_socket_file(false);
        Self(Some((handover, runtime)))
    }

    fn commit(mut self) {
        self.0 = None;
    }
}

impl Drop for PausedService<'_> {
    fn drop(&mut self) {
        if let Some((handover, runtime)) = self.0 {
            runtime.block_on(handover.transfers.set_receiving(true));
            handover.process.own_socket_file(true);
            handover.process.serve(true);
        }
    }
}
