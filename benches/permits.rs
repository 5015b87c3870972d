//! Ten minutes in which 1,000 tenants' limits change at random while sessions come and go: at every stop point what is
//! counted is what is held, and at the end nothing is. `cargo bench --bench permits`; `-- --test` takes three seconds.

#![expect(clippy::indexing_slicing, reason = "a tenant's number is below their count")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use fastrand::Rng;
use vestibule::admission::quota::SessionPermit;
use vestibule::admission::slots::{self, Slots};
use vestibule::clock;
use vestibule::config::{Config, LimitMode, RateLimit, TenantConfig, TenantLimits};
use vestibule::outcome::Reason;
use vestibule::pool::Answers;
use vestibule::state::{ChangeCount, LiveState, ProcessLimits};

const TENANTS: usize = 1_000;
const THREADS: usize = 3;
/// Sessions of the process: scarce, so that there is shedding too.
const PROCESS: usize = 6_000;
/// What a thread does between two stop points.
const STEPS: usize = 20_000;
/// Reloads between two stop points.
const RELOADS: usize = 3;

/// What a thread holds, and what it has seen.
#[derive(Default)]
struct Hold {
    permits: Vec<(usize, SessionPermit, slots::SlotPermit)>,
    admitted: u64,
    rejected: [u64; 3],
    full: u64,
}

impl Hold {
    /// A session comes or goes: of 256 steps, so many are for one to go.
    fn step(&mut self, going: u8, live: &LiveState, random: &mut Rng) {
        if random.u8(..) < going && !self.permits.is_empty() {
            drop(self.permits.swap_remove(random.usize(..self.permits.len())));
            return;
        }
        let snapshot = live.snapshot.load();
        let tenants = snapshot.directory.tenants();
        // A few are asked for much more often than the others.
        let place = if random.bool() { random.usize(..tenants.len()) } else { random.usize(..10) };
        let Some(tenant) = tenants.get(place) else { return };
        let Some(slot) = live.sessions.take() else {
            self.full += 1;
            return;
        };
        match tenant.quota.admit(clock::now()) {
            Ok(permit) => {
                self.admitted += 1;
                self.permits.push((number(tenant.label.name()), permit, slot));
            }
            Err(Reason::SessionLimit) => self.rejected[0] += 1,
            Err(Reason::SessionRate) => self.rejected[1] += 1,
            Err(_) => self.rejected[2] += 1,
        }
    }
}

fn number(name: &str) -> usize {
    name.parse().expect("a tenant that is called by its number")
}

fn limits(random: &mut Rng) -> TenantLimits {
    let interval = Duration::from_nanos(random.u64(10_000..10_000_000));
    TenantLimits {
        mode: if random.u8(..) < 32 { LimitMode::Observe } else { LimitMode::Enforce },
        sessions: (random.u8(..) < 200).then(|| random.usize(1..40)),
        session_rate: (random.u8(..) < 48).then(|| RateLimit { interval, burst: random.u64(1..50) }),
        ..TenantLimits::default()
    }
}

/// Another configuration: some limits are others, some tenants are gone, and some are there again.
fn change(all: &mut [TenantConfig], random: &mut Rng) -> Vec<TenantConfig> {
    for _ in 0..TENANTS / 10 {
        all[random.usize(..TENANTS)].limits = limits(random);
    }
    let (gone, many) = (random.usize(..TENANTS), random.usize(..TENANTS / 10));
    let stays = |place: &usize| !(gone..gone + many).contains(place);
    let mut tenants: Vec<_> = (0..TENANTS).filter(stays).map(|place| all[place].clone()).collect();
    random.shuffle(&mut tenants);
    tenants
}

/// The first configuration: tenants that are called by their numbers.
fn start() -> Config {
    let text = "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\npool = \"app\"\n\
        [[pool]]\nname = \"app\"\nbackends = [\"127.0.0.1:1\"]\nhealth = { kind = \"none\" }\n[[tenant]]\nname = \"0\"\n";
    let mut config = Config::parse("start.toml", text).expect("a configuration without a fault");
    let first = config.tenants.remove(0);
    config.tenants =
        (0..TENANTS).map(|place| TenantConfig { name: place.to_string(), ..first.clone() }).collect();
    config
}

/// The most that each tenant may have held since the last stop point.
fn raise(ceilings: &mut [usize], tenants: &[TenantConfig]) {
    for tenant in tenants {
        let limit = tenant.limits.sessions.filter(|_| tenant.limits.mode == LimitMode::Enforce);
        let ceiling = &mut ceilings[number(&tenant.name)];
        *ceiling = (*ceiling).max(limit.unwrap_or(Slots::UNLIMITED));
    }
}

