//! The fast path: the very layout that a Network Load Balancer writes for PrivateLink over TCP and IPv4.
//!
//! Every capture that was ever published has it: 100 bytes, CRC32C first, then the endpoint's ID, then zero padding.
//! It is documented nowhere, so anything else goes to the general parser, and the tests hold the two to one result.

use super::header::{Command, Family, Header, Malformed, Parsed, Rules, Transport};
use super::tlv::Tlvs;
use super::{SIGNATURE, crc};

/// The length of the header.
const LEN: usize = 100;

/// Where things start: the TLVs, the checksum's value, the AWS TLV, the ID, the padding TLV.
const TLVS: usize = 28;
const CRC: usize = TLVS + 3;
const AWS: usize = CRC + crc::LEN;
const ID: usize = AWS + 4;
const PADDING: usize = ID + 22;
/// The padding's own bytes.
const ZEROS: usize = PADDING + 3;

/// Signature, PROXY, TCP over IPv4, 84 bytes to follow.
const FIXED: [u8; 16] = {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = SIGNATURE;
    [a, b, c, d, e, f, g, h, i, j, k, l, 0x21, 0x11, 0x00, 0x54]
};

/// Reads a header of exactly this layout; `None` for every other.
#[inline]
pub(super) fn parse(input: &[u8], rules: Rules) -> Option<Parsed<'_>> {
    let bytes: &[u8; LEN] = input.first_chunk()?;
    let stated = [bytes[CRC], bytes[CRC + 1], bytes[CRC + 2], bytes[CRC + 3]];
    let is_nlb = bytes[..16] == FIXED
        && bytes[TLVS..CRC] == [0x03, 0x00, 0x04]
        && bytes[AWS..ID] == [0xEA, 0x00, 0x17, 0x01]
        && bytes[PADDING..ZEROS] == [0x04, 0x00, 0x24]
        && rules.transport == Transport::Stream;
    if !is_nlb {
        return None;
    }
    if rules.verify_crc && crc::checksum(bytes, CRC) != u32::from_be_bytes(stated) {
        return Some(Parsed::Malformed(Malformed::CrcMismatch));
    }
    let header = Header {
        command: Command::Proxy,
        tlvs: Tlvs::new(&bytes[TLVS..]),
        endpoint: Some(&bytes[ID..PADDING]),
        family: Family::Inet,
        crc_at: Some(CRC),
        bytes,
    };
    Some(Parsed::Done(header, LEN))
}
