//! Names as backends: what answers, and what is no answer, make of a pool.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use tokio::task::JoinHandle;
use vestibule::account::Labels;
use vestibule::config::{self, BackendTarget, Balance};
use vestibule::pool::Pool;
use vestibule::resolve::answer::{LastAnswers, NameResolution};
use vestibule::resolve::{self, LookupCounters, LookupResult, Resolver};

use super::dns::{Names, Reply, address, alias};
use super::harness::{Began, eventually};

const HOST: &str = "db.example.com.";
const SERVICE: &str = "_db._tcp.example.com.";
const NO_TIME: Duration = Duration::from_millis(20);

fn host(name: &str) -> BackendTarget {
    BackendTarget::Host { name: name.to_owned(), port: 5432 }
}

/// Asks these servers; answers hold for 10 to 20 ms.
fn resolver(servers: &[SocketAddr], timeout: Duration) -> Arc<Resolver> {
    let (servers, allow_answers) = (servers.to_vec(), Vec::new());
    let config =
        config::DnsConfig { servers, timeout, min_ttl: NO_TIME / 2, max_ttl: NO_TIME, allow_answers };
    Arc::new(Resolver::new(&config, Box::new(Vec::new)).unwrap())
}

/// One lookup, by one that asks only this server and does not wait long.
async fn look_up(names: &Names, target: &BackendTarget) -> Result<NameResolution, LookupResult> {
    let resolver = resolver(&[names.address()], Duration::from_secs(5));
    resolver.look_up(target, &mut LastAnswers::default()).await
}

/// The addresses of an answer, with their weights, and a mark for backups.
fn shown(answer: &NameResolution) -> Vec<String> {
    let shown = answer.found.iter().map(|resolved| {
        let weight = resolved.weight.map_or_else(String::new, |weight| format!(" {weight}"));
        format!("{}{weight}{}", resolved.address, if resolved.is_backup { " backup" } else { "" })
    });
    shown.collect()
}

fn pool(target: BackendTarget) -> config::PoolConfig {
    let backend =
        config::BackendConfig { target, weight: 100, zone: None, max_sessions: None, backup: false };
    config::PoolConfig {
        name: "acme".to_owned(),
        balance: Balance::RoundRobin,
        backends: vec![backend],
        prefer_zone: None,
        send_proxy: false,
        attempts: 1,
        retry_budget: 0,
        slow_start: Duration::ZERO,
        source_addresses: Vec::new(),
        queue: config::QueueConfig { length: 0, timeout: Duration::ZERO },
        panic_threshold: 0,
        health: None,
        ejection: config::EjectionConfig {
            consecutive_failures: 0,
            base_time: Duration::from_secs(1),
            max_percent: 0,
        },
    }
}

/// A pool with one name, which is looked up as long as this lives.
struct Kept {
    pool: Arc<Pool>,
    lookups: Arc<LookupCounters>,
    /// What was called: the address of each new backend, and `first`.
    calls: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kept {
    fn start(resolver: Arc<Resolver>, target: BackendTarget) -> Self {
        let labels = Labels::default();
        let pool = Arc::new(Pool::new(&pool(target), &labels));
        let lookups = Arc::clone(pool.lookups().next().unwrap());
        let calls = Arc::<Mutex<Vec<String>>>::default();
        let own = (Arc::clone(&pool), pool.names().next().unwrap().clone(), Arc::clone(&calls));
        let task = tokio::spawn(async move {
            let (pool, target, calls) = own;
            let first = || calls.lock().unwrap().push("first".to_owned());
            let fresh = |_: &Arc<Pool>, backend: Arc<vestibule::pool::backend::Backend>| {
                calls.lock().unwrap().push(backend.address().to_string());
            };
            resolve::run(resolver, pool, target, &labels, first, fresh).await;
        });
        Self { pool, lookups, calls, task }
    }

    fn backends(&self) -> Vec<String> {
        self.pool.run_due(vestibule::clock::now());
        let mut backends: Vec<_> =
            self.pool.candidates().backends().iter().map(|backend| backend.address().to_string()).collect();
        backends.sort();
        backends
    }

    async fn has(&self, expected: &[&str]) {
        let what = format!("{expected:?}");
        eventually(&what, async || (self.backends() == expected).then_some(())).await;
    }

    fn count(&self, lookup: LookupResult) -> u64 {
        self.lookups.counts().find(|(other, _)| *other == lookup).unwrap().1
    }

    /// Waits for one lookup more that ends so.
    async fn ends(&self, lookup: LookupResult) {
        let before = self.count(lookup);
        eventually(lookup.as_str(), async || (self.count(lookup) > before).then_some(())).await;
    }
}

/// What the process log says on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// While there is but one subscriber, tracing asks the thread that logs first whether a line is wanted, for all threads; another
/// test's thread has no subscriber.
static SECOND: LazyLock<tracing::Dispatch> =
    LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish()));

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        LazyLock::force(&SECOND);
        let log = Self::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// The lines of this module that hold the text.
    fn lines(&self, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn host_resolves_to_all_addresses_and_the_first_lookup_is_reported_after_them() {
    let names = Names::start().await;
    names.host(HOST, 60, &["10.0.0.2", "10.0.0.1", "fd00::1"]);
    let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host("DB.example.com"));
    kept.has(&["10.0.0.1:5432", "10.0.0.2:5432", "[fd00::1]:5432"]).await;
    kept.ends(LookupResult::Found).await;
    let calls = kept.calls.lock().unwrap().clone();
    assert_eq!(calls, ["10.0.0.1:5432", "10.0.0.2:5432", "[fd00::1]:5432", "first"]);
    assert_eq!(kept.pool.usable(), 3);
}

