//! Behaviour through real sockets: one module per behaviour, one harness for all.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test that cannot go on says so by panicking"
)]
#![allow(unreachable_pub, reason = "the harness says what is for its users")]

mod harness;
mod peers;
mod smoke;
