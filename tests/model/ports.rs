//! Local ports against a list of what each is used for, in the order of what happened.

use std::net::{IpAddr, SocketAddr};

use vestibule::admission::ports::{
    EVERY_BACKEND, LocalPort, LocalPortRange, LocalPorts, PortSpace, TimeWaitReuse,
};

use super::*;

/// The ports from 1,000 on: few enough for one call to settle them all.
const COUNT: usize = 40;

/// Time is counted in tenths of a second.
const TICK_MS: u64 = 100;
const TIME_WAIT: u64 = 660;
const REUSE_WAIT: u64 = 12;

#[derive(Clone, Debug)]
enum Act {
    Take(u32, usize),
    /// Takes one, and the kernel refuses it.
    Refuse(u32, usize),
    Adopt(u32, usize),
    Exchange(Index, usize),
    /// Gives one back; whether it is in TIME_WAIT then.
    Close(Index, bool),
    SearchAgain(usize),
    Pass(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let (tenant, place) = (prop_oneof![3 => Just(0_u32), 2 => 1..5_u32], 0..3_usize);
    prop_oneof![
        20 => (tenant.clone(), place.clone()).prop_map(|(tenant, place)| Act::Take(tenant, place)),
        1 => (tenant.clone(), place.clone()).prop_map(|(tenant, place)| Act::Refuse(tenant, place)),
        1 => (tenant, place.clone()).prop_map(|(tenant, place)| Act::Adopt(tenant, place)),
        2 => (any::<Index>(), place.clone()).prop_map(|(which, place)| Act::Exchange(which, place)),
        6 => (any::<Index>(), any::<bool>()).prop_map(|(which, waits)| Act::Close(which, waits)),
        1 => place.prop_map(Act::SearchAgain),
        3 => prop_oneof![3 => 0..3_000_u64, 1 => 0..90_000_u64].prop_map(Act::Pass),
    ]
}

/// What a port is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Live,
    Waiting(u64),
    Refused(u64),
}

#[derive(Clone, Copy, Debug)]
struct Known {
    place: usize,
    tenant: u32,
    number: Option<u16>,
    is: Use,
}

struct Naive {
    limit: usize,
    waits: [u64; 3],
    known: Vec<Known>,
    tick: u64,
    /// For UDP: until when the kernel is not asked.
    barred: [u64; 3],
}

impl Naive {
    fn settle(&mut self) {
        let (tick, waits) = (self.tick, self.waits);
        self.known.retain(|port| match port.is {
            Use::Live => true,
            Use::Waiting(since) => tick < since + waits[port.place],
            Use::Refused(since) => tick < since + TIME_WAIT,
        });
    }

    fn used(&self, place: usize) -> Vec<Known> {
        self.known.iter().filter(|port| port.place == place).copied().collect()
    }

    fn held(&self, place: usize, tenant: u32) -> usize {
        let is_its = |port: &&Known| port.tenant == tenant && !matches!(port.is, Use::Refused(_));
        self.used(place).iter().filter(is_its).count()
    }

    /// The rule of the share, for one more.
    fn allows(&self, place: usize, tenant: u32) -> bool {
        let (held, used) = (self.held(place, tenant), self.used(place).len());
        if used >= self.limit {
            return false;
        }
        let free = self.limit - used - 1;
        let others = (0..5).filter(|other| *other != tenant && self.held(place, *other) > 0).count();
        let (reserve, last) = (self.limit.div_ceil(8), self.limit.div_ceil(16));
        held == 0
            || (free >= reserve && held < self.limit / (others + 2))
            || held < 9 * free.saturating_sub(reserve)
            || (free >= last && held < free)
    }

    fn add(&mut self, place: usize, port: &LocalPort, is: Use) {
        self.known.push(Known { place, tenant: port.tenant(), number: port.number(), is });
    }

    fn refused(&mut self, place: usize, port: LocalPort, is_udp: bool) {
        if is_udp {
            self.barred[place] = self.tick + 1;
        } else {
            self.add(place, &port, Use::Refused(self.tick));
        }
        port.refused();
    }

    fn counts(&self, place: usize) -> (usize, usize) {
        let used = self.used(place);
        let live = used.iter().filter(|port| port.is == Use::Live).count();
        (live, used.len() - live)
    }
}

/// Ports, and where they are in the naive list: a port that is live is there as long.
struct Held {
    place: usize,
    port: LocalPort,
}

fn forget(naive: &mut Naive, place: usize, port: &LocalPort) {
    let is_it = |known: &Known| {
        known.is == Use::Live
            && (known.place, known.tenant, known.number) == (place, port.tenant(), port.number())
    };
    let at = naive.known.iter().position(is_it).unwrap();
    naive.known.swap_remove(at);
}

