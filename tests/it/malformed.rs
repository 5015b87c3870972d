//! What is no header, what speaks for nobody, and what ends too early.

use tokio::io::AsyncWriteExt;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;
use vestibule::proxy_protocol::SIGNATURE;

use super::harness::{ACME, Conf, are_read, end_of, exchange, header, is_reset};

/// 10.100.0.10:40000 to 10.0.0.5:8080.
const ADDRESSES: [u8; 12] = [10, 100, 0, 10, 10, 0, 0, 5, 0x9C, 0x40, 0x1F, 0x90];
/// A proxied connection, TCP over IPv4.
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
const UNIX: u8 = 0x31;

/// A header of these parts, its length as it should be.
fn raw(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let len = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[command, family], &len, rest].concat()
}

/// Addresses and then these bytes where TLVs stand.
fn with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    raw(PROXY, TCP4, &[&ADDRESSES[..], tlvs].concat())
}

/// A header whose only TLV is its checksum, right but for the bits of `flip`.
fn with_crc(flip: u32) -> Vec<u8> {
    let mut bytes = with_tlvs(&[3, 0, 4, 0, 0, 0, 0]);
    let crc = crc32c::crc32c(&bytes) ^ flip;
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn flipped(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] ^= 0x10;
    bytes
}

/// Every kind, with examples.
fn malformed() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let too_long = [&SIGNATURE[..], &[PROXY, TCP4, 0x0F, 0xF1]].concat();
    let nearly = [&SIGNATURE[..11], b"!"].concat();
    vec![
        (
            "no_signature",
            vec![b"GET / HTTP/1.1\r\n\r\n".to_vec(), b"G".to_vec(), nearly, header(ACME)[1..].to_vec()],
        ),
        ("bad_version", [0x11, 0x31, 0x01].map(|byte| raw(byte, TCP4, &ADDRESSES)).into()),
        ("bad_command", [0x22, 0x2F].map(|byte| raw(byte, TCP4, &ADDRESSES)).into()),
        ("bad_family", [0x41, 0x13, 0x10, 0x01].map(|family| raw(PROXY, family, &ADDRESSES)).into()),
        ("wrong_transport", [0x12, 0x22, 0x32].map(|family| raw(PROXY, family, &[0; 216])).into()),
        ("header_too_long", vec![too_long, raw(PROXY, TCP4, &[0; 5000])]),
        (
            "short_address",
            [(TCP4, 11), (TCP6, 35), (UNIX, 215), (TCP4, 0)]
                .map(|(family, len)| raw(PROXY, family, &vec![0; len]))
                .into(),
        ),
        ("tlv_overrun", [&[4, 0, 2, 9][..], &[4], &[4, 0], &[4, 0, 0, 4]].map(with_tlvs).into()),
        (
            "bad_crc_tlv",
            [&[3, 0, 3, 1, 2, 3][..], &[3, 0, 5, 1, 2, 3, 4, 5], &[3, 0, 0]]
                .map(with_tlvs)
                .into_iter()
                .chain([with_tlvs(&[3, 0, 4, 0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0])])
                .collect(),
        ),
        (
            "crc_mismatch",
            // In the layout of the load balancer: an address, the checksum, the endpoint's ID, the padding.
            [16, 31, 40, 99].map(|at| flipped(header(ACME), at)).into_iter().chain([with_crc(1)]).collect(),
        ),
    ]
}

/// Just within the bounds that those break.
fn well_formed() -> Vec<Vec<u8>> {
    let mut longest = ADDRESSES.to_vec();
    longest.extend([4, 0x0F, 0xE1]);
    longest.resize(4080, 0);
    let families = [(TCP4, 12), (TCP6, 36), (UNIX, 216), (0x00, 0)];
    let shortest = families.map(|(family, len)| raw(PROXY, family, &vec![0; len]));
    [raw(PROXY, TCP4, &longest), with_tlvs(&[4, 0, 2, 9, 9]), with_tlvs(&[4, 0, 0]), with_crc(0)]
        .into_iter()
        .chain(shortest)
        .collect()
}

#[tokio::test]
async fn malformed_header_is_reset_counted_and_logged_once() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    for (why, examples) in malformed() {
        for bytes in &examples {
            is_reset(&mut proxy.send(bytes).await).await;
        }
        let count = u32::try_from(examples.len()).unwrap();
        proxy.ended(&[("by", "proxy"), ("at", "header"), ("why", why)]).is(count).await;
        proxy.ended(&[("tenant", ""), ("pool", ""), ("why", why)]).is(count).await;
    }
    assert_eq!(acme.sessions(), 0, "a backend heard of it");
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    for (why, examples) in malformed() {
        let lines: Vec<_> = log.iter().filter(|line| line["outcome"]["why"] == why).collect();
        assert_eq!(lines.len(), examples.len(), "{why}");
        for line in lines {
            assert_eq!((&line["outcome"]["by"], &line["outcome"]["at"]), (&"proxy".into(), &"header".into()));
            assert_eq!((&line["listener"], &line["attempts"]), (&"web".into(), &0.into()));
            for unknown in ["tenant", "endpoint", "client", "pool", "backend"] {
                assert!(line.get(unknown).is_none(), "{unknown} in {line}");
            }
        }
    }
}

