//! The encoder: headers of our own, and a client's header passed on.

use std::net::IpAddr;

use super::family::AddressFamily;
use super::header::{Header, HeaderCommand, Transport};
use super::{FIXED_LEN, MAX_LEN, SIGNATURE, crc, kind};
use crate::addr::{ClientAddr, DestinationAddr};

/// The bytes of a TLV before its value.
const TLV_HEAD: usize = 3;

/// The header would be longer than [`MAX_LEN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a PROXY header may have {MAX_LEN} bytes")]
pub struct HeaderTooLong;

/// Writes one header: addresses, TLVs, padding, and last the checksum.
#[derive(Clone, Debug)]
pub struct HeaderBuilder {
    bytes: Vec<u8>,
    crc_at: Option<usize>,
}

impl HeaderBuilder {
    /// A LOCAL header: a health check.
    #[must_use]
    pub fn local() -> Self {
        Self::start(0x20, 0x00)
    }

    /// A header for a client whose address is not known.
    #[must_use]
    pub fn unspecified() -> Self {
        Self::start(0x21, 0x00)
    }

    /// A header for a client. An IPv4 address beside an IPv6 one is written as IPv4-mapped.
    #[must_use]
    pub fn proxy(transport: Transport, client: ClientAddr, destination: DestinationAddr) -> Self {
        let low = match transport {
            Transport::Stream => 1,
            Transport::Datagram => 2,
        };
        let (from, to) = (client.0, destination.0);
        let mut builder;
        if let (IpAddr::V4(from), IpAddr::V4(to)) = (from.ip(), to.ip()) {
            builder = Self::start(0x21, 0x10 | low);
            builder.bytes.extend(from.octets());
            builder.bytes.extend(to.octets());
        } else {
            builder = Self::start(0x21, 0x20 | low);
            for address in [from.ip(), to.ip()] {
                let address = match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                builder.bytes.extend(address.octets());
            }
        }
        builder.bytes.extend(from.port().to_be_bytes());
        builder.bytes.extend(to.port().to_be_bytes());
        builder
    }

    fn start(version_and_command: u8, family: u8) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(SIGNATURE);
        bytes.extend([version_and_command, family, 0, 0]);
        Self { bytes, crc_at: None }
    }

    /// Appends a TLV.
    ///
    /// # Errors
    /// [`HeaderTooLong`] where the header would outgrow its bound.
    pub fn tlv(mut self, kind: u8, value: &[u8]) -> Result<Self, HeaderTooLong> {
        self.push(kind, value)?;
        Ok(self)
    }

    fn push(&mut self, kind: u8, value: &[u8]) -> Result<(), HeaderTooLong> {
        if self.bytes.len() + TLV_HEAD + value.len() > MAX_LEN {
            return Err(HeaderTooLong);
        }
        let len = u16::try_from(value.len()).map_err(|_| HeaderTooLong)?;
        self.bytes.push(kind);
        self.bytes.extend(len.to_be_bytes());
        self.bytes.extend(value);
        Ok(())
    }

    /// Appends the VPC endpoint's ID as AWS writes it.
    ///
    /// # Errors
    /// [`HeaderTooLong`] where the header would outgrow its bound.
    pub fn endpoint(self, id: &str) -> Result<Self, HeaderTooLong> {
        let mut value = Vec::with_capacity(1 + id.len());
        value.push(kind::AWS_VPCE_ID);
        value.extend(id.as_bytes());
        self.tlv(kind::AWS, &value)
    }

    /// Appends room for the checksum; a second call changes nothing.
    ///
    /// # Errors
    /// [`HeaderTooLong`] where the header would outgrow its bound.
    pub fn crc(mut self) -> Result<Self, HeaderTooLong> {
        self.reserve_crc()?;
        Ok(self)
    }

    fn reserve_crc(&mut self) -> Result<(), HeaderTooLong> {
        if self.crc_at.is_none() {
            self.push(kind::CRC32C, &[0; crc::LEN])?;
            self.crc_at = Some(self.bytes.len() - crc::LEN);
        }
        Ok(())
    }

    /// Pads with one NOOP TLV up to `len` bytes. A header that is already that long stays as it is.
    ///
    /// # Errors
    /// [`HeaderTooLong`] where `len` is over the bound, or leaves 1 or 2 bytes: less than a TLV takes.
    pub fn pad_to(self, len: usize) -> Result<Self, HeaderTooLong> {
        match len.saturating_sub(self.bytes.len()) {
            0 => Ok(self),
            room => {
                let padding = vec![0; room.checked_sub(TLV_HEAD).ok_or(HeaderTooLong)?];
                self.tlv(kind::NOOP, &padding)
            }
        }
    }

    /// The finished header.
    #[must_use]
    pub fn build(mut self) -> Vec<u8> {
        seal(&mut self.bytes, self.crc_at);
        self.bytes
    }
}

