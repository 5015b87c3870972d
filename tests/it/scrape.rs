//! Questions about `/metrics` that cannot be misspelt: a metric, a label or a value that cannot exist is a panic, not a zero.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use vestibule::account::admin_connections::{AdminConnectionEnd, AdminEndpoint};
use vestibule::account::dns_counters::LookupResult;
use vestibule::account::names::{self, Metric, MetricKind};
use vestibule::account::session_metrics::ConnectResult;
use vestibule::account::udp_drops::DatagramDrop;
use vestibule::account::{Direction, ProbeResult};
use vestibule::admission::quota::Quota;
use vestibule::build_info;
use vestibule::config::Config;
use vestibule::outcome::{Outcome, Reason};
use vestibule::pool::cause::ChangeCause;
use vestibule::pool::selection::SelectionTier;
use vestibule::state::LiveState;
use vestibule::state::drain_progress::DrainPhase;

/// Labels whose values are names of the configuration under test.
const NAMES: [&str; 5] = ["listener", "tenant", "pool", "backend", "name"];

/// One row of a page: its labels and its value.
type Row = (BTreeMap<String, String>, f64);

/// Names that a configuration has, or had: a metric of theirs may have no row yet, or no row any more.
#[derive(Debug, Default)]
pub struct Known(BTreeSet<(&'static str, String)>);

impl Known {
    /// Adds a configuration's listeners, pools and tenants.
    pub fn config(&mut self, config: &Config) {
        let listeners = config.listeners.iter().map(|listener| ("listener", &listener.name));
        let pools = config.pools.iter().map(|pool| ("pool", &pool.name));
        let tenants = config.tenants.iter().map(|tenant| ("tenant", &tenant.name));
        self.0.extend(listeners.chain(pools).chain(tenants).map(|(label, name)| (label, name.clone())));
    }

    /// Adds what is in force: the configuration, the backends that it has now, and the DNS names.
    pub fn live(&mut self, live: &LiveState) {
        self.config(&live.config.load());
        for pool in &live.snapshot.load().pools {
            self.0.extend(pool.names().map(|name| ("name", name.to_string())));
            let roster = pool.candidates();
            self.0.extend(roster.backends().iter().map(|each| ("backend", each.label().name().to_owned())));
        }
    }

    /// Adds a backend that is in force at no time of which this knows.
    pub fn backend(&mut self, backend: SocketAddr) {
        self.0.insert(("backend", backend.to_string()));
    }

    /// A session's tenant and pool are empty until they are known, and the backend of what is for all of them.
    fn has(&self, label: &str, value: &str) -> bool {
        let is_unset = value.is_empty() && matches!(label, "tenant" | "pool" | "backend");
        is_unset || self.0.iter().any(|(known, name)| *known == label && name == value)
    }
}

/// Every value that a label of a metric can have; `None` where this table does not know.
fn values(metric: &str, label: &str) -> Option<BTreeSet<String>> {
    let outcomes = |word: fn(&Outcome) -> &'static str| Outcome::ALL.iter().map(word).collect();
    let words: Vec<&str> = match (label, metric) {
        ("by", _) => outcomes(|outcome| outcome.by.as_str()),
        ("at", _) => outcomes(|outcome| outcome.at.as_str()),
        ("why", "vestibule_sessions_ended_total") => outcomes(|outcome| outcome.why.as_str()),
        ("why", "vestibule_datagrams_dropped_total") => DatagramDrop::ALL.map(DatagramDrop::as_str).into(),
        ("why", "vestibule_datagrams_would_drop_total") => {
            DatagramDrop::LIMITS.map(DatagramDrop::as_str).into()
        }
        ("why", "vestibule_tenant_rejected_total" | "vestibule_tenant_would_reject_total") => {
            Quota::default().rejected().map(|(why, _): (Reason, _)| why.as_str()).collect()
        }
        ("why", "vestibule_backend_last_change_timestamp_seconds") => causes(),
        ("direction", _) => Direction::ALL.map(Direction::as_str).into(),
        ("mode", _) => vec!["copy", "splice"],
        ("class", "vestibule_accept_errors_total") => vec!["peer", "shortage", "fatal"],
        ("class", _) => vec!["session", "rejection", "stray"],
        ("stage", _) => DrainPhase::ALL.map(DrainPhase::as_str).into(),
        ("ground", _) => grounds(),
        ("result", "vestibule_takeovers_total") => vec!["done", "failed"],
        ("result", "vestibule_pool_retries_total") => vec!["made", "refused"],
        ("result", "vestibule_backend_connects_total") => {
            ConnectResult::ALL.map(ConnectResult::as_str).into()
        }
        ("result", "vestibule_backend_probes_total") => ProbeResult::ALL.map(ProbeResult::as_str).into(),
        ("result", "vestibule_name_lookups_total") => LookupResult::ALL.map(LookupResult::as_str).into(),
        ("endpoint", _) => AdminEndpoint::ALL.map(AdminEndpoint::as_str).into(),
        ("result", "vestibule_admin_connections_total") => {
            AdminConnectionEnd::ALL.map(AdminConnectionEnd::as_str).into()
        }
        ("protocol", _) => vec!["tcp", "udp"],
        ("state", _) => vec!["live", "waiting"],
        ("commit", _) => vec![build_info::COMMIT],
        ("version", _) => vec![env!("CARGO_PKG_VERSION")],
        ("worker", _) => return Some((0..64).map(|worker| worker.to_string()).collect()),
        _ => return None,
    };
    Some(words.into_iter().map(str::to_owned).collect())
}

fn causes() -> Vec<&'static str> {
    let own = [
        ChangeCause::Start,
        ChangeCause::Reload,
        ChangeCause::ConnectFailures,
        ChangeCause::Resets,
        ChangeCause::EjectionOver,
        ChangeCause::Resolved,
        ChangeCause::NotResolved,
        ChangeCause::Ordered,
    ];
    own.into_iter().chain(ProbeResult::ALL.map(ChangeCause::Probe)).map(ChangeCause::as_str).collect()
}

fn grounds() -> Vec<&'static str> {
    use SelectionTier::{Backup, Ejected, Healthy, Panic, Unknown};
    [Healthy, Backup, Unknown, Ejected, Panic, SelectionTier::None].map(SelectionTier::as_str).into()
}