#[tokio::test]
async fn header_just_within_each_bound_is_read() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], ..Conf::default() };
    let listener = format!("{}\non-no-endpoint = \"tenant:acme\"", conf.listener);
    let proxy = Conf { listener, ..conf }.start().await;
    for bytes in well_formed() {
        let stream = proxy.send(&[&bytes[..], b"payload"].concat()).await;
        match exchange(stream).await {
            Ok(answer) => assert_eq!(answer, b"payload", "{bytes:?}"),
            Err(error) => panic!("{error} after {bytes:?}; ends: {:?}", proxy.ends().await),
        }
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(8).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn wrong_checksum_is_accepted_without_verify_crc() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], ..Conf::default() };
    let listener = format!("{}\nverify-crc = false", conf.listener);
    let proxy = Conf { listener, ..conf }.start().await;
    // In the padding, in the checksum, in the client's port.
    for at in [99, 31, 24] {
        let stream = proxy.send(&[&flipped(header(ACME), at)[..], b"payload"].concat()).await;
        assert_eq!(exchange(stream).await.unwrap(), b"payload");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(3).await;
    // A checksum that is none stays malformed.
    is_reset(&mut proxy.send(&with_tlvs(&[3, 0, 3, 1, 2, 3])).await).await;
    proxy.ended(&[("why", "bad_crc_tlv")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn health_checks_of_the_load_balancer_are_counted_and_not_logged() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let local = nlb::health_check_header();
    let with_request = [&local[..], b"GET /healthz HTTP/1.1\r\n\r\n"].concat();
    for bytes in [&local[..], &with_request, &raw(0x20, 0x00, &[]), &raw(0x20, 0xFF, b"to be skipped")] {
        assert_eq!(end_of(&mut proxy.send(bytes).await).await.unwrap(), 0);
    }
    let (first, second) = local.split_at(20);
    let mut stream = proxy.send(first).await;
    are_read([&stream]).await;
    stream.write_all(second).await.unwrap();
    assert_eq!(end_of(&mut stream).await.unwrap(), 0);

    proxy.ended(&[("tenant", ""), ("by", "client"), ("at", "header"), ("why", "local")]).is(5).await;
    proxy.metric("vestibule_session_duration_seconds_count", &[]).is(0).await;
    assert_eq!(acme.sessions(), 0, "a backend heard of it");
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    assert_eq!(log.len(), 1, "{log:?}");
}

#[tokio::test]
async fn connections_without_a_byte_are_counted_and_not_logged() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    drop(proxy.connect().await);
    let resetting = proxy.connect().await;
    resetting.set_zero_linger().unwrap();
    drop(resetting);
    proxy.ended(&[("by", "client"), ("at", "header"), ("why", "zero_bytes")]).is(2).await;

    // Once more, when they are known to be waited for.
    let (closing, resetting) = (proxy.connect().await, proxy.connect().await);
    proxy.metric("vestibule_sessions_pending", &[]).is(2).await;
    drop(closing);
    resetting.set_zero_linger().unwrap();
    drop(resetting);
    proxy.ended(&[("tenant", ""), ("why", "zero_bytes")]).is(4).await;

    // A client that ends its side alone gets its end too.
    assert_eq!(exchange(proxy.connect().await).await.unwrap(), b"");
    proxy.ended(&[("why", "zero_bytes")]).is(5).await;
    assert_eq!(acme.sessions(), 0, "a backend heard of it");
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    assert_eq!(log.len(), 1, "{log:?}");
}

#[tokio::test]
async fn connection_that_ends_in_its_header_differs_from_one_without_a_byte() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let whole = header(ACME);
    for len in [1, 12, 15, 16, 99] {
        let stream = proxy.send(&whole[..len]).await;
        assert_eq!(exchange(stream).await.unwrap(), b"");
    }
    let truncated = [("tenant", ""), ("by", "client"), ("at", "header"), ("why", "header_truncated")];
    proxy.ended(&truncated).is(5).await;

    let stream = proxy.send(&whole[..99]).await;
    are_read([&stream]).await;
    stream.set_zero_linger().unwrap();
    drop(stream);
    proxy.ended(&[("by", "client"), ("at", "header"), ("why", "reset")]).is(1).await;
    assert_eq!(acme.sessions(), 0, "a backend heard of it");
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let count = |why: &str| log.iter().filter(|line| line["outcome"]["why"] == why).count();
    assert_eq!((count("header_truncated"), count("reset"), log.len()), (5, 1, 7));
}
