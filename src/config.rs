//! The configuration as checked: what the rest of the program may rely on.

mod backend_target;
mod check;
pub(crate) mod diff;
mod error;
mod file;
mod raw;
pub mod reference;
mod section;
pub(crate) mod sources;
mod suggest;
mod table;
mod tables;
#[cfg(test)]
pub(crate) mod test_text;
pub(crate) mod unit;
mod value;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::error::{ConfigError, ConfigErrors};
pub use self::table::{Key, Presence, Table};
pub use self::tables::{
    AdminConfig, BackendConfig, BandwidthLimit, DnsConfig, DrainConfig, EjectionConfig, HealthConfig,
    ListenerConfig, LogConfig, PoolConfig, ProbeConfig, ProcessConfig, QueueConfig, RateLimit, TABLES,
    TenantConfig, TenantLimits, TimeoutConfig,
};

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
