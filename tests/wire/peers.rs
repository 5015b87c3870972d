//! What other proxies disagree on, from the measured table of outcomes: a test for each row, and its neighbours.

use std::collections::BTreeSet;

use super::*;

#[test]
fn captured_header_is_accepted_in_one_write_and_in_two() {
    let capture = capture();
    for split in [1, 12, 16, 50] {
        assert!(matches!(parse(&capture[..split], STREAM), ParsedHeader::Partial(16 | 100)), "{split}");
    }
    assert_eq!(done(&capture, STREAM).endpoint(), Some(&b"vpce-08d2bf15fac5001c9"[..]));
}

#[test]
fn wrong_checksum_is_refused() {
    let mut input = capture();
    input[31] ^= 1;
    refused(&input, MalformedHeader::CrcMismatch);
    refused(&tcp4(&[3, 0, 4, 1, 2, 3, 4]), MalformedHeader::CrcMismatch);
}

#[test]
fn version_3_is_refused() {
    refused(&raw(0x31, 0x11, &[0; 12]), MalformedHeader::BadVersion);
    refused(&raw(0x11, 0x11, &[0; 12]), MalformedHeader::BadVersion);
}

#[test]
fn command_2_is_refused() {
    refused(&raw(0x22, 0x11, &[0; 12]), MalformedHeader::BadCommand);
}

#[test]
fn family_4_is_refused() {
    refused(&raw(0x21, 0x41, &[0; 300]), MalformedHeader::BadFamily);
}

#[test]
fn seven_families_are_known_and_each_has_its_transport() {
    for family in 0..=u8::MAX {
        let header = raw(0x21, family, &[0; 216]);
        let expected = match family {
            0x00 => [Ok(()), Ok(())],
            0x11 | 0x21 | 0x31 => [Ok(()), Err(MalformedHeader::WrongTransport)],
            0x12 | 0x22 | 0x32 => [Err(MalformedHeader::WrongTransport), Ok(())],
            _ => [Err(MalformedHeader::BadFamily); 2],
        };
        let found = [STREAM, DATAGRAM].map(|rules| match parse(&header, rules) {
            ParsedHeader::Done(_, len) => {
                assert_eq!(len, header.len());
                Ok(())
            }
            ParsedHeader::Malformed(reason) => Err(reason),
            ParsedHeader::Partial(needed) => panic!("{needed}"),
        });
        assert_eq!(found, expected, "{family:#x}");
    }
}

#[test]
fn ipv4_block_of_11_bytes_is_refused_and_one_of_12_is_read() {
    for (family, len) in [(0x11, 12), (0x21, 36), (0x31, 216)] {
        refused(&raw(0x21, family, &vec![0; len - 1]), MalformedHeader::ShortAddress);
        assert_eq!(done(&raw(0x21, family, &vec![0; len]), STREAM).tlvs().count(), 0);
    }
}

#[test]
fn tlv_beyond_the_header_end_is_refused() {
    refused(&tcp4(&[4, 0, 2, 0]), MalformedHeader::TlvOverrun);
    refused(&tcp4(&[4, 0, 1, 0, 4, 0xFF, 0xFF]), MalformedHeader::TlvOverrun);
    assert_eq!(done(&tcp4(&[4, 0, 1, 0]), STREAM).tlvs().count(), 1);
}

#[test]
fn one_trailing_byte_is_refused_and_so_are_two() {
    refused(&tcp4(&[4]), MalformedHeader::TlvOverrun);
    refused(&tcp4(&[4, 0]), MalformedHeader::TlvOverrun);
    refused(&tcp4(&[4, 0, 0, 4]), MalformedHeader::TlvOverrun);
}

#[test]
fn empty_aws_tlv_names_no_endpoint() {
    assert_eq!(done(&tcp4(&[0xEA, 0, 0]), STREAM).endpoint(), None);
}

#[test]
fn aws_tlv_of_an_unknown_subtype_names_no_endpoint() {
    assert_eq!(done(&tcp4(&[0xEA, 0, 2, 2, b'x']), STREAM).endpoint(), None);
}

