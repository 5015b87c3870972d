//! The configuration as checked: what the rest of the program may rely on.

mod check;
mod error;
mod file;
mod section;
mod suggest;
mod unbuilt;
pub mod unit;
mod value;
mod written;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

pub use self::error::{Fault, Faults};
use crate::id::EndpointId;

/// A configuration that passed every check: names resolve, addresses do not overlap, units are units.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[process]`
    pub process: Process,
    /// `[admin]`
    pub admin: Admin,
    /// `[health]`
    pub health: HealthEndpoint,
    /// `[log]`
    pub log: Log,
    /// `[timeouts]`
    pub timeouts: Timeouts,
    /// `[drain]`
    pub drain: Drain,
    /// `[[listener]]`, in the order of the files.
    pub listeners: Vec<Listener>,
    /// `[[pool]]`, in the order of the files.
    pub pools: Vec<Pool>,
    /// `[[tenant]]`, in the order of the files.
    pub tenants: Vec<Tenant>,
}

impl Config {
    /// Reads a file and all that it includes, and checks it.
    ///
    /// # Errors
    /// Every fault of every file, in the order of the lines.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        check::check(file::read(path)?)
    }

    /// Checks a text that stands in no file; faults call it `name`. `include` is resolved against the working directory.
    ///
    /// # Errors
    /// Every fault, in the order of the lines.
    pub fn parse(name: &str, text: &str) -> Result<Self, Faults> {
        check::check(file::parse(name, text)?)
    }
}

/// What the process takes of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Data-plane threads; 0 is one for each CPU.
    pub workers: usize,
    /// Sessions at once; 0 is what the file-descriptor limit allows.
    pub max_sessions: usize,
    /// Bytes of all splice pipes together.
    pub pipe_memory: u64,
}

/// Where metrics and status are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// The address of the read-only pages.
    pub bind: SocketAddr,
}

/// What the load balancer's health check asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthEndpoint {
    /// Its address.
    pub bind: SocketAddr,
    /// The path that answers, with its leading slash.
    pub path: String,
}

/// What is logged, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The lowest level that is written.
    pub level: Level,
    /// How the process log is written; the access log is always JSON.
    pub format: Format,
    /// Where the access log goes.
    pub access: AccessLog,
}

/// The level of the process log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// The form of the process log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Format {
    Json,
    Text,
}

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLog {
    /// Standard output.
    Stdout,
    /// Nowhere.
    Off,
    /// Appended to a file.
    File(PathBuf),
}

/// How long a session may take over each of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From accept to a complete PROXY header.
    pub header: Duration,
    /// One attempt at one backend.
    pub connect: Duration,
    /// No byte in either direction.
    pub idle: Duration,
    /// One side has ended and the other sends nothing.
    pub half_close: Duration,
}

/// How the process ends without dropping what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Health says 503 and accepting goes on, at least this long.
    pub notice: Duration,
    /// Accepting goes on until no new session came for this long.
    pub quiet: Duration,
    /// After that, sessions silent for this long are ended.
    pub idle: Duration,
    /// After the start of the drain, what is left is ended.
    pub deadline: Duration,
}

/// A bound address, or several, with its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its name, unique among listeners.
    pub name: String,
    /// Every address, port ranges spelled out. Never empty.
    pub bind: Vec<SocketAddr>,
    /// Who speaks, and how it is known.
    pub identity: Identity,
    /// The pool of a tenant that names none.
    pub pool: Option<String>,
    /// Sessions that have not yet sent a whole header.
    pub max_pending: usize,
}

/// How a listener knows whose traffic it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// `proxy-protocol = "require"`: by the endpoint ID in the header.
    Header {
        /// Whose headers count. Never empty.
        trusted: Vec<IpNet>,
        /// Whether a CRC32C TLV must match.
        verify_crc: bool,
        /// A header without an endpoint ID.
        on_no_endpoint: Fallback,
        /// An endpoint ID that no tenant lists.
        on_unknown_endpoint: Fallback,
    },
    /// `proxy-protocol = "off"`: all of it is this tenant's.
    Fixed {
        /// The tenant's name.
        tenant: String,
        /// Whose connections are accepted; empty is everybody's.
        trusted: Vec<IpNet>,
    },
}

/// What becomes of traffic that names no tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// It is rejected.
    Reject,
    /// It is this tenant's.
    Tenant(String),
}

/// Interchangeable backends with one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name, unique among pools.
    pub name: String,
    /// How a backend is picked.
    pub balance: Balance,
    /// The backends. Never empty; no address twice.
    pub backends: Vec<SocketAddr>,
    /// Whether the client's header is passed on.
    pub send_proxy: bool,
    /// Backends tried before the first byte is forwarded; at least 1.
    pub attempts: u32,
    /// Local addresses to connect from; empty is the system's choice.
    pub source_addresses: Vec<IpAddr>,
    /// The active check.
    pub health: Probe,
}

/// How a backend is picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn.
    RoundRobin,
    /// The less loaded of two at random.
    P2c,
}

/// The active check of a pool's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// None: every backend is taken for healthy.
    None,
    /// A connection is opened and closed.
    Tcp {
        /// From one probe of a backend to its next.
        interval: Duration,
        /// What one probe may take; at most the interval.
        timeout: Duration,
        /// Successes in a row that make a backend healthy; at least 1.
        rise: u32,
        /// Failures in a row that make it unhealthy; at least 1.
        fall: u32,
        /// Another port than the traffic's.
        port: Option<u16>,
    },
}

/// Whose traffic it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its name, unique among tenants.
    pub name: String,
    /// Its endpoints; each ID belongs to one tenant only.
    pub endpoints: Vec<EndpointId>,
    /// Overrides the listener's pool.
    pub pool: Option<String>,
    /// Listener name to pool; overrides both.
    pub routes: BTreeMap<String, String>,
    /// Whether its traffic is carried.
    pub enabled: bool,
    /// Carried into the access log.
    pub labels: BTreeMap<String, String>,
    /// What it may take at most.
    pub limits: Limits,
}

/// What a tenant may take at most; its own keys, and those of the defaults that it does not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Whether the limits hold or are only counted.
    pub mode: Mode,
    /// Sessions at once; at least 1.
    pub sessions: Option<usize>,
    /// New sessions.
    pub session_rate: Option<Rate>,
    /// Bytes from clients to backends.
    pub to_backend: Option<Bandwidth>,
    /// Bytes from backends to clients.
    pub to_client: Option<Bandwidth>,
}

/// What becomes of a session or a byte beyond a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It is rejected, or it waits.
    #[default]
    Enforce,
    /// It passes, and is counted.
    Observe,
}

/// So many in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// From one to the next, on average; never zero.
    pub interval: Duration,
    /// So many at once after a silence; at least 1.
    pub burst: u64,
}

/// So many bytes in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth {
    /// Bytes in each second, on average; at least 1,024.
    pub bytes_per_second: u64,
    /// Bytes at once after a silence; at least 1, and at most a second's worth.
    pub burst: u64,
}