/// The labels of every metric of which neither [`NAMES`] nor [`values`] says what values they have.
pub fn labels_without_values() -> Vec<String> {
    let labels = names::ALL.iter().flat_map(|metric| metric.labels.iter().map(|label| (metric.name, *label)));
    let unknown = labels.filter(|(name, label)| !NAMES.contains(label) && values(name, label).is_none());
    unknown.map(|(name, label)| format!("{name}: `values` in tests/it/scrape.rs lacks {label}")).collect()
}

/// The sum of the series of a metric that have these labels.
///
/// # Panics
/// Where no such series can exist: the metric, the label or a label's value is not known.
pub fn sum(page: &str, name: &str, labels: &[(&str, &str)], known: &Known) -> f64 {
    let rows = rows(page, name);
    let Some((metric, more)) = metric(name) else {
        // The process's own metrics are always on the page.
        let is_own = name.starts_with("process_") && !rows.is_empty() && labels.is_empty();
        assert!(is_own, "there is no metric {name}; near: {}", near(name, names::ALL.iter().map(|m| m.name)));
        return rows.iter().map(|(_, value)| value).sum();
    };
    for (label, value) in labels {
        let of_metric = || metric.labels.iter().copied().chain(more);
        let mut others = labels.iter().filter(|(other, _)| other == label);
        assert!(others.nth(1).is_none(), "{name} is asked for {label} twice");
        assert!(
            of_metric().any(|known| known == *label),
            "{name} has no label {label}, but {}",
            near(label, of_metric())
        );
        can_exist(page, &rows, metric, (label, value), known);
    }
    is_an_outcome(metric, labels);
    let has = |row: &Row| labels.iter().all(|(label, value)| row.0.get(*label).is_some_and(|is| is == value));
    // Not `sum`, which is -0 of nothing.
    rows.iter().filter(|row| has(row)).fold(0.0, |sum, (_, value)| sum + value)
}

/// The metric of this name, and the label that its series of this name have besides its own.
fn metric(name: &str) -> Option<(&'static Metric, Option<&'static str>)> {
    let find = |name: &str| names::ALL.iter().find(|metric| metric.name == name);
    let part = |end| find(name.strip_suffix(end)?).filter(|metric| metric.kind == MetricKind::Histogram);
    if let Some(metric) = part("_count").or_else(|| part("_sum")) {
        return Some((metric, None));
    }
    if let Some(metric) = part("_bucket") {
        return Some((metric, Some("le")));
    }
    find(name).filter(|metric| metric.kind != MetricKind::Histogram).map(|metric| (metric, None))
}

/// A value of a closed set is in it, and so is what the page shows. A name is in the configuration, or was, or some row has
/// it: a backend's name that DNS gave is in no configuration.
fn can_exist(page: &str, rows: &[Row], metric: &Metric, (label, value): (&str, &str), known: &Known) {
    if let Some(closed) = values(metric.name, label) {
        let shown = rows.iter().filter_map(|(labels, _)| labels.get(label).map(String::as_str));
        for value in shown.chain([value]) {
            let near = near(value, closed.iter().map(String::as_str));
            assert!(closed.contains(value), "{}: {label} is never {value:?}; near: {near}", metric.name);
        }
    } else if NAMES.contains(&label) {
        let is_shown = || {
            let row = |line: &str| {
                parse(line).is_some_and(|(_, row)| row.0.get(label).is_some_and(|is| is == value))
            };
            page.lines().any(row)
        };
        let names = || known.0.iter().filter(|(of, _)| *of == label).map(|(_, name)| name.as_str());
        assert!(
            known.has(label, value) || is_shown(),
            "{}: nothing is or was called {value:?} as {label}; near: {}",
            metric.name,
            near(value, names())
        );
    } else {
        assert_eq!(label, "le", "{}: `values` in tests/it/scrape.rs lacks {label}", metric.name);
    }
}

