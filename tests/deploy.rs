//! What `deploy/monitoring` asks for exists: every metric, label and word of the rules and of the dashboard.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::collections::BTreeSet;
use std::fs;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use serde_json::Value;
use vestibule::account::Direction;
use vestibule::account::names::{self, Metric, MetricKind};
use vestibule::account::session_metrics::ConnectResult;
use vestibule::outcome::Outcome;

/// Labels that Prometheus itself sets.
const OF_THE_SCRAPE: [&str; 2] = ["job", "instance"];

#[test]
fn alert_rules_query_existing_metrics() {
    let rules = rules();
    assert!(rules.len() > 20, "{}", rules.len());
    let faults = rules.iter().flat_map(|rule| {
        let name = rule.lines().next().unwrap_or_default();
        faults(rule, "$labels.", " ").into_iter().map(move |fault| format!("rules.yml: {name}: {fault}"))
    });
    none(faults);
}

#[test]
fn every_alert_is_tested_listed_and_has_a_remedy() {
    let (tests, readme) = (read("rules.test.yml"), read("../README.md"));
    let mut faults = Vec::new();
    for rule in rules() {
        let Some(name) = rule.strip_prefix("alert: ").and_then(|rest| rest.lines().next()) else { continue };
        for (must, what) in [
            (format!("alertname: {name}\n"), "is not seen to fire"),
            (format!("{{alertname: {name}, "), "is not seen to keep silent"),
        ] {
            if !tests.contains(&must) {
                faults.push(format!("{name}: {what}"));
            }
        }
        let severity = rule.split_once("severity: ").map_or("", |(_, rest)| rest.split('}').next().unwrap());
        if !readme.contains(&format!("| {name} | {severity} | ")) {
            faults.push(format!("{name}: deploy/README.md does not list it, or not as {severity}"));
        }
        for must in ["severity: ", "summary: ", "description: "] {
            if !rule.contains(must) {
                faults.push(format!("{name}: no {must}"));
            }
        }
    }
    none(faults);
}

#[test]
fn dashboard_queries_existing_metrics() {
    let dashboard = dashboard();
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let question = format!("{} # {}", text(&target["expr"]), text(&target["legendFormat"]));
            let title = text(&panel["title"]);
            found.extend(
                faults(&question, "{{", "}}")
                    .into_iter()
                    .map(|fault| format!("dashboard.json: {title}: {fault}")),
            );
        }
    }
    for question in dashboard["templating"]["list"].as_array().unwrap() {
        found.extend(faults(text(&question["definition"]), "{{", "}}"));
    }
    for question in dashboard["annotations"]["list"].as_array().unwrap() {
        let asked = format!("{} {}", text(&question["expr"]), text(&question["textFormat"]));
        found.extend(faults(&asked, "{{", "}}"));
    }
    none(found);
}

#[test]
fn dashboard_is_complete() {
    let dashboard = dashboard();
    let variables: BTreeSet<_> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| text(&variable["name"]))
        .collect();
    let (mut ids, mut cells, mut found) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = text(&panel["title"]);
        let mut must = |holds: bool, what: &str| {
            if !holds {
                found.push(format!("{title}: {what}"));
            }
        };
        must(ids.insert(panel["id"].as_u64().unwrap()), "its id is another panel's, too");
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        let (left, top) = (place("x"), place("y"));
        must(left + place("w") <= 24, "stands out on the right");
        for x in left..left + place("w") {
            for y in top..top + place("h") {
                must(cells.insert((x, y)), "lies on another one");
            }
        }
        if text(&panel["type"]) == "row" {
            continue;
        }
        must(text(&panel["description"]).ends_with('.'), "has no description");
        must(!text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "has no unit");
        let targets = panel["targets"].as_array().unwrap();
        must(!targets.is_empty(), "asks nothing");
        for target in targets {
            must(text(&target["datasource"]["uid"]) == "${datasource}", "asks a data source of its own");
            let asked = text(&target["expr"]);
            for after in asked.split('$').skip(1) {
                let name = after.split(|c| !is_of_name(c)).next().unwrap_or_default();
                must(
                    variables.contains(name) || name.starts_with("__"),
                    "names a variable that is not there",
                );
            }
            let many = text(&panel["type"]) != "stat" && text(&panel["type"]) != "table";
            must(!many || text(&target["legendFormat"]).contains("{{"), "has rows without names");
        }
    }
    assert!(ids.len() > 40);
    none(found);
}

/// What is wrong with a text that asks for metrics: names, labels in braces, labels to group by, and labels that are
/// printed, each between `open` and `close`.
fn faults(asked: &str, open: &str, close: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut labels: BTreeSet<&str> = OF_THE_SCRAPE.into();
    let own = process_metrics();
    for (name, matchers) in metrics(asked) {
        if own.contains(name) {
            continue;
        }
        let Some((metric, more)) = known(name) else {
            faults.push(format!("{name} is no metric"));
            continue;
        };
        labels.extend(metric.labels.iter().chain(more));
        for (label, value) in matchers {
            if OF_THE_SCRAPE.contains(&label) {
                continue;
            }
            if !metric.labels.contains(&label) {
                faults.push(format!("{name} has no label {label}"));
            }
            let words = value.split('|').filter(|word| !word.is_empty() && !word.starts_with('$'));
            faults.extend(
                words
                    .filter(|word| !is_word(metric, label, word))
                    .map(|word| format!("{name}: no {label} is {word}")),
            );
        }
    }
    let grouped =
        ["by (", "on (", "without (", "ignoring ("].into_iter().flat_map(|word| asked.split(word).skip(1));
    let grouped = grouped.filter_map(|rest| rest.split_once(')')).flat_map(|(list, _)| list.split(','));
    let printed = asked.split(open).skip(1).map(|rest| rest.split(close).next().unwrap_or_default());
    for label in grouped.chain(printed).map(|label| label.trim_matches(|c| !is_of_name(c))) {
        if !labels.contains(label) && !label.is_empty() {
            faults.push(format!("nothing here has the label {label}"));
        }
    }
    faults
}

