//! `vestibule serve`: the proxy, from its configuration to its last session.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::WorkerGuard;

use super::watch;
use crate::account::lock;
use crate::admin::control::Control as _;
use crate::build_info;
use crate::config::sources::ConfigSources;
use crate::config::{Config, ConfigErrors, LogConfig, LogFormat, LogLevel};
use crate::handover::TakeoverOffer;
use crate::server::inherit::InheritedSockets;
use crate::server::{
    ProcessControl, ScarcePorts, Server, StartError, StartOptions, failure, notify, scarce_ports,
};

pub(super) const EXAMPLES: &str = "Examples:\n  \
    vestibule serve --config config/minimal.toml\n  \
    vestibule serve --config config/minimal.toml --takeover /run/vestibule/admin.sock";

#[derive(Debug, clap::Args)]
pub(super) struct ServeOptions {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Take over from the process with this admin socket
    #[arg(long, value_name = "SOCKET")]
    takeover: Option<PathBuf>,
}

pub(super) fn run(options: &ServeOptions) -> ExitCode {
    let path = options.config.as_path();
    // First, while the process has one thread: this removes variables from the environment.
    let inherited = InheritedSockets::from_environment();
    // Before the configuration is read, which may take long: a signal then must not kill the process.
    let caught = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| SignalStreams::new(&runtime).map(|caught| (runtime, caught)));
    let (runtime, mut caught) = match caught {
        Ok(caught) => caught,
        Err(error) => {
            eprintln!("cannot install signal handlers: {error}");
            return ExitCode::FAILURE;
        }
    };
    let status = match runtime.block_on(read(path, &mut caught)) {
        Some(Ok((config, sources))) => begin(&runtime, caught, options, inherited, config, sources),
        Some(Err(faults)) => {
            eprintln!("{faults}");
            ExitCode::FAILURE
        }
        None => {
            eprintln!("ended by a signal while reading {}", path.display());
            ExitCode::SUCCESS
        }
    };
    // A thread that waits for a file system must not keep the process from ending.
    runtime.shutdown_background();
    status
}

/// Reads the configuration; `None` where a signal ends the process before it is read.
async fn read(
    path: &Path,
    caught: &mut SignalStreams,
) -> Option<Result<(Config, ConfigSources), ConfigErrors>> {
    let path = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || {
        // Recorded before the files are read, so that a change during the reading is noticed.
        let sources = ConfigSources::of(&path, &ConfigSources::default());
        Config::load(&path).map(|config| (config, sources))
    });
    tokio::select! {
        read = reading => match read {
            Ok(read) => Some(read),
            Err(fault) => std::panic::resume_unwind(fault.into_panic()),
        },
        _ = caught.terminate.recv() => None,
        _ = caught.interrupt.recv() => None,
    }
}

/// Starts the log, then serves; returns the exit status.
fn begin(
    runtime: &Runtime,
    caught: SignalStreams,
    options: &ServeOptions,
    inherited: io::Result<InheritedSockets>,
    config: Config,
    sources: ConfigSources,
) -> ExitCode {
    let writer = Arc::new(Mutex::new(Some(start_log(&config.log))));
    let flushed = Arc::clone(&writer);
    failure::before_exit(move || drop(lock(&flushed).take()));
    let started = inherited.map_err(StartError::Inherited).and_then(|inherited| {
        let takeover = options.takeover.as_deref().map(TakeoverOffer::ask).transpose()?;
        let start = StartOptions { source: Some(options.config.clone()), inherited, takeover };
        serve(runtime, caught, Arc::new(config), start, sources)
    });
    let status = match started {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    };
    drop(lock(&writer).take());
    status
}

fn serve(
    runtime: &Runtime,
    caught: SignalStreams,
    config: Arc<Config>,
    start: StartOptions,
    sources: ConfigSources,
) -> Result<(), StartError> {
    let (reloads, asked) = mpsc::channel(1);
    let (reopenings, asked_to_reopen) = mpsc::channel(1);
    let successor = SuccessorCommand { source: start.source.clone(), control: config.admin.socket.clone() };
    let signals = SignalLoop { signals: caught, successor, reloads, reopens: reopenings };
    let watched = start.source.clone().filter(|_| config.process.watch);
    let mut server = Server::start_with(&config, start)?;
    server.take_over()?;
    announce(&server, &config);
    // The server holds the configuration until a reload replaces it.
    drop(config);
    notify::ready();
    let reloads = carry_out_each(Arc::clone(server.control()), asked, |control| drop(control.reload()));
    runtime.spawn(failure::essential("reloads", reloads));
    // A task of its own: a reload may wait for DNS for seconds.
    let reopens = carry_out_each(Arc::clone(server.control()), asked_to_reopen, |control| {
        drop(control.reopen_access_log());
    });
    runtime.spawn(failure::essential("reopening of the access log", reopens));
    if let Some(main) = watched {
        let watching = watch::run(main, sources, Arc::clone(server.control()));
        runtime.spawn(failure::essential("the watch of configuration files", watching));
    }
    runtime.block_on(until_the_end(server, signals));
    tracing::info!("ended");
    Ok(())
}

/// The signals of `serve`. One that comes before it is waited for is kept, and several of a kind are one.
struct SignalStreams {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    reopen: Signal,
    upgrade: Signal,
}

impl SignalStreams {
    fn new(runtime: &Runtime) -> io::Result<Self> {
        let _context = runtime.enter();
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            reopen: signal(SignalKind::user_defined1())?,
            upgrade: signal(SignalKind::user_defined2())?,
        })
    }
}

