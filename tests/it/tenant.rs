//! Whose traffic it is, and to which pool it goes.

use std::collections::BTreeMap;
use std::fmt::Write;

use tokio::io::AsyncWriteExt;
use vestibule::addr::{ClientAddr, DestinationAddr};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;
use vestibule::proxy_protocol::{HeaderBuilder, Transport};

use super::harness::{
    ACME, Conf, GLOBEX, INITECH, Proxy, STRANGER, connect, exchange, header, http_get, is_reset,
};

/// The start of a header of the same client as ever.
fn builder() -> HeaderBuilder {
    let (client, destination) = ("10.100.0.10:40000".parse().unwrap(), "10.0.0.5:8080".parse().unwrap());
    HeaderBuilder::proxy(Transport::Stream, ClientAddr(client), DestinationAddr(destination))
}

/// A header with these TLVs.
fn with_tlvs(tlvs: &[(u8, &[u8])]) -> Vec<u8> {
    let built = tlvs.iter().fold(builder(), |builder, (kind, value)| builder.tlv(*kind, value).unwrap());
    built.crc().unwrap().build()
}

/// The value of an AWS TLV that names an endpoint.
fn named(endpoint: &str) -> Vec<u8> {
    [b"\x01", endpoint.as_bytes()].concat()
}

/// A header without any endpoint, as NLB writes it.
fn anonymous() -> Vec<u8> {
    nlb::header("10.100.0.10:40000".parse().unwrap(), "10.0.0.5:8080".parse().unwrap(), None)
}

/// What a session that starts with these bytes is told by a greeting backend.
async fn greeting(proxy: &Proxy, listener: &str, header: &[u8]) -> String {
    let mut stream = connect(proxy.address(listener)).await;
    stream.write_all(header).await.unwrap();
    String::from_utf8(exchange(stream).await.unwrap()).unwrap().trim_end().to_owned()
}

async fn rejects(proxy: &Proxy, listener: &str, header: &[u8]) {
    let mut stream = connect(proxy.address(listener)).await;
    stream.write_all(header).await.unwrap();
    is_reset(&mut stream).await;
}

/// Two more listeners: `lenient` takes everybody in, `half` those without an endpoint.
fn lenient() -> String {
    let listener = |name: &str, rules: &str| {
        format!(
            "[[listener]]\nname = \"{name}\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\n{rules}\n"
        )
    };
    listener("lenient", "on-no-endpoint = \"tenant:acme\"\non-unknown-endpoint = \"tenant:umbrella\"")
        + &listener("half", "on-no-endpoint = \"tenant:initech\"\non-unknown-endpoint = \"reject\"")
        + "[[tenant]]\nname = \"umbrella\"\npool = \"acme\"\n"
}

#[tokio::test]
async fn pool_comes_from_route_then_tenant_then_listener() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let names = ["by-route", "by-tenant", "by-listener"];
    let mut backends = Vec::new();
    let mut more = String::new();
    for name in names {
        let backend = TestBackend::start(name, BackendBehavior::Greeting).await.unwrap();
        let address = backend.address();
        write!(
            more,
            "[[pool]]\nname = \"{name}\"\nbackends = [\"{address}\"]\nhealth = {{ kind = \"none\" }}\n"
        )
        .unwrap();
        backends.push(backend);
    }
    more += r#"
        [[listener]]
        name = "other"
        bind = "127.0.0.1:0"
        trusted-sources = ["127.0.0.1"]
        pool = "by-listener"
        [[tenant]]
        name = "routed"
        endpoints = ["vpce-00000001"]
        pool = "by-tenant"
        routes = { web = "by-route" }
        [[tenant]]
        name = "routed-only"
        endpoints = ["vpce-00000002"]
        routes = { web = "by-route" }
        [[tenant]]
        name = "poor"
        endpoints = ["vpce-00000003", "vpce-00000000000000003"]"#;
    let conf = Conf { acme: vec![acme.address()], more, ..Conf::default() };
    let proxy = Conf { listener: format!("{}\npool = \"by-listener\"", conf.listener), ..conf }.start().await;
    for (endpoint, web, other) in [
        ("vpce-00000001", "by-route", "by-tenant"),
        ("vpce-00000002", "by-route", "by-listener"),
        ("vpce-00000003", "by-listener", "by-listener"),
        ("vpce-00000000000000003", "by-listener", "by-listener"),
        (ACME, "acme-1", "acme-1"),
    ] {
        assert_eq!(greeting(&proxy, "web", &header(endpoint)).await, web, "{endpoint}");
        assert_eq!(greeting(&proxy, "other", &header(endpoint)).await, other, "{endpoint}");
    }
    for (listener, tenant, pool, count) in [
        ("web", "routed", "by-route", 1),
        ("other", "routed", "by-tenant", 1),
        ("web", "routed-only", "by-route", 1),
        ("other", "routed-only", "by-listener", 1),
        ("web", "poor", "by-listener", 2),
        ("other", "poor", "by-listener", 2),
    ] {
        let labels = [("listener", listener), ("tenant", tenant), ("pool", pool), ("why", "done")];
        proxy.ended(&labels).is(count).await;
        proxy.ended(&labels[..2]).is(count).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn unknown_endpoints_are_rejected_unless_a_fallback_tenant_is_set() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], more: lenient(), ..Conf::default() };
    let proxy = conf.start().await;
    for listener in ["web", "half"] {
        rejects(&proxy, listener, &header(STRANGER)).await;
    }
    for listener in ["web", "half"] {
        rejects(&proxy, listener, &anonymous()).await;
    }
    assert_eq!(acme.sessions(), 0, "a backend heard of it");
    let why = |why| [("by", "proxy"), ("at", "tenant"), ("why", why)];
    proxy.ended(&why("unknown_endpoint")).is(2).await;
    proxy.ended(&why("no_endpoint")).is(1).await;
    // Where the tenant that takes them in is disabled, that is the reason.
    proxy.ended(&[("listener", "half"), ("tenant", "initech"), ("why", "tenant_disabled")]).is(1).await;

    assert_eq!(greeting(&proxy, "lenient", &header(STRANGER)).await, "acme-1");
    assert_eq!(greeting(&proxy, "lenient", &anonymous()).await, "acme-1");
    proxy.ended(&[("listener", "lenient"), ("tenant", "umbrella"), ("why", "done")]).is(1).await;
    proxy.ended(&[("listener", "lenient"), ("tenant", "acme"), ("why", "done")]).is(1).await;
    // Whoever has a tenant keeps it.
    assert_eq!(greeting(&proxy, "lenient", &header(GLOBEX)).await, "");
    proxy.ended(&[("listener", "lenient"), ("tenant", "globex"), ("why", "done")]).is(1).await;

    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let of = |listener: &str, why: &str| {
        let found = log.iter().find(|line| line["listener"] == listener && line["outcome"]["why"] == why);
        found.unwrap_or_else(|| panic!("{listener}: {why}"))
    };
    let stranger = of("web", "unknown_endpoint");
    assert_eq!((&stranger["endpoint"], &stranger["client"]), (&STRANGER.into(), &"10.100.0.10:40000".into()));
    assert!(stranger.get("tenant").is_none(), "{stranger}");
    assert!(of("web", "no_endpoint").get("endpoint").is_none());
}

