//! The configuration as checked: what the rest of the program may rely on.

mod admin;
mod backend_target;
mod check;
pub mod diff;
mod error;
mod file;
mod raw;
mod section;
pub mod sources;
mod suggest;
pub mod unit;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::admin::{AdminConfig, HealthConfig};
pub use self::error::{ConfigError, ConfigErrors};
use crate::id::EndpointId;

/// A configuration that passed every check: names resolve, addresses do not overlap, units are units.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `[process]`
    pub process: ProcessConfig,
    /// `[admin]`
    pub admin: AdminConfig,
    /// `[health]`
    pub health: HealthConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[timeouts]`
    pub timeouts: TimeoutConfig,
    /// `[drain]`
    pub drain: DrainConfig,
    /// `[dns]`
    pub dns: DnsConfig,
    /// `[[listener]]`, in the order of the files.
    pub listeners: Vec<ListenerConfig>,
    /// `[[pool]]`, in the order of the files.
    pub pools: Vec<PoolConfig>,
    /// `[[tenant]]`, in the order of the files.
    pub tenants: Vec<TenantConfig>,
}

impl Config {
    /// Reads a file and its includes, and checks them.
    ///
    /// # Errors
    /// Every fault of every file, in the order of the lines.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        check::check(file::read(path)?)
    }

    /// Checks a text that stands in no file; faults call it `name`. `include` is resolved against the working directory.
    ///
    /// # Errors
    /// Every fault, in the order of the lines.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        check::check(file::parse(name, text)?)
    }
}

/// Workers, limits and memory of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessConfig {
    /// Data-plane threads; 0 is one for each CPU.
    pub workers: usize,
    /// Sessions at once; 0 is what the file-descriptor limit allows.
    pub max_sessions: usize,
    /// Bytes of all splice pipes together.
    pub pipe_memory: u64,
    /// Bytes that wait for slow readers, of all sessions together, beside those in pipes.
    pub buffer_memory: u64,
    /// Bytes that the kernel takes for one connection beyond what it has sent; 0 leaves it to the kernel.
    pub unsent_memory: u64,
    /// Whether a configuration file that changes is put in force by itself.
    pub watch: bool,
}

/// The process log and the access log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogConfig {
    /// The lowest level that is written.
    pub level: LogLevel,
    /// How the process log is written; the access log is always JSON.
    pub format: LogFormat,
    /// Where the access log goes.
    pub access: AccessLogTarget,
}

/// The level of the process log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// The form of the process log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    Json,
    Text,
}

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessLogTarget {
    /// Standard output.
    Stdout,
    /// Nowhere.
    Off,
    /// Appended to a file.
    File(PathBuf),
}

/// The timeouts of each step of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeoutConfig {
    /// From accept to a complete PROXY header.
    pub header: Duration,
    /// One attempt at one backend.
    pub connect: Duration,
    /// No byte in either direction.
    pub idle: Duration,
    /// One side has ended and the other sends nothing.
    pub half_close: Duration,
    /// No datagram of a flow in either direction.
    pub flow_idle: Duration,
    /// Bytes that the other end of a connection does not acknowledge; 0 leaves it to the kernel.
    pub tcp_user_timeout: Duration,
    /// Bytes wait for one side of a session, and it takes none of them; 0 leaves it to the other times.
    pub stall: Duration,
}

/// The phases of a graceful shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainConfig {
    /// Health says 503 and accepting goes on, at least this long.
    pub notice: Duration,
    /// Accepting goes on until no new session came for this long.
    pub quiet: Duration,
    /// After that, sessions silent for this long are ended.
    pub idle: Duration,
    /// After the start of the drain, what is left is ended.
    pub deadline: Duration,
}

/// DNS resolution of backend names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// The DNS servers; empty means those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
    /// What one question to one server may take; never zero.
    pub timeout: Duration,
    /// An answer counts at least this long, whatever its own time to live; never zero, and at most `max_ttl`.
    pub min_ttl: Duration,
    /// An answer counts at most this long.
    pub max_ttl: Duration,
    /// Networks whose special addresses (loopback, link-local and the cloud's metadata) an answer may contain.
    pub allow_answers: Vec<IpNet>,
}

/// The transport protocol of a listener or probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Connections: sessions.
    #[default]
    Tcp,
    /// Datagrams: flows.
    Udp,
}

/// A listener: its addresses and its rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerConfig {
    /// Its name, unique among listeners.
    pub name: String,
    /// Every address, port ranges spelled out. Never empty.
    pub bind: Vec<SocketAddr>,
    /// What is spoken there.
    pub protocol: Protocol,
    /// How the tenant is identified.
    pub identity: ListenerIdentity,
    /// The pool of a tenant that names none.
    pub pool: Option<String>,
    /// Sessions that have not yet sent a whole header.
    pub max_pending: usize,
}

/// How a listener identifies the tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ListenerIdentity {
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
        /// A datagram without a header, of a UDP listener.
        bare_datagrams: BareDatagrams,
    },
    /// `proxy-protocol = "off"`: all of it is this tenant's.
    Fixed {
        /// The tenant's name.
        tenant: String,
        /// The networks whose connections are accepted; empty means every network.
        trusted: Vec<IpNet>,
    },
}

impl ListenerIdentity {
    /// What decides whose a session is, beside the tenants' endpoints.
    #[must_use]
    pub fn tenants(&self) -> (Option<&str>, [&Fallback; 2]) {
        match self {
            Self::Header { on_no_endpoint, on_unknown_endpoint, .. } => {
                (None, [on_no_endpoint, on_unknown_endpoint])
            }
            Self::Fixed { tenant, .. } => (Some(tenant), [&Fallback::Reject; 2]),
        }
    }
}

/// What happens to a datagram without a header where headers are required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BareDatagrams {
    /// It is refused.
    #[default]
    Refuse,
    /// It belongs to the one flow of its sender, unless the sender has had several.
    Follow,
}

/// What happens to traffic that matches no tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// It is rejected.
    Reject,
    /// It is this tenant's.
    Tenant(String),
}

/// A pool: interchangeable backends with one policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolConfig {
    /// Its name, unique among pools.
    pub name: String,
    /// The load-balancing algorithm.
    pub balance: Balance,
    /// The backends. Never empty; no target twice.
    pub backends: Vec<BackendConfig>,
    /// A zone whose backends are used first; at least one backend is in it.
    pub prefer_zone: Option<String>,
    /// Whether the client's header is passed on.
    pub send_proxy: bool,
    /// Backends tried before the first byte is forwarded; at least 1.
    pub attempts: u32,
    /// Attempts beyond the first, for each hundred sessions; 0 to 100.
    pub retry_budget: u32,
    /// How long a backend that comes back takes to get its whole weight.
    pub slow_start: Duration,
    /// Local addresses to connect from; empty is the system's choice.
    pub source_addresses: Vec<IpAddr>,
    /// The queue while every backend is full.
    pub queue: QueueConfig,
    /// Percent of the backends that must be sound for their health to count; 0 to 100.
    pub panic_threshold: u32,
    /// The active check; `None` takes every backend for healthy.
    pub health: Option<ProbeConfig>,
    /// The passive check.
    pub ejection: EjectionConfig,
}

/// One backend of a pool, or all that a name leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendConfig {
    /// The zone.
    pub target: BackendTarget,
    /// Its share in relation to the others'; 0 to 1,000, and 0 gives it no new sessions.
    pub weight: u32,
    /// The zone that it is in.
    pub zone: Option<String>,
    /// Sessions at once; at least 1.
    pub max_sessions: Option<u32>,
    /// Whether it is used only where no other can be.
    pub backup: bool,
}

/// The address of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BackendTarget {
    /// At this address.
    Address(SocketAddr),
    /// At each address that this host name has (A and AAAA records).
    Host {
        /// The name, in lower case.
        name: String,
        /// The port, not 0.
        port: u16,
    },
    /// At each target of this service name's SRV records, such as `_http._tcp.example.com` (RFC 2782).
    Service(String),
}

/// The queue for sessions while every backend is at `max-sessions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// How many may wait; 0 is none.
    pub length: usize,
    /// How long each may wait.
    pub timeout: Duration,
}

