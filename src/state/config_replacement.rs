//! Replaces the configuration in force: what a reload may change, and counts of reloads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use super::listener_rows::ListenerRows;
use super::shared_pools;
use super::{ChangeCount, ConfigChanges, LiveState, Snapshot};
use crate::account::lock;
use crate::clock;
use crate::clock::Moment;
use crate::config::Config;
use crate::config::diff::changed_tables;
use crate::pool::{Answers, Pool};

/// The state kept between reloads, and their counts.
#[derive(Debug)]
pub struct ReloadHistory {
    persistent: Mutex<PersistentNames>,
    done: AtomicU64,
    refused: AtomicU64,
    successful: AtomicBool,
    /// Milliseconds of Unix time.
    last_done: AtomicU64,
}

/// Objects found again by name.
#[derive(Debug)]
struct PersistentNames {
    rows: ListenerRows,
    /// Pools that are configured no more, as long as a session has one: it may come back.
    removed: HashMap<String, Weak<Pool>>,
}

/// The changed tables that need a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartNeeded(Vec<&'static str>);

impl std::error::Error for RestartNeeded {}

impl std::fmt::Display for RestartNeeded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut messages = self.messages();
        messages.next().into_iter().try_for_each(|first| f.write_str(&first))?;
        messages.try_for_each(|message| write!(f, "\n{message}"))
    }
}

impl RestartNeeded {
    /// Finds every table that differs and must not.
    pub(super) fn judge(present: &Config, config: &Config) -> Result<(), Self> {
        let tables = changed_tables(present, config).into_iter();
        let differing: Vec<_> =
            tables.filter(|(table, _)| table.needs_restart).map(|(table, _)| table.heading).collect();
        if differing.is_empty() { Ok(()) } else { Err(Self(differing)) }
    }

    /// What the operator is told, a message for each table.
    pub fn messages(&self) -> impl Iterator<Item = String> + '_ {
        self.0
            .iter()
            .map(|table| format!("{table} changed: this needs a restart or a takeover; reload refused"))
    }
}

/// A reload in progress. Holds the lock until dropped.
#[derive(Debug)]
pub struct ConfigReplacement<'a> {
    live: &'a LiveState,
    persistent: MutexGuard<'a, PersistentNames>,
}

impl ConfigReplacement<'_> {
    /// The places that these listeners will have.
    #[must_use]
    pub fn places(&self, config: &Config) -> Vec<u32> {
        let mut new = 0;
        let rows = &self.persistent.rows;
        config.listeners.iter().map(|listener| rows.place(&listener.name, &mut new)).collect()
    }

    /// Applies the configuration. Listeners accept at `bound`, by place; names lead to what `answers` has of them.
    #[must_use]
    pub fn put(
        mut self,
        config: &Arc<Config>,
        bound: Vec<Vec<SocketAddr>>,
        answers: &Answers,
        now: Moment,
    ) -> ConfigChanges {
        let Self { live, persistent } = &mut self;
        let (present, before) = (live.config.load_full(), live.snapshot.load_full());
        let changes = ConfigChanges::between(&present, config);
        persistent.rows.set(&config.listeners);
        // Places of pools and tenants follow their order; those of listeners stay. Snapshots that sessions hold for long share
        // what is large.
        let same_tenants =
            names(&present.tenants, |tenant| &tenant.name).eq(names(&config.tenants, |tenant| &tenant.name));
        let same_pools = names(&present.pools, |pool| &pool.name).eq(names(&config.pools, |pool| &pool.name));
        let is_same = changes.tenants == ChangeCount::default() && same_tenants && same_pools;
        let directory = is_same.then(|| Arc::clone(&before.directory));
        let bare = Snapshot::new(config, &live.labels, &live.quotas, &persistent.rows, directory);
        // Last of all, for from here on the old pools' sessions reach the new ones.
        let pools = persistent.pools(live, &present, &before, config, answers, now);
        let takes_away = changes.takes_away(&present, config);
        let revocations = before.revocations.wrapping_add(u32::from(takes_away));
        let next = Arc::new(Snapshot { pools, revocations, ..bare });
        shared_pools::update_pools(&next);
        live.bound.store(Arc::new(bound));
        live.snapshot.store(next);
        live.config.store(Arc::clone(config));
        lock(&live.replaced).push(before);
        live.quotas.forget_unused();
        live.reloads.accept();
        changes
    }
}

