//! A load balancer for TCP with a target group: flows by hash, health checks, idle flows, deregistration, and the
//! interface endpoints in its consumers' networks. What differs from an NLB: a consumer's connection is accepted here
//! before the target is asked, and TCP keepalive does not count as traffic.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Path as Part, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, tcp};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::super::{Tasks, accept, reap};
use super::group::{TargetDescription, TargetGroup, TargetGroupRules};
use super::{header, health_check_header};
use crate::account::lock;
use crate::clock::{self, Moment};

/// What a connection to a target may take.
const CONNECT: Duration = Duration::from_secs(3);
/// What is moved at once.
const CHUNK: usize = 16 * 1024;
/// An answer to a health check is not read further.
const ANSWER: u64 = 1024;

/// A load balancer. Its flows end with it.
#[derive(Clone, Debug)]
pub(crate) struct Balancer {
    rules: TargetGroupRules,
    /// Where targets' health is asked: the path, and the port.
    health: (u16, Arc<str>),
    group: Arc<Mutex<TargetGroup>>,
}

impl Balancer {
    /// A load balancer for these targets, whose health is asked at `path` of another port.
    #[must_use]
    pub(crate) fn new(rules: TargetGroupRules, targets: &[SocketAddr], health: u16, path: &str) -> Self {
        let mut group = TargetGroup::new(rules);
        for target in targets {
            group.register(*target);
        }
        Self { rules, health: (health, path.into()), group: Arc::new(Mutex::new(group)) }
    }

    /// What is thought of the targets.
    #[must_use]
    pub(crate) fn describe(&self) -> Vec<TargetDescription> {
        lock(&self.group).describe()
    }

    /// Serves an endpoint: each connection that `socket` accepts goes to a target, behind a header.
    pub(crate) async fn serve(self, socket: TcpListener, endpoint: String) {
        let mut flows = Tasks::new();
        loop {
            let consumer = accept(&socket).await;
            reap(&mut flows);
            let (balancer, endpoint) = (self.clone(), endpoint.clone());
            flows.spawn(async move {
                // What fails here fails visibly at the consumer, whose connection is reset.
                balancer.carry(consumer, &endpoint).await.unwrap_or_default();
            });
        }
    }

    /// Checks every target, one round after the other.
    pub(crate) async fn check(self) {
        loop {
            let targets: Vec<_> = lock(&self.group).checked().collect();
            let mut checks = tokio::task::JoinSet::new();
            for target in targets {
                let (health, path) = self.health.clone();
                let at = SocketAddr::new(target.ip(), health);
                let limit = self.rules.timeout;
                checks.spawn(async move {
                    let asked = timeout(limit, ask(at, &path)).await;
                    (target, asked.unwrap_or_else(|_| Err("timeout".to_owned())))
                });
            }
            while let Some(Ok((target, said))) = checks.join_next().await {
                lock(&self.group).note(target, said);
            }
            sleep(self.rules.interval).await;
        }
    }

    /// Answers an operator, over HTTP on a Unix socket: `GET /targets`, `POST /register/ADDRESS`,
    /// `POST /deregister/ADDRESS`.
    ///
    /// # Errors
    /// Where the socket cannot be made, or fails.
    pub(crate) async fn obey(self, socket: &Path) -> io::Result<()> {
        let router = Router::new()
            .route("/targets", get(async |State(balancer): State<Self>| Json(balancer.describe())))
            .route("/register/{target}", post(register))
            .route("/deregister/{target}", post(deregister))
            .with_state(self);
        axum::serve(UnixListener::bind(socket)?, router).await
    }

    async fn carry(&self, consumer: TcpStream, endpoint: &str) -> io::Result<()> {
        let client = consumer.peer_addr()?;
        consumer.set_nodelay(true)?;
        consumer.set_zero_linger()?;
        // An NLB hashes the first packet's sequence number, too; here a client's port tells its connections apart.
        let chosen = lock(&self.group).choose(format!("{endpoint} {client}").as_bytes());
        let (address, reset) = chosen.ok_or(io::ErrorKind::NotFound)?;
        let target = timeout(CONNECT, TcpStream::connect(address)).await??;
        target.set_nodelay(true)?;
        target.set_zero_linger()?;
        let header = header(client, address, Some(endpoint));
        flow(consumer, target, header, self.rules.idle, reset).await
    }
}

