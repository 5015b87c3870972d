//! What the machine lets the process have: processors and file descriptors.

use std::net::{IpAddr, SocketAddr};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::StartError;
use crate::admission::ports::LocalPorts;
use crate::config::{BackendTarget, Config, PoolConfig, ProcessConfig, Protocol};
use crate::forward::pipe;
use crate::pool::MOST_ADDRESSES;

/// The session capacity of the process, and its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Sessions at once.
    pub sessions: usize,
    /// Sessions that the descriptors allow; less than `sessions` only where the operator asked for more.
    pub possible: usize,
    /// Connections at once that have not yet sent a whole header.
    pub pending: usize,
    /// Splice pipes at once.
    pub pipes: u64,
    /// Probes at once.
    pub probes: usize,
    /// The file-descriptor limit in force.
    pub descriptors: u64,
    /// Worker threads.
    pub workers: usize,
}

/// Descriptors of a session: its two sockets.
const PER_SESSION: u64 = 2;
/// Of the descriptors, one in so many is for connections without a whole header, which take one each: with places of their
/// own they take none of a tenant's session.
const PENDING_PART: u64 = 8;
/// The bounds of that.
const FEWEST_PENDING: u64 = 16;
const MOST_PENDING: u64 = 65_536;
/// Descriptors of a UDP flow: its socket to the backend.
const PER_FLOW: u64 = 1;
/// Descriptors of a pipe.
const PER_PIPE: u64 = 2;
/// Descriptors of a worker beside its listening sockets: epoll, its waker, its timer, the flows' epoll.
const PER_WORKER: u64 = 4;
/// Descriptors for everything else: standard streams, logs, pages, lookups of names, and 128 health checks at once.
const RESERVE: u64 = 256;
/// Probes at once, however few backends there are.
const FEWEST_PROBES: u64 = 16;

/// Worker threads: as configured, or one for each processor that the process may use.
pub(super) fn workers(configured: usize) -> usize {
    match configured {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

/// Raises the soft descriptor limit to the hard one, and computes what it allows.
pub(super) fn capacity(config: &Config, workers: usize, listening: usize) -> Result<Capacity, StartError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // An ordinary user may do this; where it is refused, the soft limit stays.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let descriptors = if raised.is_ok() { maximum } else { current }.unwrap_or(u64::MAX);
    let carries_tcp = config.listeners.iter().any(|listener| listener.protocol == Protocol::Tcp);
    let each = if carries_tcp { PER_SESSION } else { PER_FLOW };
    compute(&config.process, each, probes(&config.pools), workers, listening, descriptors)
}

/// Probes that are under way at once where every backend of every pool takes its whole time: with so many, one pool's black
/// holes do not delay the probes of others.
fn probes(pools: &[PoolConfig]) -> u64 {
    let of_pool = |pool: &PoolConfig| {
        let Some(probe) = &pool.health else { return 0 };
        let names = pool
            .backends
            .iter()
            .filter(|backend| !matches!(backend.target, BackendTarget::Address(_)))
            .count();
        let backends = (pool.backends.len() - names) as u128 + names as u128 * u128::from(MOST_ADDRESSES);
        let at_once = (backends * probe.timeout.as_nanos()).div_ceil(probe.interval.as_nanos().max(1));
        u64::try_from(at_once).unwrap_or(u64::MAX)
    };
    pools.iter().map(of_pool).fold(FEWEST_PROBES, u64::saturating_add)
}

/// A pool with fewer local ports than `max-sessions` needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScarcePorts<'c> {
    /// The pool's name.
    pub pool: &'c str,
    /// Sessions, or flows, that its ports allow at once.
    pub possible: usize,
    /// What an operator is told.
    pub message: &'static str,
}

const SCARCE_TCP_PORTS: &str = "max-sessions exceeds the local ports to the pool's backends: widen \
                                net.ipv4.ip_local_port_range, or give the pool more source-addresses or \
                                backends";

const SCARCE_UDP_PORTS: &str = "max-sessions exceeds the local ports for UDP flows, which all backends \
                                share: widen net.ipv4.ip_local_port_range, or give the pool more \
                                source-addresses";

