//! Sessions without a whole header: bounded in time and in number.

use std::net::SocketAddr;

use socket2::{Domain, Socket, Type};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{
    ACME, Conf, GLOBEX, Proxy, are_read, connect, end_of, exchange, header, is_reset, read,
};

async fn proxy(acme: &TestBackend, timeouts: &str, listener: &str) -> Proxy {
    let conf = Conf { acme: vec![acme.address()], timeouts: timeouts.to_owned(), ..Conf::default() };
    let listener = format!("{}\n{listener}", conf.listener);
    Conf { listener, ..conf }.start().await
}

#[tokio::test]
async fn header_timeout_ends_only_sessions_without_a_header() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme, "header = \"1s\"", "").await;
    let mut in_time = proxy.open(ACME, b"in time").await;
    assert_eq!(read(&mut in_time, 7).await, b"in time");

    let (mut silent, mut partial) = (proxy.connect().await, proxy.send(&header(ACME)[..50]).await);
    // Who has said nothing sees an end; who was cut short, a reset.
    assert_eq!(end_of(&mut silent).await.unwrap(), 0);
    is_reset(&mut partial).await;
    let timed_out = [("tenant", ""), ("by", "proxy"), ("at", "header"), ("why", "header_timeout")];
    proxy.ended(&timed_out).is(2).await;
    assert_eq!(acme.sessions(), 1);

    in_time.write_all(b" and on").await.unwrap();
    assert_eq!(exchange(in_time).await.unwrap(), b" and on");
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let mut late = log.iter().filter(|line| line["outcome"]["why"] == "header_timeout");
    // Time is coarse, and a worker that was kept from running counts from when it last did.
    assert!(late.clone().all(|line| line["total_ms"].as_f64().unwrap() >= 300.0), "{log:?}");
    assert_eq!((late.next().is_some(), late.count()), (true, 1));
}

#[tokio::test]
async fn newcomer_gets_the_place_of_the_longest_silent_session_where_all_are_taken() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    // Of a single place the time does not shrink.
    let proxy = proxy(&acme, "", "max-pending = 1").await;
    let pending = proxy.metric("vestibule_sessions_pending", &[("listener", "web")]);
    proxy.metric("vestibule_sessions_pending_limit", &[("listener", "web")]).is(1).await;
    let mut silent = proxy.connect().await;
    pending.is(1).await;
    let mut partial = proxy.send(&header(ACME)[..50]).await;
    assert_eq!(end_of(&mut silent).await.unwrap(), 0);
    let rejected = [("tenant", ""), ("by", "proxy"), ("at", "header"), ("why", "pending_limit")];
    proxy.ended(&rejected).is(1).await;
    assert_eq!(proxy.logged("pending_limit").await["listener"], "web");
    are_read([&partial]).await;
    let mut newest = proxy.connect().await;
    // It had sent something, and learns that it was not heard.
    is_reset(&mut partial).await;
    proxy.ended(&rejected).is(2).await;
    pending.is(1).await;

    // Its header comes later, and is read.
    newest.write_all(&header(ACME)).await.unwrap();
    pending.is(0).await;
    assert_eq!(exchange(newest).await.unwrap(), b"");
    let again = proxy.connect().await;
    pending.is(1).await;
    drop(again);
    proxy.ended(&[("why", "zero_bytes")]).is(1).await;
    proxy.ended(&rejected).is(2).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_flood_does_not_block_clients_with_late_headers() {
    const ROUNDS: usize = 20;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme, "", "max-pending = 64").await;
    let mut silent = Vec::new();
    for _ in 0..ROUNDS {
        let mut client = proxy.connect().await;
        // Half of what there is place for, on the worker of the client and on the other one.
        for _ in 0..32 {
            silent.push(proxy.connect().await);
        }
        client.write_all(&[&header(GLOBEX)[..], b"served"].concat()).await.unwrap();
        assert_eq!(exchange(client).await.unwrap(), b"served");
    }
    proxy.ended(&[("tenant", "globex"), ("why", "done")]).is(20).await;
    proxy.ended(&[("by", "proxy"), ("at", "header"), ("why", "pending_limit")]).is_at_least(1).await;
    drop(silent);
    proxy.metric("vestibule_sessions_pending", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn headers_have_less_time_while_many_are_awaited() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme, "header = \"1h\"", "max-pending = 2").await;
    let mut partial = proxy.send(&header(ACME)[..50]).await;
    are_read([&partial]).await;
    let mut second = proxy.connect().await;
    is_reset(&mut partial).await;
    proxy.ended(&[("by", "proxy"), ("at", "header"), ("why", "header_timeout")]).is(1).await;
    // With half of the places free, the other one has all of its time.
    second.write_all(&[&header(ACME)[..], b"in time"].concat()).await.unwrap();
    assert_eq!(exchange(second).await.unwrap(), b"in time");
    proxy.ended(&[("why", "header_timeout")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn each_listener_has_pending_sessions_of_its_own() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], ..Conf::default() };
    let more = format!("[[listener]]\nname = \"tight\"\n{}\nmax-pending = 1", conf.listener);
    let proxy = Conf { more, ..conf }.start().await;
    let tight = proxy.address("tight");
    let elsewhere = proxy.connect().await;
    proxy.metric("vestibule_sessions_pending", &[("listener", "web")]).is(1).await;
    let mut before = connect(tight).await;
    proxy.metric("vestibule_sessions_pending", &[("listener", "tight")]).is(1).await;
    let first = connect(tight).await;
    assert_eq!(end_of(&mut before).await.unwrap(), 0);
    proxy.ended(&[("listener", "tight"), ("why", "pending_limit")]).is(1).await;
    proxy.metric("vestibule_sessions_pending", &[("listener", "web")]).is(1).await;
    proxy.others_are_unharmed().await;
    drop((first, elsewhere));
    proxy.finish().await;
}

