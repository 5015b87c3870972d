//! The parser: from bytes to a header or an error.

use super::family::AddressFamily;
use super::header::{
    ABSENT, Header, HeaderCommand, HeaderParts, ParsedHeader, ParserRules, Transport, place,
};
use super::malformed::MalformedHeader;
use super::{FIXED_LEN, MAX_LEN, SIGNATURE, crc, kind, nlb, tlv};

/// Reads one header at the start of `input`. Work is linear in the header's length, and nothing is allocated.
///
/// A header in pieces is [`ParsedHeader::Partial`] as long as it may still become one: the caller bounds the time,
/// [`MAX_LEN`] bounds the bytes.
#[inline]
#[must_use]
pub fn parse(input: &[u8], rules: ParserRules) -> ParsedHeader<'_> {
    if let Some(parsed) = nlb::parse(input, rules) {
        return parsed;
    }
    any_layout(input, rules)
}

/// Whatever the specification allows.
#[inline(never)]
fn any_layout(input: &[u8], rules: ParserRules) -> ParsedHeader<'_> {
    let Some(fixed) = input.first_chunk::<FIXED_LEN>() else { return start(input) };
    let (command, family, len) = match fixed_part(fixed, rules.transport) {
        Ok(parts) => parts,
        Err(reason) => return ParsedHeader::Malformed(reason),
    };
    let Some(bytes) = input.get(..len) else { return ParsedHeader::Partial(len) };
    let parsed = match command {
        HeaderCommand::Local => {
            Ok(Header { bytes, parts: HeaderParts::without_content(bytes, HeaderCommand::Local) })
        }
        HeaderCommand::Proxy if family == AddressFamily::Unspecified => unspecified(bytes, rules),
        HeaderCommand::Proxy => proxied(bytes, family, rules),
    };
    match parsed {
        Ok(header) => ParsedHeader::Done(header, len),
        Err(reason) => ParsedHeader::Malformed(reason),
    }
}

/// Fewer bytes than the fixed part: wrong already, or too early to tell.
#[cold]
fn start(input: &[u8]) -> ParsedHeader<'static> {
    let known = input.len().min(SIGNATURE.len());
    if input.get(..known) != SIGNATURE.get(..known) {
        return ParsedHeader::Malformed(MalformedHeader::NoSignature);
    }
    match input.get(SIGNATURE.len()).map(|byte| version_and_command(*byte)) {
        Some(Err(reason)) => ParsedHeader::Malformed(reason),
        Some(Ok(_)) | None => ParsedHeader::Partial(FIXED_LEN),
    }
}

fn version_and_command(byte: u8) -> Result<HeaderCommand, MalformedHeader> {
    match (byte >> 4, byte & 0x0F) {
        (2, 0) => Ok(HeaderCommand::Local),
        (2, 1) => Ok(HeaderCommand::Proxy),
        (2, _) => Err(MalformedHeader::BadCommand),
        _ => Err(MalformedHeader::BadVersion),
    }
}

/// Command, family and the length of the whole header.
#[inline]
fn fixed_part(
    fixed: &[u8; FIXED_LEN],
    transport: Transport,
) -> Result<(HeaderCommand, AddressFamily, usize), MalformedHeader> {
    let [signature @ .., version, family, high, low] = fixed;
    if *signature != SIGNATURE {
        return Err(MalformedHeader::NoSignature);
    }
    let command = version_and_command(*version)?;
    let len = FIXED_LEN + usize::from(u16::from_be_bytes([*high, *low]));
    // LOCAL: the receiver must ignore the family and skip the rest (section 2.2).
    let family = match command {
        HeaderCommand::Local => AddressFamily::Unspecified,
        HeaderCommand::Proxy => known_family(*family, transport)?,
    };
    if len > MAX_LEN {
        return Err(MalformedHeader::TooLong);
    }
    if len < FIXED_LEN + family.address_len() {
        return Err(MalformedHeader::ShortAddress);
    }
    Ok((command, family, len))
}

/// The seven values that section 2.2 lists; the others must be refused.
#[inline]
fn known_family(byte: u8, transport: Transport) -> Result<AddressFamily, MalformedHeader> {
    let (family, named) = match byte {
        0x00 => return Ok(AddressFamily::Unspecified),
        0x11 => (AddressFamily::Inet, Transport::Stream),
        0x12 => (AddressFamily::Inet, Transport::Datagram),
        0x21 => (AddressFamily::Inet6, Transport::Stream),
        0x22 => (AddressFamily::Inet6, Transport::Datagram),
        0x31 => (AddressFamily::Unix, Transport::Stream),
        0x32 => (AddressFamily::Unix, Transport::Datagram),
        _ => return Err(MalformedHeader::BadFamily),
    };
    if named == transport { Ok(family) } else { Err(MalformedHeader::WrongTransport) }
}

/// UNSPEC has no address block by the layout, but senders exist that leave something there, and the receiver
/// has to skip it. So TLVs are read where they are well-formed, and otherwise there are none.
fn unspecified(bytes: &[u8], rules: ParserRules) -> Result<Header<'_>, MalformedHeader> {
    match proxied(bytes, AddressFamily::Unspecified, rules) {
        Err(MalformedHeader::TlvOverrun) => {
            Ok(Header { bytes, parts: HeaderParts::without_content(bytes, HeaderCommand::Proxy) })
        }
        parsed => parsed,
    }
}

