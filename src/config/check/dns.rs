//! The rules of looking names up.

use crate::config::error::ConfigError;
use crate::config::raw::{RawConfig, RawDns};
use crate::config::section::TableHead;

use super::build::{MAX_TTL, MIN_TTL};
use super::{no_time, shown};

/// Every rule.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let dns = &written.dns;
    let Some(head) = &dns.head else { return };
    dns_timeouts_are_positive(head, dns, faults);
    faults.extend(the_least_time_to_live_is_at_most_the_most(head, dns));
}

/// An answer that counts for no time at all would be asked for without end.
fn dns_timeouts_are_positive(head: &TableHead, dns: &RawDns, faults: &mut Vec<ConfigError>) {
    for (key, time) in [("timeout", &dns.timeout), ("min-ttl", &dns.min_ttl), ("max-ttl", &dns.max_ttl)] {
        faults.extend(no_time(time).map(|(offset, message)| head.fault_at(offset, key, message)));
    }
}

fn the_least_time_to_live_is_at_most_the_most(head: &TableHead, dns: &RawDns) -> Option<ConfigError> {
    let (min, max) = (*dns.min_ttl.effective(&MIN_TTL)?, *dns.max_ttl.effective(&MAX_TTL)?);
    if min <= max || max.is_zero() {
        return None;
    }
    let (key, at) = match (dns.min_ttl.spanned(), dns.max_ttl.spanned()) {
        (Some(min), _) => ("min-ttl", min.span().start),
        (None, max) => ("max-ttl", max?.span().start),
    };
    let message = format!(
        "must keep min-ttl at or below max-ttl, found a min-ttl of {} and a max-ttl of {}",
        shown(min, &dns.min_ttl),
        shown(max, &dns.max_ttl)
    );
    Some(head.fault_at(at, key, message))
}
