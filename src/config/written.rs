//! What stands in the tables, key by key, before anything is said about what it means.

mod pool;

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use toml::de::DeTable;

pub(super) use self::pool::{Backend, Pool, Probe};
use super::error::Fault;
use super::section::{Field, Head, List, Pairs, Section};
use super::unit::Ports;
use super::value::{
    Count, HostName, Interval, Name, Nameserver, PerSecond, ProxyProtocol, Sessions, Size, SocketPath, State,
    UrlPath, Whole,
};
use super::{AccessLog, BareDatagrams, Fallback, Format, Level, Mode, OnRevoke, Protocol};
use crate::id::EndpointId;

/// Everything that was written, in all files, and what was wrong with its form.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The main file as a whole.
    pub(super) head: Option<Head>,
    pub(super) faults: Vec<Fault>,
    pub(super) process: Process,
    pub(super) admin: Admin,
    pub(super) health: HealthEndpoint,
    pub(super) log: Log,
    pub(super) timeouts: Timeouts,
    pub(super) drain: Drain,
    pub(super) dns: Dns,
    pub(super) listeners: Vec<Listener>,
    pub(super) pools: Vec<Pool>,
    pub(super) tenants: Vec<Tenant>,
    /// `[tenant-defaults]`
    pub(super) tenant_defaults: TenantDefaults,
    /// Where `[tenant-defaults]` stands.
    pub(super) defaults: Option<Head>,
}

/// `[process]`
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) workers: Field<Whole<0, 1024>>,
    pub(super) max_sessions: Field<Count<0>>,
    pub(super) pipe_memory: Field<Size>,
    pub(super) buffer_memory: Field<Size>,
    pub(super) unsent_memory: Field<Size>,
    pub(super) watch: Field<bool>,
}

impl Process {
    pub(super) fn read(head: &Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Admin {
    pub(super) head: Option<Head>,
    pub(super) bind: Field<SocketAddr>,
    pub(super) socket: Field<SocketPath>,
    pub(super) hosts: Field<List<HostName>>,
}

impl Admin {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (bind, socket) = (section.take("bind"), section.take("socket"));
        let hosts = section.take_list("hosts");
        section.finish();
        Self { head: Some(head), bind, socket, hosts }
    }
}

/// `[health]`
#[derive(Debug, Default)]
pub(super) struct HealthEndpoint {
    pub(super) head: Option<Head>,
    pub(super) bind: Field<SocketAddr>,
    pub(super) path: Field<UrlPath>,
    pub(super) trusted_sources: Field<List<IpNet>>,
}

impl HealthEndpoint {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (bind, path) = (section.take("bind"), section.take("path"));
        let trusted_sources = section.take_list("trusted-sources");
        section.finish();
        Self { head: Some(head), bind, path, trusted_sources }
    }
}

/// `[log]`
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) level: Field<Level>,
    pub(super) format: Field<Format>,
    pub(super) access: Field<AccessLog>,
}

impl Log {
    pub(super) fn read(head: &Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Timeouts {
    pub(super) head: Option<Head>,
    pub(super) header: Field<Duration>,
    pub(super) connect: Field<Duration>,
    pub(super) idle: Field<Duration>,
    pub(super) half_close: Field<Duration>,
    pub(super) flow_idle: Field<Duration>,
    pub(super) tcp_user_timeout: Field<Duration>,
    pub(super) stall: Field<Duration>,
}

impl Timeouts {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Drain {
    pub(super) notice: Field<Duration>,
    pub(super) quiet: Field<Duration>,
    pub(super) idle: Field<Duration>,
    pub(super) deadline: Field<Duration>,
}

impl Drain {
    pub(super) fn read(head: &Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Dns {
    pub(super) head: Option<Head>,
    pub(super) servers: Field<List<Nameserver>>,
    pub(super) timeout: Field<Duration>,
    pub(super) min_ttl: Field<Duration>,
    pub(super) max_ttl: Field<Duration>,
    pub(super) allow_answers: Field<List<IpNet>>,
}

impl Dns {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Listener {
    pub(super) head: Head,
    pub(super) name: Field<Name>,
    pub(super) bind: Field<List<Ports>>,
    pub(super) protocol: Field<Protocol>,
    pub(super) proxy_protocol: Field<ProxyProtocol>,
    pub(super) trusted_sources: Field<List<IpNet>>,
    pub(super) verify_crc: Field<bool>,
    pub(super) pool: Field<String>,
    pub(super) on_no_endpoint: Field<Fallback>,
    pub(super) on_unknown_endpoint: Field<Fallback>,
    pub(super) bare_datagrams: Field<BareDatagrams>,
    pub(super) tenant: Field<String>,
    pub(super) max_pending: Field<Count<1>>,
}

impl Listener {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
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
pub(super) struct Tenant {
    pub(super) head: Head,
    pub(super) name: Field<Name>,
    pub(super) endpoints: Field<List<EndpointId>>,
    pub(super) pool: Field<String>,
    pub(super) routes: Field<Pairs<String>>,
    pub(super) state: Field<State>,
    pub(super) labels: Field<Pairs<String>>,
    pub(super) revoke: Revoke,
    pub(super) limits: Limits,
}

impl Tenant {
    pub(super) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (name, endpoints) = (section.require("name", "\"acme\""), section.take_list("endpoints"));
        let (pool, routes) = (section.take("pool"), section.take_pairs("routes"));
        let (state, labels) = (section.take("state"), section.take_pairs("labels"));
        let revoke = Revoke::within(&mut section);
        let limits = Limits::within(&mut section);
        section.finish();
        Self { head, name, endpoints, pool, routes, state, labels, revoke, limits }
    }
}

/// `on-revoke` and `revoke-grace` of `[[tenant]]` and `[tenant-defaults]`
#[derive(Debug, Default)]
pub(super) struct Revoke {
    pub(super) on_revoke: Field<OnRevoke>,
    pub(super) grace: Field<Duration>,
}

impl Revoke {
    fn within(section: &mut Section<'_, '_>) -> Self {
        Self { on_revoke: section.take("on-revoke"), grace: section.take("revoke-grace") }
    }
}

/// `[tenant-defaults]`
#[derive(Debug, Default)]
pub(super) struct TenantDefaults {
    pub(super) revoke: Revoke,
    pub(super) limits: Limits,
}

impl TenantDefaults {
    pub(super) fn read(head: &Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
        let mut section = Section::open(head, table, faults);
        let (revoke, limits) = (Revoke::within(&mut section), Limits::within(&mut section));
        section.finish();
        Self { revoke, limits }
    }
}

/// `[tenant.limits]` and `[tenant-defaults.limits]`
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) mode: Field<Mode>,
    pub(super) sessions: Field<Sessions>,
    pub(super) session_rate: Field<Interval>,
    pub(super) session_burst: Field<Count<1>>,
    pub(super) to_backend: Field<PerSecond>,
    pub(super) to_backend_burst: Field<Size>,
    pub(super) to_client: Field<PerSecond>,
    pub(super) to_client_burst: Field<Size>,
    pub(super) flows: Field<Sessions>,
    pub(super) datagram_rate: Field<Interval>,
    pub(super) datagram_burst: Field<Count<1>>,
}

impl Limits {
    fn within(section: &mut Section<'_, '_>) -> Self {
        match section.take_table("limits") {
            Field::Given(table) => Self::read(section.nested("limits.", table)),
            Field::Absent | Field::Faulty => Self::default(),
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
