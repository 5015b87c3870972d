//! Results of DNS lookups: a closed set, so that they can be metric labels.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The result of a lookup, from the most to the least informative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LookupResult {
    /// With addresses.
    Found,
    /// There is no such name.
    NoSuchName,
    /// The name has no address, or its service is not available.
    NoAddress,
    /// Every address in the answers is one that no answer may contain.
    AddressRefused,
    /// A server does not answer us.
    Refused,
    /// A server could not find out, or not understand.
    ServerFailure,
    /// The answer could not be read.
    Malformed,
    /// There was no answer in time.
    Timeout,
    /// No server could be reached.
    Network,
    /// Descriptors or memory were short here.
    Shortage,
}

impl LookupResult {
    /// Every result.
    pub const ALL: [Self; 10] = [
        Self::Found,
        Self::NoSuchName,
        Self::NoAddress,
        Self::AddressRefused,
        Self::Refused,
        Self::ServerFailure,
        Self::Malformed,
        Self::Timeout,
        Self::Network,
        Self::Shortage,
    ];

    /// The label in log, metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::NoSuchName => "no_such_name",
            Self::NoAddress => "no_address",
            Self::AddressRefused => "address_refused",
            Self::Refused => "refused",
            Self::ServerFailure => "server_failure",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
            Self::Network => "network",
            Self::Shortage => "shortage",
        }
    }

    /// Whether the result is definite; other results may change at the next try.
    #[must_use]
    pub const fn is_answer(self) -> bool {
        matches!(self, Self::Found | Self::NoSuchName | Self::NoAddress)
    }
}

/// The lookups of one name by result.
#[derive(Debug, Default)]
pub struct LookupCounters {
    counts: [AtomicU64; LookupResult::ALL.len()],
    first_is_over: AtomicBool,
}

impl LookupCounters {
    /// How many ended so.
    pub fn counts(&self) -> impl Iterator<Item = (LookupResult, u64)> + '_ {
        LookupResult::ALL.into_iter().zip(self.counts.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Counts one.
    pub fn count(&self, lookup: LookupResult) {
        if let Some(count) = self.counts.get(lookup as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records that the first lookup is over, whatever its result, and that the pool has the addresses it found.
    pub fn finish_first(&self) {
        self.first_is_over.store(true, Ordering::Release);
    }

    /// Whether the first lookup is over.
    #[must_use]
    pub fn first_is_over(&self) -> bool {
        self.first_is_over.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_has_its_own_label_and_counter() {
        let lookups = LookupCounters::default();
        for (times, lookup) in (1..).zip(LookupResult::ALL) {
            (0..times).for_each(|_| lookups.count(lookup));
        }
        let counts: Vec<_> = lookups.counts().collect();
        assert_eq!(counts, LookupResult::ALL.into_iter().zip(1..).collect::<Vec<_>>());
        let words: std::collections::BTreeSet<_> = LookupResult::ALL.map(LookupResult::as_str).into();
        assert_eq!(words.len(), LookupResult::ALL.len());
    }
}
