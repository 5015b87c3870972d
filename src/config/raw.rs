//! What stands in the tables, key by key, before anything is said about what it means.

mod pool;

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use toml::de::DeTable;

pub(super) use self::pool::{RawBackend, RawPool, RawProbe};
use super::error::ConfigError;
use super::section::{Pairs, ParsedField, ParsedList, Section, TableHead};
use super::unit::BindPorts;
use super::value::{
    BoundedInt, ByteSize, BytesPerSecond, Count, HostName, Nameserver, ProxyProtocolMode, RateInterval,
    SessionCount, SocketPath, TableName, TenantState, UrlPath,
};
use super::{AccessLogTarget, BareDatagrams, Fallback, LimitMode, LogFormat, LogLevel, OnRevoke, Protocol};
use crate::id::EndpointId;

/// The configuration as written in all files, and its syntax errors.
#[derive(Debug, Default)]
pub(super) struct RawConfig {
    /// The main file as a whole.
    pub(super) head: Option<TableHead>,
    pub(super) faults: Vec<ConfigError>,
    pub(super) process: RawProcess,
    pub(super) admin: RawAdmin,
    pub(super) health: RawHealth,
    pub(super) log: RawLog,
    pub(super) timeouts: RawTimeouts,
    pub(super) drain: RawDrain,
    pub(super) dns: RawDns,
    pub(super) listeners: Vec<RawListener>,
    pub(super) pools: Vec<RawPool>,
    pub(super) tenants: Vec<RawTenant>,
    /// `[tenant-defaults]`
    pub(super) tenant_defaults: RawTenantDefaults,
    /// Where `[tenant-defaults]` stands.
    pub(super) defaults: Option<TableHead>,
}

/// `[process]`
#[derive(Debug, Default)]
pub(super) struct RawProcess {
    pub(super) workers: ParsedField<BoundedInt<0, 1024>>,
    pub(super) max_sessions: ParsedField<Count<0>>,
    pub(super) pipe_memory: ParsedField<ByteSize>,
    pub(super) buffer_memory: ParsedField<ByteSize>,
    pub(super) unsent_memory: ParsedField<ByteSize>,
    pub(super) watch: ParsedField<bool>,
}

impl RawProcess {
    pub(super) fn read(head: &TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(head, table, faults);
        let read = Self {
            workers: section.take("workers"),
            max_sessions: section.take("max-sessions"),
            pipe_memory: section.take("pipe-memory"),
            buffer_memory: section.take("buffer-memory"),
            unsent_memory: section.take("unsent-memory"),
            watch: section.take("watch"),
        };
        section.finish();
        read
    }
}

/// `[admin]`
#[derive(Debug, Default)]
pub(super) struct RawAdmin {
    pub(super) head: Option<TableHead>,
    pub(super) bind: ParsedField<SocketAddr>,
    pub(super) socket: ParsedField<SocketPath>,
    pub(super) hosts: ParsedField<ParsedList<HostName>>,
}

impl RawAdmin {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (bind, socket) = (section.take("bind"), section.take("socket"));
        let hosts = section.take_list("hosts");
        section.finish();
        Self { head: Some(head), bind, socket, hosts }
    }
}

/// `[health]`
#[derive(Debug, Default)]
pub(super) struct RawHealth {
    pub(super) head: Option<TableHead>,
    pub(super) bind: ParsedField<SocketAddr>,
    pub(super) path: ParsedField<UrlPath>,
    pub(super) trusted_sources: ParsedField<ParsedList<IpNet>>,
}

impl RawHealth {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (bind, path) = (section.take("bind"), section.take("path"));
        let trusted_sources = section.take_list("trusted-sources");
        section.finish();
        Self { head: Some(head), bind, path, trusted_sources }
    }
}

/// `[log]`
#[derive(Debug, Default)]
pub(super) struct RawLog {
    pub(super) level: ParsedField<LogLevel>,
    pub(super) format: ParsedField<LogFormat>,
    pub(super) access: ParsedField<AccessLogTarget>,
}

impl RawLog {
    pub(super) fn read(head: &TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(head, table, faults);
        let read = Self {
            level: section.take("level"),
            format: section.take("format"),
            access: section.take("access"),
        };
        section.finish();
        read
    }
}

