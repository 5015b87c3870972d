//! Serves the control thread's listening sockets: connections are accepted at once, bounded in number and time, and
//! counted.

use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use rustix::io::Errno;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::connection_slots::{
    AdminStream, ConnectionSlots, ConnectionStep, ConnectionTimeouts, TrackedConnection,
};
use crate::accept::{self, AcceptError};
use crate::account::admin_connections::AdminEndpoint;
use crate::clock;
use crate::state::LiveState;

/// Connections at once of the admin address, and of the admin socket; their descriptors are of the reserve that limits.rs keeps.
const AT_ONCE: usize = 32;

/// What one request may take, from its head to the head of its answer: a reload of 100,000 tenants takes a few seconds.
const REQUEST: Duration = Duration::from_secs(60);

/// How long the steps of a connection may take.
const LIMITS: ConnectionTimeouts = ConnectionTimeouts {
    first_byte: Duration::from_secs(5),
    request: Duration::from_secs(10),
    // Longer than the timeout of the request itself, which has an error response of its own.
    answer: Duration::from_secs(65),
    stall: Duration::from_secs(10),
    send: Duration::from_secs(60),
    // Longer than the usual interval between scrapes.
    idle: Duration::from_secs(90),
};

/// How long a connection may live; then it ends after the answer that it is at.
const LIFE: Duration = Duration::from_secs(600);

/// The head of a request, at most; hyper takes no less than 8 KiB.
const HEAD: usize = 16 * 1024;

/// Connections accepted in one go. Then those that were accepted run, and the kernel is asked what has come for them: so a
/// request that is there already is read before a flood of newcomers takes its place.
const BATCH: usize = 8;

/// Whether this process serves its pages. During a takeover the other process accepts at the same sockets.
#[derive(Clone, Debug)]
pub(crate) struct ServingSwitch(watch::Receiver<bool>);

impl ServingSwitch {
    /// As this says.
    #[must_use]
    pub(crate) fn new(serving: watch::Receiver<bool>) -> Self {
        Self(serving)
    }

    /// The result of `accept` while this process serves; `None` if it stops for good.
    async fn while_serving<T>(&mut self, accept: impl Future<Output = T>) -> Option<T> {
        let mut accept = pin!(accept);
        loop {
            self.0.wait_for(|serving| *serving).await.ok()?;
            tokio::select! {
                biased;
                other = self.0.wait_for(|serving| !serving) => other.is_ok().then_some(())?,
                accepted = accept.as_mut() => return Some(accepted),
            }
        }
    }
}

/// A listening socket.
pub(super) trait Acceptor {
    /// What it accepts.
    type Stream: AdminStream;

    /// A connection and its peer's address, where it has one.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Acceptor for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, peer)| (stream, Some(peer.ip())))
    }
}

impl Acceptor for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, _)| (stream, None))
    }
}

/// A TCP listener of the control thread. The kernel holds little for each of its connections: `buffers` bytes each way.
///
/// # Errors
/// Where the runtime cannot register it.
pub(super) fn tcp(socket: std::net::TcpListener, buffers: usize) -> io::Result<TcpListener> {
    // Accepted sockets inherit both (tcp(7)).
    let options = socket2::SockRef::from(&socket);
    options.set_send_buffer_size(buffers)?;
    options.set_recv_buffer_size(buffers)?;
    TcpListener::from_std(socket)
}

/// The connection limits of one socket.
pub(super) struct ConnectionLimits {
    /// Networks with reserved slots; empty means every network.
    pub(super) trusted: Vec<IpNet>,
    /// Places of those networks.
    pub(super) for_trusted: usize,
    /// Places that all others share.
    pub(super) for_others: usize,
}

