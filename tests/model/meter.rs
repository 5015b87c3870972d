//! Random lives of sessions against plain sums: every one ends in exactly one outcome, and all gauges go back to zero.

use std::rc::Rc;

use vestibule::account::session_metrics::{ConnectResult, CounterShard, SessionMetrics, WorkerMetrics};
use vestibule::account::{Direction, Label, PerDirection};
use vestibule::outcome::{EndedAt, EndedBy, Outcome};

use super::*;

#[derive(Clone, Copy, Debug)]
enum Act {
    Accept(usize),
    /// The tenant and perhaps the pool.
    Assign(Index, usize, Option<usize>),
    Tried(Index, usize, ConnectResult),
    Forwarded(Index, Direction, u32, bool),
    End(Index, Outcome),
    Drop(Index),
}

fn act() -> impl Strategy<Value = Act> {
    let which = any::<Index>;
    let direction = prop::sample::select(Direction::ALL.to_vec());
    prop_oneof![
        4 => (0..2_usize).prop_map(Act::Accept),
        3 => (which(), 0..3_usize, prop::option::of(0..2_usize)).prop_map(|(which, tenant, pool)| Act::Assign(which, tenant, pool)),
        4 => (which(), 0..3_usize, prop::sample::select(ConnectResult::ALL.to_vec()))
            .prop_map(|(which, backend, result)| Act::Tried(which, backend, result)),
        4 => (which(), direction, any::<u32>(), any::<bool>())
            .prop_map(|(which, direction, bytes, spliced)| Act::Forwarded(which, direction, bytes, spliced)),
        1 => (which(), prop::sample::select(Outcome::ALL.to_vec())).prop_map(|(which, outcome)| Act::End(which, outcome)),
        1 => which().prop_map(Act::Drop),
    ]
}

/// Listener, tenant and pool, by name.
type Route = [String; 3];

struct Life {
    meter: SessionMetrics,
    route: Route,
    backend: Option<(String, String)>,
    at: EndedAt,
    bytes: PerDirection<u64>,
}

