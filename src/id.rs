//! Names that travel: the VPC endpoint's ID and the session's number.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The ID of an interface VPC endpoint: `vpce-` and 17 hexadecimal digits, or 8 for those made before 2018.
///
/// Kept as a number, so that a directory of 100,000 tenants compares and hashes two words and no text.
/// Only the well-formed `^vpce-([0-9a-f]{8}|[0-9a-f]{17})$` can be held; the form is AWS's
/// ("Longer format resource IDs", Amazon EC2 user guide).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId {
    /// The last 16 digits, or all 8 of a short ID.
    low: u64,
    /// The first digit of a long ID, or [`EndpointId::SHORT`].
    high: u8,
}

const PREFIX: &[u8; 5] = b"vpce-";
/// What `HEX` holds for a byte that is no lower-case hexadecimal digit.
const NO_DIGIT: u8 = 0xF0;
static HEX: [u8; 256] = hex_values();

const fn hex_values() -> [u8; 256] {
    let mut table = [NO_DIGIT; 256];
    let mut byte = 0_u8;
    loop {
        let value = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => NO_DIGIT,
        };
        #[expect(clippy::indexing_slicing, reason = "a u8 indexes 256 places")]
        {
            table[byte as usize] = value;
        }
        if byte == u8::MAX {
            return table;
        }
        byte += 1;
    }
}

#[expect(clippy::indexing_slicing, reason = "a u8 indexes 256 places")]
#[inline]
fn digit(byte: u8) -> u8 {
    HEX[usize::from(byte)]
}

impl EndpointId {
    const SHORT: u8 = 0x10;

    /// Its digits as a number that no other ID has.
    #[must_use]
    pub fn number(self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }

    /// Reads an ID as it stands in the AWS TLV; `None` where it is not well-formed.
    #[inline]
    #[must_use]
    pub fn from_bytes(text: &[u8]) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        let (first, low) = match digits.len() {
            17 => digits.split_first().map(|(first, rest)| (digit(*first), rest))?,
            8 => (Self::SHORT, digits),
            _ => return None,
        };
        let mut value = 0_u64;
        let mut seen = first & !Self::SHORT;
        for &byte in low {
            let nibble = digit(byte);
            seen |= nibble;
            value = (value << 4) | u64::from(nibble);
        }
        (seen & NO_DIGIT == 0).then_some(Self { low: value, high: first })
    }

    /// The digits behind the prefix: the first of a long ID, the rest as a number, and how many the rest has.
    #[must_use]
    pub const fn digits(self) -> (Option<u8>, u64, u32) {
        if self.high == Self::SHORT { (None, self.low, 8) } else { (Some(self.high), self.low, 16) }
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.high == Self::SHORT {
            write!(f, "vpce-{:08x}", self.low)
        } else {
            write!(f, "vpce-{:x}{:016x}", self.high, self.low)
        }
    }
}

impl fmt::Debug for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for EndpointId {
    type Err = MalformedEndpointId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_bytes(text.as_bytes()).ok_or(MalformedEndpointId)
    }
}

impl Serialize for EndpointId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EndpointId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The text is not an endpoint ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be \"vpce-\" and 17 (or 8) lower-case hexadecimal digits")]
pub struct MalformedEndpointId;

/// The VPC endpoint ID of a header, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EndpointClaim {
    /// It names none.
    #[default]
    Absent,
    /// It names one by something that is no endpoint ID: an unknown one.
    Malformed,
    /// It names this one.
    Id(EndpointId),
}

impl EndpointClaim {
    /// Reads the AWS TLV's value, where there is one.
    #[inline]
    #[must_use]
    pub fn from_tlv(value: Option<&[u8]>) -> Self {
        value.map_or(Self::Absent, |id| EndpointId::from_bytes(id).map_or(Self::Malformed, Self::Id))
    }

    /// What [`from_tlv`](Self::from_tlv) reads back as the same claim.
    #[must_use]
    pub fn to_record(self) -> Option<String> {
        match self {
            Self::Absent => None,
            Self::Malformed => Some(String::new()),
            Self::Id(id) => Some(id.to_string()),
        }
    }

    /// The ID, where there is a well-formed one.
    #[must_use]
    pub fn id(self) -> Option<EndpointId> {
        match self {
            Self::Id(id) => Some(id),
            Self::Absent | Self::Malformed => None,
        }
    }
}

/// The number of a session, unique within the process: the worker in the top 16 bits, then a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(u64);

impl SessionId {
    /// The `count`-th session of a worker.
    #[must_use]
    pub fn new(worker: u16, count: u64) -> Self {
        Self(u64::from(worker) << 48 | (count & 0xFFFF_FFFF_FFFF))
    }

    /// The session of this number, which another process has given it.
    #[must_use]
    pub const fn of_number(number: u64) -> Self {
        Self(number)
    }

    /// The number itself.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lengths_are_read_and_written_back() {
        for text in
            ["vpce-08d2bf15fac5001c9", "vpce-00000000000000000", "vpce-fffffffffffffffff", "vpce-1a2b3c4d"]
        {
            let id = EndpointId::from_bytes(text.as_bytes()).unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!(format!("{id:?}"), text);
            assert_eq!(text.parse(), Ok(id));
        }
    }

    #[test]
    fn short_id_differs_from_long_id_of_the_same_value() {
        assert_ne!(
            EndpointId::from_bytes(b"vpce-1a2b3c4d"),
            EndpointId::from_bytes(b"vpce-0000000001a2b3c4d")
        );
    }

    #[test]
    fn malformed_endpoint_id_is_refused() {
        for text in [
            "",
            "vpce-",
            "vpce",
            "vpcx-08d2bf15fac5001c9",
            "vpce-08d2bf15fac5001c",
            "vpce-08d2bf15fac5001c90",
            "vpce-08D2bf15fac5001c9",
            "vpce-G8d2bf15fac5001c9",
            "vpce-g8d2bf15fac5001c9",
            "vpce-08d2bf15fac5001cg",
            "vpce-1a2b3c4",
            "vpce-1a2b3c4z",
            "vpce-\u{10}a2b3c4d",
        ] {
            assert_eq!(EndpointId::from_bytes(text.as_bytes()), None, "{text}");
            assert_eq!(text.parse::<EndpointId>(), Err(MalformedEndpointId));
        }
    }

    #[test]
    fn every_byte_in_every_place_but_a_digit_is_refused() {
        let good = *b"vpce-08d2bf15fac5001c9";
        for place in 0..good.len() {
            for byte in 0..=u8::MAX {
                let mut text = good;
                text[place] = byte;
                let fits = if place < 5 {
                    byte == good[place]
                } else {
                    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
                };
                assert_eq!(EndpointId::from_bytes(&text).is_some(), fits, "{byte} at {place}");
            }
        }
    }

    #[test]
    fn claimed_endpoint_is_an_id_only_if_well_formed() {
        let id = EndpointId::from_bytes(b"vpce-1a2b3c4d").unwrap();
        assert_eq!(EndpointClaim::from_tlv(None), EndpointClaim::Absent);
        assert_eq!(EndpointClaim::from_tlv(Some(b"vpce-1a2b3c4d")), EndpointClaim::Id(id));
        assert_eq!(EndpointClaim::from_tlv(Some(b"")), EndpointClaim::Malformed);
        assert_eq!(
            [EndpointClaim::Absent, EndpointClaim::Malformed, EndpointClaim::Id(id)].map(EndpointClaim::id),
            [None, None, Some(id)]
        );
    }

    #[test]
    fn session_id_contains_its_worker() {
        assert_eq!(SessionId::new(3, 7).to_string(), "0003000000000007");
    }
}
