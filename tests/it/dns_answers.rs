//! DNS servers that do not understand EDNS or stand still, and answers that lead where no answer may.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use tokio::net::TcpListener;
use vestibule::account::dns_counters::LookupResult;
use vestibule::config::{BackendTarget, DnsConfig};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::resolve::Resolver;
use vestibule::resolve::answer::LastAnswers;

use super::dns::{Edns, Names, Reply, alias};
use super::harness::{ACME, Conf, end_of};

const HOST: &str = "db.example.com.";
const OTHER: &str = "other.example.com.";
const SERVICE: &str = "_http._tcp.app.example.com";

fn host(name: &str) -> BackendTarget {
    BackendTarget::Host { name: name.to_owned(), port: 80 }
}

fn service() -> BackendTarget {
    BackendTarget::Service(SERVICE.to_owned())
}

/// One that asks this server, with these networks in `allow-answers`, for a process that listens at these addresses.
fn resolver(names: &Names, timeout: Duration, allowed: &[&str], own: &[SocketAddr]) -> Arc<Resolver> {
    by_servers(vec![names.address()], timeout, allowed, own)
}

/// The same with a second server, on another machine: it is asked only where the first one fails.
fn strict(names: &Names) -> Arc<Resolver> {
    by_servers(vec![names.address(), "192.0.2.1:53".parse().unwrap()], LONG, &[], &[])
}

fn by_servers(
    servers: Vec<SocketAddr>,
    timeout: Duration,
    allowed: &[&str],
    own: &[SocketAddr],
) -> Arc<Resolver> {
    let config = DnsConfig {
        servers,
        timeout,
        min_ttl: Duration::from_secs(1),
        max_ttl: Duration::from_secs(1),
        allow_answers: allowed.iter().map(|network| network.parse().unwrap()).collect(),
    };
    let own = own.to_vec();
    Arc::new(Resolver::new(&config, Box::new(move || own.clone())).unwrap())
}

const LONG: Duration = Duration::from_secs(10);

/// The addresses found, or how the lookup ended; and the addresses refused.
async fn look_up(
    resolver: &Arc<Resolver>,
    target: &BackendTarget,
) -> (Result<Vec<String>, LookupResult>, Vec<String>) {
    let mut memory = LastAnswers::default();
    let answer = resolver.look_up(target, &mut memory).await;
    let found = answer.map(|answer| answer.found.iter().map(|one| one.address.to_string()).collect());
    (found, memory.refused.iter().map(ToString::to_string).collect())
}

fn addresses(all: &[&str]) -> Vec<String> {
    all.iter().map(|address| (*address).to_owned()).collect()
}

#[tokio::test]
async fn server_that_refuses_edns_is_asked_without_it_and_that_is_remembered() {
    for code in [ResponseCode::FormErr, ResponseCode::NotImp, ResponseCode::BADVERS] {
        let names = Names::start().await;
        names.host(HOST, 60, &["10.0.0.1"]);
        names.treat_edns(Edns::Refused(code));
        let resolver = resolver(&names, LONG, &[], &[]);
        assert_eq!(look_up(&resolver, &host(HOST)).await.0, Ok(addresses(&["10.0.0.1:80"])), "{code}");
        assert_eq!(names.asked(), [2, 2], "{code}: A and AAAA, with EDNS and without");
        assert_eq!(look_up(&resolver, &host(HOST)).await.0, Ok(addresses(&["10.0.0.1:80"])));
        assert_eq!(names.asked(), [2, 4], "{code}: it is known by now");
        if code == ResponseCode::BADVERS {
            // Said by EDNS alone.
            continue;
        }
        // The name itself is at fault, without EDNS too.
        for kind in [RecordType::A, RecordType::AAAA] {
            names.say(OTHER, kind, Reply::Code(code));
        }
        assert_eq!(look_up(&resolver, &host(OTHER)).await.0, Err(LookupResult::ServerFailure));
    }
}