/// Sets the length and, where there is room for one, the checksum.
fn seal(header: &mut [u8], crc_at: Option<usize>) {
    let len = u16::try_from(header.len() - FIXED_LEN).unwrap_or(u16::MAX);
    if let Some(field) = header.get_mut(FIXED_LEN - 2..FIXED_LEN) {
        field.copy_from_slice(&len.to_be_bytes());
    }
    if let Some(at) = crc_at {
        let value = crc::checksum(header, at).to_be_bytes();
        if let Some(field) = header.get_mut(at..at + crc::LEN) {
            field.copy_from_slice(&value);
        }
    }
}

/// Writes a client's header again, to be passed on: the same addresses, every TLV in its place, the checksum
/// computed anew. A header without a checksum gets one where there is room.
#[must_use]
pub fn reseal(header: &Header<'_>) -> Vec<u8> {
    let mut again = HeaderBuilder { bytes: header.bytes.to_vec(), crc_at: header.crc_at() };
    let skipped = header.parts.family == AddressFamily::Unspecified && header.tlvs().as_bytes().is_empty();
    if header.command() == HeaderCommand::Local || skipped {
        // What stood there was skipped, and is not ours to repeat.
        again.bytes.truncate(FIXED_LEN);
    }
    // No room for a checksum is no reason to refuse a header that came without one.
    let (Ok(()) | Err(HeaderTooLong)) = again.reserve_crc();
    again.build()
}

#[cfg(test)]
mod tests {
    use super::super::{Addresses, MalformedHeader, ParsedHeader, ParserRules, parse};
    use super::*;

    const STREAM: ParserRules = ParserRules { transport: Transport::Stream, verify_crc: true };

    fn addresses(client: &str, destination: &str) -> (ClientAddr, DestinationAddr) {
        (ClientAddr(client.parse().unwrap()), DestinationAddr(destination.parse().unwrap()))
    }

