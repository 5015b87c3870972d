//! Local ports towards each backend: which one a connection gets, and how many one tenant may hold.
//!
//! A TCP connection is identified by both addresses and both ports, so that each pair of a source address and a backend
//! has the whole range of local ports for itself. Left alone, the kernel tries one port after the other
//! (`__inet_hash_connect` in net/ipv4/`inet_hashtables.c`): thousands of steps within `connect()` once more than half of
//! them are in use, and a port in TIME_WAIT counts as in use. Here the port is chosen first, the one that has been free
//! for longest, and the kernel is asked for that one alone.
//!
//! A port is live while its connection is, and then waits as long as the kernel keeps it in TIME_WAIT, where our side
//! closed first. Both count against the tenant whose session used it.
//!
//! The kernel gives the port of a UDP socket to no other socket of the same source address, whatever the backend
//! (`udp_lib_get_port` in net/ipv4/udp.c), and finds a free one within a few steps unless nearly all are in use. So UDP
//! ports are counted by source address alone, and the kernel chooses them.

mod local_port;
mod order;
mod system;

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};

pub use self::local_port::LocalPort;
use self::order::{PortOrder, UsedPorts};
pub use self::system::{LocalPortRange, TimeWaitReuse};
use crate::account::lock;
use crate::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::clock::Moment;
use crate::fair_share;

/// The tenant that the ports of probes are counted for.
pub const PROBES: u32 = u32::MAX;

/// What stands for the backend in the account of UDP ports: they are the same for all backends.
pub const EVERY_BACKEND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Of the UDP ports, one in so many is left to lookups of names, probes and other processes.
const UDP_RESERVE: usize = 64;

/// One unit of the time that ports wait, a tenth of a second, in nanoseconds.
const TICK_NANOS: u64 = 100_000_000;

/// Ticks that the kernel may keep a connection in TIME_WAIT, and that a free port rests where there are others: the backend
/// may keep the connection for as long. They are the 60 s of `TCP_TIMEWAIT_LEN` (include/net/tcp.h) and what a timer of that
/// length may be late: 5.12 s with `CONFIG_HZ=100`, 4.1 s with 1000 (the levels in kernel/time/timer.c). A port that is
/// taken earlier is refused by the kernel.
const TIME_WAIT: u32 = 660;

/// Ticks after which the kernel reuses a port in TIME_WAIT where `tcp_tw_reuse` allows it: a second
/// (`tcp_twsk_unique` in net/ipv4/`tcp_ipv4.c`), and the inaccuracy of a tick.
const REUSE_WAIT: u32 = 12;

/// Maps of spaces: a session locks one of them, once.
const SHARDS: usize = 16;

/// Ports whose wait ends in one call, so that no call takes long; more than one call can add.
const SETTLE: usize = 64;

/// The settings that all spaces share.
#[derive(Debug)]
struct PortSettings {
    range: LocalPortRange,
    reuse: TimeWaitReuse,
    /// Whether these are ports of UDP sockets.
    is_udp: bool,
    /// The present, in ticks.
    tick: AtomicU32,
    /// Whether the kernel takes a port that is chosen here (`IP_LOCAL_PORT_RANGE`, Linux 6.3).
    chooses: AtomicBool,
}

impl PortSettings {
    fn tick(&self) -> u32 {
        self.tick.load(Ordering::Relaxed)
    }

    fn chooses(&self) -> bool {
        self.chooses.load(Ordering::Relaxed)
    }

    /// Ports that may be in use in one space. Where the kernel chooses for TCP, three quarters of the half that it tries
    /// first: its search stays short (`__inet_hash_connect` goes through the other half only once that one is full).
    fn limit(&self) -> usize {
        let count = self.range.len();
        match (self.is_udp, self.chooses()) {
            (true, _) => count - count.div_ceil(UDP_RESERVE),
            (false, true) => count,
            (false, false) => count / 2 * 3 / 4,
        }
    }
}

/// A source address, or the system's choice, and a backend.
type Pair = (Option<IpAddr>, SocketAddr);

