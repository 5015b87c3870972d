//! Local ports towards backends: few of them, in a network namespace of this test's own.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::Command;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::flow::{self, Balancer, Echo, HOOLI, datagram, world};
use super::harness::{
    ACME, Conf, GLOBEX, LIMIT, Proxy, end_of, eventually, exchange, header, read, still_lives,
};

/// The test that runs in its namespace already.
const INSIDE: &str = "VESTIBULE_TEST_NAMESPACE";

/// Whether the test runs in a network namespace with so many local ports and without reuse of ports in TIME_WAIT. If not,
/// it is run there, where namespaces can be made; a line says where they cannot.
#[expect(clippy::disallowed_methods, reason = "where a test runs is no configuration of the program's")]
fn has_few_ports(test: &str, ports: &str) -> bool {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == test) {
        return true;
    }
    let script = format!(
        "ip link set lo up && cd /proc/sys/net/ipv4 && echo {ports} > ip_local_port_range && \
         echo 0 > tcp_tw_reuse && cd - > /dev/null && exec \"$0\" --exact ports::{test}"
    );
    let namespace = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--net", "sh", "-c", command]);
        unshare.arg(std::env::current_exe().unwrap()).env(INSIDE, test);
        unshare.output()
    };
    let can = namespace("ip link set lo up && test -w /proc/sys/net/ipv4/ip_local_port_range");
    if !can.is_ok_and(|output| output.status.success()) {
        io::stderr().write_all(format!("left out: no namespace for {test}\n").as_bytes()).unwrap();
        return false;
    }
    let output = namespace(&script).unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
    false
}

/// A connection from one of many addresses: those of the test's own sockets are not to run out of ports.
async fn open(proxy: &Proxy, endpoint: &str, number: usize) -> TcpStream {
    let source = format!("127.0.{}.{}", 1 + number / 200, 1 + number % 200);
    let socket = TcpSocket::new_v4().unwrap();
    // Without it the port would be this socket's alone, whatever the peer.
    setsockopt(&socket, IpBindAddressNoPort, &true).unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    let mut stream = timeout(LIMIT, socket.connect(proxy.address("web"))).await.unwrap().unwrap();
    stream.write_all(&[&header(endpoint)[..], b"x"].concat()).await.unwrap();
    stream
}

/// A session that the client ends first; whether it was served.
async fn is_served(proxy: &Proxy, endpoint: &str, number: usize) -> bool {
    match exchange(open(proxy, endpoint, number).await).await {
        Ok(answer) => {
            assert_eq!(answer, b"x");
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            false
        }
    }
}

/// Short sessions of acme until one finds no port; how many were served.
async fn use_up(proxy: &Proxy) -> usize {
    for number in 0..500 {
        if !is_served(proxy, ACME, number).await {
            return number;
        }
    }
    panic!("the ports do not run out");
}

async fn pool_of(acme: &TestBackend, pool: &str) -> Proxy {
    Conf { acme: vec![acme.address()], pool: pool.to_owned(), ..Conf::default() }.start().await
}

async fn no_backend_is_blamed(proxy: &Proxy) {
    proxy.metric("vestibule_backend_ejections_total", &[("pool", "acme")]).is(0).await;
    proxy
        .metric("vestibule_backend_connects_total", &[("pool", "acme"), ("result", "connect_failed")])
        .is(0)
        .await;
}

#[tokio::test]
async fn ports_in_time_wait_run_out_for_their_backend_alone() {
    if !has_few_ports("ports_in_time_wait_run_out_for_their_backend_alone", "40000 40127") {
        return;
    }
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = pool_of(&acme, "").await;
    let served = use_up(&proxy).await;
    assert!((80..=101).contains(&served), "{served} of 128 ports");
    let no_port = [("tenant", "acme"), ("by", "proxy"), ("at", "connect"), ("why", "no_local_port")];
    for number in 0..20 {
        assert!(!is_served(&proxy, ACME, number).await);
    }
    proxy.ended(&no_port).is(21).await;
    for number in 0..50 {
        assert!(is_served(&proxy, GLOBEX, number).await);
    }
    let backend = acme.address().to_string();
    let in_use = |state| [("backend", backend.as_str()), ("protocol", "tcp"), ("state", state)];
    proxy.metric("vestibule_local_ports_in_use", &in_use("live")).is(0).await;
    proxy.metric("vestibule_local_ports_in_use", &in_use("waiting")).is_at_least(80).await;
    proxy.metric("vestibule_local_ports_limit", &in_use("live")[..2]).is_at_least(120).await;
    assert!(proxy.value("vestibule_worker_connect_seconds_total", &[]).await > 0.0);
    no_backend_is_blamed(&proxy).await;
    proxy.finish().await;
}

