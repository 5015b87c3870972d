//! One session of the load: its loop, its noise, and what it takes down.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::client_addresses::ClientAddresses;
use super::{Begin, LoadFailure, LoadMode, LoadNotes, LoadPlan, LoadWindow};
use crate::clock::{self, Moment};
use crate::lab::backend::load::{HEAD, LoadRequest, SessionTag};
use crate::lab::nlb;

/// An operation that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(30);

/// An endpoint ID that no tenant lists.
const STRANGER: &str = "vpce-0bad0bad0bad0bad0";

pub(super) struct LoadSession {
    plan: Rc<LoadPlan>,
    mode: LoadMode,
    callers: ClientAddresses,
    window: LoadWindow,
    /// In an open loop: when each operation is due.
    orders: Option<mpsc::Receiver<Moment>>,
    notes: LoadNotes,
    rolls: fastrand::Rng,
    /// The message.
    buffer: Vec<u8>,
    answer: Vec<u8>,
}

/// A connection that has sent its header with its first message.
struct OpenLoadSession {
    stream: TcpStream,
    /// The pool that has to answer.
    pool: String,
    tagged: bool,
}

impl LoadSession {
    pub(super) fn new(
        plan: &Rc<LoadPlan>,
        mode: LoadMode,
        callers: ClientAddresses,
        (window, orders, notes): Begin,
    ) -> Self {
        Self {
            plan: Rc::clone(plan),
            mode,
            callers,
            window,
            orders,
            notes,
            rolls: fastrand::Rng::new(),
            buffer: vec![0; plan.size.max(HEAD)],
            answer: vec![0; plan.size.max(HEAD)],
        }
    }

    pub(super) async fn run(mut self) {
        let mut open = None;
        loop {
            let Some(due) = self.due().await else { return };
            if self.rolls.u8(..100) < self.plan.noise {
                self.notes.noise();
                // The result of noise is ignored; only the regular sessions must be served.
                self.noise().await.unwrap_or_default();
            }
            let operation = timeout(LIMIT, self.operate(&mut open)).await;
            match operation.unwrap_or(Err(LoadFailure::Broken)) {
                Ok(bytes) => self.notes.succeeded(due, bytes, self.window),
                Err(failure) => {
                    open = None;
                    self.notes.failed(failure);
                    yield_now().await;
                }
            }
        }
    }

    /// Waits for the next operation; in a closed loop that is now. None is left after the end.
    async fn due(&mut self) -> Option<Moment> {
        let due = match &mut self.orders {
            Some(orders) => orders.recv().await?,
            None => clock::now(),
        };
        (due < self.window.end).then_some(due)
    }

    async fn operate(&mut self, open: &mut Option<OpenLoadSession>) -> Result<u64, LoadFailure> {
        match self.mode {
            LoadMode::Connect => {
                let mut fresh = self.open(LoadRequest::Echo).await?;
                let bytes = self.answer(&mut fresh, false).await?;
                // The answer is complete: an error of the close does not matter.
                fresh.stream.shutdown().await.unwrap_or_default();
                Ok(bytes)
            }
            LoadMode::RoundTrip => {
                if let Some(open) = open {
                    return self.answer(open, true).await;
                }
                let mut fresh = self.open(LoadRequest::Echo).await?;
                let bytes = self.answer(&mut fresh, false).await?;
                *open = Some(fresh);
                Ok(bytes)
            }
            LoadMode::ToClient => {
                let stream = match open {
                    Some(open) => open,
                    None => open.insert(self.tagged(LoadRequest::Source).await?),
                };
                let read = stream.stream.read(&mut self.buffer).await.map_err(|_| LoadFailure::Broken)?;
                if read == 0 { Err(LoadFailure::Broken) } else { Ok(read as u64) }
            }
            LoadMode::ToBackend => {
                let stream = match open {
                    Some(open) => open,
                    None => open.insert(self.tagged(LoadRequest::Sink).await?),
                };
                stream.stream.write_all(&self.buffer).await.map_err(|_| LoadFailure::Broken)?;
                Ok(self.buffer.len() as u64)
            }
        }
    }

    /// A connection whose backend has identified itself.
    async fn tagged(&mut self, request: LoadRequest) -> Result<OpenLoadSession, LoadFailure> {
        let mut open = self.open(request).await?;
        let mut tag = [0; HEAD];
        open.stream.read_exact(&mut tag).await.map_err(|_| LoadFailure::Broken)?;
        self.check(&mut open, &tag);
        Ok(open)
    }

