//! vestibule: a layer-4 proxy for the provider's side of AWS PrivateLink. It identifies the tenant by the VPC endpoint ID in
//! the PROXY protocol v2 header and forwards to that tenant's backends.
//!
//! # Map of the crate
//!
//! A TCP session passes through these modules in this order; [`session`] contains the whole path in one function:
//!
//! | step | module | result |
//! |---|---|---|
//! | accept a connection | [`accept`] | a socket |
//! | read the PROXY header | [`header`], with the codec [`proxy_protocol`] | client and endpoint ID |
//! | find the tenant | [`tenant`] | tenant and pool |
//! | apply its limits | [`admission`] | a permit |
//! | pick a backend | [`pool`] | a backend |
//! | connect to it | [`connect`] | a second socket |
//! | forward bytes | [`forward`] | an [`outcome::Outcome`] |
//! | count and log | [`account`] | metrics, access log |
//!
//! UDP flows take the same steps in [`flow`]. Around the path:
//!
//! - [`server`] owns the process: worker threads, listeners, reload, drain, takeover.
//! - [`config`] reads and checks the configuration; [`state`] holds the running one as a snapshot.
//! - [`probe`] checks backends, [`resolve`] looks names up.
//! - [`admin`] serves the pages, the health check and the admin socket; [`cli`] is the command line.
//! - [`handover`] is the whole takeover: it moves sockets, sessions and flows to another process, [`frozen`] in between.
//! - [`lab`] emulates load balancer, VPCs and backends for the demo, the load generator and the tests;
//!   only with the cargo feature `lab`, which is on by default.
//! - [`id`], [`addr`], [`clock`], [`outcome`], [`fair_share`], [`fault`], [`build_info`], [`socket_options`]
//!   and [`session_context`] are values and
//!   rules that the others use.
//!
//! A module imports only from modules on lower floors; docs/architecture.md has the table, and `tests/tidy.rs` checks it.

pub mod accept;
pub mod account;
pub mod addr;
pub mod admin;
pub mod admission;
mod atomic;
pub mod build_info;
pub mod cli;
pub mod clock;
pub mod config;
pub mod connect;
pub mod fair_share;
pub mod fault;
pub mod flow;
pub mod forward;
pub mod frozen;
pub mod handover;
pub mod header;
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
pub mod socket_options;
pub mod state;
pub mod tenant;
