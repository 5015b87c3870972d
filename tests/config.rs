//! Whole configuration files: those that are valid, and those beside the exact faults that they have.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its own files has failed")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use vestibule::config::{
    AccessLogTarget, BackendConfig, BackendTarget, Balance, BandwidthLimit, BareDatagrams, Config,
    ConfigErrors, DnsConfig, EjectionConfig, Fallback, LimitMode, ListenerIdentity, LogFormat, LogLevel,
    OnRevoke, Presence, ProbeCheck, ProbeConfig, Protocol, QueueConfig, RateLimit, TABLES, TenantLimits,
};

fn load(path: impl AsRef<Path>) -> Result<Config, ConfigErrors> {
    Config::load(path.as_ref())
}

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

#[test]
fn every_invalid_file_has_the_faults_that_stand_beside_it() {
    const FOLDER: &str = "tests/config/invalid/";
    let mut wrong = String::new();
    for file in files(FOLDER) {
        let expected = std::fs::read_to_string(file.with_extension("expected")).unwrap_or_default();
        let found = match load(&file) {
            Ok(_) => "no fault\n".to_owned(),
            Err(faults) => format!("{faults}\n").replace(FOLDER, ""),
        };
        if found != expected {
            writeln!(wrong, "\n{}: expected\n{expected}found\n{found}", file.display()).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn every_valid_file_is_valid() {
    for file in files("tests/config/valid") {
        if let Err(faults) = load(&file) {
            panic!("{faults}");
        }
    }
}

#[test]
fn minimal_file_is_valid_and_all_else_is_default() {
    let config = load("config/minimal.toml").unwrap();
    assert_eq!((config.process.workers, config.process.max_sessions), (0, 0));
    assert_eq!(config.process.pipe_memory, 64 << 20);
    assert_eq!((config.process.buffer_memory, config.process.unsent_memory), (32 << 20, 128 << 10));
    assert_eq!(config.admin.bind, "127.0.0.1:9900".parse().unwrap());
    assert_eq!(config.health.bind, "0.0.0.0:8081".parse().unwrap());
    assert_eq!(config.health.path, "/healthz");
    assert_eq!((config.log.level, config.log.format), (LogLevel::Info, LogFormat::Json));
    assert_eq!(config.log.access, AccessLogTarget::Stdout);
    let (timeouts, drain) = (config.timeouts, config.drain);
    let seconds =
        [timeouts.header, timeouts.connect, timeouts.idle, timeouts.half_close].map(|time| time.as_secs());
    assert_eq!(seconds, [60, 3, 350, 60]);
    assert_eq!((timeouts.tcp_user_timeout.as_secs(), timeouts.stall.as_secs()), (120, 100));
    let seconds = [drain.notice, drain.quiet, drain.idle, drain.deadline].map(|time| time.as_secs());
    assert_eq!(seconds, [30, 10, 30, 300]);

    let [listener] = config.listeners.as_slice() else { panic!("one listener") };
    assert_eq!(listener.bind, ["0.0.0.0:8080".parse().unwrap()]);
    assert_eq!((listener.pool.as_deref(), listener.max_pending), (Some("app"), 4096));
    let expected = ListenerIdentity::Header {
        trusted: vec!["127.0.0.0/8".parse().unwrap()],
        verify_crc: true,
        on_no_endpoint: Fallback::Reject,
        on_unknown_endpoint: Fallback::Reject,
        bare_datagrams: BareDatagrams::Refuse,
    };
    assert_eq!(listener.identity, expected);

    let [pool] = config.pools.as_slice() else { panic!("one pool") };
    assert_eq!((pool.balance, pool.attempts, pool.send_proxy), (Balance::P2c, 3, false));
    assert!(pool.source_addresses.is_empty());
    let (interval, timeout) = (Duration::from_secs(5), Duration::from_secs(2));
    let probe = ProbeConfig {
        interval,
        timeout,
        rise: 2,
        fall: 3,
        port: None,
        send_proxy: false,
        ask: ProbeCheck::Connect,
    };
    assert_eq!(pool.health, Some(probe));
    assert_eq!((pool.prefer_zone.as_ref(), pool.slow_start), (None, Duration::ZERO));
    assert_eq!((pool.retry_budget, pool.panic_threshold), (20, 0));
    assert_eq!(pool.queue, QueueConfig { length: 0, timeout: Duration::from_secs(1) });
    let base_time = Duration::from_secs(30);
    assert_eq!(pool.ejection, EjectionConfig { consecutive_failures: 5, base_time, max_percent: 50 });
    let backend = &pool.backends[0];
    assert_eq!((backend.weight, backend.zone.as_ref(), backend.max_sessions), (100, None, None));
    assert!(!backend.backup);
    let [timeout, min_ttl, max_ttl] = [2, 1, 60].map(Duration::from_secs);
    assert_eq!(
        config.dns,
        DnsConfig { servers: Vec::new(), timeout, min_ttl, max_ttl, allow_answers: Vec::new() }
    );

    let [tenant] = config.tenants.as_slice() else { panic!("one tenant") };
    assert_eq!((tenant.name.as_str(), tenant.enabled, tenant.pool.as_ref()), ("acme", true, None));
    assert!(tenant.routes.is_empty() && tenant.labels.is_empty());
    assert_eq!(tenant.limits, TenantLimits::default());
    assert_eq!((tenant.on_revoke, tenant.revoke_grace), (OnRevoke::End, Duration::ZERO));
}

#[test]
fn reference_is_valid_and_has_the_defaults() {
    let reference = load("config/reference.toml").unwrap();
    let minimal = load("config/minimal.toml").unwrap();
    // Its keys come from the declarations, so that it is enough to see that nothing else stands there.
    assert_eq!((&reference.process, &reference.dns), (&minimal.process, &minimal.dns));
    assert_eq!((reference.timeouts, reference.drain), (minimal.timeouts, minimal.drain));
    let fixed = ListenerIdentity::Fixed { tenant: "acme-databases".to_owned(), trusted: Vec::new() };
    assert_eq!(reference.listeners[1].identity, fixed);
    let names: Vec<_> = reference.tenants.iter().map(|tenant| tenant.name.as_str()).collect();
    assert_eq!(names, ["acme", "acme-databases"]);
    assert_eq!(reference.tenants[1].routes["postgres"], "acme-db");
    let text = std::fs::read_to_string("config/reference.toml").unwrap();
    let all =
        Config::parse("config/all.toml", &text.replace("# include = [\"", "include = [\"config/")).unwrap();
    assert_eq!(all.tenants[2].labels["plan"], "silver", "the include is read");
}

#[test]
fn keys_that_are_comments_in_the_reference_are_valid_or_belong_to_another_value() {
    let reference = std::fs::read_to_string("config/reference.toml").unwrap();
    let mut keys = 0;
    for line in reference.lines() {
        let Some(key) =
            line.strip_prefix("# ").filter(|key| key.split("  # ").next().unwrap().contains(" = "))
        else {
            continue;
        };
        // The table of the backends follows.
        if key.starts_with("backends") {
            continue;
        }
        keys += 1;
        let faults = Config::parse("reference.toml", &reference.replacen(line, key, 1)).err();
        let faults = faults.iter().flatten().map(ToString::to_string);
        let others: Vec<_> = faults.filter(|fault| !fault.contains(": must be absent where ")).collect();
        assert!(others.is_empty(), "{key}: {others:?}");
    }
    let optional = TABLES.iter().flat_map(|table| table.keys);
    let optional =
        optional.filter(|key| matches!(key.presence, Presence::Optional(_) | Presence::Conditional(_)));
    assert_eq!(keys, optional.count());
}

#[test]
fn non_default_values_are_read() {
    let config = load("tests/config/valid/everything.toml").unwrap();
    assert_eq!((config.process.workers, config.process.max_sessions), (1024, 50_000));
    assert_eq!((config.process.pipe_memory, config.process.buffer_memory), (0, 8 << 20));
    assert_eq!(config.process.unsent_memory, 128 << 10);
    assert_eq!((config.log.level, config.log.format), (LogLevel::Trace, LogFormat::Text));
    assert_eq!(config.log.access, AccessLogTarget::File("access.log".into()));
    assert_eq!(config.timeouts.connect, Duration::from_millis(200));
    assert_eq!(config.drain.notice, Duration::ZERO);
    let ListenerIdentity::Header {
        trusted,
        verify_crc,
        on_no_endpoint,
        on_unknown_endpoint,
        bare_datagrams: _,
    } = &config.listeners[0].identity
    else {
        panic!("a header is required")
    };
    assert_eq!(trusted, &["10.0.0.1/32".parse().unwrap(), "fd00::/8".parse().unwrap()]);
    assert!(!verify_crc);
    assert_eq!(on_no_endpoint, &Fallback::Tenant("inside".to_owned()));
    assert_eq!(on_unknown_endpoint, &Fallback::Tenant("acme".to_owned()));
    let fixed = ListenerIdentity::Fixed {
        tenant: "inside".to_owned(),
        trusted: vec!["10.9.0.0/16".parse().unwrap()],
    };
    assert_eq!(config.listeners[1].identity, fixed);
    let pool = &config.pools[0];
    assert_eq!((pool.balance, pool.attempts, pool.send_proxy), (Balance::RoundRobin, 100, true));
    assert_eq!(pool.source_addresses.len(), 2);
    let (interval, timeout) = (Duration::from_secs(1), Duration::from_secs(1));
    let ask = ProbeCheck::Connect;
    let probe =
        ProbeConfig { interval, timeout, rise: 1, fall: 1, port: Some(65_535), send_proxy: true, ask };
    assert_eq!(pool.health, Some(probe));
    assert_eq!(config.pools[1].health, None);
    assert!(!config.tenants[0].enabled);
    let revoke = [0, 1].map(|place| (config.tenants[place].on_revoke, config.tenants[place].revoke_grace));
    assert_eq!(revoke, [(OnRevoke::End, Duration::from_secs(3600)), (OnRevoke::Keep, Duration::ZERO)]);
}

#[test]
fn every_key_of_a_pool_is_read() {
    let config = load("tests/config/valid/everything.toml").unwrap();
    let [app, _, http, bare, exchange, names] = config.pools.as_slice() else { panic!("six pools") };
    let backend =
        |target, weight| BackendConfig { target, weight, zone: None, max_sessions: None, backup: false };
    let address = |address: &str| BackendTarget::Address(address.parse().unwrap());
    let host = |name: &str, port| BackendTarget::Host { name: name.to_owned(), port };
    let zoned = BackendConfig {
        zone: Some("usw2-az1".to_owned()),
        max_sessions: Some(1),
        backup: true,
        ..backend(address("[fd00::10]:80"), 0)
    };
    let bounded =
        BackendConfig { max_sessions: Some(u32::MAX), ..backend(host("db.internal", 65_535), 1000) };
    let service = backend(BackendTarget::Service("_http._tcp.example.com".to_owned()), 100);
    assert_eq!(app.backends, [backend(address("10.0.1.10:80"), 100), zoned, bounded, service]);
    assert_eq!(app.prefer_zone.as_deref(), Some("usw2-az1"));
    assert_eq!((app.retry_budget, app.slow_start), (100, Duration::from_secs(30)));
    let short = Duration::from_millis(1);
    assert_eq!(app.queue, QueueConfig { length: 100_000, timeout: short });
    assert_eq!(app.panic_threshold, 100);
    assert_eq!(
        app.ejection,
        EjectionConfig { consecutive_failures: 1000, base_time: short, max_percent: 100 }
    );

    assert_eq!(http.prefer_zone, None);
    let ways = [http, bare, exchange].map(|pool| pool.balance);
    assert_eq!(ways, [Balance::MaglevEndpoint, Balance::LeastSessions, Balance::Maglev]);
    let asks = [http, bare, exchange, names].map(|pool| pool.health.clone().unwrap().ask);
    let expected = [
        ProbeCheck::Http {
            path: "/live?deep=1".to_owned(),
            host: Some("example.com:8080".to_owned()),
            expect_status: vec![100..=100, 200..=399, 599..=599],
        },
        ProbeCheck::Http {
            path: "/".to_owned(),
            host: None,
            expect_status: std::iter::once(200..=399).collect(),
        },
        ProbeCheck::Exchange {
            protocol: Protocol::Tcp,
            send: b"PING\r\n".to_vec(),
            expect: vec![10, 11],
            prefix: true,
        },
        ProbeCheck::Exchange {
            protocol: Protocol::Tcp,
            send: Vec::new(),
            expect: b"220 ".to_vec(),
            prefix: false,
        },
    ];
    assert_eq!(asks, expected);
    let targets: Vec<_> = names.backends.iter().map(|backend| backend.target.to_string()).collect();
    assert_eq!(targets, ["db.internal:80", "db.internal:81"]);
}

#[test]
fn name_servers_have_the_port_of_dns_where_none_is_written() {
    let dns = load("tests/config/valid/everything.toml").unwrap().dns;
    let servers: Vec<_> = dns.servers.iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["10.0.0.2:53", "10.0.0.3:5353", "[fd00::2]:53", "[fd00::3]:65535"]);
    let times = [dns.timeout, dns.min_ttl, dns.max_ttl].map(|time| time.as_millis());
    assert_eq!(times, [1, 120_000, 120_000]);
    assert_eq!(dns.allow_answers.len(), 2);
    assert_eq!(dns.allow_answers[1].to_string(), "fe80::1/128");
}

#[test]
fn min_ttl_and_max_ttl_are_not_typos_of_each_other() {
    let minimal = std::fs::read_to_string("config/minimal.toml").unwrap();
    let with = |dns: &str| Config::parse("dns.toml", &format!("{minimal}\n[dns]\n{dns}\n"));
    let seconds = Duration::from_secs;
    assert_eq!(with("min-ttl = \"60s\"").unwrap().dns.min_ttl, seconds(60));
    assert_eq!(with("max-ttl = \"1s\"").unwrap().dns.max_ttl, seconds(1));
    assert!(with("min-ttl = \"61s\"").is_err() && with("max-ttl = \"999ms\"").is_err());
}

#[test]
fn tenant_takes_each_unset_limit_from_the_defaults() {
    let config = load("tests/config/valid/everything.toml").unwrap();
    let bandwidth = |bytes_per_second, burst| Some(BandwidthLimit { bytes_per_second, burst });
    let rate = |nanos, burst| Some(RateLimit { interval: Duration::from_nanos(nanos), burst });
    let acme = TenantLimits {
        mode: LimitMode::Observe,
        sessions: Some(1),
        session_rate: rate(60_000_000_000 / 7, 3),
        to_backend: bandwidth(1024, 1024),
        // A burst goes with its rate: the default's is not taken where the rate is the tenant's own.
        to_client: bandwidth(2 << 20, (2 << 20) / 10),
        flows: Some(5),
        // By default a burst of datagrams is what comes in a tenth of a second.
        datagram_rate: rate(50_000, 2_000),
    };
    assert_eq!(config.tenants[0].limits, acme);
    let defaults = TenantLimits {
        mode: LimitMode::Enforce,
        sessions: Some(2000),
        session_rate: rate(5_000_000, 400),
        to_backend: None,
        to_client: bandwidth(50 << 20, 50 << 20),
        flows: Some(70),
        datagram_rate: rate(1_000_000, 7),
    };
    assert_eq!(config.tenants[1].limits, defaults);
    let reference = load("config/reference.toml").unwrap();
    let [acme, databases] = [0, 1].map(|place| reference.tenants[place].limits);
    assert_eq!((acme.sessions, acme.session_rate, databases.sessions), (Some(10_000), None, Some(2000)));
}

#[test]
fn text_is_parsed_as_a_file_is() {
    let text = std::fs::read_to_string("config/minimal.toml").unwrap();
    assert_eq!(Config::parse("minimal.toml", &text).unwrap(), load("config/minimal.toml").unwrap());
    let faults = Config::parse("here", "[log]\nlevel = 3\n").unwrap_err();
    assert!(faults.to_string().starts_with("here:1: [[listener]]: must be present"), "{faults}");
    assert_eq!(faults.iter().last().map(vestibule::config::ConfigError::line), Some(Some(2)));
}

#[test]
fn unreadable_file_is_named_as_the_operator_named_it() {
    let faults = load("nowhere/vestibule.toml").unwrap_err();
    assert_eq!(
        faults.to_string(),
        "nowhere/vestibule.toml: must be readable, found: No such file or directory"
    );
    let fault = faults.iter().next().unwrap();
    assert_eq!((fault.file(), fault.line(), fault.subject()), ("nowhere/vestibule.toml", None, ""));
    let faults = load("config").unwrap_err();
    assert_eq!(faults.to_string(), "config: must be readable, found: Is a directory");
}

#[test]
fn file_that_is_not_utf8_reports_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("v.toml");
    std::fs::write(&file, b"[log]\nlevel = \"\xFF\"\n").unwrap();
    let expected = format!("{}:2: text: must be UTF-8, found the byte 0xFF", file.display());
    assert_eq!(load(&file).unwrap_err().to_string(), expected);
}

#[test]
fn included_files_are_read_once_in_order_and_hidden_ones_are_not() {
    // A bracket in the folder's name is part of the name, not of the pattern.
    let folder = tempfile::Builder::new().prefix("a[b]").tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("b.toml", "[[tenant]]\nname = \"b\"\n");
    write("a.toml", "[[tenant]]\nname = \"a\"\n");
    write(".c.toml", "[[tenant]]\nname = \"c\"\n");
    let minimal = std::fs::read_to_string("config/minimal.toml").unwrap();
    write("main.toml", &format!("include = [\"*.toml\", \"a.toml\", \"none/*\"]\n{minimal}"));
    let config = load(folder.path().join("main.toml")).unwrap();
    let names: Vec<_> = config.tenants.iter().map(|tenant| tenant.name.as_str()).collect();
    assert_eq!(names, ["acme", "a", "b"]);
}

#[test]
fn unreadable_included_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let minimal = std::fs::read_to_string("config/minimal.toml").unwrap();
    std::fs::write(folder.path().join("main.toml"), format!("include = [\"d/*\"]\n{minimal}")).unwrap();
    std::fs::create_dir_all(folder.path().join("d/folder.toml")).unwrap();
    let faults = load(folder.path().join("main.toml")).unwrap_err();
    let expected =
        format!("{}: must be readable, found: Is a directory", folder.path().join("d/folder.toml").display());
    assert_eq!(faults.to_string(), expected);
}

