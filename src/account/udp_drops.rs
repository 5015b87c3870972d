//! Reasons to drop a datagram of a flow: a closed set, so that they can be metric labels.

/// The reason why one datagram was dropped while its flow continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DatagramDrop {
    /// The tenant's `limits.datagram-rate`.
    Rate,
    /// The tenant's bandwidth in this direction: datagrams do not wait for it.
    Bandwidth,
    /// With the header that `send-proxy` puts in front it is longer than a datagram may be, or longer than the way allows.
    TooLong,
    /// The socket's buffer is full.
    Full,
    /// The kernel is short of memory.
    Shortage,
    /// The backend's host answered with ICMP port unreachable.
    Refused,
    /// There is no way there, or the kernel refused it for another reason.
    Unreachable,
}

impl DatagramDrop {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Rate,
        Self::Bandwidth,
        Self::TooLong,
        Self::Full,
        Self::Shortage,
        Self::Refused,
        Self::Unreachable,
    ];

    /// Those that a tenant's limits are the reason of: the first of all.
    pub const LIMITS: [Self; 2] = [Self::Rate, Self::Bandwidth];

    /// The label in metrics and documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Bandwidth => "bandwidth",
            Self::TooLong => "too_long",
            Self::Full => "full",
            Self::Shortage => "shortage",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_drop_reason_has_its_index_and_label() {
        assert!(DatagramDrop::ALL.into_iter().enumerate().all(|(place, drop)| drop as usize == place));
        assert_eq!(DatagramDrop::ALL[..DatagramDrop::LIMITS.len()], DatagramDrop::LIMITS);
        assert_eq!(
            DatagramDrop::ALL.map(DatagramDrop::as_str).into_iter().collect::<BTreeSet<_>>().len(),
            DatagramDrop::ALL.len()
        );
    }
}
