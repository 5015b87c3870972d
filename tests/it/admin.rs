//! The pages for operators: metrics, status, and one for people.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use vestibule::account::names::{self, MetricKind};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::outcome::Outcome;

use super::dns::Names;
use super::flow::{Balancer, HOOLI, datagram};
use super::harness::{
    ACME, Conf, INITECH, LIMIT, Proxy, STRANGER, connect, end_of, exchange, http, http_get, is_reset, read,
};

use super::raw::{Held, Raw};
use super::sessions::{ROUND_ROBIN, ground, with};

async fn proxy(acme: &TestBackend) -> Proxy {
    Conf { acme: vec![acme.address()], ..Conf::default() }.start().await
}

/// One sample: its name, its labels, its value.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// One metric of a page.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    samples: Vec<Sample>,
}

/// Reads a page in Prometheus's text format (version 0.0.4), and insists on every rule of it.
fn parse(page: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let (mut helped, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut current = String::new();
    assert!(page.ends_with('\n'));
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap();
            assert!(helped.insert(name.to_owned()) && !text.is_empty(), "{line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            let family = Family { kind: kind.to_owned(), samples: Vec::new() };
            assert!(families.insert(name.to_owned(), family).is_none(), "{line} again");
            name.clone_into(&mut current);
        } else {
            let sample = parse_sample(line);
            let family = families.get_mut(&current).unwrap();
            let part = sample.name.strip_prefix(&current[..]).unwrap_or("?");
            let histogram = ["_bucket", "_sum", "_count"].contains(&part);
            assert!(
                if family.kind == "histogram" { histogram } else { part.is_empty() },
                "{line} of {current}"
            );
            assert!(seen.insert((sample.name.clone(), format!("{:?}", sample.labels))), "{line} again");
            family.samples.push(sample);
        }
    }
    families
}

fn parse_sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
    let mut labels = BTreeMap::new();
    let mut name = series;
    if let Some((before, rest)) = series.split_once('{') {
        name = before;
        let mut rest = rest.strip_suffix('}').unwrap();
        while !rest.is_empty() {
            let (label, after) = rest.split_once("=\"").unwrap();
            let (text, after) = after.split_once('"').unwrap();
            assert!(!text.contains(['\\', '\n']), "{line}");
            assert!(labels.insert(label.to_owned(), text.to_owned()).is_none(), "{line}");
            rest = after.strip_prefix(',').unwrap_or(after);
        }
    }
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '_';
    assert!(name.chars().all(fine) && labels.keys().all(|label| label.chars().all(fine)), "{line}");
    Sample { name: name.to_owned(), labels, value }
}

/// The buckets of each series count up to its count.
fn buckets_add_up(name: &str, family: &Family) {
    let mut series: BTreeMap<String, (Vec<(f64, f64)>, f64)> = BTreeMap::new();
    for sample in &family.samples {
        let mut labels = sample.labels.clone();
        let bound = labels.remove("le");
        let (buckets, count) = series.entry(format!("{labels:?}")).or_default();
        match (bound, sample.name.ends_with("_count")) {
            (Some(bound), _) => buckets.push((bound.parse().unwrap(), sample.value)),
            (None, true) => *count = sample.value,
            (None, false) => assert!(sample.value >= 0.0),
        }
    }
    assert!(!series.is_empty(), "{name}");
    for (buckets, count) in series.values() {
        assert!(buckets.is_sorted_by(|one, two| one.0 < two.0 && one.1 <= two.1), "{name}: {buckets:?}");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, *count)), "{name}");
    }
}

