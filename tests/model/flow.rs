//! The flow table against a list that is searched, and a simulation of consumers with one address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use vestibule::addr::{ClientAddr, PeerAddr};
use vestibule::flow::table::{DatagramAction, FlowClient, FlowId, FlowPath, FlowTable, StrayDatagram};
use vestibule::id::EndpointClaim;

use super::*;

const START: Moment = Moment::from_nanos(0);
const IDLE: Duration = Duration::from_secs(10);

/// A tick, and a tick for the part of it that has passed.
const LATE: Duration = Duration::from_millis(100);

/// A round of the table's wheel.
const ROUND: Duration = Duration::from_millis(4_096 * 50);

#[derive(Clone, Debug)]
enum Act {
    Hear(u8, Option<u8>),
    Answer(Index),
    Close(Index),
    Pass(u32),
    Expire(usize),
    Evict(Option<u32>, u32),
    SetIdle(u32),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..6_u8, prop::option::weighted(0.8, 0..4_u8)).prop_map(|(path, who)| Act::Hear(path, who)),
        4 => any::<Index>().prop_map(Act::Answer),
        2 => any::<Index>().prop_map(Act::Close),
        3 => prop_oneof![4 => 0..4_000_u32, 1 => 0..400_000_u32].prop_map(Act::Pass),
        3 => prop_oneof![Just(1), Just(1_000)].prop_map(Act::Expire),
        2 => (prop::option::of(0..3_u32), 0..12_000_u32).prop_map(|(tenant, idle)| Act::Evict(tenant, idle)),
        1 => (1..15_000_u32).prop_map(Act::SetIdle),
    ]
}

fn path(number: u8) -> FlowPath {
    // Sockets, addresses that were asked, and senders: each tells paths apart.
    let local = (!number.is_multiple_of(3)).then_some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, number % 3)));
    FlowPath { socket: u16::from(number / 3), local, peer: PeerAddr(([10, 0, 0, 1], 4_000).into()) }
}

fn who(number: u8) -> FlowClient {
    let endpoint = EndpointClaim::from_tlv(Some(format!("vpce-{:08x}", number / 2).as_bytes()));
    FlowClient {
        client: Some(ClientAddr(([10, 100, 0, 10], 5_000 + u16::from(number % 2)).into())),
        endpoint,
    }
}

