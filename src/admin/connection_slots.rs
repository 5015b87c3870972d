//! Connection slots of one listening socket of the control thread: the number of connections and their timeouts.
//!
//! A new connection always gets a place. Where all are taken, the connection that made no progress for longest is closed, so
//! that silent peers keep out neither the load balancer's checks nor the operator.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::account::admin_connections::AdminConnectionEnd;
use crate::account::lock;
use crate::clock::{self, Moment};

/// The timeout of each step of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConnectionTimeouts {
    /// From accept to the first byte.
    pub(super) first_byte: Duration,
    /// From a request's first byte to the end of its head.
    pub(super) request: Duration,
    /// From there to the head of its answer.
    pub(super) answer: Duration,
    /// While an answer is sent, without a byte that the peer takes.
    pub(super) stall: Duration,
    /// From the head of an answer to its last byte.
    pub(super) send: Duration,
    /// From one request to the next.
    pub(super) idle: Duration,
}

/// How often a connection's limits are looked at, at least: one step may be shorter than the one before.
const LOOK: Duration = Duration::from_millis(250);

/// The step that a connection is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionStep {
    /// Nothing has come yet.
    Opening,
    /// A request has begun.
    Asking,
    /// Its answer is being made.
    Answering,
    /// The answer is being sent.
    Sending,
    /// The answer was sent; another request may come.
    Idle,
}

/// A stream that can be closed with a reset.
pub(super) trait AdminStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Makes the coming close leave nothing behind in the kernel, where that is possible.
    fn reset_on_close(&self);
}

impl AdminStream for TcpStream {
    fn reset_on_close(&self) {
        // The only error is that the peer has reset it already.
        self.set_zero_linger().unwrap_or_default();
    }
}

impl AdminStream for UnixStream {
    fn reset_on_close(&self) {}
}

/// One connection: its stream and its progress.
#[derive(Debug)]
pub(super) struct TrackedConnection<S> {
    state: Mutex<ConnectionProgress<S>>,
    displaced: Notify,
}

#[derive(Debug)]
struct ConnectionProgress<S> {
    /// None once it is closed, or belongs to another owner.
    stream: Option<S>,
    step: ConnectionStep,
    /// When the step began.
    since: Moment,
    /// When bytes last came or went.
    progress: Moment,
    is_answered: bool,
}

impl<S> ConnectionProgress<S> {
    fn due(&self, limits: &ConnectionTimeouts) -> Moment {
        match self.step {
            ConnectionStep::Opening => self.since + limits.first_byte,
            ConnectionStep::Asking => self.since + limits.request,
            ConnectionStep::Answering => self.since + limits.answer,
            ConnectionStep::Sending => (self.progress + limits.stall).min(self.since + limits.send),
            ConnectionStep::Idle => self.since + limits.idle,
        }
    }

    fn enter(&mut self, step: ConnectionStep, now: Moment) {
        (self.step, self.since, self.progress) = (step, now, now);
    }

    fn received(&mut self, now: Moment) {
        self.progress = now;
        if matches!(self.step, ConnectionStep::Opening | ConnectionStep::Idle) {
            self.enter(ConnectionStep::Asking, now);
        }
    }
}

impl<S: AdminStream> TrackedConnection<S> {
    pub(super) fn new(stream: S, now: Moment) -> Arc<Self> {
        let state = ConnectionProgress {
            stream: Some(stream),
            step: ConnectionStep::Opening,
            since: now,
            progress: now,
            is_answered: false,
        };
        Arc::new(Self { state: Mutex::new(state), displaced: Notify::new() })
    }

    /// The stream, which tells this visit what comes and goes.
    pub(super) fn stream(self: &Arc<Self>) -> TrackedStream<S> {
        TrackedStream(Arc::clone(self))
    }

    /// Enters the next step.
    pub(super) fn enter(&self, step: ConnectionStep) {
        lock(&self.state).enter(step, clock::now());
    }

