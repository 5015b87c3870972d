//! Silence: how long it may last, and whom it ends.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::harness::{Began, Conf, Proxy, end_of, read};
use super::raw::{Bytes, Raw, receive_all, send_all};

fn conf(timeouts: &str) -> Conf {
    Conf { timeouts: timeouts.to_owned(), ..Conf::default() }
}

/// One byte at a time, at intervals that are short for the timeout of a second, for longer than it.
async fn trickle(from: &mut TcpStream, to: &mut TcpStream) {
    let began = Began::now();
    while !began.is_past(Duration::from_millis(2_500)) {
        from.write_all(b".").await.unwrap();
        assert_eq!(read(to, 1).await, b".");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn silent_session_ends_at_the_idle_timeout_and_not_before() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"400ms\"\nhalf-close = \"1h\"")).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    client.write_all(b"hello").await.unwrap();
    let began = Began::now();
    assert_eq!(read(&mut backend, 5).await, b"hello");
    assert_eq!(end_of(&mut client).await.unwrap(), 0, "nothing is lost, so the end is clean");
    began.lasted(Duration::from_millis(400));
    assert_eq!(end_of(&mut backend).await.unwrap(), 0);
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "idle_timeout")];
    proxy.ended(&labels).is(1).await;
    assert_eq!(proxy.logged("idle_timeout").await["bytes"]["to_backend"], 5);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn one_direction_that_moves_keeps_a_session_alive() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1s\"\nhalf-close = \"1h\"")).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut other_client, mut other_backend) = raw.session(&proxy).await;
    tokio::join!(trickle(&mut client, &mut backend), trickle(&mut other_backend, &mut other_client));
    proxy.ended(&[("tenant", "acme")]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "idle_timeout")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn idle_session_with_unread_bytes_is_reset() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1s\"\nhalf-close = \"1h\"")).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    // The client reads a part and then nothing, until the proxy has lost its patience.
    let (mut whole, mut part) = (Bytes::new(2), Bytes::new(2));
    let (flooded, received) =
        tokio::join!(whole.send(&mut backend, 1 << 40), part.receive(&mut client, 1_000_000));
    received.unwrap();
    flooded.unwrap_err();
    let end = part.receive_to_end(&mut client).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    proxy.ended(&[("tenant", "acme"), ("by", "proxy"), ("why", "idle_timeout")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Two sessions, one in each direction, whose readers read nothing until the proxy has ended them: the silent ends.
async fn ended_for_their_readers(raw: &Raw, proxy: &Proxy) -> (TcpStream, TcpStream) {
    let (client, mut backend) = raw.session(proxy).await;
    let (mut other_client, other_backend) = raw.session(proxy).await;
    let (mut to_client, mut to_backend) = (Bytes::new(2), Bytes::new(3));
    let (first, second) =
        tokio::join!(to_client.send(&mut backend, 1 << 40), to_backend.send(&mut other_client, 1 << 40));
    first.unwrap_err();
    second.unwrap_err();
    (client, other_backend)
}

/// The kernel counts a closed window as it counts a dead host (`tcp_probe_timer` in net/ipv4/`tcp_timer.c`), and that one can be
/// had without another host.
#[tokio::test]
async fn peer_that_acknowledges_no_bytes_for_tcp_user_timeout_ends_as_unanswered() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1h\"\ntcp-user-timeout = \"1s\"")).await;
    let (mut client, mut other_backend) = ended_for_their_readers(&raw, &proxy).await;
    for by in ["client", "backend"] {
        let labels = [("tenant", "acme"), ("by", by), ("at", "forward"), ("why", "unanswered")];
        proxy.ended(&labels).is(1).await;
    }
    end_of(&mut client).await.unwrap_err();
    end_of(&mut other_backend).await.unwrap_err();
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_half_closed_session_ends_at_its_timeout() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1h\"\nhalf-close = \"400ms\"")).await;
    for client_first in [true, false] {
        let (client, backend) = raw.session(&proxy).await;
        let (mut first, mut silent) = if client_first { (client, backend) } else { (backend, client) };
        let began = Began::now();
        send_all(&mut first, 1, 70_000).await;
        receive_all(&mut silent, 1, 70_000).await;
        assert_eq!(end_of(&mut first).await.unwrap(), 0);
        began.lasted(Duration::from_millis(400));
    }
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "half_close_timeout")];
    proxy.ended(&labels).is(2).await;
    proxy.logged("half_close_timeout").await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn half_closed_session_that_sends_is_not_ended() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1h\"\nhalf-close = \"1s\"")).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut other_client, mut other_backend) = raw.session(&proxy).await;
    tokio::join!(
        async {
            client.shutdown().await.unwrap();
            assert_eq!(end_of(&mut backend).await.unwrap(), 0);
            trickle(&mut backend, &mut client).await;
        },
        async {
            other_backend.shutdown().await.unwrap();
            assert_eq!(end_of(&mut other_client).await.unwrap(), 0);
            trickle(&mut other_client, &mut other_backend).await;
        }
    );
    backend.shutdown().await.unwrap();
    other_client.shutdown().await.unwrap();
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(1).await;
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn half_close_timeout_applies_only_after_a_half_close() {
    let raw = Raw::bind().await;
    // Half-close is short, idle is long: a session with both halves open is not measured by it.
    let proxy = raw.proxy(conf("idle = \"1h\"\nhalf-close = \"100ms\"")).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut ended, mut ended_backend) = raw.session(&proxy).await;
    send_all(&mut ended, 1, 1).await;
    receive_all(&mut ended_backend, 1, 1).await;
    proxy.ended(&[("tenant", "acme"), ("why", "half_close_timeout")]).is(1).await;
    client.write_all(b"still here").await.unwrap();
    assert_eq!(read(&mut backend, 10).await, b"still here");
    drop((client, backend));
    proxy.ended(&[("tenant", "acme")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_whose_client_takes_no_bytes_for_stall_ends_as_stalled() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(conf("idle = \"1h\"\ntcp-user-timeout = \"0s\"\nstall = \"1s\"")).await;
    let (mut client, mut other_backend) = ended_for_their_readers(&raw, &proxy).await;
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "stalled")];
    proxy.ended(&labels).is(2).await;
    end_of(&mut client).await.unwrap_err();
    end_of(&mut other_backend).await.unwrap_err();
    // A session that holds nothing is not stalled, however long it is silent.
    let (mut client, mut backend) = raw.session(&proxy).await;
    trickle(&mut client, &mut backend).await;
    drop((client, backend));
    proxy.ended(&labels).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