    fn read(bytes: &[u8], rules: ParserRules) -> Header<'_> {
        match parse(bytes, rules) {
            ParsedHeader::Done(header, len) => {
                assert_eq!(len, bytes.len());
                header
            }
            other @ (ParsedHeader::Partial(_) | ParsedHeader::Malformed(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn written_header_is_read_back() {
        for (client, destination) in [
            ("10.1.2.3:40000", "10.1.2.9:443"),
            ("[fd00::1]:40000", "[fd00::2]:443"),
            ("[fd00::1]:1", "10.0.0.1:2"),
        ] {
            for transport in [Transport::Stream, Transport::Datagram] {
                let (client, destination) = addresses(client, destination);
                let bytes = HeaderBuilder::proxy(transport, client, destination)
                    .crc()
                    .and_then(|builder| builder.endpoint("vpce-08d2bf15fac5001c9"))
                    .and_then(HeaderBuilder::crc)
                    .and_then(|builder| builder.pad_to(100))
                    .unwrap()
                    .build();
                assert_eq!(bytes.len(), 100);
                let header = read(&bytes, ParserRules { transport, verify_crc: true });
                assert_eq!(header.command(), HeaderCommand::Proxy);
                assert_eq!(header.client(), Some(client));
                assert_eq!(header.endpoint(), Some(&b"vpce-08d2bf15fac5001c9"[..]));
                assert_eq!(header.tlvs().map(|tlv| tlv.kind).collect::<Vec<_>>(), [3, 0xEA, 4]);
                assert_eq!(header.as_bytes(), bytes);
            }
        }
    }

    #[test]
    fn ipv4_address_beside_an_ipv6_one_is_mapped() {
        let (client, destination) = addresses("[fd00::1]:1", "10.0.0.1:2");
        let bytes = HeaderBuilder::proxy(Transport::Stream, client, destination).build();
        let expected = addresses("[fd00::1]:1", "[::ffff:10.0.0.1]:2").1;
        assert_eq!(read(&bytes, STREAM).addresses(), Addresses::Ip { client, destination: expected });
        // A client so written is the IPv4 client; the address block stays as it is.
        let (client, destination) = addresses("10.0.0.1:2", "[fd00::1]:1");
        let bytes = HeaderBuilder::proxy(Transport::Stream, client, destination).build();
        assert_eq!(read(&bytes, STREAM).client(), Some(client));
        assert_eq!(read(&bytes, STREAM).as_bytes(), bytes);
    }

    #[test]
    fn local_header_has_no_client() {
        assert_eq!(read(&HeaderBuilder::local().build(), STREAM).command(), HeaderCommand::Local);
        let bytes = HeaderBuilder::unspecified().endpoint("x").unwrap().build();
        let header = read(&bytes, STREAM);
        assert_eq!((header.client(), header.endpoint()), (None, Some(&b"x"[..])));
    }

    #[test]
    fn header_length_bound_is_exact() {
        let room = MAX_LEN - FIXED_LEN - TLV_HEAD;
        let longest = HeaderBuilder::local().tlv(kind::NOOP, &vec![0; room]).unwrap();
        assert_eq!(longest.clone().build().len(), MAX_LEN);
        assert_eq!(longest.clone().tlv(kind::NOOP, &[]).err(), Some(HeaderTooLong));
        assert_eq!(longest.crc().err(), Some(HeaderTooLong));
        assert_eq!(HeaderBuilder::local().tlv(kind::NOOP, &vec![0; room + 1]).err(), Some(HeaderTooLong));
        assert_eq!(HeaderBuilder::local().endpoint(&"x".repeat(room)).err(), Some(HeaderTooLong));
    }

    #[test]
    fn padding_needs_room_for_a_tlv() {
        assert_eq!(HeaderBuilder::local().pad_to(15).unwrap().build().len(), 16);
        assert_eq!(HeaderBuilder::local().pad_to(16).unwrap().build().len(), 16);
        assert_eq!(HeaderBuilder::local().pad_to(17).err(), Some(HeaderTooLong));
        assert_eq!(HeaderBuilder::local().pad_to(18).err(), Some(HeaderTooLong));
        assert_eq!(HeaderBuilder::local().pad_to(19).unwrap().build().len(), 19);
        assert_eq!(HeaderBuilder::local().pad_to(MAX_LEN).unwrap().build().len(), MAX_LEN);
        assert_eq!(HeaderBuilder::local().pad_to(MAX_LEN + 1).err(), Some(HeaderTooLong));
    }

    #[test]
    fn forwarded_header_keeps_its_tlvs_and_gets_a_valid_checksum() {
        let (client, destination) = addresses("10.1.2.3:40000", "10.1.2.9:443");
        let mut wrong = HeaderBuilder::proxy(Transport::Stream, client, destination)
            .tlv(kind::UNIQUE_ID, b"abc")
            .and_then(HeaderBuilder::crc)
            .and_then(|builder| builder.pad_to(60))
            .unwrap()
            .build();
        let right = wrong.clone();
        wrong[38] ^= 1;
        assert_eq!(parse(&wrong, STREAM), ParsedHeader::Malformed(MalformedHeader::CrcMismatch));
        let header = read(&wrong, ParserRules { verify_crc: false, ..STREAM });
        assert_eq!(reseal(&header), right);
    }

    #[test]
    fn header_without_a_checksum_gets_one_if_there_is_room() {
        let (client, destination) = addresses("10.1.2.3:40000", "10.1.2.9:443");
        let plain =
            HeaderBuilder::proxy(Transport::Stream, client, destination).endpoint("vpce-1a2b3c4d").unwrap();
        let resealed = reseal(&read(&plain.clone().build(), STREAM));
        let again = read(&resealed, STREAM);
        assert!(again.crc_at().is_some());
        assert_eq!(again.endpoint(), Some(&b"vpce-1a2b3c4d"[..]));

        let full = plain.pad_to(MAX_LEN).unwrap().build();
        assert_eq!(reseal(&read(&full, STREAM)), full);

        let room = TLV_HEAD + crc::LEN;
        let client = HeaderBuilder::unspecified();
        let fits = client.clone().pad_to(MAX_LEN - room).unwrap().build();
        assert_eq!(reseal(&read(&fits, STREAM)).len(), MAX_LEN);
        let one_more = client.pad_to(MAX_LEN - room + 1).unwrap().build();
        assert_eq!(reseal(&read(&one_more, STREAM)), one_more);
    }

    #[test]
    fn skipped_content_is_not_repeated() {
        let mut junk = HeaderBuilder::unspecified().build();
        junk.extend([9, 9]);
        junk[15] = 2;
        let resealed = reseal(&read(&junk, STREAM));
        assert_eq!(resealed.len(), FIXED_LEN + TLV_HEAD + crc::LEN);
        assert_eq!(read(&resealed, STREAM).client(), None);

        let local = HeaderBuilder::local().pad_to(100).unwrap().build();
        let resealed = reseal(&read(&local, STREAM));
        assert_eq!(resealed, HeaderBuilder::local().crc().unwrap().build());
    }
}
