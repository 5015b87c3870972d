//! The successor's side: requests the sockets, reports readiness, and takes over the sessions.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use tokio::runtime::Runtime;

use crate::admission::quota::{HeldSlots, ReservedSlots};
use crate::handover::link::{HandoverLink, LinkFrame};
use crate::handover::message::{LinkMessage, OfferedSocket, SocketRole, VERSION};
use crate::handover::{PendingTransfer, Transfer, TransferKind, TransferReply};
use crate::server::inherit::InheritedSockets;
use crate::server::transfer::TransferControl;
use crate::state::LiveState;

/// How long the old process may take to show its sockets, and to stop.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a process takes at most to be dead that is going.
const DEATH: Duration = Duration::from_secs(1);

/// The longest answer to a request that is not taken up.
const MOST_ANSWER: usize = 16 * 1024;

/// More sessions than any process has.
const MOST_HELD: usize = u32::MAX as usize;

/// Why a takeover failed. The previous process continues.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// No process answers at the path.
    #[error(
        "--takeover: cannot reach a running vestibule at {path}: {error}; start without --takeover if \
         none runs"
    )]
    Unavailable {
        /// The socket.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The old process does not go.
    #[error("--takeover: the previous process refuses: {0}")]
    Refused(String),
    /// It went, or said what it should not.
    #[error("--takeover: the previous process closed the link: {0}")]
    Broken(#[from] io::Error),
}

/// The offered sockets, and the link to the previous process.
#[derive(Debug)]
pub struct TakeoverOffer {
    link: HandoverLink,
    /// What is left of the sockets.
    sockets: Vec<(OfferedSocket, OwnedFd)>,
    /// Readable once the old process is dead.
    old: OwnedFd,
    /// The version of the old program.
    pub program: String,
}

impl TakeoverOffer {
    /// Asks the process behind its control socket for all that it has. It goes on until this one is ready.
    ///
    /// # Errors
    /// No process answers, it refuses, or it closes the link.
    pub fn ask(path: &Path) -> Result<Self, TakeoverError> {
        let unavailable = |error| TakeoverError::Unavailable { path: path.display().to_string(), error };
        let stream = UnixStream::connect(path).map_err(unavailable)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        upgrade(&stream)?;
        let link = HandoverLink::new(stream, PATIENCE)?;
        let program = env!("CARGO_PKG_VERSION").to_owned();
        link.send(&LinkMessage::Hello { version: VERSION, program }, &[], &[])?;
        let mut sockets = Vec::new();
        loop {
            let frame = link.receive()?.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            match frame.message {
                LinkMessage::Sockets(offered) if offered.len() == frame.fds.len() => {
                    sockets.extend(offered.into_iter().zip(frame.fds));
                }
                // Some were cut off: this process may not have so many descriptors.
                LinkMessage::Sockets(_) => return Err(io::Error::from(Errno::MFILE).into()),
                LinkMessage::AllSockets { program, pid } => {
                    let pid =
                        Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                    let old = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?;
                    return Ok(Self { link, sockets, old, program });
                }
                LinkMessage::Refused { why } => return Err(TakeoverError::Refused(why)),
                LinkMessage::Hello { .. }
                | LinkMessage::Ready
                | LinkMessage::Stopped
                | LinkMessage::Parcel { .. }
                | LinkMessage::FlowsSent
                | LinkMessage::Taken { .. }
                | LinkMessage::Stays { .. }
                | LinkMessage::Done => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            }
        }
    }

    /// What it was shown, for the addresses of its own configuration. What none of them wants is closed with this process's
    /// start.
    pub(in crate::server) fn inherited(&mut self) -> InheritedSockets {
        let mut all = InheritedSockets { may_be_more: true, ..InheritedSockets::default() };
        for (OfferedSocket { role, bound }, socket) in std::mem::take(&mut self.sockets) {
            match role {
                SocketRole::Listener { name, udp, configured, .. } => {
                    if udp {
                        all.udp.push(socket.into());
                    } else {
                        all.tcp.push(socket.into());
                    }
                    all.ports.extend(bound.map(|bound| (name, configured, bound)));
                }
                SocketRole::Admin { configured } => {
                    all.tcp.push(socket.into());
                    all.ports.extend(bound.map(|bound| ("admin".to_owned(), configured, bound)));
                }
                SocketRole::Health { configured } => {
                    all.tcp.push(socket.into());
                    all.ports.extend(bound.map(|bound| ("health".to_owned(), configured, bound)));
                }
                SocketRole::Control { has_file, .. } => {
                    all.has_file = has_file;
                    all.unix.push(socket.into());
                }
            }
        }
        all
    }

    /// Says that this process could serve now, and waits until the old one has stopped. A process that has died has
    /// stopped too; its sockets live on here. Those that are not configured are closed with it. From now on there is
    /// a slot for each session and flow that it has.
    ///
    /// # Errors
    /// The old process does not stop, and goes on.
    pub(in crate::server) fn ready(self, live: &LiveState) -> Result<IncomingTransfers, TakeoverError> {
        let Self { link, old, .. } = self;
        let said = link.send(&LinkMessage::Ready, &[], &[]).and_then(|()| link.receive());
        let mut holding = HeldSlots::default();
        match said {
            Ok(Some(LinkFrame { message: LinkMessage::Stopped, tail, .. })) => {
                holding = read_held_slots(&tail);
            }
            Ok(Some(_)) => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            Ok(None) | Err(_) if is_dead(&old) => {
                tracing::warn!("the previous process died; this one serves its listening sockets");
            }
            Ok(None) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Err(error) => return Err(error.into()),
        }
        Ok(IncomingTransfers { link, old, reserved: reserve(live, &holding) })
    }
}

/// What the old process holds of its limits. An older one says nothing of it.
fn read_held_slots(tail: &[u8]) -> HeldSlots {
    if tail.is_empty() {
        return HeldSlots::default();
    }
    serde_json::from_slice(tail).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the slots in use of the previous process; none are reserved");
        HeldSlots::default()
    })
}

