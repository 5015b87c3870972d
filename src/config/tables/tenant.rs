//! Tenants, their limits, and the defaults of both.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::section::Section;
use crate::config::table::{Field, Key, Kind, List, Pairs, Presence, RawTable, Table, table};
use crate::config::value::{
    ByteSize, BytesPerSecond, Count, Hours, RateInterval, SessionCount, TableName, TenantState,
};
use crate::config::{LimitMode, OnRevoke};
use crate::id::EndpointId;

table! {
    "[[tenant]]", reload, "A customer: a set of endpoints with limits.";
    RawTenant => TenantConfig;
    keys {
        "name" name: TableName => String, required "acme", "Its name, unique among tenants.";
        "endpoints" endpoints: List<EndpointId> => Vec<EndpointId>, usual ["vpce-08d2bf15fac5001c9"],
            "VPC endpoint IDs; each belongs to one tenant only.";
        "pool" pool: String => Option<String>, optional "shared",
            "Overrides the listener's pool. Default: the listener's.";
        "routes" routes: Pairs => BTreeMap<String, String>, optional { postgres = "acme-db" },
            "Listener name = pool; overrides both. Each tenant needs a pool on each listener.";
        "state" enabled: TenantState => bool, default "enabled",
            "disabled: sessions end with the reason `tenant_disabled`.";
        "labels" labels: Pairs => BTreeMap<String, String>, optional { plan = "gold" }, "Copied to the access log.";
        "on-revoke" on_revoke: OnRevoke => OnRevoke, default "end",
            "Open sessions and flows when a reload disables or removes the tenant or takes away their endpoint.";
        "revoke-grace" revoke_grace: Hours<1> => Duration, default "0s",
            "With on-revoke = \"end\": time until they are ended.";
    }
    tables {
        "limits" limits: RawLimits => TenantLimits, "What it may take at most.";
    }
}

table! {
    "[tenant.limits]" in "limits.", reload, "Each is shared by all sessions of the tenant on all workers.";
    RawLimits => #[derive(Copy, Default)] TenantLimits;
    keys {
        "mode" mode: LimitMode => LimitMode, default "enforce",
            "observe: only count what would be rejected, delayed or dropped.";
        "sessions" sessions: SessionCount => Option<usize>, optional 2000, "Open TCP sessions.";
        "session-rate" session_rate: RateInterval, optional "200/s", "New TCP sessions per s, m or h.";
        "session-burst" session_burst: Count<u64, 1>, optional 400,
            "Size of the token bucket. Default: one second of the rate, at least 1.";
        "to-backend" to_backend: BytesPerSecond, optional "50MiB/s",
            "Bytes from client to backend; excess TCP bytes wait.";
        "to-backend-burst" to_backend_burst: ByteSize, optional "8MiB",
            "Size of the token bucket, at most one second of the rate. Default and minimum: a tenth of a second; the default is at \
             least 16KiB.";
        "to-client" to_client: BytesPerSecond, optional "100MiB/s", "Bytes from backend to client.";
        "to-client-burst" to_client_burst: ByteSize, optional "10MiB",
            "Size of the token bucket. Default: as for to-backend-burst.";
        "flows" flows: SessionCount => Option<usize>, optional 5000, "Open UDP flows.";
        "datagram-rate" datagram_rate: RateInterval, optional "20000/s",
            "UDP datagrams in both directions together; excess datagrams are dropped.";
        "datagram-burst" datagram_burst: Count<u64, 1>, optional 2000,
            "Size of the token bucket. Default: a tenth of a second of the rate, at least 1.";
    }
    made {
        "New sessions." session_rate: Option<RateLimit> = session_rate;
        "Bytes from clients to backends." to_backend: Option<BandwidthLimit> = to_backend;
        "Bytes from backends to clients." to_client: Option<BandwidthLimit> = to_client;
        "Datagrams of flows, both directions together." datagram_rate: Option<RateLimit> = datagram_rate;
    }
}

table! {
    "[tenant-defaults]", reload,
        "For each key that a tenant does not set. [tenant-defaults.limits] has the keys of [tenant.limits]. A burst belongs to its \
         rate: a tenant that sets a rate does not inherit the burst.";
    RawTenantDefaults;
    keys {
        "on-revoke" on_revoke: OnRevoke, default "end", "As in [[tenant]].";
        "revoke-grace" revoke_grace: Hours<1>, default "0s", "As in [[tenant]].";
    }
    tables {
        "limits" limits: RawLimits;
    }
}

impl RawTenant {
    /// Takes what it does not set from the defaults. A burst goes with its rate: a tenant that sets a rate does not take the
    /// burst that was meant for another.
    pub(in crate::config) fn with_defaults(mut self, defaults: &RawTenantDefaults) -> Self {
        self.on_revoke.inherit(&defaults.on_revoke);
        self.revoke_grace.inherit(&defaults.revoke_grace);
        let own = &self.limits;
        let mut limits = defaults.limits.clone();
        if !own.session_rate.is_absent() {
            limits.session_burst.clear();
        }
        if !own.datagram_rate.is_absent() {
            limits.datagram_burst.clear();
        }
        if !own.to_backend.is_absent() {
            limits.to_backend_burst.clear();
        }
        if !own.to_client.is_absent() {
            limits.to_client_burst.clear();
        }
        self.limits.inherit(&limits);
        self
    }
}

/// A rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// From one to the next, on average; never zero.
    pub interval: Duration,
    /// So many at once after a silence; at least 1.
    pub burst: u64,
}

/// A bandwidth limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandwidthLimit {
    /// Bytes in each second, on average; at least 1,024.
    pub bytes_per_second: u64,
    /// Bytes at once after a silence; at least 1, and at most a second's worth.
    pub burst: u64,
}

fn session_rate(raw: &RawLimits) -> Option<RateLimit> {
    rate(&raw.session_rate, &raw.session_burst, Duration::from_secs(1))
}

/// Datagrams come in bursts of their own, and a second's worth of them would be one that hurts others.
fn datagram_rate(raw: &RawLimits) -> Option<RateLimit> {
    rate(&raw.datagram_rate, &raw.datagram_burst, Duration::from_millis(100))
}

/// A rate with its burst; by default that is what comes in during `worth`, and at least one.
fn rate(interval: &Field<RateInterval>, burst: &Field<Count<u64, 1>>, worth: Duration) -> Option<RateLimit> {
    let interval = *interval.given()?;
    let default = u64::try_from(worth.as_nanos() / interval.as_nanos().max(1)).unwrap_or(u64::MAX).max(1);
    Some(RateLimit { interval, burst: burst.given().copied().unwrap_or(default) })
}

fn to_backend(raw: &RawLimits) -> Option<BandwidthLimit> {
    bandwidth(&raw.to_backend, &raw.to_backend_burst)
}

fn to_client(raw: &RawLimits) -> Option<BandwidthLimit> {
    bandwidth(&raw.to_client, &raw.to_client_burst)
}

fn bandwidth(rate: &Field<BytesPerSecond>, burst: &Field<ByteSize>) -> Option<BandwidthLimit> {
    /// The least that a burst is by default: a read of a few segments, however slow the rate.
    const LEAST_BURST: u64 = 16 * 1024;
    let rate = *rate.given()?;
    let default = (rate / 10).max(LEAST_BURST).min(rate);
    Some(BandwidthLimit { bytes_per_second: rate, burst: burst.given().copied().unwrap_or(default) })
}