#[tokio::test]
async fn every_metric_has_a_value_after_one_session_and_the_page_is_well_formed() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let limits =
        "mode = \"observe\"\nsessions = 5\nsession-rate = \"1/h\"\nto-backend = \"1GiB/s\"\nflows = 5\ndatagram-rate = \"1/h\"".to_owned();
    let names = Names::start().await;
    let more = format!(
        "[[pool]]\nname = \"named\"\nbackends = [\"app.example.com:80\"]\n[dns]\nservers = [\"{}\"]
         [[listener]]\nname = \"dns\"\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\ntrusted-sources = [\"127.0.0.0/8\"]
         [[tenant]]\nname = \"hooli\"\nendpoints = [\"{HOOLI}\"]\npool = \"acme\"\n[tenant.limits]\ndatagram-rate = \"1/h\"",
        names.address()
    );
    let health = "kind = \"tcp\"".to_owned();
    let timeouts = "flow-idle = \"1h\"".to_owned();
    let mut proxy =
        Conf { acme: vec![acme.address()], health, limits, timeouts, more, ..Conf::default() }.start().await;
    proxy.metric("vestibule_backend_probes_total", &[("result", "passed")]).is_at_least(1).await;
    let lookup = [("pool", "named"), ("name", "app.example.com:80"), ("result", "no_such_name")];
    proxy.metric("vestibule_name_lookups_total", &lookup).is_at_least(1).await;
    parse(&http_get(proxy.server().admin(), "/metrics").await);
    exchange(proxy.open(ACME, b"payload").await).await.unwrap();
    exchange(proxy.open(ACME, b"too soon").await).await.unwrap();
    is_reset(&mut proxy.open(INITECH, b"").await).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.ended(&[("tenant", "initech")]).is(1).await;
    // The first datagram of each is sent, and the second is one too many. A refusal in between would end the flow; where the port
    // is taken by another process, that one does not refuse.
    let _silent = std::net::UdpSocket::bind(acme.address()).ok();
    let balancer = Balancer::to(proxy.address("dns")).await;
    for endpoint in [ACME, HOOLI, ACME, HOOLI] {
        balancer.send(&datagram("10.100.0.10:5000", endpoint, b"payload")).await;
    }
    for metric in ["vestibule_datagrams_dropped_total", "vestibule_datagrams_would_drop_total"] {
        proxy.metric(metric, &[("why", "rate")]).is(1).await;
    }
    proxy.reload("flow-idle = \"1h\"", "flow-idle = \"300ms\"").unwrap();
    let (head, page) = http(proxy.server().admin(), "/metrics", b"").await;
    assert!(head.to_lowercase().contains("\r\ncontent-type: text/plain; version=0.0.4"), "{head}");
    let families = parse(&page);
    for metric in names::ALL {
        let family = families.get(metric.name).unwrap_or_else(|| panic!("no {}", metric.name));
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        assert_eq!(family.kind, kind, "{}", metric.name);
        assert!(!family.samples.is_empty(), "{}", metric.name);
        let expected: BTreeSet<_> = metric.labels.iter().copied().collect();
        for sample in &family.samples {
            let labels: BTreeSet<_> =
                sample.labels.keys().map(String::as_str).filter(|name| *name != "le").collect();
            assert_eq!(labels, expected, "{}", sample.name);
        }
        if metric.kind == MetricKind::Histogram {
            buckets_add_up(metric.name, family);
        }
    }
    let unknown = families.keys().find(|name| {
        !name.starts_with("process_") && names::ALL.iter().all(|metric| metric.name != name.as_str())
    });
    assert_eq!(unknown, None, "a metric that the table does not list");
    assert!(families["process_open_fds"].samples[0].value > 0.0);
    proxy.finish().await;
}

