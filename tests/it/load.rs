//! The load generator against the proxy: every session reaches its own tenant's pool, and one that does not is seen.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use vestibule::lab::backend::{Backend, Temper};
use vestibule::lab::load::schedule::Skew;
use vestibule::lab::load::{self, Mode, Plan, Progress, Report, Work};

use super::harness::{ACME, Conf, Proxy};

/// Another endpoint of acme's.
const SECOND: &str = "vpce-0acce0000acce0001";

pub async fn run(plan: Plan) -> Report {
    let ended = tokio::task::spawn_blocking(move || {
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(load::run(plan, Arc::new(Progress::default()))).unwrap()
    });
    ended.await.unwrap()
}

/// acme's first endpoint leads to the pool `acme`, its second by another tenant to `other`.
async fn proxy() -> (Proxy, [Backend; 2]) {
    let acme = Backend::start("acme", Temper::Load).await.unwrap();
    let other = Backend::start("other", Temper::Load).await.unwrap();
    let more = format!(
        "[[pool]]\nname = \"other\"\nbackends = [\"{}\"]\nhealth = {{ kind = \"none\" }}\n\
         [[tenant]]\nname = \"other\"\nendpoints = [\"{SECOND}\"]\npool = \"other\"\n",
        other.address()
    );
    let proxy = Conf { acme: vec![acme.address()], more, ..Conf::default() }.start().await;
    (proxy, [acme, other])
}

/// Two endpoints of two tenants, over TCP.
fn plan(proxy: &Proxy, mode: Mode) -> Plan {
    let endpoints = vec![(ACME.to_owned(), "acme".to_owned()), (SECOND.to_owned(), "other".to_owned())];
    Plan { endpoints, ..acme_alone(proxy.address("web"), Work::Sessions(mode)) }
}

/// A short load of acme's first endpoint.
pub fn acme_alone(target: SocketAddr, work: Work) -> Plan {
    Plan {
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
        noise: 0,
    }
}

#[tokio::test]
async fn every_session_reaches_its_own_pool_in_every_mode() {
    let (proxy, backends) = proxy().await;
    for mode in [Mode::Connect, Mode::RoundTrip, Mode::ToClient, Mode::ToBackend] {
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
async fn a_session_of_the_wrong_pool_is_counted() {
    let (proxy, _backends) = proxy().await;
    let mut plan = plan(&proxy, Mode::Connect);
    plan.endpoints[0].1 = "other".to_owned();
    let report = run(plan).await;
    assert!(report.misrouted > 0 && report.misrouted < report.operations, "{report:?}");
    assert!(!report.is_fine());
    proxy.finish().await;
}

#[tokio::test]
async fn an_open_loop_keeps_its_rate_through_noise() {
    let (proxy, _backends) = proxy().await;
    let report = run(Plan { rate: Some(500.0), noise: 30, ..plan(&proxy, Mode::Connect) }).await;
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
