//! Names in the configuration: backends come from a server's answers, and follow them.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::dns::{Names, Reply};
use super::harness::{Conf, Proxy, eventually, http};
use super::sessions::{ROUND_ROBIN, asked, changed, greeting, ground, is, shares, usable};

const HOST: &str = "app.example.com.";
const SERVICE: &str = "_app._tcp.example.com.";

fn conf(names: &Names, backend: &str, health: &str) -> Conf {
    Conf {
        backends: vec![format!("\"{backend}\"")],
        pool: ROUND_ROBIN.to_owned(),
        health: health.to_owned(),
        more: format!(
            "[dns]\nservers = [\"{}\"]\nmin-ttl = \"1s\"\nmax-ttl = \"1s\"\nallow-answers = [\"127.0.0.0/8\"]",
            names.address()
        ),
        ..Conf::default()
    }
}

/// Two backends with one port, at 127.0.0.1 and 127.0.0.2.
async fn pair() -> (TestBackend, TestBackend) {
    loop {
        let one = greeting("acme-1").await;
        let other = SocketAddr::from(([127, 0, 0, 2], one.address().port()));
        if let Ok(other) = TestBackend::start_at(other, "acme-2", BackendBehavior::Greeting).await {
            return (one, other);
        }
    }
}

async fn health(proxy: &Proxy) -> String {
    http(proxy.server().health(), "/healthz", b"").await.1.trim_end().to_owned()
}

async fn lookups(proxy: &Proxy, result: &str, least: u32) {
    let labels = [("pool", "acme"), ("result", result)];
    proxy.metric("vestibule_name_lookups_total", &labels).is_at_least(least).await;
}

#[tokio::test]
async fn pool_follows_its_name_and_keeps_its_backends_if_the_lookup_fails() {
    let names = Names::start().await;
    let (one, other) = pair().await;
    names.host(HOST, 0, &["127.0.0.1"]);
    let name = format!("app.example.com:{}", one.address().port());
    let probes = "interval = \"100ms\"\ntimeout = \"100ms\"";
    let proxy = conf(&names, &name, probes).start().await;
    is(&proxy, "vestibule_backend_healthy", one.address(), 1).await;
    usable(&proxy, 1).await;
    assert_eq!(asked(&proxy).await, "acme-1");

    names.host(HOST, 3_600, &["127.0.0.2", "127.0.0.1"]);
    proxy.knows(other.address());
    is(&proxy, "vestibule_backend_healthy", other.address(), 1).await;
    usable(&proxy, 2).await;
    let found: BTreeSet<_> = [asked(&proxy).await, asked(&proxy).await].into();
    assert_eq!(found.len(), 2, "{found:?}");

    names.host(HOST, 0, &["127.0.0.2"]);
    usable(&proxy, 1).await;
    assert_eq!(shares(&proxy, 4).await.into_keys().collect::<Vec<_>>(), ["acme-2"]);

    for kind in [RecordType::A, RecordType::AAAA] {
        names.say(HOST, kind, Reply::Code(ResponseCode::ServFail));
    }
    lookups(&proxy, "server_failure", 1).await;
    lookups(&proxy, "found", 3).await;
    let failed = [("pool", "acme"), ("name", name.as_str()), ("result", "server_failure")];
    proxy.metric("vestibule_name_lookups_total", &failed).is_at_least(1).await;
    usable(&proxy, 1).await;
    assert_eq!(asked(&proxy).await, "acme-2");
    assert_eq!(health(&proxy).await, "ok");
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(8).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_of_an_address_removed_from_dns_continues() {
    let names = Names::start().await;
    let (one, other) = pair().await;
    names.host(HOST, 0, &["127.0.0.1"]);
    let name = format!("app.example.com:{}", one.address().port());
    let proxy = conf(&names, &name, "kind = \"none\"").start().await;
    usable(&proxy, 1).await;
    changed(&proxy, one.address(), "resolved").await;
    let mut session = proxy.open(super::harness::ACME, b"").await;
    assert_eq!(super::harness::read(&mut session, 7).await, b"acme-1\n");
    names.host(HOST, 0, &["127.0.0.2"]);
    proxy.knows(other.address());
    is(&proxy, "vestibule_backend_weight", other.address(), 100).await;
    assert_eq!(asked(&proxy).await, "acme-2");
    tokio::io::AsyncWriteExt::write_all(&mut session, b"still").await.unwrap();
    assert_eq!(super::harness::read(&mut session, 5).await, b"still");
    drop(session);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn process_is_starting_until_the_first_dns_answer() {
    let names = Names::start().await;
    let backend = greeting("acme-1").await;
    for kind in [RecordType::A, RecordType::AAAA] {
        names.say(HOST, kind, Reply::Silence);
    }
    let conf = conf(&names, &format!("app.example.com:{}", backend.address().port()), "kind = \"none\"");
    let proxy = conf.start().await;
    assert_eq!(health(&proxy).await, "starting");
    ground(&proxy, "none").await;
    // Others are served all the same.
    proxy.others_are_unharmed().await;
    // A first answer that does not come is told as well, and traffic for others comes then.
    lookups(&proxy, "timeout", 1).await;
    eventually("ok", async || (health(&proxy).await == "ok").then_some(())).await;
    super::sessions::is_turned_away(&proxy).await;
    proxy.ended(&[("tenant", "acme"), ("at", "pool"), ("why", "no_backend")]).is(1).await;
    names.host(HOST, 0, &["127.0.0.1"]);
    usable(&proxy, 1).await;
    assert_eq!(asked(&proxy).await, "acme-1");
    lookups(&proxy, "found", 1).await;
    proxy.finish().await;
}

#[tokio::test]
async fn service_records_give_ports_weights_and_backups() {
    let names = Names::start().await;
    let all = [greeting("light").await, greeting("heavy").await, greeting("backup").await];
    let port = |backend: &TestBackend| backend.address().port();
    let rows = [
        (10, 10, port(&all[0]), "one.example.com."),
        (10, 30, port(&all[1]), "one.example.com."),
        (20, 50, port(&all[2]), "one.example.com."),
    ];
    names.host("one.example.com.", 0, &["127.0.0.1"]);
    names.service(SERVICE, 0, &rows);
    let proxy = conf(&names, SERVICE.trim_end_matches('.'), "kind = \"none\"").start().await;
    usable(&proxy, 2).await;
    for (backend, weight) in all.iter().zip([10, 30, 0]) {
        is(&proxy, "vestibule_backend_weight", backend.address(), weight).await;
    }
    let found = shares(&proxy, 100).await;
    assert!((23..=27).contains(&found["light"]) && !found.contains_key("backup"), "{found:?}");

    // Another weight is no other backend.
    names.service(SERVICE, 0, &[(10, 20, port(&all[0]), "one.example.com."), rows[1], rows[2]]);
    is(&proxy, "vestibule_backend_weight", all[0].address(), 20).await;
    names.service(SERVICE, 0, &rows[2..]);
    is(&proxy, "vestibule_backend_weight", all[2].address(), 50).await;
    assert_eq!(shares(&proxy, 5).await.into_keys().collect::<Vec<_>>(), ["backup"]);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(105).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