#[tokio::test]
async fn another_answer_makes_other_backends() {
    let (log, _guard) = Log::start();
    let names = Names::start().await;
    names.host(HOST, 3_600, &["10.0.0.1", "10.0.0.2"]);
    let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host(HOST));
    kept.has(&["10.0.0.1:5432", "10.0.0.2:5432"]).await;
    // `max_ttl` holds, not the hour of the records: nothing is kept anywhere.
    names.host(HOST, 3_600, &["10.0.0.2", "10.0.0.3"]);
    kept.has(&["10.0.0.2:5432", "10.0.0.3:5432"]).await;
    names.host(HOST, 0, &["10.0.0.2"]);
    kept.has(&["10.0.0.2:5432"]).await;
    assert_eq!(kept.calls.lock().unwrap()[2..], ["first", "10.0.0.3:5432"]);
    assert_eq!(log.lines("backend=\"10.0.0.1:5432\" state=\"gone\" why=\"not_resolved\"").len(), 1);
}

#[tokio::test]
async fn no_answer_and_an_empty_one_keep_the_last_good() {
    let (log, _guard) = Log::start();
    let faults = [
        (Reply::Code(ResponseCode::NXDomain), LookupResult::NoSuchName),
        (Reply::Code(ResponseCode::ServFail), LookupResult::ServerFailure),
        (Reply::Code(ResponseCode::Refused), LookupResult::Refused),
        (Reply::Records(Vec::new()), LookupResult::NoAddress),
        (Reply::Bytes(b"\x81\x80\x00".to_vec()), LookupResult::Malformed),
    ];
    let names = Names::start().await;
    let mut all = Vec::new();
    for (place, (_, lookup)) in faults.iter().enumerate() {
        let name = format!("{}.example.com.", lookup.as_str().replace('_', "-"));
        let address = format!("10.0.0.{place}");
        names.host(&name, 0, &[&address]);
        let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host(&name));
        kept.has(&[&format!("{address}:5432")]).await;
        all.push((name, kept));
    }
    for ((name, _), (reply, _)) in all.iter().zip(&faults) {
        for kind in [RecordType::A, RecordType::AAAA] {
            names.say(name, kind, reply.clone());
        }
    }
    for ((name, kept), (_, lookup)) in all.iter().zip(&faults) {
        eventually(name, async || (kept.count(*lookup) > 1).then_some(())).await;
        assert_eq!(kept.pool.usable(), 1, "{name}");
        let said = log.lines(&format!("name=\"{name}\" reason=\"{}\"", lookup.as_str()));
        assert_eq!(said.len(), 1, "{:?}", log.lines(name));
        assert!(said[0].contains("WARN") && said[0].contains("cannot resolve a name"), "{said:?}");
        names.host(name, 0, &["10.0.1.1"]);
    }
    for (name, kept) in &all {
        kept.has(&["10.0.1.1:5432"]).await;
        let said = log.lines(&format!("name resolved again pool=\"acme\" name=\"{name}\" addresses=1"));
        assert_eq!(said.len(), 1, "{said:?}");
    }
}

#[tokio::test]
async fn failed_first_lookup_is_reported() {
    let names = Names::start().await;
    let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host(HOST));
    let first = async || kept.calls.lock().unwrap().first().cloned();
    assert_eq!(eventually("first", first).await, "first");
    assert_eq!((kept.count(LookupResult::NoSuchName), kept.pool.usable()), (1, 0));
    names.host(HOST, 0, &["10.0.0.1"]);
    kept.has(&["10.0.0.1:5432"]).await;
}

