//! The admin server: metrics, status and configuration pages, the status page, and the control API.

mod active_config;
mod allowed_hosts;
mod connection_slots;
pub(crate) mod control;
pub(crate) mod health;
pub(crate) mod metrics;
mod page;
mod page_cache;
mod serve;
pub(crate) mod status;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::sync::Semaphore;

use self::allowed_hosts::AllowedHosts;
use self::control::Control;
use self::page_cache::CachedPage;
pub(crate) use self::serve::ServingSwitch;
use self::status::Status;
use crate::account::admin_connections::AdminEndpoint;
use crate::state::LiveState;

/// Bytes that the kernel may hold of a connection of the admin address, in each direction.
const BUFFERS: usize = 256 * 1024;

/// The sockets and the handle that the admin server is started with.
#[derive(Debug)]
pub(crate) struct AdminListeners {
    /// Where the pages are read.
    pub address: TcpListener,
    /// The names, beside IP addresses and `localhost`, by which that may be asked.
    pub hosts: Vec<String>,
    /// Where orders are taken too, and its path.
    pub socket: Option<(UnixListener, PathBuf)>,
    /// Carries out the operations.
    pub control: Arc<dyn Control>,
    /// When.
    pub serving: ServingSwitch,
}

/// Serves pages and the control API until its task is dropped.
pub(crate) async fn serve(listeners: AdminListeners, live: Arc<LiveState>) {
    if let Err(error) = open(listeners, live).await {
        tracing::error!(%error, "the admin listener stopped");
    }
}

async fn open(listeners: AdminListeners, live: Arc<LiveState>) -> io::Result<()> {
    let pages = PageContext::of(&live);
    let remedy = remedy(listeners.socket.as_ref().map(|(_, path)| path.as_path()));
    if let Some((socket, _)) = listeners.socket {
        let router = routes(pages.clone()).merge(control::routes(&live, listeners.control));
        let router = router.fallback(not_found);
        let (socket, live) = (tokio::net::UnixListener::from_std(socket)?, Arc::clone(&live));
        tokio::spawn(serve::serve(
            socket,
            AdminEndpoint::AdminSocket,
            router,
            listeners.serving.clone(),
            live,
        ));
    }
    let hosts = AllowedHosts::new(listeners.hosts);
    let known = move |request: Request, next: Next| {
        allowed_hosts::only_allowed_hosts(Arc::clone(&hosts), request, next)
    };
    let look_only = move |request: Request, next: Next| refuse_changes(remedy.clone(), request, next);
    let router = routes(pages).route_layer(middleware::from_fn(known)).fallback(not_found);
    let router = router.layer(middleware::from_fn(look_only));
    let socket = serve::tcp(listeners.address, BUFFERS)?;
    serve::serve(socket, AdminEndpoint::Admin, router, listeners.serving, live).await;
    Ok(())
}

fn routes(pages: PageContext) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/config", get(config))
        .with_state(pages)
}

/// An error, as JSON.
fn error_response(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(json!({ "error": error.into() }))).into_response()
}

async fn not_found(uri: Uri) -> Response {
    error_response(StatusCode::NOT_FOUND, format!("no such page: {}", uri.path()))
}

/// The remedy for a client that sends a change to the read-only address.
fn remedy(socket: Option<&Path>) -> Arc<str> {
    let remedy = match socket {
        Some(path) => format!("curl --unix-socket {} -X POST http://admin/...", path.display()),
        None => "set [admin] socket to a path".to_owned(),
    };
    format!("this address is read-only; use the admin socket: {remedy}").into()
}

/// Refuses changes over the network.
async fn refuse_changes(remedy: Arc<str>, request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let mut response = error_response(StatusCode::METHOD_NOT_ALLOWED, &*remedy);
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET,HEAD"));
    response
}

async fn metrics(State(pages): State<PageContext>) -> Response {
    let make = |live: &Arc<LiveState>| {
        metrics::text(live).map(String::into_bytes).map_err(|error| error.to_string())
    };
    pages.answer(&pages.texts.metrics, prometheus::TEXT_FORMAT, make).await
}

async fn status(State(pages): State<PageContext>) -> Response {
    let make =
        |live: &Arc<LiveState>| serde_json::to_vec(&Status::of(live)).map_err(|error| error.to_string());
    pages.answer(&pages.texts.status, JSON, make).await
}

async fn config(State(pages): State<PageContext>) -> Response {
    let make = |live: &Arc<LiveState>| active_config::json(live).map_err(|error| error.to_string());
    pages.answer(&pages.texts.config, JSON, make).await
}

async fn page(State(pages): State<PageContext>) -> Response {
    let make = |live: &Arc<LiveState>| Ok(page::html(&Status::of(live)).into_bytes());
    pages.answer(&pages.texts.people, "text/html; charset=utf-8", make).await
}

const JSON: &str = "application/json";

/// The state shared by the page handlers.
#[derive(Clone)]
struct PageContext {
    live: Arc<LiveState>,
    texts: Arc<PageCaches>,
    /// One page is made at a time.
    turn: Arc<Semaphore>,
}

#[derive(Default)]
struct PageCaches {
    people: CachedPage,
    metrics: CachedPage,
    status: CachedPage,
    config: CachedPage,
}

impl PageContext {
    fn of(live: &Arc<LiveState>) -> Self {
        Self { live: Arc::clone(live), texts: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }

    async fn answer(
        &self,
        page: &CachedPage,
        kind: &'static str,
        make: impl FnOnce(&Arc<LiveState>) -> Result<Vec<u8>, String> + Send + 'static,
    ) -> Response {
        let live = Arc::clone(&self.live);
        match page.text(&self.turn, move || make(&live)).await {
            Some(Ok(text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
            Some(Err(error)) => error_response(StatusCode::INTERNAL_SERVER_ERROR, error),
            None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    }
}