    /// Runs the connection until it ends, is displaced, or exceeds a timeout.
    pub(super) async fn run(
        &self,
        limits: &ConnectionTimeouts,
        connection: impl Future<Output = ()>,
    ) -> AdminConnectionEnd {
        let mut connection = std::pin::pin!(connection);
        loop {
            let left = lock(&self.state).due(limits).since(clock::now());
            tokio::select! {
                biased;
                () = self.displaced.notified() => return AdminConnectionEnd::Displaced,
                () = connection.as_mut() => {
                    return if lock(&self.state).is_answered { AdminConnectionEnd::Answered } else { AdminConnectionEnd::Closed };
                }
                () = sleep(left.min(LOOK)) => {}
            }
            let state = lock(&self.state);
            if state.due(limits) <= clock::now() {
                return match state.step {
                    ConnectionStep::Opening => AdminConnectionEnd::FirstByteTimeout,
                    ConnectionStep::Asking => AdminConnectionEnd::RequestTimeout,
                    ConnectionStep::Answering => AdminConnectionEnd::AnswerTimeout,
                    ConnectionStep::Sending => AdminConnectionEnd::SendTimeout,
                    ConnectionStep::Idle => AdminConnectionEnd::Answered,
                };
            }
        }
    }
}

/// The holder of a connection slot.
pub(super) trait SlotHolder {
    /// The eviction order: the least goes first. None where the connection has ended.
    fn eviction_order(&self) -> Option<(bool, Moment)>;

    /// Closes it.
    fn displace(&self);
}

impl<S: AdminStream> SlotHolder for TrackedConnection<S> {
    /// A connection for which an answer is being made gives way last: it is this process that lets it wait.
    fn eviction_order(&self) -> Option<(bool, Moment)> {
        let state = lock(&self.state);
        state.stream.as_ref().map(|_| (state.step == ConnectionStep::Answering, state.progress))
    }

    /// The descriptor is free at once, whenever the connection's task runs next.
    fn displace(&self) {
        if let Some(stream) = lock(&self.state).stream.take() {
            stream.reset_on_close();
        }
        self.displaced.notify_one();
    }
}

/// A bounded number of slots, and their holders.
#[derive(Debug)]
pub(super) struct ConnectionSlots<O> {
    limit: usize,
    taken: Vec<Arc<O>>,
}

impl<O: SlotHolder> ConnectionSlots<O> {
    pub(super) fn new(most: usize) -> Self {
        Self { limit: most.max(1), taken: Vec::new() }
    }

    /// Gives the new connection a slot, and closes another one if all are in use.
    pub(super) fn take(&mut self, newcomer: &Arc<O>) {
        if self.taken.len() >= self.limit {
            self.taken.retain(|occupant| occupant.eviction_order().is_some());
        }
        if self.taken.len() >= self.limit {
            let order = |(place, occupant): (usize, &Arc<O>)| Some((occupant.eviction_order()?, place));
            if let Some((_, place)) = self.taken.iter().enumerate().filter_map(order).min() {
                self.taken.swap_remove(place).displace();
            }
        }
        self.taken.push(Arc::clone(newcomer));
    }
}

/// The stream of a tracked connection. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct TrackedStream<S: AdminStream>(Arc<TrackedConnection<S>>);

impl<S: AdminStream> TrackedStream<S> {
    /// The stream itself, whose connection has no place any more; none where it was closed meanwhile.
    pub(super) fn into_stream(self) -> Option<S> {
        lock(&self.0.state).stream.take()
    }

    fn poll<T: Copy>(
        &self,
        poll: impl FnOnce(Pin<&mut S>) -> Poll<io::Result<T>>,
        done: impl FnOnce(&mut ConnectionProgress<S>, T),
    ) -> Poll<io::Result<T>> {
        let mut state = lock(&self.0.state);
        let Some(stream) = &mut state.stream else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        };
        let polled = poll(Pin::new(stream));
        if let Poll::Ready(Ok(result)) = &polled {
            done(&mut state, *result);
        }
        polled
    }

    fn sent(state: &mut ConnectionProgress<S>, count: usize) {
        if count > 0 {
            state.progress = clock::now();
        }
    }
}

