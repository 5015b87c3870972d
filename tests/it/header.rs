//! The header: whole and in pieces, with payload and without, and never more than one.

use tokio::io::AsyncWriteExt;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;
use vestibule::proxy_protocol::{HeaderBuilder, MAX_LEN};

use super::harness::{ACME, Conf, GLOBEX, Proxy, are_read, exchange, header};

async fn proxy(acme: &TestBackend) -> Proxy {
    Conf { acme: vec![acme.address()], ..Conf::default() }.start().await
}

#[tokio::test]
async fn header_in_two_segments_is_read_at_every_split() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = proxy(&acme).await;
    let tenant = |cut: usize| if cut.is_multiple_of(2) { (GLOBEX, "") } else { (ACME, "acme-1\n") };
    let mut sessions = Vec::new();
    for cut in 1..100 {
        let whole = header(tenant(cut).0);
        assert_eq!(whole.len(), 100);
        let (first, second) = whole.split_at(cut);
        sessions.push((cut, proxy.send(first).await, second.to_owned()));
    }
    proxy.metric("vestibule_sessions_pending", &[("listener", "web")]).is(99).await;
    are_read(sessions.iter().map(|(_, stream, _)| stream)).await;
    assert_eq!(acme.sessions(), 0, "a part of a header leads nowhere");
    for (cut, stream, second) in &mut sessions {
        let payload = format!("cut at {cut}");
        stream.write_all(&[second, payload.as_bytes()].concat()).await.unwrap();
    }
    for (cut, stream, _) in sessions {
        let answer = String::from_utf8(exchange(stream).await.unwrap()).unwrap();
        assert_eq!(answer, format!("{}cut at {cut}", tenant(cut).1));
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(50).await;
    proxy.ended(&[("tenant", "globex"), ("why", "done")]).is(49).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn header_arriving_byte_by_byte_is_read() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut stream = proxy.connect().await;
    for (place, byte) in [&header(ACME)[..], b"payload"].concat().into_iter().enumerate() {
        stream.write_all(&[byte]).await.unwrap();
        // Alone through the fixed part and now and then beyond; the others as the proxy happens to read them.
        if place < 17 || place.is_multiple_of(9) {
            are_read([&stream]).await;
        }
    }
    assert_eq!(exchange(stream).await.unwrap(), b"payload");
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn payload_may_come_with_the_header_after_it_or_never() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let with = proxy.open(ACME, b"in the same segment").await;
    assert_eq!(exchange(with).await.unwrap(), b"in the same segment");

    let mut after = proxy.open(ACME, b"").await;
    are_read([&after]).await;
    after.write_all(b"in the next").await.unwrap();
    assert_eq!(exchange(after).await.unwrap(), b"in the next");

    let never = proxy.open(ACME, b"").await;
    assert_eq!(exchange(never).await.unwrap(), b"");

    // More than one read takes before the backend is connected.
    let much: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let stream = proxy.send(&header(ACME)).await;
    let (mut from, mut to) = stream.into_split();
    let (sent, received) = tokio::join!(
        async {
            to.write_all(&much).await?;
            to.shutdown().await
        },
        async {
            let mut answer = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut from, &mut answer).await.map(|_| answer)
        },
    );
    sent.unwrap();
    assert!(received.unwrap() == much, "400,000 bytes came back otherwise");

    assert_eq!(acme.sessions(), 4);
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(4).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn exactly_one_header_is_taken_and_a_second_is_payload() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = proxy(&acme).await;
    let forged = [&header(GLOBEX)[..], b"let me in"].concat();
    let expected = [b"acme-1\n", &forged[..]].concat();

    let together = proxy.open(ACME, &forged).await;
    assert_eq!(exchange(together).await.unwrap(), expected);

    let mut apart = proxy.open(ACME, b"").await;
    are_read([&apart]).await;
    apart.write_all(&forged).await.unwrap();
    assert_eq!(exchange(apart).await.unwrap(), expected);

    // Not even a health check's header, or one that is malformed, is looked at.
    for second in [nlb::health_check_header(), b"\r\n\r\n\0\r\nQUIT\n\xFF\xFF\xFF\xFF".to_vec()] {
        let answer = exchange(proxy.open(ACME, &second).await).await.unwrap();
        assert_eq!(answer, [b"acme-1\n", &second[..]].concat());
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(4).await;
    proxy.ended(&[("tenant", "globex")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_address_comes_from_the_header_and_may_be_absent() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let v6 = nlb::header("[fd00::7]:40000".parse().unwrap(), "[fd00::1]:80".parse().unwrap(), Some(ACME));
    let unspecified = HeaderBuilder::unspecified().endpoint(ACME).unwrap().build();
    for bytes in [v6, unspecified] {
        let answer = exchange(proxy.send(&[&bytes[..], b"payload"].concat()).await).await.unwrap();
        assert_eq!(answer, b"payload");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    let log = proxy.finish_with_log().await;
    let mut clients: Vec<_> = log.iter().map(|line| line["client"].as_str()).collect();
    clients.sort_unstable();
    assert_eq!(clients, [None, Some("[fd00::7]:40000")]);
    assert!(log.iter().all(|line| line["peer"].as_str().unwrap().starts_with("127.0.0.1:")), "{log:?}");
}

#[tokio::test]
async fn longest_header_is_read_in_pieces() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let longest = HeaderBuilder::unspecified().endpoint(ACME).unwrap().crc().unwrap();
    let longest = longest.pad_to(MAX_LEN).unwrap().build();
    assert_eq!(longest.len(), 4096);
    let mut stream = proxy.connect().await;
    for piece in longest.chunks(1000) {
        stream.write_all(piece).await.unwrap();
        are_read([&stream]).await;
    }
    stream.write_all(b"payload").await.unwrap();
    assert_eq!(exchange(stream).await.unwrap(), b"payload");
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
