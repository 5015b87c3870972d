//! What stands in the tables of a pool, its backends and its checks.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::error::Fault;
use crate::config::section::{Field, Head, List, Section, into_table};
use crate::config::value::{
    Bytes, Count, HostHeader, Match, Name, PathAndQuery, PreferZone, ProbeKind, SendProxy, Whole,
};
use crate::config::{Balance, Protocol, Target};

/// `[[pool]]`
#[derive(Debug)]
pub(in crate::config) struct Pool {
    pub(in crate::config) head: Head,
    pub(in crate::config) name: Field<Name>,
    pub(in crate::config) balance: Field<Balance>,
    pub(in crate::config) backends: Field<List<Backend>>,
    pub(in crate::config) prefer_zone: Field<PreferZone>,
    pub(in crate::config) send_proxy: Field<SendProxy>,
    pub(in crate::config) attempts: Field<Whole<1, 100>>,
    pub(in crate::config) retry_budget: Field<Whole<0, 100>>,
    pub(in crate::config) slow_start: Field<Duration>,
    pub(in crate::config) source_addresses: Field<List<IpAddr>>,
    pub(in crate::config) queue: Queue,
    pub(in crate::config) panic_threshold: Field<Whole<0, 100>>,
    pub(in crate::config) health: Probe,
    pub(in crate::config) ejection: Ejection,
}

impl Pool {
    pub(in crate::config) fn read(head: Head, table: DeTable<'_>, faults: &mut Vec<Fault>) -> Self {
        let mut section = Section::open(&head, table, faults);
        let (name, balance) = (section.require("name", "\"shared\""), section.take("balance"));
        let backends = backends(&mut section);
        let (prefer_zone, send_proxy) = (section.take("prefer-zone"), section.take("send-proxy"));
        let (attempts, retry_budget) = (section.take("attempts"), section.take("retry-budget"));
        let (slow_start, panic_threshold) = (section.take("slow-start"), section.take("panic-threshold"));
        let source_addresses = section.take_list("source-addresses");
        let queue = match section.take_table("queue") {
            Field::Given(table) => Queue::read(section.nested("queue.", table)),
            Field::Absent | Field::Faulty => Queue::default(),
        };
        let health = match section.take_table("health") {
            Field::Given(table) => Probe::read(section.nested("health.", table)),
            Field::Absent | Field::Faulty => Probe::default(),
        };
        let ejection = match section.take_table("ejection") {
            Field::Given(table) => Ejection::read(section.nested("ejection.", table)),
            Field::Absent | Field::Faulty => Ejection::default(),
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
    pub(in crate::config) fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.backends.given().into_iter().flat_map(|list| &list.items).map(Spanned::get_ref)
    }
}

/// Reads the list of backends, in which a text is short for a table with nothing but an address.
fn backends(section: &mut Section<'_, '_>) -> Field<List<Backend>> {
    const KEY: &str = "backends";
    let example = "[\"10.0.1.10:80\"]";
    let value = match section.take_raw(KEY) {
        Field::Given(value) => value,
        Field::Faulty => return Field::Faulty,
        Field::Absent => {
            section.missing(KEY, example);
            return Field::Faulty;
        }
    };
    let span = value.span();
    let Some(values) = section.array(KEY, value) else { return Field::Faulty };
    let items = values.into_iter().map(|value| Backend::read(section, value)).collect();
    Field::Given(Spanned::new(span, List { items, complete: true }))
}

/// One of a pool's `backends`
#[derive(Debug)]
pub(in crate::config) struct Backend {
    /// It must be there: where it is not given, that is a fault already.
    pub(in crate::config) address: Field<Target>,
    pub(in crate::config) weight: Field<Whole<0, 1000>>,
    pub(in crate::config) zone: Field<Name>,
    pub(in crate::config) max_sessions: Field<Count<1>>,
    pub(in crate::config) backup: Field<bool>,
}

impl Backend {
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
pub(in crate::config) struct Queue {
    pub(in crate::config) length: Field<Whole<0, 100_000>>,
    pub(in crate::config) timeout: Field<Duration>,
}

impl Queue {
    fn read(mut section: Section<'_, '_>) -> Self {
        let read = Self { length: section.take("length"), timeout: section.take("timeout") };
        section.finish();
        read
    }
}

/// `[pool.health]`
#[derive(Debug, Default)]
pub(in crate::config) struct Probe {
    pub(in crate::config) kind: Field<ProbeKind>,
    pub(in crate::config) interval: Field<Duration>,
    pub(in crate::config) timeout: Field<Duration>,
    pub(in crate::config) rise: Field<Count<1>>,
    pub(in crate::config) fall: Field<Count<1>>,
    pub(in crate::config) port: Field<Whole<1, 65_535>>,
    pub(in crate::config) send_proxy: Field<bool>,
    pub(in crate::config) path: Field<PathAndQuery>,
    pub(in crate::config) host: Field<HostHeader>,
    pub(in crate::config) expect_status: Field<List<RangeInclusive<u16>>>,
    pub(in crate::config) protocol: Field<Protocol>,
    pub(in crate::config) send: Field<Bytes<0>>,
    pub(in crate::config) expect: Field<Bytes<1>>,
    /// `match`
    pub(in crate::config) matching: Field<Match>,
}

impl Probe {
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
pub(in crate::config) struct Ejection {
    pub(in crate::config) consecutive_failures: Field<Whole<0, 1000>>,
    pub(in crate::config) base_time: Field<Duration>,
    pub(in crate::config) max_percent: Field<Whole<0, 100>>,
}

impl Ejection {
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
