//! The process: sockets, worker threads, the control thread, and their shutdown.

mod admin_socket;
mod control;
mod drain;
pub mod failure;
pub(crate) mod inherit;
mod listen_sockets;
pub(crate) mod log_writer;
pub(crate) mod notify;
mod pool_supervisor;
mod reload;
mod rlimits;
mod server_worker;
mod takeover;
mod worker;
mod worker_commands;
mod worker_sockets;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};

use self::drain::WorkerStage;
use self::failure::EssentialTask;
use self::inherit::InheritedSockets;
use self::listen_sockets::BoundSocket;
use self::pool_supervisor::PoolContext;
use self::takeover::TakeoverProcess;
use self::worker::WorkerSetup;
use self::worker_sockets::ORDERS;
use crate::admin::{self, AdminListeners, ServingSwitch};
use crate::config::{Config, HealthConfig};
use crate::handover::give::Handover;
use crate::handover::records::PendingTransfer;
use crate::handover::transfers::{Departures, TransferCommand, TransferControl};
use crate::handover::{self, TakeoverError, TakeoverOffer};
use crate::probe::ProbeSlots;
use crate::resolve::{NoServers, Resolver};
use crate::state::worker_loads::WorkerLoads;
use crate::state::{ConfigChanges, ListenerState, LiveState, ProcessLimits};

