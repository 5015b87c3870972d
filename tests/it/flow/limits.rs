//! What a tenant's flows may take, and whose place they take where there is none left.

use std::sync::Arc;

use tokio::net::UdpSocket;

use super::super::harness::{ACME, eventually};
use super::super::sessions::{UMBRELLA, umbrella};
use super::{Balancer, CLIENT, Echo, HOOLI, datagram, finish, others_are_unharmed, soon, world};

#[tokio::test]
async fn tenants_last_flow_within_the_limit_is_admitted_and_the_next_is_not() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| {
        conf.limits = "flows = 2".to_owned();
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let client = |number: u32| format!("10.100.0.{number}:5000");
    for number in 1..=2 {
        balancer.ask(&datagram(&client(number), ACME, b"in")).await;
    }
    balancer.send(&datagram(&client(3), ACME, b"out")).await;
    proxy.ended(&[("tenant", "acme"), ("at", "tenant"), ("why", "flow_limit")]).is(1).await;
    assert!(balancer.is_silent());
    others_are_unharmed(&proxy).await;
    proxy.ended(&[("tenant", "acme"), ("why", "idle_timeout")]).is(2).await;
    assert_eq!(balancer.ask(&datagram(&client(3), ACME, b"now")).await, b"acme now");
    finish(proxy).await;
}

#[tokio::test]
async fn datagrams_beyond_the_rate_are_dropped_and_counted_and_observed_ones_pass() {
    // Answers count, too, and may come too late.
    for (mode, answers) in [("enforce", 0), ("observe", 30)] {
        let acme = Echo::start("").await;
        let (proxy, _hooli) = world(&[acme.address], |conf, _| {
            conf.limits = format!("mode = \"{mode}\"\ndatagram-rate = \"1/s\"\ndatagram-burst = 8");
            soon(conf);
        })
        .await;
        let balancer = Balancer::to(proxy.address("dns")).await;
        for turn in 0..30_u32 {
            balancer.send(&datagram(CLIENT, ACME, &turn.to_be_bytes())).await;
        }
        for _ in 0..answers {
            balancer.answer().await;
        }
        let labels = [("tenant", "acme"), ("direction", "to_backend"), ("why", "rate")];
        if mode == "enforce" {
            proxy.metric("vestibule_datagrams_dropped_total", &labels).is_at_least(20).await;
        } else {
            proxy.metric("vestibule_datagrams_dropped_total", &[("tenant", "acme")]).is(0).await;
            proxy.metric("vestibule_datagrams_would_drop_total", &labels).is_at_least(20).await;
        }
        others_are_unharmed(&proxy).await;
        finish(proxy).await;
    }
}

#[tokio::test]
async fn tenant_at_its_limit_evicts_no_other_flow_and_one_below_it_does() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |conf, _| {
        conf.limits = "flows = 2".to_owned();
        conf.process = "max-sessions = 12".to_owned();
        // Each worker has a table of its own, and takes places of its own flows only.
        conf.workers = 1;
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let client = |number: u32| format!("10.100.0.{number}:5000");
    for number in 1..=8 {
        assert_eq!(balancer.ask(&datagram(&client(number), HOOLI, b"in")).await, b"hooli in");
    }
    for number in 1..=2 {
        assert_eq!(balancer.ask(&datagram(&client(number), ACME, b"in")).await, b"acme in");
    }
    // Acme's eldest gives way to its third once it was silent for long enough, and hooli's have been silent for longer.
    let asked = Balancer::to(proxy.address("dns")).await;
    eventually("acme's eldest flow to give way", async || {
        asked.send(&datagram(&client(3), ACME, b"next")).await;
        (proxy.value("vestibule_sessions_ended_total", &[("why", "evicted")]).await > 0.0).then_some(())
    })
    .await;
    let of_acme = [("tenant", "acme"), ("at", "forward"), ("why", "evicted")];
    let of_hooli = [("tenant", "hooli"), ("at", "forward"), ("why", "evicted")];
    proxy.ended(&of_acme).is(1).await;
    assert_eq!(balancer.ask(&datagram(&client(2), ACME, b"still")).await, b"acme still");

    let before = proxy.value("vestibule_sessions_ended_total", &[("why", "flow_limit")]).await;
    balancer.send(&datagram(&client(4), ACME, b"out")).await;
    eventually("a flow beyond the limit", async || {
        let now = proxy.value("vestibule_sessions_ended_total", &[("why", "flow_limit")]).await;
        (now > before).then_some(())
    })
    .await;
    assert!(balancer.is_silent());
    proxy.ended(&of_hooli).is(0).await;

    proxy.reload("flows = 2", "flows = 3").unwrap();
    assert_eq!(balancer.ask(&datagram(&client(4), ACME, b"in")).await, b"acme in");
    proxy.ended(&of_hooli).is(1).await;
    proxy.ended(&of_acme).is(1).await;
    assert_eq!(balancer.ask(&datagram(&client(7), HOOLI, b"still")).await, b"hooli still");
    let live = Arc::clone(proxy.server().live());
    assert_eq!(live.sessions.used(), 10);
    proxy.end().await;
    assert_eq!((live.sessions.used(), live.quotas.holders()), (0, 0), "a permit leaked");
    let log = proxy.log();
    let drained = log.iter().filter(|line| line["tenant"] == "hooli" && line["outcome"]["why"] == "drained");
    assert_eq!(drained.count(), 7, "one of hooli's eight has gone");
}

