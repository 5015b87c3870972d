//! The parser: bytes in, a header or what is wrong with it out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{FIXED_LEN, MAX_LEN, SIGNATURE, crc, kind, nlb, tlv, tlv::Tlvs};
use crate::addr::{ClientAddr, DestinationAddr};
use crate::outcome::Why;

/// What was found at the start of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The start of a header; it cannot end before the input holds this many bytes.
    Partial(usize),
    /// A header and its length; what follows it is payload.
    Done(Header<'a>, usize),
    /// No header, and more input would not make it one.
    Malformed(Malformed),
}

/// A well-formed header, borrowed from the input. What few ask for, such as the addresses, is read when asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// Whether it speaks for a client.
    pub command: Command,
    /// Everything beside the addresses, in order. Empty for LOCAL, whose content is to be skipped.
    pub tlvs: Tlvs<'a>,
    /// The value of the first AWS TLV that names a VPC endpoint: text that nobody has checked.
    pub endpoint: Option<&'a [u8]>,
    pub(super) family: Family,
    /// Where the CRC32C's value starts, counted from the first byte of the header.
    pub(super) crc_at: Option<usize>,
    /// The whole header.
    pub(super) bytes: &'a [u8],
}

/// Whom the header speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The sender itself: a health check. No client, no payload to forward.
    Local,
    /// A client.
    Proxy,
}

/// How the client's bytes travel.
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
        /// Who connected.
        client: ClientAddr,
        /// To whom.
        destination: DestinationAddr,
    },
    /// UNIX sockets, whose names are of no use here.
    Unix,
}

/// What the parser insists on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The transport that a client's header has to name.
    pub transport: Transport,
    /// Whether a CRC32C TLV has to match. It never has to be there.
    pub verify_crc: bool,
}

/// Why it is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "`Why` describes each")]
pub enum Malformed {
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
}

impl From<Malformed> for Why {
    fn from(reason: Malformed) -> Self {
        match reason {
            Malformed::NoSignature => Self::NoSignature,
            Malformed::BadVersion => Self::BadVersion,
            Malformed::BadCommand => Self::BadCommand,
            Malformed::BadFamily => Self::BadFamily,
            Malformed::WrongTransport => Self::WrongTransport,
            Malformed::TooLong => Self::HeaderTooLong,
            Malformed::ShortAddress => Self::ShortAddress,
            Malformed::TlvOverrun => Self::TlvOverrun,
            Malformed::BadCrcTlv => Self::BadCrcTlv,
            Malformed::CrcMismatch => Self::CrcMismatch,
        }
    }
}

/// The family and transport byte, as far as section 2.2 lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Unspecified,
    Inet,
    Inet6,
    Unix,
}

impl Family {
    fn address_len(self) -> usize {
        match self {
            Self::Unspecified => 0,
            Self::Inet => 12,
            Self::Inet6 => 36,
            Self::Unix => 216,
        }
    }
}

/// Reads one header at the start of `input`. Work is linear in the header's length, and nothing is allocated.
///
/// A header in pieces is [`Parsed::Partial`] as long as it may still become one: the caller bounds the time,
/// [`MAX_LEN`] bounds the bytes.
#[inline]
#[must_use]
pub fn parse(input: &[u8], rules: Rules) -> Parsed<'_> {
    if let Some(parsed) = nlb::parse(input, rules) {
        return parsed;
    }
    any_layout(input, rules)
}

/// Whatever the specification allows.
fn any_layout(input: &[u8], rules: Rules) -> Parsed<'_> {
    let Some(fixed) = input.first_chunk::<FIXED_LEN>() else { return start(input) };
    let (command, family, len) = match fixed_part(fixed, rules.transport) {
        Ok(parts) => parts,
        Err(reason) => return Parsed::Malformed(reason),
    };
    let Some(bytes) = input.get(..len) else { return Parsed::Partial(len) };
    let parsed = match command {
        Command::Local => Ok(Header::local(bytes)),
        Command::Proxy if family == Family::Unspecified => unspecified(bytes, rules),
        Command::Proxy => proxied(bytes, family, rules),
    };
    match parsed {
        Ok(header) => Parsed::Done(header, len),
        Err(reason) => Parsed::Malformed(reason),
    }
}

/// Fewer bytes than the fixed part: wrong already, or too early to tell.
#[cold]
fn start(input: &[u8]) -> Parsed<'static> {
    let known = input.len().min(SIGNATURE.len());
    if input.get(..known) != SIGNATURE.get(..known) {
        return Parsed::Malformed(Malformed::NoSignature);
    }
    match input.get(SIGNATURE.len()).map(|byte| version_and_command(*byte)) {
        Some(Err(reason)) => Parsed::Malformed(reason),
        Some(Ok(_)) | None => Parsed::Partial(FIXED_LEN),
    }
}

fn version_and_command(byte: u8) -> Result<Command, Malformed> {
    match (byte >> 4, byte & 0x0F) {
        (2, 0) => Ok(Command::Local),
        (2, 1) => Ok(Command::Proxy),
        (2, _) => Err(Malformed::BadCommand),
        _ => Err(Malformed::BadVersion),
    }
}