pub use self::admin_socket::SocketFile;
pub use self::control::ProcessControl;
pub use self::reload::{ReloadError, Reloader};
pub use self::rlimits::{Capacity, ScarcePorts, scarce_ports};

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address could not be bound.
    #[error("{what}: cannot bind {address}: {error}")]
    Bind {
        /// Whose address it is, for instance `listener "web"`.
        what: String,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The admin socket could not be opened.
    #[error("admin.socket: cannot create {}: found {found}", path.display())]
    AdminSocket {
        /// Its path.
        path: PathBuf,
        /// What is there instead, and what to do.
        found: String,
    },
    /// What was passed is no socket.
    #[error("LISTEN_FDS: must pass listening sockets only, found: {0}")]
    Inherited(io::Error),
    /// Sockets were passed that are not configured.
    #[error(
        "LISTEN_FDS: must pass sockets of configured addresses only, found {}; configure these addresses, \
         or remove them from the socket units",
        .0.join(", ")
    )]
    Unmatched(Vec<String>),
    /// The access log's file could not be opened.
    #[error("log.access: cannot append to {path}: {error}")]
    AccessLog {
        /// The file.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The descriptor limit is too low for any session.
    #[error(
        "the file-descriptor limit: must be at least {needed}, found {found}; raise LimitNOFILE or ulimit -n"
    )]
    Descriptors {
        /// What these listeners and workers take.
        needed: u64,
        /// The hard limit.
        found: u64,
    },
    /// A pool has names, and there is no DNS server.
    #[error("dns.servers: must name a server because pools have host names: {0}")]
    NoServers(#[from] NoServers),
    /// There is nothing to take over.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// A thread or its runtime could not be made.
    #[error("cannot start a worker thread: {0}")]
    Thread(#[from] io::Error),
}

/// A running proxy. Dropping it ends every session at once; call [`drain`](Self::drain) first for a graceful end.
#[derive(Debug)]
pub struct Server {
    live: Arc<LiveState>,
    admin: SocketAddr,
    health: SocketAddr,
    transfer: Arc<TransferControl>,
    capacity: Capacity,
    threads: Vec<JoinHandle<()>>,
    /// Closed once the access log is written to its end.
    written: Option<Receiver<()>>,
    control: Arc<ProcessControl>,
    process: Arc<TakeoverProcess>,
    loads: Arc<WorkerLoads>,
    takeover: Option<TakeoverOffer>,
}

/// Optional inputs of a server's start.
#[derive(Debug, Default)]
pub struct StartOptions {
    /// The file that a reload reads again; without one, each reload is refused.
    pub source: Option<PathBuf>,
    /// Sockets that are bound already.
    pub inherited: InheritedSockets,
    /// What another process has; its sockets stand for those above. Nothing is accepted then before
    /// [`take_over`](Server::take_over).
    pub takeover: Option<TakeoverOffer>,
}

/// All sockets that are bound.
struct BoundSockets {
    admin: TcpListener,
    health: TcpListener,
    control: Option<AdminSocket>,
    /// The file of that one, where this process has to remove it.
    file: Option<SocketFile>,
    listeners: listen_sockets::ListenSockets,
}

impl BoundSockets {
    fn bind(config: &Config, workers: usize, inherited: &mut InheritedSockets) -> Result<Self, StartError> {
        let admin = listen_sockets::page("admin", config.admin.bind, inherited)?;
        let health = listen_sockets::page("health", config.health.bind, inherited)?;
        // After the address of the pages, which no second process of the same configuration gets.
        let (control, file) = admin_socket(config, inherited)?.unzip();
        listen_sockets::try_sources(&config.pools)?;
        let sockets = listen_sockets::bind_all(config, workers, inherited)?;
        let unmatched = inherited.rest();
        if unmatched.is_empty() {
            Ok(Self { admin, health, control, file: file.flatten(), listeners: sockets })
        } else {
            Err(StartError::Unmatched(unmatched))
        }
    }
}

/// How long the end waits for the access log to be written.
const LOG_END: Duration = Duration::from_secs(2);

impl Server {
    /// Binds every address, then starts the workers and the control thread.
    ///
    /// # Errors
    /// The first thing that the machine refused; nothing runs then.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        Self::start_with(&Arc::new(config.clone()), StartOptions::default())
    }

    /// [`start`](Self::start), with more than a configuration.
    ///
    /// # Errors
    /// As there; and where a socket was passed that no address asks for.
    pub fn start_with(config: &Arc<Config>, start: StartOptions) -> Result<Self, StartError> {
        let StartOptions { source, mut inherited, mut takeover } = start;
        let obstacle = handover::takeover_obstacle(takeover.is_some());
        if let Some(takeover) = &mut takeover {
            inherited = InheritedSockets::offered(takeover.take_sockets());
        }
        let workers = rlimits::workers(config.process.workers);
        let sockets: usize = config.listeners.iter().map(|listener| listener.bind.len()).sum();
        let capacity = rlimits::capacity(config, workers, sockets)?;
        let most =
            ProcessLimits { sessions: capacity.sessions, pending: capacity.pending, pipes: capacity.pipes };
        let live = LiveState::of(Arc::clone(config), workers, most);
        let BoundSockets { admin, health, control, file, listeners: sockets } =
            BoundSockets::bind(config, workers, &mut inherited)?;
        let resolver = first_resolver(config, &live)?;
        let (stage, stages) = watch::channel(WorkerStage::Serving);
        let (drain, drains) = watch::channel(false);
        let (serving, turn) = watch::channel(takeover.is_none());
        let pages = takeover::pages(config, [&admin, &health], control.as_ref(), file.is_some())?;
        live.pages.set([local_address(&admin)?, local_address(&health)?]).unwrap_or_default();
        live.bound.store(Arc::new(sockets.addresses(config.listeners.len())));
        let loads = WorkerLoads::new(workers);
        let (transfer, ears) = TransferControl::new(workers, &loads);
        let (to_doors, told): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(ORDERS)).unzip();
        let changed = Arc::new(Notify::new());
        let reloader = Reloader::new(&live, sockets.held, to_doors, &resolver, capacity, &changed);
        let process = Arc::new(TakeoverProcess {
            live: Arc::clone(&live),
            reloader,
            pages,
            serving,
            stage: stage.clone(),
            drain,
            file,
        });
        let handover =
            Handover::new(&live, &loads, &transfer, Arc::<TakeoverProcess>::clone(&process), obstacle);
        let orders = Arc::new(ProcessControl::new(Arc::clone(&process), source, handover));
        let mut server = Self {
            live: Arc::clone(&live),
            admin: local_address(&admin)?,
            health: local_address(&health)?,
            transfer,
            capacity,
            threads: Vec::new(),
            written: None,
            control: Arc::clone(&orders),
            process,
            loads: Arc::clone(&loads),
            takeover,
        };
        let ears = told.into_iter().zip(ears);
        server.start_workers(config, sockets.sockets, ears, &stages)?;
        let control = ControlThread {
            pools: PoolContext { live, probe_slots: Arc::new(ProbeSlots::new(capacity.probes)), resolver },
            changed,
            loads,
            admin: AdminListeners {
                address: admin,
                hosts: config.admin.hosts.clone(),
                socket: control,
                control: orders,
                serving: ServingSwitch::new(turn),
            },
            health: (health, config.health.clone()),
            stage,
            drains,
        };
        server.threads.push(control.spawn()?);
        Ok(server)
    }

    /// Opens the access log, and starts a worker for each set of sockets, with the ears that it has for orders.
    fn start_workers(
        &mut self,
        config: &Config,
        sockets: Vec<Vec<(u32, BoundSocket)>>,
        ears: impl Iterator<
            Item = (mpsc::Receiver<worker_sockets::SocketCommand>, mpsc::Receiver<TransferCommand>),
        >,
        stages: &watch::Receiver<WorkerStage>,
    ) -> Result<(), StartError> {
        let mut access_log = None;
        if let Some(log) = log_writer::open(&config.log.access, sockets.len(), Arc::clone(&self.live.log))? {
            self.written = Some(log.written);
            self.control.set_access_log(log.reopener);
            access_log = Some(log.sender);
        }
        let (setups, boxes): (Vec<_>, Vec<_>) =
            sockets.iter().map(|_| mpsc::channel(server_worker::HANDED_OVER)).unzip();
        for (((number, sockets), handed_over), (orders, moves)) in (0_u16..).zip(sockets).zip(boxes).zip(ears)
        {
            let setup = WorkerSetup {
                number,
                live: Arc::clone(&self.live),
                loads: Arc::clone(&self.loads),
                sockets,
                others: setups.clone(),
                handed_over,
                commands: orders,
                transfers: moves,
                accepts: self.takeover.is_none(),
                stages: stages.clone(),
                access_log: access_log.clone(),
            };
            self.threads.push(worker::spawn(setup)?);
        }
        Ok(())
    }

    /// The state shared by all threads.
    #[must_use]
    pub fn live(&self) -> &Arc<LiveState> {
        &self.live
    }

    /// Puts another configuration in force: what [`Reloader::reload`] does.
    ///
    /// # Errors
    /// Why it was refused; nothing has changed then.
    pub fn reload(&self, config: &Arc<Config>) -> Result<ConfigChanges, ReloadError> {
        self.process.reloader.reload(config)
    }

    /// Every address that a listener accepts on, ports filled in. Empty for a name that is no listener's.
    #[must_use]
    pub fn addresses(&self, listener: &str) -> Vec<SocketAddr> {
        let (snapshot, bound) = (self.live.snapshot.load(), self.live.bound.load());
        let is_it = |row: &&ListenerState| !row.is_retired && row.label.name() == listener;
        let place = snapshot.listeners.iter().position(|row| is_it(&row));
        place.and_then(|place| bound.get(place).cloned()).unwrap_or_default()
    }

    /// The admin address.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The health endpoint's address.
    #[must_use]
    pub fn health(&self) -> SocketAddr {
        self.health
    }

    /// The capacity of the process.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The control handle for reloads, drains and handovers.
    #[must_use]
    pub fn control(&self) -> &Arc<ProcessControl> {
        &self.control
    }

    /// From now on every session that forwards, and every flow, leaves through what this returns, and ends here once its
    /// answer says that it was taken. Clients' datagrams wait in the listening sockets meanwhile.
    pub async fn start_transfer(&self) -> Departures {
        self.transfer.start().await
    }

    /// Whatever has not left stays, and all goes on as before.
    pub async fn stop_transfer(&self) {
        self.transfer.stop(true).await;
    }

    /// Goes on with a session or flow of another process, and answers that.
    pub async fn accept_transfer(&self, leaving: PendingTransfer) {
        self.transfer.take_over(leaving).await;
    }

    /// Takes over from the process whose [offer](StartOptions::takeover) this one was started with: returns once that accepts
    /// no more, and this one does. What lives there comes meanwhile. Nothing where there is none.
    ///
    /// # Errors
    /// The old process does not stop, and goes on as if nothing had happened.
    pub fn take_over(&mut self) -> Result<(), TakeoverError> {
        let Some(takeover) = self.takeover.take() else { return Ok(()) };
        takeover.complete(&self.live, &self.transfer, Arc::<TakeoverProcess>::clone(&self.process))
    }

    /// Starts to drain: notice, quiet, idle, deadline as configured. A second call changes nothing.
    pub fn drain(&self) {
        self.process.drain.send_replace(true);
    }

    /// Ends every session at once.
    pub fn end(&self) {
        self.process.stage.send_replace(WorkerStage::Over);
    }

    /// A closure that does [`end`](Self::end), while another thread waits in [`join`](Self::join).
    pub fn end_fn(&self) -> impl Fn() + use<> {
        let stage = self.process.stage.clone();
        move || {
            stage.send_replace(WorkerStage::Over);
        }
    }

    /// Waits until the last session has ended, which needs [`drain`](Self::drain) or [`end`](Self::end).
    pub fn join(mut self) {
        self.wait();
    }

    fn wait(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread panicked");
            }
        }
        // The writer ends when the last sender is dropped.
        self.control.set_access_log(None);
        // A log without a reader must not keep the process from ending.
        let written = self.written.take().map(|written| written.recv_timeout(LOG_END));
        if let Some(Err(RecvTimeoutError::Timeout)) = written {
            tracing::error!("cannot write the last lines of the access log; they are lost");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        self.wait();
    }
}

