//! The whole pool under random operations against a naive model: who may be picked, who is, and what is counted.

use std::collections::VecDeque;

use vestibule::clock::Moment;
use vestibule::config::{Balance, EjectionConfig};
use vestibule::pool::health::HealthState;
use vestibule::pool::queue::QueuePlace;
use vestibule::pool::{PickError, PickedBackend, Pool, SessionFailure, TriedBackends};

use super::naive::Model;
use super::pool::{at, config, given, place, probe, verdict};
use super::*;

#[derive(Clone, Debug)]
enum Act {
    /// A session with these attempts, each with its roll; the last one's backend is kept.
    Session(u64, Vec<u64>),
    End(Index),
    Probe(Index, bool),
    /// A session could not connect, so many times.
    NotConnected(Index, u32),
    /// A tenant's sessions were reset, so many.
    Reset(Index, u32, u32),
    Connected(Index),
    Answered(Index),
    Arrived(u32),
    Wait,
    Leave(Index),
}

/// An operation, and how many milliseconds pass after it; 0 is none, and the pool is not tended.
fn act() -> impl Strategy<Value = (Act, u64)> {
    let which = any::<Index>;
    let act = prop_oneof![
        8 => (any::<u64>(), prop::collection::vec(any::<u64>(), 1..5)).prop_map(|(key, rolls)| Act::Session(key, rolls)),
        4 => which().prop_map(Act::End),
        5 => (which(), prop::bool::weighted(0.6)).prop_map(|(which, success)| Act::Probe(which, success)),
        3 => (which(), 1..5_u32).prop_map(|(which, times)| Act::NotConnected(which, times)),
        2 => (which(), 0..2_u32, 1..5_u32).prop_map(|(which, tenant, times)| Act::Reset(which, tenant, times)),
        1 => which().prop_map(Act::Connected),
        1 => which().prop_map(Act::Answered),
        1 => (0..2_u32).prop_map(Act::Arrived),
        3 => Just(Act::Wait),
        1 => which().prop_map(Act::Leave),
    ];
    let passes =
        prop_oneof![3 => Just(0_u64), 5 => 100..400_u64, 2 => 400..6_000_u64, 1 => 6_000..90_000_u64];
    (act, passes)
}

/// A pool's configuration, apart from its algorithm.
fn rules() -> impl Strategy<Value = config::PoolConfig> {
    let weight = prop_oneof![1 => Just(0_u32), 4 => Just(100), 2 => 1..=1_000_u32];
    let zone = prop::sample::select(vec![None, Some("a".to_owned()), Some("b".to_owned())]);
    let backend = (weight, prop::bool::weighted(0.2), prop::option::weighted(0.4, 1..9_u32), zone);
    let some = |is_some: bool, zone: &str| is_some.then(|| zone.to_owned());
    (
        prop::collection::vec(backend, 1..7),
        (any::<bool>(), prop::sample::select(vec![0_u32, 50]), prop::sample::select(vec![0_u64, 10])),
        (0..4_u32, 1..40_u64, prop::sample::select(vec![0_u32, 10, 50, 100])),
        (0..4_usize, prop::option::weighted(0.8, (1..3_u32, 1..3_u32))),
    )
        .prop_map(
            move |(backends, (is_zoned, panic_threshold, slow_start), ejection, (length, health))| {
                let weights: Vec<_> = backends.iter().map(|(weight, ..)| *weight).collect();
                let mut config = config(Balance::P2c, &weights);
                for (backend, (_, backup, most, zone)) in config.backends.iter_mut().zip(backends) {
                    (backend.backup, backend.max_sessions, backend.zone) = (backup, most, zone);
                }
                config.prefer_zone = some(is_zoned, "a");
                config.panic_threshold = panic_threshold;
                config.slow_start = Duration::from_secs(slow_start);
                config.queue.length = length;
                config.health = health.map(|(rise, fall)| probe(rise, fall));
                let (consecutive_failures, base, max_percent) = ejection;
                config.ejection = EjectionConfig {
                    consecutive_failures,
                    base_time: Duration::from_secs(base),
                    max_percent,
                };
                config
            },
        )
}

/// The pool, the model of it, and what both hold.
struct Run {
    pool: Pool,
    model: Model,
    held: Vec<PickedBackend>,
    line: VecDeque<QueuePlace>,
    /// Who may be picked for a first attempt, as of when the pool was tended.
    used: Vec<usize>,
    /// Who might have been since, whenever the roster was made: until the pool is tended again, it may be any of these.
    since: Vec<usize>,
    is_settled: bool,
}

