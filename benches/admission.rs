//! ns to admit a session and to let it go, without limits, with all of them, and where two threads want the same
//! tenant's; ns of a read's bandwidth; and the memory of an idle tenant. `cargo bench --bench admission`

use std::fmt::Write;
use std::hint::black_box;
use std::sync::Arc;
use std::task::Waker;

use divan::Bencher;
use vestibule::account::{Direction, Labels};
use vestibule::admission::bandwidth_queue::BandwidthQueue;
use vestibule::admission::direction_limiter::{BandwidthContext, DirectionLimiter};
use vestibule::admission::quota::{Quota, Quotas};
use vestibule::admission::slots::Slots;
use vestibule::clock::{self, wheel::Tick};
use vestibule::config::{BandwidthLimit, Config, LimitMode, RateLimit, TenantLimits};
use vestibule::state::{LiveState, ProcessLimits};

/// Limits that no tenant reaches, so that every session takes all steps.
fn all() -> TenantLimits {
    let bandwidth = Some(BandwidthLimit { bytes_per_second: 1 << 40, burst: 1 << 36 });
    let session_rate =
        Some(RateLimit { interval: std::time::Duration::from_micros(1), burst: u64::from(u32::MAX) });
    TenantLimits {
        mode: LimitMode::Enforce,
        sessions: Some(1 << 20),
        session_rate,
        to_backend: bandwidth,
        to_client: bandwidth,
        flows: Some(1 << 20),
        datagram_rate: session_rate,
    }
}

/// A tenant's quota, of a process with room for all.
fn quota(limits: TenantLimits) -> Arc<Quota> {
    let quota = Quotas::new(Slots::new(1 << 20)).find(&Labels::default().intern("acme"));
    quota.set(&limits, clock::now());
    quota
}

/// The clock, which every admission reads; no part of the figures below is less.
#[divan::bench]
fn clock_alone(bencher: Bencher) {
    bencher.bench_local(|| black_box(clock::now()));
}

#[divan::bench]
fn no_limits(bencher: Bencher) {
    let quota = quota(TenantLimits::default());
    bencher.bench_local(|| drop(black_box(quota.admit(clock::now()))));
}

#[divan::bench]
fn all_limits(bencher: Bencher) {
    let quota = quota(all());
    bencher.bench_local(|| drop(black_box(quota.admit(clock::now()))));
}

#[divan::bench(threads = [2], sample_size = 10_000)]
fn no_limits_contended(bencher: Bencher) {
    let quota = quota(TenantLimits::default());
    bencher.bench(|| drop(black_box(quota.admit(clock::now()))));
}

#[divan::bench(threads = [2], sample_size = 10_000)]
fn all_limits_contended(bencher: Bencher) {
    let quota = quota(all());
    bencher.bench(|| drop(black_box(quota.admit(clock::now()))));
}

/// A rejected session: the cost of each in a flood.
#[divan::bench]
fn rejected_by_the_rate(bencher: Bencher) {
    let session_rate = Some(RateLimit { interval: std::time::Duration::from_secs(3600), burst: 1 });
    let quota = quota(TenantLimits { session_rate, ..all() });
    drop(quota.admit(clock::now()));
    bencher.bench_local(|| black_box(quota.admit(clock::now())).is_err());
}

/// What each read of a session's bytes asks for, and gives back: half of it, so that the bucket is touched twice.
fn a_read(bencher: Bencher, limits: TenantLimits) {
    let (quota, mut queue, mut purse) =
        (quota(limits), BandwidthQueue::default(), DirectionLimiter::default());
    bencher.bench_local(move || {
        let now = clock::now();
        let mut context =
            BandwidthContext { quota: &quota, queue: &mut queue, direction: Direction::ToClient };
        let grant =
            purse.request(&mut context, 1 << 20, Waker::noop(), Tick::default(), now).expect("a grant");
        black_box(purse.settle(&mut context, grant, 1 << 19, now))
    });
}

#[divan::bench]
fn read_without_limits(bencher: Bencher) {
    a_read(bencher, TenantLimits::default());
}

#[divan::bench]
fn read_with_all_limits(bencher: Bencher) {
    a_read(bencher, all());
}

/// Tenants of the measurement.
const TENANTS: u32 = 100_000;
/// Bytes that one of them may take.
const MOST: i64 = 512;

/// A configuration in which each tenant has one endpoint and every limit.
fn crowd() -> Config {
    let mut text = "[[listener]]\nname = \"web\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\npool = \"app\"\n\
        [[pool]]\nname = \"app\"\nbackends = [\"127.0.0.1:1\"]\nhealth = { kind = \"none\" }\n"
        .to_owned();
    for tenant in 0..TENANTS {
        writeln!(
            text,
            "[[tenant]]\nname = \"tenant-{tenant}\"\nendpoints = [\"vpce-{tenant:017x}\"]\n[tenant.limits]\n\
             sessions = 2000\nsession-rate = \"200/s\"\nto-backend = \"50MiB/s\"\nto-client = \"100MiB/s\""
        )
        .expect("a text takes what is written to it");
    }
    Config::parse("crowd.toml", &text).expect("a configuration without a fault")
}

/// The heap that is held for tenants that have never had a session, as it was asked for.
fn memory() {
    let mut config = None;
    let read = allocation_counter::measure(|| config = Some(Arc::new(crowd())));
    let config = config.expect("a configuration");
    let mut live = None;
    let held = allocation_counter::measure(|| {
        live = Some(LiveState::of(
            Arc::clone(&config),
            2,
            ProcessLimits { sessions: 50_000, pending: 1_000, pipes: 0 },
        ));
    });
    let quotas = live.map_or(0, |live| live.quotas.count());
    assert_eq!(quotas, TENANTS as usize);
    let each = held.bytes_current / i64::from(TENANTS);
    println!(
        "{each} bytes and {} allocations for each of {TENANTS} idle tenants with every limit; {} of these bytes are its quota",
        held.count_current / i64::from(TENANTS),
        size_of::<Quota>()
    );
    println!(
        "beside it the configuration that is in force, as it was read: {} bytes for each",
        read.bytes_current / i64::from(TENANTS)
    );
    assert!(each <= MOST, "{MOST} bytes are the most");
}

fn main() {
    memory();
    divan::main();
}