async fn register(State(balancer): State<Balancer>, Part(target): Part<SocketAddr>) -> StatusCode {
    lock(&balancer.group).register(target);
    StatusCode::OK
}

async fn deregister(State(balancer): State<Balancer>, Part(target): Part<SocketAddr>) -> StatusCode {
    if !lock(&balancer.group).deregister(target) {
        return StatusCode::NOT_FOUND;
    }
    tokio::spawn(async move {
        sleep(balancer.rules.deregistration).await;
        lock(&balancer.group).forget(target);
    });
    StatusCode::OK
}

/// One flow, whose sockets are set to be reset when they are dropped: only one that ended in order is closed. After
/// `idle` without a byte it is forgotten in silence, and what comes then meets a reset.
async fn flow(
    mut consumer: TcpStream,
    mut target: TcpStream,
    header: Vec<u8>,
    idle: Duration,
    mut reset: watch::Receiver<bool>,
) -> io::Result<()> {
    let last = AtomicU64::new(clock::now().as_nanos());
    let ended = {
        let (from_consumer, mut to_consumer) = consumer.split();
        let (from_target, mut to_target) = target.split();
        let both = async {
            tokio::try_join!(
                way(from_consumer, &mut to_target, header, &last),
                way(from_target, &mut to_consumer, Vec::new(), &last)
            )
        };
        tokio::select! {
            ended = both => Some(ended.map(drop)),
            () = silence(&last, idle) => None,
            _ = reset.wait_for(|reset| *reset) => Some(Err(io::ErrorKind::ConnectionReset.into())),
        }
    };
    match ended {
        Some(Ok(())) => {
            // Linger of no time would cut off what the kernel has not sent yet.
            for stream in [&consumer, &target] {
                socket2::SockRef::from(stream).set_linger(None)?;
            }
            Ok(())
        }
        Some(Err(error)) => Err(error),
        None => {
            let (mut one, mut other) = ([0], [0]);
            tokio::select! {
                _ = consumer.peek(&mut one) => {}
                _ = target.peek(&mut other) => {}
            }
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

/// Moves bytes one way until they end; `first` goes in front of the first of them
/// (`proxy_protocol_v2.client_to_server.header_placement = on_first_ack_with_payload`).
async fn way(
    mut from: tcp::ReadHalf<'_>,
    to: &mut tcp::WriteHalf<'_>,
    mut first: Vec<u8>,
    last: &AtomicU64,
) -> io::Result<()> {
    loop {
        first.reserve(CHUNK);
        let count = from.read_buf(&mut first).await?;
        last.store(clock::now().as_nanos(), Ordering::Relaxed);
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&first).await?;
        first.clear();
    }
}

/// Returns once nothing was moved for so long.
async fn silence(last: &AtomicU64, idle: Duration) {
    loop {
        let silent = clock::now().since(Moment::from_nanos(last.load(Ordering::Relaxed)));
        let Some(left) = idle.checked_sub(silent).filter(|left| !left.is_zero()) else { return };
        sleep(left).await;
    }
}

/// Asks a target's health: what was said where it is good, and where it is not.
async fn ask(health: SocketAddr, path: &str) -> Result<String, String> {
    let exchange = async {
        let mut stream = TcpStream::connect(health).await?;
        let mut question = health_check_header();
        question
            .extend(format!("GET {path} HTTP/1.1\r\nhost: {health}\r\nconnection: close\r\n\r\n").bytes());
        stream.write_all(&question).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = exchange.await.map_err(|error| error.kind().to_string())?;
    let text = String::from_utf8_lossy(&answer);
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or("no answer");
    match status.parse() {
        Ok(200..400) => Ok(status.to_owned()),
        Ok(0_u16..) | Err(_) => Err(status.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::backend::{BackendBehavior, TestBackend};
    use crate::lab::nlb::group::TargetHealth;
    use crate::lab::{ANYWHERE, listen};

    const ENDPOINT: &str = "vpce-0acce0000acce0000";
    /// What is waited for comes sooner.
    const LIMIT: Duration = Duration::from_secs(20);

    /// A consumer's connection to an echo by way of a load balancer, once the first bytes are back.
    async fn connected(rules: TargetGroupRules, tasks: &mut Tasks) -> (Balancer, TestBackend, TcpStream) {
        let backend = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
        let balancer = Balancer::new(rules, &[backend.address()], 1, "/");
        let (socket, address) = listen(ANYWHERE).await.unwrap();
        tasks.spawn(balancer.clone().serve(socket, ENDPOINT.to_owned()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        let mut expected = b"acme-1\n".to_vec();
        expected.extend(header(stream.local_addr().unwrap(), backend.address(), Some(ENDPOINT)));
        expected.push(b'x');
        let mut answer = vec![0; expected.len()];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, expected);
        (balancer, backend, stream)
    }

    async fn ends(stream: &mut TcpStream) -> io::ErrorKind {
        timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap_err().kind()
    }

    #[tokio::test]
    async fn flow_ends_as_its_sides_end_it() {
        let mut tasks = Tasks::new();
        let (balancer, _backend, mut stream) = connected(TargetGroupRules::default(), &mut tasks).await;
        stream.shutdown().await.unwrap();
        assert_eq!(ends(&mut stream).await, io::ErrorKind::UnexpectedEof);
        while balancer.describe()[0].open > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn idle_flow_expires_silently_and_its_next_byte_is_reset() {
        let rules = TargetGroupRules { idle: Duration::from_millis(50), ..TargetGroupRules::default() };
        let mut tasks = Tasks::new();
        let (_balancer, _backend, mut stream) = connected(rules, &mut tasks).await;
        // Both timers are one runtime's: the first has fired when the second does.
        timeout(Duration::from_millis(200), stream.read_u8()).await.unwrap_err();
        stream.write_all(b"y").await.unwrap();
        assert_eq!(ends(&mut stream).await, io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn flows_of_a_target_that_becomes_unhealthy_are_reset() {
        let mut tasks = Tasks::new();
        let (balancer, backend, mut stream) = connected(TargetGroupRules::default(), &mut tasks).await;
        for _ in 0..2 {
            lock(&balancer.group).note(backend.address(), Err("503".to_owned()));
        }
        assert_eq!(ends(&mut stream).await, io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn missing_target_resets_the_connection() {
        let target = TestBackend::refusing().await.unwrap();
        let balancer = Balancer::new(TargetGroupRules::default(), &[target], 1, "/");
        let (socket, address) = listen(ANYWHERE).await.unwrap();
        let mut tasks = Tasks::new();
        tasks.spawn(balancer.serve(socket, ENDPOINT.to_owned()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(ends(&mut stream).await, io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn checks_have_a_local_header_and_take_out_and_bring_back() {
        let (health, address) = listen(ANYWHERE).await.unwrap();
        let rules = TargetGroupRules { interval: Duration::from_millis(1), ..TargetGroupRules::default() };
        let balancer = Balancer::new(rules, &[address], address.port(), "/healthz");
        let mut tasks = Tasks::new();
        tasks.spawn(balancer.clone().check());
        for (status, standing) in
            [("200", TargetHealth::Healthy), ("503", TargetHealth::Unhealthy), ("204", TargetHealth::Healthy)]
        {
            let answers = async {
                while balancer.describe()[0].state != standing {
                    let mut check = accept(&health).await;
                    let mut question = health_check_header();
                    question.extend(b"GET /healthz HTTP/1.1\r\n");
                    let mut asked = vec![0; question.len()];
                    check.read_exact(&mut asked).await.unwrap();
                    assert_eq!(asked, question);
                    check.write_all(format!("HTTP/1.1 {status} x\r\n\r\n").as_bytes()).await.unwrap();
                    check.shutdown().await.unwrap();
                    // To its end, so that nothing unread makes a reset of it.
                    check.read_to_end(&mut asked).await.unwrap_or_default();
                    tokio::task::yield_now().await;
                }
            };
            timeout(LIMIT, answers).await.unwrap();
            assert_eq!(balancer.describe()[0].reason, status);
        }
    }
}
