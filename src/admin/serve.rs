//! HTTP at one socket, bounded: connections at once, the time of a request, the life of a connection.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Connections at once, whose descriptors are of the reserve that limits.rs keeps; more wait in the kernel's queue.
const AT_ONCE: usize = 32;

/// How long a connection may be without a request: longer than scrapes are apart.
const SILENCE: Duration = Duration::from_secs(90);

/// What one request may take, from its head to the head of its answer: a reload of 100,000 tenants takes a few seconds.
const REQUEST: Duration = Duration::from_secs(60);

/// How long a connection may live; then it ends after the answer that it is at.
const LIFE: Duration = Duration::from_secs(600);

/// Whether it is this process's turn to serve its pages: before and after that another one accepts at the same sockets.
#[derive(Clone, Debug)]
pub struct Turn(watch::Receiver<bool>);

impl Turn {
    /// As this says.
    #[must_use]
    pub fn new(serving: watch::Receiver<bool>) -> Self {
        Self(serving)
    }

    /// What `accept` brings while it is this process's turn; `None` where it will never be again.
    pub(super) async fn of<T>(&mut self, accept: impl Future<Output = T>) -> Option<T> {
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

/// Serves what comes until its task is dropped. Where a route upgrades its connection, what is upgraded is the
/// listener's own stream: `upgraded.downcast::<TokioIo<UnixStream>>()`.
pub(super) async fn serve<L: Listener>(mut listener: L, router: Router, mut turn: Turn) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        // Errors, such as a want of descriptors, are waited out in there.
        let Some((stream, _)) = turn.of(listener.accept()).await else { return };
        let router = router.clone();
        tokio::spawn(async move {
            let _place = place;
            connection(stream, router).await;
        });
    }
}

async fn connection<S>(stream: S, router: Router)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let service = TowerToHyperService::new(router);
    let bounded = service_fn(|request| {
        let answer = service.call(request);
        async {
            timeout(REQUEST, answer).await.unwrap_or_else(|_| Ok(StatusCode::GATEWAY_TIMEOUT.into_response()))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SILENCE)
        .serve_connection(TokioIo::new(stream), bounded)
        .with_upgrades();
    let mut connection = pin!(connection);
    // How a connection ends is the business of who opened it.
    if timeout(LIFE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        drop(timeout(REQUEST, connection).await);
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

    use super::*;

    /// Takes the stream over, and answers on it.
    async fn take(request: Request) -> impl IntoResponse {
        let upgrade = hyper::upgrade::on(request);
        tokio::spawn(async move {
            let parts = upgrade.await.unwrap().downcast::<TokioIo<UnixStream>>().unwrap();
            let mut stream = parts.io.into_inner();
            let mut more = parts.read_buf.to_vec();
            more.resize(4, 0);
            stream.read_exact(&mut more[parts.read_buf.len()..]).await.unwrap();
            assert_eq!(more, b"take");
            stream.write_all(b"taken").await.unwrap();
        });
        (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "test")], Body::empty())
    }

    #[tokio::test]
    async fn a_route_may_take_the_stream_over() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (_serving, turn) = watch::channel(true);
        let turn = Turn::new(turn);
        tokio::spawn(serve(listener, Router::new().route("/take", post(take)), turn));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let head = b"POST /take HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: test\r\n\r\ntake";
        stream.write_all(head).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("\r\n\r\ntaken"), "{answer}");
    }
}