    /// Connects, and sends the header and the first message in one segment, as NLB does.
    async fn open(&mut self, request: LoadRequest) -> Result<OpenLoadSession, LoadFailure> {
        let connected = TcpStream::connect(self.plan.target).await;
        let mut stream = connected.map_err(|_| LoadFailure::Connect)?;
        stream.set_nodelay(true).map_err(|_| LoadFailure::Connect)?;
        let local = stream.local_addr().map_err(|_| LoadFailure::Connect)?;
        let (mut first, pool) = self.callers.next(&mut self.rolls, local, nlb::header);
        self.fill(request);
        let message = match request {
            LoadRequest::Echo => &self.buffer[..],
            LoadRequest::Source | LoadRequest::Sink => self.buffer.get(..HEAD).unwrap_or_default(),
        };
        first.extend_from_slice(message);
        stream.write_all(&first).await.map_err(|_| LoadFailure::Broken)?;
        Ok(OpenLoadSession { stream, pool, tagged: false })
    }

    /// The message: the request in front, then bytes of this session's own.
    fn fill(&mut self, request: LoadRequest) {
        self.rolls.fill(&mut self.buffer);
        if let Some(head) = self.buffer.first_chunk_mut() {
            *head = request.head();
        }
    }

    /// Sends a message if it is not the first, and takes its answer.
    async fn answer(&mut self, open: &mut OpenLoadSession, send: bool) -> Result<u64, LoadFailure> {
        if send {
            open.stream.write_all(&self.buffer).await.map_err(|_| LoadFailure::Broken)?;
        }
        open.stream.read_exact(&mut self.answer).await.map_err(|_| LoadFailure::Broken)?;
        let start = if open.tagged { 0 } else { HEAD };
        if let Some(tag) = self.answer.first_chunk().filter(|_| !open.tagged).copied() {
            self.check(open, &tag);
        }
        let same = self.answer.get(start..) == self.buffer.get(start..);
        if same { Ok(self.answer.len() as u64) } else { Err(LoadFailure::Wrong) }
    }

    /// Whether the backend that answered is one of the pool that should.
    fn check(&mut self, open: &mut OpenLoadSession, tag: &[u8; HEAD]) {
        open.tagged = true;
        if !open.pool.is_empty() && SessionTag::new(&open.pool).as_bytes() != tag {
            self.notes.misrouted();
        }
    }

    /// What else arrives at a target of NLB.
    async fn noise(&mut self) -> io::Result<()> {
        let mut stream = TcpStream::connect(self.plan.target).await?;
        let client = SocketAddr::from(([10, 100, 0, 66], 6666));
        match self.rolls.u8(..4) {
            0 => Ok(()),
            1 => stream.write_all(&nlb::health_check_header()).await,
            2 => stream.write_all(&nlb::header(client, client, Some(STRANGER))).await,
            _ => {
                let served = timeout(LIMIT, self.split(stream)).await;
                if let Err(failure) = served.unwrap_or(Err(LoadFailure::Broken)) {
                    self.notes.failed(failure);
                }
                Ok(())
            }
        }
    }

    /// A header in two parts, as a network may cut it: its session is served and checked like any other.
    async fn split(&mut self, stream: TcpStream) -> Result<(), LoadFailure> {
        let local = stream.local_addr().map_err(|_| LoadFailure::Connect)?;
        let (mut bytes, pool) = self.callers.next(&mut self.rolls, local, nlb::header);
        if bytes.is_empty() || !matches!(self.mode, LoadMode::Connect | LoadMode::RoundTrip) {
            return Ok(());
        }
        // Otherwise the second part would wait for the first one's acknowledgement.
        stream.set_nodelay(true).map_err(|_| LoadFailure::Connect)?;
        let cut = self.rolls.usize(1..bytes.len());
        self.fill(LoadRequest::Echo);
        bytes.extend(&self.buffer);
        let (first, second) = bytes.split_at(cut);
        let mut open = OpenLoadSession { stream, pool, tagged: false };
        open.stream.write_all(first).await.map_err(|_| LoadFailure::Broken)?;
        yield_now().await;
        open.stream.write_all(second).await.map_err(|_| LoadFailure::Broken)?;
        self.answer(&mut open, false).await.map(|_| ())
    }
}
