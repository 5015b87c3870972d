//! The PROXY codec from outside: captures, every cut, every flip, random bytes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

use proptest::prelude::*;
use vestibule::id::EndpointClaim;
use vestibule::outcome::{EndedAt, Outcome, Reason};
use vestibule::proxy_protocol::{
    Addresses, FIXED_LEN, Header, HeaderBuilder, HeaderCommand, MAX_LEN, MalformedHeader, ParsedHeader,
    ParserRules, SIGNATURE, Transport, kind, parse, reseal,
};

#[path = "wire/agreement.rs"]
mod agreement;
#[path = "wire/peers.rs"]
mod peers;

const STREAM: ParserRules = ParserRules { transport: Transport::Stream, verify_crc: true };
const DATAGRAM: ParserRules = ParserRules { transport: Transport::Datagram, verify_crc: true };

/// One line of the table.
struct Vector {
    name: &'static str,
    expected: &'static str,
    header: Vec<u8>,
    payload: Vec<u8>,
    origin: &'static str,
}

impl Vector {
    fn whole(&self) -> Vec<u8> {
        [self.header.as_slice(), &self.payload].concat()
    }

    /// Whether no rules read a header here.
    fn is_refused(&self) -> bool {
        self.expected == "ambiguous-endpoint"
    }

    fn is_local(&self) -> bool {
        self.expected == "local"
    }