fn proxied(bytes: &[u8], family: AddressFamily, rules: ParserRules) -> Result<Header<'_>, MalformedHeader> {
    let tlvs_at = place(FIXED_LEN + family.address_len());
    let empty = HeaderParts {
        command: HeaderCommand::Proxy,
        family,
        tlvs_at,
        endpoint_at: 0,
        endpoint_len: ABSENT,
        crc_at: ABSENT,
    };
    let header = Header { bytes, parts: scan(bytes, empty)? };
    if rules.verify_crc
        && let Some((stated, at)) = header.checksum()
        && crc::checksum(bytes, at) != stated
    {
        return Err(MalformedHeader::CrcMismatch);
    }
    Ok(header)
}

/// Walks all TLVs once: their lengths must add up, the checksum may stand once, and all endpoints are one. Two that differ are
/// refused after everything else, because bytes that are not TLVs at all may look like an endpoint.
fn scan(bytes: &[u8], mut parts: HeaderParts) -> Result<HeaderParts, MalformedHeader> {
    let mut is_ambiguous = false;
    let mut rest = bytes.get(usize::from(parts.tlvs_at)..).ok_or(MalformedHeader::ShortAddress)?;
    while let Some((tlv, next)) = tlv::split(rest)? {
        rest = next;
        let value_at = bytes.len() - rest.len() - tlv.value.len();
        match (tlv.kind, tlv.value) {
            (kind::AWS, [kind::AWS_VPCE_ID, id @ ..]) => match parts.endpoint(bytes) {
                None => (parts.endpoint_at, parts.endpoint_len) = (place(value_at + 1), place(id.len())),
                Some(first) => is_ambiguous |= first != id,
            },
            (kind::CRC32C, value) => {
                if value.len() != crc::LEN || parts.crc_at != ABSENT {
                    return Err(MalformedHeader::BadCrcTlv);
                }
                parts.crc_at = place(value_at);
            }
            _ => {}
        }
    }
    if is_ambiguous { Err(MalformedHeader::AmbiguousEndpoint) } else { Ok(parts) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::HeaderBuilder;
    use super::*;
    use crate::addr::{ClientAddr, DestinationAddr};

    const BOTH: [ParserRules; 2] = [
        ParserRules { transport: Transport::Stream, verify_crc: true },
        ParserRules { transport: Transport::Stream, verify_crc: false },
    ];

    /// What a Network Load Balancer writes for PrivateLink, and the payload behind it.
    fn privatelink(ips: [[u8; 4]; 2], ports: [u16; 2], id: &str, payload: &[u8]) -> Vec<u8> {
        let [client, destination] = ips;
        let client = ClientAddr((client, ports[0]).into());
        let destination = DestinationAddr((destination, ports[1]).into());
        let mut bytes = HeaderBuilder::proxy(Transport::Stream, client, destination)
            .crc()
            .and_then(|builder| builder.endpoint(id))
            .and_then(|builder| builder.pad_to(100))
            .unwrap()
            .build();
        bytes.extend(payload);
        bytes
    }

    fn is_fast(bytes: &[u8], rules: ParserRules) -> bool {
        match nlb::parse(bytes, rules) {
            Some(parsed) => {
                assert_eq!(parsed, any_layout(bytes, rules));
                assert_eq!(parsed, parse(bytes, rules));
                true
            }
            None => false,
        }
    }

    #[test]
    fn fast_path_takes_only_its_layout() {
        let nlb =
            privatelink([[10, 1, 2, 3], [10, 1, 2, 9]], [40000, 443], "vpce-08d2bf15fac5001c9", b"hello");
        for rules in BOTH {
            assert!(is_fast(&nlb, rules) && is_fast(&nlb[..100], rules));
            assert!(!is_fast(&nlb[..99], rules));
            assert!(!is_fast(&nlb, ParserRules { transport: Transport::Datagram, ..rules }));
        }
        let short = privatelink([[0; 4]; 2], [0; 2], "vpce-1a2b3c4d", b"");
        assert!(!is_fast(&short, BOTH[0]));
    }

    #[test]
    fn fast_path_agrees_with_general_path_on_every_changed_byte() {
        let nlb =
            privatelink([[10, 1, 2, 3], [10, 1, 2, 9]], [40000, 443], "vpce-08d2bf15fac5001c9", b"hello");
        let mut fast = 0;
        for place in 0..nlb.len() {
            for byte in 0..=u8::MAX {
                let mut bent = nlb.clone();
                bent[place] = byte;
                fast += BOTH.iter().filter(|rules| is_fast(&bent, **rules)).count();
            }
        }
        // 74 bytes may be anything: addresses, the checksum, the ID, the padding. The payload has 5 more.
        let fixed = 16 + 3 + 4 + 3;
        assert_eq!(fast, 2 * ((nlb.len() - fixed) * 256 + fixed));
    }

    proptest! {
        #[test]
        fn fast_path_agrees_with_general_path(
            ips in any::<[[u8; 4]; 2]>(),
            ports in any::<[u16; 2]>(),
            id in "[ -~]{22}",
            payload in prop::collection::vec(any::<u8>(), 0..40),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = privatelink(ips, ports, &id, &payload);
            prop_assert!(is_fast(&bytes, BOTH[0]));
            for (place, byte) in edits {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            for rules in BOTH {
                is_fast(&bytes, rules);
            }
        }
    }
}
