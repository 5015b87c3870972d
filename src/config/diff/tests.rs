//! Each kind of change, told apart and told to the operator.

use super::*;

const TEXT: &str = r#"
    [process]
    workers = 2
    [[listener]]
    name = "web"
    bind = ["0.0.0.0:8090-8091"]
    trusted-sources = ["10.0.0.0/16"]
    pool = "app"
    [[listener]]
    name = "dns"
    bind = "0.0.0.0:53"
    protocol = "udp"
    trusted-sources = ["10.0.0.0/16"]
    pool = "app"
    [[pool]]
    name = "app"
    backends = ["10.0.1.10:80"]
    health = { kind = "none" }
    [[pool]]
    name = "gold"
    backends = ["10.0.1.20:80", { address = "10.0.1.21:80", weight = 50 }]
    [[tenant]]
    name = "acme"
    endpoints = ["vpce-08d2bf15fac5001c9"]
    [tenant.limits]
    sessions = 2000
    session-rate = "200/s"
    [[tenant]]
    name = "globex"
    pool = "gold"
"#;

fn parse(text: &str) -> Config {
    Config::parse("test.toml", text).unwrap_or_else(|faults| panic!("{faults}"))
}

fn in_force() -> ActiveConfig {
    let route = |listener: &str, tenant: &str, pool: &str, now| RouteUsage {
        listener: listener.to_owned(),
        tenant: tenant.to_owned(),
        pool: pool.to_owned(),
        now,
    };
    let backend = |pool: &str, backend: &str, now| BackendUsage {
        pool: pool.to_owned(),
        backend: backend.to_owned(),
        now,
    };
    ActiveConfig {
        version: "1".to_owned(),
        config: parse(TEXT),
        routes: vec![
            route("web", "acme", "app", 100),
            route("web", "acme", "app", 20),
            route("dns", "acme", "app", 7),
            route("web", "globex", "gold", 1),
            route("web", "", "", 4),
        ],
        backends: vec![backend("app", "10.0.1.10:80", 127), backend("gold", "10.0.1.21:80", 1)],
    }
}

/// The printed changes between two texts, and the number of affected sessions.
fn changed(pairs: &[(&str, &str)]) -> (Vec<String>, String) {
    let mut text = TEXT.to_owned();
    for (from, to) in pairs {
        assert!(text.contains(from), "{from}");
        text = text.replacen(from, to, 1);
    }
    let difference = ConfigDiff::between(&in_force(), &parse(&text));
    (difference.changes.iter().map(ToString::to_string).collect(), difference.now.to_string())
}

#[track_caller]
fn one(from: &str, to: &str, line: &str, concerned: &str) {
    assert_eq!(changed(&[(from, to)]), (vec![line.to_owned()], concerned.to_owned()));
}

#[test]
fn equal_configurations_have_no_change() {
    assert_eq!(changed(&[]).0, Vec::<String>::new());
    assert_eq!(changed(&[("0.0.0.0:8090-8091", "0.0.0.0:8090\", \"0.0.0.0:8091")]).0.len(), 0);
}

#[test]
fn tables_that_need_a_restart_are_refused_and_others_are_not() {
    for (from, to, line) in [
        ("workers = 2", "workers = 3", "[process]: refused, needs a restart or a takeover: workers 2 -> 3"),
        (
            "[process]",
            "[admin]\nsocket = \"/run/x\"\n[process]",
            "[admin]: refused, needs a restart or a takeover: socket none -> /run/x",
        ),
        (
            "[process]",
            "[log]\naccess = \"/tmp/log\"\nlevel = \"warn\"\n[process]",
            "[log]: refused, needs a restart or a takeover: access stdout -> /tmp/log, level info -> warn",
        ),
        ("[process]", "[drain]\nidle = \"31s\"\n[process]", "[drain]: changed: idle 30s -> 31s"),
    ] {
        one(from, to, line, "0 sessions");
    }
    let line =
        "[timeouts]: changed: flow-idle 2m -> 3m, half-close 1m -> 1m 1s; 125 sessions and 7 flows now";
    let timeouts = "[timeouts]\nhalf-close = \"61s\"\nflow-idle = \"3m\"\n[process]";
    one("[process]", timeouts, line, "125 sessions and 7 flows");
    for (from, to, refused) in [("workers = 2", "workers = 3", true), ("\"200/s\"", "\"100/s\"", false)] {
        let difference = ConfigDiff::between(&in_force(), &parse(&TEXT.replace(from, to)));
        assert_eq!((difference.is_refused(), difference.changes.is_empty()), (refused, false));
    }
}

