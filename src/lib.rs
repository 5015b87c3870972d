//! vestibule: a layer-4 proxy for the provider's side of AWS PrivateLink. It identifies the tenant by the VPC endpoint ID in
//! the PROXY protocol v2 header and forwards to that tenant's backends.
//!
//! The crate is no interface for others: the binary needs [`cli`] alone, and whatever else is public is used by the tests,
//! benches and fuzz targets of this package. Modules without a link below are private.
//!
//! # Map of the crate
//!
//! A TCP session passes through these modules in this order; [`session`] contains the whole path in one function:
//!
//! | step | module | result |
//! |---|---|---|
//! | accept a connection | `accept` | a socket |
//! | read the PROXY header | `header`, with the codec [`proxy_protocol`] | client and endpoint ID |
//! | find the tenant | [`tenant`] | tenant and pool |
//! | apply its limits | [`admission`] | a permit |
//! | pick a backend | [`pool`] | a backend |
//! | connect to it | `connect` | a second socket |
//! | forward bytes | [`forward`] | an [`outcome::Outcome`] |
//! | count and log | [`account`] | metrics, access log |
//!
//! UDP flows take the same steps in [`flow`]. Around the path:
//!
//! | module | contents |
//! |---|---|
//! | [`server`] | the process: worker threads, listeners, reload, drain, takeover |
//! | [`config`], [`state`] | reads and checks the configuration; the running one as a snapshot |
//! | [`probe`], [`resolve`] | checks of backends; DNS |
//! | [`handover`] | the whole takeover: sockets, sessions and flows move to another process, [`frozen`] in between |
//! | `admin`, [`cli`] | pages, health check and admin socket; the command line |
//! | [`session_context`] | a session's deadline and counters, and what its steps share with other sessions of the worker |
//! | [`id`], [`addr`], [`clock`], [`outcome`], [`fair_share`], [`fault`], [`build_info`], `socket_options`, `atomic` | values and rules that the others use |
//! | [`lab`] | load balancer, VPCs and backends for the demo, the load generator and the tests; cargo feature `lab`, on by default |
//!
//! A module imports only from modules on lower floors; docs/architecture.md has the table, and `tests/tidy.rs` checks it.

mod accept;
pub mod account;
pub mod addr;
mod admin;
pub mod admission;
mod atomic;
pub mod build_info;
pub mod cli;
pub mod clock;
pub mod config;
mod connect;
pub mod fair_share;
pub mod fault;
pub mod flow;
pub mod forward;
pub mod frozen;
pub mod handover;
mod header;
pub mod id;
#[cfg(feature = "lab")]
pub mod lab;
pub mod outcome;
pub mod pool;
pub mod probe;
pub mod proxy_protocol;
pub mod resolve;
pub mod server;
pub mod session;
pub mod session_context;
mod socket_options;
pub mod state;
pub mod tenant;
