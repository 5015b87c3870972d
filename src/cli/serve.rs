//! `vestibule serve`: the proxy, from its configuration to its last session.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::WorkerGuard;

use crate::config::{Config, Format, Level, Log};
use crate::server::{Server, StartError};
use crate::state::Live;

pub(super) fn run(path: &Path) -> ExitCode {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("{faults}");
            return ExitCode::FAILURE;
        }
    };
    let _writer = start_log(&config.log);
    match serve(&config, path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: &Config, path: &Path) -> Result<(), StartError> {
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
    let reload = Reload { path: path.to_owned(), live: Arc::clone(server.live()) };
    announce(&server, config);
    runtime.block_on(until_the_end(server, signals, &reload));
    tracing::info!("ended");
    Ok(())
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Waits for the next order to end; meanwhile SIGHUP reloads.
    async fn next(&mut self, reload: &Reload) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => reload.run(),
            }
        }
    }
}

/// What SIGHUP does.
struct Reload {
    path: PathBuf,
    live: Arc<Live>,
}

impl Reload {
    /// Reads the configuration again and puts it in force, as a whole or not at all.
    fn run(&self) {
        let config = match Config::load(&self.path) {
            Ok(config) => config,
            Err(faults) => {
                self.live.reloads.refuse();
                faults.iter().for_each(|fault| tracing::error!("{fault}"));
                tracing::error!(faults = faults.len(), "the reload is refused; what was in force stays");
                return;
            }
        };
        match self.live.reload(&config) {
            Ok(()) => tracing::info!(tenants = config.tenants.len(), "reloaded"),
            Err(frozen) => {
                tracing::error!("{frozen}");
                tracing::error!("the reload is refused; what was in force stays");
            }
        }
    }
}

/// The first signal drains, the second ends.
async fn until_the_end(server: Server, mut signals: Signals, reload: &Reload) {
    signals.next(reload).await;
    server.drain();
    let end = server.ender();
    let mut joined = tokio::task::spawn_blocking(move || server.join());
    let ended = tokio::select! {
        ended = &mut joined => ended,
        () = signals.next(reload) => {
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
    // A fault of ours is a line like any other: whoever collects the log reads no other form.
    std::panic::set_hook(Box::new(
        |fault| tracing::error!(%fault, "a fault in vestibule itself; please report it"),
    ));
    guard
}
