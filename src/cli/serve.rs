//! `vestibule serve`: the proxy, from its configuration to its last session.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::WorkerGuard;

use crate::config::{Config, Format, Level, Log};
use crate::server::{Server, StartError};

pub(super) fn run(path: &Path) -> ExitCode {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("{faults}");
            return ExitCode::FAILURE;
        }
    };
    let _writer = start_log(&config.log);
    match serve(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: &Config) -> Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The signals are caught before the first thread serves: none can come too early.
    let signals = {
        let _context = runtime.enter();
        Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        }
    };
    let server = Server::start(config)?;
    announce(&server, config);
    runtime.block_on(until_the_end(server, signals));
    tracing::info!("ended");
    Ok(())
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Waits for the next order to end. SIGHUP means a reload elsewhere, and must not end a proxy that has none yet.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => tracing::warn!("SIGHUP: this version does not reload; restart it instead"),
            }
        }
    }
}

/// The first signal drains, the second ends.
async fn until_the_end(server: Server, mut signals: Signals) {
    signals.next().await;
    server.drain();
    let end = server.ender();
    let mut joined = tokio::task::spawn_blocking(move || server.join());
    let ended = tokio::select! {
        ended = &mut joined => ended,
        () = signals.next() => {
            tracing::warn!("a second signal: ending now");
            end();
            joined.await
        }
    };
    if let Err(error) = ended {
        tracing::error!(%error, "the end was not orderly");
    }
}

fn announce(server: &Server, config: &Config) {
    let capacity = server.capacity();
    for listener in &config.listeners {
        tracing::info!(listener = listener.name, addresses = ?server.addresses(&listener.name), "listening");
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = capacity.workers,
        max_sessions = capacity.sessions,
        file_descriptors = capacity.descriptors,
        tenants = config.tenants.len(),
        admin = %server.admin(),
        health = %server.health(),
        "serving"
    );
    if capacity.sessions > capacity.possible {
        tracing::warn!(
            max_sessions = capacity.sessions,
            possible = capacity.possible,
            "max-sessions is more than the file-descriptor limit allows: raise LimitNOFILE"
        );
    }
}

/// Starts the process log. Its lines go to a thread of their own and, where that is behind, are dropped: a standard
/// error that nobody reads must hold up neither workers nor the health check. The guard writes what is left.
fn start_log(log: &Log) -> WorkerGuard {
    let level = match log.level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    // Standard output is the access log's.
    let (writer, guard) = tracing_appender::non_blocking(io::stderr());
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(writer);
    match log.format {
        Format::Json => builder.json().flatten_event(true).init(),
        Format::Text => builder.with_ansi(io::stderr().is_terminal()).init(),
    }
    guard
}