#[test]
fn empty_id_is_an_unknown_endpoint_and_not_an_absent_one() {
    let header = tcp4(&[0xEA, 0, 1, 1]);
    assert_eq!(EndpointClaim::from_tlv(done(&header, STREAM).endpoint()), EndpointClaim::Malformed);
}

#[test]
fn endpoint_is_read_among_empty_and_foreign_aws_tlvs_and_may_be_repeated() {
    let header = tcp4(&[0xEA, 0, 0, 0xEA, 0, 2, 7, b'x', 0xEA, 0, 2, 1, b'a', 0xEA, 0, 2, 1, b'a']);
    assert_eq!(done(&header, STREAM).endpoint(), Some(&b"a"[..]));
}

#[test]
fn two_endpoints_that_differ_are_refused() {
    const A: [u8; 5] = [0xEA, 0, 2, 1, b'a'];
    for other in [&[0xEA, 0, 2, 1, b'b'][..], &[0xEA, 0, 1, 1], &[0xEA, 0, 3, 1, b'a', b'a']] {
        for tlvs in
            [[&A[..], other].concat(), [other, &A[..]].concat(), [&A[..], &A, &[4, 0, 0], other].concat()]
        {
            refused(&tcp4(&tlvs), MalformedHeader::AmbiguousEndpoint);
            refused(&raw(0x21, 0x00, &tlvs), MalformedHeader::AmbiguousEndpoint);
            let datagram = raw(0x21, 0x12, &[&[0; 12][..], &tlvs].concat());
            assert_eq!(
                parse(&datagram, DATAGRAM),
                ParsedHeader::Malformed(MalformedHeader::AmbiguousEndpoint)
            );
        }
        // Bytes that are not TLVs to the end are no endpoints: UNSPEC skips them, the others are refused for the overrun.
        let overrun = [&A[..], other, &[4, 0]].concat();
        refused(&tcp4(&overrun), MalformedHeader::TlvOverrun);
        assert_eq!(done(&raw(0x21, 0x00, &overrun), STREAM).endpoint(), None);
    }
    // LOCAL speaks for no client, and what it holds is skipped.
    assert_eq!(done(&raw(0x20, 0x11, &[A, [0xEA, 0, 2, 1, b'b']].concat()), STREAM).endpoint(), None);
}

#[test]
fn tlv_of_2000_bytes_is_read() {
    let header = tcp4(&[&[0xE0, 0x07, 0xD0][..], &[7; 2000], &[0xEA, 0, 2, 1, b'a']].concat());
    let header = done(&header, STREAM);
    assert_eq!(header.tlvs().map(|tlv| tlv.value.len()).collect::<Vec<_>>(), [2000, 2]);
    assert_eq!(header.endpoint(), Some(&b"a"[..]));
}