/// `[timeouts]`
#[derive(Debug, Default)]
pub(super) struct RawTimeouts {
    pub(super) head: Option<TableHead>,
    pub(super) header: ParsedField<Duration>,
    pub(super) connect: ParsedField<Duration>,
    pub(super) idle: ParsedField<Duration>,
    pub(super) half_close: ParsedField<Duration>,
    pub(super) flow_idle: ParsedField<Duration>,
    pub(super) tcp_user_timeout: ParsedField<Duration>,
    pub(super) stall: ParsedField<Duration>,
}

impl RawTimeouts {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (header, connect) = (section.take("header"), section.take("connect"));
        let (idle, half_close) = (section.take("idle"), section.take("half-close"));
        let (flow_idle, tcp_user_timeout) = (section.take("flow-idle"), section.take("tcp-user-timeout"));
        let stall = section.take("stall");
        section.finish();
        Self { head: Some(head), header, connect, idle, half_close, flow_idle, tcp_user_timeout, stall }
    }
}

/// `[drain]`
#[derive(Debug, Default)]
pub(super) struct RawDrain {
    pub(super) notice: ParsedField<Duration>,
    pub(super) quiet: ParsedField<Duration>,
    pub(super) idle: ParsedField<Duration>,
    pub(super) deadline: ParsedField<Duration>,
}

impl RawDrain {
    pub(super) fn read(head: &TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(head, table, faults);
        let read = Self {
            notice: section.take("notice"),
            quiet: section.take("quiet"),
            idle: section.take("idle"),
            deadline: section.take("deadline"),
        };
        section.finish();
        read
    }
}

/// `[dns]`
#[derive(Debug, Default)]
pub(super) struct RawDns {
    pub(super) head: Option<TableHead>,
    pub(super) servers: ParsedField<ParsedList<Nameserver>>,
    pub(super) timeout: ParsedField<Duration>,
    pub(super) min_ttl: ParsedField<Duration>,
    pub(super) max_ttl: ParsedField<Duration>,
    pub(super) allow_answers: ParsedField<ParsedList<IpNet>>,
}

impl RawDns {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults).knowing(&["min-ttl", "max-ttl"]);
        let (servers, timeout) = (section.take_list("servers"), section.take("timeout"));
        let (min_ttl, max_ttl) = (section.take("min-ttl"), section.take("max-ttl"));
        let allow_answers = section.take_list("allow-answers");
        section.finish();
        Self { head: Some(head), servers, timeout, min_ttl, max_ttl, allow_answers }
    }
}

/// `[[listener]]`
#[derive(Debug)]
pub(super) struct RawListener {
    pub(super) head: TableHead,
    pub(super) name: ParsedField<TableName>,
    pub(super) bind: ParsedField<ParsedList<BindPorts>>,
    pub(super) protocol: ParsedField<Protocol>,
    pub(super) proxy_protocol: ParsedField<ProxyProtocolMode>,
    pub(super) trusted_sources: ParsedField<ParsedList<IpNet>>,
    pub(super) verify_crc: ParsedField<bool>,
    pub(super) pool: ParsedField<String>,
    pub(super) on_no_endpoint: ParsedField<Fallback>,
    pub(super) on_unknown_endpoint: ParsedField<Fallback>,
    pub(super) bare_datagrams: ParsedField<BareDatagrams>,
    pub(super) tenant: ParsedField<String>,
    pub(super) max_pending: ParsedField<Count<1>>,
}

impl RawListener {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let name = section.require("name", "\"web\"");
        let bind = section.require_one_or_many("bind", "\"0.0.0.0:8080\"");
        let protocol = section.take("protocol");
        let (proxy_protocol, tenant) = (section.take("proxy-protocol"), section.take("tenant"));
        let (trusted_sources, verify_crc) =
            (section.take_list("trusted-sources"), section.take("verify-crc"));
        let (pool, max_pending) = (section.take("pool"), section.take("max-pending"));
        let on_no_endpoint = section.take("on-no-endpoint");
        let on_unknown_endpoint = section.take("on-unknown-endpoint");
        let bare_datagrams = section.take("bare-datagrams");
        section.finish();
        Self {
            head,
            name,
            bind,
            protocol,
            proxy_protocol,
            trusted_sources,
            verify_crc,
            pool,
            on_no_endpoint,
            on_unknown_endpoint,
            bare_datagrams,
            tenant,
            max_pending,
        }
    }
}