/// A connection whose first bytes are there when it is accepted: without quick acknowledgement, they go with the
/// last packet of the handshake. Not where this thread is kept from sending for longer than the kernel waits.
fn open_at_once(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_tcp_quickack(false).unwrap();
    socket.connect(&address.into()).unwrap();
    assert_eq!(socket.send(bytes).unwrap(), bytes.len());
    socket.set_nonblocking(true).unwrap();
    TcpStream::from_std(socket.into()).unwrap()
}

#[tokio::test]
async fn session_with_an_immediate_header_takes_no_pending_slot() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme, "", "max-pending = 1").await;
    let bytes = [&header(ACME)[..], b"at once"].concat();
    let mut displaced = 0;
    // A client that is kept from sending takes the place for a while.
    loop {
        let mut idle = proxy.connect().await;
        proxy.metric("vestibule_sessions_pending", &[]).is(1).await;
        let answer = exchange(open_at_once(proxy.address("web"), &bytes)).await.unwrap();
        assert_eq!(answer, b"at once");
        let ended = proxy.value("vestibule_sessions_ended_total", &[("why", "pending_limit")]).await;
        if ended < f64::from(displaced) + 0.5 {
            proxy.metric("vestibule_sessions_pending", &[]).is(1).await;
            idle.write_all(&bytes).await.unwrap();
            assert_eq!(exchange(idle).await.unwrap(), b"at once");
            break;
        }
        displaced += 1;
        assert!(displaced < 100, "always displaced");
    }
    proxy.metric("vestibule_sessions_pending", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_connections_take_no_session_of_a_tenant() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], process: "max-sessions = 3".to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(proxy.connect().await);
    }
    proxy.metric("vestibule_sessions_pending", &[]).is(20).await;
    assert_eq!(exchange(proxy.open(ACME, b"served").await).await.unwrap(), b"served");
    proxy.others_are_unharmed().await;
    proxy.ended(&[("why", "shed")]).is(0).await;
    assert_eq!(proxy.server().live().sessions.used(), 0);
    drop(silent);
    proxy.finish().await;
}
