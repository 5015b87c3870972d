//! A scripted day in virtual time: what pools decide while hosts die, fall silent, flap and come back.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use vestibule::account::{Labels, ProbeResult};
use vestibule::clock::Moment;
use vestibule::config::{Balance, Config};
use vestibule::lab::day::{DayAction, DayEvent, script};
use vestibule::pool::backend::Backend;
use vestibule::pool::{PickedBackend, Pool, SessionFailure, TriedBackends, pick};

const HOSTS: usize = 20;
const INTERVAL: Duration = Duration::from_secs(1);
const FALL: u32 = 3;
/// What a silent host costs, by the configuration: a probe's time and a session's.
const SILENCE: Duration = Duration::from_millis(500);

/// Sessions a second: many while shares are counted, fewer while it is only asked whether any fails.
const BUSY: u32 = 6_000;
const CALM: u32 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Script(usize),
    Probe(usize),
    Probed(usize, bool),
    Arrive,
    Tried(u64),
    End(u64),
    Tend,
    /// A host that went at that time, and may not be used any more.
    Gone(usize, u128),
}

struct Session {
    key: u64,
    tried: TriedBackends,
    attempts: u32,
    picked: Option<PickedBackend>,
    up: bool,
}

struct World {
    length: Duration,
    pool: Pool,
    backends: Vec<Arc<Backend>>,
    script: Vec<DayEvent>,
    /// What each host suffers, and since when.
    down: Vec<Option<(DayAction, Duration)>>,
    due: BinaryHeap<Reverse<(Duration, u64, What)>>,
    count: u64,
    sessions: HashMap<u64, Session>,
    served: Vec<u64>,
    failed: Vec<Duration>,
    rolls: fastrand::Rng,
    checked: u32,
}

fn pool(balance: Balance) -> Pool {
    let backend = |host: usize| {
        let weight = [100, 150, 200, 250][host % 4];
        format!("{{ address = \"10.0.0.{}:80\", weight = {weight} }}", host + 1)
    };
    let backends = (0..HOSTS).map(backend).collect::<Vec<_>>().join(", ");
    let text = format!(
        "[timeouts]\nconnect = \"{0}ms\"\n[[listener]]\nname = \"a\"\nbind = \"127.0.0.1:0\"\nproxy-protocol = \"off\"\n\
         tenant = \"t\"\npool = \"app\"\n[[pool]]\nname = \"app\"\nattempts = 5\nslow-start = \"3s\"\nbackends = [{backends}]\n\
         [pool.health]\ninterval = \"{1}s\"\ntimeout = \"{0}ms\"\nrise = 2\nfall = {FALL}\n\
         [pool.ejection]\nconsecutive-failures = 3\nbase-time = \"5s\"\n[[tenant]]\nname = \"t\"\n",
        SILENCE.as_millis(),
        INTERVAL.as_secs(),
    );
    let config = Config::parse("the day", &text).unwrap();
    let config = vestibule::config::PoolConfig { balance, ..config.pools[0].clone() };
    Pool::new(&config, &Labels::default())
}

impl World {
    fn new(balance: Balance, seed: u64, length: Duration) -> Self {
        let pool = pool(balance);
        let backends = pool.candidates().backends().to_vec();
        let mut world = Self {
            length,
            pool,
            backends,
            script: script(seed, HOSTS, length),
            down: vec![None; HOSTS],
            due: BinaryHeap::new(),
            count: 0,
            sessions: HashMap::new(),
            served: vec![0; HOSTS],
            failed: Vec::new(),
            rolls: fastrand::Rng::with_seed(seed),
            checked: 0,
        };
        for (place, event) in world.script.clone().into_iter().enumerate() {
            world.at(event.at, What::Script(place));
        }
        for host in 0..HOSTS {
            world.at(Duration::from_millis(host as u64 * 2), What::Probe(host));
        }
        world.at(Duration::ZERO, What::Tend);
        world.at(Duration::from_millis(500), What::Arrive);
        world
    }

    fn at(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.due.push(Reverse((at, self.count, what)));
    }

    fn run(&mut self, until: Duration) {
        while let Some(Reverse((at, _, what))) = self.due.pop() {
            if at >= until {
                self.at(at, what);
                break;
            }
            self.step(at, what);
        }
    }

