//! What we write is read alike by the crates `ppp` and `proxy-protocol`, and what they write is read alike by us.

use std::net::{IpAddr, SocketAddr};

use ppp::v2 as ppp2;
use proxy_protocol::ProxyHeader;
use proxy_protocol::version2::{ProxyAddresses, ProxyCommand, ProxyTransportProtocol};
use vestibule::addr::{ClientAddr, DestinationAddr};

use super::*;

/// A TLV as everybody can compare it.
type Plain = (u8, Vec<u8>);

/// Client and destination.
type Pair = (SocketAddr, SocketAddr);

fn rules(transport: Transport) -> ParserRules {
    ParserRules { transport, verify_crc: true }
}

fn ours(input: &[u8], transport: Transport) -> (Option<Pair>, Vec<Plain>) {
    let header = done(input, rules(transport));
    let pair = match header.addresses() {
        Addresses::Ip { client, destination } => Some((client.0, destination.0)),
        Addresses::Unspecified | Addresses::Unix => None,
    };
    (pair, header.tlvs().map(|tlv| (tlv.kind, tlv.value.to_vec())).collect())
}

fn by_ppp(input: &[u8]) -> (Option<Pair>, Vec<Plain>) {
    let header = ppp2::Header::try_from(input).unwrap();
    let pair = match header.addresses {
        ppp2::Addresses::IPv4(ip) => Some((
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        )),
        ppp2::Addresses::IPv6(ip) => Some((
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        )),
        ppp2::Addresses::Unspecified | ppp2::Addresses::Unix(_) => None,
    };
    (pair, header.tlvs().map(|tlv| tlv.unwrap()).map(|tlv| (tlv.kind, tlv.value.into_owned())).collect())
}

/// The addresses, and what it leaves of the input.
fn by_proxy_protocol(mut input: &[u8]) -> (Option<Pair>, &[u8]) {
    let Ok(ProxyHeader::Version2 { addresses, .. }) = proxy_protocol::parse(&mut input) else {
        panic!("no header");
    };
    let pair = match addresses {
        ProxyAddresses::Ipv4 { source, destination } => Some((source.into(), destination.into())),
        ProxyAddresses::Ipv6 { source, destination } => Some((source.into(), destination.into())),
        ProxyAddresses::Unspec | ProxyAddresses::Unix { .. } => None,
    };
    (pair, input)
}

fn address_pair() -> impl Strategy<Value = Pair> {
    let both = prop_oneof![
        any::<[[u8; 4]; 2]>().prop_map(|pair| pair.map(IpAddr::from)),
        any::<[[u8; 16]; 2]>().prop_map(|pair| pair.map(IpAddr::from)),
    ];
    (both, any::<[u16; 2]>()).prop_map(|([client, destination], ports)| {
        ((client, ports[0]).into(), (destination, ports[1]).into())
    })
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::Stream), Just(Transport::Datagram)]
}

/// Any TLVs, but no checksum: that one has a form of its own. And no second endpoint: such a header is refused.
fn plain_tlvs() -> impl Strategy<Value = Vec<Plain>> {
    let kind =
        prop_oneof![any::<u8>(), Just(kind::AWS)].prop_filter("a checksum", |kind| *kind != kind::CRC32C);
    let tlvs = prop::collection::vec((kind, prop::collection::vec(any::<u8>(), 0..60)), 0..8);
    tlvs.prop_map(|mut tlvs| {
        let mut has_endpoint = false;
        tlvs.retain(|tlv| !(names_endpoint(tlv) && std::mem::replace(&mut has_endpoint, true)));
        tlvs
    })
}

fn names_endpoint((kind, value): &Plain) -> bool {
    *kind == kind::AWS && value.first() == Some(&kind::AWS_VPCE_ID)
}

/// Few endpoints of few names, so that some are repeated and some differ, among other AWS TLVs and padding.
fn endpoint_tlvs() -> impl Strategy<Value = Vec<Plain>> {
    let endpoint = "[ab]{0,2}".prop_map(|id| (kind::AWS, [&[kind::AWS_VPCE_ID], id.as_bytes()].concat()));
    let other = prop_oneof![
        Just((kind::AWS, Vec::new())),
        Just((kind::AWS, b"\x02a".to_vec())),
        Just((kind::NOOP, b"\x01b".to_vec()))
    ];
    prop::collection::vec(prop_oneof![endpoint, other], 0..5)
}

