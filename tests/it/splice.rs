//! Large transfers: they go through pipes, nothing is lost or crossed, and a pipe is held no longer than it is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, Proxy, exchange, read};
use super::raw::{Bytes, Raw, ping_pong, receive_all, send_all};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

async fn bytes(proxy: &Proxy, mode: &str, direction: &str) -> f64 {
    proxy.value("vestibule_forward_mode_bytes_total", &[("mode", mode), ("direction", direction)]).await
}

#[tokio::test]
async fn gibibyte_in_each_direction_is_spliced_and_complete() {
    for (by, direction) in [("backend", "to_client"), ("client", "to_backend")] {
        let raw = Raw::bind().await;
        let proxy = raw.proxy(Conf::default()).await;
        let (client, backend) = raw.session(&proxy).await;
        let (mut sender, mut receiver) = if by == "client" { (client, backend) } else { (backend, client) };
        tokio::join!(send_all(&mut sender, 3, GIB), receive_all(&mut receiver, 3, GIB));
        drop(receiver);
        proxy.ended(&[("tenant", "acme"), ("by", by), ("why", "done")]).is(1).await;
        assert!(bytes(&proxy, "splice", direction).await > 0.9 * 1024.0 * 1024.0 * 1024.0);
        assert_eq!(proxy.logged("done").await["bytes"][direction], GIB);
        proxy.others_are_unharmed().await;
        proxy.finish().await;
    }
}

#[tokio::test]
async fn lab_source_and_sink_match_the_received_bytes() {
    let source = TestBackend::start("acme-1", BackendBehavior::Source(3_000_001)).await.unwrap();
    let proxy = Conf { acme: vec![source.address()], ..Conf::default() }.start().await;
    let answer = exchange(proxy.open(ACME, b"").await).await.unwrap();
    let mut expected = vec![0; 3_000_001];
    vestibule::lab::backend::pattern(0, &mut expected);
    assert!(answer == expected);
    proxy.finish().await;

    let sink = TestBackend::start("acme-1", BackendBehavior::Sink).await.unwrap();
    let proxy = Conf { acme: vec![sink.address()], ..Conf::default() }.start().await;
    let mut client = proxy.open(ACME, b"").await;
    client.write_all(&expected).await.unwrap();
    let answer = String::from_utf8(exchange(client).await.unwrap()).unwrap();
    assert_eq!(answer, format!("3000001 {:08x}\n", crc32c::crc32c(&expected)));
    proxy.finish().await;
}

