//! The old process's side: it shows its sockets, stops, and sends away what lives.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::super::crew::Crew;
use super::super::drain::Stage;
use super::super::team::Team;
use super::{ON_THEIR_WAY, Order};
use crate::account::lock;
use crate::clock::{self, Moment};
use crate::state::Live;
use crate::takeover::link::{Link, MOST_FDS};
use crate::takeover::message::{Message, Offered, VERSION};
use crate::takeover::{Answer, Leaving};

/// How long the successor may take to be ready: it reads its configuration and looks names up meanwhile.
const READY: Duration = Duration::from_secs(60);

/// How long it may take to answer for a parcel. Beyond it the sessions of this process have stood still for long enough.
const ANSWER: Duration = Duration::from_secs(5);

/// How often is looked whether anything is left.
const LOOK: Duration = Duration::from_millis(5);

/// When what is left is told for the first time, and then how often.
const TELL: Duration = Duration::from_secs(2);

/// Why a takeover came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error("{0}")]
    Refused(String),
    #[error("the successor has gone")]
    Gone,
    #[error("the successor said something else than was expected")]
    Confused,
    #[error("the link to the successor broke: {0}")]
    Link(#[from] io::Error),
}

/// All that a process gives away.
pub(in crate::server) struct Giver {
    pub(in crate::server) live: Arc<Live>,
    pub(in crate::server) crew: Arc<Crew>,
    pub(in crate::server) team: Team,
    /// Sockets of the pages; their roles say whose.
    pub(in crate::server) pages: Vec<(Offered, OwnedFd)>,
    /// Whether the pages are served here.
    pub(in crate::server) serving: watch::Sender<bool>,
    pub(in crate::server) stage: watch::Sender<Stage>,
    /// One takeover at a time.
    pub(in crate::server) busy: AtomicBool,
}

/// Parcels that wait for their answer, with the time since when.
type Pending = Mutex<HashMap<u32, (oneshot::Sender<Answer>, Moment)>>;

impl Giver {
    /// Serves a successor that has connected; returns when all is its, or when it has failed and this process goes on.
    pub(in crate::server) fn run(&self, stream: UnixStream) {
        if self.busy.swap(true, Ordering::AcqRel) {
            tracing::warn!("a takeover is refused: another one is under way");
            return;
        }
        match self.give(stream) {
            Ok(()) => {
                tracing::info!("everything is the successor's");
                self.stage.send_replace(Stage::Over);
            }
            Err(error) => {
                self.live.takeovers.fail();
                tracing::error!(%error, "the takeover failed; this process goes on");
                self.busy.store(false, Ordering::Release);
            }
        }
    }

    fn give(&self, stream: UnixStream) -> Result<(), Failed> {
        let link = Link::new(stream, ANSWER)?;
        let program = match link.receive()? {
            Some(frame) => match frame.message {
                Message::Hello { version: VERSION, program } => program,
                Message::Hello { version, program } => {
                    let why = format!(
                        "version {program} speaks version {version} of the takeover, and {} speaks {VERSION}: restart \
                         instead",
                        env!("CARGO_PKG_VERSION")
                    );
                    return self.refuse(&link, why);
                }
                _ => return Err(Failed::Confused),
            },
            None => return Err(Failed::Gone),
        };
        if self.live.is_draining() {
            return self.refuse(&link, "the old process is draining already".to_owned());
        }
        tracing::info!(program, "a successor asks for the sockets");
        self.show(&link)?;
        link.set_patience(Some(READY))?;
        match link.receive()?.map(|frame| frame.message) {
            Some(Message::Ready) => {}
            Some(_) => return Err(Failed::Confused),
            None => return Err(Failed::Gone),
        }
        let stopped = Stopped::new(self);
        link.send(&Message::Stopped, &[], &[])?;
        self.send_away(&link)?;
        stopped.stays_so();
        Ok(())
    }

    fn refuse(&self, link: &Link, why: String) -> Result<(), Failed> {
        link.send(&Message::Refused { why: why.clone() }, &[], &[])?;
        Err(Failed::Refused(why))
    }

    /// Shows every listening socket.
    fn show(&self, link: &Link) -> Result<(), Failed> {
        let mut sockets = self.team.lend();
        for (offered, socket) in &self.pages {
            sockets.push((offered.clone(), socket.try_clone()?));
        }
        for some in sockets.chunks(MOST_FDS) {
            let (offered, fds): (Vec<_>, Vec<_>) =
                some.iter().map(|(offered, socket)| (offered.clone(), socket.as_fd())).unzip();
            link.send(&Message::Sockets(offered), &[], &fds)?;
        }
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let program = env!("CARGO_PKG_VERSION").to_owned();
        link.send(&Message::AllSockets { program, pid }, &[], &[])?;
        Ok(())
    }

