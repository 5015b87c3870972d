//! What a tenant gets of the local ports to a backend, and when a port is free again.

use std::time::Duration;

use super::*;

const TENANT: u32 = 1;

/// Of 100 ports, by the rule of the share.
const ALONE: usize = 78;

fn backend(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// So many ports, from 1,000 on.
fn ports(count: u16, reuse: TimeWaitReuse) -> LocalPorts {
    LocalPorts::new(LocalPortRange::new(1_000, 1_000 + count - 1, |_| false), reuse)
}

fn at(ports: &LocalPorts, seconds: u64) {
    ports.advance(Moment::from_nanos(0) + Duration::from_secs(seconds));
}

fn space(ports: &LocalPorts) -> Arc<PortSpace> {
    ports.space(None, backend("10.0.0.1:80"))
}

/// All that a tenant gets.
fn take_all(space: &Arc<PortSpace>, tenant: u32) -> Vec<LocalPort> {
    std::iter::from_fn(|| space.take(tenant)).collect()
}

fn finish(mut port: LocalPort) {
    port.will_wait();
}

#[test]
fn range_leaves_out_reserved_ports_and_uses_every_second_one_first() {
    let range = LocalPortRange::new(10, 17, |port| port == 12 || port == 13);
    assert_eq!(*range.0, [10, 14, 16, 11, 15, 17]);
    assert!(range.spans(10) && range.spans(17) && !range.spans(9) && !range.spans(18) && !range.is_empty());
    assert_eq!((LocalPortRange::new(0, 1, |_| false).len(), LocalPortRange::default().len()), (1, 28_232));
    assert_eq!(LocalPortRange::new(65_534, 65_535, |_| false).len(), 2);
    assert!(LocalPortRange::new(9, 8, |_| false).is_empty());
}

#[test]
fn one_tenant_alone_gets_four_fifths_and_no_port_twice() {
    let ports = ports(100, TimeWaitReuse::Never);
    let mut held = take_all(&space(&ports), TENANT);
    assert_eq!(held.len(), ALONE);
    let mut numbers: Vec<_> = held.iter().filter_map(LocalPort::number).collect();
    assert!(numbers.iter().take(50).all(|number| number % 2 == 0), "{numbers:?}");
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), ALONE);
    // A port that is given back at once is the only one that is left for this tenant.
    drop(held.pop());
    assert!(space(&ports).take(TENANT).is_some());
}

#[test]
fn ports_are_per_backend_and_source_address() {
    let ports = ports(100, TimeWaitReuse::Never);
    let _held = take_all(&space(&ports), TENANT);
    let source = Some("10.0.0.9".parse().unwrap());
    for (source, address) in [(None, "10.0.0.2:80"), (None, "10.0.0.1:81"), (source, "10.0.0.1:80")] {
        assert_eq!(take_all(&ports.space(source, backend(address)), TENANT).len(), ALONE);
    }
}

#[test]
fn port_in_time_wait_counts_for_its_tenant_until_it_is_over() {
    for (reuse, address, seconds) in [
        (TimeWaitReuse::Never, "10.0.0.1:80", 66),
        (TimeWaitReuse::Loopback, "10.0.0.1:80", 66),
        (TimeWaitReuse::Never, "127.0.0.1:80", 66),
        (TimeWaitReuse::Loopback, "127.0.0.1:80", 2),
        (TimeWaitReuse::Loopback, "[::1]:80", 2),
        (TimeWaitReuse::Always, "10.0.0.1:80", 2),
    ] {
        let ports = ports(100, reuse);
        let space = ports.space(None, backend(address));
        at(&ports, 100);
        take_all(&space, TENANT).into_iter().for_each(finish);
        assert!(space.take(TENANT).is_none(), "{reuse:?} {address}");
        assert_eq!((space.usage().live, space.usage().waiting), (0, ALONE));
        at(&ports, 100 + seconds - 1);
        assert!(space.take(TENANT).is_none(), "{reuse:?} {address}");
        at(&ports, 100 + seconds);
        assert_eq!(take_all(&space, TENANT).len(), ALONE, "{reuse:?} {address}");
    }
}

#[test]
fn port_that_is_free_for_longest_comes_first_and_a_fresh_one_before_it() {
    let ports = ports(4, TimeWaitReuse::Never);
    let space = space(&ports);
    let number = || space.take(TENANT).and_then(|port| port.number()).unwrap();
    let first_four = [number(), number(), number(), number()];
    let mut sorted = first_four;
    sorted.sort_unstable();
    assert_eq!(sorted, [1_000, 1_001, 1_002, 1_003]);
    assert_eq!([number(), number(), number(), number()], first_four);
}

#[test]
fn port_equal_to_that_of_the_backend_is_never_chosen() {
    let ports = ports(100, TimeWaitReuse::Never);
    let held = take_all(&ports.space(None, backend("127.0.0.1:1050")), TENANT);
    assert!(held.len() >= ALONE - 1 && held.iter().all(|port| port.number() != Some(1_050)));
}

#[test]
fn refused_port_is_not_tried_again_for_a_minute() {
    let ports = ports(4, TimeWaitReuse::Always);
    let space = space(&ports);
    let refused = space.take(TENANT).unwrap();
    let number = refused.number();
    refused.refused();
    assert_eq!((space.usage().live, space.usage().waiting), (0, 1));
    for second in [0, 65] {
        at(&ports, second);
        assert!((0..10).all(|_| space.take(TENANT).unwrap().number() != number));
    }
    at(&ports, 66);
    assert!((0..4).any(|_| space.take(TENANT).unwrap().number() == number));
    assert_eq!(space.usage().waiting, 0);
}

