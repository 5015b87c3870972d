//! What answers mean, record by record.

use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, SRV};
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn record(owner: &str, ttl: u32, rdata: RData) -> Record {
    Record::from_rdata(name(owner), ttl, rdata)
}

fn address(owner: &str, ttl: u32, text: &str) -> Record {
    let rdata = match text.parse().unwrap() {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    record(owner, ttl, rdata)
}

fn alias(owner: &str, ttl: u32, target: &str) -> Record {
    record(owner, ttl, RData::CNAME(CNAME(name(target))))
}

fn srv(ttl: u32, priority: u16, weight: u16, host: &str, port: u16) -> Record {
    record("_s._tcp.x.", ttl, RData::SRV(SRV::new(priority, weight, port, name(host))))
}

fn said(ips: &[&str], ttl: u32) -> DnsAnswer<IpAddr> {
    DnsAnswer { found: ips.iter().map(|ip| ip.parse().unwrap()).collect(), ttl }
}

/// The services of so many records, on hosts that each have an address of their own: 10.0.0.1 for `h1.`, and so on.
fn resolved(records: &[Record], hosts: &[(&str, &[&str])]) -> Vec<(String, Option<u32>, bool)> {
    let services = services(&name("_s._tcp.x."), records);
    let hosts = hosts.iter().map(|(host, ips)| (name(host), said(ips, 60))).collect();
    let answer = of_service(&services, &hosts).unwrap();
    answer.found.iter().map(|r| (r.address.to_string(), r.weight, r.is_backup)).collect()
}

const HOSTS: [(&str, &[&str]); 3] = [("h1.", &["10.0.0.1"]), ("h2.", &["10.0.0.2"]), ("h3.", &["10.0.0.3"])];

fn weights(all: &[(u16, u16)]) -> Vec<Option<u32>> {
    let records: Vec<_> = (1..)
        .zip(all)
        .map(|(n, (priority, weight))| srv(9, *priority, *weight, &format!("h{n}."), 80))
        .collect();
    resolved(&records, &HOSTS).into_iter().map(|(_, weight, _)| weight).collect()
}

#[test]
fn aliases_are_followed_and_the_shortest_life_counts() {
    let records = [alias("b.", 20, "C."), alias("A.", 30, "b."), address("c.", 40, "10.0.0.1")];
    let (end, ttl) = follow(&name("a."), &records);
    assert_eq!((end.clone(), ttl), (name("c."), 20));
    assert_eq!(addresses(&end, &records), said(&["10.0.0.1"], 40));
    // Records of others are not ours.
    assert!(addresses(&name("a."), &records).found.is_empty());
}

#[test]
fn alias_loop_ends() {
    let records = [alias("a.", 20, "b."), alias("b.", 20, "a.")];
    let (end, _) = follow(&name("a."), &records);
    assert!(addresses(&end, &records).found.is_empty());
}

#[test]
fn each_address_is_listed_once_with_the_shortest_ttl() {
    let texts = ["10.0.0.2", "fd00::1"];
    let mut records: Vec<_> = texts.iter().map(|text| address("a.", 7, text)).collect();
    records.push(address("a.", 3, "10.0.0.2"));
    assert_eq!(addresses(&name("a."), &records), said(&["10.0.0.2", "fd00::1"], 3));
    assert_eq!(addresses(&name("a."), &[address("a.", 1 << 31, "10.0.0.2")]).ttl, 0);
}

#[test]
fn lowest_priority_is_used_and_all_others_are_backups() {
    let records = [srv(9, 20, 1, "h1.", 81), srv(9, 10, 7, "H2.", 82), srv(9, 30, 1, "h3.", 83)];
    let expected = [("10.0.0.2:82", 7, false), ("10.0.0.1:81", 1, true), ("10.0.0.3:83", 1, true)];
    let expected = expected.map(|(address, weight, backup)| (address.to_owned(), Some(weight), backup));
    assert_eq!(resolved(&records, &HOSTS), expected);
    // Where the preferred have no address, the next are no backups.
    assert_eq!(resolved(&records, &HOSTS[..1]), [("10.0.0.1:81".to_owned(), Some(1), false)]);
}

#[test]
fn address_that_is_also_primary_is_not_a_backup() {
    let records = [srv(9, 20, 900, "h1.", 80), srv(9, 10, 7, "h1.", 80)];
    assert_eq!(resolved(&records, &HOSTS), [("10.0.0.1:80".to_owned(), Some(7), false)]);
}

#[test]
fn unavailable_service_has_no_address() {
    let records = [srv(9, 1, 1, ".", 80), srv(9, 1, 1, "h1.", 0)];
    assert!(services(&name("_s._tcp.x."), &records).found.is_empty());
    let none = DnsAnswer { found: Vec::new(), ttl: 1 };
    assert_eq!(of_service(&none, &BTreeMap::new()), None);
    assert_eq!(of_host(said(&[], 1), 80), None);
}

#[test]
fn weights_that_fit_stay_and_others_are_scaled() {
    assert_eq!(weights(&[(1, 1), (1, 2), (1, 1_000)]), [Some(1), Some(2), Some(1_000)]);
    assert_eq!(weights(&[(1, 65_535), (1, 32_768), (1, 1)]), [Some(1_000), Some(500), Some(1)]);
    // One that is 0 among others is picked seldom, not never.
    assert_eq!(weights(&[(1, 0), (1, 5), (1, 10)]), [Some(1), Some(500), Some(1_000)]);
    // All that are 0 are equal.
    assert_eq!(weights(&[(1, 0), (1, 0), (2, 9)]), [None, None, Some(9)]);
    // Backups are measured among themselves.
    assert_eq!(weights(&[(1, 1), (1, 2), (2, 60_000)]), [Some(1), Some(2), Some(1_000)]);
}

#[test]
fn weight_applies_to_all_addresses_of_its_host() {
    let records = [srv(9, 1, 10, "two.", 80), srv(9, 1, 10, "one.", 80)];
    let hosts: [(&str, &[&str]); 2] = [("two.", &["10.0.0.1", "10.0.0.2"]), ("one.", &["10.0.0.3"])];
    let found: Vec<_> =
        resolved(&records, &hosts).into_iter().map(|(_, weight, _)| weight.unwrap()).collect();
    assert_eq!(found, [5, 5, 10]);
}

#[test]
fn shortest_ttl_of_services_and_hosts_counts() {
    let services = services(&name("_s._tcp.x."), &[srv(30, 1, 1, "h1.", 80), srv(25, 1, 1, "h2.", 80)]);
    let hosts = |ttl| BTreeMap::from([(name("h1."), said(&["10.0.0.1"], ttl))]);
    assert_eq!(of_service(&services, &hosts(60)).unwrap().ttl, Duration::from_secs(25));
    assert_eq!(of_service(&services, &hosts(7)).unwrap().ttl, Duration::from_secs(7));
}

#[test]
fn failed_query_keeps_the_last_answer() {
    let (mut memory, host) = (LastAnswers::default(), name("a."));
    let (v4, v6) = (said(&["10.0.0.1"], 9), said(&["fd00::1"], 5));
    let known = memory.settle(&host, [Ok(v4.clone()), Ok(v6)]);
    assert_eq!((known.addresses, known.lookup), (said(&["10.0.0.1", "fd00::1"], 5), LookupResult::Found));

    let known = memory.settle(&host, [Ok(v4.clone()), Err(LookupResult::Timeout)]);
    assert_eq!((known.addresses, known.lookup), (said(&["10.0.0.1", "fd00::1"], 9), LookupResult::Found));

    let known = memory.settle(&host, [Err(LookupResult::ServerFailure), Err(LookupResult::Timeout)]);
    assert_eq!((known.addresses.found.len(), known.lookup), (2, LookupResult::Timeout));

    // That there is none is an answer.
    let known = memory.settle(&host, [Ok(v4), Err(LookupResult::NoAddress)]);
    assert_eq!((known.addresses.found.len(), known.lookup), (1, LookupResult::Found));
    let known = memory.settle(&host, [Err(LookupResult::NoSuchName), Err(LookupResult::NoAddress)]);
    assert_eq!((known.addresses.found.len(), known.lookup), (0, LookupResult::NoAddress));

    memory.settle(&host, [Ok(said(&["10.0.0.1"], 9)), Err(LookupResult::NoAddress)]);
    memory.keep(&BTreeSet::new());
    let known = memory.settle(&host, [Err(LookupResult::Timeout), Err(LookupResult::NoAddress)]);
    assert_eq!((known.addresses.found.len(), known.lookup), (0, LookupResult::Timeout));
}

proptest! {
    #[test]
    fn order_of_records_does_not_matter(
        all in prop::collection::vec((0_u16..3, any::<u16>(), 0_u8..90, 1_u16..4), 1..150), seed: u64,
    ) {
        let records: Vec<_> = all
            .iter()
            .map(|(priority, weight, host, port)| srv(9, *priority, *weight, &format!("h{host}."), *port))
            .collect();
        let mut others = records.clone();
        fastrand::Rng::with_seed(seed).shuffle(&mut others);
        let hosts: BTreeMap<_, _> = (0_u8..90)
            .map(|n| (name(&format!("h{n}.")), said(&[&format!("10.0.0.{}", n + 1), &format!("fd00::{n}1")], 60)))
            .collect();
        let of = |records: &[Record]| of_service(&services(&name("_s._tcp.x."), records), &hosts).unwrap();
        let answer = of(&records);
        prop_assert_eq!(&answer, &of(&others));
        prop_assert!(answer.found.len() <= MOST_ADDRESSES as usize);
        prop_assert!(answer.found.iter().all(|r| r.weight.is_none_or(|w| (1..=1_000).contains(&w))));
        prop_assert!(answer.found.iter().any(|r| !r.is_backup));
        let unique: BTreeSet<_> = answer.found.iter().map(|r| r.address).collect();
        prop_assert_eq!(unique.len(), answer.found.len());
        // Primaries are not left out for backups.
        prop_assert!(answer.found.is_sorted_by_key(|r| r.is_backup));
    }

    #[test]
    fn scaled_weights_keep_their_order(all in prop::collection::vec((Just(1_u16), any::<u16>()), 3)) {
        let found = weights(&all);
        for (one, (_, first)) in all.iter().enumerate() {
            for (two, (_, second)) in all.iter().enumerate() {
                prop_assert!(first < second || found[one] >= found[two]);
            }
        }
    }

    #[test]
    fn larger_answers_are_cut_the_same_way_each_time(count in 1_u16..200, seed: u64) {
        let mut ips: Vec<IpAddr> = (0..count)
            .map(|n| {
                let [high, low] = n.to_be_bytes();
                IpAddr::from([10, 0, high, low])
            })
            .collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut ips);
        let answer = of_host(DnsAnswer { found: ips, ttl: 5 }, 80).unwrap();
        let most = usize::from(count).min(MOST_ADDRESSES as usize);
        prop_assert_eq!((answer.found.len(), answer.left_out), (most, usize::from(count) - most));
        prop_assert!(answer.found.is_sorted_by_key(|r| r.address));
        prop_assert_eq!(answer.found[0].address.ip(), IpAddr::from([10, 0, 0, 0]));
    }
}
