//! The rules of limits, and what holds for a tenant that sets some of them itself.

use std::time::Duration;

use toml::Spanned;

use crate::config::error::ConfigError;
use crate::config::raw::{self, RawConfig};
use crate::config::section::{ParsedField, TableHead};
use crate::config::value::{ByteSize, BytesPerSecond, Count, RateInterval};
use crate::config::{BandwidthLimit, LimitMode, RateLimit, TenantLimits};

/// Every rule, for the defaults and for every tenant.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let defaults = &written.tenant_defaults.limits;
    if let Some(head) = &written.defaults {
        judge(head, defaults, &raw::RawLimits::default(), faults);
    }
    for tenant in &written.tenants {
        judge(&tenant.head, &tenant.limits, defaults, faults);
    }
}

/// Judges what a table says itself; what it takes from the defaults is judged there.
fn judge(head: &TableHead, own: &raw::RawLimits, defaults: &raw::RawLimits, faults: &mut Vec<ConfigError>) {
    let mut fault = |key: &str, offset: usize, message: String| {
        faults.push(head.fault_at(offset, &format!("limits.{key}"), message));
    };
    let bursts = [
        ("session-rate", "session-burst", &own.session_rate, &own.session_burst, &defaults.session_rate),
        ("datagram-rate", "datagram-burst", &own.datagram_rate, &own.datagram_burst, &defaults.datagram_rate),
    ];
    for (key, burst_key, rate, burst, default) in bursts {
        let burst = burst.spanned().filter(|_| rate.is_absent() && default.is_absent());
        if let Some(burst) = burst {
            fault(burst_key, burst.span().start, without(key, &burst.get_ref().0));
        }
    }
    let ways = [
        ("to-backend", "to-backend-burst", &own.to_backend, &own.to_backend_burst, &defaults.to_backend),
        ("to-client", "to-client-burst", &own.to_client, &own.to_client_burst, &defaults.to_client),
    ];
    for (key, burst_key, rate, burst, default) in ways {
        let Some(burst) = burst.spanned() else { continue };
        if let Some(message) = wrong_burst(key, rate, burst, default) {
            fault(burst_key, burst.span().start, message);
        }
    }
}

fn without(rate: &str, burst: &dyn std::fmt::Display) -> String {
    format!("must be absent where {rate} is, found {burst}")
}

fn wrong_burst(
    key: &str,
    rate: &ParsedField<BytesPerSecond>,
    burst: &Spanned<ByteSize>,
    default: &ParsedField<BytesPerSecond>,
) -> Option<String> {
    let burst = burst.get_ref().0;
    match own_or_default(rate, default) {
        ParsedField::Absent => Some(without(key, &format_args!("{burst}B"))),
        ParsedField::Faulty => None,
        ParsedField::Given(rate) if (1..=rate.get_ref().0).contains(&burst) => None,
        ParsedField::Given(rate) => {
            let most = rate.get_ref().0;
            Some(format!("must be from 1B to {most}B, a second's worth of {key}, found {burst}B"))
        }
    }
}

/// What holds: what a table sets itself, else the default.
pub(super) fn own_or_default<'f, T>(
    own: &'f ParsedField<T>,
    default: &'f ParsedField<T>,
) -> &'f ParsedField<T> {
    if own.is_absent() { default } else { own }
}

/// The effective limits of a tenant: each key that it does not set is the default's. A burst goes with its rate: a
/// tenant that sets a rate does not take the burst that was meant for another.
pub(super) fn effective(own: &raw::RawLimits, defaults: &raw::RawLimits) -> TenantLimits {
    let sessions = own_or_default(&own.sessions, &defaults.sessions);
    TenantLimits {
        mode: own_or_default(&own.mode, &defaults.mode).given().copied().unwrap_or(LimitMode::Enforce),
        sessions: sessions.given().map(|sessions| sessions.0),
        session_rate: rate(
            (&own.session_rate, &own.session_burst),
            (&defaults.session_rate, &defaults.session_burst),
            Duration::from_secs(1),
        ),
        to_backend: bandwidth(
            (&own.to_backend, &own.to_backend_burst),
            (&defaults.to_backend, &defaults.to_backend_burst),
        ),
        to_client: bandwidth(
            (&own.to_client, &own.to_client_burst),
            (&defaults.to_client, &defaults.to_client_burst),
        ),
        flows: own_or_default(&own.flows, &defaults.flows).given().map(|flows| flows.0),
        datagram_rate: rate(
            (&own.datagram_rate, &own.datagram_burst),
            (&defaults.datagram_rate, &defaults.datagram_burst),
            // Datagrams come in bursts of their own, and a second's worth of them would be one that hurts others.
            Duration::from_millis(100),
        ),
    }
}

/// The rate and burst that hold.
fn pair<'f, R, B>(
    own: (&'f ParsedField<R>, &'f ParsedField<B>),
    default: (&'f ParsedField<R>, &'f ParsedField<B>),
) -> Option<(&'f R, Option<&'f B>)> {
    let burst = if own.0.is_absent() { own_or_default(own.1, default.1) } else { own.1 };
    Some((own_or_default(own.0, default.0).given()?, burst.given()))
}

type RateKeys<'f> = (&'f ParsedField<RateInterval>, &'f ParsedField<Count<1>>);

/// A rate with its burst; by default that is what comes in during `worth`, and at least one.
fn rate(own: RateKeys<'_>, defaults: RateKeys<'_>, worth: Duration) -> Option<RateLimit> {
    let (RateInterval(interval), burst) = pair(own, defaults)?;
    let default = u64::try_from(worth.as_nanos() / interval.as_nanos().max(1)).unwrap_or(u64::MAX).max(1);
    Some(RateLimit { interval: *interval, burst: burst.map_or(default, |burst| burst.0) })
}

/// The least that a burst is by default: a read of a few segments, however slow the rate.
const LEAST_BURST: u64 = 16 * 1024;

type BandwidthKeys<'f> = (&'f ParsedField<BytesPerSecond>, &'f ParsedField<ByteSize>);

fn bandwidth(own: BandwidthKeys<'_>, defaults: BandwidthKeys<'_>) -> Option<BandwidthLimit> {
    let (BytesPerSecond(rate), burst) = pair(own, defaults)?;
    let default = (rate / 10).max(LEAST_BURST).min(*rate);
    Some(BandwidthLimit { bytes_per_second: *rate, burst: burst.map_or(default, |burst| burst.0) })
}
