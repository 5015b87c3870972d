//! Reload: binds new sockets first, then applies the whole configuration at once.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::inherit::InheritedSockets;
use super::listen_sockets::{self, BoundListener, BoundSocket, ListenSocketId};
use super::worker_commands::WorkerCommands;
use super::worker_sockets::SocketCommand;
use super::{Capacity, StartError, rlimits};
use crate::account::lock;
use crate::clock;
use crate::config::{BackendTarget, Config, PoolConfig};
use crate::flow::SocketRetirement;
use crate::pool::Answers;
use crate::resolve::Resolver;
use crate::resolve::answer::LastAnswers;
use crate::state::{ChangeCount, ConfigChanges, LiveState, RestartNeeded};

/// How long a reload waits for names of pools without any other backend. The rest is resolved later.
const NAMES: Duration = Duration::from_secs(5);

/// What one reload may tell a worker: to open, and to close.
const ROOM: usize = 2;

/// Why a reload was refused; what was in force stays.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It changes what no reload changes.
    #[error(transparent)]
    Frozen(#[from] RestartNeeded),
    /// The machine has not what is new in it.
    #[error(transparent)]
    Machine(#[from] StartError),
    /// Too many reloads before it are not carried out yet.
    #[error("a worker is still applying the previous reload; try again")]
    Busy,
    /// Everything is on its way to a successor, which would not know of it.
    #[error("a takeover is in progress: reload the successor, or try again later")]
    TakeoverInProgress,
}

/// Applies configurations, from any thread.
#[derive(Clone)]
pub struct Reloader(Arc<ReloaderState>);

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader").finish_non_exhaustive()
    }
}

struct ReloaderState {
    live: Arc<LiveState>,
    held: Mutex<HeldListeners>,
    commands: Vec<mpsc::Sender<SocketCommand>>,
    resolver: Arc<OnceLock<Arc<Resolver>>>,
    capacity: Capacity,
    /// Told when there are other pools to be looked after.
    changed: Arc<Notify>,
}

/// Locked while a configuration is applied.
struct HeldListeners {
    /// Every listening address, each with a socket of every worker.
    sockets: Vec<BoundListener>,
    /// Whether they are a successor's, and stay as they are.
    are_leaving: bool,
}

/// The sockets to open and close for a configuration.
#[derive(Debug, Default)]
struct ListenerPlan {
    held: Vec<BoundListener>,
    /// For each worker.
    open: Vec<Vec<(u32, BoundSocket)>>,
    close: Vec<ListenSocketId>,
    /// By place.
    addresses: Vec<Vec<SocketAddr>>,
}

impl Reloader {
    pub(super) fn new(
        live: &Arc<LiveState>,
        held: Vec<BoundListener>,
        commands: Vec<mpsc::Sender<SocketCommand>>,
        resolver: &Arc<OnceLock<Arc<Resolver>>>,
        capacity: Capacity,
        changed: &Arc<Notify>,
    ) -> Self {
        Self(Arc::new(ReloaderState {
            live: Arc::clone(live),
            held: Mutex::new(HeldListeners { sockets: held, are_leaving: false }),
            commands,
            resolver: Arc::clone(resolver),
            capacity,
            changed: Arc::clone(changed),
        }))
    }

    /// Sends commands to the workers.
    pub(super) fn commands(&self) -> WorkerCommands {
        WorkerCommands::new(&self.0.commands)
    }

    /// All bound addresses.
    pub(super) fn listeners(&self) -> Vec<BoundListener> {
        lock(&self.0.held).sockets.clone()
    }

    /// Lets reloads through, or refuses them from now on and returns once one in progress has ended.
    pub(super) fn allow(&self, are_allowed: bool) {
        lock(&self.0.held).are_leaving = !are_allowed;
    }