    /// Sends away every session and flow, as each comes to where it can go.
    fn send_away(&self, link: &Link) -> Result<(), Failed> {
        let (pending, next, gone) = (Pending::default(), AtomicU32::new(0), AtomicBool::new(false));
        link.set_patience(None)?;
        let (ended, end) = sync_channel(1);
        std::thread::scope(|scope| {
            let mut channels = Vec::new();
            for worker in 0..self.team.len() {
                let (sender, receiver) = mpsc::channel(ON_THEIR_WAY);
                channels.push(sender);
                let post = Post { link, pending: &pending, next: &next, gone: &gone, worker };
                scope.spawn(move || post.run(receiver));
            }
            scope.spawn(|| hear(link, &pending, &gone, &ended));
            self.team.depart(channels);
            let result = self.watch(&pending, &gone, &end);
            let result = result.and_then(|()| Ok(link.send(&Message::Done, &[], &[])?));
            // What was answered until now counts, and who had no answer stays. The threads end with their senders.
            link.stop_hearing();
            self.team.stay();
            result
        })
    }

    /// Looks until nothing is left, or the successor is.
    fn watch(&self, pending: &Pending, gone: &AtomicBool, end: &Receiver<()>) -> Result<(), Failed> {
        let start = clock::now();
        let deadline = self.live.drain_deadline();
        let mut told = start;
        loop {
            let ended = end.recv_timeout(LOOK);
            if gone.load(Ordering::Acquire) || !matches!(ended, Err(RecvTimeoutError::Timeout)) {
                return Err(Failed::Gone);
            }
            let (now, left) = (clock::now(), self.crew.total());
            if left == 0 {
                return Ok(());
            }
            let is_late = |since: &Moment| now.since(*since) > ANSWER;
            if lock(pending).values().any(|(_, since)| is_late(since)) {
                return Err(Failed::Gone);
            }
            if now.since(told) >= TELL {
                told = now;
                let pending = self.live.pending();
                tracing::info!(
                    left,
                    reading_their_header = pending,
                    connecting = left.saturating_sub(pending),
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

/// Sends one worker's parcels.
struct Post<'a> {
    link: &'a Link,
    pending: &'a Pending,
    next: &'a AtomicU32,
    gone: &'a AtomicBool,
    worker: usize,
}

impl Post<'_> {
    fn run(&self, mut receiver: mpsc::Receiver<Leaving>) {
        let worker = u16::try_from(self.worker).unwrap_or(u16::MAX);
        while let Some(Leaving { parcel, answer }) = receiver.blocking_recv() {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            // Known before it is sent: the answer may be faster than we are.
            lock(self.pending).insert(id, (answer, clock::now()));
            let fds: Vec<_> = parcel.fds.iter().map(AsFd::as_fd).collect();
            let sent = self.link.send(&Message::Parcel { id, worker }, &parcel.record, &fds);
            if let Err(error) = sent {
                // Not a whole frame has come: it stays.
                lock(self.pending).remove(&id);
                if !self.gone.swap(true, Ordering::AcqRel) {
                    tracing::warn!(%error, "a session could not be sent to the successor");
                }
            }
        }
    }
}

/// Passes answers on until the link ends; then all that had none stay.
fn hear(link: &Link, pending: &Pending, gone: &AtomicBool, ended: &SyncSender<()>) {
    while let Ok(Some(frame)) = link.receive() {
        let (id, answer) = match frame.message {
            Message::Taken { id } => (id, Answer::Taken),
            Message::Stays { id, why } => {
                tracing::warn!(why, "a session stays: the successor cannot carry it");
                (id, Answer::Stays)
            }
            _ => break,
        };
        if let Some((sender, _)) = lock(pending).remove(&id) {
            // Who does not wait any more has ended meanwhile.
            sender.send(answer).unwrap_or_default();
        }
    }
    gone.store(true, Ordering::Release);
    lock(pending).clear();
    ended.try_send(()).unwrap_or_default();
}

/// The time in which this process accepts nothing and serves no page: it goes on with both, unless everything has gone.
struct Stopped<'a>(Option<&'a Giver>);

impl<'a> Stopped<'a> {
    fn new(giver: &'a Giver) -> Self {
        giver.serving.send_replace(false);
        giver.team.pause();
        Self(Some(giver))
    }

    fn stays_so(mut self) {
        self.0 = None;
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if let Some(giver) = self.0 {
            giver.team.resume();
            giver.serving.send_replace(true);
        }
    }
}
