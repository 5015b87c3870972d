//! ns per pick: which backend is next, in pools of 2, 10, 100 and 1,000. `cargo bench --bench pick`
//!
//! With all healthy, and with every other one unhealthy. A pick's session ends before the next pick: its count on the
//! backend goes up and down again, and both are part of the figure.

use std::sync::Arc;

use divan::{Bencher, black_box};
use vestibule::account::Labels;
use vestibule::addr::BackendAddr;
use vestibule::config::{Balance, Config};
use vestibule::pool::backend::Backend;
use vestibule::pool::health::{Rules, State};
use vestibule::pool::{Pool, Tried};

const SIZES: [u16; 4] = [2, 10, 100, 1_000];

/// A pool of so many backends, every `step`th of them healthy.
fn pool(size: u16, balance: Balance, step: u16) -> Pool {
    let text = "[[listener]]\nname = \"a\"\nbind = \"127.0.0.1:0\"\nproxy-protocol = \"off\"\ntenant = \"t\"\n\
                pool = \"app\"\n[[pool]]\nname = \"app\"\nbackends = [\"10.0.0.1:80\"]\n\
                [[tenant]]\nname = \"t\"\n";
    let config = Config::parse("the bench's configuration", text).expect("a configuration");
    let mut rules = config.pools.first().expect("its pool").clone();
    rules.balance = balance;
    let labels = Labels::default();
    let backend = |place: u16| {
        let [high, low] = place.to_be_bytes();
        let address = BackendAddr(([10, 0, high, low], 80).into());
        let state = if place.is_multiple_of(step) { State::Healthy } else { State::Unhealthy };
        Arc::new(Backend::new(
            address,
            labels.intern(&address.to_string()),
            Rules { rise: 1, fall: 1 },
            state,
        ))
    };
    let pool = Pool::new(labels.intern("app"), &rules, (0..size).map(backend).collect());
    assert_eq!(pool.usable(), usize::from(size.div_ceil(step)));
    pool
}

fn measure(bencher: Bencher, pool: &Pool) {
    let mut random = fastrand::Rng::with_seed(1);
    bencher.bench_local(|| {
        let picked = pool.pick(black_box(random.u64(..)), &mut Tried::default());
        picked.expect("a backend").load()
    });
}

#[divan::bench(args = SIZES)]
fn round_robin(bencher: Bencher, backends: u16) {
    measure(bencher, &pool(backends, Balance::RoundRobin, 1));
}

#[divan::bench(args = SIZES)]
fn round_robin_half_unhealthy(bencher: Bencher, backends: u16) {
    measure(bencher, &pool(backends, Balance::RoundRobin, 2));
}

#[divan::bench(args = SIZES)]
fn p2c(bencher: Bencher, backends: u16) {
    measure(bencher, &pool(backends, Balance::P2c, 1));
}

#[divan::bench(args = SIZES)]
fn p2c_half_unhealthy(bencher: Bencher, backends: u16) {
    measure(bencher, &pool(backends, Balance::P2c, 2));
}

fn main() {
    divan::main();
}