#[test]
fn kernel_that_chooses_is_asked_for_less_than_half_and_not_again_at_once_after_a_failure() {
    let ports = ports(100, TimeWaitReuse::Never);
    ports.leave_choice_to_kernel();
    let space = space(&ports);
    assert_eq!((ports.limit(), space.usage().limit), (37, 37));
    let held = take_all(&space, TENANT);
    assert!((25..37).contains(&held.len()) && held.iter().all(|port| port.number().is_none()));
    drop(held);
    space.take(TENANT).unwrap().refused();
    assert!(space.take(TENANT).is_none());
    at(&ports, 1);
    assert!(space.take(TENANT).is_some());
}

#[test]
fn connection_of_another_process_is_counted_and_its_port_is_not_given_out_afterwards() {
    let ports = ports(100, TimeWaitReuse::Never);
    let space = space(&ports);
    let adopted = space.adopt(TENANT);
    assert_eq!((adopted.number(), space.usage().live), (None, 1));
    finish(adopted);
    assert_eq!((space.usage().live, space.usage().waiting), (0, 1));
    at(&ports, 66);
    assert_eq!((space.usage().waiting, lock(&space.state).resting.len()), (0, 0));
}

#[test]
fn tenants_with_few_ports_get_one_whatever_the_greedy_hold() {
    let ports = ports(10_000, TimeWaitReuse::Never);
    let space = space(&ports);
    let greedy: Vec<_> = (0..20).map(|tenant| take_all(&space, tenant)).collect();
    assert!(greedy.iter().all(|held| !held.is_empty()));
    assert!(space.take(50).is_some() && space.take(PROBES).is_some());
}

#[test]
fn nothing_is_kept_for_a_backend_that_is_idle() {
    let ports = ports(100, TimeWaitReuse::Never);
    take_all(&space(&ports), TENANT).into_iter().for_each(finish);
    let known = || ports.usage().len();
    let sweep = |second| (0..SHARDS).for_each(|_| at(&ports, second));
    sweep(65);
    assert_eq!(known(), 1, "it still waits");
    sweep(67);
    sweep(68);
    assert_eq!(known(), 0);
    drop(space(&ports).take(TENANT));
    sweep(69);
    assert_eq!(known(), 1, "its port rests");
    let held = space(&ports).take(TENANT);
    sweep(200);
    assert_eq!(known(), 1, "it is in use");
    drop(held);
    sweep(300);
    assert_eq!(known(), 0);
}

#[test]
fn memory_of_a_burst_is_given_back() {
    let ports = ports(60_000, TimeWaitReuse::Never);
    let space = space(&ports);
    let held = take_all(&space, TENANT);
    let busy = space.take(2);
    drop(held);
    assert!(lock(&space.state).resting.capacity() > 10_000);
    at(&ports, 100);
    lock(&space.state).resting.truncate(10);
    assert!(!space.is_vacant() && lock(&space.state).resting.capacity() < 100);
    drop(busy);
}

fn udp(ports: &LocalPorts) -> Arc<PortSpace> {
    ports.space(None, EVERY_BACKEND)
}

#[test]
fn udp_ports_are_the_whole_range_of_each_source_address_but_a_few() {
    let ports = LocalPorts::udp(LocalPortRange::new(1_000, 1_099, |_| false));
    assert_eq!((ports.limit(), udp(&ports).usage().limit), (98, 98));
    let held = take_all(&udp(&ports), TENANT);
    assert!((70..80).contains(&held.len()), "{}", held.len());
    assert!(held.iter().all(|port| port.number().is_none() && port.tenant() == TENANT));
    assert!(!udp(&ports).holds_little(TENANT) && udp(&ports).holds_little(2));
    assert!(udp(&ports).take(2).is_some(), "another tenant gets one");
    let source = ports.space(Some("10.0.0.9".parse().unwrap()), EVERY_BACKEND);
    assert_eq!(take_all(&source, TENANT).len(), held.len());
    drop(held);
    assert_eq!((udp(&ports).usage().live, udp(&ports).usage().waiting), (0, 0));
}

#[test]
fn flow_that_moves_gets_a_port_beyond_its_share_of_the_same_source_address_alone() {
    let ports = LocalPorts::udp(LocalPortRange::new(1_000, 1_099, |_| false));
    let (space, other) = (udp(&ports), ports.space(Some("10.0.0.9".parse().unwrap()), EVERY_BACKEND));
    let mut held = take_all(&space, TENANT);
    let full = take_all(&other, TENANT);
    let old = held.pop().unwrap();
    held.push(space.take(TENANT).unwrap_or_else(|| space.adopt(TENANT)));
    assert!(space.take(TENANT).is_none() && other.exchange(&old).is_none());
    let moved = space.exchange(&old).unwrap();
    assert!(moved.is_of(&space) && !moved.is_of(&other) && moved.tenant() == TENANT);
    drop(old);
    assert_eq!(space.usage().live, held.len() + 1);
    drop((held, full, moved));
    assert_eq!(space.usage().live + other.usage().live, 0);
}

#[test]
fn kernel_that_finds_no_udp_port_is_asked_again_once_one_is_given_back() {
    let ports = LocalPorts::udp(LocalPortRange::new(1_000, 1_099, |_| false));
    let held = udp(&ports).take(TENANT).unwrap();
    udp(&ports).take(2).unwrap().refused();
    assert!(udp(&ports).take(2).is_none() && udp(&ports).exchange(&held).is_none());
    udp(&ports).search_again();
    udp(&ports).take(2).unwrap().refused();
    assert!(udp(&ports).take(2).is_none());
    at(&ports, 1);
    assert!(udp(&ports).take(2).is_some());
}
