//! Sessions without a whole header: bounded in time and in number.

use std::net::SocketAddr;

use socket2::{Domain, Socket, Type};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{Backend, Temper};

use super::harness::{ACME, Conf, Proxy, connect, end_of, exchange, header, is_reset, read};

async fn proxy(acme: &Backend, timeouts: &str, listener: &str) -> Proxy {
    let conf = Conf { acme: vec![acme.address()], timeouts: timeouts.to_owned(), ..Conf::default() };
    let listener = format!("{}\n{listener}", conf.listener);
    Conf { listener, ..conf }.start().await
}

#[tokio::test]
async fn a_header_has_its_time_and_a_session_beyond_it_does_not() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
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
async fn the_last_pending_session_is_admitted_and_the_next_is_rejected() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let proxy = proxy(&acme, "", "max-pending = 2").await;
    let pending = proxy.metric("vestibule_sessions_pending", &[("listener", "web")]);
    let (mut one, two) = (proxy.connect().await, proxy.connect().await);
    pending.is(2).await;
    proxy.ended(&[]).is(0).await;
    assert_eq!(end_of(&mut proxy.connect().await).await.unwrap(), 0);
    let rejected = [("tenant", ""), ("by", "proxy"), ("at", "header"), ("why", "pending_limit")];
    proxy.ended(&rejected).is(1).await;
    pending.is(2).await;
    assert_eq!(proxy.logged("pending_limit").await["listener"], "web");

    // A header gives the place back, and so does an end.
    one.write_all(&header(ACME)).await.unwrap();
    pending.is(1).await;
    let three = proxy.connect().await;
    pending.is(2).await;
    drop((two, three));
    pending.is(0).await;
    let again = (proxy.connect().await, proxy.connect().await);
    pending.is(2).await;
    drop(again);
    pending.is(0).await;
    assert_eq!(exchange(one).await.unwrap(), b"");
    proxy.ended(&rejected).is(1).await;
    proxy.ended(&[("why", "zero_bytes")]).is(4).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn each_listener_has_pending_sessions_of_its_own() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], ..Conf::default() };
    let more = format!("[[listener]]\nname = \"tight\"\n{}\nmax-pending = 1", conf.listener);
    let proxy = Conf { more, ..conf }.start().await;
    let tight = proxy.address("tight");
    let first = connect(tight).await;
    proxy.metric("vestibule_sessions_pending", &[("listener", "tight")]).is(1).await;
    assert_eq!(end_of(&mut connect(tight).await).await.unwrap(), 0);
    proxy.ended(&[("listener", "tight"), ("why", "pending_limit")]).is(1).await;
    let elsewhere = proxy.connect().await;
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
async fn a_session_whose_header_is_there_at_once_is_served_while_no_place_is_free() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let proxy = proxy(&acme, "", "max-pending = 1").await;
    let idle = proxy.connect().await;
    let pending = proxy.metric("vestibule_sessions_pending", &[]);
    pending.is(1).await;
    let bytes = [&header(ACME)[..], b"at once"].concat();
    let mut rejected = 0;
    while exchange(open_at_once(proxy.address("web"), &bytes)).await.ok().as_deref() != Some(b"at once") {
        rejected += 1;
        assert!(rejected < 100, "never served");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.ended(&[("why", "pending_limit")]).is(rejected).await;
    pending.is(1).await;
    drop(idle);
    pending.is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