impl Run {
    fn now(&self) -> Moment {
        at(self.model.now)
    }

    fn backend(&self, which: Index) -> (usize, Arc<vestibule::pool::backend::Backend>) {
        let place = which.index(self.model.all.len());
        (place, Arc::clone(&self.pool.candidates().backends()[place]))
    }

    fn act(&mut self, act: Act) -> Result<(), TestCaseError> {
        match act {
            Act::Session(key, rolls) => self.session(key, &rolls)?,
            Act::End(which) if !self.held.is_empty() => {
                let ended = self.held.swap_remove(which.index(self.held.len()));
                self.model.all[place(&ended)].load -= 1;
            }
            Act::Probe(which, success) => {
                let (place, backend) = self.backend(which);
                let change = self.pool.observe(&backend, verdict(success), Duration::ZERO, self.now());
                prop_assert_eq!(change.is_some(), self.model.probed(place, success));
                if change.is_some() {
                    self.changed();
                }
            }
            Act::NotConnected(which, times) => {
                for _ in 0..times {
                    let (place, backend) = self.backend(which);
                    self.model.all[place].not_connected += 1;
                    let change = self.pool.failed(&backend, SessionFailure::Connect, self.now());
                    let count = self.model.all[place].not_connected;
                    self.ejected(place, change.and_then(|change| change.out_for), count)?;
                }
            }
            Act::Reset(which, tenant, times) => {
                for _ in 0..times {
                    let (place, backend) = self.backend(which);
                    let count = self.model.reset(place, tenant);
                    let change = self.pool.failed(&backend, SessionFailure::Reset { tenant }, self.now());
                    self.ejected(place, change.and_then(|change| change.out_for), count)?;
                }
            }
            Act::Connected(which) => {
                let (place, backend) = self.backend(which);
                backend.connected();
                self.model.all[place].not_connected = 0;
            }
            Act::Answered(which) => {
                let (place, backend) = self.backend(which);
                backend.answered();
                self.model.answered(place);
            }
            Act::Arrived(tenant) => {
                self.pool.count_session(tenant);
                if !self.model.tenants.contains(&tenant) {
                    self.model.tenants.push(tenant);
                }
            }
            Act::Wait => {
                let place = self.pool.join_queue(1);
                let length = self.model.config.queue.length;
                let most = if self.model.tenants.len() > 1 { share_of_one(length) } else { length };
                prop_assert_eq!(place.is_some(), self.line.len() < most);
                self.line.extend(place);
            }
            Act::Leave(which) if !self.line.is_empty() => {
                drop(self.line.remove(which.index(self.line.len())));
            }
            Act::End(_) | Act::Leave(_) => {}
        }
        Ok(())
    }

    /// What is known has changed; the roster follows now, or when the pool is tended.
    fn changed(&mut self) {
        let weights = self.model.weights(self.model.now);
        self.since.extend((0..weights.len()).filter(|place| weights[*place] > 0));
        self.is_settled = false;
    }

    fn ejected(
        &mut self,
        place: usize,
        out_for: Option<Duration>,
        failures: u32,
    ) -> Result<(), TestCaseError> {
        let expected = self.model.ejects(place, failures);
        prop_assert_eq!(out_for, expected);
        if expected.is_some() {
            // At once, whatever the roster says.
            self.used.retain(|other| *other != place);
            self.since.retain(|other| *other != place);
            self.changed();
        }
        Ok(())
    }