/// Each metric that a text names, with the labels in its braces and their values.
fn metrics(asked: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
    let starts = ["vestibule_", "process_"].into_iter().flat_map(|prefix| asked.match_indices(prefix));
    let starts = starts.filter(|(at, _)| !asked[..*at].ends_with(is_of_name));
    let metric = |(at, _)| {
        let rest: &str = &asked[at..];
        let name = &rest[..rest.find(|c| !is_of_name(c)).unwrap_or(rest.len())];
        let braced = rest[name.len()..].strip_prefix('{').and_then(|rest| rest.split_once('}'));
        let matchers = braced.map_or("", |(list, _)| list).split(", ").filter_map(|matcher| {
            let (label, value) = matcher.split_once(['=', '!'])?;
            Some((label, value.trim_start_matches(['=', '~']).trim_matches('"')))
        });
        (name, matchers.collect())
    };
    starts.map(metric).collect()
}

/// A metric by the name of one of its rows, and the labels that those rows have more.
fn known(name: &str) -> Option<(&'static Metric, &'static [&'static str])> {
    let find = |name: &str| names::ALL.iter().find(|metric| metric.name == name);
    let plain =
        find(name).filter(|metric| metric.kind != MetricKind::Histogram).map(|metric| (metric, &[][..]));
    let of_histogram = |end, labels| {
        let metric = find(name.strip_suffix(end)?)?;
        (metric.kind == MetricKind::Histogram).then_some((metric, labels))
    };
    plain
        .or_else(|| of_histogram("_bucket", &["le"][..]))
        .or_else(|| of_histogram("_sum", &[]))
        .or_else(|| of_histogram("_count", &[]))
}

/// Whether a label of a metric ever has that value. Where the values are the operator's, everything is.
fn is_word(metric: &Metric, label: &str, word: &str) -> bool {
    let outcomes =
        |word_of: fn(&Outcome) -> &'static str| Outcome::ALL.iter().any(|outcome| word_of(outcome) == word);
    match label {
        "by" => outcomes(|outcome| outcome.by.as_str()),
        "at" => outcomes(|outcome| outcome.at.as_str()),
        "why" if *metric == names::ENDED => outcomes(|outcome| outcome.why.as_str()),
        "direction" => Direction::ALL.iter().any(|direction| direction.as_str() == word),
        "result" if *metric == names::BACKEND_CONNECTS => {
            ConnectResult::ALL.iter().any(|result| result.as_str() == word)
        }
        "listener" | "tenant" | "pool" | "backend" | "worker" | "name" | "version" => true,
        // Each help lists the words of its labels.
        _ => metric.help.contains(&format!("`{word}`")),
    }
}

fn process_metrics() -> BTreeSet<String> {
    ProcessCollector::for_self().collect().iter().map(|family| family.name().to_owned()).collect()
}

/// The rules, each from its name on.
fn rules() -> Vec<String> {
    let file = read("rules.yml");
    let rules = file
        .split("\n      - ")
        .skip(1)
        .filter(|rule| rule.starts_with("alert: ") || rule.starts_with("record: "));
    // Without the group that follows the last one.
    rules.map(|rule| rule.split("\n  - name:").next().unwrap_or_default().to_owned()).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("dashboard.json")).unwrap()
}

fn read(name: &str) -> String {
    fs::read_to_string(format!("deploy/monitoring/{name}")).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

#[track_caller]
fn none(faults: impl IntoIterator<Item = String>) {
    let faults: Vec<_> = faults.into_iter().collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn faults_are_found() {
    let asked = |asked: &str| faults(asked, "{{", "}}").join("; ");
    assert_eq!(
        asked("sum by (tenant) (rate(vestibule_sessions_active{job=\"x\", pool=~\"$pool\"}[5m])) {{tenant}}"),
        ""
    );
    assert_eq!(asked("vestibule_sessions_lost"), "vestibule_sessions_lost is no metric");
    assert_eq!(
        asked("vestibule_session_duration_seconds"),
        "vestibule_session_duration_seconds is no metric"
    );
    assert_eq!(asked("sum by (le) (vestibule_session_duration_seconds_bucket)"), "");
    assert_eq!(asked("vestibule_draining{pool=\"x\"}"), "vestibule_draining has no label pool");
    assert_eq!(asked("max by (pool) (vestibule_draining)"), "nothing here has the label pool");
    assert_eq!(asked("vestibule_draining {{pool}}"), "nothing here has the label pool");
    let wrong = "vestibule_sessions_ended_total{why!~\"done|lost\"}";
    assert_eq!(asked(wrong), "vestibule_sessions_ended_total: no why is lost");
    assert_eq!(asked("vestibule_pool_ground{ground=\"sea\"}"), "vestibule_pool_ground: no ground is sea");
    assert_eq!(asked("process_open_fds / process_open_doors"), "process_open_doors is no metric");
}
