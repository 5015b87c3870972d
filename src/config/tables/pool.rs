//! Pools, their backends, queues and checks.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::section::{ParsedField, ParsedList, Section, into_table};
use crate::config::table::{Field, Key, Kind, List, Presence, RawTable, Table, table};
use crate::config::value::{
    Count, HostHeader, Int, MatchKind, PathAndQuery, PositiveTime, PreferZone, ProbeBytes, ProbeKind,
    SendProxy, TableName,
};
use crate::config::{BackendTarget, Balance, ProbeCheck, Protocol};

table! {
    "[[pool]]", reload, "Interchangeable backends with one policy.";
    RawPool => PoolConfig;
    keys {
        "name" name: TableName => String, required "shared", "Its name, unique among pools.";
        "backends" backends: Backends => Vec<BackendConfig>, required ["10.0.1.10:80"],
            "Strings or tables, no duplicates; at most 32,000 addresses and 256 names. A string is the address of a table with no \
             other key.";
        "balance" balance: Balance => Balance, default "p2c",
            "The backend of a new session: p2c = the less loaded of two random ones, round-robin, least-sessions = fewest sessions \
             per weight, maglev = hash of the client address, maglev-endpoint = hash of the endpoint ID.";
        "prefer-zone" prefer_zone: PreferZone => Option<String>, default "",
            "Use backends of this zone first and other zones for the rest; at least one backend must be in it. \"\" = no preference.";
        "send-proxy" send_proxy: SendProxy => bool, default "off",
            "v2: send the client's PROXY v2 header, with its TLVs, to the backend.";
        "attempts" attempts: Int<u32, 1, 100> => u32, default 3,
            "Backends tried per session before the first byte is forwarded.";
        "retry-budget" retry_budget: Int<u32, 0, 100> => u32, default 20,
            "Percent: attempts after the first one per 100 sessions, so that a failing pool does not get a multiple of its load. 0 = \
             no second attempt.";
        "slow-start" slow_start: Duration => Duration, default "0s",
            "Time in which a backend that returns reaches its full weight and max-sessions; \"0s\" = at once, but 10 s after an \
             ejection.";
        "source-addresses" source_addresses: List<IpAddr> => Vec<IpAddr>, optional ["10.0.0.5"],
            "Local IPs for connections and probes. Each one adds local ports (28,232 by default) towards each backend. An IP that \
             is not local is an error at the start.";
        "panic-threshold" panic_threshold: Int<u32, 0, 100> => u32, default 0,
            "Percent: if fewer backends are healthy or not probed yet, health is ignored and all backends except backups are used. \
             0 = health is never ignored.";
    }
    tables {
        "queue" queue: RawQueue => QueueConfig, "The queue while every backend is full.";
        "health" health: RawProbe => Option<ProbeConfig>, "The active check; `None` takes every backend for healthy.";
        "ejection" ejection: RawEjection => EjectionConfig, "The passive check.";
    }
}

table! {
    "[[pool.backends]]" in "backends.", reload, "One backend of a pool, or all that a name leads to.";
    RawBackend => BackendConfig;
    keys {
        "address" target: BackendTarget => BackendTarget, required "10.0.1.10:80",
            "IP:port (an IPv6 address needs brackets); or host name:port, such as \"app.internal:80\": each A and AAAA address (at \
             most 64) becomes a backend with all values of this entry; or a service name without a port, such as \
             \"_http._tcp.app.internal\": its SRV records give port and weight, the lowest priority is primary, others backup.";
        "weight" weight: Int<u32, 0, 1000> => u32, default 100, "Relative share of new sessions; 0 = no new sessions.";
        "zone" zone: TableName => Option<String>, optional "usw2-az1", "A name, for prefer-zone.";
        "max-sessions" max_sessions: Count<u32, 1> => Option<u32>, optional 5000,
            "Open sessions. Beyond it sessions go to another backend (also in other zones, but not to a backup) or wait in the \
             queue. Tenants share it.";
        "backup" backup: bool => bool, default false, "Used only while no other backend can be used.";
    }
}

table! {
    "[pool.queue]" in "queue.", reload, "The queue for sessions while every backend is at max-sessions.";
    RawQueue => #[derive(Copy)] QueueConfig;
    keys {
        "length" length: Int<usize, 0, 100_000> => usize, default 0,
            "Sessions that may wait; 0 = none. Above 0 a backend needs max-sessions.";
        "timeout" timeout: PositiveTime => Duration, default "1s", "The longest wait.";
    }
}

