//! The configuration, made of what was written and of the contract's defaults. Called where no fault was found.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use toml::Spanned;

use super::{limits, tenant};
use crate::config::raw::{self, RawConfig};
use crate::config::section::{Pairs, ParsedField, ParsedList};
use crate::config::value::{
    BoundedInt, ByteSize, Count, MatchKind, PathAndQuery, PreferZone, ProbeBytes, ProbeKind,
    ProxyProtocolMode, SendProxy, TableName, TenantState, UrlPath,
};
use crate::config::{
    AccessLogTarget, AdminConfig, BackendConfig, Balance, BareDatagrams, Config, DnsConfig, DrainConfig,
    EjectionConfig, Fallback, HealthConfig, ListenerConfig, ListenerIdentity, LogConfig, LogFormat, LogLevel,
    PoolConfig, ProbeCheck, ProbeConfig, ProcessConfig, Protocol, QueueConfig, TenantConfig, TimeoutConfig,
};

/// Where the admin pages are read, by default: from this machine only.
pub(super) const ADMIN_BIND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9900);
/// Where the health check asks, by default.
pub(super) const HEALTH_BIND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8081);
/// From one probe of a backend to the next, by default.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// What one probe may take, by default.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// An answer to a question for a name counts at least this long, by default.
pub(super) const MIN_TTL: Duration = Duration::from_secs(1);
/// And at most this long.
pub(super) const MAX_TTL: Duration = Duration::from_secs(60);
/// Bytes of all splice pipes together, by default: 64 MiB.
const PIPE_MEMORY: u64 = 64 << 20;
/// Bytes that wait for slow readers, by default: 32 MiB, so that a container of 64 MiB has room for the rest.
const BUFFER_MEMORY: u64 = 32 << 20;
/// Bytes that the kernel takes for one connection without a splice pipe beyond what it has sent, by default.
const UNSENT_MEMORY: u64 = 128 << 10;

/// Makes the configuration.
pub(super) fn config(written: RawConfig) -> Config {
    Config {
        process: ProcessConfig {
            workers: written.process.workers.or(BoundedInt(0)).as_usize(),
            max_sessions: written.process.max_sessions.or(BoundedInt(0)).as_usize(),
            pipe_memory: written.process.pipe_memory.or(ByteSize(PIPE_MEMORY)).0,
            buffer_memory: written.process.buffer_memory.or(ByteSize(BUFFER_MEMORY)).0,
            unsent_memory: written.process.unsent_memory.or(ByteSize(UNSENT_MEMORY)).0,
            watch: written.process.watch.or(false),
        },
        admin: AdminConfig {
            bind: written.admin.bind.or(ADMIN_BIND),
            socket: written.admin.socket.value().map(|socket| socket.0),
            hosts: items(written.admin.hosts).into_iter().map(|host| host.0).collect(),
        },
        health: HealthConfig {
            bind: written.health.bind.or(HEALTH_BIND),
            path: written.health.path.or(UrlPath("/healthz".to_owned())).0,
            trusted_sources: items(written.health.trusted_sources),
        },
        log: LogConfig {
            level: written.log.level.or(LogLevel::Info),
            format: written.log.format.or(LogFormat::Json),
            access: written.log.access.or(AccessLogTarget::Stdout),
        },
        timeouts: TimeoutConfig {
            header: seconds(written.timeouts.header, 60),
            connect: seconds(written.timeouts.connect, 3),
            idle: seconds(written.timeouts.idle, 350),
            half_close: seconds(written.timeouts.half_close, 60),
            flow_idle: seconds(written.timeouts.flow_idle, 120),
            tcp_user_timeout: seconds(written.timeouts.tcp_user_timeout, 120),
            stall: seconds(written.timeouts.stall, 100),
        },
        drain: DrainConfig {
            notice: seconds(written.drain.notice, 30),
            quiet: seconds(written.drain.quiet, 10),
            idle: seconds(written.drain.idle, 30),
            deadline: seconds(written.drain.deadline, 300),
        },
        dns: DnsConfig {
            servers: items(written.dns.servers).into_iter().map(|server| server.0).collect(),
            timeout: seconds(written.dns.timeout, 2),
            min_ttl: written.dns.min_ttl.or(MIN_TTL),
            max_ttl: written.dns.max_ttl.or(MAX_TTL),
            allow_answers: items(written.dns.allow_answers),
        },
        listeners: written.listeners.into_iter().map(listener).collect(),
        pools: written.pools.into_iter().map(pool).collect(),
        tenants: written.tenants.into_iter().map(|own| tenant(own, &written.tenant_defaults)).collect(),
    }
}

fn seconds(field: ParsedField<Duration>, default: u64) -> Duration {
    field.or(Duration::from_secs(default))
}

/// A name that must be there: where it is not, that was a fault and this is never called.
fn name(field: ParsedField<TableName>) -> String {
    field.value().map(|name| name.0).unwrap_or_default()
}

fn items<T>(field: ParsedField<ParsedList<T>>) -> Vec<T> {
    field.value().map(|list| list.items.into_iter().map(Spanned::into_inner).collect()).unwrap_or_default()
}