impl<S: AdminStream> Drop for TrackedStream<S> {
    fn drop(&mut self) {
        drop(lock(&self.0.state).stream.take());
    }
}

impl<S: AdminStream> AsyncRead for TrackedStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut count = 0;
        let read = |stream: Pin<&mut S>| {
            let before = room.filled().len();
            let polled = stream.poll_read(cx, room);
            count = room.filled().len() - before;
            polled.map_ok(|()| count)
        };
        let received = |state: &mut ConnectionProgress<S>, count: usize| {
            if count > 0 {
                state.received(clock::now());
            }
        };
        self.poll(read, received).map_ok(|_| ())
    }
}

impl<S: AdminStream> AsyncWrite for TrackedStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write(cx, bytes), Self::sent)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write_vectored(cx, parts), Self::sent)
    }

    /// With it hyper sends an answer's body from where it lies, and copies nothing of it.
    fn is_write_vectored(&self) -> bool {
        lock(&self.0.state).stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    /// hyper asks for this once it has nothing left to write: an answer is at its end.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(
            |stream| stream.poll_flush(cx),
            |state, ()| {
                if state.step == ConnectionStep::Sending {
                    state.is_answered = true;
                    state.enter(ConnectionStep::Idle, clock::now());
                }
            },
        )
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_shutdown(cx), |_, ()| ())
    }
}

#[cfg(test)]
impl AdminStream for tokio::io::DuplexStream {
    fn reset_on_close(&self) {}
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const NONE: Duration = Duration::ZERO;
    const LIMITS: ConnectionTimeouts = ConnectionTimeouts {
        first_byte: LONG,
        request: LONG,
        answer: LONG,
        stall: LONG,
        send: LONG,
        idle: LONG,
    };