/// The spaces of all pairs of source address and backend that are in use.
#[derive(Debug)]
pub struct LocalPorts {
    shared: Arc<PortSettings>,
    hasher: std::hash::RandomState,
    shards: [Mutex<HashMap<Pair, Arc<PortSpace>>>; SHARDS],
    /// The shard that is looked through next for spaces that nothing is known of any more.
    next: AtomicU32,
}

impl LocalPorts {
    /// Nothing is in use yet.
    #[must_use]
    pub fn new(range: LocalPortRange, reuse: TimeWaitReuse) -> Self {
        Self::of(range, reuse, false)
    }

    /// The account of the UDP ports of a range, of which none is in use yet.
    #[must_use]
    pub fn udp(range: LocalPortRange) -> Self {
        // A UDP port is free as soon as its socket is closed.
        Self::of(range, TimeWaitReuse::Never, true)
    }

    fn of(range: LocalPortRange, reuse: TimeWaitReuse, is_udp: bool) -> Self {
        let (tick, chooses) = (AtomicU32::new(0), AtomicBool::new(!is_udp));
        let shared = PortSettings { range, reuse, is_udp, tick, chooses };
        Self {
            shared: Arc::new(shared),
            hasher: std::hash::RandomState::new(),
            shards: Default::default(),
            next: AtomicU32::new(0),
        }
    }

    /// The range of local ports.
    #[must_use]
    pub fn range(&self) -> &LocalPortRange {
        &self.shared.range
    }

    /// Ports that may be in use from one source address to one backend; of UDP, to all backends.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.shared.limit()
    }

    /// The kernel does not take a port that is chosen here: from now on it chooses, and fewer are used.
    pub fn leave_choice_to_kernel(&self) {
        self.shared.chooses.store(false, Ordering::Relaxed);
    }

    /// The ports from a source address, or the one that the system chooses, to a backend.
    #[must_use]
    pub fn space(&self, source: Option<IpAddr>, backend: SocketAddr) -> Arc<PortSpace> {
        let pair = (source, backend);
        let hash = self.hasher.hash_one(pair);
        let [shard, ..] = hash.to_le_bytes();
        // A remainder is a place.
        let Some(shard) = self.shards.get(usize::from(shard) % SHARDS) else {
            return Arc::new(PortSpace::new(&self.shared, pair, hash));
        };
        let mut spaces = lock(shard);
        Arc::clone(spaces.entry(pair).or_insert_with(|| Arc::new(PortSpace::new(&self.shared, pair, hash))))
    }

    /// It is `now`: waits end, and some spaces that nothing is known of any more are forgotten.
    pub fn advance(&self, now: Moment) {
        let tick = now.as_nanos() / TICK_NANOS;
        // It starts at zero with the process, and would go round after 13 years.
        self.shared.tick.store(u32::try_from(tick).unwrap_or(u32::MAX), Ordering::Relaxed);
        let next = self.next.fetch_add(1, Ordering::Relaxed) as usize % SHARDS;
        if let Some(shard) = self.shards.get(next) {
            // A caller that holds a space may be about to take a port of it; no other caller gets one while the
            // shard is locked.
            lock(shard).retain(|_, space| !space.is_vacant() || Arc::strong_count(space) > 1);
        }
    }

    /// What is in use, by backend and source address.
    #[must_use]
    pub fn usage(&self) -> Vec<PortUsage> {
        let spaces = self.shards.iter().flat_map(|shard| lock(shard).values().cloned().collect::<Vec<_>>());
        spaces.map(|space| space.usage()).collect()
    }
}

impl Default for LocalPorts {
    fn default() -> Self {
        Self::new(LocalPortRange::default(), TimeWaitReuse::Loopback)
    }
}

/// What is in use towards one backend from one source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortUsage {
    /// The backend.
    pub backend: SocketAddr,
    /// Ports of connections.
    pub live: usize,
    /// Ports that wait for their TIME_WAIT to end, or that the kernel refused.
    pub waiting: usize,
    /// Ports that may be in use.
    pub limit: usize,
}

/// The local ports from one source address to one backend.
#[derive(Debug)]
pub struct PortSpace {
    shared: Arc<PortSettings>,
    backend: SocketAddr,
    /// Ticks that a port waits after our side closed first.
    wait: u32,
    /// The order in which ports are used first: not the same for all backends.
    order: PortOrder,
    state: Mutex<PortSpaceState>,
}

