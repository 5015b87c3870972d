//! The pages: metrics for Prometheus, status and configuration as JSON, and a page for people; and the orders.

pub mod control;
pub mod health;
mod in_force;
pub mod metrics;
mod page;
mod serve;
pub mod status;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::sync::Semaphore;

use self::control::{Orders, wrong};
pub use self::serve::Turn;
use crate::state::Live;

/// What the admin address and the admin socket are made of.
#[derive(Debug)]
pub struct Desks {
    /// Where the pages are read.
    pub address: TcpListener,
    /// Where orders are taken too, and its path.
    pub socket: Option<(UnixListener, PathBuf)>,
    /// Who carries them out.
    pub orders: Arc<dyn Orders>,
    /// When.
    pub turn: Turn,
}

/// Serves pages and takes orders until its task is dropped.
pub async fn serve(desks: Desks, live: Arc<Live>) {
    if let Err(error) = open(desks, live).await {
        tracing::error!(%error, "the admin pages have stopped");
    }
}

async fn open(desks: Desks, live: Arc<Live>) -> io::Result<()> {
    let pages = Pages { live, turn: Arc::new(Semaphore::new(1)) };
    let remedy = remedy(desks.socket.as_ref().map(|(_, path)| path.as_path()));
    if let Some((socket, _)) = desks.socket {
        let router = routes(pages.clone()).merge(control::routes(pages.clone(), desks.orders));
        let router = router.fallback(absent);
        tokio::spawn(serve::serve(tokio::net::UnixListener::from_std(socket)?, router, desks.turn.clone()));
    }
    let look_only = move |request: Request, next: Next| look_only(remedy.clone(), request, next);
    let router = routes(pages).fallback(absent).layer(middleware::from_fn(look_only));
    serve::serve(tokio::net::TcpListener::from_std(desks.address)?, router, desks.turn).await;
    Ok(())
}

fn routes(pages: Pages) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/config", get(config))
        .with_state(pages)
}

async fn absent(uri: Uri) -> Response {
    wrong(StatusCode::NOT_FOUND, format!("there is nothing at {}", uri.path()))
}

/// What to do who wants to change something at the address that only shows.
fn remedy(socket: Option<&Path>) -> Arc<str> {
    let remedy = match socket {
        Some(path) => format!("curl --unix-socket {} -X POST http://admin/...", path.display()),
        None => "give it a path by [admin] socket".to_owned(),
    };
    format!("this address only shows; orders are taken at the admin socket: {remedy}").into()
}

/// Nothing is changed by who comes over the network.
async fn look_only(remedy: Arc<str>, request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let mut response = wrong(StatusCode::METHOD_NOT_ALLOWED, &*remedy);
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET,HEAD"));
    response
}

async fn metrics(State(pages): State<Pages>) -> Response {
    match pages.render(metrics::text).await {
        Some(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Some(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn status(State(pages): State<Pages>) -> Response {
    match pages.render(|live| status::Status::of(live)).await {
        Some(status) => Json(status).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn config(State(pages): State<Pages>) -> Response {
    match pages.render(|live| in_force::json(live)).await {
        Some(Ok(json)) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Some(Err(error)) => wrong(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn page(State(pages): State<Pages>) -> Response {
    match pages.render(|live| page::html(&status::Status::of(live))).await {
        Some(page) => Html(page).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// What the pages show, and who may look.
#[derive(Clone)]
struct Pages {
    live: Arc<Live>,
    /// One page is made at a time: with 100,000 tenants it takes a second.
    turn: Arc<Semaphore>,
}

impl Pages {
    /// Makes a page on a thread of its own, so that health checks, probes and the drain do not wait for it. `None`
    /// where that failed.
    async fn render<T: Send + 'static>(
        &self,
        page: impl FnOnce(&Arc<Live>) -> T + Send + 'static,
    ) -> Option<T> {
        let turn = Arc::clone(&self.turn).acquire_owned().await.ok()?;
        let live = Arc::clone(&self.live);
        let made = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            page(&live)
        });
        made.await.inspect_err(|error| tracing::error!(%error, "a page could not be made")).ok()
    }
}
