//! The address family of a header (PROXY protocol, section 2.2).

/// The address family of the header's 14th byte (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AddressFamily {
    Unspecified,
    Inet,
    Inet6,
    Unix,
}

impl AddressFamily {
    /// The length of the address block.
    pub(super) fn address_len(self) -> usize {
        match self {
            Self::Unspecified => 0,
            Self::Inet => 12,
            Self::Inet6 => 36,
            Self::Unix => 216,
        }
    }
}