/// The passive health check: ejection after failed sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EjectionConfig {
    /// Failures in a row that eject a backend; 0 is never.
    pub consecutive_failures: u32,
    /// The first time out; it doubles with each ejection that follows.
    pub base_time: Duration,
    /// Percent of the pool's backends that may be out at once; 0 to 100.
    pub max_percent: u32,
}

/// The load-balancing algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Each in turn.
    RoundRobin,
    /// The one with the fewest sessions for its weight.
    LeastSessions,
    /// The less loaded of two at random.
    P2c,
    /// By the client's address: the same client, the same backend.
    Maglev,
    /// By the endpoint's ID: the same endpoint, the same backend.
    MaglevEndpoint,
}

/// The active check of a pool's backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeConfig {
    /// From one probe of a backend to its next.
    pub interval: Duration,
    /// What one probe may take; at most the interval.
    pub timeout: Duration,
    /// Successes in a row that make a backend healthy; at least 1.
    pub rise: u32,
    /// Failures in a row that make it unhealthy; at least 1.
    pub fall: u32,
    /// Another port than the traffic's.
    pub port: Option<u16>,
    /// Whether a PROXY header with the command LOCAL comes first.
    pub send_proxy: bool,
    /// What is asked.
    pub ask: ProbeCheck,
}