/// For TCP and for UDP the first pool whose local ports `max-sessions` needs more of than there are, where the operator has
/// set that. What a pool's names lead to is not known: for TCP such a pool is left out.
pub fn scarce_ports<'c>(
    config: &'c Config,
    tcp: &LocalPorts,
    udp: &LocalPorts,
) -> impl Iterator<Item = ScarcePorts<'c>> {
    let of_backend = |pool: &PoolConfig, address: SocketAddr| {
        let is_of_family = |source: &&IpAddr| source.is_ipv4() == address.is_ipv4();
        pool.source_addresses.iter().filter(is_of_family).count().max(1) * tcp.limit()
    };
    let of_tcp = |pool: &PoolConfig| {
        let addresses = pool.backends.iter().map(|backend| match backend.target {
            BackendTarget::Address(address) => Some(address),
            BackendTarget::Host { .. } | BackendTarget::Service(_) => None,
        });
        addresses.map(|address| address.map(|address| of_backend(pool, address))).sum::<Option<usize>>()
    };
    // The flows of other pools may use the same ports.
    let of_udp = |pool: &PoolConfig| Some(pool.source_addresses.len().max(1) * udp.limit());
    [
        first_scarce(config, Protocol::Tcp, SCARCE_TCP_PORTS, of_tcp),
        first_scarce(config, Protocol::Udp, SCARCE_UDP_PORTS, of_udp),
    ]
    .into_iter()
    .flatten()
}

fn first_scarce<'c>(
    config: &'c Config,
    protocol: Protocol,
    message: &'static str,
    possible: impl Fn(&PoolConfig) -> Option<usize>,
) -> Option<ScarcePorts<'c>> {
    let is_spoken = config.listeners.iter().any(|listener| listener.protocol == protocol);
    let scarce = |pool: &'c PoolConfig| {
        let possible = possible(pool).filter(|possible| *possible < config.process.max_sessions)?;
        Some(ScarcePorts { pool: &pool.name, possible, message })
    };
    config.pools.iter().filter(|_| is_spoken).find_map(scarce)
}

