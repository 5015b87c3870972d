//! The read-only pages: metrics for Prometheus, status as JSON, and a page for people.

pub mod health;
pub mod metrics;
mod page;
pub mod status;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use tokio::sync::Semaphore;

use crate::state::Live;

/// Serves the pages until its task is dropped.
pub async fn serve(socket: TcpListener, live: Arc<Live>) {
    if let Err(error) = pages(socket, live).await {
        tracing::error!(%error, "the admin pages have stopped");
    }
}

async fn pages(socket: TcpListener, live: Arc<Live>) -> io::Result<()> {
    let socket = tokio::net::TcpListener::from_std(socket)?;
    let router = Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Pages { live, turn: Arc::new(Semaphore::new(1)) });
    axum::serve(socket, router).await
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