fn ms(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// A flow as the naive list has it.
#[derive(Clone, Debug)]
struct Known {
    id: FlowId,
    path: FlowPath,
    who: FlowClient,
    tenant: u32,
    value: u64,
    last: Moment,
    /// Whether another flow of its path lived at the same time.
    is_shared: bool,
}

struct Naive {
    flows: Vec<Known>,
    idle: Duration,
    /// When that was last changed.
    changed: Moment,
}

impl Naive {
    fn hear(&self, path: FlowPath, who: Option<FlowClient>) -> DatagramAction {
        let of = |flow: &&Known| flow.path == path && who.is_none_or(|who| who == flow.who);
        let found: Vec<_> = self.flows.iter().filter(of).collect();
        match (found.as_slice(), who) {
            ([flow], None) if flow.is_shared => DatagramAction::Drop(StrayDatagram::Ambiguous),
            ([flow], _) => DatagramAction::ToBackend(flow.id),
            ([], Some(_)) => DatagramAction::Open,
            ([], None) => DatagramAction::Drop(StrayDatagram::NoHeader),
            (_, _) => DatagramAction::Drop(StrayDatagram::Ambiguous),
        }
    }

    fn take(&mut self, value: u64) -> Option<Known> {
        let place = self.flows.iter().position(|flow| flow.value == value)?;
        Some(self.flows.swap_remove(place))
    }

    /// Whom an eviction may take: of the few flows of a tenant's, or of the one that has most, those that were idle longest.
    fn check_evicted(
        &mut self,
        tenant: Option<u32>,
        idle: Duration,
        now: Moment,
        got: Option<u64>,
    ) -> Result<(), TestCaseError> {
        let count = |tenant: u32| self.flows.iter().filter(|flow| flow.tenant == tenant).count();
        let fullest = (0..3).max_by_key(|tenant| count(*tenant));
        let of = |flow: &&Known| tenant.or(fullest) == Some(flow.tenant);
        let longest = self.flows.iter().filter(of).map(|flow| now.since(flow.last)).max();
        // Some may have been idle equally long: any of them will do.
        let got = got.map(|value| self.take(value).unwrap());
        prop_assert_eq!(
            got.as_ref().map(|flow| now.since(flow.last)),
            longest.filter(|longest| *longest >= idle)
        );
        prop_assert!(got.is_none_or(|flow| tenant.or(fullest) == Some(flow.tenant)));
        Ok(())
    }
}

proptest! {
    #[test]
    fn flow_table_agrees_with_a_linear_search(acts in prop::collection::vec(act(), 1..200)) {
        let (mut table, mut naive) = (FlowTable::new(IDLE), Naive { flows: Vec::new(), idle: IDLE, changed: Moment::from_nanos(0) });
        let (mut now, mut next) = (Moment::from_nanos(0), 0_u64);
        for act in acts {
            match act {
                Act::Hear(from, speaker) => {
                    let (path, who) = (path(from), speaker.map(who));
                    let command = table.on_datagram(path, who, now);
                    prop_assert_eq!(command, naive.hear(path, who));
                    match (command, who) {
                        (DatagramAction::Open, Some(who)) => {
                            next += 1;
                            let tenant = u32::from(speaker.unwrap() % 3);
                            let id = table.open(path, who, tenant, next, now);
                            let mut others = naive.flows.iter_mut().filter(|flow| flow.path == path).peekable();
                            let is_shared = others.peek().is_some();
                            others.for_each(|flow| flow.is_shared = true);
                            naive.flows.push(Known { id, path, who, tenant, value: next, last: now, is_shared });
                        }
                        (DatagramAction::ToBackend(id), _) => {
                            naive.flows.iter_mut().filter(|flow| flow.id == id).for_each(|flow| flow.last = now);
                        }
                        _ => {}
                    }
                }
                Act::Answer(which) if !naive.flows.is_empty() => {
                    let at = which.index(naive.flows.len());
                    let flow = &mut naive.flows[at];
                    flow.last = now;
                    let mut value = flow.value;
                    prop_assert_eq!(table.answer(flow.id, now), Some((flow.path, flow.who, &mut value)));
                }
                Act::Close(which) if !naive.flows.is_empty() => {
                    let at = which.index(naive.flows.len());
                    let flow = naive.flows.swap_remove(at);
                    prop_assert_eq!(table.close(flow.id), Some((flow.path, flow.who, flow.value)));
                    prop_assert!(table.find(flow.id).is_none() && table.close(flow.id).is_none());
                }
                Act::Answer(_) | Act::Close(_) => {}
                Act::Pass(span) => now = now + ms(span),
                Act::Expire(most) => {
                    let mut gone = Vec::new();
                    table.expire(now, most, |_, _, value| gone.push(value));
                    prop_assert!(gone.len() <= most);
                    for value in gone {
                        let flow = naive.take(value).unwrap();
                        prop_assert!(now.since(flow.last) >= naive.idle);
                    }
                    if most == 1_000 && now.since(naive.changed) > LATE {
                        prop_assert!(naive.flows.iter().all(|flow| now.since(flow.last) < naive.idle + LATE));
                    }
                }
                Act::Evict(tenant, idle) => {
                    let got = table.evict(tenant, ms(idle), now).map(|(_, _, value)| value);
                    naive.check_evicted(tenant, ms(idle), now, got)?;
                }
                Act::SetIdle(idle) => {
                    naive.idle = ms(idle);
                    naive.changed = now;
                    table.set_idle(naive.idle);
                }
            }
            prop_assert_eq!(table.len(), naive.flows.len());
            for tenant in 0..3 {
                let count = naive.flows.iter().filter(|flow| flow.tenant == tenant).count();
                prop_assert_eq!(table.of_tenant(tenant), count);
            }
            // Nobody is due before the deadline.
            let first = naive.flows.iter().map(|flow| (flow.last + naive.idle).max(naive.changed)).min();
            prop_assert_eq!(table.deadline().is_some(), first.is_some());
            if let (Some(deadline), Some(first)) = (table.deadline(), first) {
                prop_assert!(deadline <= first.max(now) + LATE, "{:?} {:?}", deadline, first);
            }
        }
        let mut left: Vec<_> = table.drain().map(|(_, _, value)| value).collect();
        let mut expected: Vec<_> = naive.flows.iter().map(|flow| flow.value).collect();
        left.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(left, expected);
    }
}

/// A table of so many flows that began at the start.
fn filled(flows: u16) -> (FlowTable<u64>, Vec<FlowId>) {
    let mut table = FlowTable::new(IDLE);
    let path = |port| FlowPath { socket: 0, local: None, peer: PeerAddr(([10, 0, 0, 1], port).into()) };
    let ids = (0..flows).map(|port| table.open(path(port), who(0), 0, port.into(), START)).collect();
    (table, ids)
}

#[test]
fn shorter_idle_timeout_reaches_many_flows_in_turn() {
    let (mut table, ids) = filled(3_000);
    table.set_idle(IDLE * 2);
    assert!(table.deadline() > Some(START + IDLE / 2), "a longer one asks for nothing");
    table.set_idle(IDLE / 4);
    let (mut gone, mut calls, now) = (0, 0, START + IDLE / 2);
    while table.deadline().is_some_and(|deadline| deadline <= now) {
        table.expire(now, 1_000, |_, _, _| gone += 1);
        calls += 1;
    }
    assert_eq!((gone, calls, table.len()), (ids.len(), 3, 0));
}

#[test]
fn rescheduled_flows_cost_little() {
    let (mut table, ids) = filled(500);
    ids[..490].iter().for_each(|id| assert!(table.answer(*id, START + IDLE / 2).is_some()));
    let mut gone = 0;
    table.expire(START + IDLE + LATE, 32, |_, _, _| gone += 1);
    assert_eq!((gone, table.len()), (10, 490));
    table.expire(START + IDLE * 2, 32, |_, _, _| gone += 1);
    assert_eq!((gone, table.len()), (42, 458), "no more are closed than may");
}

/// A datagram on its way: to the proxy, from a consumer, or back from a backend.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Question { consumer: usize, has_header: bool },
    Answer(FlowId),
}

