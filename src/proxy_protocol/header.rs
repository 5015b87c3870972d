//! The parser: from bytes to a header or an error.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::family::AddressFamily;
use super::{FIXED_LEN, MAX_LEN, SIGNATURE, crc, kind, nlb, tlv, tlv::Tlvs};
use crate::addr::{ClientAddr, DestinationAddr};
use crate::outcome::Reason;

/// The result of parsing the start of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParsedHeader<'a> {
    /// The start of a header; it cannot end before the input holds this many bytes.
    Partial(usize),
    /// A header and its length; what follows it is payload.
    Done(Header<'a>, usize),
    /// No header, and more input would not make it one.
    Malformed(MalformedHeader),
}

/// A well-formed header, borrowed from the input: where its parts stand. The parts are read when they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// The whole header.
    pub(super) bytes: &'a [u8],
    pub(super) parts: HeaderParts,
}

/// Where the parts of a header stand, counted from its first byte. A header has at most [`MAX_LEN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeaderParts {
    pub(super) command: HeaderCommand,
    pub(super) family: AddressFamily,
    pub(super) tlvs_at: u16,
    /// The value of the first AWS TLV that names an endpoint, which every other one repeats; a length of [`ABSENT`] where
    /// there is none.
    pub(super) endpoint_at: u16,
    pub(super) endpoint_len: u16,
    /// The CRC32C's value; [`ABSENT`] where there is none.
    pub(super) crc_at: u16,
}

/// No such part.
pub(super) const ABSENT: u16 = u16::MAX;

/// The command of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderCommand {
    /// The sender itself: a health check. No client, no payload to forward.
    Local,
    /// A client.
    Proxy,
}

/// The transport of the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Stream,
    /// UDP.
    Datagram,
}

/// The two ends of the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// The sender did not say (UNSPEC), or spoke for itself (LOCAL).
    Unspecified,
    /// IPv4 or IPv6.
    Ip {
        /// The client's address.
        client: ClientAddr,
        /// The destination.
        destination: DestinationAddr,
    },
    /// UNIX sockets, whose names are of no use here.
    Unix,
}

/// The rules of the parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParserRules {
    /// The transport that a client's header has to name.
    pub transport: Transport,
    /// Whether a CRC32C TLV has to match. It never has to be there.
    pub verify_crc: bool,
}

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

/// Source address, destination address, source port, destination port.
fn ip<const N: usize>(block: &[u8], address: impl Fn([u8; N]) -> IpAddr) -> Option<Addresses> {
    let (client, rest) = block.split_first_chunk::<N>()?;
    let (destination, rest) = rest.split_first_chunk::<N>()?;
    let (client_port, rest) = rest.split_first_chunk::<2>()?;
    let destination_port = rest.first_chunk::<2>()?;
    Some(Addresses::Ip {
        client: ClientAddr(SocketAddr::new(address(*client), u16::from_be_bytes(*client_port))),
        destination: DestinationAddr(SocketAddr::new(
            address(*destination),
            u16::from_be_bytes(*destination_port),
        )),
    })
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

/// A place in a header, which has at most [`MAX_LEN`] bytes.
#[expect(clippy::cast_possible_truncation, reason = "MAX_LEN fits")]
pub(super) const fn place(at: usize) -> u16 {
    at as u16
}

impl HeaderParts {
    /// Those of a header whose content is skipped.
    fn without_content(bytes: &[u8], command: HeaderCommand) -> Self {
        Self {
            command,
            family: AddressFamily::Unspecified,
            tlvs_at: place(bytes.len()),
            endpoint_at: 0,
            endpoint_len: ABSENT,
            crc_at: ABSENT,
        }
    }

    /// The endpoint's ID, in the header that these are the parts of.
    #[inline]
    fn endpoint(self, bytes: &[u8]) -> Option<&[u8]> {
        if self.endpoint_len == ABSENT {
            return None;
        }
        let start = usize::from(self.endpoint_at);
        bytes.get(start..start + usize::from(self.endpoint_len))
    }
}

impl<'a> Header<'a> {
    /// The whole header, as it was read.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whether it speaks for a client.
    #[inline]
    #[must_use]
    pub fn command(&self) -> HeaderCommand {
        self.parts.command
    }

    /// Everything beside the addresses, in order. Empty for LOCAL, whose content is to be skipped.
    #[must_use]
    pub fn tlvs(&self) -> Tlvs<'a> {
        Tlvs::new(self.bytes.get(usize::from(self.parts.tlvs_at)..).unwrap_or_default())
    }

    /// The ID in the AWS TLVs that name a VPC endpoint, which all name the same one. The text is not validated.
    #[inline]
    #[must_use]
    pub fn endpoint(&self) -> Option<&'a [u8]> {
        self.parts.endpoint(self.bytes)
    }

    /// The CRC32C that the header states, and where.
    fn checksum(&self) -> Option<(u32, usize)> {
        let at = self.crc_at()?;
        let stated = self.bytes.get(at..)?.first_chunk()?;
        Some((u32::from_be_bytes(*stated), at))
    }

    /// Where the CRC32C's value stands.
    pub(super) fn crc_at(&self) -> Option<usize> {
        (self.parts.crc_at != ABSENT).then_some(usize::from(self.parts.crc_at))
    }

    /// The addresses of the client's connection.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let block = self.bytes.get(FIXED_LEN..).unwrap_or_default();
        let addresses = match self.parts.family {
            AddressFamily::Unspecified => None,
            AddressFamily::Unix => Some(Addresses::Unix),
            AddressFamily::Inet => ip::<4>(block, |bytes| Ipv4Addr::from(bytes).into()),
            AddressFamily::Inet6 => ip::<16>(block, |bytes| Ipv6Addr::from(bytes).into()),
        };
        addresses.unwrap_or(Addresses::Unspecified)
    }

    /// The client's address, where the header tells one.
    #[inline]
    #[must_use]
    pub fn client(&self) -> Option<ClientAddr> {
        let block = self.bytes.get(FIXED_LEN..)?;
        if self.parts.family == AddressFamily::Inet {
            let [a, b, c, d, _, _, _, _, high, low] = *block.first_chunk()?;
            let port = u16::from_be_bytes([high, low]);
            return Some(ClientAddr(SocketAddr::from(([a, b, c, d], port))));
        }
        match self.addresses() {
            Addresses::Ip { client, .. } => Some(client.canonical()),
            Addresses::Unspecified | Addresses::Unix => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::HeaderBuilder;
    use super::*;

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
    fn the_fast_path_takes_its_layout_and_no_other() {
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
    fn the_fast_path_says_the_same_of_every_bent_byte() {
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
        fn the_fast_path_says_the_same_as_the_general_one(
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
