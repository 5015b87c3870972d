//! `send-proxy = "v2"`: what the backend is told of the client.

use std::net::SocketAddr;

use ppp::v2::Header as Foreign;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use vestibule::addr::{ClientAddr, DestinationAddr};
use vestibule::proxy_protocol::{
    self, Addresses, HeaderBuilder, HeaderCommand, ParsedHeader, ParserRules, Transport, kind,
};

use super::harness::{ACME, Conf, LIMIT, Proxy, connect, header, is_reset, read};
use super::raw::{Raw, receive_all, send_all};

const CLIENT: &str = "10.100.0.10:40000";

fn conf(listener: &str) -> Conf {
    let default = Conf::default();
    let listener = if listener.is_empty() { default.listener } else { listener.to_owned() };
    Conf { pool: "send-proxy = \"v2\"".to_owned(), listener, ..default }
}

/// What came in one segment: everything that one read returns.
async fn one_read(backend: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![0; 64 * 1024];
    let count = timeout(LIMIT, backend.read(&mut bytes)).await.expect("bytes within the limit").unwrap();
    bytes.truncate(count);
    bytes
}

/// Takes the header off; it has a checksum, and that is right. Two parsers agree on where it ends and what is in it.
fn parsed(bytes: &[u8]) -> (proxy_protocol::Header<'_>, &[u8]) {
    let ParsedHeader::Done(header, len) =
        proxy_protocol::parse(bytes, ParserRules { transport: Transport::Stream, verify_crc: true })
    else {
        panic!("no header: {bytes:x?}")
    };
    let checksums: Vec<_> = header.tlvs().filter(|tlv| tlv.kind == kind::CRC32C).collect();
    assert_eq!(checksums.len(), 1);
    // Once more by hand: the checksum is over the header with zeros in its place.
    let (own, rest) = bytes.split_at(len);
    let at = own.windows(7).position(|window| window[..3] == [3, 0, 4] && window[3..] == *checksums[0].value);
    let mut zeroed = own.to_vec();
    zeroed[at.unwrap() + 3..at.unwrap() + 7].fill(0);
    assert_eq!(crc32c::crc32c(&zeroed).to_be_bytes(), checksums[0].value);

    let foreign = Foreign::try_from(bytes).unwrap();
    assert_eq!(foreign.len(), len);
    if header.addresses() == Addresses::Unspecified {
        // ppp takes everything behind UNSPEC for addresses that nobody reads.
        return (header, rest);
    }
    let theirs: Vec<_> =
        foreign.tlvs().map(|tlv| tlv.map(|tlv| (tlv.kind, tlv.value.into_owned())).unwrap()).collect();
    let ours: Vec<_> = header.tlvs().map(|tlv| (tlv.kind, tlv.value.to_vec())).collect();
    assert_eq!(ours, theirs);
    (header, rest)
}

fn kinds(header: &proxy_protocol::Header<'_>) -> Vec<u8> {
    header.tlvs().map(|tlv| tlv.kind).collect()
}

fn addresses(client: &str, destination: &str) -> (ClientAddr, DestinationAddr) {
    (ClientAddr(client.parse().unwrap()), DestinationAddr(destination.parse().unwrap()))
}

async fn open(proxy: &Proxy, first: &[u8]) -> TcpStream {
    let mut client = connect(proxy.address("web")).await;
    client.write_all(first).await.unwrap();
    client
}

