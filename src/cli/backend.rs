//! `vestibule backend`: the other end of `vestibule load`.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use crate::lab::backend::{BackendBehavior, DatagramBackend, DatagramBehavior, TestBackend};

#[derive(Debug, clap::Args)]
pub(super) struct BackendOptions {
    /// Name (the pool's, which `load` compares) and address to listen on
    #[arg(long, value_name = "NAME=ADDRESS", required_unless_present = "udp", num_args = 1.., value_parser = named)]
    listen: Vec<(String, SocketAddr)>,
    /// Name and address on which UDP datagrams are echoed
    #[arg(long, value_name = "NAME=ADDRESS", num_args = 1.., value_parser = named)]
    udp: Vec<(String, SocketAddr)>,
}

pub(super) fn named(text: &str) -> Result<(String, SocketAddr), String> {
    let (name, address) = text.split_once('=').unwrap_or(("backend", text));
    Ok((name.to_owned(), self::address(address)?))
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("must be an IP address and a port, such as \"127.0.0.1:8080\", found \"{text}\"")
    })
}

pub(super) fn run(options: &BackendOptions) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(serve(options))
}

/// Starts each; or says which one could not be started.
pub(super) async fn start(named: &[(String, SocketAddr)]) -> Result<Vec<TestBackend>, String> {
    let mut backends = Vec::new();
    for (name, address) in named {
        let backend = TestBackend::start_at(*address, name, BackendBehavior::Load).await;
        backends.push(backend.map_err(|error| unusable(name, *address, &error))?);
    }
    Ok(backends)
}

/// The same for datagrams.
pub(super) async fn start_udp(named: &[(String, SocketAddr)]) -> Result<Vec<DatagramBackend>, String> {
    let mut backends = Vec::new();
    for (name, address) in named {
        let backend = DatagramBackend::start_at(*address, name, DatagramBehavior::Echo).await;
        backends.push(backend.map_err(|error| unusable(name, *address, &error))?);
    }
    Ok(backends)
}

fn unusable(name: &str, address: SocketAddr, error: &io::Error) -> String {
    format!("{name}: cannot bind {address}: {error}")
}

async fn serve(options: &BackendOptions) -> ExitCode {
    let started = async { Ok((start(&options.listen).await?, start_udp(&options.udp).await?)) };
    // Held until the end.
    let (backends, of_datagrams) = match started.await {
        Ok(backends) => backends,
        Err(fault) => {
            let fault: String = fault;
            eprintln!("{fault}");
            return ExitCode::FAILURE;
        }
    };
    for backend in &backends {
        println!("{} listens on {}", backend.name(), backend.address());
    }
    for backend in &of_datagrams {
        println!("{} listens on {}, udp", backend.name(), backend.address());
    }
    match tokio::signal::ctrl_c().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("no signals: {error}");
            ExitCode::FAILURE
        }
    }
}