    fn session(&mut self, key: u64, rolls: &[u64]) -> Result<(), TestCaseError> {
        let (mut tried, mut places) = (TriedBackends::default(), Vec::new());
        let mut last: Option<PickedBackend> = None;
        for roll in rolls {
            // The attempt before is over when the next is made.
            if let Some(over) = last.take() {
                self.model.all[place(&over)].load -= 1;
            }
            self.served()?;
            let picked = self.pool.pick(key, *roll, &mut tried);
            let left = |place: &usize| !places.contains(place);
            let first: Vec<_> = self.used.iter().copied().filter(left).collect();
            let others: Vec<_> = (0..self.model.all.len())
                .filter(left)
                .filter(|place| self.model.config.backends[*place].weight > 0)
                .filter(|place| self.model.state(*place) != HealthState::Unhealthy)
                .collect();
            let mut allowed = if first.is_empty() { others } else { first };
            if self.used.iter().all(|place| places.contains(place))
                && allowed.iter().any(|place| !self.model.is_out(*place))
            {
                allowed.retain(|place| !self.model.is_out(*place));
            }
            let has_room = |place: &usize| self.pool.candidates().backends()[*place].has_room();
            let spare: Vec<_> = self.model.spare().into_iter().filter(left).collect();
            match picked {
                Ok(picked) => {
                    let place = place(&picked);
                    prop_assert!(left(&place), "{} was tried", place);
                    let helps = spare.contains(&place) && !allowed.iter().any(has_room);
                    let is_allowed = allowed.contains(&place) || self.since.contains(&place) || helps;
                    let is_other = !self.is_settled;
                    prop_assert!(is_allowed || is_other, "{} is none of {:?}", place, allowed);
                    let waits = !self.line.is_empty() && !self.used.is_empty() && self.is_settled;
                    prop_assert!(!places.is_empty() || !waits, "somebody waits");
                    self.check_pick(place, &allowed)?;
                    self.model.all[place].load += 1;
                    places.push(place);
                    prop_assert_eq!((tried.len(), tried.is_empty()), (places.len(), false));
                    last = Some(picked);
                }
                Err(why) if self.is_settled => {
                    let waits = places.is_empty() && !self.line.is_empty() && !self.used.is_empty();
                    let free = allowed.iter().chain(&spare).filter(|place| has_room(place)).count();
                    prop_assert!(waits || free == 0, "{:?} with room in {:?}", why, allowed);
                    prop_assert_eq!(why == PickError::Usable, allowed.is_empty() && !waits);
                    break;
                }
                Err(_) => break,
            }
        }
        self.held.extend(last);
        Ok(())
    }

    /// Whether it had room, and where the least loaded is wanted, whether it is that.
    fn check_pick(&self, place: usize, allowed: &[usize]) -> Result<(), TestCaseError> {
        let roster = self.pool.candidates();
        let before = self.model.all[place].load;
        let most = self.model.config.backends[place].max_sessions.unwrap_or(u32::MAX);
        prop_assert!(before < most);
        let is_first = self.used.len() == allowed.len() && self.used.contains(&place);
        if self.model.config.balance == Balance::LeastSessions && is_first && self.is_settled {
            let backends = &self.model.config.backends;
            let unit = self.used.iter().map(|place| backends[*place].weight * 64).min().unwrap_or(1);
            let relative = |place: usize, load: u32| {
                (f64::from(load) * f64::from(unit) / f64::from(roster.backends()[place].weight())).floor()
            };
            for other in allowed.iter().copied().filter(|other| *other != place) {
                let has_less = relative(other, self.model.all[other].load) < relative(place, before);
                prop_assert!(
                    !has_less || !roster.backends()[other].has_room(),
                    "{} has less than {}",
                    other,
                    place
                );
            }
        }
        Ok(())
    }

    /// Takes what those in the line have been given: the first of them, and nobody who may not be used.
    fn served(&mut self) -> Result<(), TestCaseError> {
        let mut is_over = false;
        let mut left = VecDeque::new();
        for mut waiting in std::mem::take(&mut self.line) {
            let Some(picked) = given(&mut waiting) else {
                is_over = true;
                left.push_back(waiting);
                continue;
            };
            prop_assert!(!is_over, "somebody passed by");
            let place = place(&picked);
            let helps = self.model.spare().contains(&place);
            prop_assert!(self.used.contains(&place) || self.since.contains(&place) || helps);
            self.model.all[place].load += 1;
            self.held.push(picked);
        }
        self.line = left;
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let roster = self.pool.candidates();
        let shown: Vec<_> = roster.backends().iter().map(|backend| backend.load()).collect();
        let held: Vec<_> = self.model.all.iter().map(|one| one.load).collect();
        prop_assert_eq!(&shown, &held);
        prop_assert_eq!(self.pool.waiting(), self.line.len());
        let mut count = 0;
        for (place, backend) in roster.backends().iter().enumerate() {
            prop_assert_eq!(backend.state(), self.model.state(place));
            prop_assert_eq!(backend.is_ejected(), self.model.is_out(place));
            prop_assert_eq!(backend.summary().ejected_until, self.model.all[place].until.map(at));
            count += usize::from(backend.is_ejected());
        }
        let most = (shown.len() * self.model.config.ejection.max_percent as usize / 100).max(1);
        prop_assert!(count <= most && (count == 0 || count < shown.len()));
        Ok(())
    }