    fn step(&mut self, at: Duration, what: What) {
        let now = Moment::default() + at;
        match what {
            What::Script(place) => {
                let event = self.script[place];
                self.down[event.host] = (event.act != DayAction::Return).then_some((event.act, at));
                if event.act != DayAction::Return {
                    let limit = INTERVAL * FALL + Duration::from_secs(1);
                    self.at(at + limit, What::Gone(event.host, at.as_nanos()));
                }
            }
            What::Gone(host, since) => {
                if self.down[host].is_some_and(|(_, down)| down.as_nanos() == since) {
                    let backend = &self.backends[host];
                    assert!(!backend.is_used(), "{} is used 4 s after it went, at {at:?}", backend.address());
                    self.checked += 1;
                }
            }
            What::Probe(host) => {
                let answer = match self.down[host] {
                    None => (Duration::from_micros(200), true),
                    Some((DayAction::Kill, _)) => (Duration::from_micros(100), false),
                    Some(_) => (SILENCE, false),
                };
                self.at(at + answer.0, What::Probed(host, answer.1));
                // A tenth more or less.
                let jitter = self.rolls.u64(900..=1_100);
                self.at(at + Duration::from_millis(jitter), What::Probe(host));
            }
            What::Probed(host, passed) => {
                let verdict = if passed { ProbeResult::Passed } else { ProbeResult::AnswerTimeout };
                self.pool.observe(&self.backends[host], verdict, Duration::from_millis(1), now);
            }
            What::Tend => {
                self.pool.run_due(now);
                self.at(at + Duration::from_millis(100), What::Tend);
            }
            What::Arrive => {
                let rate = if at < self.length / 10 { BUSY } else { CALM };
                self.at(at + Duration::from_secs(1) / rate, What::Arrive);
                self.pool.count_session(1);
                let key = pick::hash(&self.rolls.u32(..1_000_000).to_be_bytes());
                let session =
                    Session { key, tried: TriedBackends::default(), attempts: 0, picked: None, up: false };
                self.count += 1;
                self.dial(self.count, session, at);
            }
            What::Tried(number) => {
                let Some(session) = self.sessions.remove(&number) else { return };
                let picked = session.picked.as_ref().unwrap();
                if session.up {
                    picked.connected();
                    self.served[picked.slot() as usize] += 1;
                    self.sessions.insert(number, session);
                    let span = Duration::from_millis(self.rolls.u64(1..40));
                    self.at(at + span, What::End(number));
                } else {
                    self.pool.failed(picked, SessionFailure::Connect, now);
                    self.dial(number, session, at);
                }
            }
            What::End(number) => {
                let session = self.sessions.remove(&number).unwrap();
                session.picked.unwrap().answered();
            }
        }
    }

    /// What a session does to come to a backend.
    fn dial(&mut self, number: u64, mut session: Session, at: Duration) {
        let now = Moment::default() + at;
        let roll = self.rolls.u64(..);
        session.picked = None;
        let picked = (session.attempts < self.pool.attempts)
            .then(|| self.pool.pick(session.key, roll, &mut session.tried).ok())
            .flatten()
            .filter(|_| session.attempts == 0 || self.pool.may_retry(now));
        let Some(picked) = picked else { return self.failed.push(at) };
        let took = match self.down[picked.slot() as usize] {
            None => Duration::from_micros(200),
            Some((DayAction::Kill, _)) => Duration::from_micros(100),
            Some(_) => SILENCE,
        };
        session.up = self.down[picked.slot() as usize].is_none();
        session.attempts += 1;
        session.picked = Some(picked);
        self.sessions.insert(number, session);
        self.at(at + took, What::Tried(number));
    }
}

fn shares_are_within_five_percent(world: &World, balance: Balance) {
    let weights: Vec<u64> = (0..HOSTS).map(|host| [100, 150, 200, 250][host % 4]).collect();
    let (sessions, total) = (world.served.iter().sum::<u64>(), weights.iter().sum::<u64>());
    for (served, weight) in world.served.iter().zip(weights) {
        let due = sessions * weight / total;
        assert!(served.abs_diff(due) * 20 <= due, "{balance:?}: {served} of {sessions}, due are {due}");
    }
}

fn a_day(balance: Balance, seconds: u64, seed: u64) {
    let length = Duration::from_secs(seconds);
    let mut world = World::new(balance, seed, length);
    world.run(length / 10);
    // One endpoint's sessions all come to one backend; its keys here are clients', which are many.
    shares_are_within_five_percent(&world, balance);
    world.run(length);
    assert!(
        world.failed.is_empty(),
        "{balance:?}, {seed}: {} failed: {:?}",
        world.failed.len(),
        world.failed
    );
    assert!(u64::from(world.checked) * 30 > seconds, "{} hosts went for long", world.checked);
    world.sessions.clear();
    assert!(world.backends.iter().all(|backend| backend.load() == 0));
    assert_eq!(world.pool.usable(), HOSTS);
}

#[test]
fn simulated_day_with_round_robin() {
    a_day(Balance::RoundRobin, 600, 1);
}

#[test]
fn simulated_day_with_least_sessions() {
    a_day(Balance::LeastSessions, 600, 2);
}

#[test]
fn simulated_day_with_p2c() {
    a_day(Balance::P2c, 600, 3);
    a_day(Balance::P2c, 600, 4);
}

/// Shorter: the tables are made anew at each change, which is slow without optimisation.
#[test]
fn simulated_day_with_maglev() {
    a_day(Balance::Maglev, 200, 5);
}

#[test]
fn simulated_day_with_maglev_by_endpoint() {
    a_day(Balance::MaglevEndpoint, 200, 6);
}