impl PortSpace {
    fn new(shared: &Arc<PortSettings>, (_, backend): Pair, hash: u64) -> Self {
        let reuses = match shared.reuse {
            TimeWaitReuse::Never => false,
            TimeWaitReuse::Always => true,
            TimeWaitReuse::Loopback => backend.ip().to_canonical().is_loopback(),
        };
        Self {
            shared: Arc::clone(shared),
            backend,
            wait: if reuses { REUSE_WAIT } else { TIME_WAIT },
            order: PortOrder::new(&shared.range, hash),
            state: Mutex::default(),
        }
    }

    /// The state, with what is over by now settled.
    fn settled(&self) -> MutexGuard<'_, PortSpaceState> {
        let mut state = lock(&self.state);
        state.settle(self.shared.tick(), self.wait);
        state
    }

    /// A port for a session of this tenant; `None` where none is free, or the tenant holds its share.
    #[must_use]
    pub fn take(self: &Arc<Self>, tenant: u32) -> Option<LocalPort> {
        self.take_one(tenant, false)
    }

    /// Another port, after the kernel refused one: a process before this one may have left its ports in TIME_WAIT, and has
    /// used fewer of the half that comes last.
    #[must_use]
    pub fn take_instead(self: &Arc<Self>, tenant: u32) -> Option<LocalPort> {
        self.take_one(tenant, true)
    }

    fn take_one(self: &Arc<Self>, tenant: u32, is_instead: bool) -> Option<LocalPort> {
        let mut state = self.settled();
        if !state.allows(tenant, self.shared.limit()) {
            return None;
        }
        let number = if self.shared.chooses() {
            state.choose(self, is_instead)?
        } else {
            state.may_search(self.shared.tick())?
        };
        state.hold(tenant);
        drop(state);
        Some(LocalPort { space: Arc::clone(self), tenant, number, waits: false })
    }

    /// A port for the socket that replaces the one of `held`. Where both are of this space the tenant's share is not asked:
    /// `held` is about to be given back.
    #[must_use]
    pub fn exchange(self: &Arc<Self>, held: &LocalPort) -> Option<LocalPort> {
        if !held.is_of(self) {
            return self.take(held.tenant);
        }
        lock(&self.state).may_search(self.shared.tick())?;
        Some(self.adopt(held.tenant))
    }

    /// Whether the tenant holds less than an equal share.
    #[must_use]
    pub fn holds_little(&self, tenant: u32) -> bool {
        let state = lock(&self.state);
        let (held, holders) = state.holding(tenant);
        fair_share::is_equal(held, holders, self.shared.limit())
    }

    /// A port has been given back to the kernel: it may be asked to search again.
    pub fn search_again(&self) {
        lock(&self.state).barred = 0;
    }

    /// Counts the port of a connection that came from another process. Which one it is, only the kernel knows.
    #[must_use]
    pub fn adopt(self: &Arc<Self>, tenant: u32) -> LocalPort {
        lock(&self.state).hold(tenant);
        LocalPort { space: Arc::clone(self), tenant, number: 0, waits: false }
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> SocketAddr {
        self.backend
    }

    /// What is in use.
    #[must_use]
    pub fn usage(&self) -> PortUsage {
        let (state, backend) = (self.settled(), self.backend());
        let waiting = state.waiting.len() + state.parked.len();
        PortUsage { backend, live: state.live, waiting, limit: self.shared.limit() }
    }

    /// Whether nothing is known of it that a new one would not know.
    fn is_vacant(&self) -> bool {
        let tick = self.shared.tick();
        let mut state = self.settled();
        state.shrink();
        (state.used() == 0 && tick >= state.barred)
            && state.resting.back().is_none_or(|rest| tick.wrapping_sub(rest.since) >= TIME_WAIT)
    }
}

/// A free or refused port, and since when.
#[derive(Clone, Copy, Debug)]
struct FreePort {
    number: u16,
    since: u32,
}

