//! Faults on the way to a backend.

use std::net::SocketAddr;

use rustix::io::Errno;
use vestibule::fault::{InjectedFault, Syscall};
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, Proxy, exchange, is_reset};
use super::{Bystander, alone, inject, next};

/// Two echoing backends that a single failure would eject.
async fn pair() -> [TestBackend; 2] {
    let start = async |name| TestBackend::start(name, BackendBehavior::Echo).await.unwrap();
    [start("acme-1").await, start("acme-2").await]
}

async fn proxy(acme: &[TestBackend], pool: &str) -> Proxy {
    let health = "kind = \"none\"\n[pool.ejection]\nconsecutive-failures = 1\nmax-percent = 50".to_owned();
    let acme: Vec<SocketAddr> = acme.iter().map(TestBackend::address).collect();
    Conf { acme, pool: pool.to_owned(), health, ..Conf::default() }.start().await
}

async fn is_served(proxy: &Proxy) {
    assert_eq!(exchange(proxy.open(ACME, b"served").await).await.unwrap(), b"served");
}

async fn connects(proxy: &Proxy, result: &str, count: u32) {
    proxy.metric("vestibule_backend_connects_total", &[("pool", "acme"), ("result", result)]).is(count).await;
}

async fn ejected(proxy: &Proxy, count: u32) {
    proxy.metric("vestibule_backend_ejections_total", &[("pool", "acme")]).is(count).await;
}

#[tokio::test]
async fn without_a_local_port_the_next_source_address_is_tried() {
    let _kernel = alone().await;
    let acme = pair().await;
    for call in [Syscall::Bind, Syscall::Connect] {
        let proxy = proxy(&acme, "attempts = 1\nsource-addresses = [\"127.0.0.8\", \"127.0.0.9\"]").await;
        let bystander = Bystander::of(&proxy).await;
        let none = next(call, Errno::ADDRNOTAVAIL, 1);
        is_served(&proxy).await;
        assert_eq!(none.count(call), 1);
        connects(&proxy, "done", 1).await;
        connects(&proxy, "no_local_port", 0).await;
        ejected(&proxy, 0).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn without_a_local_port_to_one_backend_the_next_is_tried_and_none_is_blamed() {
    let _kernel = alone().await;
    let acme = pair().await;
    let proxy = proxy(&acme, "attempts = 2").await;
    let bystander = Bystander::of(&proxy).await;
    let none = next(Syscall::Connect, Errno::ADDRNOTAVAIL, 1);
    is_served(&proxy).await;
    connects(&proxy, "no_local_port", 1).await;
    connects(&proxy, "done", 1).await;
    drop(none);
    // Towards no backend at all: the client learns it.
    let none = next(Syscall::Connect, Errno::ADDRNOTAVAIL, 2);
    is_reset(&mut proxy.open(ACME, b"lost").await).await;
    assert_eq!(none.count(Syscall::Connect), 2);
    proxy
        .ended(&[("tenant", "acme"), ("by", "proxy"), ("at", "connect"), ("why", "no_local_port")])
        .is(1)
        .await;
    is_served(&proxy).await;
    ejected(&proxy, 0).await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn shortage_while_connecting_does_not_count_against_the_backend() {
    let _kernel = alone().await;
    let acme = pair().await;
    for (call, errnos) in [
        (Syscall::Socket, &[Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM][..]),
        (Syscall::Connect, &[Errno::NOBUFS, Errno::NOMEM]),
    ] {
        for errno in errnos {
            let proxy = proxy(&acme, "attempts = 1").await;
            let mut bystander = Bystander::of(&proxy).await;
            let short = next(call, *errno, 3);
            for _ in 0..3 {
                is_reset(&mut proxy.open(ACME, b"lost").await).await;
            }
            let labels = [("tenant", "acme"), ("by", "proxy"), ("at", "connect"), ("why", "shortage")];
            proxy.ended(&labels).is(3).await;
            connects(&proxy, "shortage", 3).await;
            bystander.lives().await;
            drop(short);
            is_served(&proxy).await;
            ejected(&proxy, 0).await;
            bystander.outlives(proxy).await;
        }
    }
}

#[tokio::test]
async fn unreachable_backend_is_blamed_and_the_next_is_tried() {
    let _kernel = alone().await;
    let acme = pair().await;
    for (errno, by, why) in [
        (Errno::CONNREFUSED, "backend", "connect_refused"),
        (Errno::TIMEDOUT, "proxy", "connect_timeout"),
        (Errno::NETUNREACH, "proxy", "connect_unreachable"),
        (Errno::HOSTUNREACH, "proxy", "connect_unreachable"),
        (Errno::PERM, "backend", "connect_failed"),
    ] {
        let proxy = proxy(&acme, "attempts = 2").await;
        let bystander = Bystander::of(&proxy).await;
        let unreachable = next(Syscall::Connect, errno, 1);
        is_served(&proxy).await;
        assert_eq!(unreachable.count(Syscall::Connect), 1);
        connects(&proxy, why, 1).await;
        connects(&proxy, "done", 1).await;
        ejected(&proxy, 1).await;
        drop(unreachable);
        let unreachable = next(Syscall::Connect, errno, 2);
        is_reset(&mut proxy.open(ACME, b"lost").await).await;
        drop(unreachable);
        proxy.ended(&[("tenant", "acme"), ("by", by), ("at", "connect"), ("why", why)]).is(1).await;
        is_served(&proxy).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn failed_registration_of_a_client_socket_ends_only_its_session() {
    let _kernel = alone().await;
    let acme = pair().await;
    let proxy = proxy(&acme, "attempts = 1").await;
    let mut bystander = Bystander::of(&proxy).await;
    let full = inject(InjectedFault::new(Syscall::Register, &[Errno::NOSPC, Errno::NOMEM]));
    for _ in 0..3 {
        let mut client = proxy.connect().await;
        // Its header may come before or after it is looked at.
        drop(tokio::io::AsyncWriteExt::write_all(&mut client, &super::harness::header(ACME)).await);
        drop(super::harness::end_of(&mut client).await);
    }
    proxy.ended(&[("by", "proxy"), ("why", "shortage")]).is(3).await;
    bystander.lives().await;
    drop(full);
    is_served(&proxy).await;
    ejected(&proxy, 0).await;
    bystander.outlives(proxy).await;
}