/// Compares what is counted with what is held; all threads stand still.
fn check(live: &LiveState, holds: &[Mutex<Hold>], ceilings: &[usize]) -> Result<Vec<usize>, String> {
    let mut held = vec![0_usize; TENANTS];
    for hold in holds {
        hold.lock()
            .expect("a thread that did not panic")
            .permits
            .iter()
            .for_each(|(tenant, ..)| held[*tenant] += 1);
    }
    for (tenant, held) in held.iter().enumerate() {
        let known = live.quotas.known(&live.labels.intern(&tenant.to_string()));
        let counted = known.map_or(0, |quota| quota.sessions());
        if counted != *held {
            return Err(format!("tenant {tenant}: {counted} counted and {held} held"));
        }
        if *held > ceilings[tenant] {
            return Err(format!("tenant {tenant}: {held} held and {} allowed", ceilings[tenant]));
        }
    }
    let (sum, holders) = (held.iter().sum::<usize>(), held.iter().filter(|held| **held > 0).count());
    let counted = (live.sessions.used(), live.quotas.holders());
    if counted != (sum, holders) {
        return Err(format!("{counted:?} counted, and {:?} held: sessions and tenants", (sum, holders)));
    }
    Ok(held)
}

fn main() {
    let short = std::env::args().any(|argument| argument == "--test");
    let end = clock::now() + Duration::from_secs(if short { 3 } else { 600 });
    let mut config = start();
    let mut all = config.tenants.clone();
    let live = LiveState::new(&config, 1, ProcessLimits { sessions: PROCESS, pending: 1_000, pipes: 0 });
    let holds: Vec<_> = (0..THREADS).map(|_| Mutex::<Hold>::default()).collect();
    let (barrier, over) = (Arc::new(Barrier::new(THREADS + 1)), AtomicBool::new(false));
    let mut random = Rng::with_seed(7);
    let (mut stops, mut most) = (0_u64, 0);
    let mut found = Ok(vec![0; TENANTS]);
    std::thread::scope(|scope| {
        for (seed, hold) in (0..).zip(&holds) {
            let (barrier, over, live) = (Arc::clone(&barrier), &over, &live);
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed);
                loop {
                    barrier.wait();
                    if over.load(Ordering::SeqCst) {
                        return;
                    }
                    let mut hold = hold.lock().expect("no other thread holds the lock");
                    // Now more come than go, now more go.
                    let going = random.choice([40, 100, 128, 200]).unwrap_or(128);
                    (0..STEPS).for_each(|_| hold.step(going, live, &mut random));
                    drop(hold);
                    barrier.wait();
                }
            });
        }
        while let Ok(before) = &found
            && clock::now() < end
        {
            // Who is there stays there, and what was in force until now may have been used until now.
            let mut ceilings = before.clone();
            raise(&mut ceilings, &all);
            let nexts: Vec<_> = (0..RELOADS).map(|_| change(&mut all, &mut random)).collect();
            for next in &nexts {
                raise(&mut ceilings, next);
            }
            barrier.wait();
            for next in nexts {
                config.tenants = next;
                let turn = live.begin_reload(&config).expect("nothing but tenants changes");
                let changes = turn.put(&Arc::new(config.clone()), Vec::new(), &Answers::new(), clock::now());
                assert_eq!(changes.pools, ChangeCount::default());
            }
            barrier.wait();
            found = check(&live, &holds, &ceilings);
            stops += 1;
            most = most.max(live.sessions.used());
        }
        over.store(true, Ordering::SeqCst);
        barrier.wait();
    });
    if let Err(fault) = found {
        eprintln!("after {stops} stop points: {fault}");
        std::process::exit(1);
    }
    print_totals(&live, holds, &all);
    println!("{stops} stop points, at most {most} sessions at once");
}

/// Releases all sessions, and prints the totals.
fn print_totals(live: &LiveState, holds: Vec<Mutex<Hold>>, all: &[TenantConfig]) {
    let (mut admitted, mut rejected, mut full) = (0, [0; 3], 0);
    for hold in holds {
        let hold = hold.into_inner().expect("a thread that did not panic");
        admitted += hold.admitted;
        full += hold.full;
        rejected.iter_mut().zip(hold.rejected).for_each(|(sum, own)| *sum += own);
    }
    assert_eq!((live.sessions.used(), live.quotas.holders()), (0, 0), "something is left");
    for tenant in all {
        let quota = live.quotas.known(&live.labels.intern(&tenant.name));
        assert_eq!(quota.map_or(0, |quota| quota.sessions()), 0, "{} has something left", tenant.name);
    }
    let [by_limit, by_rate, shed] = rejected;
    println!(
        "{admitted} sessions admitted, {by_limit} rejected by limit, {by_rate} by rate, {shed} shed and {full} without a \
         slot; {} reloads. At each stop point what was counted was what was held; at the end all is zero.",
        live.reloads.done()
    );
}