    /// How a connection ends that is at this step and waits for its peer.
    async fn end(limits: ConnectionTimeouts, step: ConnectionStep) -> AdminConnectionEnd {
        let (mut near, far) = duplex(16);
        let visit = TrackedConnection::new(far, clock::now());
        let mut stream = visit.stream();
        let connection = async {
            if step != ConnectionStep::Opening {
                near.write_all(b"G").await.unwrap();
                stream.read_exact(&mut [0]).await.unwrap();
            }
            if !matches!(step, ConnectionStep::Opening | ConnectionStep::Asking) {
                visit.enter(step);
            }
            if step == ConnectionStep::Idle {
                visit.enter(ConnectionStep::Sending);
                stream.flush().await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        visit.run(&limits, connection).await
    }

    #[tokio::test]
    async fn each_step_has_its_limit() {
        for (limits, step, ended) in [
            (
                ConnectionTimeouts { first_byte: NONE, ..LIMITS },
                ConnectionStep::Opening,
                AdminConnectionEnd::FirstByteTimeout,
            ),
            (
                ConnectionTimeouts { request: NONE, ..LIMITS },
                ConnectionStep::Asking,
                AdminConnectionEnd::RequestTimeout,
            ),
            (
                ConnectionTimeouts { answer: NONE, ..LIMITS },
                ConnectionStep::Answering,
                AdminConnectionEnd::AnswerTimeout,
            ),
            (
                ConnectionTimeouts { stall: NONE, ..LIMITS },
                ConnectionStep::Sending,
                AdminConnectionEnd::SendTimeout,
            ),
            (
                ConnectionTimeouts { send: NONE, ..LIMITS },
                ConnectionStep::Sending,
                AdminConnectionEnd::SendTimeout,
            ),
            (ConnectionTimeouts { idle: NONE, ..LIMITS }, ConnectionStep::Idle, AdminConnectionEnd::Answered),
        ] {
            assert_eq!(end(limits, step).await, ended, "{step:?}");
        }
    }

    #[test]
    fn progress_extends_the_stall_timeout_and_not_the_total_timeout() {
        let at = |seconds: u64| Moment::from_nanos(seconds * 1_000_000_000);
        let limits =
            ConnectionTimeouts { stall: Duration::from_secs(10), send: Duration::from_secs(60), ..LIMITS };
        let mut state = ConnectionProgress {
            stream: None::<DuplexStream>,
            step: ConnectionStep::Opening,
            since: at(0),
            progress: at(0),
            is_answered: false,
        };
        state.enter(ConnectionStep::Sending, at(100));
        assert_eq!(state.due(&limits), at(110));
        state.received(at(130));
        assert_eq!((state.step, state.due(&limits)), (ConnectionStep::Sending, at(140)));
        state.progress = at(159);
        assert_eq!(state.due(&limits), at(160));
        state.enter(ConnectionStep::Idle, at(160));
        state.received(at(170));
        assert_eq!((state.step, state.since), (ConnectionStep::Asking, at(170)));
        state.received(at(175));
        assert_eq!(state.since, at(170), "further bytes of a request do not put off its end");
    }

    #[tokio::test]
    async fn displaced_connection_is_closed_at_once_and_counted() {
        let (mut near, far) = duplex(16);
        let visit = TrackedConnection::new(far, clock::now());
        let mut stream = visit.stream();
        visit.displace();
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0, "closed though its task has not run since");
        assert!(stream.read(&mut [0]).await.is_err() && visit.eviction_order().is_none());
        assert_eq!(visit.run(&LIMITS, std::future::pending()).await, AdminConnectionEnd::Displaced);
    }

    #[tokio::test]
    async fn end_without_an_answer_is_the_peers() {
        let (near, far) = duplex(16);
        let visit = TrackedConnection::new(far, clock::now());
        drop(near);
        let mut stream = visit.stream();
        let connection = async {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            drop(stream);
        };
        assert_eq!(visit.run(&LIMITS, connection).await, AdminConnectionEnd::Closed);
        assert!(visit.eviction_order().is_none(), "its place is free");
    }

    struct Fake {
        number: u64,
        order: Cell<Option<(bool, Moment)>>,
    }

    impl SlotHolder for Fake {
        fn eviction_order(&self) -> Option<(bool, Moment)> {
            self.order.get()
        }

        fn displace(&self) {
            self.order.set(None);
        }
    }

    #[test]
    fn connection_longest_without_progress_is_displaced_and_never_the_newest() {
        let mut random = fastrand::Rng::with_seed(19);
        let mut places = ConnectionSlots::new(5);
        let mut all: Vec<Arc<Fake>> = Vec::new();
        for number in 0..10_000_u64 {
            let newcomer = Moment::from_nanos(2 * number);
            #[expect(clippy::arc_with_non_send_sync, reason = "one thread plays all connections")]
            let fake = Arc::new(Fake { number, order: Cell::new(Some((false, newcomer))) });
            let alive = |all: &[Arc<Fake>]| -> Vec<(bool, Moment, u64)> {
                let order =
                    |fake: &Arc<Fake>| fake.eviction_order().map(|(busy, since)| (busy, since, fake.number));
                all.iter().filter_map(order).collect()
            };
            let before = alive(&all);
            places.take(&fake);
            all.push(fake);
            let after = alive(&all);
            assert!(after.len() <= 5 && after.last().unwrap().2 == number, "{after:?}");
            let gone: Vec<_> = before.iter().filter(|one| !after.contains(one)).collect();
            assert_eq!(gone.len(), usize::from(before.len() == 5));
            assert!(
                gone.iter().all(|gone| before.iter().all(|other| *gone <= other)),
                "{before:?}: {gone:?}"
            );
            all.retain(|fake| fake.eviction_order().is_some());
            let one = random.choice(&all).unwrap();
            match random.u8(0..4) {
                0 => one.order.set(None),
                1 => one.order.set(Some((random.bool(), Moment::from_nanos(2 * number + 1)))),
                _ => {}
            }
        }
    }
}