/// Takes a port where the rule says so, and one that nothing else uses.
fn take(
    naive: &Naive,
    space: &Arc<PortSpace>,
    (tenant, place): (u32, usize),
    is_udp: bool,
) -> Result<Option<LocalPort>, TestCaseError> {
    let port = space.take(tenant);
    let is_asked = !is_udp || naive.tick >= naive.barred[place];
    prop_assert_eq!(port.is_some(), is_asked && naive.allows(place, tenant));
    // However much others hold, a tenant without a port gets one as long as one is free.
    let is_free = naive.used(place).len() < naive.limit;
    prop_assert!(port.is_some() || !is_asked || !is_free || naive.held(place, tenant) > 0);
    if let Some(number) = port.as_ref().and_then(LocalPort::number) {
        prop_assert!((1_000..1_000 + COUNT).contains(&usize::from(number)));
        prop_assert!(naive.used(place).iter().all(|known| known.number != Some(number)), "{}", number);
    }
    Ok(port)
}

/// Does it all, to the account and to the list.
fn run(
    ports: &LocalPorts,
    spaces: impl Fn(usize) -> Arc<PortSpace>,
    mut naive: Naive,
    is_udp: bool,
    acts: Vec<Act>,
) -> Result<(), TestCaseError> {
    let (mut held, mut now) = (Vec::<Held>::new(), Moment::from_nanos(0));
    for act in acts {
        match act {
            Act::Take(tenant, place) | Act::Refuse(tenant, place) => {
                let port = take(&naive, &spaces(place), (tenant, place), is_udp)?;
                match (port, matches!(act, Act::Refuse(..))) {
                    (Some(port), false) => {
                        naive.add(place, &port, Use::Live);
                        held.push(Held { place, port });
                    }
                    (Some(port), true) => naive.refused(place, port, is_udp),
                    (None, _) => {}
                }
            }
            Act::Adopt(tenant, place) => {
                let port = spaces(place).adopt(tenant);
                naive.add(place, &port, Use::Live);
                held.push(Held { place, port });
            }
            Act::Exchange(which, place) if is_udp && !held.is_empty() => {
                let at = which.index(held.len());
                let own = &held[at];
                let port = spaces(place).exchange(&own.port);
                let is_asked = naive.tick >= naive.barred[place];
                let may = place == own.place || naive.allows(place, own.port.tenant());
                prop_assert_eq!(port.is_some(), is_asked && may);
                if let Some(port) = port {
                    naive.add(place, &port, Use::Live);
                    let old = std::mem::replace(&mut held[at], Held { place, port });
                    forget(&mut naive, old.place, &old.port);
                }
            }
            Act::Close(which, waits) if !held.is_empty() => {
                let Held { place, mut port } = held.swap_remove(which.index(held.len()));
                forget(&mut naive, place, &port);
                if waits && !is_udp {
                    port.will_wait();
                    naive.add(place, &port, Use::Waiting(naive.tick));
                }
            }
            Act::SearchAgain(place) if is_udp => {
                spaces(place).search_again();
                naive.barred[place] = 0;
            }
            Act::Exchange(..) | Act::Close(..) | Act::SearchAgain(_) => {}
            Act::Pass(ms) => {
                now = now + Duration::from_millis(ms);
                ports.advance(now);
                naive.tick = now.as_nanos() / (TICK_MS * 1_000_000);
                naive.settle();
            }
        }
        for place in 0..3 {
            let usage = spaces(place).usage();
            prop_assert_eq!((usage.live, usage.waiting), naive.counts(place), "{}", place);
            prop_assert_eq!(usage.limit, naive.limit);
        }
    }
    drop(held);
    // What rests and what waits is over, and then each shard has its turn.
    for _ in 0..32 {
        now = now + Duration::from_secs(61);
        ports.advance(now);
    }
    prop_assert_eq!(ports.usage(), vec![]);
    Ok(())
}

fn range() -> LocalPortRange {
    LocalPortRange::new(1_000, 999 + u16::try_from(COUNT).unwrap(), |_| false)
}

fn naive(limit: usize, waits: [u64; 3]) -> Naive {
    Naive { limit, waits, known: Vec::new(), tick: 0, barred: [0; 3] }
}

proptest! {
    #[test]
    fn tcp_ports_are_counted_by_backend_and_tenant_through_time_wait(acts in prop::collection::vec(act(), 1..300)) {
        let ports = LocalPorts::new(range(), TimeWaitReuse::Loopback);
        let source = "10.0.0.9".parse::<IpAddr>().unwrap();
        let pairs: [(_, SocketAddr); 3] = [
            (None, "10.0.0.1:80".parse().unwrap()),
            (Some(source), "10.0.0.1:80".parse().unwrap()),
            (None, "127.0.0.1:80".parse().unwrap()),
        ];
        let space = |place: usize| ports.space(pairs[place].0, pairs[place].1);
        run(&ports, space, naive(COUNT, [TIME_WAIT, TIME_WAIT, REUSE_WAIT]), false, acts)?;
    }

    #[test]
    fn udp_ports_are_counted_by_source_address_and_tenant(acts in prop::collection::vec(act(), 1..300)) {
        let ports = LocalPorts::udp(range());
        let sources = [None, Some("10.0.0.9".parse::<IpAddr>().unwrap()), Some("fd00::9".parse().unwrap())];
        let space = |place: usize| ports.space(sources[place], EVERY_BACKEND);
        run(&ports, space, naive(COUNT - 1, [0; 3]), true, acts)?;
    }
}
