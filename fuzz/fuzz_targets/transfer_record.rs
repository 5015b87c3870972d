//! Runs the target `transfer_record` of `targets.rs` under libFuzzer.
#![no_main]
#![allow(dead_code, reason = "each program uses one of the targets")]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::transfer_record(input));