/// Ends a session as it should, and then the test.
async fn done(proxy: Proxy, client: TcpStream, backend: TcpStream) {
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn header_is_forwarded_unchanged_in_one_segment_with_the_payload() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let mut client = proxy.open(ACME, b"hello").await;
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    assert_eq!(bytes, [&header(ACME)[..], b"hello"].concat());
    let (told, rest) = parsed(&bytes);
    assert_eq!(
        (told.command(), told.client(), rest),
        (HeaderCommand::Proxy, Some(addresses(CLIENT, CLIENT).0), &b"hello"[..])
    );
    assert_eq!(
        (told.endpoint(), kinds(&told)),
        (Some(ACME.as_bytes()), vec![kind::CRC32C, kind::AWS, kind::NOOP])
    );
    // The header comes once, and counts as bytes that were forwarded.
    client.write_all(b" again").await.unwrap();
    assert_eq!(read(&mut backend, 6).await, b" again");
    let labels = [("tenant", "acme"), ("direction", "to_backend")];
    proxy.metric("vestibule_forwarded_bytes_total", &labels).is(100 + 11).await;
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn backend_without_send_proxy_gets_no_header() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let client = proxy.open(ACME, b"hello").await;
    let mut backend = raw.accept().await;
    assert_eq!(one_read(&mut backend).await, b"hello");
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn header_without_payload_is_forwarded_at_once() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let client = proxy.open(ACME, b"").await;
    let mut backend = raw.accept().await;
    assert_eq!(one_read(&mut backend).await, header(ACME));
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn large_burst_behind_the_header_follows_in_order() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let mut client = proxy.open(ACME, b"").await;
    let receive = async {
        let mut backend = raw.accept().await;
        assert_eq!(read(&mut backend, 100).await, header(ACME));
        receive_all(&mut backend, 1, 5_000_001).await;
        backend
    };
    let ((), backend) = tokio::join!(send_all(&mut client, 1, 5_000_001), receive);
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn header_in_pieces_is_forwarded_whole() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let mut client = proxy.connect().await;
    let whole = [&header(ACME)[..], b"hello"].concat();
    client.write_all(&whole[..50]).await.unwrap();
    proxy.metric("vestibule_sessions_pending", &[]).is(1).await;
    client.write_all(&whole[50..]).await.unwrap();
    let mut backend = raw.accept().await;
    assert_eq!(one_read(&mut backend).await, whole);
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn tlvs_keep_their_order_and_strange_ones_their_bytes() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let (from, to) = addresses("[2001:db8::1]:1234", "[2001:db8::2]:443");
    let strange = [0xE0, 0x05, 0xEA, 0x03, 0x04, 0xEF, 0x05];
    let mut builder = HeaderBuilder::proxy(Transport::Stream, from, to);
    for kind in strange {
        builder = match kind {
            kind::AWS => builder.endpoint(ACME),
            kind::CRC32C => builder.crc(),
            _ => builder.tlv(kind, &[kind; 9]),
        }
        .unwrap();
    }
    let sent = builder.build();
    let client = open(&proxy, &[&sent[..], b"hello"].concat()).await;
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    let (told, rest) = parsed(&bytes);
    assert_eq!((told.as_bytes(), rest), (&sent[..], &b"hello"[..]));
    assert_eq!(
        (kinds(&told), told.addresses()),
        (strange.to_vec(), Addresses::Ip { client: from, destination: to })
    );
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn wrong_checksum_is_corrected_without_verify_crc() {
    let mut wrong = header(ACME);
    let at = wrong.windows(3).position(|window| window == [3, 0, 4]).unwrap() + 3;
    wrong[at] ^= 0xFF;
    let bind = "bind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.0/8\"]\n";
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf(&format!("{bind}verify-crc = false"))).await;
    let client = open(&proxy, &[&wrong[..], b"hello"].concat()).await;
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    assert_eq!(parsed(&bytes).1, b"hello");
    assert_eq!(bytes, [&header(ACME)[..], b"hello"].concat());
    done(proxy, client, backend).await;

    // Where it is verified, nobody hears of it.
    let proxy = raw.proxy(conf(&format!("{bind}verify-crc = true"))).await;
    let mut client = open(&proxy, &wrong).await;
    is_reset(&mut client).await;
    proxy.ended(&[("by", "proxy"), ("at", "header"), ("why", "crc_mismatch")]).is(1).await;
    proxy.metric("vestibule_backend_connects_total", &[("pool", "acme")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn header_without_a_checksum_gets_one() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let (from, to) = addresses(CLIENT, "10.0.0.5:8080");
    let sent = HeaderBuilder::proxy(Transport::Stream, from, to).endpoint(ACME).unwrap().build();
    let client = open(&proxy, &sent).await;
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    let (told, rest) = parsed(&bytes);
    assert_eq!((told.client(), told.endpoint(), rest), (Some(from), Some(ACME.as_bytes()), &b""[..]));
    assert_eq!(kinds(&told), [kind::AWS, kind::CRC32C]);
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn client_without_an_address_is_forwarded_without_one() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("")).await;
    let sent = HeaderBuilder::unspecified().crc().and_then(|builder| builder.endpoint(ACME)).unwrap().build();
    let client = open(&proxy, &[&sent[..], b"hello"].concat()).await;
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    let (told, rest) = parsed(&bytes);
    assert_eq!(
        (told.command(), told.addresses(), rest),
        (HeaderCommand::Proxy, Addresses::Unspecified, &b"hello"[..])
    );
    assert_eq!((told.as_bytes(), told.endpoint()), (&sent[..], Some(ACME.as_bytes())));
    let line = async || proxy.log().into_iter().find(|line| line["tenant"] == "acme");
    drop((client, backend));
    let line = super::harness::eventually("the session's line", line).await;
    assert!(line["client"].is_null(), "{line}");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn without_a_header_of_its_own_a_client_gets_one_of_its_sockets_addresses() {
    let raw = Raw::bind().await;
    let more = r#"
[[listener]]
name = "plain"
bind = "127.0.0.1:0"
proxy-protocol = "off"
tenant = "acme"
"#;
    let proxy = raw.proxy(Conf { more: more.to_owned(), ..conf("") }).await;
    let address = proxy.address("plain");
    let mut client = connect(address).await;
    let own: SocketAddr = client.local_addr().unwrap();
    let mut backend = raw.accept().await;
    let bytes = one_read(&mut backend).await;
    let (told, rest) = parsed(&bytes);
    let expected = Addresses::Ip { client: ClientAddr(own), destination: DestinationAddr(address) };
    assert_eq!((told.addresses(), told.endpoint(), rest), (expected, None, &b""[..]));
    assert_eq!(kinds(&told), [kind::CRC32C]);
    client.write_all(b"hello").await.unwrap();
    assert_eq!(read(&mut backend, 5).await, b"hello");
    done(proxy, client, backend).await;
}

#[tokio::test]
async fn backend_of_a_retry_gets_the_header_too() {
    let (refusing, raw) = (super::raw::Held::bind(), Raw::bind().await);
    let acme = vec![refusing.address(), raw.address()];
    let pool = "send-proxy = \"v2\"\nbalance = \"round-robin\"".to_owned();
    let proxy = Conf { acme, pool, ..Conf::default() }.start().await;
    let client = proxy.open(ACME, b"hello").await;
    let mut backend = raw.accept().await;
    assert_eq!(one_read(&mut backend).await, [&header(ACME)[..], b"hello"].concat());
    proxy.metric("vestibule_backend_connects_total", &[("result", "connect_refused")]).is(1).await;
    done(proxy, client, backend).await;
}