#[tokio::test]
async fn ports_that_an_earlier_process_left_in_time_wait_are_passed_over() {
    if !has_few_ports("ports_that_an_earlier_process_left_in_time_wait_are_passed_over", "40000 40255") {
        return;
    }
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let earlier = pool_of(&acme, "").await;
    let served = use_up(&earlier).await;
    assert!((160..=201).contains(&served), "{served} of 256 ports");
    earlier.finish().await;
    let proxy = pool_of(&acme, "").await;
    // The kernel refuses more than three quarters of the ports, and every one of those that come first.
    for number in 0..20 {
        assert!(is_served(&proxy, ACME, number).await && is_served(&proxy, GLOBEX, number).await);
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(20).await;
    proxy.ended(&[("why", "no_local_port")]).is(0).await;
    no_backend_is_blamed(&proxy).await;
    proxy.finish().await;
}

#[tokio::test]
async fn ports_of_live_sessions_run_out_for_their_backend_alone_and_come_back() {
    if !has_few_ports("ports_of_live_sessions_run_out_for_their_backend_alone_and_come_back", "40000 40063") {
        return;
    }
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = pool_of(&acme, "").await;
    let mut held = Vec::new();
    let last = loop {
        let mut stream = open(&proxy, ACME, held.len()).await;
        match stream.read(&mut [0]).await {
            Ok(1) => held.push(stream),
            end => break end,
        }
        assert!(held.len() < 64);
    };
    assert_eq!(last.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
    // 78 % of them at most, and less while another tenant's port is in TIME_WAIT.
    assert!(held.len() >= 16, "{} of 64 ports", held.len());
    for number in 0..20 {
        assert!(is_served(&proxy, GLOBEX, number).await);
    }
    for stream in &mut held {
        still_lives(stream).await;
    }
    no_backend_is_blamed(&proxy).await;
    // A reset leaves no TIME_WAIT: their ports are free at once.
    let ended = u32::try_from(held.len()).unwrap();
    for stream in held.drain(..) {
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    proxy.ended(&[("tenant", "acme"), ("why", "reset")]).is(ended).await;
    for number in 0..20 {
        assert!(is_served(&proxy, ACME, number).await);
    }
    proxy.finish().await;
}

#[tokio::test]
async fn tenant_that_uses_up_the_ports_of_a_shared_backend_leaves_some_to_others() {
    if !has_few_ports(
        "tenant_that_uses_up_the_ports_of_a_shared_backend_leaves_some_to_others",
        "40000 40127",
    ) {
        return;
    }
    let shared = TestBackend::start("shared-1", BackendBehavior::Echo).await.unwrap();
    // Another pool with the same backend: its ports are the same.
    let more = format!(
        "[[pool]]\nname = \"shared\"\nbackends = [\"{}\"]\n[pool.health]\nkind = \"none\"\n\
         [[tenant]]\nname = \"hooli\"\nendpoints = [\"vpce-0123456789abcdef9\"]\npool = \"shared\"",
        shared.address()
    );
    let proxy = Conf { acme: vec![shared.address()], more, ..Conf::default() }.start().await;
    use_up(&proxy).await;
    for number in 0..5 {
        assert!(is_served(&proxy, "vpce-0123456789abcdef9", number).await, "session {number}");
        assert!(!is_served(&proxy, ACME, number).await);
    }
    proxy.ended(&[("tenant", "hooli"), ("why", "no_local_port")]).is(0).await;
    proxy.others_are_unharmed().await;
    no_backend_is_blamed(&proxy).await;
    proxy.finish().await;
}

#[tokio::test]
async fn dead_backend_in_the_range_of_local_ports_is_refused_and_never_connected_to_itself() {
    let test = "dead_backend_in_the_range_of_local_ports_is_refused_and_never_connected_to_itself";
    if !has_few_ports(test, "40000 40031") {
        return;
    }
    // Nothing listens there.
    let dead = "127.0.0.1:40010".parse().unwrap();
    let proxy = Conf { acme: vec![dead], pool: "attempts = 1".to_owned(), ..Conf::default() }.start().await;
    for number in 0..60 {
        let end = end_of(&mut open(&proxy, ACME, number).await).await;
        assert_eq!(end.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "connect_refused")]).is_at_least(5).await;
    let mut other = open(&proxy, GLOBEX, 61).await;
    assert_eq!(read(&mut other, 1).await, b"x");
    exchange(other).await.unwrap();
    proxy.finish().await;
}

/// Asks by a new flow of this tenant.
async fn begin_flow(balancer: &Balancer, endpoint: &str, number: usize) {
    let client = format!("10.100.{}.{}:5000", number / 200, 1 + number % 200);
    balancer.send(&datagram(&client, endpoint, b"x")).await;
}

/// New flows of acme that found no local port, and silent ones of it that gave way: on a slow machine some are silent for long.
async fn beyond_ports(proxy: &Proxy) -> f64 {
    let ended =
        async |why| proxy.value("vestibule_sessions_ended_total", &[("tenant", "acme"), ("why", why)]).await;
    ended("no_local_port").await + ended("evicted").await
}

/// Begins flows of acme until its ports have run out; how many it holds.
async fn use_up_udp(proxy: &Proxy, balancer: &Balancer) -> usize {
    for number in 0..128 {
        begin_flow(balancer, ACME, number).await;
        // Each is answered or ended.
        eventually("a flow's fate", async || {
            let is_served = balancer.socket.try_recv(&mut [0; 64]).is_ok();
            (is_served || beyond_ports(proxy).await > 0.0).then_some(())
        })
        .await;
        if beyond_ports(proxy).await > 0.0 {
            return number;
        }
    }
    panic!("the ports do not run out");
}

#[tokio::test]
async fn tenant_with_more_udp_flows_than_ports_leaves_some_to_others_and_no_backend_is_blamed() {
    let test = "tenant_with_more_udp_flows_than_ports_leaves_some_to_others_and_no_backend_is_blamed";
    if !has_few_ports(test, "40000 40063") {
        return;
    }
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |_, _| {}).await;
    let balancer = &Balancer::to(proxy.address("dns")).await;
    let served = use_up_udp(&proxy, balancer).await;
    assert!((40..=55).contains(&served), "{served} of 64 ports");
    for number in 200..260 {
        begin_flow(balancer, ACME, number).await;
    }
    eventually("each of these to find no port", async || (beyond_ports(&proxy).await > 60.5).then_some(()))
        .await;
    let udp = [("backend", ""), ("protocol", "udp"), ("state", "live")];
    proxy.metric("vestibule_local_ports_in_use", &udp).is(u32::try_from(served).unwrap()).await;
    proxy.metric("vestibule_local_ports_limit", &udp[..2]).is(63).await;
    for number in 0..3 {
        begin_flow(balancer, HOOLI, number).await;
        // Answers of flows that took the port of a silent one come before it.
        while balancer.answer().await != b"hooli x" {}
    }
    proxy.metric("vestibule_backend_ejections_total", &[]).is(0).await;
    proxy
        .metric("vestibule_backend_connects_total", &[("pool", "acme"), ("result", "connect_failed")])
        .is(0)
        .await;
    // Its silent flows give way to its new ones, and hooli's, which are silent too, do not.
    eventually("a silent flow to give way", async || {
        begin_flow(balancer, ACME, 300).await;
        (proxy.value("vestibule_sessions_ended_total", &[("why", "evicted")]).await > 0.0).then_some(())
    })
    .await;
    proxy.ended(&[("tenant", "hooli"), ("why", "evicted")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.reload("[timeouts]", "[timeouts]\nflow-idle = \"300ms\"").unwrap();
    flow::finish(proxy).await;
}

#[tokio::test]
async fn udp_ports_that_other_programs_hold_end_flows_without_blame_until_they_are_free() {
    let test = "udp_ports_that_other_programs_hold_end_flows_without_blame_until_they_are_free";
    if !has_few_ports(test, "40000 40063") {
        return;
    }
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli) = world(&[acme.address], |_, _| {}).await;
    let balancer = &Balancer::to(proxy.address("dns")).await;
    begin_flow(balancer, ACME, 0).await;
    assert_eq!(balancer.answer().await, b"acme x");
    let others: Vec<_> = std::iter::from_fn(|| std::net::UdpSocket::bind("0.0.0.0:0").ok()).collect();
    assert!(others.len() > 40, "{} of 64 ports", others.len());
    let no_port = [("by", "proxy"), ("at", "connect"), ("why", "no_local_port")];
    for (endpoint, number) in [(ACME, 1), (ACME, 2), (HOOLI, 1)] {
        begin_flow(balancer, endpoint, number).await;
    }
    proxy.ended(&no_port).is(3).await;
    begin_flow(balancer, ACME, 0).await;
    assert_eq!(balancer.answer().await, b"acme x");
    proxy.metric("vestibule_backend_ejections_total", &[]).is(0).await;
    drop(others);
    eventually("a flow of each", async || {
        begin_flow(balancer, HOOLI, 1).await;
        begin_flow(balancer, ACME, 1).await;
        (proxy.value("vestibule_local_ports_in_use", &[("protocol", "udp")]).await > 2.5).then_some(())
    })
    .await;
    flow::others_are_unharmed(&proxy).await;
    proxy.reload("[timeouts]", "[timeouts]\nflow-idle = \"300ms\"").unwrap();
    flow::finish(proxy).await;
}