/// What a probe checks after it is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeCheck {
    /// Nothing: it was accepted.
    Connect,
    /// `GET path` by HTTP/1.1.
    Http {
        /// The path and query, with the leading slash.
        path: String,
        /// The Host header; `None` is the backend's address.
        host: Option<String>,
        /// Statuses that are good. Never empty.
        expect_status: Vec<RangeInclusive<u16>>,
    },
    /// Some bytes there, some bytes back.
    Exchange {
        /// A connection, or a datagram.
        protocol: Protocol,
        /// What is sent; it may be empty, where the server speaks first.
        send: Vec<u8>,
        /// What must come back; never empty.
        expect: Vec<u8>,
        /// Whether the answer must begin with it; else it must contain it.
        prefix: bool,
    },
}

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantConfig {
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
    pub limits: TenantLimits,
    /// What happens to its sessions and flows once a reload takes their endpoint or the tenant away.
    pub on_revoke: OnRevoke,
    /// How long they may go on where they end.
    pub revoke_grace: Duration,
}

/// What happens to a session or a flow whose tenant is removed or disabled, or whose endpoint no longer belongs to that
/// tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnRevoke {
    /// It ends after the grace.
    #[default]
    End,
    /// It continues until it ends by itself.
    Keep,
}

/// A tenant's limits: its own keys, and the defaults of those that it does not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantLimits {
    /// Whether the limits hold or are only counted.
    pub mode: LimitMode,
    /// Sessions at once; at least 1.
    pub sessions: Option<usize>,
    /// New sessions.
    pub session_rate: Option<RateLimit>,
    /// Bytes from clients to backends.
    pub to_backend: Option<BandwidthLimit>,
    /// Bytes from backends to clients.
    pub to_client: Option<BandwidthLimit>,
    /// Flows at once; at least 1.
    pub flows: Option<usize>,
    /// Datagrams of flows, both directions together.
    pub datagram_rate: Option<RateLimit>,
}

/// What happens beyond a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitMode {
    /// It is rejected, or it waits.
    #[default]
    Enforce,
    /// It passes, and is counted.
    Observe,
}

/// A rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// From one to the next, on average; never zero.
    pub interval: Duration,
    /// So many at once after a silence; at least 1.
    pub burst: u64,
}

/// A bandwidth limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandwidthLimit {
    /// Bytes in each second, on average; at least 1,024.
    pub bytes_per_second: u64,
    /// Bytes at once after a silence; at least 1, and at most a second's worth.
    pub burst: u64,
}
