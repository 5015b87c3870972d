//! The rules of limits: a burst belongs to a rate.

use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::ParsedField;
use crate::config::table::{Field, Headed, Kind};
use crate::config::tables::RawLimits;
use crate::config::value::{ByteSize, BytesPerSecond};

/// Every rule, for the defaults and for every tenant.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let none = RawLimits::default();
    let defaults = written.tenant_defaults.as_ref();
    if let Some(table) = defaults {
        judge(table, &table.limits, &none, faults);
    }
    for tenant in &written.tenants {
        judge(tenant, &tenant.limits, defaults.map_or(&none, |defaults| &defaults.limits), faults);
    }
}

/// Judges what a table says itself; what it takes from the defaults is judged there.
fn judge<R>(table: &Headed<R>, own: &RawLimits, defaults: &RawLimits, faults: &mut Vec<ConfigError>) {
    let bursts = [
        (&own.session_rate, &own.session_burst, &defaults.session_rate),
        (&own.datagram_rate, &own.datagram_burst, &defaults.datagram_rate),
    ];
    for (rate, burst, default) in bursts {
        let has_no_rate = rate.is_absent() && default.is_absent();
        if let Some(found) = burst.given().filter(|_| has_no_rate) {
            faults.push(table.fault(burst, without(rate, found)));
        }
    }
    let bandwidths = [
        (&own.to_backend, &own.to_backend_burst, &defaults.to_backend),
        (&own.to_client, &own.to_client_burst, &defaults.to_client),
    ];
    for (rate, burst, default) in bandwidths {
        faults.extend(wrong_burst(rate, burst, default).map(|message| table.fault(burst, message)));
    }
}

fn without<K: Kind>(rate: &Field<K>, burst: &dyn std::fmt::Display) -> String {
    format!("must be absent where {} is, found {burst}", rate.key.name)
}

fn wrong_burst(
    own: &Field<BytesPerSecond>,
    burst: &Field<ByteSize>,
    default: &Field<BytesPerSecond>,
) -> Option<String> {
    let burst = *burst.given()?;
    match if own.is_absent() { &**default } else { &**own } {
        ParsedField::Absent => Some(without(own, &format_args!("{burst}B"))),
        ParsedField::Faulty => None,
        ParsedField::Given(rate) if (1..=*rate.get_ref()).contains(&burst) => None,
        ParsedField::Given(rate) => Some(format!(
            "must be from 1B to {}B, a second's worth of {}, found {burst}B",
            rate.get_ref(),
            own.key.name
        )),
    }
}