    /// The rules of a listener that is meant for it.
    fn rules(&self) -> ParserRules {
        if self.header[13] & 0x0F == 2 { DATAGRAM } else { STREAM }
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn vectors() -> Vec<Vector> {
    let lines = include_str!("vectors/proxy-v2.tsv").lines().filter(|line| !line.starts_with('#'));
    let vectors: Vec<_> = lines
        .map(|line| {
            let mut fields = line.split('\t');
            let mut field = || fields.next().unwrap_or_default();
            let (name, expected, hex, origin) = (field(), field(), field(), field());
            let (header, payload) = hex.split_once('|').unwrap_or((hex, ""));
            Vector { name, expected, header: bytes(header), payload: bytes(payload), origin }
        })
        .collect();
    assert!(vectors.len() >= 11);
    vectors
}

/// The PrivateLink capture: 100 bytes.
fn capture() -> Vec<u8> {
    let capture = vectors().into_iter().find(|vector| vector.name == "privatelink-tcp4").unwrap();
    assert_eq!((capture.header.len(), capture.payload.len()), (100, 0));
    capture.header
}

/// A header of any kind, right or wrong.
fn raw(version_and_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.extend([version_and_command, family]);
    header.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
    header.extend(rest);
    header
}

/// PROXY, TCP over IPv4, with these TLVs.
fn tcp4(tlvs: &[u8]) -> Vec<u8> {
    raw(0x21, 0x11, &[&[10, 1, 2, 3, 10, 1, 2, 9, 0x9C, 0x40, 1, 0xBB], tlvs].concat())
}

#[track_caller]
fn done(input: &[u8], rules: ParserRules) -> Header<'_> {
    match parse(input, rules) {
        ParsedHeader::Done(header, len) => {
            assert_eq!(header.as_bytes(), &input[..len]);
            header
        }
        other @ (ParsedHeader::Partial(_) | ParsedHeader::Malformed(_)) => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(input: &[u8], reason: MalformedHeader) {
    assert_eq!(parse(input, STREAM), ParsedHeader::Malformed(reason));
    assert!(Outcome::reject(EndedAt::Header, reason.into()).place().is_some());
}

// The table of vectors.

#[test]
fn every_vector_has_its_outcome_and_its_payload_is_left_alone() {
    for vector in vectors() {
        let whole = vector.whole();
        let outcome = match parse(&whole, vector.rules()) {
            ParsedHeader::Malformed(MalformedHeader::CrcMismatch) => "malformed".to_owned(),
            ParsedHeader::Malformed(MalformedHeader::AmbiguousEndpoint) => "ambiguous-endpoint".to_owned(),
            ParsedHeader::Malformed(reason) => panic!("{}: {reason:?}", vector.name),
            ParsedHeader::Partial(needed) => panic!("{}: {needed}", vector.name),
            ParsedHeader::Done(header, len) => {
                assert_eq!(&whole[len..], vector.payload, "{}", vector.name);
                match (header.command(), EndpointClaim::from_tlv(header.endpoint())) {
                    (HeaderCommand::Local, _) => "local".to_owned(),
                    (HeaderCommand::Proxy, EndpointClaim::Absent) => "no-endpoint".to_owned(),
                    (HeaderCommand::Proxy, EndpointClaim::Id(id)) => id.to_string(),
                    (HeaderCommand::Proxy, EndpointClaim::Malformed) => panic!("{}", vector.name),
                }
            }
        };
        assert_eq!(outcome, vector.expected, "{}", vector.name);
    }
}

#[test]
fn every_capture_has_the_addresses_that_were_seen() {
    let mut seen = 0;
    for vector in vectors() {
        let Some((client, destination)) = vector.origin.split_once(" -> ") else { continue };
        let header = done(&vector.header, vector.rules());
        let client = client.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(header.client().unwrap().0, client);
        let Addresses::Ip { destination: read, .. } = header.addresses() else { panic!("{}", vector.name) };
        assert_eq!(read.0, destination.parse().unwrap());
        seen += 1;
    }
    assert_eq!(seen, 3);
}

#[test]
fn health_check_has_neither_client_nor_tlvs_on_either_transport() {
    for vector in vectors().iter().filter(|vector| vector.is_local()) {
        for rules in [STREAM, DATAGRAM] {
            let header = done(&vector.header, rules);
            assert_eq!(header.command(), HeaderCommand::Local);
            assert_eq!((header.addresses(), header.client()), (Addresses::Unspecified, None));
            assert_eq!((header.tlvs().count(), header.endpoint()), (0, None));
        }
    }
}

#[test]
fn wrong_transport_is_refused_on_both() {
    for vector in vectors().iter().filter(|vector| !vector.is_local()) {
        let other = if vector.rules() == STREAM { DATAGRAM } else { STREAM };
        assert_eq!(
            parse(&vector.whole(), other),
            ParsedHeader::Malformed(MalformedHeader::WrongTransport),
            "{}",
            vector.name
        );
    }
}

#[test]
fn wrong_checksum_passes_without_verification() {
    for vector in vectors().iter().filter(|vector| vector.expected == "malformed") {
        let header = done(&vector.header, ParserRules { verify_crc: false, ..vector.rules() });
        assert!(header.client().is_some() && header.endpoint().is_some());
    }
}

// Cuts.

#[test]
fn every_truncation_of_every_vector_asks_for_more_but_never_too_much() {
    for vector in vectors() {
        for cut in 0..vector.header.len() {
            match parse(&vector.header[..cut], vector.rules()) {
                ParsedHeader::Partial(needed) => {
                    assert!(needed > cut && needed <= vector.header.len(), "{} {cut} {needed}", vector.name);
                }
                ParsedHeader::Malformed(_) => {
                    assert_eq!(vector.expected, "malformed", "{} {cut}", vector.name);
                }
                ParsedHeader::Done(..) => panic!("{} is whole after {cut} bytes", vector.name),
            }
        }
    }
}

#[test]
fn every_split_of_every_vector_ends_in_the_same_result() {
    for vector in vectors() {
        let whole = vector.whole();
        let expected = parse(&whole, vector.rules());
        for split in vector.header.len()..=whole.len() {
            assert_eq!(parse(&whole[..split], vector.rules()), expected, "{} {split}", vector.name);
        }
    }
}

#[test]
fn reading_what_is_asked_for_gets_there_in_two_steps() {
    for vector in vectors() {
        let (mut held, mut steps) = (0, 0);
        while let ParsedHeader::Partial(needed) = parse(&vector.header[..held], vector.rules()) {
            held = needed;
            steps += 1;
        }
        assert_eq!(held, vector.header.len(), "{}", vector.name);
        assert!(steps <= 2, "{}", vector.name);
    }
}

/// More bytes may finish what was partial. What was decided stays decided.
fn assert_decided_once(input: &[u8], rules: ParserRules) {
    let mut decided = None;
    for len in 0..=input.len() {
        let parsed = parse(&input[..len], rules);
        match (&decided, &parsed) {
            (Some(decided), parsed) => assert_eq!(parsed, decided, "after {len} bytes"),
            (None, ParsedHeader::Partial(needed)) => assert!(*needed > len && *needed <= MAX_LEN),
            (None, ParsedHeader::Done(..) | ParsedHeader::Malformed(_)) => decided = Some(parsed),
        }
    }
}

// Flips.

/// What became of a bent PrivateLink capture, where it was accepted as a client's.
fn accepted(bent: &[u8], place: usize) -> bool {
    let original = capture();
    let original = done(&original, STREAM);
    match parse(bent, STREAM) {
        ParsedHeader::Malformed(_) => false,
        ParsedHeader::Partial(needed) => {
            assert!(needed > bent.len() && (14..16).contains(&place), "byte {place}");
            false
        }
        ParsedHeader::Done(header, _) if header.command() == HeaderCommand::Local => {
            assert_eq!((place, header.client(), header.endpoint()), (12, None, None));
            false
        }
        ParsedHeader::Done(header, _) => {
            assert!(header.tlvs().all(|tlv| tlv.kind != kind::CRC32C), "byte {place}: a checksum passed");
            assert!(header.client().is_none() || header.client() == original.client(), "byte {place}");
            assert!(header.endpoint().is_none() || header.endpoint() == original.endpoint(), "byte {place}");
            true
        }
    }
}

/// A checksum that is there is right, or the header is refused. Three changes make it vanish, and the format allows
/// a header without one: another type for its TLV, a length that ends before the TLVs, and the family that has no
/// addresses. None of them makes up a client or an endpoint.
#[test]
fn no_flipped_byte_makes_another_client_or_endpoint() {
    for payload in [0, 4096] {
        let mut accepted_at = Vec::new();
        for place in 0..100 {
            let whole = [capture(), vec![0; payload]].concat();
            for byte in (0..=u8::MAX).filter(|byte| *byte != whole[place]) {
                let mut bent = whole.clone();
                bent[place] = byte;
                if accepted(&bent, place) {
                    accepted_at.push((place, byte));
                }
            }
        }
        let retyped = (0..=u8::MAX).filter(|byte| *byte != kind::CRC32C).map(|byte| (28, byte));
        assert_eq!(accepted_at, [(13, 0x00), (15, 0x0C)].into_iter().chain(retyped).collect::<Vec<_>>());
    }
}

#[test]
fn no_flipped_bit_passes_but_in_the_type_of_the_checksum() {
    for place in 0..100 {
        for bit in 0..8 {
            let mut bent = capture();
            bent[place] ^= 1 << bit;
            assert_eq!(accepted(&bent, place), place == 28, "bit {bit} of byte {place}");
        }
    }
}

// Bounds.

#[test]
fn no_vector_and_no_wrong_header_costs_an_allocation() {
    let mut inputs: Vec<Vec<u8>> = vectors().iter().map(Vector::whole).collect();
    inputs.extend([tcp4(&[4]), tcp4(&[3, 0, 0]), raw(0x31, 0, &[]), raw(0x21, 0x11, &[]), b"GET".to_vec()]);
    inputs.push(raw(0x21, 0x00, &[4, 0, 0].repeat(1360)));
    for input in &inputs {
        for rules in [STREAM, DATAGRAM] {
            let counted = allocation_counter::measure(|| {
                if let ParsedHeader::Done(header, _) = parse(input, rules) {
                    let asked =
                        (header.client(), EndpointClaim::from_tlv(header.endpoint()), header.tlvs().count());
                    std::hint::black_box(asked);
                }
            });
            assert_eq!(counted.count_total, 0);
        }
    }
    let counted = allocation_counter::measure(|| drop(std::hint::black_box(vec![0_u8; 1])));
    assert_eq!(counted.count_total, 1, "the counter counts");
}

#[test]
fn as_many_tlvs_as_there_is_room_for_are_read() {
    for empty in [[kind::NOOP, 0, 0], [kind::AWS, 0, 0]] {
        let header = raw(0x21, 0x00, &empty.repeat(1360));
        assert_eq!(header.len(), MAX_LEN);
        assert_eq!(done(&header, STREAM).tlvs().count(), 1360);
        assert_eq!(done(&tcp4(&empty.repeat(1356)), STREAM).tlvs().count(), 1356);
    }
}

// Random bytes.

/// Everything that a caller asks of a header.
fn exercise(input: &[u8]) {
    for transport in [Transport::Stream, Transport::Datagram] {
        for verify_crc in [false, true] {
            let ParsedHeader::Done(header, len) = parse(input, ParserRules { transport, verify_crc }) else {
                continue;
            };
            assert!((FIXED_LEN..=MAX_LEN.min(input.len())).contains(&len));
            assert_eq!(header.as_bytes(), &input[..len]);
            assert!(input[..len].ends_with(header.tlvs().as_bytes()));
            assert!(header.tlvs().map(|tlv| 3 + tlv.value.len()).sum::<usize>() <= len - FIXED_LEN);
            assert!(
                EndpointClaim::from_tlv(header.endpoint()).id().is_none()
                    || header.command() == HeaderCommand::Proxy
            );
            let again = reseal(&header);
            let again = done(&again, ParserRules { transport, verify_crc: true });
            assert_eq!((again.addresses(), again.endpoint()), (header.addresses(), header.endpoint()));
        }
    }
}

/// One of the vectors with up to four bytes replaced, inserted or removed, and perhaps a length that fits again.
fn bent_vector() -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<prop::sample::Index>(), 0..3, any::<u8>());
    let edits = prop::collection::vec(edit, 0..4);
    (any::<prop::sample::Index>(), edits, any::<bool>()).prop_map(|(which, edits, fit)| {
        let mut bytes = which.get(&vectors()).whole();
        for (place, what, byte) in edits {
            let place = place.index(bytes.len());
            match what {
                0 => bytes[place] = byte,
                1 => bytes.insert(place, byte),
                _ => drop(bytes.remove(place)),
            }
        }
        if fit && bytes.len() >= FIXED_LEN {
            let len = u16::try_from(bytes.len() - FIXED_LEN).unwrap();
            bytes[14..16].copy_from_slice(&len.to_be_bytes());
        }
        bytes
    })
}

proptest! {
    #[test]
    fn random_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..300)) {
        exercise(&input);
        assert_decided_once(&input, STREAM);
    }

    #[test]
    fn random_content_never_panics(
        command in 0x20..0x22_u8,
        family in prop::sample::select(vec![0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32]),
        content in prop::collection::vec(prop_oneof![0..6_u8, Just(0xEA), any::<u8>()], 0..300),
    ) {
        let input = raw(command, family, &content);
        exercise(&input);
        assert_decided_once(&input, STREAM);
    }

    #[test]
    fn mutated_vectors_never_panic(input in bent_vector()) {
        exercise(&input);
        assert_decided_once(&input, STREAM);
        assert_decided_once(&input, DATAGRAM);
    }
}
