//! The control API. It is served at the admin socket only.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use axum::body::Body;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::connection_slots::TrackedStream;
use super::{allowed_hosts, error_response};
use crate::addr::BackendAddr;
use crate::clock;
use crate::state::LiveState;

/// The operations of the control API.
pub(crate) trait Control: Debug + Send + Sync {
    /// Reads the configuration again and applies it, as a whole or not at all. It may take seconds.
    ///
    /// # Errors
    /// Why not; what was in force stays.
    fn reload(&self) -> Result<ReloadSummary, ReloadRefusal>;

    /// Opens the access log's file anew, as after it was renamed; nothing where the log is no file.
    ///
    /// # Errors
    /// Why it goes on in the file that it has; the process log has it, too.
    fn reopen_access_log(&self) -> Result<(), String>;

    /// Starts to drain. A second call changes nothing.
    fn drain(&self);

    /// Hands over all sockets and sessions to the process at the other end. It may take long; it runs on its own.
    fn hand_over(&self, to: UnixStream);
}

/// The configuration in force after a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ReloadSummary {
    pub listeners: usize,
    pub pools: usize,
    pub tenants: usize,
    /// Why the access log's file was not opened anew, where it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_log: Option<String>,
}

/// Why a reload was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ReloadRefusal {
    /// Each fault; never empty.
    pub faults: Vec<RefusalDetail>,
}

/// One error of a refused configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RefusalDetail {
    /// The file; none where no line of a file is at fault, but that the process cannot change so.
    pub file: Option<String>,
    /// The line, from 1.
    pub line: Option<usize>,
    /// The fault as `vestibule check` says it.
    pub text: String,
}

/// The state shared by the routes.
#[derive(Clone)]
struct ControlRoutes {
    live: Arc<LiveState>,
    control: Arc<dyn Control>,
}

/// An order's body has a few keys.
const BODY: usize = 4096;

/// The routes.
pub(super) fn routes(live: &Arc<LiveState>, control: Arc<dyn Control>) -> Router {
    Router::new()
        .route("/reload", post(reload))
        .route("/drain", post(drain))
        .route("/takeover", post(takeover))
        .route("/weight", post(weight))
        .method_not_allowed_fallback(post_required)
        .layer(DefaultBodyLimit::max(BODY))
        .route_layer(middleware::from_fn(allowed_hosts::refuse_web_pages))
        .with_state(ControlRoutes { live: Arc::clone(live), control })
}

async fn post_required(method: Method) -> Response {
    error_response(StatusCode::METHOD_NOT_ALLOWED, format!("method not allowed: use POST, found {method}"))
}

async fn reload(State(state): State<ControlRoutes>) -> Response {
    // A reload does not wait for a page to be rendered; control commands are serialized by their own lock.
    let control = state.control;
    match tokio::task::spawn_blocking(move || control.reload()).await {
        Ok(Ok(reloaded)) => Json(reloaded).into_response(),
        Ok(Err(refused)) => (StatusCode::CONFLICT, Json(refused)).into_response(),
        Err(error) => {
            tracing::error!(%error, "internal error during a reload");
            error_response(StatusCode::INTERNAL_SERVER_ERROR, "internal error; see the process log")
        }
    }
}

async fn drain(State(state): State<ControlRoutes>) -> Response {
    state.control.drain();
    Json(json!({ "draining": true })).into_response()
}

/// What a successor asks to speak from here on (RFC 9110, section 7.8).
const TAKEOVER: &str = "vestibule-takeover";

async fn takeover(State(state): State<ControlRoutes>, request: Request) -> Response {
    if request.headers().get(UPGRADE).is_none_or(|to| to != TAKEOVER) {
        const WANTED: &str = "reserved for the process that takes over: start it with vestibule serve \
                              --takeover and the path of this socket";
        return error_response(StatusCode::BAD_REQUEST, WANTED);
    }
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let upgraded = upgrade
            .await
            .ok()
            .and_then(|upgraded| upgraded.downcast::<TokioIo<TrackedStream<tokio::net::UnixStream>>>().ok());
        // The upgrade fails only if the peer has closed the connection.
        let stream = upgraded.and_then(|parts| parts.io.into_inner().into_stream());
        let Some(Ok(stream)) = stream.map(tokio::net::UnixStream::into_std) else { return };
        state.control.hand_over(stream);
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, TAKEOVER)], Body::empty())
        .into_response()
}

/// A request to set a backend's weight.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightRequest {
    pool: String,
    /// The backend's address, as metrics have it.
    backend: SocketAddr,
    weight: u32,
}

/// The answer to it.
#[derive(Debug, Serialize)]
struct WeightChanged {
    pool: String,
    backend: SocketAddr,
    /// The weight that was in force.
    from: u32,
    to: u32,
    /// Backends of the pool that get new sessions now.
    usable: usize,
}

async fn weight(State(state): State<ControlRoutes>, uri: Uri, body: Bytes) -> Response {
    const WANTED: &str =
        "must have pool, backend (address:port) and weight (0 to 1000), as a query or a JSON body";
    /// As in the configuration.
    const MOST: u32 = 1000;
    let read = if body.is_empty() {
        Query::<WeightRequest>::try_from_uri(&uri)
            .map(|Query(order)| order)
            .map_err(|error| error.body_text())
    } else {
        serde_json::from_slice::<WeightRequest>(&body).map_err(|error| error.to_string())
    };
    let order = match read {
        Ok(order) if order.weight <= MOST => order,
        Ok(order) => {
            return error_response(
                StatusCode::BAD_REQUEST,
                format!("{WANTED}, found the weight {}", order.weight),
            );
        }
        Err(error) => return error_response(StatusCode::BAD_REQUEST, format!("{WANTED}: {error}")),
    };
    match set_weight(&state.live, &order) {
        Ok(weighed) => Json(weighed).into_response(),
        Err(absent) => error_response(StatusCode::NOT_FOUND, absent),
    }
}

fn set_weight(live: &LiveState, order: &WeightRequest) -> Result<WeightChanged, String> {
    let snapshot = live.snapshot.load();
    let pool = snapshot.pools.iter().find(|pool| pool.label.name() == order.pool);
    let pool = pool.ok_or_else(|| format!("pool: must be a configured pool, found \"{}\"", order.pool))?;
    let changed = pool.override_weight(BackendAddr(order.backend), order.weight, clock::now());
    let (from, change) = changed.ok_or_else(|| {
        format!(
            "backend: must be the address of a backend of pool \"{}\", found {}",
            order.pool, order.backend
        )
    })?;
    change.log(pool);
    let WeightRequest { pool: name, backend, weight: to } = order;
    tracing::info!(pool = name, %backend, from, to, "backend weight set by the operator");
    Ok(WeightChanged { pool: name.clone(), backend: *backend, from, to: *to, usable: pool.usable() })
}