/// A port in TIME_WAIT.
#[derive(Clone, Copy, Debug)]
struct TimeWaitPort {
    number: u16,
    since: u32,
    tenant: u32,
}

#[derive(Debug, Default)]
struct PortSpaceState {
    /// Which of the range have been used at least once.
    entered: UsedPorts,
    live: usize,
    /// Free ports that were used before, the one that is free for longest first.
    resting: VecDeque<FreePort>,
    /// Those in TIME_WAIT, the oldest first.
    waiting: VecDeque<TimeWaitPort>,
    /// Those that the kernel refused: others use them.
    parked: VecDeque<FreePort>,
    /// Ports of each tenant, live and waiting. Nothing is kept for one that has none.
    held: HashMap<u32, u32, foldhash::fast::FixedState>,
    /// Until when the kernel is not asked to search again.
    barred: u32,
}

impl PortSpaceState {
    fn used(&self) -> usize {
        self.live + self.waiting.len() + self.parked.len()
    }

    fn hold(&mut self, tenant: u32) {
        self.live += 1;
        *self.held.entry(tenant).or_default() += 1;
    }

    fn let_go(&mut self, tenant: u32) {
        if let Some(held) = self.held.get_mut(&tenant) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&tenant);
            }
        }
    }

    /// A number of 0 is that of a port that the kernel chose.
    fn rest(&mut self, number: u16, since: u32) {
        if number > 0 {
            self.resting.push_back(FreePort { number, since });
        }
    }

    /// Whether the tenant may hold one more, by the rule of [`fair_share`].
    fn allows(&self, tenant: u32, limit: usize) -> bool {
        let Some(free) = limit.checked_sub(self.used() + 1) else { return false };
        let (held, holders) = self.holding(tenant);
        fair_share::is_allowed(held, holders, limit, free)
    }

    /// How many the tenant holds, and how many tenants hold any with this one.
    fn holding(&self, tenant: u32) -> (usize, usize) {
        let held = self.held.get(&tenant).map_or(0, |held| *held as usize);
        (held, self.held.len() + usize::from(held == 0))
    }

    /// The port that is free for longest; instead of a refused one, one that was not used before. One equal to the backend's
    /// own port is left out: on the same host such a connection could connect to itself (simultaneous open, RFC 9293
    /// section 3.5).
    fn choose(&mut self, space: &PortSpace, is_instead: bool) -> Option<u16> {
        let tick = space.shared.tick();
        let has_rested = |rest: &FreePort| tick.wrapping_sub(rest.since) >= TIME_WAIT;
        let is_rested = !is_instead && self.resting.front().is_some_and(has_rested);
        while !is_rested
            && let Some(number) = self.entered.next(&space.shared.range, &space.order, is_instead)
        {
            if number != space.backend.port() {
                return Some(number);
            }
        }
        self.resting.pop_front().map(|rest| rest.number)
    }

    /// Where the kernel chooses: 0, unless its search has just failed.
    fn may_search(&self, tick: u32) -> Option<u16> {
        (tick >= self.barred).then_some(0)
    }

    fn settle(&mut self, tick: u32, wait: u32) {
        let is_over = |since: u32, span: u32| tick.wrapping_sub(since) >= span;
        for _ in 0..SETTLE {
            let Some(first) = self.waiting.front().copied() else { break };
            if !is_over(first.since, wait) {
                break;
            }
            self.waiting.pop_front();
            self.let_go(first.tenant);
            self.rest(first.number, first.since);
        }
        for _ in 0..SETTLE {
            let Some(first) = self.parked.front().copied() else { break };
            if !is_over(first.since, TIME_WAIT) {
                break;
            }
            self.parked.pop_front();
            self.rest(first.number, first.since);
        }
    }

    /// Gives memory back that a burst needed.
    fn shrink(&mut self) {
        shrink(&mut self.resting);
        shrink(&mut self.waiting);
        shrink(&mut self.parked);
    }
}

fn shrink<T>(queue: &mut VecDeque<T>) {
    if queue.capacity() > 64 && queue.len() < queue.capacity() / 4 {
        queue.shrink_to(queue.len() * 2);
    }
}

#[cfg(test)]
mod tests;