/// Our encoder's header with these TLVs, and with a checksum at `crc`, where there is one.
fn built((client, destination): Pair, transport: Transport, tlvs: &[Plain], crc: Option<usize>) -> Vec<u8> {
    let mut builder = HeaderBuilder::proxy(transport, ClientAddr(client), DestinationAddr(destination));
    for (place, (kind, value)) in tlvs.iter().enumerate() {
        if crc == Some(place) {
            builder = builder.crc().unwrap();
        }
        builder = builder.tlv(*kind, value).unwrap();
    }
    if crc.is_some() {
        builder = builder.crc().unwrap();
    }
    builder.build()
}

fn without_crc(tlvs: Vec<Plain>) -> Vec<Plain> {
    tlvs.into_iter().filter(|(kind, _)| *kind != kind::CRC32C).collect()
}

#[test]
fn both_crates_read_the_same_addresses_in_every_vector() {
    // In a LOCAL header they look for addresses, which are not there.
    for vector in vectors().iter().filter(|vector| !vector.is_local() && !vector.is_refused()) {
        let (input, transport) = (vector.whole(), vector.rules().transport);
        let header = done(&input, ParserRules { transport, verify_crc: false });
        let pair = match header.addresses() {
            Addresses::Ip { client, destination } => Some((client.0, destination.0)),
            other @ (Addresses::Unspecified | Addresses::Unix) => panic!("{other:?}"),
        };
        let tlvs: Vec<Plain> = header.tlvs().map(|tlv| (tlv.kind, tlv.value.to_vec())).collect();
        assert_eq!(by_ppp(&input), (pair, tlvs), "{}", vector.name);
        assert_eq!(by_proxy_protocol(&input), (pair, &vector.payload[..]), "{}", vector.name);
    }
}

#[test]
fn valid_header_is_forwarded_unchanged() {
    let is_right =
        |vector: &&Vector| !vector.is_local() && !vector.is_refused() && vector.expected != "malformed";
    for vector in vectors().iter().filter(is_right) {
        assert_eq!(reseal(&done(&vector.header, vector.rules())), vector.header, "{}", vector.name);
    }
}

#[test]
fn local_headers_are_read_by_both_crates() {
    for (input, command) in [
        (HeaderBuilder::local().build(), ProxyCommand::Local),
        (HeaderBuilder::unspecified().tlv(kind::NOOP, &[0; 9]).unwrap().build(), ProxyCommand::Proxy),
    ] {
        let read = proxy_protocol::parse(&mut &input[..]).unwrap();
        let addresses = ProxyAddresses::Unspec;
        let transport_protocol = ProxyTransportProtocol::Unspec;
        assert_eq!(read, ProxyHeader::Version2 { command, transport_protocol, addresses });
        assert_eq!(ppp2::Header::try_from(&input[..]).unwrap().addresses, ppp2::Addresses::Unspecified);
    }
}