/// Consumers with one address behind one load balancer, over a network that loses, doubles and reorders, with a clock that
/// jumps. Every value tells whose flow it is.
fn simulate(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut table: FlowTable<usize> = FlowTable::new(IDLE);
    let (mut now, mut way, mut answered) = (Moment::from_nanos(1 << 50), Vec::new(), 0);
    // Four consumers share a sender; the fifth has one of its own, and sends its header once.
    let consumers: Vec<_> = (0..5_u8).map(|number| (path(number / 4), who(2 * (number % 4)))).collect();
    let mut ids: HashMap<FlowId, usize> = HashMap::new();
    for step in 0..20_000_u32 {
        let consumer = random.usize(..consumers.len());
        way.push(Sent::Question { consumer, has_header: consumer < 4 || random.u8(..8) == 0 });
        if random.u8(..4) == 0 && !way.is_empty() {
            way.push(way[random.usize(..way.len())]);
        }
        let sent = way.swap_remove(random.usize(..way.len()));
        if random.u8(..8) == 0 {
            continue;
        }
        match sent {
            Sent::Question { consumer, has_header } => {
                let (path, who) = consumers[consumer];
                let id = match table.on_datagram(path, has_header.then_some(who), now) {
                    DatagramAction::ToBackend(id) => id,
                    DatagramAction::Open => table.open(path, who, 0, consumer, now),
                    DatagramAction::Drop(StrayDatagram::NoHeader) => continue,
                    DatagramAction::Drop(StrayDatagram::Ambiguous) => {
                        unreachable!("each sender without headers has one flow")
                    }
                };
                assert_eq!(
                    table.find(id).map(|(_, _, value)| *value),
                    Some(consumer),
                    "seed {seed}, step {step}"
                );
                assert_eq!(*ids.entry(id).or_insert(consumer), consumer, "a name was given twice");
                way.push(Sent::Answer(id));
            }
            Sent::Answer(id) => {
                if let Some((path, who, value)) = table.answer(id, now) {
                    assert_eq!((path, who, *value), (consumers[ids[&id]].0, consumers[ids[&id]].1, ids[&id]));
                    answered += 1;
                }
            }
        }
        now = match random.u16(..1_000) {
            0 => now + Duration::from_secs(3_600),
            1 => Moment::from_nanos(now.as_nanos() - 3_600_000_000_000),
            _ => now + Duration::from_millis(random.u64(..40)),
        };
        // As the shell does: nobody is looked for before the deadline.
        if random.u8(..10) == 0 && table.deadline().is_some_and(|deadline| deadline <= now) {
            table.expire(now, random.usize(..4), |_, _, _| {});
        }
    }
    assert!(answered > 1_000);
    // One speaks, so that the table sees where the clock stands now. Whoever its jumps have put into the future is seen
    // there within a round of the wheel, and then has its time.
    let ((path, who), end) = (consumers[4], now + ROUND + IDLE + LATE);
    if table.on_datagram(path, Some(who), now) == DatagramAction::Open {
        table.open(path, who, 0, 4, now);
    }
    while let Some(deadline) = table.deadline() {
        now = now.max(deadline);
        assert!(now <= end, "seed {seed}: a flow stays");
        table.expire(now, 2, |_, _, _| {});
    }
    assert!(table.is_empty());
}

#[test]
fn no_answer_reaches_another_consumer_whatever_the_network_does() {
    (0..20).for_each(simulate);
}