/// Keeps places for what is to come. A tenant that is not here has no limits.
fn reserve(live: &LiveState, holding: &HeldSlots) -> Arc<ReservedSlots> {
    let known = |(name, sessions, flows): &(String, usize, usize)| {
        Some((live.quotas.known(&live.labels.intern(name))?, *sessions, *flows))
    };
    // A larger value would overflow; no process has as many.
    let is_sane = |(_, sessions, flows): &&(String, usize, usize)| (*sessions).max(*flows) <= MOST_HELD;
    let tenants = holding.tenants.iter().filter(is_sane).filter_map(known).collect();
    ReservedSlots::new(&live.sessions, holding.all.min(MOST_HELD), tenants)
}

/// Asks for the link in HTTP's words (RFC 9110, section 7.8), as the control socket speaks nothing else.
fn upgrade(mut stream: &UnixStream) -> Result<(), TakeoverError> {
    let request = "POST /takeover HTTP/1.1\r\nHost: vestibule\r\nConnection: upgrade\r\nUpgrade: vestibule-takeover\r\n\r\n";
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    // One by one: what follows the answer is the link's.
    while !answer.ends_with(b"\r\n\r\n") && answer.len() < MOST_ANSWER {
        stream.read_exact(&mut byte)?;
        answer.extend_from_slice(&byte);
    }
    if answer.starts_with(b"HTTP/1.1 101") {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&answer);
    Err(TakeoverError::Refused(answer.lines().next().unwrap_or_default().to_owned()))
}

/// Receives sessions after the previous process has stopped.
#[derive(Debug)]
pub(in crate::server) struct IncomingTransfers {
    link: HandoverLink,
    old: OwnedFd,
    /// The places of those that are to come.
    reserved: Arc<ReservedSlots>,
}

/// Why the transfer ended.
enum TransferEnd {
    /// Everything has come.
    Done,
    /// The old process is dead.
    Dead,
    /// It lives, and has what was not answered for.
    Lives(String),
}