#[tokio::test]
async fn server_that_cannot_read_a_question_with_edns_is_asked_without_it() {
    let names = Names::start().await;
    names.host(HOST, 60, &["10.0.0.1"]);
    names.treat_edns(Edns::Misread);
    let resolver = resolver(&names, Duration::from_secs(4), &[], &[]);
    assert_eq!(look_up(&resolver, &host(HOST)).await.0, Ok(addresses(&["10.0.0.1:80"])));
    let [with, without] = names.asked();
    assert_eq!(look_up(&resolver, &host(HOST)).await.0, Ok(addresses(&["10.0.0.1:80"])));
    assert_eq!(names.asked(), [with, without + 2], "it is known by now");
}

#[tokio::test]
async fn server_that_understands_edns_is_asked_with_it_alone() {
    let names = Names::start().await;
    names.host(HOST, 60, &["10.0.0.1", "fd00::1"]);
    let resolver = resolver(&names, LONG, &[], &[]);
    for round in 1..=3 {
        assert_eq!(look_up(&resolver, &host(HOST)).await.0, Ok(addresses(&["10.0.0.1:80", "[fd00::1]:80"])));
        assert_eq!(names.asked(), [2 * round, 0]);
    }
}

#[tokio::test]
async fn truncated_answer_that_stalls_over_tcp_does_not_delay_other_names() {
    let names = Names::start().await;
    for kind in [RecordType::A, RecordType::AAAA] {
        names.say(HOST, kind, Reply::Stalled);
    }
    let many: Vec<_> = (0..200).map(|number| format!("10.0.0.{number}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    names.host(OTHER, 60, &many);
    names.host("small.example.com.", 60, &["10.0.1.1"]);
    let resolver = resolver(&names, Duration::from_secs(3), &[], &[]);
    let stalled = {
        let resolver = Arc::clone(&resolver);
        tokio::spawn(async move { look_up(&resolver, &host(HOST)).await })
    };
    // Its question stands at the head of its connection before and while the others are asked.
    while !stalled.is_finished() {
        assert_eq!(look_up(&resolver, &host("small.example.com.")).await.0, Ok(addresses(&["10.0.1.1:80"])));
        assert_eq!(look_up(&resolver, &host(OTHER)).await.0.unwrap().len(), 64, "by TCP");
    }
    assert_eq!(stalled.await.unwrap().0, Err(LookupResult::Timeout));
}

#[tokio::test]
async fn special_addresses_in_answers_are_refused_and_the_others_are_used() {
    let names = Names::start().await;
    let strict = strict(&names);
    let lenient = resolver(&names, LONG, &["127.0.0.0/8", "fe80::/10"], &[]);
    for special in ["127.0.0.1", "169.254.169.254", "::1", "fe80::1", "fd00:ec2::254", "0.0.0.0", "224.0.0.1"]
    {
        names.host(HOST, 60, &[special]);
        assert_eq!(
            look_up(&strict, &host(HOST)).await,
            (Err(LookupResult::AddressRefused), addresses(&[special]))
        );
        names.host(HOST, 60, &[special, "10.0.0.1", "fd00::1"]);
        let found = addresses(&["10.0.0.1:80", "[fd00::1]:80"]);
        assert_eq!(look_up(&strict, &host(HOST)).await, (Ok(found), addresses(&[special])));
    }
    names.host(HOST, 60, &["127.0.0.1", "169.254.169.254", "fe80::1", "fd00:ec2::254"]);
    let found = addresses(&["127.0.0.1:80", "[fe80::1]:80"]);
    let refused = addresses(&["169.254.169.254", "fd00:ec2::254"]);
    assert_eq!(look_up(&lenient, &host(HOST)).await, (Ok(found), refused));
}

#[tokio::test]
async fn local_server_may_answer_loopback_for_a_configured_port_but_not_for_a_service_or_an_own_address() {
    let names = Names::start().await;
    let local = resolver(&names, LONG, &[], &["127.0.0.1:9900".parse().unwrap()]);
    names.host(HOST, 60, &["127.0.0.1", "169.254.169.254"]);
    names.service(SERVICE, 60, &[(0, 0, 80, HOST)]);
    let found = addresses(&["127.0.0.1:80"]);
    assert_eq!(look_up(&local, &host(HOST)).await, (Ok(found), addresses(&["169.254.169.254"])));
    let refused = addresses(&["127.0.0.1", "169.254.169.254"]);
    assert_eq!(look_up(&local, &service()).await, (Err(LookupResult::AddressRefused), refused));
    let own = BackendTarget::Host { name: HOST.to_owned(), port: 9900 };
    let refused = addresses(&["127.0.0.1", "169.254.169.254"]);
    assert_eq!(look_up(&local, &own).await, (Err(LookupResult::AddressRefused), refused));
}

#[tokio::test]
async fn service_and_alias_cannot_lead_to_localhost_and_a_configured_localhost_can() {
    let names = Names::start().await;
    let strict = strict(&names);
    names.service(SERVICE, 60, &[(0, 0, 9900, "app.localhost."), (0, 0, 80, HOST)]);
    names.host(HOST, 60, &["10.0.0.1"]);
    let refused = addresses(&["127.0.0.1", "::1"]);
    assert_eq!(look_up(&strict, &service()).await, (Ok(addresses(&["10.0.0.1:80"])), refused.clone()));
    names.service(SERVICE, 60, &[(0, 0, 9900, "app.localhost.")]);
    assert_eq!(look_up(&strict, &service()).await, (Err(LookupResult::AddressRefused), refused));
    names.host("app.localhost.", 60, &["127.0.0.1"]);
    for kind in [RecordType::A, RecordType::AAAA] {
        names.say(OTHER, kind, Reply::Records(vec![alias(OTHER, 60, "app.localhost.")]));
    }
    assert_eq!(
        look_up(&strict, &host(OTHER)).await,
        (Err(LookupResult::AddressRefused), addresses(&["127.0.0.1"]))
    );
    let found = addresses(&["127.0.0.1:80", "[::1]:80"]);
    assert_eq!(look_up(&strict, &host("app.localhost")).await, (Ok(found), Vec::new()));
}

#[tokio::test]
async fn own_addresses_in_answers_are_refused_though_their_network_is_allowed() {
    let names = Names::start().await;
    let own = ["127.0.0.1:9900".parse().unwrap(), "0.0.0.0:8080".parse().unwrap()];
    let lenient = resolver(&names, LONG, &["127.0.0.0/8"], &own);
    names.host(HOST, 60, &["127.0.0.1"]);
    names.service(SERVICE, 60, &[(0, 0, 9900, HOST), (0, 0, 8080, HOST), (0, 0, 9901, HOST)]);
    let found = addresses(&["127.0.0.1:9901"]);
    assert_eq!(look_up(&lenient, &service()).await, (Ok(found), addresses(&["127.0.0.1"])));
    names.service(SERVICE, 60, &[(0, 0, 9900, HOST), (0, 0, 8080, HOST)]);
    assert_eq!(
        look_up(&lenient, &service()).await,
        (Err(LookupResult::AddressRefused), addresses(&["127.0.0.1"]))
    );
}

#[tokio::test]
async fn answer_that_names_this_machine_leads_no_session_there() {
    let names = Names::start().await;
    let victim = TcpListener::bind("127.0.0.1:0").await.unwrap();
    names.service(SERVICE, 60, &[(0, 0, victim.local_addr().unwrap().port(), HOST)]);
    names.host(HOST, 60, &["127.0.0.1"]);
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let more = format!(
        "[[pool]]\nname = \"named\"\nbackends = [\"{SERVICE}\"]\n[pool.health]\nkind = \"none\"\n\
         [dns]\nservers = [\"{}\"]\nmin-ttl = \"1s\"\nmax-ttl = \"1s\"",
        names.address()
    );
    let conf = Conf { acme: vec![acme.address()], more, ..Conf::default() };
    let mut proxy = conf.start().await;
    proxy.reload("pool = \"acme\"", "pool = \"named\"").unwrap();
    let labels = [("pool", "named"), ("result", "address_refused")];
    proxy.metric("vestibule_name_lookups_total", &labels).is_at_least(1).await;
    proxy.metric("vestibule_name_lookups_total", &[("pool", "named"), ("result", "found")]).is(0).await;
    let mut client = proxy.open(ACME, b"GET /config HTTP/1.1\r\n\r\n").await;
    end_of(&mut client).await.unwrap_err();
    proxy.ended(&[("tenant", "acme"), ("why", "no_backend")]).is(1).await;
    assert!(tokio::time::timeout(Duration::ZERO, victim.accept()).await.is_err(), "no connection was made");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