    /// Puts another configuration in force, as a whole or not at all. Sessions keep what they were born with, but for their
    /// tenant's limits, which hold for them too. One is put in force at a time: others wait for their turn. It may take as
    /// long as a name's lookup, some seconds: where tasks share the thread, it belongs on one of its own.
    ///
    /// # Errors
    /// Why it was refused; nothing has changed then.
    pub fn reload(&self, config: &Arc<Config>) -> Result<ConfigChanges, ReloadError> {
        let changes = self.0.reload(config).inspect_err(|_| self.0.live.reloads.refuse())?;
        tracing::info!(
            tenants = config.tenants.len(),
            tenants_added = changes.tenants.added,
            tenants_removed = changes.tenants.removed,
            tenants_changed = changes.tenants.changed,
            pools_added = changes.pools.added,
            pools_removed = changes.pools.removed,
            pools_changed = changes.pools.changed,
            listeners_added = changes.listeners.added,
            listeners_removed = changes.listeners.removed,
            listeners_changed = changes.listeners.changed,
            "reloaded"
        );
        Ok(changes)
    }
}

impl ReloaderState {
    fn reload(&self, config: &Arc<Config>) -> Result<ConfigChanges, ReloadError> {
        let turn = self.live.begin_reload(config)?;
        let present = self.live.config.load_full();
        let mut held = lock(&self.held);
        // The configuration may have been read before the takeover began.
        if held.are_leaving {
            return Err(ReloadError::TakeoverInProgress);
        }
        let differing = config.pools.iter().filter(|pool| !present.pools.contains(pool));
        let differing: Vec<&PoolConfig> = differing.collect();
        listen_sockets::try_sources(differing.iter().copied())?;
        if self.resolver.get().is_none() && config.pools.iter().any(has_names) {
            let resolver =
                Arc::new(Resolver::new(&config.dns, self.live.own_addresses()).map_err(StartError::from)?);
            self.resolver.get_or_init(|| resolver);
        }
        // A worker that has ended is left out.
        if self.commands.iter().any(|commands| commands.capacity() < ROOM && !commands.is_closed()) {
            return Err(ReloadError::Busy);
        }
        let answers = answers(&self.live, config, &differing);
        // The last that may fail, and then close what it has bound: connections come to it from here on.
        let plan = self.plan(config, &turn.places(config), &held.sockets)?;
        let wanted = (plan.open.iter().any(|sockets| !sockets.is_empty()), !plan.close.is_empty());
        // No step after this one can fail.
        let changes = turn.put(config, plan.addresses, &answers, clock::now());
        let vacancies: Vec<_> = plan
            .close
            .into_iter()
            .map(|listen_socket| (listen_socket, SocketRetirement::new(self.commands.len())))
            .collect();
        for (commands, sockets) in self.commands.iter().zip(plan.open) {
            // This is the only sender, so there is room as before. Close first: flows of an address that another
            // listener has from now on stay where they are, and it goes on there.
            let closed =
                if wanted.1 { commands.try_send(SocketCommand::Close(vacancies.clone())) } else { Ok(()) };
            let opened = if wanted.0 { commands.try_send(SocketCommand::Open(sockets)) } else { Ok(()) };
            if closed.and(opened).is_err() {
                tracing::error!("a worker does not respond: its listening sockets are unchanged");
            }
        }
        if changes.listeners != ChangeCount::default() {
            self.warn_few_descriptors(config, plan.held.len());
        }
        held.sockets = plan.held;
        self.changed.notify_one();
        Ok(changes)
    }