#[tokio::test]
async fn disabled_tenant_is_rejected_by_name() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    is_reset(&mut proxy.open(INITECH, b"payload").await).await;
    let disabled = [("tenant", "initech"), ("by", "proxy"), ("at", "tenant"), ("why", "tenant_disabled")];
    proxy.ended(&disabled).is(1).await;
    let line = proxy.logged("tenant_disabled").await;
    assert_eq!((&line["tenant"], &line["endpoint"]), (&"initech".into(), &INITECH.into()));
    assert_eq!(line["attempts"], 0);
    assert!(line.get("backend").is_none(), "{line}");
    proxy.metric("vestibule_backend_connects_total", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn malformed_endpoint_id_is_unknown_and_an_empty_one_is_absent() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], more: lenient(), ..Conf::default() };
    let proxy = conf.start().await;
    let mut other_case = ACME.to_uppercase();
    other_case.replace_range(..5, "vpce-");
    let too_long = format!("{ACME}0");
    let unknown = [
        "",
        "vpce-",
        "vpce-0acce0000acce000",
        &too_long,
        &other_case,
        "nonsense",
        "vpce-0acce0000acce000\0",
        "\u{1}",
    ];
    for id in unknown {
        rejects(&proxy, "web", &with_tlvs(&[(0xEA, &named(id))])).await;
        assert_eq!(greeting(&proxy, "lenient", &with_tlvs(&[(0xEA, &named(id))])).await, "acme-1", "{id:?}");
    }
    let count = u32::try_from(unknown.len()).unwrap();
    proxy.ended(&[("listener", "web"), ("at", "tenant"), ("why", "unknown_endpoint")]).is(count).await;
    proxy.ended(&[("listener", "lenient"), ("tenant", "umbrella"), ("why", "done")]).is(count).await;

    // An empty TLV, other subtypes, another vendor's TLV.
    let none: [&[(u8, &[u8])]; 4] = [
        &[(0xEA, b"")],
        &[(0xEA, b"\x02vpce-0acce0000acce0000")],
        &[(0xEE, b"\x01vpce-0acce0000acce0000")],
        &[],
    ];
    for tlvs in none {
        rejects(&proxy, "web", &with_tlvs(tlvs)).await;
        assert_eq!(greeting(&proxy, "lenient", &with_tlvs(tlvs)).await, "acme-1", "{tlvs:?}");
    }
    proxy.ended(&[("listener", "web"), ("at", "tenant"), ("why", "no_endpoint")]).is(4).await;
    proxy.ended(&[("listener", "lenient"), ("tenant", "acme"), ("why", "done")]).is(4).await;
    proxy.ended(&[("listener", "web"), ("tenant", "acme")]).is(0).await;

    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let rejected = log.iter().filter(|line| line["outcome"]["by"] == "proxy");
    assert!(rejected.clone().all(|line| line.get("endpoint").is_none()), "{log:?}");
    assert_eq!(rejected.count(), unknown.len() + 4);
}