    /// Time passes, and the pool does what is due: then it is as the model says.
    fn pass(&mut self, milliseconds: u64) -> Result<(), TestCaseError> {
        self.model.now += milliseconds;
        self.model.tend();
        self.pool.run_due(self.now());
        let roster = self.pool.candidates();
        let shown: Vec<_> = roster.backends().iter().map(|backend| backend.weight()).collect();
        let rooms: Vec<_> = roster.backends().iter().map(|backend| backend.has_room()).collect();
        let loads: Vec<_> = roster.backends().iter().map(|backend| backend.load()).collect();
        let is_so = |then: u64| {
            let has_room = |place: usize| loads[place] < self.model.room(place, then);
            self.model.weights(then) == shown && (0..rooms.len()).all(|place| has_room(place) == rooms[place])
        };
        let now = self.model.now;
        prop_assert!(
            self.model.times().into_iter().any(is_so),
            "{:?} with room {:?}, and due are {:?}",
            shown,
            rooms,
            self.model.weights(now)
        );
        self.used = (0..shown.len()).filter(|place| shown[*place] > 0).collect();
        prop_assert_eq!(self.pool.usable(), self.used.len());
        self.since.clear();
        self.is_settled = true;
        self.served()?;
        let is_free = |place: &&usize| roster.backends()[**place].has_room();
        prop_assert!(
            self.line.is_empty() || !self.used.iter().any(|place| is_free(&place)),
            "room, and somebody waits"
        );
        Ok(())
    }
}

fn run(balance: Balance, mut config: config::PoolConfig, acts: Vec<(Act, u64)>) -> Result<(), TestCaseError> {
    config.balance = balance;
    let pool = Pool::new(&config, &Labels::default());
    let model = Model::new(&config);
    let (held, line) = (Vec::new(), VecDeque::new());
    let mut run = Run { pool, model, held, line, used: Vec::new(), since: Vec::new(), is_settled: true };
    run.pass(100)?;
    for (act, passes) in acts {
        run.act(act)?;
        run.served()?;
        run.check()?;
        if passes > 0 {
            run.pass(passes)?;
            run.check()?;
        }
    }
    run.line.clear();
    run.held.clear();
    prop_assert_eq!(run.pool.waiting(), 0);
    prop_assert!(run.pool.candidates().backends().iter().all(|backend| backend.load() == 0));
    Ok(())
}

fn acts() -> impl Strategy<Value = Vec<(Act, u64)>> {
    prop::collection::vec(act(), 0..80)
}

proptest! {
    #[test]
    fn round_robin_picks_only_eligible_backends(config in rules(), acts in acts()) {
        run(Balance::RoundRobin, config, acts)?;
    }

    #[test]
    fn least_sessions_picks_only_eligible_backends(config in rules(), acts in acts()) {
        run(Balance::LeastSessions, config, acts)?;
    }

    #[test]
    fn p2c_picks_only_eligible_backends(config in rules(), acts in acts()) {
        run(Balance::P2c, config, acts)?;
    }
}

proptest! {
    // Each roster of these has a table of 65,537 places.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn maglev_picks_only_eligible_backends(config in rules(), acts in acts()) {
        run(Balance::Maglev, config, acts)?;
    }

    #[test]
    fn maglev_by_endpoint_picks_only_eligible_backends(config in rules(), acts in acts()) {
        run(Balance::MaglevEndpoint, config, acts)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    /// Found by the others: one of another zone is back from its ejection, a probe of it fails before the roster follows,
    /// and somebody waits.
    #[test]
    fn unhealthy_backend_takes_no_spill_of_another_zone(first in any::<Index>().prop_filter("it is the first", |it| it.index(2) == 0)) {
        let mut config = config(Balance::P2c, &[100, 100]);
        (config.backends[1].zone, config.prefer_zone) = (Some("a".to_owned()), Some("a".to_owned()));
        config.queue.length = 1;
        config.ejection = EjectionConfig { consecutive_failures: 1, base_time: Duration::from_secs(1), max_percent: 10 };
        let acts = [(Act::NotConnected(first, 1), 1_000), (Act::Probe(first, false), 0), (Act::Wait, 0)];
        for balance in [Balance::RoundRobin, Balance::LeastSessions, Balance::P2c, Balance::Maglev] {
            run(balance, config.clone(), acts.to_vec())?;
        }
    }
}

/// How many places one tenant alone gets of so many that are shared.
fn share_of_one(length: usize) -> usize {
    (0..length).take_while(|own| vestibule::fair_share::is_allowed(*own, 1, length, length - own - 1)).count()
}