    /// Binds what is not bound yet. An address that a listener keeps, keeps its sockets, and its port where that was free.
    fn plan(
        &self,
        config: &Config,
        places: &[u32],
        held: &[BoundListener],
    ) -> Result<ListenerPlan, StartError> {
        let workers = self.commands.len();
        let mut plan =
            ListenerPlan { open: (0..workers).map(|_| Vec::new()).collect(), ..ListenerPlan::default() };
        let mut rest = held.to_vec();
        let rows = places.iter().map(|place| *place as usize + 1).max().unwrap_or(0);
        plan.addresses.resize(rows.max(self.live.snapshot.load().listeners.len()), Vec::new());
        for (listener, place) in config.listeners.iter().zip(places) {
            for configured in &listener.bind {
                let is_it = |held: &BoundListener| {
                    held.socket.listener == *place
                        && held.socket.protocol == listener.protocol
                        && held.configured == *configured
                };
                let kept = rest.iter().position(is_it).map(|at| rest.swap_remove(at));
                let one = match kept {
                    Some(kept) => kept,
                    None => listen_sockets::bind(
                        listener,
                        *place,
                        *configured,
                        &mut plan.open,
                        &mut InheritedSockets::default(),
                    )?,
                };
                plan.addresses
                    .get_mut(*place as usize)
                    .into_iter()
                    .for_each(|all| all.push(one.socket.address));
                plan.held.push(one);
            }
        }
        plan.close = rest.into_iter().map(|held| held.socket).collect();
        Ok(plan)
    }

    /// Warns where listeners have taken descriptors that sessions were promised.
    fn warn_few_descriptors(&self, config: &Config, addresses: usize) {
        let promised = self.capacity.sessions;
        match rlimits::capacity(config, self.capacity.workers, addresses) {
            Ok(now) if now.possible >= promised => {}
            now => {
                let possible = now.map_or(0, |now| now.possible);
                tracing::warn!(
                    max_sessions = promised,
                    possible,
                    "with these listeners, max-sessions exceeds the file-descriptor limit"
                );
            }
        }
    }
}

fn has_names(pool: &PoolConfig) -> bool {
    pool.backends.iter().any(|backend| !matches!(backend.target, BackendTarget::Address(_)))
}

/// Resolves the names of pools that have no other backend. It waits for them on its own thread, as the caller that
/// reloads may stand in a task.
fn answers(live: &Arc<LiveState>, config: &Config, changed: &[&PoolConfig]) -> Answers {
    let present = live.config.load_full();
    let before = |pool: &PoolConfig| present.pools.iter().find(|other| other.name == pool.name);
    let has_backends = |pool: &PoolConfig| {
        pool.backends.iter().any(|backend| {
            let is_kept = || {
                before(pool)
                    .is_some_and(|before| before.backends.iter().any(|other| other.target == backend.target))
            };
            matches!(backend.target, BackendTarget::Address(_)) || is_kept()
        })
    };
    let alone = changed.iter().filter(|pool| !has_backends(pool));
    let targets: Vec<_> =
        alone.flat_map(|pool| &pool.backends).map(|backend| backend.target.clone()).collect();
    if targets.is_empty() {
        return Answers::new();
    }
    let asked = thread::scope(|scope| scope.spawn(|| ask(live, config, targets)).join());
    asked.unwrap_or_default()
}

fn ask(live: &Arc<LiveState>, config: &Config, targets: Vec<BackendTarget>) -> Answers {
    let mut answers = Answers::new();
    // Connections belong to the runtime that made them: these are not the ones that look names up later.
    let (Ok(runtime), Ok(resolver)) = (
        Builder::new_current_thread().enable_all().build(),
        Resolver::new(&config.dns, live.own_addresses()),
    ) else {
        return answers;
    };
    let resolver = Arc::new(resolver);
    runtime.block_on(async {
        let mut lookups = JoinSet::new();
        for target in targets {
            let resolver = Arc::clone(&resolver);
            lookups.spawn(async move {
                let answer = resolver.look_up(&target, &mut LastAnswers::default()).await;
                (target, answer)
            });
        }
        let all = async {
            while let Some(ended) = lookups.join_next().await {
                if let Ok((target, Ok(answer))) = ended {
                    answers.insert(target, answer.found);
                }
            }
        };
        if timeout(NAMES, all).await.is_err() {
            tracing::warn!(
                "names of new pools are not resolved yet: these pools have no backends until then"
            );
        }
    });
    answers
}
