//! ns per NLB header: finding the endpoint ID in the PrivateLink capture, against the crates `ppp` and
//! `proxy-protocol`. `cargo bench --bench header`
//!
//! The two verify no checksum, and `proxy-protocol` hands out no TLVs at all: its figure is that of the addresses.

use std::net::SocketAddr;

use divan::{Bencher, black_box};
use vestibule::id::EndpointClaim;
use vestibule::proxy_protocol::{ParsedHeader, ParserRules, Transport, parse};

/// The PrivateLink capture of tests/vectors/proxy-v2.tsv, and the payload that came with it.
fn capture() -> Vec<u8> {
    let table = include_str!("../tests/vectors/proxy-v2.tsv");
    let line = table.lines().find(|line| line.starts_with("privatelink-tcp4\t")).expect("the capture");
    let hex = line.split('\t').nth(2).expect("its bytes");
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
    let mut bytes: Vec<u8> = (0..hex.len()).step_by(2).map(digit).collect();
    assert_eq!(bytes.len(), 100);
    bytes.extend(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n");
    bytes
}

/// The client's address and the length of the endpoint's ID: what a proxy asks of a header. The ID itself is
/// borrowed, and ppp's borrow ends with its header.
type Asked = (SocketAddr, usize);

#[inline(never)]
fn ours(input: &[u8], verify_crc: bool) -> Option<Asked> {
    match parse(input, ParserRules { transport: Transport::Stream, verify_crc }) {
        ParsedHeader::Done(header, _) => Some((header.client()?.0, header.endpoint()?.len())),
        ParsedHeader::Partial(_) | ParsedHeader::Malformed(_) => None,
    }
}

#[inline(never)]
fn with_ppp(input: &[u8]) -> Option<Asked> {
    let header = ppp::v2::Header::try_from(input).ok()?;
    let client = match header.addresses {
        ppp::v2::Addresses::IPv4(ip) => (ip.source_address, ip.source_port).into(),
        ppp::v2::Addresses::IPv6(ip) => (ip.source_address, ip.source_port).into(),
        ppp::v2::Addresses::Unspecified | ppp::v2::Addresses::Unix(_) => return None,
    };
    let mut tlvs = header.tlvs().flatten().filter(|tlv| tlv.kind == 0xEA);
    Some((client, tlvs.find_map(|tlv| tlv.value.strip_prefix(&[1]).map(<[u8]>::len))?))
}

/// The addresses alone: it hands out no TLVs.
#[inline(never)]
fn with_proxy_protocol(mut input: &[u8]) -> Option<SocketAddr> {
    use proxy_protocol::{ProxyHeader, parse, version2::ProxyAddresses};
    match parse(&mut input) {
        Ok(ProxyHeader::Version2 { addresses: ProxyAddresses::Ipv4 { source, .. }, .. }) => {
            Some(source.into())
        }
        _ => None,
    }
}

fn expected() -> Asked {
    ("172.31.7.113:51442".parse().expect("an address"), "vpce-08d2bf15fac5001c9".len())
}

#[divan::bench]
fn ours_without_crc(bencher: Bencher) {
    let input = capture();
    assert_eq!(ours(&input, false), Some(expected()));
    bencher.bench_local(|| ours(black_box(&input), false));
}

#[divan::bench]
fn ours_with_crc(bencher: Bencher) {
    let input = capture();
    assert_eq!(ours(&input, true), Some(expected()));
    bencher.bench_local(|| ours(black_box(&input), true));
}

/// All that a session does with its header: the ID is turned into the key of the directory, too.
#[divan::bench]
fn ours_with_crc_and_directory_key(bencher: Bencher) {
    let input = capture();
    let rules = ParserRules { transport: Transport::Stream, verify_crc: true };
    let key = |input: &[u8]| match parse(input, rules) {
        ParsedHeader::Done(header, _) => Some((header.client(), EndpointClaim::from_tlv(header.endpoint()))),
        ParsedHeader::Partial(_) | ParsedHeader::Malformed(_) => None,
    };
    assert!(key(&input).is_some_and(|(_, claim)| claim.id().is_some()));
    bencher.bench_local(|| key(black_box(&input)));
}

#[divan::bench]
fn ppp_without_crc(bencher: Bencher) {
    let input = capture();
    assert_eq!(with_ppp(&input), Some(expected()));
    bencher.bench_local(|| with_ppp(black_box(&input)));
}

#[divan::bench]
fn proxy_protocol_without_crc_or_endpoint(bencher: Bencher) {
    let input = capture();
    assert_eq!(with_proxy_protocol(&input), Some(expected().0));
    bencher.bench_local(|| with_proxy_protocol(black_box(&input)));
}

fn main() {
    divan::main();
}
