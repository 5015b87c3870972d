//! The process: sockets, worker threads, the control thread, and the way all of them end.

mod crew;
mod drain;
mod limits;
mod listen;
mod upkeep;
mod worker;
mod writer;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use self::drain::Stage;
use self::worker::Post;
use crate::account::log::QUEUE;
use crate::admin;
use crate::config::{Config, Drain};
use crate::probe::Lanes;
use crate::resolve::{NoServers, Resolver};
use crate::state::Live;

pub use self::limits::Capacity;

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address could not be bound.
    #[error("{what}: {address}: must be free and local, found: {error}")]
    Bind {
        /// Whose address it is, for instance `listener "web"`.
        what: String,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The access log's file could not be opened.
    #[error("log.access: {path}: must be a file that can be appended to, found: {error}")]
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
    /// A pool has names, and there is nobody to ask for them.
    #[error("dns.servers: must name a server where pools have host names, for {0}")]
    NoServers(#[from] NoServers),
    /// A thread or its runtime could not be made.
    #[error("a worker thread could not be started: {0}")]
    Thread(#[from] io::Error),
}

/// A running proxy. Dropping it ends every session at once; [`drain`](Self::drain) first is kinder.
#[derive(Debug)]
pub struct Server {
    live: Arc<Live>,
    listeners: Vec<(String, Vec<SocketAddr>)>,
    admin: SocketAddr,
    health: SocketAddr,
    stage: watch::Sender<Stage>,
    drain: watch::Sender<bool>,
    capacity: Capacity,
    threads: Vec<JoinHandle<()>>,
    /// Closed once the access log is written to its end.
    written: Option<Receiver<()>>,
}

/// How long the end waits for the access log to be written.
const LOG_END: Duration = Duration::from_secs(2);

impl Server {
    /// Binds every address, then starts the workers and the control thread.
    ///
    /// # Errors
    /// The first thing that the machine refused; nothing runs then.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let workers = limits::workers(config.process.workers);
        let sockets: usize = config.listeners.iter().map(|listener| listener.bind.len()).sum();
        let capacity = limits::capacity(config, workers, sockets)?;
        let live = Live::new(config, workers, capacity.sessions, capacity.pipes);
        let admin = listen::page("admin", config.admin.bind)?;
        let health = listen::page("health", config.health.bind)?;
        listen::try_sources(config)?;
        let named = live.snapshot.load().pools.iter().any(|pool| pool.names().count() > 0);
        let resolver = named.then(|| Resolver::new(&config.dns).map(Arc::new)).transpose()?;
        let doors = listen::doors(config, workers)?;
        let (stage, stages) = watch::channel(Stage::Serving);
        let (drain, drains) = watch::channel(false);
        let bound = doors.addresses.iter().map(|(_, addresses)| addresses.clone()).collect();
        live.bound.get_or_init(|| bound);
        let mut server = Self {
            live: Arc::clone(&live),
            listeners: doors.addresses,
            admin: local_address(&admin)?,
            health: local_address(&health)?,
            stage: stage.clone(),
            drain,
            capacity,
            threads: Vec::new(),
            written: None,
        };
        let (journal, written) =
            writer::open(&config.log.access, QUEUE * workers, Arc::clone(&live.log_lost))?;
        server.written = written;
        let crew = crew::Crew::new(workers);
        let (posts, boxes): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| mpsc::channel(worker::HANDED_OVER)).unzip();
        for ((number, doors), handed_over) in (0_u16..).zip(doors.sockets).zip(boxes) {
            let post = Post {
                number,
                live: Arc::clone(&live),
                crew: Arc::clone(&crew),
                doors,
                others: posts.clone(),
                handed_over,
                stages: stages.clone(),
                journal: journal.clone(),
            };
            server.threads.push(worker::spawn(post)?);
        }
        let control = Control {
            live,
            lanes: Arc::new(Lanes::new(capacity.probes)),
            resolver,
            crew,
            path: config.health.path.clone(),
            drain: config.drain,
            admin,
            health,
            stage,
            drains,
        };
        server.threads.push(control.spawn()?);
        Ok(server)
    }

    /// What all threads share.
    #[must_use]
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Every address that a listener accepts on, ports filled in. Empty for a name that is no listener's.
    #[must_use]
    pub fn addresses(&self, listener: &str) -> &[SocketAddr] {
        let found = self.listeners.iter().find(|(name, _)| name == listener);
        found.map_or(&[], |(_, addresses)| addresses)
    }

    /// Where metrics and status are read.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Where the load balancer's health check asks.
    #[must_use]
    pub fn health(&self) -> SocketAddr {
        self.health
    }

    /// What the process can carry, and why.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Starts to drain: notice, quiet, idle, deadline as configured. A second call changes nothing.
    pub fn drain(&self) {
        self.drain.send_replace(true);
    }

    /// Ends every session now.
    pub fn end(&self) {
        self.stage.send_replace(Stage::Over);
    }

    /// What [`end`](Self::end) does, for one who waits in [`join`](Self::join) elsewhere.
    pub fn ender(&self) -> impl Fn() + use<> {
        let stage = self.stage.clone();
        move || {
            stage.send_replace(Stage::Over);
        }
    }

    /// Waits until the last session has ended, which needs [`drain`](Self::drain) or [`end`](Self::end).
    pub fn join(mut self) {
        self.wait();
    }

    fn wait(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the process panicked");
            }
        }
        // A log that nobody reads must not keep the process from ending.
        let written = self.written.take().map(|written| written.recv_timeout(LOG_END));
        if let Some(Err(RecvTimeoutError::Timeout)) = written {
            tracing::error!("the access log does not take its last lines; they are lost");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        self.wait();
    }
}

fn local_address(socket: &TcpListener) -> Result<SocketAddr, StartError> {
    Ok(socket.local_addr()?)
}

/// What the control thread runs.
struct Control {
    live: Arc<Live>,
    lanes: Arc<Lanes>,
    resolver: Option<Arc<Resolver>>,
    crew: Arc<crew::Crew>,
    /// The path of the health check.
    path: String,
    drain: Drain,
    admin: TcpListener,
    health: TcpListener,
    stage: watch::Sender<Stage>,
    drains: watch::Receiver<bool>,
}

impl Control {
    fn spawn(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("control".to_owned()).spawn(move || runtime.block_on(self.run()))
    }

    /// Pages, probes and lookups, until the process is over.
    async fn run(self) {
        upkeep::start(&self.live, &self.lanes, self.resolver.as_ref());
        tokio::spawn(admin::serve(self.admin, Arc::clone(&self.live)));
        tokio::spawn(admin::health::serve(self.health, self.path, Arc::clone(&self.live)));
        drain::run(&self.drain, &self.live, &self.crew, self.stage, self.drains).await;
    }
}
