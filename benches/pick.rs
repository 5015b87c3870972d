//! ns per pick: which backend is next, in pools of 2, 10, 100 and 1,000. `cargo bench --bench pick`
//!
//! For each algorithm with equal weights, with mixed ones, with every other backend unhealthy, and with two threads that
//! pick from one pool. A pick's session ends before the next pick: its count on the backend goes up and down again, and
//! both are part of the figure. What is made off the data path, a roster and a Maglev table, is measured too.

use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use divan::{Bencher, black_box};
use vestibule::account::{Labels, ProbeResult};
use vestibule::clock::Moment;
use vestibule::config::Config;
use vestibule::pool::backend::Backend;
use vestibule::pool::maglev::{MaglevEntry, MaglevTable};
use vestibule::pool::{Pool, TriedBackends, pick};

const SIZES: [u16; 4] = [2, 10, 100, 1_000];

/// From one roster of a pool to its next.
const RENEWAL: Duration = Duration::from_millis(200);

/// Who is in the pool.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Equal,
    Mixed,
    HalfUnhealthy,
}

/// How the pool picks, and from how many.
#[derive(Clone, Copy)]
struct Case(&'static str, u16);

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let all = ["round-robin", "least-sessions", "p2c", "maglev", "maglev-endpoint"];
    all.into_iter().flat_map(|balance| SIZES.map(|size| Case(balance, size)))
}

fn largest() -> impl Iterator<Item = Case> {
    cases().filter(|Case(_, size)| *size == 1_000)
}

/// A pool of which each backend has had its first probe.
fn pool(Case(balance, size): Case, kind: Kind) -> Pool {
    let mut text = format!(
        "[[listener]]\nname = \"a\"\nbind = \"127.0.0.1:0\"\nproxy-protocol = \"off\"\ntenant = \"t\"\npool = \"app\"\n\
         [[tenant]]\nname = \"t\"\n\
         [[pool]]\nname = \"app\"\nbalance = \"{balance}\"\nhealth = {{ rise = 1, fall = 1 }}\nbackends = [\n"
    );
    for place in 0..size {
        let [high, low] = place.to_be_bytes();
        let weight = if kind == Kind::Mixed { 1 + place % 7 * 50 } else { 100 };
        writeln!(text, "{{ address = \"10.0.{high}.{low}:80\", weight = {weight} }},").expect("a text");
    }
    text.push_str("]\n");
    let config = Config::parse("the bench's configuration", &text).expect("a configuration");
    let pool = Pool::new(config.pools.first().expect("its pool"), &Labels::default());
    for (place, backend) in pool.candidates().backends().iter().enumerate() {
        let is_down = kind == Kind::HalfUnhealthy && place % 2 == 1;
        observe(&pool, backend, !is_down, Moment::default());
    }
    pool.run_due(Moment::default() + RENEWAL);
    let expected = if kind == Kind::HalfUnhealthy { size.div_ceil(2) } else { size };
    assert_eq!(pool.usable(), usize::from(expected));
    pool
}

fn observe(pool: &Pool, backend: &Arc<Backend>, success: bool, now: Moment) {
    let verdict = if success { ProbeResult::Passed } else { ProbeResult::ConnectRefused };
    assert!(pool.observe(backend, verdict, Duration::ZERO, now).is_some());
}

fn once(pool: &Pool) -> u32 {
    let roll = black_box(fastrand::u64(..));
    pool.pick(roll, roll, &mut TriedBackends::default()).expect("a backend").load()
}

#[divan::bench(args = cases())]
fn equal(bencher: Bencher, case: Case) {
    let pool = pool(case, Kind::Equal);
    bencher.bench_local(|| once(&pool));
}

#[divan::bench(args = cases())]
fn mixed(bencher: Bencher, case: Case) {
    let pool = pool(case, Kind::Mixed);
    bencher.bench_local(|| once(&pool));
}

#[divan::bench(args = cases())]
fn half_unhealthy(bencher: Bencher, case: Case) {
    let pool = pool(case, Kind::HalfUnhealthy);
    bencher.bench_local(|| once(&pool));
}

#[divan::bench(args = largest(), threads = 2)]
fn two_threads(bencher: Bencher, case: Case) {
    let pool = pool(case, Kind::Equal);
    bencher.bench(|| once(&pool));
}

/// One backend goes down or up: the roster is made anew.
#[divan::bench(args = cases().filter(|Case(_, size)| *size >= 100))]
fn roster(bencher: Bencher, case: Case) {
    let pool = pool(case, Kind::Equal);
    let backend = Arc::clone(pool.candidates().backends().first().expect("a backend"));
    let (mut now, mut is_up) = (Moment::default() + RENEWAL, true);
    bencher.bench_local(|| {
        (now, is_up) = (now + RENEWAL, !is_up);
        observe(&pool, &backend, is_up, now);
    });
}

#[divan::bench(args = [100_u32, 1_000])]
fn table(bencher: Bencher, backends: u32) {
    let entry = |place: u32| MaglevEntry { name: pick::hash(&place.to_be_bytes()), whole: 100, weight: 100 };
    let entries: Vec<_> = (0..backends).map(entry).collect();
    bencher.bench_local(|| MaglevTable::new(black_box(&entries)));
}

/// The worst that weights can do: one has a thousand times the others', and they wait for their turns.
#[divan::bench(args = [100_u32, 1_000])]
fn table_of_one_giant(bencher: Bencher, backends: u32) {
    let weight = |place: u32| if place == 0 { 64_000 } else { 64 };
    let entry = |place: u32| MaglevEntry {
        name: pick::hash(&place.to_be_bytes()),
        whole: weight(place),
        weight: weight(place),
    };
    let entries: Vec<_> = (0..backends).map(entry).collect();
    bencher.bench_local(|| MaglevTable::new(black_box(&entries)));
}

fn main() {
    divan::main();
}
