//! `vestibule backend`: the other end of `vestibule load`.

use std::net::SocketAddr;
use std::process::ExitCode;

use crate::lab::backend::{Backend, Temper};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Where to listen, and the name to answer by: the pool's, so that `load` knows who should have answered
    #[arg(long, value_name = "NAME=ADDRESS", required = true, num_args = 1.., value_parser = named)]
    listen: Vec<(String, SocketAddr)>,
}

fn named(text: &str) -> Result<(String, SocketAddr), String> {
    let (name, address) = text.split_once('=').unwrap_or(("backend", text));
    let address =
        address.parse().map_err(|_| format!("must be an IP address and a port, found \"{address}\""))?;
    Ok((name.to_owned(), address))
}

pub(super) fn run(options: &Options) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> ExitCode {
    let mut backends = Vec::new();
    for (name, address) in &options.listen {
        match Backend::start_at(*address, name, Temper::Load).await {
            Ok(backend) => {
                println!("{name} listens on {}", backend.address());
                backends.push(backend);
            }
            Err(error) => {
                eprintln!("{name}: {address}: must be free and local, found: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    match tokio::signal::ctrl_c().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("no signals: {error}");
            ExitCode::FAILURE
        }
    }
}