#[tokio::test]
async fn failed_family_keeps_its_last_answer() {
    let names = Names::start().await;
    names.host(HOST, 0, &["10.0.0.1"]);
    names.say(HOST, RecordType::AAAA, Reply::Code(ResponseCode::ServFail));
    let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host(HOST));
    kept.has(&["10.0.0.1:5432"]).await;
    names.host(HOST, 0, &["10.0.0.1", "fd00::1"]);
    kept.has(&["10.0.0.1:5432", "[fd00::1]:5432"]).await;

    names.say(HOST, RecordType::AAAA, Reply::Code(ResponseCode::ServFail));
    let v4 = |ip: &str| Reply::Records(vec![address(HOST, 0, ip.parse().unwrap())]);
    names.say(HOST, RecordType::A, v4("10.0.0.2"));
    kept.has(&["10.0.0.2:5432", "[fd00::1]:5432"]).await;
    names.say(HOST, RecordType::AAAA, Reply::Records(Vec::new()));
    kept.has(&["10.0.0.2:5432"]).await;
    assert_eq!(kept.count(LookupResult::ServerFailure), 0);
}

#[tokio::test]
async fn service_records_have_priorities_and_weights() {
    let names = Names::start().await;
    names.service(
        SERVICE,
        60,
        &[(20, 9, 81, "c.example.com."), (10, 0, 82, "a.example.com."), (10, 30, 83, "b.example.com.")],
    );
    names.host("a.example.com.", 50, &["10.0.0.1"]);
    names.host("b.example.com.", 40, &["fd00::2"]);
    names.host("c.example.com.", 70, &["10.0.0.3"]);
    let answer = look_up(&names, &BackendTarget::Service(SERVICE.to_owned())).await.unwrap();
    assert_eq!(shown(&answer), ["10.0.0.1:82 1", "[fd00::2]:83 1000", "10.0.0.3:81 9 backup"]);
    assert_eq!(answer.ttl, Duration::from_secs(40));

    let kept = Kept::start(
        resolver(&[names.address()], Duration::from_secs(5)),
        BackendTarget::Service(SERVICE.trim_end_matches('.').to_owned()),
    );
    kept.has(&["10.0.0.1:82", "10.0.0.3:81", "[fd00::2]:83"]).await;
    // The backup is not used as long as another is.
    assert_eq!(kept.pool.usable(), 2);

    // One host that cannot be looked up is what it was; one that is not there any more is not.
    for kind in [RecordType::A, RecordType::AAAA] {
        names.say("a.example.com.", kind, Reply::Code(ResponseCode::ServFail));
        names.say("c.example.com.", kind, Reply::Code(ResponseCode::NXDomain));
    }
    kept.has(&["10.0.0.1:82", "[fd00::2]:83"]).await;

    names.service(SERVICE, 60, &[(0, 0, 0, ".")]);
    kept.ends(LookupResult::NoAddress).await;
    assert_eq!(kept.backends().len(), 2);
}

#[tokio::test]
async fn service_fails_if_all_its_hosts_fail() {
    let names = Names::start().await;
    let target = BackendTarget::Service(SERVICE.to_owned());
    names.service(SERVICE, 60, &[(1, 1, 80, "a.example.com."), (1, 1, 80, "b.example.com.")]);
    assert_eq!(look_up(&names, &target).await, Err(LookupResult::NoAddress));
    names.say("b.example.com.", RecordType::A, Reply::Code(ResponseCode::Refused));
    assert_eq!(look_up(&names, &target).await, Err(LookupResult::Refused));
    names.host("a.example.com.", 60, &["10.0.0.1"]);
    assert_eq!(shown(&look_up(&names, &target).await.unwrap()), ["10.0.0.1:80 1"]);
}

#[tokio::test]
async fn aliases_are_followed_by_server_or_resolver() {
    let names = Names::start().await;
    let whole = vec![alias(HOST, 9, "lb.example.com."), address("lb.example.com.", 30, [10, 0, 0, 1].into())];
    names.say(HOST, RecordType::A, Reply::Records(whole));
    names.say(HOST, RecordType::AAAA, Reply::Records(vec![alias(HOST, 8, "lb.example.com.")]));
    names.host("lb.example.com.", 20, &["fd00::1"]);
    let answer = look_up(&names, &host(HOST)).await.unwrap();
    assert_eq!(shown(&answer), ["10.0.0.1:5432", "[fd00::1]:5432"]);
    assert_eq!(answer.ttl, Duration::from_secs(8));

    names.say("_a._tcp.x.", RecordType::SRV, Reply::Records(vec![alias("_a._tcp.x.", 60, SERVICE)]));
    names.service(SERVICE, 60, &[(1, 1, 80, HOST)]);
    let answer = look_up(&names, &BackendTarget::Service("_a._tcp.x".to_owned())).await.unwrap();
    assert_eq!(answer.found.len(), 2);

    for kind in [RecordType::A, RecordType::AAAA] {
        names.say("a.", kind, Reply::Records(vec![alias("a.", 60, "b.")]));
        names.say("b.", kind, Reply::Records(vec![alias("b.", 60, "a.")]));
    }
    assert!(look_up(&names, &host("a.")).await.is_err());
}

