//! The atomic numbers that the rules of admission are written on: the standard library's here, loom's in tests/loom.rs, which
//! compiles the same sources and goes through every order of their steps.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