struct SignalLoop {
    signals: SignalStreams,
    successor: SuccessorCommand,
    /// Has room for one reload beside the one that is carried out: it reads the newest files.
    reloads: mpsc::Sender<()>,
    /// The same for the access log's file.
    reopens: mpsc::Sender<()>,
}

/// The command line of the successor.
struct SuccessorCommand {
    source: Option<PathBuf>,
    control: Option<PathBuf>,
}

impl SuccessorCommand {
    /// Starts it from where this one was started: there is the new program by now.
    fn start(&self, tie: Option<&str>) {
        if let Some(tie) = tie {
            tracing::error!("SIGUSR2 is refused: {tie}");
            return;
        }
        let (Some(source), Some(control)) = (&self.source, &self.control) else {
            tracing::error!("SIGUSR2 is refused: a takeover needs admin.socket in the configuration");
            return;
        };
        let program = std::env::args_os().next().unwrap_or_else(|| "vestibule".into());
        let mut command = Command::new(program);
        // WATCHDOG_PID names this process: the successor would not answer systemd's watchdog with it.
        command
            .env_remove("WATCHDOG_PID")
            .arg("serve")
            .arg("--config")
            .arg(source)
            .arg("--takeover")
            .arg(control);
        match command.spawn() {
            Ok(mut child) => {
                tracing::info!(pid = child.id(), "successor started");
                // A thread waits for the child: a failure is logged, and no zombie process remains.
                std::thread::spawn(move || match child.wait() {
                    Ok(status) => tracing::error!(%status, "the successor exited; this process continues"),
                    Err(error) => tracing::error!(%error, "the exit status of the successor is unknown"),
                });
            }
            Err(error) => tracing::error!(%error, "cannot start a successor; this process continues"),
        }
    }
}

impl SignalLoop {
    /// Waits for the next order to end; meanwhile SIGHUP reloads, and SIGUSR1 opens the access log's file anew.
    async fn next(&mut self, control: &ProcessControl) {
        loop {
            tokio::select! {
                _ = self.signals.terminate.recv() => return,
                _ = self.signals.interrupt.recv() => return,
                _ = self.signals.reopen.recv() => self.reopens.try_send(()).unwrap_or_default(),
                _ = self.signals.upgrade.recv() => self.successor.start(control.takeover_obstacle()),
                // Not run here: a reload may wait for DNS, and a signal to end must not wait for it.
                _ = self.signals.hangup.recv() => self.reloads.try_send(()).unwrap_or_default(),
            }
        }
    }

    /// The first signal drains, the second ends. One that comes after `POST /drain` is the first: who stops a process by
    /// both, as Kubernetes does with a hook, must not cut off what drains.
    async fn carry_out(&mut self, control: &Arc<ProcessControl>, end: impl Fn()) {
        self.next(control).await;
        control.drain();
        self.next(control).await;
        tracing::warn!("second signal: stopping immediately");
        end();
        std::future::pending::<()>().await;
    }
}

/// Carries out an order each time that it is asked for, one after the other.
async fn carry_out_each(
    control: Arc<ProcessControl>,
    mut asked: mpsc::Receiver<()>,
    order: fn(&ProcessControl),
) {
    while asked.recv().await.is_some() {
        let control = Arc::clone(&control);
        // `order` logs and counts the result.
        if let Err(error) = tokio::task::spawn_blocking(move || order(&control)).await {
            tracing::error!(%error, "internal error while handling a signal");
        }
    }
}

async fn until_the_end(server: Server, mut signals: SignalLoop) {
    let (control, end) = (Arc::clone(server.control()), server.end_fn());
    let joined = tokio::task::spawn_blocking(move || server.join());
    let ended = tokio::select! {
        ended = joined => ended,
        () = signals.carry_out(&control, end) => Ok(()),
    };
    if let Err(error) = ended {
        tracing::error!(%error, "the shutdown was not clean");
    }
}

fn announce(server: &Server, config: &Config) {
    let capacity = server.capacity();
    for listener in &config.listeners {
        tracing::info!(listener = listener.name, addresses = ?server.addresses(&listener.name), "listening");
    }
    tracing::info!(
        version = build_info::VERSION,
        commit = build_info::COMMIT,
        workers = capacity.workers,
        max_sessions = capacity.sessions,
        max_pending = capacity.pending,
        file_descriptors = capacity.descriptors,
        tenants = config.tenants.len(),
        admin = %server.admin(),
        health = %server.health(),
        admin_socket = config.admin.socket.as_ref().map(|path| path.display().to_string()),
        "serving"
    );
    if capacity.sessions > capacity.possible {
        tracing::warn!(
            max_sessions = capacity.sessions,
            possible = capacity.possible,
            "max-sessions exceeds the file-descriptor limit: raise LimitNOFILE"
        );
    }
    let live = server.live();
    for ScarcePorts { pool, possible, message } in scarce_ports(config, &live.ports, &live.udp_ports) {
        tracing::warn!(pool, possible, "{message}");
    }
}

/// Starts the process log. Its lines go to a thread of their own and, where that is behind, are dropped: a standard
/// error without a reader must not block workers or the health check. The guard writes what is left.
fn start_log(log: &LogConfig) -> WorkerGuard {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Standard output is the access log's.
    let (writer, guard) = tracing_appender::non_blocking(io::stderr());
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(writer);
    match log.format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).init(),
    }
    // A panic is logged in the configured format: log collectors read no other form.
    std::panic::set_hook(Box::new(|fault| tracing::error!(%fault, "internal error; please report it")));
    guard
}
