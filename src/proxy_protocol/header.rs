//! A parsed header: where its parts stand, and what they say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::FIXED_LEN;
use super::family::AddressFamily;
use super::malformed::MalformedHeader;
use super::tlv::Tlvs;
use crate::addr::{ClientAddr, DestinationAddr};

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

/// A place in a header, which has at most [`MAX_LEN`] bytes.
#[expect(clippy::cast_possible_truncation, reason = "MAX_LEN fits")]
pub(super) const fn place(at: usize) -> u16 {
    at as u16
}

impl HeaderParts {
    /// Those of a header whose content is skipped.
    pub(super) fn without_content(bytes: &[u8], command: HeaderCommand) -> Self {
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
    pub(super) fn endpoint(self, bytes: &[u8]) -> Option<&[u8]> {
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
    pub(super) fn checksum(&self) -> Option<(u32, usize)> {
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
