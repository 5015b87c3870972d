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
        .with_state(live);
    axum::serve(socket, router).await
}

async fn metrics(State(live): State<Arc<Live>>) -> Response {
    match metrics::text(&live) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn status(State(live): State<Arc<Live>>) -> Json<status::Status> {
    Json(status::Status::of(&live))
}

async fn page(State(live): State<Arc<Live>>) -> Html<String> {
    Html(page::html(&status::Status::of(&live)))
}