#[test]
fn listeners_come_go_and_change_their_addresses_and_keys() {
    let new = "[[listener]]\nname = \"more\"\nbind = \"0.0.0.0:9000\"\ntrusted-sources = [\"10.0.0.0/16\"]\npool = \"app\"\n[process]";
    one("[process]", new, "listener \"more\": added: bind +0.0.0.0:9000", "0 sessions");
    let bind = "listener \"web\": changed: bind -0.0.0.0:8091, bind +0.0.0.0:8092; 125 sessions now";
    one("8090-8091", "8090\", \"0.0.0.0:8092", bind, "125 sessions");
    let key = "listener \"dns\": changed: verify-crc true -> false; 7 flows now";
    one("protocol = \"udp\"", "protocol = \"udp\"\nverify-crc = false", key, "7 flows");
    let (lines, concerned) = changed(&[("name = \"dns\"", "name = \"names\"")]);
    assert_eq!(
        lines,
        ["listener \"names\": added: bind +0.0.0.0:53", "listener \"dns\": removed; 7 flows now"]
    );
    assert_eq!(concerned, "7 flows");
    let key = "listener \"dns\": changed: on-no-endpoint reject -> tenant:acme; 7 flows now";
    one("protocol = \"udp\"", "protocol = \"udp\"\non-no-endpoint = \"tenant:acme\"", key, "7 flows");
    let fixed = "proxy-protocol = \"off\"\ntenant = \"acme\"";
    let line = "listener \"web\": changed: bare-datagrams refuse -> none, on-no-endpoint reject -> none, \
                on-unknown-endpoint reject -> none, tenant none -> acme, trusted-sources 10.0.0.0/16 -> none, verify-crc true -> none; 125 sessions now";
    one("trusted-sources = [\"10.0.0.0/16\"]", fixed, line, "125 sessions");
}

#[test]
fn pools_and_each_of_their_backends_come_go_and_change() {
    let new = "[[pool]]\nname = \"more\"\nbackends = [\"10.0.1.30:80\"]\n[process]";
    one("[process]", new, "pool \"more\": added", "0 sessions");
    let line = "pool \"gold\": changed: balance p2c -> maglev, health.interval 5s -> 6s; 1 session now";
    let keys = "name = \"gold\"\nbalance = \"maglev\"\nhealth = { interval = \"6s\" }";
    one("name = \"gold\"", keys, line, "1 session");
    let line = "pool \"gold\": changed: health.expect none -> 43, health.kind tcp -> exchange, health.match none -> prefix, \
                health.protocol none -> tcp; 1 session now";
    let keys = "name = \"gold\"\nhealth = { kind = \"exchange\", expect = \"+\", match = \"prefix\" }";
    one("name = \"gold\"", keys, line, "1 session");
    let (lines, concerned) = changed(&[("10.0.1.20:80", "10.0.1.22:80"), ("weight = 50", "weight = 60")]);
    assert_eq!(
        lines,
        [
            "pool \"gold\": backend 10.0.1.22:80: added",
            "pool \"gold\": backend 10.0.1.21:80: changed: weight 50 -> 60; 1 session now",
            "pool \"gold\": backend 10.0.1.20:80: removed"
        ]
    );
    assert_eq!(concerned, "1 session");
}