proptest! {
    #[test]
    fn encoded_headers_are_read_alike_by_all_parsers(
        pair in address_pair(),
        transport in transport(),
        tlvs in plain_tlvs(),
        crc in prop::option::of(0..9_usize),
        payload in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let header = built(pair, transport, &tlvs, crc);
        let input = [&header[..], &payload].concat();
        let (read, read_tlvs) = ours(&input, transport);
        prop_assert_eq!(read, Some(pair));
        prop_assert_eq!(by_ppp(&input), (read, read_tlvs.clone()));
        prop_assert_eq!(by_proxy_protocol(&input), (read, &payload[..]));
        prop_assert_eq!(read_tlvs.len(), tlvs.len() + usize::from(crc.is_some()));
        prop_assert_eq!(without_crc(read_tlvs), tlvs);
    }

    /// The endpoints are those that `ppp` finds: one, however often, is the header's; two that differ are refused.
    #[test]
    fn endpoints_agree_with_another_parser(
        pair in address_pair(),
        transport in transport(),
        tlvs in endpoint_tlvs(),
        crc in prop::option::of(0..5_usize),
    ) {
        let input = built(pair, transport, &tlvs, crc);
        let (_, found) = by_ppp(&input);
        let mut ids: Vec<_> = found.iter().filter(|tlv| names_endpoint(tlv)).map(|(_, value)| &value[1..]).collect();
        ids.dedup();
        match parse(&input, rules(transport)) {
            ParsedHeader::Done(header, len) => {
                prop_assert_eq!(len, input.len());
                prop_assert!(ids.len() < 2, "{:?}", ids);
                prop_assert_eq!(header.endpoint(), ids.first().copied());
            }
            refused @ (ParsedHeader::Malformed(_) | ParsedHeader::Partial(_)) => {
                prop_assert_eq!(refused, ParsedHeader::Malformed(MalformedHeader::AmbiguousEndpoint));
                prop_assert!(ids.len() > 1, "{:?}", ids);
            }
        }
    }

    #[test]
    fn headers_of_proxy_protocol_are_read(pair in address_pair(), datagram in any::<bool>()) {
        let addresses = match pair {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => ProxyAddresses::Ipv4 { source, destination },
            (SocketAddr::V6(source), SocketAddr::V6(destination)) => ProxyAddresses::Ipv6 { source, destination },
            other => panic!("{other:?}"),
        };
        let (transport_protocol, transport) = if datagram {
            (ProxyTransportProtocol::Datagram, Transport::Datagram)
        } else {
            (ProxyTransportProtocol::Stream, Transport::Stream)
        };
        let header = ProxyHeader::Version2 { command: ProxyCommand::Proxy, transport_protocol, addresses };
        let input = proxy_protocol::encode(header).unwrap();
        prop_assert_eq!(ours(&input, transport), (Some(pair), Vec::new()));
    }

    #[test]
    fn headers_of_ppp_are_read(pair in address_pair(), datagram in any::<bool>(), tlvs in plain_tlvs()) {
        let (protocol, transport) = if datagram {
            (ppp2::Protocol::Datagram, Transport::Datagram)
        } else {
            (ppp2::Protocol::Stream, Transport::Stream)
        };
        let command = ppp2::Version::Two | ppp2::Command::Proxy;
        let mut builder = ppp2::Builder::with_addresses(command, protocol, pair);
        for (kind, value) in &tlvs {
            builder = builder.write_tlv(*kind, value).unwrap();
        }
        prop_assert_eq!(ours(&builder.build().unwrap(), transport), (Some(pair), tlvs));
    }

    /// The checksum is the specification's: all of the header with the checksum's own bytes as zero.
    #[test]
    fn written_checksum_matches_the_specification(pair in address_pair(), tlvs in plain_tlvs()) {
        let header = built(pair, Transport::Stream, &tlvs, Some(0));
        let at = if pair.0.is_ipv4() { 16 + 12 + 3 } else { 16 + 36 + 3 };
        let mut zeroed = header.clone();
        zeroed[at..at + 4].fill(0);
        prop_assert_eq!(&header[at..at + 4], crc32c::crc32c(&zeroed).to_be_bytes());
    }

    #[test]
    fn forwarded_header_keeps_addresses_and_tlvs_with_a_valid_checksum(
        pair in address_pair(),
        transport in transport(),
        tlvs in plain_tlvs(),
        crc in prop::option::of(0..9_usize),
        spoiled in any::<u32>(),
    ) {
        let mut input = built(pair, transport, &tlvs, crc);
        let right = input.clone();
        if crc.is_some() {
            let before = tlvs.iter().take(crc.unwrap_or_default()).map(|(_, value)| 3 + value.len()).sum::<usize>();
            let at = if pair.0.is_ipv4() { 16 + 12 } else { 16 + 36 } + before + 3;
            input[at..at + 4].copy_from_slice(&spoiled.to_be_bytes());
        }
        let again = reseal(&done(&input, ParserRules { transport, verify_crc: false }));
        let (read, read_tlvs) = ours(&again, transport);
        prop_assert_eq!(read, Some(pair));
        prop_assert_eq!(read_tlvs.iter().filter(|(kind, _)| *kind == kind::CRC32C).count(), 1);
        if crc.is_some() {
            prop_assert_eq!(&again, &right);
        } else {
            prop_assert_eq!(again.len(), right.len() + 7);
        }
        prop_assert_eq!(without_crc(read_tlvs), tlvs);
    }
}
