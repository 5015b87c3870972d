//! The configuration as it is written in all files, before the rules that join several keys.

use super::error::ConfigError;
use super::section::TableHead;
use super::table::Headed;
use super::tables::{
    RawAdmin, RawDns, RawDrain, RawHealth, RawListener, RawLog, RawPool, RawProcess, RawTenant,
    RawTenantDefaults, RawTimeouts,
};

/// What was written, and its syntax errors.
#[derive(Default)]
pub(super) struct RawConfig {
    /// The main file as a whole.
    pub(super) head: Option<TableHead>,
    pub(super) faults: Vec<ConfigError>,
    pub(super) process: Option<Headed<RawProcess>>,
    pub(super) admin: Option<Headed<RawAdmin>>,
    pub(super) health: Option<Headed<RawHealth>>,
    pub(super) log: Option<Headed<RawLog>>,
    pub(super) timeouts: Option<Headed<RawTimeouts>>,
    pub(super) drain: Option<Headed<RawDrain>>,
    pub(super) dns: Option<Headed<RawDns>>,
    pub(super) listeners: Vec<Headed<RawListener>>,
    pub(super) pools: Vec<Headed<RawPool>>,
    pub(super) tenants: Vec<Headed<RawTenant>>,
    pub(super) tenant_defaults: Option<Headed<RawTenantDefaults>>,
}