#[tokio::test]
async fn header_with_two_different_endpoints_is_refused() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let (own, other) = (named(ACME), named(GLOBEX));
    let acmes: [&[(u8, &[u8])]; 3] = [
        &[(0xEA, &own), (0xEA, &own)],
        &[(0xEA, b""), (0xEA, &own)],
        &[(0xEA, b"\x02else"), (0x04, b"\0\0\0"), (0xEA, &own), (0xEA, &own), (0xEA, b"")],
    ];
    for tlvs in acmes {
        assert_eq!(greeting(&proxy, "web", &with_tlvs(tlvs)).await, "acme-1");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(3).await;
    let ambiguous: [&[(u8, &[u8])]; 4] = [
        &[(0xEA, &own), (0xEA, &other)],
        &[(0xEA, &other), (0xEA, &own)],
        &[(0xEA, &own), (0x04, b"\0\0\0"), (0xEA, b"\x02else"), (0xEA, &own), (0xEA, &other)],
        &[(0xEA, b"\x01nonsense"), (0xEA, &own)],
    ];
    for tlvs in ambiguous {
        rejects(&proxy, "web", &with_tlvs(tlvs)).await;
    }
    let refused = [("tenant", ""), ("by", "proxy"), ("at", "header"), ("why", "ambiguous_endpoint")];
    proxy.ended(&refused).is(4).await;
    assert_eq!(acme.sessions(), 3);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn labels_of_the_tenant_are_in_the_log_and_no_others() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let more = "[[tenant]]\nname = \"labelled\"\nendpoints = [\"vpce-00000001\"]\npool = \"acme\"\nstate = \"disabled\"\n\
                labels = { plan = \"free\", \"a \\\"b\\\"\" = \"ü\\n\" }";
    let conf = Conf { acme: vec![acme.address()], more: more.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    exchange(proxy.open(ACME, b"").await).await.unwrap();
    is_reset(&mut proxy.open("vpce-00000001", b"").await).await;
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let of = |tenant: &str| log.iter().find(|line| line["tenant"] == tenant).unwrap();
    assert_eq!(of("acme")["labels"], serde_json::json!({"plan": "gold"}));
    assert_eq!(of("labelled")["labels"], serde_json::json!({"plan": "free", "a \"b\"": "ü\n"}));
    assert!(of("globex").get("labels").is_none());
}

#[tokio::test]
async fn among_10_000_tenants_each_endpoint_leads_to_its_own() {
    const TENANTS: u64 = 10_000;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    // Neighbours differ in one digit, and every other has an ID of the short form.
    let endpoint = |tenant: u64| {
        if tenant.is_multiple_of(2) { format!("vpce-{tenant:08x}") } else { format!("vpce-{tenant:017x}") }
    };
    let mut more = String::new();
    for tenant in 0..TENANTS {
        let id = endpoint(tenant);
        writeln!(more, "[[tenant]]\nname = \"t{tenant}\"\nendpoints = [\"{id}\"]\npool = \"acme\"").unwrap();
    }
    let proxy = Conf { acme: vec![acme.address()], more, ..Conf::default() }.start().await;
    proxy.metric("vestibule_tenants", &[]).is(10_003).await;
    let asked: Vec<u64> = (0..TENANTS).step_by(33).collect();
    for tenant in &asked {
        let payload = format!("of {tenant}");
        let answer = exchange(proxy.open(&endpoint(*tenant), payload.as_bytes()).await).await.unwrap();
        assert_eq!(answer, payload.as_bytes());
    }
    // The same digits in the other form are nobody's.
    is_reset(&mut proxy.open("vpce-00000021", b"").await).await;
    is_reset(&mut proxy.open("vpce-00000000000000042", b"").await).await;
    proxy.ended(&[("why", "unknown_endpoint")]).is(2).await;
    let count = u32::try_from(asked.len()).unwrap();
    assert!(count > 300);
    proxy.ended(&[("why", "done")]).is(count).await;

    let page = http_get(proxy.server().admin(), "/metrics").await;
    let mut found: BTreeMap<String, f64> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("vestibule_sessions_ended_total{")) {
        let tenant = line.split_once("tenant=\"").unwrap().1.split('"').next().unwrap();
        *found.entry(tenant.to_owned()).or_default() +=
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    }
    assert!(found.remove("").is_some(), "the strangers");
    let expected: BTreeMap<String, f64> = asked.iter().map(|tenant| (format!("t{tenant}"), 1.0)).collect();
    assert_eq!(found, expected);
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    for line in log.iter().filter(|line| line["tenant"].as_str().is_some_and(|name| name.starts_with('t'))) {
        let tenant = line["tenant"].as_str().unwrap()[1..].parse().unwrap();
        assert_eq!(line["endpoint"], endpoint(tenant));
    }
}
