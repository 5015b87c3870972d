//! Faults at accept, at the header, and one of vestibule's own.

use std::time::Duration;

use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use vestibule::fault::{InjectedFault, Syscall};
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, Proxy, end_of, exchange, header};
use super::raw::Raw;
use super::{Bystander, alone, inject, next};

/// One worker, so that every session is the panicking one's neighbour, and there is one queue of connections.
async fn proxy(acme: &TestBackend) -> Proxy {
    Conf { acme: vec![acme.address()], workers: 1, ..Conf::default() }.start().await
}

async fn is_served(proxy: &Proxy) {
    assert_eq!(exchange(proxy.open(ACME, b"served").await).await.unwrap(), b"served");
}

#[tokio::test]
async fn accepting_pauses_at_each_shortage_and_continues() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
        let proxy = proxy(&acme).await;
        let mut bystander = Bystander::of(&proxy).await;
        let short = next(Syscall::Accept, errno, 2);
        let waiting = proxy.open(ACME, b"waits").await;
        proxy.metric("vestibule_accept_errors_total", &[("class", "shortage")]).is_at_least(1).await;
        bystander.lives().await;
        assert_eq!(exchange(waiting).await.unwrap(), b"waits");
        assert_eq!(short.count(Syscall::Accept), 2);
        proxy.metric("vestibule_accept_errors_total", &[("class", "shortage")]).is(2).await;
        proxy.metric("vestibule_accept_errors_total", &[("class", "fatal")]).is(0).await;
        proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn aborted_connection_in_accept_queue_is_skipped() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let bystander = Bystander::of(&proxy).await;
    let peers =
        [Errno::CONNABORTED, Errno::PROTO, Errno::PERM, Errno::HOSTUNREACH, Errno::TIMEDOUT, Errno::INTR];
    let gone = inject(InjectedFault::new(Syscall::Accept, &peers).at_most(20));
    is_served(&proxy).await;
    assert_eq!(gone.count(Syscall::Accept), 20);
    proxy.metric("vestibule_accept_errors_total", &[("class", "peer")]).is(20).await;
    proxy.metric("vestibule_accept_errors_total", &[("class", "shortage")]).is(0).await;
    drop(gone);
    is_served(&proxy).await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn full_accept_queue_keeps_clients_waiting_and_loses_none() {
    let _kernel = alone().await;
    let backlog = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    if backlog.trim().parse::<u32>().unwrap() > 8192 {
        return eprintln!("SKIPPED: this system's queues take more than a test wants to fill");
    }
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme).await;
    let mut bystander = Bystander::of(&proxy).await;
    let short = inject(InjectedFault::new(Syscall::Accept, &[Errno::MFILE]));
    let address = proxy.address("web");
    // One that has gone keeps its place in the queue.
    let mut queued = 0;
    let connect = async || timeout(Duration::from_millis(300), TcpStream::connect(address)).await;
    while let Ok(connected) = connect().await {
        drop(connected.unwrap());
        queued += 1;
    }
    let late = tokio::spawn(TcpStream::connect(address));
    bystander.lives().await;
    drop(short);
    // The client's kernel asks again after a second.
    let mut late = late.await.unwrap().unwrap();
    late.write_all(&[&header(ACME)[..], b"late"].concat()).await.unwrap();
    assert_eq!(exchange(late).await.unwrap(), b"late");
    proxy.ended(&[("why", "zero_bytes")]).is_at_least(queued).await;
    proxy.metric("vestibule_accept_errors_total", &[("class", "shortage")]).is_at_least(1).await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn shortage_at_the_header_is_not_blamed_on_the_client() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    for (call, errno) in [
        (Syscall::Receive, Errno::NOMEM),
        (Syscall::Register, Errno::NOMEM),
        (Syscall::Register, Errno::NOSPC),
    ] {
        let proxy = proxy(&acme).await;
        let bystander = Bystander::of(&proxy).await;
        let short = next(call, errno, 1);
        // Nothing of a header is there yet: it is waited for.
        let mut client = proxy.connect().await;
        proxy.ended(&[("tenant", ""), ("by", "proxy"), ("at", "header"), ("why", "shortage")]).is(1).await;
        drop(end_of(&mut client).await);
        assert_eq!(short.count(call), 1);
        is_served(&proxy).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn panic_in_a_session_ends_only_that_session() {
    let _kernel = alone().await;
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf { workers: 1, ..Conf::default() }).await;
    let bystander = Bystander::of(&proxy).await;
    let (mut neighbour, mut behind) = raw.session(&proxy).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let bug = next(Syscall::Panic, Errno::INVAL, 1);
    client.write_all(b"unlucky").await.unwrap();
    end_of(&mut client).await.unwrap_err();
    end_of(&mut backend).await.unwrap_err();
    assert_eq!(bug.count(Syscall::Panic), 1);
    let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "internal")];
    proxy.ended(&labels).is(1).await;
    drop(bug);
    super::raw::ping_pong(&mut neighbour, &mut behind, &mut fastrand::Rng::with_seed(1)).await;
    drop((neighbour, behind));
    let (client, mut backend) = raw.session(&proxy).await;
    backend.write_all(b"as before").await.unwrap();
    drop(backend);
    assert_eq!(exchange(client).await.unwrap(), b"as before");
    bystander.outlives(proxy).await;
}
