//! The endpoint that the load balancer's health check asks.
//!
//! With PROXY v2 on its target group, NLB puts a header on health checks too, also on a port of their own; so a
//! header is taken where there is one, LOCAL or not, and an answer given either way. It tells nobody's tenant, and
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
use tokio::io::{AsyncReadExt, join};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::Turn;
use crate::header;
use crate::state::Live;

/// What one check may take, from accept to its answer. NLB waits for 6 s, so that a check that had to wait for one
/// silent connection to be given up is still answered in time.
const LIMIT: Duration = Duration::from_secs(3);

/// What may pass before a check's first byte. A load balancer sends its question at once; those that say nothing
/// must not take the places of those that ask.
const FIRST_BYTE: Duration = Duration::from_millis(500);

/// Checks at once: a flood here must not take the sessions' descriptors.
const AT_ONCE: usize = 128;

/// How long accepting rests after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers health checks until its task is dropped.
pub async fn serve(socket: TcpListener, path: String, live: Arc<Live>, mut turn: Turn) {
    let socket = match tokio::net::TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%error, "the health endpoint has stopped");
            return;
        }
    };
    let path: Arc<str> = path.into();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        // Acquired first: beyond the bound, checks wait in the kernel's queue.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Some(accepted) = turn.of(socket.accept()).await else { return };
        let Ok((socket, _)) = accepted else {
            sleep(PAUSE).await;
            continue;
        };
        let (path, live) = (Arc::clone(&path), Arc::clone(&live));
        tokio::spawn(async move {
            let _place = place;
            // A check that fails or takes too long is the checker's to notice.
            timeout(LIMIT, check(socket, &path, &live)).await.unwrap_or(Ok(())).unwrap_or_default();
        });
    }
}

async fn check(mut socket: TcpStream, path: &str, live: &Live) -> io::Result<()> {
    timeout(FIRST_BYTE, socket.readable()).await.map_err(io::Error::from)??;
    let first = header::read_optional(&mut socket).await?.rest;
    let (read, write) = socket.split();
    let stream = TokioIo::new(join(first.as_slice().chain(read), write));
    let answer = service_fn(async |request: Request<_>| Ok::<_, Infallible>(answer(&request, path, live)));
    http1::Builder::new().keep_alive(false).serve_connection(stream, answer).await.map_err(io::Error::other)
}

fn answer<B>(request: &Request<B>, path: &str, live: &Live) -> Response<Body> {
    let (status, text) = if request.uri().path() == path {
        match live.readiness() {
            Ok(()) => (StatusCode::OK, "ok"),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason.word()),
        }
    } else {
        (StatusCode::NOT_FOUND, "not the health check's path")
    };
    let mut response = Response::new(Body::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}
