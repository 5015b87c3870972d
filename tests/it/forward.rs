//! How a session ends: halves, resets, and what was on its way then.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, GLOBEX, Proxy, end_of, exchange, is_reset, read};
use super::raw::{Bytes, Raw, receive_all, send_all};

const MIB: u64 = 1024 * 1024;

/// The one session of acme ended like this, with so many bytes, in metrics and log alike.
async fn ended(proxy: &Proxy, by: &str, why: &str, to_backend: u64, to_client: u64) {
    proxy.ended(&[("tenant", "acme"), ("by", by), ("at", "forward"), ("why", why)]).is(1).await;
    proxy.ended(&[("tenant", "acme")]).is(1).await;
    let line = proxy.logged(why).await;
    assert_eq!((&line["outcome"]["by"], &line["attempts"]), (&by.into(), &1.into()));
    let logged = (line["bytes"]["to_backend"].as_u64(), line["bytes"]["to_client"].as_u64());
    assert_eq!(logged, (Some(to_backend), Some(to_client)));
    for (direction, count) in [("to_backend", to_backend), ("to_client", to_client)] {
        let count = u32::try_from(count).unwrap();
        for metric in ["vestibule_forwarded_bytes_total", "vestibule_backend_bytes_total"] {
            proxy.metric(metric, &[("pool", "acme"), ("direction", direction)]).is(count).await;
        }
    }
}