#[tokio::test]
async fn outcomes_in_metrics_are_of_the_closed_set() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    exchange(proxy.open(ACME, b"").await).await.unwrap();
    is_reset(&mut proxy.open(STRANGER, b"").await).await;
    is_reset(&mut proxy.send(b"nonsense").await).await;
    proxy.ended(&[]).is(3).await;
    let families = parse(&http_get(proxy.server().admin(), "/metrics").await);
    let ended = &families[names::ENDED.name].samples;
    assert_eq!(ended.len(), 3, "outcomes that never were are left out: {ended:?}");
    for Sample { labels, value, .. } in ended {
        let known = Outcome::ALL.iter().any(|outcome| {
            [labels["by"].as_str(), &labels["at"], &labels["why"]]
                == [outcome.by.as_str(), outcome.at.as_str(), outcome.why.as_str()]
        });
        assert!(known && *value > 0.5, "{labels:?} {value}");
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

async fn status(proxy: &Proxy) -> Value {
    let (head, body) = http(proxy.server().admin(), "/status", b"").await;
    assert!(head.to_lowercase().contains("\r\ncontent-type: application/json"), "{head}");
    serde_json::from_str(&body).unwrap()
}

async fn carried(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.open(ACME, b"payload").await;
    assert_eq!(read(&mut stream, 7).await, b"payload");
    stream
}

#[tokio::test]
async fn status_reports_the_state_of_the_process() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf =
        Conf { acme: vec![acme.address()], process: "max-sessions = 77".to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let session = carried(&proxy).await;
    is_reset(&mut proxy.open(STRANGER, b"").await).await;
    proxy.ended(&[("why", "unknown_endpoint")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.ended(&[("tenant", "globex")]).is(1).await;

    let found = status(&proxy).await;
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&found["ready"], found.get("not_ready")), (&json!(true), None));
    assert_eq!((&found["sessions"], &found["sessions_limit"]), (&json!(1), &json!(77)));
    let workers: Vec<u64> = serde_json::from_value(found["workers"].clone()).unwrap();
    assert_eq!((workers.len(), workers.iter().sum::<u64>()), (2, 1));
    let listener =
        json!({"name": "web", "addresses": [proxy.address("web").to_string()], "accepted": 3, "pending": 0});
    assert_eq!(found["listeners"], json!([listener]));
    let mut shown = found["pools"][0].clone();
    assert!(shown["backends"][0]["changed_seconds_ago"].take().is_u64(), "{shown}");
    let backend = json!({"address": acme.address().to_string(), "state": "healthy", "sessions": 1,
        "why": "start", "changed_seconds_ago": null, "ejections": 0, "early_resets": 0,
        "weight": 100, "weight_in_force": 100.0, "backup": false,
        "probe_ms": 0.0, "probes_done": 0, "probes_failed": 0});
    let expected = json!({"name": "acme", "usable": 1, "ground": "healthy", "queued": 0,
        "retries": 0, "retries_refused": 0, "backends": [backend]});
    assert_eq!(shown, expected);
    assert_eq!(found["pools"].as_array().unwrap().len(), 2);
    assert_eq!(found["tenants_known"], 3);
    // The busiest first; those without traffic are left out.
    let tenant = |name, sessions, ended, bytes| {
        json!({"name": name, "sessions": sessions, "ended": ended, "ended_by_proxy": 0,
            "rejected": 0, "would_reject": 0, "to_backend": bytes, "to_client": bytes})
    };
    assert_eq!(found["tenants"], json!([tenant("acme", 1, 0, 7), tenant("globex", 0, 1, 8)]));
    assert_eq!(found["unidentified"], json!({"unknown_endpoint": 1}));

    proxy.server().drain();
    proxy.metric("vestibule_draining", &[]).is(1).await;
    let found = status(&proxy).await;
    assert_eq!((&found["ready"], &found["not_ready"]), (&json!(false), &json!("draining")));
    exchange(session).await.unwrap();
    proxy.finish().await;
}

#[tokio::test]
async fn status_and_page_show_backends_in_use_and_causes() {
    let (refusing, failing, raw) = (Held::bind(), Held::bind(), Raw::bind().await);
    let conf = Conf {
        backends: vec![
            with(refusing.address(), "weight = 7, zone = \"usw2-az1\""),
            with(failing.address(), "weight = 5"),
            with(raw.address(), "backup = true, max-sessions = 1, zone = \"usw2-az2\""),
        ],
        pool: format!("{ROUND_ROBIN}\nqueue = {{ length = 5, timeout = \"60s\" }}"),
        health: "kind = \"none\"\n[pool.ejection]\nconsecutive-failures = 1\nbase-time = \"10m\"\nmax-percent = 70"
            .to_owned(),
        ..Conf::default()
    };
    let proxy = conf.start().await;
    // Both primaries refuse, and are out at their first failure each.
    let first = loop {
        let mut client = proxy.open(ACME, b"").await;
        tokio::select! {
            backend = raw.accept() => {
                // A failure while the pool is rebuilt for the other primary ejects nothing; the next session's does.
                if proxy.value("vestibule_backend_ejected", &[("pool", "acme")]).await > 1.5 {
                    break (client, backend);
                }
            }
            end = end_of(&mut client) => drop(end),
        }
    };
    // An ejection is in force at the next tick.
    ground(&proxy, "backup").await;
    let second = proxy.open(ACME, b"second").await;
    proxy.metric("vestibule_pool_sessions_queued", &[("pool", "acme")]).is(1).await;

    let pool = status(&proxy).await["pools"][0].clone();
    let of_pool = |key: &str| pool[key].clone();
    assert_eq!(
        [of_pool("ground"), of_pool("usable"), of_pool("queued")],
        [json!("backup"), json!(1), json!(1)]
    );
    let retries = of_pool("retries").as_u64().unwrap();
    assert!(retries >= 2 && of_pool("retries_refused") == json!(0), "{pool}");
    let of = |place: usize, key: &str| pool["backends"][place][key].clone();
    for (place, weight) in [(0, 7), (1, 5)] {
        assert_eq!([of(place, "state"), of(place, "why")], ["ejected", "connect_failures"]);
        assert_eq!([of(place, "weight"), of(place, "weight_in_force")], [json!(weight), json!(0.0)]);
        assert_eq!(of(place, "ejections"), 1);
        assert!((500..=600).contains(&of(place, "ejected_seconds_more").as_u64().unwrap()), "{pool}");
    }
    assert_eq!(
        [of(0, "zone"), of(1, "zone"), of(2, "zone")],
        [json!("usw2-az1"), json!(null), json!("usw2-az2")]
    );
    assert_eq!(
        [of(2, "backup"), of(2, "sessions_limit"), of(2, "sessions")],
        [json!(true), json!(1), json!(1)]
    );
    assert_eq!([of(2, "state"), of(2, "why")], ["healthy", "start"]);

    let page = http_get(proxy.server().admin(), "/").await;
    is_balanced(&page);
    let numbers = [1, 1, retries, 0].map(|number| format!("<td class=\"n\">{number}</td>")).concat();
    let refused = refusing.address();
    for part in [
        format!("<td>acme</td><td>backup</td>{numbers}"),
        format!("<td>{refused}</td><td>usw2-az1</td><td class=\"bad\">ejected</td>"),
        "<td>connect_failures</td><td>0.0 of 7</td>".to_owned(),
        "<td>usw2-az2</td><td class=\"good\">healthy</td>".to_owned(),
    ] {
        assert!(page.contains(&part), "{part} is not in {page}");
    }
    proxy.others_are_unharmed().await;
    drop((first, second));
    drop(raw.accept().await);
    proxy.ended(&[("tenant", "acme")]).is_at_least(2).await;
    proxy.finish().await;
}

/// Every element that is opened is closed, in order.
fn is_balanced(page: &str) {
    let body = page.strip_prefix("<!doctype html>").unwrap();
    let mut open = Vec::new();
    for part in body.split('<').skip(1) {
        let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("<{part} is not closed"));
        assert!(!text.contains('>'), "{text}");
        let name = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !["meta", "link", "br", "hr", "img", "input"].contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
}

#[tokio::test]
async fn html_page_lists_the_tenants_and_is_well_formed() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    is_balanced(&http_get(proxy.server().admin(), "/").await);
    let session = carried(&proxy).await;
    is_reset(&mut proxy.open(STRANGER, b"").await).await;
    proxy.ended(&[("why", "unknown_endpoint")]).is(1).await;
    let (head, page) = http(proxy.server().admin(), "/", b"").await;
    assert!(head.to_lowercase().contains("\r\ncontent-type: text/html; charset=utf-8"), "{head}");
    is_balanced(&page);
    let row = "<tr><td>acme</td><td>-</td><td class=\"n\">1</td><td class=\"n\">0</td>";
    assert!(page.contains(row), "{page}");
    for part in ["ready</span>", "unknown_endpoint", &acme.address().to_string(), "<td>web</td>"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(
        !page.contains("<td>globex</td><td>-</td><td class=\"n\">0</td><td class=\"n\">0</td>"),
        "{page}"
    );
    exchange(session).await.unwrap();
    proxy.finish().await;
}

#[tokio::test]
async fn pages_refuse_methods_other_than_get() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let (head, _) = http(proxy.server().admin(), "/nothing", b"").await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    for path in ["/", "/metrics", "/status"] {
        // What stands before makes it another method.
        let (head, _) = http(proxy.server().admin(), path, b"X").await;
        assert!(head.starts_with("HTTP/1.1 405 "), "{path}: {head}");
    }
    proxy.finish().await;
}

#[tokio::test]
async fn address_is_answered_by_known_hosts_only() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let ask = async |path: &str, host: &str| {
        let mut stream = connect(proxy.server().admin()).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        answer
    };
    let own = proxy.server().admin().to_string();
    for path in ["/", "/metrics", "/status", "/config"] {
        for host in [&own[..], "localhost", "192.0.2.1:80"] {
            assert!(ask(path, host).await.starts_with("HTTP/1.1 200 "), "{path} by {host}");
        }
        let refused = ask(path, "evil.example:9900").await;
        assert!(refused.starts_with("HTTP/1.1 421 "), "{path}: {refused}");
        let (_, body) = refused.split_once("\r\n\r\n").unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        let error = body["error"].as_str().unwrap();
        assert!(error.contains("found \"evil.example:9900\"") && error.contains("[admin] hosts"), "{error}");
        assert!(!refused.contains(ACME) && !refused.to_lowercase().contains("access-control"), "{refused}");
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
