//! ns per lookup: whose traffic it is, in a directory of 10, 1,000 and 100,000 tenants. `cargo bench --bench routing`
//!
//! The IDs come in random order, so that the large directory's figure is that of a cold cache line, not of one ID
//! asked for again and again.

use std::sync::Arc;

use divan::{Bencher, black_box};
use vestibule::account::Labels;
use vestibule::id::EndpointClaim;
use vestibule::tenant::{Tenant, TenantDirectory, TenantRules};

const SIZES: [u32; 3] = [10, 1_000, 100_000];
const STRICT: TenantRules = TenantRules::ByEndpoint { absent: None, unknown: None };

/// Random endpoints; the same ones in each run.
fn claims(count: u32, seed: u64) -> Vec<EndpointClaim> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut text = || format!("vpce-{:x}{:016x}", random.u8(..16), random.u64(..));
    (0..count).map(|_| EndpointClaim::from_tlv(Some(text().as_bytes()))).collect()
}

/// A tenant for each of these endpoints.
fn directory(claims: &[EndpointClaim]) -> TenantDirectory {
    let labels = Labels::default();
    let tenant = |place: usize| Tenant {
        label: labels.intern(&format!("tenant-{place}")),
        labels: None,
        enabled: true,
        pool: None,
        routes: Box::default(),
        quota: Arc::default(),
    };
    let tenants = (0..claims.len()).map(tenant).collect();
    TenantDirectory::new(tenants, claims.iter().filter_map(|claim| claim.id()).zip(0..))
}

#[divan::bench(args = SIZES)]
fn known(bencher: Bencher, tenants: u32) {
    let mut claims = claims(tenants, 1);
    let directory = directory(&claims);
    fastrand::Rng::with_seed(2).shuffle(&mut claims);
    assert!(claims.iter().all(|claim| directory.find(*claim, STRICT).is_ok()));
    let mut next = claims.iter().cycle();
    bencher.bench_local(|| {
        let claim = next.next().copied().unwrap_or_default();
        directory.find(black_box(claim), STRICT).map(|tenant| tenant.enabled)
    });
}

#[divan::bench(args = SIZES)]
fn unknown(bencher: Bencher, tenants: u32) {
    let directory = directory(&claims(tenants, 1));
    let strangers = claims(tenants, 3);
    assert!(strangers.iter().all(|claim| directory.find(*claim, STRICT).is_err()));
    let mut next = strangers.iter().cycle();
    bencher.bench_local(|| {
        let claim = next.next().copied().unwrap_or_default();
        directory.find(black_box(claim), STRICT).is_err()
    });
}

fn main() {
    divan::main();
}