#[test]
fn no_header_is_refused_at_the_first_byte_that_differs() {
    refused(b"GET / HTTP/1.1\r\n\r\n", MalformedHeader::NoSignature);
    refused(b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", MalformedHeader::NoSignature);
    refused(b"G", MalformedHeader::NoSignature);
    for place in 0..SIGNATURE.len() {
        let mut input = capture();
        input[place] ^= 0x20;
        assert_eq!(parse(&input[..place], STREAM), ParsedHeader::Partial(FIXED_LEN));
        for len in place + 1..input.len() {
            refused(&input[..len], MalformedHeader::NoSignature);
        }
    }
}

#[test]
fn version_and_command_are_refused_as_soon_as_they_are_there() {
    for (byte, reason) in [(0x31, MalformedHeader::BadVersion), (0x22, MalformedHeader::BadCommand)] {
        let header = raw(byte, 0x11, &[0; 12]);
        assert_eq!(parse(&header[..12], STREAM), ParsedHeader::Partial(FIXED_LEN));
        for len in 13..=header.len() {
            refused(&header[..len], reason);
        }
    }
}

#[test]
fn unspec_without_tlvs_is_accepted_without_a_client() {
    for rules in [STREAM, DATAGRAM] {
        let header = raw(0x21, 0x00, &[]);
        let header = done(&header, rules);
        assert_eq!((header.command(), header.addresses()), (HeaderCommand::Proxy, Addresses::Unspecified));
        assert_eq!((header.client(), header.endpoint()), (None, None));
    }
}

#[test]
fn unspec_with_tlvs_is_accepted_and_they_are_read() {
    let bytes = raw(0x21, 0x00, &[4, 0, 1, 0, 0xEA, 0, 2, 1, b'a']);
    let header = done(&bytes, STREAM);
    assert_eq!((header.client(), header.endpoint()), (None, Some(&b"a"[..])));
    assert_eq!(header.tlvs().count(), 2);
}

#[test]
fn unspec_with_something_else_is_accepted_and_skipped() {
    let bytes = raw(0x21, 0x00, &[10, 1, 2, 3, 10, 1, 2, 9, 0x9C, 0x40, 1, 0xBB]);
    let header = done(&bytes, STREAM);
    assert_eq!((header.command(), header.client(), header.endpoint()), (HeaderCommand::Proxy, None, None));
    assert_eq!(header.tlvs().count(), 0);
}

#[test]
fn wrong_checksum_is_refused_on_unspec_too() {
    refused(&raw(0x21, 0x00, &[3, 0, 4, 1, 2, 3, 4]), MalformedHeader::CrcMismatch);
}

#[test]
fn unix_sockets_have_no_client_address_and_their_tlvs_are_read() {
    let bytes = raw(0x21, 0x31, &[&[b'/'; 216][..], &[0xEA, 0, 2, 1, b'a']].concat());
    let header = done(&bytes, STREAM);
    assert_eq!((header.addresses(), header.client()), (Addresses::Unix, None));
    assert_eq!(header.endpoint(), Some(&b"a"[..]));
}

#[test]
fn local_is_accepted_whatever_family_and_content_it_has() {
    for family in 0..=u8::MAX {
        for rest in [&[][..], &[3, 0, 4, 0, 0, 0, 0], &[9; 11], &[0xEA, 0, 2, 1, b'a']] {
            let bytes = raw(0x20, family, rest);
            let header = done(&bytes, STREAM);
            assert_eq!((header.command(), header.client()), (HeaderCommand::Local, None));
            assert_eq!((header.tlvs().count(), header.endpoint()), (0, None));
        }
    }
}

#[test]
fn datagram_header_on_a_stream_is_refused() {
    refused(&raw(0x21, 0x12, &[0; 12]), MalformedHeader::WrongTransport);
    refused(&raw(0x21, 0x22, &[0; 36]), MalformedHeader::WrongTransport);
}

#[test]
fn checksum_of_another_length_or_a_second_one_is_refused() {
    for len in [0, 3, 5] {
        refused(&tcp4(&[&[3, 0, len][..], &vec![0; usize::from(len)]].concat()), MalformedHeader::BadCrcTlv);
    }
    refused(&tcp4(&[3, 0, 4, 0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0]), MalformedHeader::BadCrcTlv);
}

#[test]
fn longest_header_is_read_and_a_longer_one_is_refused_by_its_length() {
    for command in [0x20, 0x21] {
        assert_eq!(done(&raw(command, 0x00, &[0; 4080]), STREAM).as_bytes().len(), MAX_LEN);
        refused(&raw(command, 0x00, &[0; 4081])[..FIXED_LEN], MalformedHeader::TooLong);
    }
}

#[test]
fn every_reason_has_an_outcome_of_its_own() {
    use MalformedHeader::{
        BadCommand, BadCrcTlv, BadFamily, BadVersion, CrcMismatch, NoSignature, ShortAddress, TlvOverrun,
        TooLong, WrongTransport,
    };
    let first = [NoSignature, BadVersion, BadCommand, BadFamily, WrongTransport];
    let second = [TooLong, ShortAddress, TlvOverrun, BadCrcTlv, CrcMismatch];
    let whys: BTreeSet<Reason> = first.into_iter().chain(second).map(Reason::from).collect();
    assert_eq!(whys.len(), 10);
    assert!(whys.iter().all(|why| Outcome::reject(EndedAt::Header, *why).place().is_some()));
}