#[tokio::test]
async fn backend_with_dropped_answers_counts_as_answered_once() {
    let acme = Echo::start("").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| {
        conf.limits = "to-client = \"1KiB/s\"".to_owned();
        conf.timeouts += "flow-idle = \"3s\"\n";
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let connects = |result| [("pool", "acme"), ("result", result)];
    let dropped = [("tenant", "acme"), ("direction", "to_client"), ("why", "bandwidth")];
    // Another flow takes what a minute brings.
    balancer.ask(&datagram("10.100.0.11:5000", ACME, &vec![7; 60_000])).await;
    for turn in 1..=3 {
        balancer.send(&datagram(CLIENT, ACME, b"unheard")).await;
        proxy.metric("vestibule_datagrams_dropped_total", &dropped).is(turn).await;
        proxy.metric("vestibule_backend_connects_total", &connects("done")).is(2).await;
    }
    assert!(balancer.is_silent());
    let address = acme.address;
    drop(acme);
    eventually("the backend's end", async || UdpSocket::bind(address).await.ok().map(drop)).await;
    balancer.send(&datagram(CLIENT, ACME, b"gone")).await;
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("at", "forward"), ("why", "reset")]).is(1).await;
    proxy.metric("vestibule_backend_connects_total", &connects("connect_refused")).is(0).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn datagrams_that_a_listener_has_no_room_for_are_counted() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let overflowed = [("listener", "dns"), ("direction", "to_backend")];
    proxy.metric("vestibule_datagrams_overflowed_total", &overflowed).is(0).await;
    let bytes = vec![0; 60_000];
    let flood = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    flood.connect(proxy.address("dns")).unwrap();
    eventually("a full queue", async || {
        // A queue holds a handful of these, and to take one out is as much work as to put it in.
        for _ in 0..200 {
            flood.send(&bytes).unwrap();
        }
        (proxy.value("vestibule_datagrams_overflowed_total", &overflowed).await > 0.0).then_some(())
    })
    .await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

/// A backend that answers one question with so many datagrams of so many bytes at once.
fn burst(count: usize, len: usize) -> std::net::SocketAddr {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut room = [0; 100];
        // Ends with the test's process at the latest.
        while let Ok((_, from)) = socket.recv_from(&mut room) {
            for number in 0..count {
                socket.send_to(&[&number.to_be_bytes()[..], &vec![7; len]].concat(), from).unwrap();
            }
        }
    });
    address
}

#[tokio::test]
async fn burst_of_300_answers_arrives_whole() {
    let most: usize = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap().trim().parse().unwrap();
    if most < 2 << 20 {
        return eprintln!("SKIPPED: net.core.rmem_max is less than 2 MiB");
    }
    let backend = burst(300, 1_200);
    let (proxy, _hooli) = world(&[backend], |conf, _| conf.timeouts += "flow-idle = \"2s\"\n").await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    socket2::SockRef::from(&balancer.socket).set_recv_buffer_size(4 << 20).unwrap();
    balancer.send(&datagram(CLIENT, ACME, b"all")).await;
    for number in 0..300_usize {
        assert_eq!(balancer.answer().await[..8], number.to_be_bytes());
    }
    proxy.metric("vestibule_datagrams_overflowed_total", &[("direction", "to_client")]).is(0).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn answers_beyond_the_queue_of_a_flow_are_counted() {
    // More than 4 MiB at once.
    let backend = burst(1_500, 30_000);
    let (proxy, _hooli) = world(&[backend], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    eventually("a full queue", async || {
        balancer.send(&datagram(CLIENT, ACME, b"all")).await;
        let overflowed = proxy.value("vestibule_datagrams_overflowed_total", &[("direction", "to_client")]);
        (overflowed.await > 0.0).then_some(())
    })
    .await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn flows_of_one_tenant_leave_room_in_a_shared_pool() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[], |conf, _| {
        conf.backends = vec![format!("{{ address = \"{}\", max-sessions = 10 }}", acme.address)];
        conf.more = umbrella() + "\n";
        soon(conf);
        conf.timeouts = conf.timeouts.replace("300ms", "4s");
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let client = |number: u32| format!("10.100.0.{number}:5000");
    for number in 1..=7 {
        assert_eq!(balancer.ask(&datagram(&client(number), ACME, b"in")).await, b"acme in");
    }
    balancer.send(&datagram(&client(8), ACME, b"out")).await;
    proxy.ended(&[("tenant", "acme"), ("at", "pool"), ("why", "pool_share")]).is(1).await;
    assert_eq!(balancer.ask(&datagram(&client(9), UMBRELLA, b"in")).await, b"acme in");
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}
