//! The rules of looking names up.

use super::shown;
use crate::config::error::ConfigError;
use crate::config::table::Headed;
use crate::config::tables::RawDns;

/// The lower bound of a time to live is at most the upper one.
pub(super) fn min_ttl_is_at_most_max_ttl(dns: &Headed<RawDns>) -> Option<ConfigError> {
    if dns.min_ttl.effective()? <= dns.max_ttl.effective()? {
        return None;
    }
    let field = if dns.min_ttl.is_absent() { &dns.max_ttl } else { &dns.min_ttl };
    let message = format!(
        "must keep min-ttl at or below max-ttl, found a min-ttl of {} and a max-ttl of {}",
        shown(&dns.min_ttl),
        shown(&dns.max_ttl)
    );
    Some(dns.fault(field, message))
}