impl PersistentNames {
    /// The pools of a configuration: unchanged ones, replacements of changed ones, and new ones.
    fn pools(
        &mut self,
        live: &LiveState,
        present: &Config,
        before: &Snapshot,
        config: &Config,
        answers: &Answers,
        now: Moment,
    ) -> Vec<Arc<Pool>> {
        let own = present
            .pools
            .iter()
            .zip(&before.pools)
            .map(|(config, pool)| (config.name.as_str(), (config, pool)));
        let mut own: HashMap<_, _> = own.collect();
        let pools = config.pools.iter().map(|wanted| {
            let known = own.remove(wanted.name.as_str());
            if let Some((_, pool)) = known.filter(|(config, _)| *config == wanted) {
                return Arc::clone(pool);
            }
            let removed = || self.removed.remove(&wanted.name)?.upgrade();
            let before = known.map(|(_, pool)| Arc::clone(pool)).or_else(removed);
            Pool::replace(before.as_ref(), wanted, &live.labels, answers, now)
        });
        let pools: Vec<_> = pools.collect();
        self.removed.retain(|_, pool| pool.strong_count() > 0);
        let gone = own.into_iter().map(|(name, (_, pool))| (name.to_owned(), Arc::downgrade(pool)));
        self.removed.extend(gone);
        pools
    }
}

impl ReloadHistory {
    pub(super) fn new(rows: ListenerRows) -> Self {
        Self {
            persistent: Mutex::new(PersistentNames { rows, removed: HashMap::new() }),
            done: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            successful: AtomicBool::new(true),
            last_done: AtomicU64::new(unix_ms()),
        }
    }

    pub(super) fn turn<'a>(&'a self, live: &'a LiveState) -> ConfigReplacement<'a> {
        ConfigReplacement { live, persistent: lock(&self.persistent) }
    }

    pub(super) fn accept(&self) {
        self.done.fetch_add(1, Ordering::AcqRel);
        self.last_done.store(unix_ms(), Ordering::Release);
        self.successful.store(true, Ordering::Release);
    }

    /// Counts a reload that was refused, because the configuration has faults or changes what it must not.
    pub fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::AcqRel);
        self.successful.store(false, Ordering::Release);
    }

    /// Reloads that put their configuration in force.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// When one, or the start, last put its configuration in force, in Unix time.
    #[must_use]
    pub fn last_done(&self) -> Duration {
        Duration::from_millis(self.last_done.load(Ordering::Acquire))
    }

    /// Reloads that were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Acquire)
    }

    /// Whether the last one, or the start, put its configuration in force.
    #[must_use]
    pub fn last_was_successful(&self) -> bool {
        self.successful.load(Ordering::Acquire)
    }
}

/// The names of all, in their order.
fn names<T>(all: &[T], name: impl Fn(&T) -> &String) -> impl Iterator<Item = &String> {
    all.iter().map(name)
}

fn unix_ms() -> u64 {
    u64::try_from(clock::unix().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_text::{LISTENER, POOL};

    const TABLES: &str = r#"
        [process]
        workers = 2
        [admin]
        bind = "127.0.0.1:9900"
        [health]
        path = "/healthz"
        [log]
        level = "info"
        [timeouts]
        idle = "350s"
        [drain]
        idle = "30s"
        [dns]
        servers = ["10.0.0.2"]
        [[tenant]]
        name = "acme"
    "#;

    fn text() -> String {
        [TABLES, LISTENER, POOL].concat()
    }

    fn frozen(first: &str, next: &str) -> Vec<&'static str> {
        let [first, next] = [first, next].map(|text| Config::parse("test.toml", text).unwrap());
        RestartNeeded::judge(&first, &next).err().map_or_else(Vec::new, |RestartNeeded(tables)| tables)
    }

    #[test]
    fn change_that_needs_a_restart_is_reported_by_table() {
        let changes = [
            ("workers = 2", "workers = 3", "[process]"),
            ("127.0.0.1:9900", "127.0.0.1:9901", "[admin]"),
            ("/healthz", "/health", "[health]"),
            ("\"info\"", "\"warn\"", "[log]"),
            ("10.0.0.2", "10.0.0.3", "[dns]"),
        ];
        let text = text();
        let mut all = text.clone();
        for (before, after, table) in changes {
            assert_eq!(frozen(&text, &text.replace(before, after)), [table]);
            all = all.replace(before, after);
        }
        assert_eq!(frozen(&text, &all), changes.map(|(.., table)| table));
        let told = RestartNeeded(vec!["[process]", "[dns]"]).to_string();
        let told: Vec<_> = told.lines().map(|line| line.split_once(" changed: ").unwrap().0).collect();
        assert_eq!(told, ["[process]", "[dns]"]);
    }

    #[test]
    fn change_of_other_tables_needs_no_restart() {
        for (before, after) in [
            ("350s", "351s"),
            ("idle = \"30s\"", "idle = \"31s\""),
            ("10.0.0.0/16", "10.1.0.0/16"),
            ("10.0.1.10:80", "10.0.1.11:80"),
            ("acme", "globex"),
        ] {
            assert!(frozen(&text(), &text().replace(before, after)).is_empty());
        }
    }
}
