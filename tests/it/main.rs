//! Behaviour through real sockets: one module per behaviour, one harness for all.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    dead_code,
    unreachable_pub,
    reason = "a test that cannot go on says so by panicking, and what it uses of the harness is public to it alone"
)]

mod access_log;
mod activation;
mod admin;
mod against;
mod balance;
mod bandwidth;
mod buffers;
mod checks;
mod comeback;
mod control;
mod dns;
mod dns_answers;
mod dnsdist;
mod ejection;
mod ferry;
mod first_bytes;
mod flow;
mod forward;
mod harness;
mod header;
mod health;
mod limits;
mod listener;
mod load;
mod load_udp;
mod maglev;
mod malformed;
mod mixed;
mod moving;
mod names;
mod naming;
mod notify;
mod peers;
mod pending;
mod pool;
mod ports;
mod probe;
mod process;
mod queue;
mod quic;
mod raw;
mod reload;
mod removed;
mod retry;
mod revoke;
mod send_proxy;
mod sessions;
mod share;
mod shortage;
mod signals;
mod smoke;
mod splice;
mod takeover;
mod tenant;
mod timeouts;
mod version;
mod watch;
