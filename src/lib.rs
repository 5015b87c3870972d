//! vestibule: a layer-4 proxy that knows its tenants.

pub mod accept;
pub mod account;
pub mod addr;
pub mod admin;
pub mod admission;
mod atomic;
pub mod cli;
pub mod clock;
pub mod config;
pub mod connect;
pub mod fault;
pub mod flow;
pub mod forward;
pub mod header;
pub mod id;
pub mod lab;
pub mod life;
pub mod outcome;
pub mod pool;
pub mod probe;
pub mod resolve;
pub mod server;
pub mod session;
pub mod state;
pub mod takeover;
pub mod tenant;
pub mod wire;
