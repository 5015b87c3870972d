//! The tables of a configuration, each key declared once.

mod listener;
mod pool;
mod process;
mod tenant;

pub use self::listener::ListenerConfig;
pub(super) use self::listener::RawListener;
pub use self::pool::{BackendConfig, EjectionConfig, PoolConfig, ProbeConfig, QueueConfig};
pub(super) use self::pool::{RawBackend, RawPool, RawProbe};
pub use self::process::{
    AdminConfig, DnsConfig, DrainConfig, HealthConfig, LogConfig, ProcessConfig, TimeoutConfig,
};
pub(super) use self::process::{
    RawAdmin, RawDns, RawDrain, RawHealth, RawInclude, RawLog, RawProcess, RawTimeouts,
};
pub use self::tenant::{BandwidthLimit, RateLimit, TenantConfig, TenantLimits};
pub(super) use self::tenant::{RawLimits, RawTenant, RawTenantDefaults};
use super::table::{RawTable, Table};

/// Every table, in the order of the reference.
pub static TABLES: [Table; 17] = [
    RawInclude::TABLE,
    RawProcess::TABLE,
    RawAdmin::TABLE,
    RawHealth::TABLE,
    RawLog::TABLE,
    RawTimeouts::TABLE,
    RawDrain::TABLE,
    RawDns::TABLE,
    RawListener::TABLE,
    RawPool::TABLE,
    RawBackend::TABLE,
    pool::RawQueue::TABLE,
    RawProbe::TABLE,
    pool::RawEjection::TABLE,
    RawTenant::TABLE,
    RawLimits::TABLE,
    RawTenantDefaults::TABLE,
];