#[tokio::test]
async fn small_messages_are_copied_and_hold_no_pipe() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..50 {
        ping_pong(&mut client, &mut backend, &mut random).await;
    }
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.metric("vestibule_pipe_memory_bytes", &[]).is(0).await;
    proxy.metric("vestibule_forward_mode_bytes_total", &[("mode", "splice")]).is(0).await;
    proxy.metric("vestibule_forward_mode_bytes_total", &[("mode", "copy")]).is_at_least(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn ten_thousand_segments_of_one_byte_arrive_in_order() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    drip(&mut client, &mut backend, 1).await;
    drip(&mut backend, &mut client, 2).await;
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    for direction in ["to_backend", "to_client"] {
        let labels = [("tenant", "acme"), ("direction", direction)];
        proxy.metric("vestibule_forwarded_bytes_total", &labels).is(10_000).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

async fn drip(from: &mut TcpStream, to: &mut TcpStream, seed: u64) {
    let (mut sent, mut received) = (Bytes::new(seed), Bytes::new(seed));
    let drops = async {
        for _ in 0..10_000 {
            sent.send(from, 1).await.unwrap();
        }
    };
    let (arrived, ()) = tokio::join!(received.receive(to, 10_000), drops);
    arrived.unwrap();
}

#[tokio::test]
async fn slow_reader_slows_a_fast_sender() {
    const WHOLE: u64 = 512 * MIB;
    /// What the kernel's buffers of all four sockets can take: their default bounds are 6 and 4 MiB, and this is
    /// above what large machines have. What the proxy held beyond would show.
    const BUFFERS: u64 = 128 * MIB;
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let sending = tokio::spawn(async move {
        let mut bytes = Bytes::new(4);
        while bytes.count < WHOLE {
            bytes.send(&mut backend, 64 * 1024).await.unwrap();
            counted.store(bytes.count, Ordering::Relaxed);
        }
        backend.shutdown().await.unwrap();
        backend
    });
    let mut bytes = Bytes::new(4);
    for _ in 0..3 {
        bytes.receive(&mut client, 2 * MIB).await.unwrap();
        // The client pauses until the sender has stood still for a while.
        let (mut before, mut still) = (0, 0);
        while still < 20 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            let now = sent.load(Ordering::Relaxed);
            still = if now == before { still + 1 } else { 0 };
            before = now;
        }
        assert!(before - bytes.count < BUFFERS, "{before} sent, {} received", bytes.count);
    }
    let held = proxy.value("vestibule_pipe_memory_bytes", &[]).await;
    assert!(held < 600_000.0, "one pipe of 256 KiB for each direction at most: {held}");
    assert_eq!(bytes.receive_to_end(&mut client).await.unwrap(), WHOLE - 6 * MIB);
    drop((client, sending.await.unwrap()));
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn without_memory_for_pipes_everything_is_copied() {
    let raw = Raw::bind().await;
    let conf = Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() };
    let proxy = raw.proxy(conf).await;
    let (client, backend) = raw.session(&proxy).await;
    let ((mut from_client, mut to_client), (mut from_backend, mut to_backend)) =
        (client.into_split(), backend.into_split());
    tokio::join!(
        send_all(&mut to_client, 1, 20 * MIB + 1),
        receive_all(&mut from_backend, 1, 20 * MIB + 1),
        send_all(&mut to_backend, 2, 20 * MIB + 3),
        receive_all(&mut from_client, 2, 20 * MIB + 3),
    );
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.metric("vestibule_forward_mode_bytes_total", &[("mode", "splice")]).is(0).await;
    proxy.metric("vestibule_pipes_refused_total", &[]).is_at_least(2).await;
    proxy.metric("vestibule_pipe_memory_bytes", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Has the backend send and the client read until the session holds a pipe, with the client not reading on.
async fn stuck_in_a_pipe(proxy: &Proxy, raw: &Raw, seed: u64) -> (TcpStream, Bytes, JoinHandle<()>) {
    let (mut client, mut backend) = raw.session(proxy).await;
    let sending = tokio::spawn(async move { send_all(&mut backend, seed, 256 * MIB).await });
    let mut bytes = Bytes::new(seed);
    while proxy.value("vestibule_pipes_in_use", &[]).await < 0.5 {
        bytes.receive(&mut client, MIB).await.unwrap();
    }
    (client, bytes, sending)
}

#[tokio::test]
async fn when_the_pipes_are_spent_others_copy() {
    let raw = Raw::bind().await;
    let conf = Conf { process: "pipe-memory = \"256KiB\"".to_owned(), ..Conf::default() };
    let proxy = raw.proxy(conf).await;
    let (mut client, mut received, sending) = stuck_in_a_pipe(&proxy, &raw, 1).await;
    proxy.metric("vestibule_pipes_refused_total", &[]).is(0).await;
    let spliced = async || bytes(&proxy, "splice", "to_backend").await;
    // The session that came later does without, and is none the worse.
    let (mut other, mut backend) = raw.session(&proxy).await;
    tokio::join!(send_all(&mut other, 2, 20 * MIB), receive_all(&mut backend, 2, 20 * MIB));
    proxy.metric("vestibule_pipes_refused_total", &[]).is_at_least(1).await;
    proxy.metric("vestibule_pipes_in_use", &[]).is(1).await;
    assert!(spliced().await < 0.5);
    drop((other, backend));
    received.receive_to_end(&mut client).await.unwrap();
    assert_eq!(received.count, 256 * MIB);
    sending.await.unwrap();
    drop(client);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    assert!(bytes(&proxy, "splice", "to_client").await > 0.0);
    // Two workers may keep half of the budget, and half of one pipe is none.
    proxy.metric("vestibule_pipe_memory_bytes", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn pipe_that_is_not_empty_never_reaches_another_session() {
    let raw = Raw::bind().await;
    let conf = Conf { process: "pipe-memory = \"256KiB\"".to_owned(), workers: 1, ..Conf::default() };
    let proxy = raw.proxy(conf).await;
    for seed in 0..4 {
        // Its client goes away while the only pipe is full of its bytes.
        let (client, _, sending) = stuck_in_a_pipe(&proxy, &raw, 2 * seed).await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(sending.await.is_err(), "the backend's write failed");
        proxy.metric("vestibule_pipes_in_use", &[]).is(0).await;
        let (mut client, mut backend) = raw.session(&proxy).await;
        let seed = 2 * seed + 1;
        tokio::join!(send_all(&mut backend, seed, 8 * MIB), receive_all(&mut client, seed, 8 * MIB));
    }
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "reset")]).is(4).await;
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("why", "done")]).is(4).await;
    proxy.metric("vestibule_pipes_refused_total", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn idle_session_releases_its_pipes_and_continues() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let mut random = fastrand::Rng::with_seed(6);
    for seed in [1, 2] {
        let (mut sent, mut received) = (Bytes::new(seed), Bytes::new(seed));
        let (done, too) =
            tokio::join!(sent.send(&mut backend, 40 * MIB), received.receive(&mut client, 40 * MIB));
        done.and(too).unwrap();
        assert!(bytes(&proxy, "splice", "to_client").await > 0.0);
        proxy.metric("vestibule_pipes_in_use", &[]).is(0).await;
        proxy.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(1).await;
        ping_pong(&mut client, &mut backend, &mut random).await;
    }
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn bytes_after_an_urgent_byte_are_not_lost() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut sent, mut received) = (Bytes::new(3), Bytes::new(3));
    // The session holds a pipe when it comes to the urgent byte, where the kernel's splice stops, and then to the
    // end. The byte itself travels beside the stream and is left out of it.
    let bulk = tokio::join!(sent.send(&mut client, 8 * MIB), received.receive(&mut backend, 8 * MIB));
    bulk.0.and(bulk.1).unwrap();
    sent.send(&mut client, 40_000).await.unwrap();
    assert_eq!(socket2::SockRef::from(&client).send_out_of_band(b"!").unwrap(), 1);
    sent.send(&mut client, 100_000).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(received.receive_to_end(&mut backend).await.unwrap(), 140_000);
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(1).await;
    assert_eq!(proxy.logged("done").await["bytes"]["to_backend"], 8 * MIB + 140_000);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_copies_again_when_its_traffic_gets_small() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let mut stream = proxy.open(ACME, b"").await;
    let (mut reader, mut writer) = stream.split();
    let bulk = vec![7; 8 << 20];
    let mut back = vec![0; bulk.len()];
    let (sent, received) = tokio::join!(writer.write_all(&bulk), reader.read_exact(&mut back));
    sent.unwrap();
    received.unwrap();
    assert!(back == bulk);
    let copied = [("mode", "copy"), ("direction", "to_client")];
    let before = proxy.value("vestibule_forward_mode_bytes_total", &copied).await;
    // Never a second's rest, and more messages than a byte counts.
    for _ in 0..300 {
        stream.write_all(b"ping").await.unwrap();
        assert_eq!(read(&mut stream, 4).await, b"ping");
    }
    let small = proxy.value("vestibule_forward_mode_bytes_total", &copied).await - before;
    assert!(small > 1_100.0, "only {small} of 1200 bytes were copied");
    assert_eq!(exchange(stream).await.unwrap(), b"");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
