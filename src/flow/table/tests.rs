//! The table by itself.

use super::*;

fn path(port: u16) -> FlowPath {
    FlowPath { socket: 0, local: None, peer: PeerAddr(([10, 0, 0, 1], port).into()) }
}

fn who(number: u8) -> FlowClient {
    let endpoint = EndpointClaim::from_tlv(Some(format!("vpce-{number:08x}").as_bytes()));
    FlowClient { client: Some(ClientAddr(([10, 100, 0, 10], 40_000).into())), endpoint }
}

fn at(seconds: u64) -> Moment {
    Moment::from_nanos(seconds * 1_000_000_000)
}

fn expired(table: &mut FlowTable<u32>, now: Moment) -> Vec<u32> {
    let mut all = Vec::new();
    table.expire(now, 1_000, |_, _, flow| all.push(flow));
    all
}

fn table(flows: u16) -> (FlowTable<u32>, Vec<FlowId>) {
    let mut table = FlowTable::new(Duration::from_secs(120));
    let open = |number| table.open(path(number), who(1), 7, u32::from(number), at(0));
    let ids = (0..flows).map(open).collect();
    (table, ids)
}

#[test]
fn one_address_behind_two_endpoints_is_two_flows() {
    let (mut table, _) = table(0);
    assert_eq!(table.on_datagram(path(1), Some(who(1)), at(0)), DatagramAction::Open);
    let one = table.open(path(1), who(1), 1, 1, at(0));
    assert_eq!(table.on_datagram(path(1), None, at(0)), DatagramAction::ToBackend(one));
    assert_eq!(table.on_datagram(path(1), Some(who(2)), at(0)), DatagramAction::Open);
    let two = table.open(path(1), who(2), 2, 2, at(0));
    assert_eq!(table.on_datagram(path(1), Some(who(1)), at(0)), DatagramAction::ToBackend(one));
    assert_eq!(table.on_datagram(path(1), Some(who(2)), at(0)), DatagramAction::ToBackend(two));
    assert_eq!(table.on_datagram(path(1), None, at(0)), DatagramAction::Drop(StrayDatagram::Ambiguous));
    assert_eq!(table.on_datagram(path(2), None, at(0)), DatagramAction::Drop(StrayDatagram::NoHeader));
    assert_eq!(table.close(one), Some((path(1), who(1), 1)));
    assert_eq!(
        table.on_datagram(path(1), None, at(0)),
        DatagramAction::Drop(StrayDatagram::Ambiguous),
        "it may be of the first"
    );
    assert!(table.shares_path(two));
    assert_eq!((table.close(one), table.answer(one, at(0))), (None, None));
    assert_eq!(table.answer(two, at(0)), Some((path(1), who(2), &mut 2)));
    table.close(two).unwrap();
    let one = table.open(path(1), who(1), 1, 1, at(0));
    assert_eq!(
        table.on_datagram(path(1), None, at(0)),
        DatagramAction::ToBackend(one),
        "nothing is left of the others"
    );
    table.set_shares_path(one);
    assert_eq!(table.on_datagram(path(1), None, at(0)), DatagramAction::Drop(StrayDatagram::Ambiguous));
}

#[test]
fn flow_id_is_not_reused() {
    let (mut table, ids) = table(1);
    table.close(ids[0]).unwrap();
    let next = table.open(path(9), who(1), 7, 9, at(0));
    assert_ne!(next, ids[0]);
    assert_eq!((table.find(ids[0]), FlowId::from_u64(next.to_u64())), (None, next));
}

#[test]
fn active_flow_is_rescheduled_and_idle_ones_expire() {
    let (mut table, ids) = table(3);
    assert!(table.deadline().unwrap() > at(119));
    table.answer(ids[1], at(100)).unwrap();
    assert!(expired(&mut table, at(119)).is_empty());
    let mut gone = expired(&mut table, at(121));
    gone.sort_unstable();
    assert_eq!((gone, table.len()), (vec![0, 2], 1));
    assert!((at(219)..at(221)).contains(&table.deadline().unwrap()));
    assert_eq!(expired(&mut table, at(221)), [1]);
    assert_eq!((table.deadline(), table.of_tenant(7)), (None, 0));
}

#[test]
fn no_more_flows_expire_at_once_than_allowed() {
    let (mut table, _) = table(100);
    let mut gone = 0;
    table.expire(at(200), 30, |_, _, _| gone += 1);
    assert_eq!((gone, table.len()), (30, 70));
    assert!(table.deadline().unwrap() <= at(200), "there is more to do");
    assert_eq!(expired(&mut table, at(200)).len(), 70);
}

#[test]
fn clock_going_back_does_not_keep_flows_forever() {
    let (mut table, ids) = table(2);
    table.answer(ids[0], at(1_000_000)).unwrap();
    assert_eq!(expired(&mut table, at(1_000_000)), [1]);
    assert!(expired(&mut table, at(10)).is_empty());
    assert!(expired(&mut table, at(300)).is_empty(), "since it was seen to be in the future");
    assert_eq!(expired(&mut table, at(500)), [0]);
}