/// `[[tenant]]`
#[derive(Debug)]
pub(super) struct RawTenant {
    pub(super) head: TableHead,
    pub(super) name: ParsedField<TableName>,
    pub(super) endpoints: ParsedField<ParsedList<EndpointId>>,
    pub(super) pool: ParsedField<String>,
    pub(super) routes: ParsedField<Pairs<String>>,
    pub(super) state: ParsedField<TenantState>,
    pub(super) labels: ParsedField<Pairs<String>>,
    pub(super) revoke: RawRevoke,
    pub(super) limits: RawLimits,
}

impl RawTenant {
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (name, endpoints) = (section.require("name", "\"acme\""), section.take_list("endpoints"));
        let (pool, routes) = (section.take("pool"), section.take_pairs("routes"));
        let (state, labels) = (section.take("state"), section.take_pairs("labels"));
        let revoke = RawRevoke::within(&mut section);
        let limits = RawLimits::within(&mut section);
        section.finish();
        Self { head, name, endpoints, pool, routes, state, labels, revoke, limits }
    }
}

/// `on-revoke` and `revoke-grace` of `[[tenant]]` and `[tenant-defaults]`
#[derive(Debug, Default)]
pub(super) struct RawRevoke {
    pub(super) on_revoke: ParsedField<OnRevoke>,
    pub(super) grace: ParsedField<Duration>,
}

impl RawRevoke {
    fn within(section: &mut Section<'_, '_>) -> Self {
        Self { on_revoke: section.take("on-revoke"), grace: section.take("revoke-grace") }
    }
}

/// `[tenant-defaults]`
#[derive(Debug, Default)]
pub(super) struct RawTenantDefaults {
    pub(super) revoke: RawRevoke,
    pub(super) limits: RawLimits,
}

impl RawTenantDefaults {
    pub(super) fn read(head: &TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let mut section = Section::open(head, table, faults);
        let (revoke, limits) = (RawRevoke::within(&mut section), RawLimits::within(&mut section));
        section.finish();
        Self { revoke, limits }
    }
}

/// `[tenant.limits]` and `[tenant-defaults.limits]`
#[derive(Debug, Default)]
pub(super) struct RawLimits {
    pub(super) mode: ParsedField<LimitMode>,
    pub(super) sessions: ParsedField<SessionCount>,
    pub(super) session_rate: ParsedField<RateInterval>,
    pub(super) session_burst: ParsedField<Count<1>>,
    pub(super) to_backend: ParsedField<BytesPerSecond>,
    pub(super) to_backend_burst: ParsedField<ByteSize>,
    pub(super) to_client: ParsedField<BytesPerSecond>,
    pub(super) to_client_burst: ParsedField<ByteSize>,
    pub(super) flows: ParsedField<SessionCount>,
    pub(super) datagram_rate: ParsedField<RateInterval>,
    pub(super) datagram_burst: ParsedField<Count<1>>,
}

impl RawLimits {
    fn within(section: &mut Section<'_, '_>) -> Self {
        match section.take_table("limits") {
            ParsedField::Given(table) => Self::read(section.nested("limits.", table)),
            ParsedField::Absent | ParsedField::Faulty => Self::default(),
        }
    }

    fn read(mut section: Section<'_, '_>) -> Self {
        let read = Self {
            mode: section.take("mode"),
            sessions: section.take("sessions"),
            session_rate: section.take("session-rate"),
            session_burst: section.take("session-burst"),
            to_backend: section.take("to-backend"),
            to_backend_burst: section.take("to-backend-burst"),
            to_client: section.take("to-client"),
            to_client_burst: section.take("to-client-burst"),
            flows: section.take("flows"),
            datagram_rate: section.take("datagram-rate"),
            datagram_burst: section.take("datagram-burst"),
        };
        section.finish();
        read
    }
}