/// A resolver, where names are configured.
fn first_resolver(config: &Config, live: &Arc<LiveState>) -> Result<Arc<OnceLock<Arc<Resolver>>>, NoServers> {
    let resolver = Arc::new(OnceLock::new());
    if live.snapshot.load().pools.iter().any(|pool| pool.names().count() > 0) {
        let first = Arc::new(Resolver::new(&config.dns, live.own_addresses())?);
        resolver.get_or_init(|| first);
    }
    Ok(resolver)
}

fn local_address(socket: &TcpListener) -> Result<SocketAddr, StartError> {
    Ok(socket.local_addr()?)
}

type AdminSocket = (UnixListener, PathBuf);

/// The admin socket with its path, where one is configured, and its file, where that is this process's to remove.
fn admin_socket(
    config: &Config,
    inherited: &mut InheritedSockets,
) -> Result<Option<(AdminSocket, Option<SocketFile>)>, StartError> {
    let Some(path) = config.admin.socket.clone() else { return Ok(None) };
    let refused = |error: io::Error| StartError::AdminSocket { path: path.clone(), found: error.to_string() };
    if let Some(socket) = inherited.unix(&path).map_err(refused)? {
        let file = if inherited.has_file { SocketFile::of_another(&path) } else { None };
        return Ok(Some(((socket, path), file)));
    }
    let (socket, file) = admin_socket::open(&path)?;
    Ok(Some(((socket, path), Some(file))))
}