#[test]
fn deadline_goes_back_with_the_clock() {
    let hear: fn(&mut FlowTable<u32>, FlowId) = |table, id| {
        assert_eq!(table.on_datagram(path(0), Some(who(1)), at(10)), DatagramAction::ToBackend(id));
    };
    let answer: fn(&mut FlowTable<u32>, FlowId) = |table, id| assert!(table.answer(id, at(10)).is_some());
    let open: fn(&mut FlowTable<u32>, FlowId) = |table, _| {
        table.open(path(1), who(1), 7, 1, at(10));
    };
    let open_the_only_one: fn(&mut FlowTable<u32>, FlowId) = |table, id| {
        table.close(id).unwrap();
        table.open(path(1), who(1), 7, 1, at(10));
    };
    for act in [hear, answer, open, open_the_only_one] {
        let mut table = FlowTable::new(Duration::from_secs(120));
        let id = table.open(path(0), who(1), 7, 0, at(1_000_000));
        act(&mut table, id);
        // A round of the wheel, and the time that it then has.
        let (mut now, mut looks) = (at(10), 0);
        while let Some(deadline) = table.deadline() {
            now = now.max(deadline);
            table.expire(now, 1_000, |_, _, _| {});
            looks += 1;
        }
        assert!(now < at(10 + 205 + 120 + 1) && looks < 10, "{now:?} after {looks}");
    }
}

#[test]
fn tenant_with_most_flows_is_known() {
    let (mut table, ids) = table(10);
    let mut port = 10;
    let mut open = |table: &mut FlowTable<u32>, tenant| {
        port += 1;
        table.open(path(port), who(1), tenant, tenant, at(0));
    };
    (0..9).for_each(|_| open(&mut table, 8));
    (100..200).for_each(|tenant| open(&mut table, tenant));
    for id in &ids[1..] {
        table.close(*id).unwrap();
    }
    let mut evict = || table.evict(None, Duration::from_secs(1), at(100)).map(|(_, _, flow)| flow);
    for _ in 0..8 {
        assert_eq!(evict(), Some(8), "of whom there are more than one");
    }
    // Each has one now, and each of them can still be found.
    assert_eq!((evict(), (0..101).filter_map(|_| evict()).count()), (Some(199), 101));
    assert!(table.is_empty());
}

#[test]
fn eviction_looks_past_recently_active_flows() {
    let (mut table, ids) = table(100);
    for id in &ids[..99] {
        table.answer(*id, at(99)).unwrap();
    }
    let mut evict = || table.evict(Some(7), Duration::from_secs(30), at(100)).map(|(_, _, flow)| flow);
    assert_eq!([(); 4].map(|()| evict()), [None, None, None, Some(99)]);
}

#[test]
fn shorter_idle_timeout_applies_to_existing_flows() {
    let (mut table, ids) = table(2);
    table.set_idle(Duration::from_secs(5));
    assert_eq!(table.idle(), Duration::from_secs(5));
    table.answer(ids[0], at(3)).unwrap();
    assert_eq!(expired(&mut table, at(6)), [1]);
    assert_eq!(expired(&mut table, at(9)), [0]);
}

#[test]
fn longest_idle_flow_is_evicted_and_no_active_one() {
    let (mut table, ids) = table(5);
    for (id, second) in ids.iter().zip([30, 10, 40, 20, 50]) {
        table.answer(*id, at(second)).unwrap();
    }
    let other = table.open(path(99), who(3), 8, 99, at(1));
    let idle = Duration::from_secs(35);
    let evict =
        |table: &mut FlowTable<u32>, tenant| table.evict(tenant, idle, at(60)).map(|(_, _, flow)| flow);
    assert_eq!((evict(&mut table, Some(7)), evict(&mut table, None)), (Some(1), Some(3)));
    assert_eq!((evict(&mut table, Some(7)), evict(&mut table, Some(9))), (None, None));
    assert_eq!(table.close(other).map(|(_, _, flow)| flow), Some(99));
    assert_eq!((table.of_tenant(7), table.of_tenant(8), table.len()), (3, 0, 3));
    assert_eq!(table.drain().count(), 3);
    assert!(table.is_empty() && evict(&mut table, None).is_none());
}

#[test]
fn silent_flow_is_evicted_only_if_its_port_is_needed() {
    let (mut table, _) = table(2);
    let mut evict = |wanted: u32, second| {
        let is_it = |flow: &u32| *flow == wanted;
        table.evict_if(Some(7), Duration::from_secs(5), at(second), is_it).map(|(_, _, flow)| flow)
    };
    assert_eq!((evict(0, 4), evict(9, 6)), (None, None));
    assert!(evict(0, 6) == Some(0) || evict(0, 6) == Some(0));
    assert_eq!(evict(1, 6), Some(1));
}
