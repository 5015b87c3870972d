//! The successor's side: requests the sockets, reports readiness, and takes over the sessions.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, park_timeout};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use tokio::runtime::Runtime;

use super::ServerProcess;
use super::link::{HandoverLink, LinkFrame};
use super::message::{LinkMessage, OfferedSocket, VERSION};
use super::records::{PendingTransfer, Transfer, TransferKind};
use super::transfers::TransferControl;
use crate::admission::quota::{HeldSlots, ReservedSlots};
use crate::clock;
use crate::frozen::TransferReply;
use crate::state::LiveState;

/// How long a successor waits for its backends to be known; a backend that is not by then is unknown to it at first.
const PROBES: Duration = Duration::from_secs(30);

/// How often it looks whether they are.
const LOOK: Duration = Duration::from_millis(5);

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
                // Descriptors are missing: the kernel drops those beyond this process's descriptor limit.
                LinkMessage::Sockets(_) => return Err(io::Error::from(Errno::MFILE).into()),
                LinkMessage::AllSockets { pid, .. } => {
                    let pid =
                        Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                    let old = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?;
                    return Ok(Self { link, sockets, old });
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

    /// The sockets that it was shown, once. What is not used of them is closed.
    #[must_use]
    pub fn take_sockets(&mut self) -> Vec<(OfferedSocket, OwnedFd)> {
        std::mem::take(&mut self.sockets)
    }

    /// Takes over: returns once the previous process accepts no more, and this one does. What lives there comes meanwhile.
    ///
    /// # Errors
    /// The previous process does not stop, and goes on as if nothing had happened.
    pub fn complete(
        self,
        live: &Arc<LiveState>,
        transfers: &Arc<TransferControl>,
        process: Arc<dyn ServerProcess>,
    ) -> Result<(), TakeoverError> {
        let start = clock::now();
        // Sessions arrive as soon as this process is ready; its backends must be probed and resolved by then.
        while live.is_starting() && clock::now().since(start) < PROBES {
            park_timeout(LOOK);
        }
        let arrivals = self.ready(live)?;
        let (live, transfers) = (Arc::clone(live), Arc::clone(transfers));
        live.takeovers.set_receiving(true);
        // First: where the takeover fails, nothing may be accepted after that.
        process.serve(true);
        // Not joined at shutdown: this thread ends with the old process.
        thread::Builder::new().name("takeover".to_owned()).spawn(move || {
            let all = arrivals.run(&live, &transfers);
            live.takeovers.set_receiving(false);
            match all {
                // Only after success: an old process that continues needs its socket file, however this process ends.
                Ok(()) => process.own_socket_file(true),
                Err(why) => {
                    // The old process accepts again, and this one serves its sessions to their end.
                    tracing::error!(why, "the previous process continues; this one drains");
                    process.serve(false);
                    process.drain();
                }
            }
        })?;
        Ok(())
    }

    /// Says that this process could serve now, and waits until the old one has stopped. A process that has died has
    /// stopped too; its sockets live on here. Those that are not configured are closed with it. From now on there is
    /// a slot for each session and flow that it has.
    ///
    /// # Errors
    /// The old process does not stop, and goes on.
    fn ready(self, live: &LiveState) -> Result<IncomingTransfers, TakeoverError> {
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
    // Reads byte by byte: the bytes after the response belong to the link.
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
struct IncomingTransfers {
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
    fn run(self, live: &LiveState, control: &TransferControl) -> Result<(), String> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
        // No read timeout: a session that cannot move yet may take long, and the death of the old process closes the link.
        self.link.set_read_timeout(None).unwrap_or_default();
        let mut moved = 0_u64;
        let end = self.take_all(&runtime, control, &mut moved);
        // No further flows arrive from here on.
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
            // Taken before it is confirmed: a flow tolerates a lost or repeated datagram.
            Ok(TransferKind::Flow) => {
                let (answer, answered) = tokio::sync::oneshot::channel();
                control.take_over(PendingTransfer { transfer, answer }).await;
                match answered.await {
                    Ok(TransferReply::Taken) => return self.confirm(id).map(|()| true),
                    Ok(TransferReply::Stays) | Err(_) => "this process cannot carry the flow".to_owned(),
                }
            }
            Ok(TransferKind::Session) => match transfer.session() {
                Ok(mut session) => {
                    session.may_use(&self.reserved);
                    // Sent before the first byte is forwarded: with this reply the old process closes its copy, without it
                    // the old process continues the session. If sending fails, the session is the old process's, unless
                    // that process is dead.
                    self.confirm(id)?;
                    control.carry(session).await;
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