/// What ought to have been counted.
#[derive(Debug, Default, PartialEq)]
struct Sums {
    accepted: u64,
    active: BTreeMap<Route, u64>,
    bytes: BTreeMap<(Route, &'static str), u64>,
    ended: BTreeMap<(Route, String), u64>,
    connects: BTreeMap<(String, String, &'static str), u64>,
    backend_active: BTreeMap<(String, String), u64>,
    backend_bytes: BTreeMap<(String, String, &'static str), u64>,
    /// By the way through the process and the direction.
    ways: BTreeMap<(bool, &'static str), u64>,
    identified: u64,
    timed: u64,
}

/// Zeros are left out of both sides.
fn sum<K: Ord>(pairs: impl IntoIterator<Item = (K, u64)>) -> BTreeMap<K, u64> {
    let mut sums = BTreeMap::new();
    for (key, amount) in pairs.into_iter().filter(|(_, amount)| *amount > 0) {
        *sums.entry(key).or_default() += amount;
    }
    sums
}

fn counted(shard: &CounterShard) -> Sums {
    let (routes, backends, listeners) = (shard.routes(), shard.backends(), shard.listeners());
    let route = |cells: &vestibule::account::session_metrics::RouteCounters| {
        [&cells.listener, &cells.tenant, &cells.pool].map(|label| label.name().to_owned())
    };
    let backend = |cells: &vestibule::account::session_metrics::BackendCounters| {
        (cells.pool.name().to_owned(), cells.backend.name().to_owned())
    };
    let both = |values: PerDirection<u64>| Direction::ALL.map(|way| (way.as_str(), *values.of(way)));
    let worker = &shard.worker;
    Sums {
        accepted: listeners.iter().map(|cells| cells.accepted.value()).sum(),
        active: sum(routes.iter().map(|cells| (route(cells), cells.active.value()))),
        bytes: sum(routes
            .iter()
            .flat_map(|cells| both(cells.bytes.values()).map(|(way, bytes)| ((route(cells), way), bytes)))),
        ended: sum(routes.iter().flat_map(|cells| {
            cells
                .ended()
                .map(|(outcome, count)| ((route(cells), outcome.to_string()), count))
                .collect::<Vec<_>>()
        })),
        connects: sum(backends.iter().flat_map(|cells| {
            let (pool, name) = backend(cells);
            let count = move |(result, count): (ConnectResult, u64)| {
                ((pool.clone(), name.clone(), result.as_str()), count)
            };
            cells.connects().map(count).collect::<Vec<_>>()
        })),
        backend_active: sum(backends.iter().map(|cells| (backend(cells), cells.active.value()))),
        backend_bytes: sum(backends.iter().flat_map(|cells| {
            let (pool, name) = backend(cells);
            both(cells.bytes.values()).map(|(way, bytes)| ((pool.clone(), name.clone(), way), bytes))
        })),
        ways: sum([(true, worker.spliced.values()), (false, worker.copied.values())]
            .into_iter()
            .flat_map(|(spliced, values)| both(values).map(|(way, bytes)| ((spliced, way), bytes)))),
        identified: worker.identified.value(),
        timed: listeners.iter().map(|cells| cells.duration.times().count()).sum(),
    }
}

impl Sums {
    fn begin(&mut self, route: &Route) {
        *self.active.entry(route.clone()).or_default() += 1;
    }

    fn leave(&mut self, route: &Route) {
        *self.active.entry(route.clone()).or_default() -= 1;
    }

    fn end(&mut self, session: &Life, outcome: Outcome) {
        self.leave(&session.route);
        *self.ended.entry((session.route.clone(), outcome.to_string())).or_default() += 1;
        if let Some(backend) = &session.backend {
            *self.backend_active.entry(backend.clone()).or_default() -= 1;
        }
    }

    fn forwarded(&mut self, session: &mut Life, direction: Direction, bytes: u64, spliced: bool) {
        if bytes == 0 {
            return;
        }
        let way = direction.as_str();
        *session.bytes.of_mut(direction) += bytes;
        *self.bytes.entry((session.route.clone(), way)).or_default() += bytes;
        *self.ways.entry((spliced, way)).or_default() += bytes;
        if let Some((pool, backend)) = session.backend.clone() {
            *self.backend_bytes.entry((pool, backend, way)).or_default() += bytes;
        }
    }
}

struct World {
    shard: Arc<CounterShard>,
    ledger: Rc<WorkerMetrics>,
    labels: Labels,
    lives: Vec<Life>,
    sums: Sums,
}

impl World {
    fn label(&self, what: &str, number: usize) -> Label {
        self.labels.intern(&format!("{what}-{number}"))
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Accept(listener) => {
                let listener = self.label("listener", listener);
                let meter = SessionMetrics::new(Rc::clone(&self.ledger), &listener);
                let route = [listener.name().to_owned(), String::new(), String::new()];
                self.sums.accepted += 1;
                self.sums.begin(&route);
                let bytes = PerDirection::default();
                self.lives.push(Life { meter, route, backend: None, at: EndedAt::Header, bytes });
            }
            _ if self.lives.is_empty() => {}
            Act::Assign(which, tenant, pool) => {
                let (tenant, pool) =
                    (self.label("tenant", tenant), pool.map(|pool| self.label("pool", pool)));
                let session = self.session(which);
                session.meter.assign_tenant(&tenant, pool.as_ref());
                let pool = pool.map(|pool| pool.name().to_owned()).unwrap_or_default();
                let route = [session.route[0].clone(), tenant.name().to_owned(), pool];
                let before = std::mem::replace(&mut session.route, route.clone());
                self.sums.leave(&before);
                self.sums.begin(&route);
                self.sums.identified += 1;
            }
            Act::Tried(which, backend, result) => {
                let backend = self.label("backend", backend);
                let session = self.session(which);
                // Nobody tries another backend with one connected.
                if session.backend.is_some() {
                    return;
                }
                session.meter.count_connect(&backend, result);
                let key = (session.route[2].clone(), backend.name().to_owned());
                session.at = EndedAt::Connect;
                if result == ConnectResult::Done {
                    session.at = EndedAt::Forward;
                    session.backend = Some(key.clone());
                    *self.sums.backend_active.entry(key.clone()).or_default() += 1;
                }
                *self.sums.connects.entry((key.0, key.1, result.as_str())).or_default() += 1;
            }
            Act::Forwarded(which, direction, bytes, spliced) => {
                let place = which.index(self.lives.len());
                let session = &mut self.lives[place];
                session.meter.count_bytes(direction, bytes.into(), spliced);
                self.sums.forwarded(session, direction, bytes.into(), spliced);
            }
            Act::End(which, outcome) => {
                let session = self.take(which);
                self.sums.end(&session, outcome);
                self.sums.timed += u64::from(outcome.is_logged());
                session.meter.end(outcome, Duration::from_millis(1));
            }
            Act::Drop(which) => {
                let session = self.take(which);
                self.sums.end(&session, Outcome::new(EndedBy::Proxy, session.at, Reason::Drained));
            }
        }
    }

    fn session(&mut self, which: Index) -> &mut Life {
        let place = which.index(self.lives.len());
        &mut self.lives[place]
    }

    fn take(&mut self, which: Index) -> Life {
        self.lives.swap_remove(which.index(self.lives.len()))
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        self.sums.active.retain(|_, count| *count > 0);
        self.sums.backend_active.retain(|_, count| *count > 0);
        prop_assert_eq!(&counted(&self.shard), &self.sums);
        for session in &self.lives {
            prop_assert_eq!(session.meter.bytes(), session.bytes);
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn every_session_is_counted_once_and_nothing_is_left(acts in prop::collection::vec(act(), 0..60)) {
        let (shard, labels) = (Arc::new(CounterShard::default()), Labels::default());
        let ledger = WorkerMetrics::new(Arc::clone(&shard), labels.intern(""));
        let mut world = World { shard, ledger, labels, lives: Vec::new(), sums: Sums::default() };
        for act in acts {
            world.act(act);
            world.check()?;
        }
        while let Some(session) = world.lives.pop() {
            world.sums.end(&session, Outcome::new(EndedBy::Proxy, session.at, Reason::Drained));
        }
        world.check()?;
        let sums = counted(&world.shard);
        prop_assert!(sums.active.is_empty() && sums.backend_active.is_empty());
        prop_assert_eq!(sums.ended.values().sum::<u64>(), sums.accepted);
    }
}