#[test]
fn tenants_come_go_move_and_change_limits_and_state() {
    one("[process]", "[[tenant]]\nname = \"hooli\"\n[process]", "tenant \"hooli\": added", "0 sessions");
    let (lines, concerned) = changed(&[("name = \"globex\"", "name = \"initech\"")]);
    assert_eq!(lines, ["tenant \"initech\": added", "tenant \"globex\": removed; 1 session now"]);
    assert_eq!(concerned, "1 session");
    let limits = "tenant \"acme\": limits: session-rate 200/s (burst 200) -> none, sessions 2000 -> 3000; \
                  120 sessions and 7 flows now";
    let (lines, concerned) =
        changed(&[("sessions = 2000", "sessions = 3000"), ("session-rate = \"200/s\"", "")]);
    assert_eq!((lines, concerned.as_str()), (vec![limits.to_owned()], "120 sessions and 7 flows"));
    let state = "tenant \"globex\": state: state enabled -> disabled; 1 session now";
    one("name = \"globex\"", "name = \"globex\"\nstate = \"disabled\"", state, "1 session");
    let labels = "tenant \"globex\": changed: labels.plan none -> gold; 1 session now";
    one("name = \"globex\"", "name = \"globex\"\nlabels = { plan = \"gold\" }", labels, "1 session");
}

#[test]
fn tenant_moves_by_pool_routes_listener_pool_and_endpoints() {
    let by_route = "tenant \"acme\": moved: dns app -> gold; 7 flows now";
    one("name = \"acme\"", "name = \"acme\"\nroutes = { dns = \"gold\" }", by_route, "7 flows");
    let by_pool = "tenant \"acme\": moved: web app -> gold, dns app -> gold; 120 sessions and 7 flows now";
    one("name = \"acme\"", "name = \"acme\"\npool = \"gold\"", by_pool, "120 sessions and 7 flows");
    let (lines, _) = changed(&[("pool = \"app\"", "pool = \"gold\"")]);
    assert_eq!(
        lines,
        [
            "listener \"web\": changed: pool app -> gold; 125 sessions now",
            "tenant \"acme\": moved: web app -> gold; 120 sessions now"
        ]
    );
    let endpoints = "tenant \"acme\": moved: endpoints -vpce-08d2bf15fac5001c9, \
                     endpoints +vpce-0a000000000000001; 120 sessions and 7 flows now";
    one("vpce-08d2bf15fac5001c9", "vpce-0a000000000000001", endpoints, "120 sessions and 7 flows");
}

#[test]
fn sessions_that_a_reload_would_end_are_counted() {
    let ends = |from: &str, to: &str| {
        let text = TEXT.replacen(from, to, 1);
        assert_ne!(text, TEXT);
        ConfigDiff::between(&in_force(), &parse(&text)).ends.to_string()
    };
    let all = "120 sessions and 7 flows";
    assert_eq!(ends("vpce-08d2bf15fac5001c9", "vpce-0a000000000000001"), all);
    assert_eq!(ends("name = \"acme\"", "name = \"acme\"\nstate = \"disabled\""), all);
    assert_eq!(
        ends("name = \"acme\"", "name = \"acme\"\nstate = \"disabled\"\non-revoke = \"keep\""),
        "0 sessions"
    );
    assert_eq!(ends("name = \"globex\"", "name = \"initech\""), "1 session");
    assert_eq!(ends("pool = \"app\"", "pool = \"app\"\non-no-endpoint = \"tenant:acme\""), "121 sessions");
    assert_eq!(
        ends("\"vpce-08d2bf15fac5001c9\"", "\"vpce-08d2bf15fac5001c9\", \"vpce-00000001\""),
        "0 sessions"
    );
    let change = "tenant \"acme\": changed: on-revoke end -> keep; 120 sessions and 7 flows now";
    one("name = \"acme\"", "name = \"acme\"\non-revoke = \"keep\"", change, all);
    let change = "tenant \"globex\": changed: revoke-grace 0s -> 5s; 1 session now";
    one("name = \"globex\"", "name = \"globex\"\nrevoke-grace = \"5s\"", change, "1 session");
}

#[test]
fn active_configuration_survives_json() {
    let sent = in_force();
    let text = serde_json::to_string(&sent).unwrap();
    let read: ActiveConfig = serde_json::from_str(&text).unwrap();
    assert_eq!((&read.config, &read.routes), (&sent.config, &sent.routes));
    assert!(ConfigDiff::between(&read, &sent.config).changes.is_empty());
}

#[test]
fn every_kind_of_configuration_travels() {
    for file in ["config/reference.toml", "tests/config/valid/everything.toml"] {
        let config = Config::load(std::path::Path::new(file)).unwrap_or_else(|faults| panic!("{faults}"));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config, "{file}");
    }
}
