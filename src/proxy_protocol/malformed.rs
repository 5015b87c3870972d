//! Why bytes are not a valid header.

use crate::outcome::Reason;

/// Why the input is not a valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "`Why` describes each")]
pub enum MalformedHeader {
    NoSignature,
    BadVersion,
    BadCommand,
    BadFamily,
    WrongTransport,
    TooLong,
    ShortAddress,
    TlvOverrun,
    BadCrcTlv,
    CrcMismatch,
    AmbiguousEndpoint,
}

impl From<MalformedHeader> for Reason {
    fn from(reason: MalformedHeader) -> Self {
        match reason {
            MalformedHeader::NoSignature => Self::NoSignature,
            MalformedHeader::BadVersion => Self::BadVersion,
            MalformedHeader::BadCommand => Self::BadCommand,
            MalformedHeader::BadFamily => Self::BadFamily,
            MalformedHeader::WrongTransport => Self::WrongTransport,
            MalformedHeader::TooLong => Self::HeaderTooLong,
            MalformedHeader::ShortAddress => Self::ShortAddress,
            MalformedHeader::TlvOverrun => Self::TlvOverrun,
            MalformedHeader::BadCrcTlv => Self::BadCrcTlv,
            MalformedHeader::CrcMismatch => Self::CrcMismatch,
            MalformedHeader::AmbiguousEndpoint => Self::AmbiguousEndpoint,
        }
    }
}