/// Accepts until its task is dropped, and serves each connection.
pub(super) async fn accept<L, F>(
    listener: L,
    endpoint: AdminEndpoint,
    room: ConnectionLimits,
    limits: &'static ConnectionTimeouts,
    mut turn: ServingSwitch,
    live: Arc<LiveState>,
    attend: impl Fn(Arc<TrackedConnection<L::Stream>>) -> F,
) where
    L: Acceptor,
    F: Future<Output = ()> + Send + 'static,
{
    let mut trusted = ConnectionSlots::new(room.for_trusted);
    let mut others = ConnectionSlots::new(room.for_others);
    loop {
        for _ in 0..BATCH {
            let Some(accepted) = turn.while_serving(listener.accept()).await else { return };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    // Descriptor shortage: wait. A peer that closed: accept the next one at once.
                    if !matches!(accept::classify(errno), AcceptError::Peer) {
                        sleep(accept::PAUSE).await;
                    }
                    continue;
                }
            };
            let is_trusted = room.trusted.is_empty()
                || peer.is_none_or(|ip| room.trusted.iter().any(|net| net.contains(&ip)));
            let visit = TrackedConnection::new(stream, clock::now());
            if is_trusted { &mut trusted } else { &mut others }.take(&visit);
            live.admin_connections.begin(endpoint);
            let (attended, live) = (attend(Arc::clone(&visit)), Arc::clone(&live));
            tokio::spawn(async move {
                live.admin_connections.end(endpoint, visit.run(limits, attended).await);
            });
        }
        tokio::task::yield_now().await;
    }
}

/// Serves pages until its task is dropped. Where a route upgrades its connection, what is upgraded is the listener's own
/// stream: `upgraded.downcast::<TokioIo<TrackedStream<UnixStream>>>()`.
pub(super) async fn serve<L: Acceptor>(
    listener: L,
    endpoint: AdminEndpoint,
    router: Router,
    turn: ServingSwitch,
    live: Arc<LiveState>,
) {
    let room = ConnectionLimits { trusted: Vec::new(), for_trusted: AT_ONCE, for_others: 0 };
    let attend = |visit| connection(visit, router.clone());
    accept(listener, endpoint, room, &LIMITS, turn, live, attend).await;
}

async fn connection<S: AdminStream>(visit: Arc<TrackedConnection<S>>, router: Router) {
    let service = TowerToHyperService::new(router);
    let bounded = service_fn(|request| {
        visit.enter(ConnectionStep::Answering);
        let answer = service.call(request);
        let visit = Arc::clone(&visit);
        async move {
            let late = |_| Ok(StatusCode::GATEWAY_TIMEOUT.into_response());
            let answer = timeout(REQUEST, answer).await.unwrap_or_else(late);
            visit.enter(ConnectionStep::Sending);
            answer
        }
    });
    let connection = http1::Builder::new()
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(visit.stream()), bounded)
        .with_upgrades();
    let mut connection = pin!(connection);
    // The result is ignored: an error on the connection concerns its peer only.
    if timeout(LIFE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        drop(connection.await);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::extract::Request;
    use axum::http::header::{CONNECTION, UPGRADE};
    use axum::routing::post;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    use super::super::connection_slots::TrackedStream;
    use super::*;
    use crate::config::Config;
    use crate::state::ProcessLimits;

    fn live() -> Arc<LiveState> {
        let text = "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\npool = \"app\"
            [[pool]]\nname = \"app\"\nbackends = [\"127.0.0.1:9\"]\n[[tenant]]\nname = \"acme\"\n";
        let most = ProcessLimits { sessions: 10, pending: 10, pipes: 0 };
        LiveState::new(&Config::parse("test.toml", text).unwrap(), 1, most)
    }

    /// Takes the stream over, and answers on it.
    async fn take(request: Request) -> impl IntoResponse {
        let upgrade = hyper::upgrade::on(request);
        tokio::spawn(async move {
            let parts = upgrade.await.unwrap().downcast::<TokioIo<TrackedStream<UnixStream>>>().unwrap();
            let mut stream = parts.io.into_inner().into_stream().unwrap();
            let mut more = parts.read_buf.to_vec();
            more.resize(4, 0);
            stream.read_exact(&mut more[parts.read_buf.len()..]).await.unwrap();
            assert_eq!(more, b"take");
            stream.write_all(b"taken").await.unwrap();
        });
        (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "test")], Body::empty())
    }

    #[tokio::test]
    async fn route_can_upgrade_the_connection() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (_serving, turn) = watch::channel(true);
        let turn = ServingSwitch::new(turn);
        let live = live();
        let router = Router::new().route("/take", post(take));
        tokio::spawn(serve(listener, AdminEndpoint::AdminSocket, router, turn, live));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let head = b"POST /take HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: test\r\n\r\ntake";
        stream.write_all(head).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("\r\n\r\ntaken"), "{answer}");
    }
}
