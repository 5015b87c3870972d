//! The fuzz targets (`fuzz/targets.rs`) with the stable toolchain: all seeds, and a few thousand mutations of them that are the same
//! in each run. `.ci/fuzz` runs them under libFuzzer.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

use std::fs;

use fastrand::Rng;
use vestibule::flow::freeze::FrozenFlow;
use vestibule::forward::freeze::RestoreError;
use vestibule::frozen::ThawError;
use vestibule::handover::records::{Transfer, TransferError, TransferKind};

#[path = "../fuzz/targets.rs"]
mod targets;

const SEED: u64 = 20_261_201;

/// Mutations that are made one after the other from a seed before the next one is taken.
const DEPTH: usize = 8;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(format!("fuzz/seeds/{target}")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no seeds");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Changes, removes, repeats or inserts bytes, or takes the rest from another seed.
fn mutate(rng: &mut Rng, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = rng.usize(..=input.len());
    let end = (at + rng.usize(..16)).min(input.len());
    match rng.u8(..6) {
        0 if at < input.len() => input[at] ^= 1 << rng.u8(..8),
        1 if at < input.len() => input[at] = rng.u8(..),
        2 => drop(input.drain(at..end)),
        3 => {
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        4 => {
            let other = &seeds[rng.usize(..seeds.len())];
            let from = rng.usize(..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        _ => input.insert(at, *rng.choice(b"\0\n \"={}[],.:0129azAZ\xff").unwrap()),
    }
}

fn run(name: &str, target: fn(&[u8]), rounds: usize) {
    let (seeds, mut rng) = (seeds(name), Rng::with_seed(SEED));
    target(b"");
    for seed in &seeds {
        target(seed);
    }
    for round in 0..rounds {
        let mut input = seeds[round % seeds.len()].clone();
        for _ in 0..DEPTH {
            mutate(&mut rng, &mut input, &seeds);
            target(&input);
        }
        let random: Vec<u8> = (0..rng.usize(..64)).map(|_| rng.u8(..)).collect();
        target(&random);
    }
}

#[test]
fn headers() {
    run("header", targets::header, 4_000);
}

#[test]
fn transfer_records() {
    run("transfer_record", targets::transfer_record, 2_000);
}

/// They are complete but for their descriptors: else mutations of them would not get beyond the JSON.
#[test]
fn seeds_of_transfer_records_lack_only_descriptors() {
    let transfer = |name| {
        let record = fs::read(format!("fuzz/seeds/transfer_record/{name}")).unwrap();
        Transfer { record, fds: Vec::new() }
    };
    let session = transfer("session").session().unwrap_err();
    assert_eq!(session, TransferError::Thaw(RestoreError::Descriptors.into()));
    let flow = FrozenFlow::new(transfer("flow").read(TransferKind::Flow).unwrap()).unwrap_err();
    assert_eq!(flow, ThawError::Malformed("expected one descriptor".to_owned()));
}

#[test]
fn probe_responses() {
    run("probe_response", targets::probe_response, 4_000);
}

#[test]
fn configurations() {
    run("configuration", targets::configuration, 250);
}