fn pairs<M: FromIterator<(String, String)>>(field: ParsedField<Pairs<String>>) -> M {
    let pairs = field.value().unwrap_or_default();
    pairs.into_iter().map(|(key, value)| (key.into_inner(), value.into_inner())).collect()
}

fn listener(written: raw::RawListener) -> ListenerConfig {
    let trusted = items(written.trusted_sources);
    let identity = match written.proxy_protocol.or(ProxyProtocolMode::Require) {
        ProxyProtocolMode::Require => ListenerIdentity::Header {
            trusted,
            verify_crc: written.verify_crc.or(true),
            on_no_endpoint: written.on_no_endpoint.or(Fallback::Reject),
            on_unknown_endpoint: written.on_unknown_endpoint.or(Fallback::Reject),
            bare_datagrams: written.bare_datagrams.or(BareDatagrams::Refuse),
        },
        ProxyProtocolMode::Off => {
            ListenerIdentity::Fixed { tenant: written.tenant.value().unwrap_or_default(), trusted }
        }
    };
    ListenerConfig {
        protocol: written.protocol.or(Protocol::Tcp),
        name: name(written.name),
        bind: items(written.bind).iter().flat_map(crate::config::unit::BindPorts::iter).collect(),
        identity,
        pool: written.pool.value(),
        max_pending: written.max_pending.or(BoundedInt(4096)).as_usize(),
    }
}

fn pool(written: raw::RawPool) -> PoolConfig {
    let ejection = written.ejection;
    PoolConfig {
        name: name(written.name),
        balance: written.balance.or(Balance::P2c),
        backends: items(written.backends).into_iter().filter_map(backend).collect(),
        prefer_zone: written.prefer_zone.or(PreferZone(None)).0,
        send_proxy: written.send_proxy.or(SendProxy(false)).0,
        attempts: written.attempts.or(BoundedInt(3)).as_u32(),
        retry_budget: written.retry_budget.or(BoundedInt(20)).as_u32(),
        slow_start: seconds(written.slow_start, 0),
        source_addresses: items(written.source_addresses),
        queue: QueueConfig {
            length: written.queue.length.or(BoundedInt(0)).as_usize(),
            timeout: seconds(written.queue.timeout, 1),
        },
        panic_threshold: written.panic_threshold.or(BoundedInt(0)).as_u32(),
        health: probe(written.health),
        ejection: EjectionConfig {
            consecutive_failures: ejection.consecutive_failures.or(BoundedInt(5)).as_u32(),
            base_time: seconds(ejection.base_time, 30),
            max_percent: ejection.max_percent.or(BoundedInt(50)).as_u32(),
        },
    }
}

/// A backend with its target, which must be there.
fn backend(written: raw::RawBackend) -> Option<BackendConfig> {
    Some(BackendConfig {
        target: written.address.value()?,
        weight: written.weight.or(BoundedInt(100)).as_u32(),
        zone: written.zone.value().map(|zone| zone.0),
        max_sessions: written.max_sessions.value().map(BoundedInt::as_u32),
        backup: written.backup.or(false),
    })
}

fn probe(written: raw::RawProbe) -> Option<ProbeConfig> {
    let count = |field: ParsedField<Count<1>>, default| field.or(BoundedInt(default)).as_u32();
    let ask = match written.kind.or(ProbeKind::Tcp) {
        ProbeKind::None => return None,
        ProbeKind::Tcp => ProbeCheck::Connect,
        ProbeKind::Http => ProbeCheck::Http {
            path: written.path.or(PathAndQuery("/".to_owned())).0,
            host: written.host.value().map(|host| host.0),
            expect_status: match written.expect_status {
                ParsedField::Absent => vec![200..=399],
                given @ (ParsedField::Given(_) | ParsedField::Faulty) => items(given),
            },
        },
        ProbeKind::Exchange => ProbeCheck::Exchange {
            protocol: written.protocol.or(Protocol::Tcp),
            send: written.send.or(ProbeBytes(Vec::new())).0,
            expect: written.expect.or(ProbeBytes(Vec::new())).0,
            prefix: written.matching.or(MatchKind::Contains) == MatchKind::Prefix,
        },
    };
    Some(ProbeConfig {
        interval: written.interval.or(PROBE_INTERVAL),
        timeout: written.timeout.or(PROBE_TIMEOUT),
        rise: count(written.rise, 2),
        fall: count(written.fall, 3),
        port: written.port.value().map(BoundedInt::as_u16),
        send_proxy: written.send_proxy.or(false),
        ask,
    })
}

fn tenant(written: raw::RawTenant, defaults: &raw::RawTenantDefaults) -> TenantConfig {
    let grace = limits::own_or_default(&written.revoke.grace, &defaults.revoke.grace);
    TenantConfig {
        limits: limits::effective(&written.limits, &defaults.limits),
        on_revoke: tenant::on_revoke(&written.revoke, &defaults.revoke),
        revoke_grace: grace.given().copied().unwrap_or_default(),
        name: name(written.name),
        endpoints: items(written.endpoints),
        pool: written.pool.value(),
        routes: pairs(written.routes),
        enabled: written.state.or(TenantState(true)).0,
        labels: pairs(written.labels),
    }
}
