//! The endpoint for the load balancer's health check.
//!
//! With PROXY v2 on its target group, NLB puts a header on health checks too, also on a port of their own; so a
//! header is taken where there is one, LOCAL or not, and an answer given either way. It reveals no tenant, and
//! nothing is forwarded: the header counts for nothing here, so its checksum and its source do not matter.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, join, split};
use tokio::net::TcpStream;

use super::ServingSwitch;
use super::connection_slots::{ConnectionStep, ConnectionTimeouts, TrackedConnection};
use super::serve::{self, ConnectionLimits};
use crate::account::admin_connections::AdminEndpoint;
use crate::config::HealthConfig;
use crate::header;
use crate::state::LiveState;

/// How long the steps of a check may take. A load balancer sends its question at once, and waits for an answer for 6 s.
const LIMITS: ConnectionTimeouts = ConnectionTimeouts {
    first_byte: Duration::from_millis(500),
    request: Duration::from_millis(2_500),
    answer: Duration::from_secs(1),
    stall: Duration::from_secs(1),
    send: Duration::from_secs(1),
    idle: Duration::from_secs(1),
};

/// Checks at once: a flood here must not take the sessions' descriptors.
const AT_ONCE: usize = 128;

/// Of these, places that networks beside the trusted ones share, where there are trusted ones.
const FOR_OTHERS: usize = 32;

/// Bytes that the kernel may hold of a check in each direction.
const BUFFERS: usize = 16 * 1024;

/// Answers health checks until its task is dropped.
pub(crate) async fn serve(
    socket: TcpListener,
    config: HealthConfig,
    live: Arc<LiveState>,
    turn: ServingSwitch,
) {
    let socket = match serve::tcp(socket, BUFFERS) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%error, "the health endpoint stopped");
            return;
        }
    };
    let HealthConfig { path, trusted_sources: trusted, .. } = config;
    let for_others = if trusted.is_empty() { 0 } else { FOR_OTHERS };
    let room = ConnectionLimits { trusted, for_trusted: AT_ONCE - for_others, for_others };
    let path: Arc<str> = path.into();
    let asked = Arc::clone(&live);
    let attend = |visit| {
        let (path, live) = (Arc::clone(&path), Arc::clone(&asked));
        // The peer notices a failed check; nothing is to be done here.
        async move { check(visit, &path, &live).await.unwrap_or_default() }
    };
    serve::accept(socket, AdminEndpoint::Health, room, &LIMITS, turn, live, attend).await;
}

async fn check(visit: Arc<TrackedConnection<TcpStream>>, path: &str, live: &LiveState) -> io::Result<()> {
    let mut stream = visit.stream();
    let first = header::read_optional(&mut stream).await?.rest;
    let (read, write) = split(stream);
    let stream = TokioIo::new(join(first.as_slice().chain(read), write));
    let answer = service_fn(async |request: Request<_>| {
        visit.enter(ConnectionStep::Sending);
        Ok::<_, Infallible>(answer(&request, path, live))
    });
    http1::Builder::new().keep_alive(false).serve_connection(stream, answer).await.map_err(io::Error::other)
}

fn answer<B>(request: &Request<B>, path: &str, live: &LiveState) -> Response<Body> {
    let (status, text) = if request.uri().path() == path {
        match live.readiness() {
            Ok(()) => (StatusCode::OK, "ok"),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason.as_str()),
        }
    } else {
        (StatusCode::NOT_FOUND, "not the path of the health check")
    };
    let mut response = Response::new(Body::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}