/// Command, family and the length of the whole header.
#[inline]
fn fixed_part(fixed: &[u8; FIXED_LEN], transport: Transport) -> Result<(Command, Family, usize), Malformed> {
    let [signature @ .., version, family, high, low] = fixed;
    if *signature != SIGNATURE {
        return Err(Malformed::NoSignature);
    }
    let command = version_and_command(*version)?;
    let len = FIXED_LEN + usize::from(u16::from_be_bytes([*high, *low]));
    // LOCAL: the receiver must ignore the family and skip the rest (section 2.2).
    let family = match command {
        Command::Local => Family::Unspecified,
        Command::Proxy => known_family(*family, transport)?,
    };
    if len > MAX_LEN {
        return Err(Malformed::TooLong);
    }
    if len < FIXED_LEN + family.address_len() {
        return Err(Malformed::ShortAddress);
    }
    Ok((command, family, len))
}

/// The seven values that section 2.2 lists; the others must be refused.
#[inline]
fn known_family(byte: u8, transport: Transport) -> Result<Family, Malformed> {
    let (family, named) = match byte {
        0x00 => return Ok(Family::Unspecified),
        0x11 => (Family::Inet, Transport::Stream),
        0x12 => (Family::Inet, Transport::Datagram),
        0x21 => (Family::Inet6, Transport::Stream),
        0x22 => (Family::Inet6, Transport::Datagram),
        0x31 => (Family::Unix, Transport::Stream),
        0x32 => (Family::Unix, Transport::Datagram),
        _ => return Err(Malformed::BadFamily),
    };
    if named == transport { Ok(family) } else { Err(Malformed::WrongTransport) }
}

/// UNSPEC has no address block by the layout, but senders exist that leave something there, and the receiver
/// has to skip it. So TLVs are read where they are well-formed, and otherwise there are none.
fn unspecified(bytes: &[u8], rules: Rules) -> Result<Header<'_>, Malformed> {
    match proxied(bytes, Family::Unspecified, rules) {
        Err(Malformed::TlvOverrun) => Ok(Header { command: Command::Proxy, ..Header::local(bytes) }),
        parsed => parsed,
    }
}

fn proxied(bytes: &[u8], family: Family, rules: Rules) -> Result<Header<'_>, Malformed> {
    let tlvs = bytes.get(FIXED_LEN + family.address_len()..).ok_or(Malformed::ShortAddress)?;
    let found = scan(bytes.len(), tlvs)?;
    if rules.verify_crc
        && let Some((at, stated)) = found.crc
        && crc::checksum(bytes, at) != stated
    {
        return Err(Malformed::CrcMismatch);
    }
    Ok(Header {
        command: Command::Proxy,
        tlvs: Tlvs::new(tlvs),
        endpoint: found.endpoint,
        family,
        crc_at: found.crc.map(|(at, _)| at),
        bytes,
    })
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

/// What one walk over the TLVs finds.
struct Found<'a> {
    endpoint: Option<&'a [u8]>,
    /// Where the checksum stands in the header, and what it says.
    crc: Option<(usize, u32)>,
}

/// Walks all TLVs once: their lengths must add up, the checksum may stand once, the first endpoint wins.
#[inline]
fn scan(header_len: usize, tlvs: &[u8]) -> Result<Found<'_>, Malformed> {
    let mut found = Found { endpoint: None, crc: None };
    let mut rest = tlvs;
    while let Some((tlv, next)) = tlv::split(rest)? {
        rest = next;
        match tlv.kind {
            kind::AWS => {
                if let Some((&kind::AWS_VPCE_ID, id)) = tlv.value.split_first() {
                    found.endpoint = found.endpoint.or(Some(id));
                }
            }
            kind::CRC32C => {
                let stated = <[u8; crc::LEN]>::try_from(tlv.value).map_err(|_| Malformed::BadCrcTlv)?;
                let at = header_len - rest.len() - crc::LEN;
                if found.crc.replace((at, u32::from_be_bytes(stated))).is_some() {
                    return Err(Malformed::BadCrcTlv);
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

impl<'a> Header<'a> {
    fn local(bytes: &'a [u8]) -> Self {
        Self {
            command: Command::Local,
            tlvs: Tlvs::default(),
            endpoint: None,
            family: Family::Unspecified,
            crc_at: None,
            bytes,
        }
    }

    /// The whole header, as it was read.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Between whom the client's connection is.
    #[inline]
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let block = self.bytes.get(FIXED_LEN..).unwrap_or_default();
        let addresses = match self.family {
            Family::Unspecified => None,
            Family::Unix => Some(Addresses::Unix),
            Family::Inet => ip::<4>(block, |bytes| Ipv4Addr::from(bytes).into()),
            Family::Inet6 => ip::<16>(block, |bytes| Ipv6Addr::from(bytes).into()),
        };
        addresses.unwrap_or(Addresses::Unspecified)
    }

    /// The client's address, where the header tells one.
    #[inline]
    #[must_use]
    pub fn client(&self) -> Option<ClientAddr> {
        match self.addresses() {
            Addresses::Ip { client, .. } => Some(client),
            Addresses::Unspecified | Addresses::Unix => None,
        }
    }
}
