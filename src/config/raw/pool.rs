//! What stands in the tables of a pool, its backends and its checks.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::error::ConfigError;
use crate::config::section::{ParsedField, ParsedList, Section, TableHead, into_table};
use crate::config::value::{
    BoundedInt, Count, HostHeader, MatchKind, PathAndQuery, PreferZone, ProbeBytes, ProbeKind, SendProxy,
    TableName,
};
use crate::config::{BackendTarget, Balance, Protocol};

/// `[[pool]]`
#[derive(Debug)]
pub(in crate::config) struct RawPool {
    pub(in crate::config) head: TableHead,
    pub(in crate::config) name: ParsedField<TableName>,
    pub(in crate::config) balance: ParsedField<Balance>,
    pub(in crate::config) backends: ParsedField<ParsedList<RawBackend>>,
    pub(in crate::config) prefer_zone: ParsedField<PreferZone>,
    pub(in crate::config) send_proxy: ParsedField<SendProxy>,
    pub(in crate::config) attempts: ParsedField<BoundedInt<1, 100>>,
    pub(in crate::config) retry_budget: ParsedField<BoundedInt<0, 100>>,
    pub(in crate::config) slow_start: ParsedField<Duration>,
    pub(in crate::config) source_addresses: ParsedField<ParsedList<IpAddr>>,
    pub(in crate::config) queue: RawQueue,
    pub(in crate::config) panic_threshold: ParsedField<BoundedInt<0, 100>>,
    pub(in crate::config) health: RawProbe,
    pub(in crate::config) ejection: RawEjection,
}

impl RawPool {
    pub(in crate::config) fn read(
        head: TableHead,
        table: DeTable<'_>,
        faults: &mut Vec<ConfigError>,
    ) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (name, balance) = (section.require("name", "\"shared\""), section.take("balance"));
        let backends = backends(&mut section);
        let (prefer_zone, send_proxy) = (section.take("prefer-zone"), section.take("send-proxy"));
        let (attempts, retry_budget) = (section.take("attempts"), section.take("retry-budget"));
        let (slow_start, panic_threshold) = (section.take("slow-start"), section.take("panic-threshold"));
        let source_addresses = section.take_list("source-addresses");
        let queue = match section.take_table("queue") {
            ParsedField::Given(table) => RawQueue::read(section.nested("queue.", table)),
            ParsedField::Absent | ParsedField::Faulty => RawQueue::default(),
        };
        let health = match section.take_table("health") {
            ParsedField::Given(table) => RawProbe::read(section.nested("health.", table)),
            ParsedField::Absent | ParsedField::Faulty => RawProbe::default(),
        };
        let ejection = match section.take_table("ejection") {
            ParsedField::Given(table) => RawEjection::read(section.nested("ejection.", table)),
            ParsedField::Absent | ParsedField::Faulty => RawEjection::default(),
        };
        section.finish();
        Self {
            head,
            name,
            balance,
            backends,
            prefer_zone,
            send_proxy,
            attempts,
            retry_budget,
            slow_start,
            source_addresses,
            queue,
            panic_threshold,
            health,
            ejection,
        }
    }

    /// The backends that were written, whether or not their keys could be read.
    pub(in crate::config) fn backends(&self) -> impl Iterator<Item = &RawBackend> {
        self.backends.given().into_iter().flat_map(|list| &list.items).map(Spanned::get_ref)
    }
}

/// Reads the list of backends, in which a text is short for a table with nothing but an address.
fn backends(section: &mut Section<'_, '_>) -> ParsedField<ParsedList<RawBackend>> {
    const KEY: &str = "backends";
    let example = "[\"10.0.1.10:80\"]";
    let value = match section.take_raw(KEY) {
        ParsedField::Given(value) => value,
        ParsedField::Faulty => return ParsedField::Faulty,
        ParsedField::Absent => {
            section.missing(KEY, example);
            return ParsedField::Faulty;
        }
    };
    let span = value.span();
    let Some(values) = section.array(KEY, value) else { return ParsedField::Faulty };
    let items = values.into_iter().map(|value| RawBackend::read(section, value)).collect();
    ParsedField::Given(Spanned::new(span, ParsedList { items, complete: true }))
}