table! {
    "[pool.health]" in "health.", reload,
        "The active check of a pool's backends. Keys of another kind are errors; with kind = \"none\" any other key is. A pool used \
         by UDP listeners only needs an exchange by UDP or a port of its own.";
    RawProbe => ProbeConfig;
    keys {
        "kind" kind: ProbeKind, default "tcp",
            "tcp = connect and close, http = an HTTP/1.1 GET request, exchange = send bytes and compare the answer, none = all \
             backends count as healthy.";
        "interval" interval: PositiveTime => Duration, default "5s", "Between two probes of a backend.";
        "timeout" timeout: PositiveTime => Duration, default "2s", "Of one probe, at most the interval.";
        "rise" rise: Count<u32, 1> => u32, default 2, "Consecutive successes that make a backend healthy.";
        "fall" fall: Count<u32, 1> => u32, default 3, "Consecutive failures that make a backend unhealthy.";
        "send-proxy" send_proxy: bool => bool, default false, "Send a PROXY v2 header with the command LOCAL first.";
        "port" port: Int<u16, 1, 65_535> => Option<u16>, optional 8080,
            "Port of the probe. Default: the backend's port.";
        "path" path: PathAndQuery, conditional "/", "http: may contain a query.";
        "host" host: HostHeader, optional "db.internal", "http: Host header. Default: the backend's address.";
        "expect-status" expect_status: List<RangeInclusive<u16>>, conditional ["200-399"],
            "http: status codes or ranges, 100 to 599, that count as success.";
        "send" send: ProbeBytes<0>, conditional "",
            "exchange: a string, or \"hex:\" and hex digits; at most 4096 bytes. \"\" = the server speaks first.";
        "expect" expect: ProbeBytes<1>, optional "+PONG",
            "exchange: required there, not empty; a string, or \"hex:\" and hex digits; at most 4096 bytes.";
        "match" matching: MatchKind, conditional "contains",
            "exchange: where in the answer the expected bytes stand.";
        "protocol" protocol: Protocol, conditional "tcp",
            "exchange: over a connection, or one datagram and the first answer.";
    }
    made {
        "What is asked." ask: ProbeCheck = ask;
    }
}

table! {
    "[pool.ejection]" in "ejection.", reload, "The passive health check: ejection after failed sessions.";
    RawEjection => #[derive(Copy)] EjectionConfig;
    keys {
        "consecutive-failures" consecutive_failures: Int<u32, 0, 1000> => u32, default 5,
            "Consecutive failed sessions that eject a backend; 0 = never.";
        "base-time" base_time: PositiveTime => Duration, default "30s",
            "Duration of the first ejection; doubled by each further one, up to 10 minutes.";
        "max-percent" max_percent: Int<u32, 0, 100> => u32, default 50,
            "Percent of the backends that may be ejected at once.";
    }
}

impl RawPool {
    /// The backends that were written, whether or not their keys could be read.
    pub(in crate::config) fn backends(&self) -> impl Iterator<Item = &RawBackend> {
        self.backends.given().into_iter().flat_map(|list| &list.items).map(Spanned::get_ref)
    }
}

/// The list of backends, in which a text is short for a table with nothing but an address.
pub(in crate::config) struct Backends;

impl Kind for Backends {
    type Parsed = ParsedList<RawBackend>;

    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<Self::Parsed> {
        let value = match section.take_raw(key) {
            ParsedField::Given(value) => value,
            ParsedField::Absent => return ParsedField::Absent,
            ParsedField::Faulty => return ParsedField::Faulty,
        };
        let span = value.span();
        let Some(values) = section.array(key, value) else { return ParsedField::Faulty };
        let items = values.into_iter().map(|value| backend(section, value)).collect();
        ParsedField::Given(Spanned::new(span, ParsedList { items, complete: true }))
    }
}

fn backend<'i>(pool: &mut Section<'i, '_>, value: Spanned<DeValue<'i>>) -> Spanned<RawBackend> {
    let span = value.span();
    let table = into_table(value.into_inner()).unwrap_or_else(|short| {
        let mut table = DeTable::new();
        table.insert(Spanned::new(span.clone(), "address".into()), Spanned::new(span.clone(), short));
        table
    });
    let section = pool.nested("backends.", Spanned::new(span.clone(), table));
    Spanned::new(span, RawBackend::read(section))
}

impl From<ParsedList<RawBackend>> for Vec<BackendConfig> {
    fn from(list: ParsedList<RawBackend>) -> Self {
        list.items.into_iter().map(|backend| backend.into_inner().into()).collect()
    }
}

impl From<RawProbe> for Option<ProbeConfig> {
    fn from(raw: RawProbe) -> Self {
        (raw.kind.effective() != Some(ProbeKind::None)).then(|| raw.into())
    }
}

fn ask(raw: &RawProbe) -> ProbeCheck {
    match raw.kind.clone().into_value() {
        ProbeKind::None | ProbeKind::Tcp => ProbeCheck::Connect,
        ProbeKind::Http => ProbeCheck::Http {
            path: raw.path.clone().into_value(),
            host: raw.host.given().cloned(),
            expect_status: raw.expect_status.clone().into_value().into(),
        },
        ProbeKind::Exchange => ProbeCheck::Exchange {
            protocol: raw.protocol.clone().into_value(),
            send: raw.send.clone().into_value(),
            expect: raw.expect.given().cloned().unwrap_or_default(),
            prefix: raw.matching.effective() == Some(MatchKind::Prefix),
        },
    }
}
