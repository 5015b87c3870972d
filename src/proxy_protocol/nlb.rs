//! The fast path: exactly the layout that a Network Load Balancer writes for PrivateLink over TCP and IPv4.
//!
//! Every capture that was ever published has it: 100 bytes, CRC32C first, then the endpoint's ID, then zero padding.
//! It is documented nowhere, so anything else goes to the general parser, and the tests hold the two to one result.

use super::family::AddressFamily;
use super::header::{Header, HeaderCommand, HeaderParts, ParsedHeader, ParserRules, Transport, place};
use super::malformed::MalformedHeader;
use super::{FIXED_LEN, SIGNATURE, crc};

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
const FIXED: [u8; FIXED_LEN] = {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = SIGNATURE;
    [a, b, c, d, e, f, g, h, i, j, k, l, 0x21, 0x11, 0x00, 0x54]
};

/// Reads a header of exactly this layout; `None` for every other.
#[inline]
pub(super) fn parse(input: &[u8], rules: ParserRules) -> Option<ParsedHeader<'_>> {
    let bytes: &[u8; LEN] = input.first_chunk()?;
    let stated = [bytes[CRC], bytes[CRC + 1], bytes[CRC + 2], bytes[CRC + 3]];
    let is_nlb = bytes[..FIXED_LEN] == FIXED
        && bytes[TLVS..CRC] == [0x03, 0x00, 0x04]
        && bytes[AWS..ID] == [0xEA, 0x00, 0x17, 0x01]
        && bytes[PADDING..ZEROS] == [0x04, 0x00, 0x24]
        && rules.transport == Transport::Stream;
    if !is_nlb {
        return None;
    }
    if rules.verify_crc && checksum(bytes) != u32::from_be_bytes(stated) {
        return Some(ParsedHeader::Malformed(MalformedHeader::CrcMismatch));
    }
    let parts = HeaderParts {
        command: HeaderCommand::Proxy,
        family: AddressFamily::Inet,
        tlvs_at: place(TLVS),
        endpoint_at: place(ID),
        endpoint_len: place(PADDING - ID),
        crc_at: place(CRC),
    };
    Some(ParsedHeader::Done(Header { bytes, parts }, LEN))
}

/// The checksum of such a header. Its signature was summed up by the compiler; what remains is eleven whole words,
/// and the processor sums up eight bytes at a time where they are aligned, but one where they are not.
#[inline]
fn checksum(bytes: &[u8; LEN]) -> u32 {
    const START: usize = SIGNATURE.len();
    const SIGNATURE_CRC: u32 = crc::of_constant(&SIGNATURE);
    /// The word that the checksum's value lies in, and its other bytes. It is masked in a register: a second, shorter
    /// store over the copy would hold up the load that follows.
    const CRC_WORD: usize = (CRC - START) / 8;
    const OTHERS: u64 = !(0xFFFF_FFFF << (8 * ((CRC - START) % 8)));

    #[repr(align(8))]
    struct AlignedTail([u8; LEN - START]);

    let mut rest = AlignedTail([0; LEN - START]);
    let words = rest.0.as_chunks_mut::<8>().0.iter_mut().zip(bytes[START..].as_chunks::<8>().0);
    for (place, (to, from)) in words.enumerate() {
        let mask = if place == CRC_WORD { OTHERS } else { u64::MAX };
        *to = (u64::from_le_bytes(*from) & mask).to_le_bytes();
    }
    crc32c::crc32c_append(SIGNATURE_CRC, &rest.0)
}