#[tokio::test]
async fn half_close_by_client_still_delivers_the_whole_answer() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    send_all(&mut client, 1, 100_001).await;
    receive_all(&mut backend, 1, 100_001).await;
    tokio::join!(send_all(&mut backend, 2, 3 * MIB + 1), receive_all(&mut client, 2, 3 * MIB + 1));
    ended(&proxy, "client", "done", 100_001, 3 * MIB + 1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn half_close_by_backend_still_delivers_client_bytes() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    send_all(&mut backend, 2, 100_001).await;
    receive_all(&mut client, 2, 100_001).await;
    tokio::join!(send_all(&mut client, 1, 3 * MIB + 1), receive_all(&mut backend, 1, 3 * MIB + 1));
    ended(&proxy, "backend", "done", 3 * MIB + 1, 100_001).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn backend_that_ends_first_still_receives_the_clients_bytes() {
    let backend = TestBackend::start("acme-1", BackendBehavior::HalfClosing).await.unwrap();
    let proxy = Conf { acme: vec![backend.address()], ..Conf::default() }.start().await;
    let mut client = proxy.open(ACME, b"first").await;
    assert_eq!(read(&mut client, 4).await, b"bye\n");
    assert_eq!(end_of(&mut client).await.unwrap(), 0);
    send_all(&mut client, 1, 70_000).await;
    ended(&proxy, "backend", "done", 70_005, 4).await;
    assert_eq!(backend.received(), 70_005);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn both_sides_may_close_at_once() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    for _ in 0..20 {
        let (mut client, mut backend) = raw.session(&proxy).await;
        tokio::join!(send_all(&mut client, 1, 300_000), send_all(&mut backend, 2, 300_001));
        tokio::join!(receive_all(&mut backend, 1, 300_000), receive_all(&mut client, 2, 300_001));
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(20).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn end_of_stream_right_after_a_burst_loses_no_byte() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut sent, mut sessions) = (0, 0);
    for size in [0, 1, 65_535, 65_536, 65_537, 131_072, 262_143, 262_144, 262_145, MIB, 9 * MIB + 7] {
        // Whoever has sent closes altogether, not only its half.
        let (mut client, mut backend) = raw.session(&proxy).await;
        let burst = async {
            send_all(&mut client, size, size).await;
            drop(client);
        };
        tokio::join!(burst, receive_all(&mut backend, size, size));
        let (mut client, backend_too) = raw.session(&proxy).await;
        let burst = async {
            let mut backend = backend_too;
            send_all(&mut backend, size, size).await;
        };
        tokio::join!(burst, receive_all(&mut client, size, size));
        sent += size;
        sessions += 2;
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(sessions).await;
    for direction in ["to_backend", "to_client"] {
        let labels = [("tenant", "acme"), ("direction", direction)];
        proxy.metric("vestibule_forwarded_bytes_total", &labels).is(u32::try_from(sent).unwrap()).await;
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_reset_resets_the_backend() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    client.write_all(b"hello").await.unwrap();
    assert_eq!(read(&mut backend, 5).await, b"hello");
    client.set_zero_linger().unwrap();
    drop(client);
    is_reset(&mut backend).await;
    ended(&proxy, "client", "reset", 5, 0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_reset_is_detected_while_the_backend_sends() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut reading, mut writing) = backend.split();
    // The client reads a part and then nothing: the rest fills every buffer on the way.
    let flood = async {
        let error = Bytes::new(2).send(&mut writing, 1 << 40).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    };
    let reset = async {
        Bytes::new(2).receive(&mut client, MIB).await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
    };
    tokio::join!(flood, reset);
    // The write has taken the error; what is left to be read is an end or the same error.
    let end = reading.read(&mut [0; 1]).await.map_err(|error| error.kind());
    assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("at", "forward"), ("why", "reset")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn client_reset_after_half_close_resets_the_backend() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    send_all(&mut client, 1, 5).await;
    receive_all(&mut backend, 1, 5).await;
    client.set_zero_linger().unwrap();
    drop(client);
    // Nothing can be read of the client any more, so it is the answer that finds out.
    Bytes::new(2).send(&mut backend, 1 << 40).await.unwrap_err();
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("at", "forward"), ("why", "reset")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn backend_reset_resets_the_client() {
    let backend = TestBackend::start("acme-1", BackendBehavior::ResetAfter(5)).await.unwrap();
    let proxy = Conf { acme: vec![backend.address()], ..Conf::default() }.start().await;
    let mut client = proxy.open(ACME, b"hell").await;
    client.write_all(b"o").await.unwrap();
    is_reset(&mut client).await;
    ended(&proxy, "backend", "reset", 5, 0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn immediate_backend_reset_resets_the_client() {
    let backend = TestBackend::start("acme-1", BackendBehavior::Reset).await.unwrap();
    let conf = Conf { acme: vec![backend.address()], ..Conf::default() };
    let proxy = Conf { pool: "attempts = 1".to_owned(), ..conf }.start().await;
    for _ in 0..20 {
        let mut client = proxy.open(ACME, b"hello").await;
        is_reset(&mut client).await;
    }
    // It depends on who is faster whether the proxy still hears of it while it connects.
    proxy.ended(&[("tenant", "acme"), ("by", "backend")]).is(20).await;
    let labels = |why| [("tenant", "acme"), ("why", why)];
    let reset = proxy.value("vestibule_sessions_ended_total", &labels("reset")).await;
    let failed = proxy.value("vestibule_sessions_ended_total", &labels("connect_failed")).await;
    assert!((reset + failed - 20.0).abs() < 0.5, "{reset} reset and {failed} failed");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn answer_before_a_reset_is_delivered_before_the_reset() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (client, mut backend) = raw.session(&proxy).await;
    let (mut reading, mut writing) = client.into_split();
    let upload = tokio::spawn(async move { Bytes::new(1).send(&mut writing, 1 << 40).await });
    // The backend has read a part of the upload only: its close is a reset, with its answer before it.
    Bytes::new(1).receive(&mut backend, MIB).await.unwrap();
    Bytes::new(2).send(&mut backend, 10_000).await.unwrap();
    drop(backend);
    let mut answer = Bytes::new(2);
    let end = answer.receive_to_end(&mut reading).await;
    let uploaded = upload.await.unwrap().map_err(|error| error.kind());
    assert_eq!(answer.count, 10_000, "{end:?}");
    // One of the two learns of the reset by that name, whichever is first.
    let reset = Err(ErrorKind::ConnectionReset);
    assert!(end.map_err(|error| error.kind()) == reset.map(|(): ()| 0) || uploaded == reset, "{uploaded:?}");
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("at", "forward"), ("why", "reset")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn byte_counts_are_exact() {
    let backend = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = Conf { acme: vec![backend.address()], ..Conf::default() }.start().await;
    let (mut total, mut sessions) = (0, 0);
    for size in [0, 1, 2, 16_383, 16_384, 16_385, 65_535, 65_537, 131_073, 262_143, 1_000_003] {
        let mut client = proxy.open(ACME, b"").await;
        assert_eq!(read(&mut client, 7).await, b"acme-1\n");
        let (mut reading, mut writing) = client.split();
        tokio::join!(send_all(&mut writing, size, size), receive_all(&mut reading, size, size));
        total += u32::try_from(size).unwrap();
        sessions += 1;
        proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(sessions).await;
        let count = |direction: &str| {
            proxy.log().last().map(|line| line["bytes"][direction].as_u64().unwrap()).unwrap_or_default()
        };
        let lines = async || (proxy.log().len() == sessions as usize).then_some(());
        super::harness::eventually("the session's line", lines).await;
        assert_eq!((count("to_backend"), count("to_client")), (size, size + 7));
    }
    for (direction, count) in [("to_backend", total), ("to_client", total + 7 * sessions)] {
        for metric in ["vestibule_forwarded_bytes_total", "vestibule_backend_bytes_total"] {
            proxy.metric(metric, &[("pool", "acme"), ("direction", direction)]).is(count).await;
        }
        proxy.metric("vestibule_forward_mode_bytes_total", &[("direction", direction)]).is(count).await;
    }
    proxy.metric("vestibule_session_duration_seconds_count", &[]).is(sessions).await;
    proxy.metric("vestibule_backend_connects_total", &[("result", "done")]).is(sessions).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn sessions_are_reset_when_the_process_ends() {
    let raw = Raw::bind().await;
    let mut proxy = raw.proxy(Conf::default()).await;
    let live = Arc::clone(proxy.server().live());
    let (mut idle, mut idle_backend) = raw.session(&proxy).await;
    let (mut half, mut half_backend) = raw.session(&proxy).await;
    send_all(&mut half, 1, 5).await;
    receive_all(&mut half_backend, 1, 5).await;
    let other = exchange(proxy.open(GLOBEX, b"hello").await).await.unwrap();
    assert_eq!(other, b"hello");
    proxy.ended(&[("tenant", "globex")]).is(1).await;
    proxy.end().await;
    for stream in [&mut idle, &mut idle_backend, &mut half] {
        is_reset(stream).await;
    }
    let lines = proxy.log();
    let mut whys: Vec<_> = lines.iter().filter_map(|line| line["outcome"]["why"].as_str()).collect();
    whys.sort_unstable();
    assert_eq!(whys, ["done", "drained", "drained"]);
    assert_eq!(live.sessions.used(), 0);
    assert_eq!(live.shards.iter().map(|shard| shard.worker.pipes.value()).sum::<u64>(), 0);
}

#[tokio::test]
async fn client_reset_with_pending_bytes_is_detected_before_the_idle_timeout() {
    let acme = TestBackend::start("acme-1", BackendBehavior::BlackHole).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let stream = proxy.open(ACME, b"").await;
    let chunk = vec![7; 1 << 20];
    // Until nothing has gone for a while: the backend reads nothing, and every buffer on the way is full.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), stream.writable()).await {
        written.unwrap();
        match stream.try_write(&chunk) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    stream.set_zero_linger().unwrap();
    drop(stream);
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "reset")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