/// The tasks of the control thread.
struct ControlThread {
    pools: PoolContext,
    changed: Arc<Notify>,
    loads: Arc<WorkerLoads>,
    admin: AdminListeners,
    health: (TcpListener, HealthConfig),
    stage: watch::Sender<WorkerStage>,
    drains: watch::Receiver<bool>,
}

impl ControlThread {
    fn spawn(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            let _vital = EssentialTask::new("the control thread");
            runtime.block_on(self.run());
            // A reload that waits for a file system must not keep the process from ending.
            runtime.shutdown_background();
        })
    }

    /// Pages, probes and lookups, until the process is over.
    async fn run(self) {
        let live = &self.pools.live;
        pool_supervisor::start(&self.pools, self.changed);
        let turn = self.admin.serving.clone();
        let stages = self.stage.subscribe();
        let spawn = |what, task: Pin<Box<dyn Future<Output = ()> + Send>>| {
            tokio::spawn(failure::lasting(what, stages.clone(), task));
        };
        let (health, path) = self.health;
        spawn("the admin pages", Box::pin(admin::serve(self.admin, Arc::clone(live))));
        tokio::spawn(log_writer::report_missing_lines(Arc::clone(&live.log)));
        spawn("systemd notification", Box::pin(notify::run(Arc::clone(live), Arc::clone(&self.loads))));
        spawn("the health check", Box::pin(admin::health::serve(health, path, Arc::clone(live), turn)));
        drain::run(live, &self.loads, self.stage, self.drains).await;
    }
}