fn compute(
    process: &ProcessConfig,
    each: u64,
    probes: u64,
    workers: usize,
    listening: usize,
    descriptors: u64,
) -> Result<Capacity, StartError> {
    // Datagrams are not spliced.
    let pipes = if each == PER_FLOW { 0 } else { process.pipe_memory / pipe::CAPACITY as u64 };
    let fixed = RESERVE + workers as u64 * (PER_WORKER + listening as u64);
    // Probes use at most an eighth; beyond that they wait for each other.
    let probes = probes.min((descriptors / 8).max(FEWEST_PROBES));
    let fixed = fixed + probes;
    let rest = descriptors.saturating_sub(fixed);
    // A datagram contains its whole header, so no flow is pending.
    let pending =
        if each == PER_FLOW { 0 } else { (rest / PENDING_PART).clamp(FEWEST_PENDING, MOST_PENDING) };
    let (fixed, rest) = (fixed + pending, rest.saturating_sub(pending));
    // Pipes take what they need of the rest, but never more than a quarter: without one a session copies.
    let pipes = pipes.min(rest / 4 / PER_PIPE);
    let for_sessions = rest - pipes * PER_PIPE;
    let possible = usize::try_from(for_sessions / each).unwrap_or(usize::MAX);
    if possible == 0 {
        return Err(StartError::Descriptors { needed: fixed + each, found: descriptors });
    }
    let sessions = if process.max_sessions == 0 { possible } else { process.max_sessions };
    let probes = usize::try_from(probes).unwrap_or(usize::MAX);
    let pending = usize::try_from(pending).unwrap_or(usize::MAX);
    Ok(Capacity { sessions, possible, pending, pipes, probes, descriptors, workers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::ports::LocalPortRange;
    use crate::config::test_text::LISTENER;

    fn process(max_sessions: usize, pipe_memory: u64) -> ProcessConfig {
        ProcessConfig {
            workers: 0,
            max_sessions,
            pipe_memory,
            buffer_memory: 0,
            unsent_memory: 0,
            watch: false,
        }
    }

    fn sessions(process: &ProcessConfig, descriptors: u64) -> Result<usize, String> {
        compute(process, PER_SESSION, 16, 2, 3, descriptors)
            .map(|capacity| capacity.sessions)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sessions_take_what_listeners_pipes_and_reserve_leave() {
        let mib_64 = 64 * 1024 * 1024;
        assert_eq!(sessions(&process(0, mib_64), 20_000), Ok((20_000 - 272 - 14 - 2_464 - 512) / 2));
        assert_eq!(sessions(&process(0, 0), 20_000), Ok((20_000 - 272 - 14 - 2_464) / 2));
        assert_eq!(sessions(&process(0, u64::MAX / 4), 1_286), Ok((1_000 - 125 - 218) / 2));
        assert_eq!(sessions(&process(7, mib_64), 20_000), Ok(7));
    }

    #[test]
    fn connections_without_a_header_have_a_part_of_the_descriptors() {
        let pending =
            |descriptors| compute(&process(7, 0), PER_SESSION, 16, 2, 3, descriptors).unwrap().pending;
        assert_eq!([304, 1_286, 20_000, 1 << 40].map(pending), [16, 125, 2_464, 65_536]);
    }

    #[test]
    fn flows_take_one_each_and_leave_nothing_to_pipes() {
        let capacity = compute(&process(0, 64 << 20), PER_FLOW, 16, 2, 3, 20_000).unwrap();
        assert_eq!((capacity.sessions, capacity.pending, capacity.pipes), (20_000 - 272 - 14, 0, 0));
    }

    #[test]
    fn too_few_descriptors_are_an_error_with_a_remedy() {
        assert_eq!(sessions(&process(0, 0), 304), Ok(1));
        let message = sessions(&process(0, 0), 303).unwrap_err();
        assert!(message.contains("must be at least 304, found 303; raise LimitNOFILE"), "{message}");
    }

    #[test]
    fn probe_descriptors_suffice_if_every_backend_uses_its_timeout() {
        let pools = r#"
            [[pool]]
            name = "app"
            backends = ["10.0.1.10:80", "10.0.1.11:80", "app.example.com:80"]
            [pool.health]
            interval = "5s"
            timeout = "2s"
            [[pool]]
            name = "bare"
            backends = ["10.0.1.10:80"]
            [pool.health]
            kind = "none"
            [[tenant]]
            name = "acme"
        "#;
        let config = Config::parse("test.toml", &[LISTENER, pools].concat()).unwrap();
        assert_eq!(probes(&config.pools), 16 + 27, "66 backends, two fifths of the time");
        let most = compute(&config.process, PER_SESSION, u64::MAX, 2, 3, 20_000).unwrap();
        assert_eq!(most.probes, 2_500);
    }

    #[test]
    fn pool_with_fewer_local_ports_than_max_sessions_is_named() {
        let text = |protocol: &str, max_sessions: usize, sources: &str| {
            format!(
                r#"
                [process]
                max-sessions = {max_sessions}
                {LISTENER}
                protocol = "{protocol}"
                [[pool]]
                name = "named"
                backends = ["app.example.com:80"]
                source-addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
                health = {{ kind = "none" }}
                [[pool]]
                name = "app"
                backends = ["10.0.1.10:80", "10.0.1.11:80"]
                source-addresses = [{sources}]
                health = {{ kind = "none" }}
                [[tenant]]
                name = "acme"
                "#
            )
        };
        let scarce = |protocol, max_sessions, sources| {
            let config = Config::parse("test.toml", &text(protocol, max_sessions, sources)).unwrap();
            let (tcp, udp) = (LocalPorts::default(), LocalPorts::udp(LocalPortRange::default()));
            let found = scarce_ports(&config, &tcp, &udp).inspect(|scarce| assert_eq!(scarce.pool, "app"));
            found.map(|scarce| (scarce.possible, scarce.message)).collect::<Vec<_>>()
        };
        let two = "\"10.0.0.1\", \"10.0.0.2\"";
        assert!(scarce("tcp", 0, "").is_empty() && scarce("tcp", 2 * 28_232, "").is_empty());
        assert_eq!(scarce("tcp", 2 * 28_232 + 1, ""), [(2 * 28_232, SCARCE_TCP_PORTS)]);
        assert!(scarce("tcp", 100_000, two).is_empty());
        assert_eq!(scarce("tcp", 112_929, two), [(4 * 28_232, SCARCE_TCP_PORTS)]);
        // All backends share them, and a few are left to others.
        assert!(scarce("udp", 0, "").is_empty() && scarce("udp", 27_790, "").is_empty());
        assert_eq!(scarce("udp", 27_791, ""), [(27_790, SCARCE_UDP_PORTS)]);
        assert!(scarce("udp", 2 * 27_790, two).is_empty());
        assert_eq!(scarce("udp", 2 * 27_790 + 1, two), [(2 * 27_790, SCARCE_UDP_PORTS)]);
    }

    #[test]
    fn workers_default_to_the_processors() {
        assert!(workers(0) >= 1);
        assert_eq!(workers(3), 3);
    }
}
