//! What a reload may change, and how often it did.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::config::Config;

/// What a reload must not change, and how often there was one.
#[derive(Debug)]
pub struct Reloads {
    /// All but the tenants, as it was at the start.
    first: Config,
    pub(super) turn: Mutex<()>,
    done: AtomicU64,
    refused: AtomicU64,
    successful: AtomicBool,
}

/// The table that a reload must not change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: must be as it was at the start, for a reload changes tenants only; a change needs a restart")]
pub struct Frozen(String);

impl Reloads {
    pub(super) fn new(config: &Config) -> Self {
        let first = Config {
            process: config.process.clone(),
            admin: config.admin.clone(),
            health: config.health.clone(),
            log: config.log.clone(),
            timeouts: config.timeouts,
            drain: config.drain,
            dns: config.dns.clone(),
            listeners: config.listeners.clone(),
            pools: config.pools.clone(),
            tenants: Vec::new(),
        };
        Self {
            first,
            turn: Mutex::default(),
            done: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            successful: AtomicBool::new(true),
        }
    }

    /// Finds the first table that differs and must not.
    pub(super) fn judge(&self, config: &Config) -> Result<(), Frozen> {
        let Config { process, admin, health, log, timeouts, drain, dns, listeners, pools, tenants: _ } =
            &self.first;
        let tables = [
            ("[process]", *process == config.process),
            ("[admin]", *admin == config.admin),
            ("[health]", *health == config.health),
            ("[log]", *log == config.log),
            ("[timeouts]", *timeouts == config.timeouts),
            ("[drain]", *drain == config.drain),
            ("[dns]", *dns == config.dns),
        ];
        if let Some((table, _)) = tables.iter().find(|(_, same)| !same) {
            return Err(Frozen((*table).to_owned()));
        }
        same("listener", listeners, &config.listeners, |listener| &listener.name)?;
        same("pool", pools, &config.pools, |pool| &pool.name)
    }

    pub(super) fn accept(&self) {
        self.done.fetch_add(1, Ordering::AcqRel);
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

/// Tables that stand many times: the same ones, in the same order, for a place is how they are found.
fn same<T: PartialEq>(
    kind: &str,
    before: &[T],
    after: &[T],
    name: impl Fn(&T) -> &String,
) -> Result<(), Frozen> {
    let differing =
        before.iter().zip(after).find(|(before, after)| before != after).map(|(before, _)| before);
    let longer = if before.len() > after.len() { before } else { after };
    let odd = differing.or_else(|| longer.get(before.len().min(after.len())));
    odd.map_or(Ok(()), |odd| Err(Frozen(format!("{kind} \"{}\"", name(odd)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
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
        [[listener]]
        name = "web"
        bind = "0.0.0.0:8080"
        trusted-sources = ["10.0.0.0/16"]
        pool = "app"
        [[pool]]
        name = "app"
        backends = ["10.0.1.10:80"]
        [[tenant]]
        name = "acme"
    "#;

    fn frozen(first: &str, next: &str) -> Option<String> {
        let [first, next] = [first, next].map(|text| Config::parse("test.toml", text).unwrap());
        Reloads::new(&first).judge(&next).err().map(|Frozen(table)| table)
    }

    #[test]
    fn tenants_may_change_and_nothing_else() {
        for (before, after, table) in [
            ("workers = 2", "workers = 3", "[process]"),
            ("127.0.0.1:9900", "127.0.0.1:9901", "[admin]"),
            ("/healthz", "/health", "[health]"),
            ("\"info\"", "\"warn\"", "[log]"),
            ("350s", "351s", "[timeouts]"),
            ("idle = \"30s\"", "idle = \"31s\"", "[drain]"),
            ("10.0.0.2", "10.0.0.3", "[dns]"),
            ("10.0.0.0/16", "10.1.0.0/16", "listener \"web\""),
            ("10.0.1.10:80", "10.0.1.11:80", "pool \"app\""),
            ("[\"10.0.1.10:80\"]", "[{ address = \"10.0.1.10:80\", weight = 99 }]", "pool \"app\""),
        ] {
            assert_eq!(frozen(TEXT, &TEXT.replace(before, after)).as_deref(), Some(table));
        }
        let pool = "[[pool]]\nname = \"more\"\nbackends = [\"10.0.1.10:80\"]\n";
        let more = format!("{TEXT}\n{pool}");
        assert_eq!(frozen(TEXT, &more).as_deref(), Some("pool \"more\""));
        assert_eq!(frozen(&more, TEXT).as_deref(), Some("pool \"more\""));
        let tenants =
            TEXT.replace("acme", "globex") + "[tenant.limits]\nsessions = 5\n[[tenant]]\nname = \"acme\"\n";
        assert_eq!(frozen(TEXT, &tenants), None);
    }
}