/// A configuration of many tenants; every one has a name and an endpoint of its own.
fn crowd(tenants: u32) -> String {
    let mut text = std::fs::read_to_string("config/minimal.toml").unwrap();
    for number in 0..tenants {
        write!(text, "\n[[tenant]]\nname = \"t{number}\"\nendpoints = [\"vpce-{number:017x}\"]\n").unwrap();
    }
    text
}

#[test]
fn hundred_thousand_tenants_are_read() {
    let config = Config::parse("crowd.toml", &crowd(100_000)).unwrap();
    assert_eq!(config.tenants.len(), 100_001);
    assert_eq!(config.tenants.last().unwrap().endpoints[0].to_string(), "vpce-0000000000001869f");
}

#[test]
fn hundred_thousand_errors_are_reported() {
    let text = crowd(100_000).replace("pool = \"app\"", "").replace("name = \"app\"", "name = \"ap\"");
    let faults = Config::parse("crowd.toml", &text).unwrap_err();
    assert_eq!(faults.len(), 100_001);
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>()) {
        drop(Config::parse("random.toml", &text));
    }

    #[test]
    fn no_mutated_configuration_panics(place in any::<prop::sample::Index>(), length in 0..40_usize, patch in "[\\PC\n]{0,12}") {
        let mut text: Vec<char> = std::fs::read_to_string("tests/config/valid/everything.toml").unwrap().chars().collect();
        let start = place.index(text.len());
        let end = (start + length).min(text.len());
        text.splice(start..end, patch.chars());
        let text: String = text.into_iter().collect();
        if let Err(faults) = Config::parse("bent.toml", &text) {
            prop_assert!(!faults.is_empty());
            prop_assert!(faults.iter().all(|fault| !fault.to_string().contains('\n')));
        }
    }
}