/// One of a pool's `backends`
#[derive(Debug)]
pub(in crate::config) struct RawBackend {
    /// It must be there: where it is not given, that is a fault already.
    pub(in crate::config) address: ParsedField<BackendTarget>,
    pub(in crate::config) weight: ParsedField<BoundedInt<0, 1000>>,
    pub(in crate::config) zone: ParsedField<TableName>,
    pub(in crate::config) max_sessions: ParsedField<Count<1>>,
    pub(in crate::config) backup: ParsedField<bool>,
}

impl RawBackend {
    fn read<'i>(pool: &mut Section<'i, '_>, value: Spanned<DeValue<'i>>) -> Spanned<Self> {
        /// The key that a text stands for.
        const ADDRESS: &str = "address";
        let span = value.span();
        let table = into_table(value.into_inner()).unwrap_or_else(|short| {
            let mut table = DeTable::new();
            table.insert(Spanned::new(span.clone(), ADDRESS.into()), Spanned::new(span.clone(), short));
            table
        });
        let mut section = pool.nested("backends.", Spanned::new(span.clone(), table));
        let read = Self {
            address: section.require(ADDRESS, "\"10.0.1.10:80\""),
            weight: section.take("weight"),
            zone: section.take("zone"),
            max_sessions: section.take("max-sessions"),
            backup: section.take("backup"),
        };
        section.finish();
        Spanned::new(span, read)
    }
}

/// A pool's `queue`
#[derive(Debug, Default)]
pub(in crate::config) struct RawQueue {
    pub(in crate::config) length: ParsedField<BoundedInt<0, 100_000>>,
    pub(in crate::config) timeout: ParsedField<Duration>,
}

impl RawQueue {
    fn read(mut section: Section<'_, '_>) -> Self {
        let read = Self { length: section.take("length"), timeout: section.take("timeout") };
        section.finish();
        read
    }
}

/// `[pool.health]`
#[derive(Debug, Default)]
pub(in crate::config) struct RawProbe {
    pub(in crate::config) kind: ParsedField<ProbeKind>,
    pub(in crate::config) interval: ParsedField<Duration>,
    pub(in crate::config) timeout: ParsedField<Duration>,
    pub(in crate::config) rise: ParsedField<Count<1>>,
    pub(in crate::config) fall: ParsedField<Count<1>>,
    pub(in crate::config) port: ParsedField<BoundedInt<1, 65_535>>,
    pub(in crate::config) send_proxy: ParsedField<bool>,
    pub(in crate::config) path: ParsedField<PathAndQuery>,
    pub(in crate::config) host: ParsedField<HostHeader>,
    pub(in crate::config) expect_status: ParsedField<ParsedList<RangeInclusive<u16>>>,
    pub(in crate::config) protocol: ParsedField<Protocol>,
    pub(in crate::config) send: ParsedField<ProbeBytes<0>>,
    pub(in crate::config) expect: ParsedField<ProbeBytes<1>>,
    /// `match`
    pub(in crate::config) matching: ParsedField<MatchKind>,
}

impl RawProbe {
    fn read(mut section: Section<'_, '_>) -> Self {
        let read = Self {
            kind: section.take("kind"),
            interval: section.take("interval"),
            timeout: section.take("timeout"),
            rise: section.take("rise"),
            fall: section.take("fall"),
            port: section.take("port"),
            send_proxy: section.take("send-proxy"),
            path: section.take("path"),
            host: section.take("host"),
            expect_status: section.take_list("expect-status"),
            protocol: section.take("protocol"),
            send: section.take("send"),
            expect: section.take("expect"),
            matching: section.take("match"),
        };
        section.finish();
        read
    }
}

/// `[pool.ejection]`
#[derive(Debug, Default)]
pub(in crate::config) struct RawEjection {
    pub(in crate::config) consecutive_failures: ParsedField<BoundedInt<0, 1000>>,
    pub(in crate::config) base_time: ParsedField<Duration>,
    pub(in crate::config) max_percent: ParsedField<BoundedInt<0, 100>>,
}

impl RawEjection {
    fn read(mut section: Section<'_, '_>) -> Self {
        let read = Self {
            consecutive_failures: section.take("consecutive-failures"),
            base_time: section.take("base-time"),
            max_percent: section.take("max-percent"),
        };
        section.finish();
        read
    }
}