#[tokio::test]
async fn lookup_of_a_silent_server_times_out() {
    let names = Names::start().await;
    for kind in [RecordType::A, RecordType::AAAA] {
        names.say(HOST, kind, Reply::Silence);
    }
    let limit = Duration::from_millis(300);
    let began = Began::now();
    let silent = resolver(&[names.address()], limit);
    assert_eq!(silent.look_up(&host(HOST), &mut LastAnswers::default()).await, Err(LookupResult::Timeout));
    began.lasted(limit);
}

#[tokio::test]
async fn silent_or_failing_name_server_is_skipped() {
    let (silent, good) = (Names::start().await, Names::start().await);
    good.host(HOST, 60, &["10.0.0.1"]);
    for reply in [Reply::Silence, Reply::Code(ResponseCode::ServFail), Reply::Code(ResponseCode::Refused)] {
        for kind in [RecordType::A, RecordType::AAAA] {
            silent.say(HOST, kind, reply.clone());
        }
        let resolver = resolver(&[silent.address(), good.address()], Duration::from_secs(4));
        for _ in 0..3 {
            let answer = resolver.look_up(&host(HOST), &mut LastAnswers::default()).await.unwrap();
            assert_eq!(shown(&answer), ["10.0.0.1:5432"], "{reply:?}");
        }
    }
}

#[tokio::test]
async fn more_addresses_than_are_used_are_cut_the_same_way_each_time() {
    let (log, _guard) = Log::start();
    let names = Names::start().await;
    let mut ips: Vec<_> = (0..200_u8).map(|n| IpAddr::from([10, 0, 0, n])).collect();
    let say = |ips: &[IpAddr]| {
        let records = ips.iter().map(|ip| address(HOST, 0, *ip)).collect();
        names.say(HOST, RecordType::A, Reply::Records(records));
    };
    // More than a datagram holds: it is asked again by TCP.
    say(&ips);
    let kept = Kept::start(resolver(&[names.address()], Duration::from_secs(5)), host(HOST));
    eventually("64 backends", async || (kept.backends().len() == 64).then_some(())).await;
    let before = kept.backends();
    assert!(before.contains(&"10.0.0.63:5432".to_owned()), "{before:?}");
    ips.reverse();
    say(&ips);
    kept.ends(LookupResult::Found).await;
    kept.ends(LookupResult::Found).await;
    assert_eq!(kept.backends(), before);
    assert_eq!(kept.calls.lock().unwrap().len(), 65);
    assert_eq!(log.lines("name has more addresses than the limit; the rest are ignored").len(), 1);
}

#[tokio::test]
async fn more_services_than_are_used_are_left_out() {
    let names = Names::start().await;
    let hosts: Vec<_> = (0..70_u8).map(|n| format!("h{n}.example.com.")).collect();
    let records: Vec<_> = (0..70).zip(&hosts).map(|(n, host)| (1, 100 + n, 80, host.as_str())).collect();
    names.service(SERVICE, 60, &records);
    for (n, host) in hosts.iter().enumerate() {
        names.host(host, 60, &[&format!("10.0.0.{n}")]);
    }
    let answer = look_up(&names, &BackendTarget::Service(SERVICE.to_owned())).await.unwrap();
    assert_eq!((answer.found.len(), answer.left_out), (64, 6));
    // The lightest are.
    assert_eq!(shown(&answer)[0], "10.0.0.6:80 106");
}

#[tokio::test]
async fn garbage_is_no_answer_and_does_no_harm() {
    let names = Names::start().await;
    let resolver = resolver(&[names.address()], Duration::from_millis(200));
    // Headers that promise what does not follow, names that point at themselves or beyond the end, and noise.
    let mut all: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"\x81".to_vec(),
        b"\x81\x80\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        b"\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01".to_vec(),
        b"\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\xc0\xff\x00\x01\x00\x01".to_vec(),
        b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(),
    ];
    let mut random = fastrand::Rng::with_seed(7);
    all.extend((0..20).map(|_| (0..random.usize(..600)).map(|_| random.u8(..)).collect()));
    for bytes in all {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::SRV] {
            names.say(HOST, kind, Reply::Bytes(bytes.clone()));
        }
        for target in [host(HOST), BackendTarget::Service(HOST.to_owned())] {
            let result = resolver.look_up(&target, &mut LastAnswers::default()).await;
            assert!(result.is_err_and(|lookup| !lookup.is_answer()), "{bytes:?}");
        }
    }
    names.host(HOST, 60, &["10.0.0.1"]);
    assert!(resolver.look_up(&host(HOST), &mut LastAnswers::default()).await.is_ok());
}
