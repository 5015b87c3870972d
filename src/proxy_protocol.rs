//! The PROXY protocol, version 2: a parser and an encoder without any I/O.
//!
//! Source: "The PROXY protocol, versions 1 & 2", <https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>,
//! sections 2.2 to 2.2.3, and the AWS guide for Network Load Balancers, "Proxy protocol" (the TLV 0xEA).

mod crc;
mod encode;
mod family;
mod header;
mod malformed;
mod nlb;
mod parse;
mod tlv;

pub use self::encode::{HeaderBuilder, HeaderTooLong, reseal};
pub use self::header::{Addresses, Header, HeaderCommand, ParsedHeader, ParserRules, Transport};
pub use self::malformed::MalformedHeader;
pub use self::parse::parse;
pub use self::tlv::{Tlv, Tlvs};

/// The twelve bytes that open every version 2 header.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// The bytes before the addresses: signature, version and command, family and transport, length.
pub const FIXED_LEN: usize = 16;

/// The longest header that is read: the fixed part and 4,080 bytes of addresses and TLVs.
/// The format allows 65,535; a load balancer sends 100, and a bound keeps a session's memory small.
pub const MAX_LEN: usize = FIXED_LEN + 4080;

/// TLV types that vestibule knows by name.
pub mod kind {
    /// PP2_TYPE_CRC32C: the checksum of the whole header with these four bytes as zero.
    pub const CRC32C: u8 = 0x03;
    /// PP2_TYPE_NOOP: padding.
    pub const NOOP: u8 = 0x04;
    /// PP2_TYPE_UNIQUE_ID: the sender's own ID of the connection.
    pub const UNIQUE_ID: u8 = 0x05;
    /// PP2_TYPE_AWS: a subtype byte, then its value.
    pub const AWS: u8 = 0xEA;
    /// PP2_SUBTYPE_AWS_VPCE_ID: the VPC endpoint's ID in ASCII.
    pub const AWS_VPCE_ID: u8 = 0x01;
}
