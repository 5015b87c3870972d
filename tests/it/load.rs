//! The load generator against the proxy: every session reaches its own tenant's pool, and one that does not is seen.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::load::schedule::Skew;
use vestibule::lab::load::{self, LoadMode, LoadPlan, LoadProgress, LoadReport, LoadWork};

use super::harness::{ACME, Conf, Proxy};

/// Another endpoint of acme's.
const SECOND: &str = "vpce-0acce0000acce0001";

pub async fn run(plan: LoadPlan) -> LoadReport {
    let ended = tokio::task::spawn_blocking(move || {
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(load::run(plan, Arc::new(LoadProgress::default()))).unwrap()
    });
    ended.await.unwrap()
}

/// acme's first endpoint leads to the pool `acme`, its second by another tenant to `other`.
async fn proxy() -> (Proxy, [TestBackend; 2]) {
    let acme = TestBackend::start("acme", BackendBehavior::Load).await.unwrap();
    let other = TestBackend::start("other", BackendBehavior::Load).await.unwrap();
    let more = format!(
        "[[pool]]\nname = \"other\"\nbackends = [\"{}\"]\nhealth = {{ kind = \"none\" }}\n\
         [[tenant]]\nname = \"other\"\nendpoints = [\"{SECOND}\"]\npool = \"other\"\n",
        other.address()
    );
    let proxy = Conf { acme: vec![acme.address()], more, ..Conf::default() }.start().await;
    (proxy, [acme, other])
}

/// Two endpoints of two tenants, over TCP.
fn plan(proxy: &Proxy, mode: LoadMode) -> LoadPlan {
    let endpoints = vec![(ACME.to_owned(), "acme".to_owned()), (SECOND.to_owned(), "other".to_owned())];
    LoadPlan { endpoints, ..acme_alone(proxy.address("web"), LoadWork::Sessions(mode)) }
}

/// A short load of acme's first endpoint.
pub fn acme_alone(target: SocketAddr, work: LoadWork) -> LoadPlan {
    LoadPlan {
        clients: 1,
        target,
        endpoints: vec![(ACME.to_owned(), "acme".to_owned())],
        skew: Skew::Uniform,
        work,
        sessions: 8,
        size: 64,
        rate: None,
        duration: Duration::from_millis(300),
        warmup: Duration::ZERO,
        interval: None,
        noise: 0,
    }
}

#[tokio::test]
async fn every_session_reaches_its_own_pool_in_every_mode() {
    let (proxy, backends) = proxy().await;
    for mode in [LoadMode::Connect, LoadMode::RoundTrip, LoadMode::ToClient, LoadMode::ToBackend] {
        let report = run(plan(&proxy, mode)).await;
        assert!(report.is_fine(), "{mode:?}: {report:?}");
        assert_eq!((report.failed(), report.not_sent), (0, 0), "{mode:?}");
        assert!(report.bytes >= report.operations, "{mode:?}: {report:?}");
    }
    assert!(backends.iter().all(|backend| backend.sessions() > 0), "both pools had sessions");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_of_the_wrong_pool_is_counted() {
    let (proxy, _backends) = proxy().await;
    let mut plan = plan(&proxy, LoadMode::Connect);
    plan.endpoints[0].1 = "other".to_owned();
    let report = run(plan).await;
    assert!(report.misrouted > 0 && report.misrouted < report.operations, "{report:?}");
    assert!(!report.is_fine());
    proxy.finish().await;
}

#[tokio::test]
async fn open_loop_keeps_its_rate_through_noise() {
    let (proxy, _backends) = proxy().await;
    let report = run(LoadPlan { rate: Some(500.0), noise: 30, ..plan(&proxy, LoadMode::Connect) }).await;
    // 150 are due in the time that is measured, and a busy machine may end some after it.
    assert!((1..=150).contains(&report.operations), "{report:?}");
    assert_eq!((report.misrouted, report.failed()), (0, 0), "{report:?}");
    assert!(report.noise > 0);
    let noisy = ["local", "zero_bytes", "unknown_endpoint"];
    for why in noisy {
        proxy.ended(&[("why", why)]).is_at_least(1).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn intervals_add_up_to_the_whole() {
    let (proxy, _backends) = proxy().await;
    let interval = Some(Duration::from_millis(120));
    let report =
        run(LoadPlan { interval, warmup: Duration::from_millis(50), ..plan(&proxy, LoadMode::RoundTrip) })
            .await;
    // Of 300 ms, the last is 60 ms.
    assert_eq!(report.intervals.len(), 3, "{report:?}");
    let operations: Vec<_> = report.intervals.iter().map(|interval| interval.operations).collect();
    assert_eq!((operations.iter().sum::<u64>(), report.failed()), (report.operations, 0));
    assert_eq!(report.intervals.iter().map(|interval| interval.bytes).sum::<u64>(), report.bytes);
    assert!(operations[0] > 0 && operations[1] > 0, "{operations:?}");
    for interval in &report.intervals {
        assert_eq!((interval.latency.len(), interval.failed), (interval.operations, 0));
        // Two digits there, three in the whole.
        assert!(interval.latency.max() <= report.latency.max() + report.latency.max() / 100);
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn failures_belong_to_the_interval_that_they_fall_into() {
    let (proxy, backends) = proxy().await;
    // Nobody answers any more; each connection is reset, or closed without an answer.
    drop(backends);
    let interval = Some(Duration::from_millis(100));
    let report = run(LoadPlan { interval, ..plan(&proxy, LoadMode::Connect) }).await;
    assert_eq!((report.operations, report.intervals.len()), (0, 3), "{report:?}");
    let failed: u64 = report.intervals.iter().map(|interval| interval.failed).sum();
    // What fails after the last has ended belongs to none.
    assert!(failed > 0 && failed <= report.failed(), "{report:?}");
    proxy.finish().await;
}

#[tokio::test]
async fn intervals_are_shown_as_text_and_as_json() {
    let backend = TestBackend::start("acme", BackendBehavior::Load).await.unwrap();
    let load = async |more: &[&str]| {
        let mut command = std::process::Command::new(super::process::PROGRAM);
        command.args(["load", "--target", &backend.address().to_string(), "--sessions", "2"]);
        command.args(["--duration", "200ms", "--warmup", "0s", "--interval", "100ms"]).args(more);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let text = load(&["--mode", "roundtrip"]).await;
    let table: Vec<Vec<&str>> = text
        .lines()
        .skip_while(|line| !line.contains("from"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(table[0], ["from", "operations", "MiB/s", "failed", "p50", "p95", "p99", "max"], "{text}");
    assert_eq!(
        (&table[1][..2], &table[2][..2], table.len()),
        (&["0", "s"][..], &["0.1", "s"][..], 3),
        "{text}"
    );
    let bulk = load(&["--mode", "to-client"]).await;
    let line = bulk.lines().last().unwrap();
    assert!(
        line.starts_with("     0.1 s ") && line.ends_with("-          -          -          -"),
        "{bulk}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&load(&["--mode", "roundtrip", "--json"]).await).unwrap();
    let intervals = json["intervals"].as_array().unwrap();
    assert_eq!(intervals.len(), 2, "{json}");
    let operations: u64 = intervals.iter().map(|interval| interval["operations"].as_u64().unwrap()).sum();
    assert_eq!(Some(operations), json["operations"].as_u64());
    assert_eq!(intervals[1]["from_seconds"], 0.1);
    assert!(intervals.iter().all(|interval| interval["latency_ns"]["p99"].as_u64() > Some(0)), "{json}");
}