/// Sessions end in the ways of the closed set only.
fn is_an_outcome(metric: &Metric, labels: &[(&str, &str)]) {
    if metric.name != names::ENDED.name {
        return;
    }
    let asked = |label, word| labels.iter().all(|(of, value)| *of != label || *value == word);
    let fits = |end: &Outcome| {
        asked("by", end.by.as_str()) && asked("at", end.at.as_str()) && asked("why", end.why.as_str())
    };
    assert!(Outcome::ALL.iter().any(fits), "no session ends so: {labels:?}");
}

/// The rows of a page that have exactly this name.
fn rows(page: &str, name: &str) -> Vec<Row> {
    let lines = page.lines().filter(|line| line.starts_with(name));
    lines.filter_map(parse).filter(|(of, _)| *of == name).map(|(_, row)| row).collect()
}

/// A row's name, labels and value.
fn parse(line: &str) -> Option<(&str, Row)> {
    let end = line.find(['{', ' ']).filter(|_| !line.starts_with('#'))?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    while let Some(pair) = rest.strip_prefix(['{', ',']) {
        let (label, quoted) = pair.split_once("=\"")?;
        let mut escaped = false;
        let end = quoted.find(|c| {
            let is_end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        })?;
        labels.insert(label.to_owned(), quoted[..end].to_owned());
        rest = &quoted[end + 1..];
    }
    let value = rest.strip_prefix('}').unwrap_or(rest).trim().parse().ok()?;
    Some((name, (labels, value)))
}

/// The words that are nearest to one that is not known.
fn near<'w>(word: &str, words: impl Iterator<Item = &'w str>) -> String {
    let mut words: Vec<_> = words.collect();
    words.sort_by_key(|known| strsim::osa_distance(known, word));
    words.truncate(4);
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# HELP vestibule_sessions_active Sessions\n\
        vestibule_sessions_active{listener=\"web\",tenant=\"a\\\"b\",pool=\"\"} 3\n\
        vestibule_sessions_active{listener=\"web\",tenant=\"\",pool=\"\"} 4\n\
        vestibule_backend_healthy{pool=\"acme\",backend=\"10.0.0.1:80\"} 1\n\
        process_max_fds 20\n";

    fn asked(name: &str, labels: &[(&str, &str)]) -> Result<String, String> {
        let mut known = Known::default();
        known.0.insert(("tenant", "acme".to_owned()));
        let asked = std::panic::catch_unwind(|| sum(PAGE, name, labels, &known).to_string());
        asked.map_err(|panic| panic.downcast_ref::<String>().unwrap().clone())
    }

    #[test]
    fn known_series_are_summed_and_zero_without_a_row() {
        for (name, labels, sum) in [
            ("vestibule_sessions_active", &[][..], "7"),
            ("vestibule_sessions_active", &[("tenant", "a\\\"b")], "3"),
            ("vestibule_sessions_active", &[("tenant", "")], "4"),
            ("vestibule_sessions_active", &[("tenant", "acme"), ("pool", "acme")], "0"),
            ("vestibule_tenant_sessions", &[("tenant", "acme")], "0"),
            ("vestibule_backend_sessions_active", &[("backend", "10.0.0.1:80")], "0"),
            ("vestibule_sessions_ended_total", &[("at", "tenant"), ("why", "shed")], "0"),
            ("vestibule_session_duration_seconds_count", &[("listener", "web")], "0"),
            ("vestibule_session_duration_seconds_bucket", &[("le", "1")], "0"),
            ("process_max_fds", &[], "20"),
        ] {
            assert_eq!(asked(name, labels).as_deref(), Ok(sum), "{name} {labels:?}");
        }
    }

    #[test]
    fn unknown_series_panics_and_names_the_closest() {
        for (name, labels, said) in [
            ("vestibule_sessions_activ", &[][..], "near: vestibule_sessions_active"),
            ("vestibule_session_duration_seconds", &[], "there is no metric"),
            ("vestibule_sessions_active_count", &[], "there is no metric"),
            ("process_max_fd", &[], "there is no metric"),
            ("vestibule_sessions_active", &[("tennant", "acme")], "has no label tennant, but tenant"),
            ("vestibule_sessions_active", &[("tenant", "acne")], "called \"acne\" as tenant; near: acme"),
            ("vestibule_sessions_active", &[("listener", "acme")], "called \"acme\" as listener"),
            ("vestibule_sessions_active", &[("listener", "")], "called \"\" as listener"),
            ("vestibule_sessions_active", &[("tenant", "acme"), ("tenant", "")], "for tenant twice"),
            ("vestibule_sessions_ended_total", &[("why", "rate")], "why is never \"rate\""),
            ("vestibule_sessions_ended_total", &[("at", "accept"), ("why", "done")], "no session ends so"),
            ("vestibule_datagrams_would_drop_total", &[("why", "full")], "why is never \"full\""),
            ("vestibule_backend_connects_total", &[("result", "refused")], "connect_refused"),
        ] {
            let panic = asked(name, labels).unwrap_err();
            assert!(panic.contains(said), "{name} {labels:?}: {panic}");
        }
    }
}