impl IncomingTransfers {
    /// Takes in what comes until the old process has nothing left, or is gone; `Err` where that lives and goes on. Then this one
    /// must not: two would accept at the same sockets.
    ///
    /// # Errors
    /// What is wrong with the link.
    pub(in crate::server) fn run(self, live: &LiveState, control: &TransferControl) -> Result<(), String> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
        // What cannot move yet may take its whole time; an old process that dies is noticed all the same.
        self.link.set_read_timeout(None).unwrap_or_default();
        let mut moved = 0_u64;
        let end = self.take_all(&runtime, control, &mut moved);
        // Flows that have not come are not to come.
        runtime.block_on(control.set_receiving(true));
        live.takeovers.count(matches!(end, TransferEnd::Done));
        match end {
            TransferEnd::Done => tracing::info!(moved, "took over"),
            TransferEnd::Dead => {
                tracing::error!(moved, "the previous process died before all sessions were taken over");
            }
            TransferEnd::Lives(why) => return Err(why),
        }
        Ok(())
    }

    fn take_all(&self, runtime: &Runtime, control: &TransferControl, moved: &mut u64) -> TransferEnd {
        loop {
            let fault = match self.link.receive() {
                Ok(Some(LinkFrame { message: LinkMessage::Parcel { id }, tail, fds })) => {
                    let transfer = Transfer { record: tail, fds };
                    match runtime.block_on(self.take_in(id, transfer, control)) {
                        Ok(taken) => {
                            *moved += u64::from(taken);
                            continue;
                        }
                        Err(error) => error.to_string(),
                    }
                }
                Ok(Some(LinkFrame { message: LinkMessage::FlowsSent, .. })) => {
                    runtime.block_on(control.set_receiving(true));
                    continue;
                }
                Ok(Some(LinkFrame { message: LinkMessage::Done, .. })) => return TransferEnd::Done,
                Ok(Some(_)) => "unexpected message".to_owned(),
                Ok(None) => "link closed".to_owned(),
                Err(error) => error.to_string(),
            };
            return if is_dead(&self.old) { TransferEnd::Dead } else { TransferEnd::Lives(fault) };
        }
    }

    /// Takes one in, if it can be carried; whether it was.
    ///
    /// # Errors
    /// Where the old process could not be told, and lives: it has this one still, and all that follow.
    async fn take_in(&self, id: u32, transfer: Transfer, control: &TransferControl) -> io::Result<bool> {
        let refused = match transfer.kind() {
            // A datagram more or less is nothing new to a flow.
            Ok(TransferKind::Flow) => {
                let (answer, answered) = tokio::sync::oneshot::channel();
                control.take_over(PendingTransfer { transfer, answer }).await;
                match answered.await {
                    Ok(TransferReply::Taken) => return self.confirm(id).map(|()| true),
                    Ok(TransferReply::Stays) | Err(_) => "this process cannot carry the flow".to_owned(),
                }
            }
            Ok(TransferKind::Session) => match crate::session::transfer::decode(transfer) {
                Ok(mut moved) => {
                    moved.may_use(&self.reserved);
                    // Sent before its first byte moves: a process with this reply closes its own side, one without
                    // continues with it. If it could not be said, the other one has it, unless it is dead.
                    self.confirm(id)?;
                    control.carry(moved).await;
                    return Ok(true);
                }
                Err(refused) => refused.to_string(),
            },
            Err(refused) => refused.to_string(),
        };
        tracing::warn!(why = refused, "a session stays with the previous process");
        self.link.send(&LinkMessage::Stays { id, why: refused }, &[], &[])?;
        Ok(false)
    }

    /// Confirms that this process has it.
    fn confirm(&self, id: u32) -> io::Result<()> {
        match self.link.send(&LinkMessage::Taken { id }, &[], &[]) {
            Err(error) if !is_dead(&self.old) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether a process is dead, or is within a short time.
fn is_dead(process: &OwnedFd) -> bool {
    let wait = Timespec::try_from(DEATH).ok();
    let process = process.as_fd();
    poll(&mut [PollFd::from_borrowed_fd(process, PollFlags::IN)], wait.as_ref()).is_ok_and(|ready| ready > 0)
}
