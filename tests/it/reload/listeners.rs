//! Listeners that come, go and change in a reload: who is there stays, and what is not free changes nothing.

use std::net::{SocketAddr, TcpListener};

use tokio::net::{TcpStream, UdpSocket};
use vestibule::server::ReloadError;
use vestibule::state::ChangeCount;

use super::super::flow::{Balancer, Echo, HOOLI, datagram, finish, others_are_unharmed, world};
use super::super::harness::{connect, end_of, header, http_get};
use super::*;

const CLIENT: &str = "10.100.0.10:40000";
const BEFORE: &str = "[[listener]]\nname = \"web\"\n";

fn with(name: &str, bind: &str) -> String {
    format!("[[listener]]\nname = \"{name}\"\nbind = {bind}\ntrusted-sources = [\"127.0.0.0/8\"]\n{BEFORE}")
}

async fn carried_at(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address).await;
    stream.write_all(&[&header(ACME)[..], b"x"].concat()).await.unwrap();
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

/// Nobody accepts there, soon.
async fn is_closed(address: SocketAddr) {
    eventually("the listener to be closed", async || TcpStream::connect(address).await.err()).await;
}

#[tokio::test]
async fn listener_is_added_and_removed_and_its_sessions_continue() {
    let (_acme, mut proxy) = start("sessions = 9").await;
    let extra = with("extra", "\"127.0.0.1:0\"");
    let changes = proxy.reload(BEFORE, &extra).unwrap();
    assert_eq!(changes.listeners, ChangeCount { added: 1, ..ChangeCount::default() });
    let address = proxy.address("extra");
    let mut session = carried_at(address).await;
    let status = http_get(proxy.server().admin(), "/status").await;
    assert!(status.contains(&address.to_string()), "{status}");

    // What the kernel has accepted for it is served, though nobody has taken it in yet.
    let changes = proxy.reload(&extra, BEFORE).unwrap();
    assert_eq!(changes.listeners, ChangeCount { removed: 1, ..ChangeCount::default() });
    is_closed(address).await;
    assert!(proxy.server().addresses("extra").is_empty());
    let status = http_get(proxy.server().admin(), "/status").await;
    assert!(!status.contains(&address.to_string()), "{status}");
    still_lives(&mut session).await;
    proxy.metric("vestibule_sessions_active", &[("listener", "extra")]).is(1).await;

    // The name comes back, and so do its counters.
    proxy.reload(BEFORE, &extra).unwrap();
    exchange(carried_at(proxy.address("extra")).await).await.unwrap();
    exchange(session).await.unwrap();
    proxy.ended(&[("listener", "extra"), ("why", "done")]).is(2).await;
    exchange(carried(&proxy).await).await.unwrap();
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn unchanged_address_keeps_its_sockets() {
    let (_acme, mut proxy) = start("sessions = 9").await;
    let web = proxy.address("web");
    let session = carried(&proxy).await;
    let one = "name = \"web\"\nbind = \"127.0.0.1:0\"";
    let two = "name = \"web\"\nbind = [\"127.0.0.2:0\", \"127.0.0.1:0\"]\nmax-pending = 1";
    let changes = proxy.reload(one, two).unwrap();
    assert_eq!(changes.listeners, ChangeCount { changed: 1, ..ChangeCount::default() });
    let [second, first] = proxy.server().addresses("web")[..] else { panic!("two addresses") };
    assert_eq!(first, web);
    let on_second = carried_at(second).await;
    // The new bound holds for those who are there already.
    let mut before = proxy.send(b"").await;
    proxy.metric("vestibule_sessions_pending", &[("listener", "web")]).is(1).await;
    let silent = connect(first).await;
    assert_eq!(end_of(&mut before).await.unwrap(), 0);
    proxy.ended(&[("why", "pending_limit")]).is(1).await;
    drop(silent);
    proxy.metric("vestibule_sessions_pending", &[("listener", "web")]).is(0).await;

    proxy.reload(two, one).unwrap();
    is_closed(second).await;
    assert_eq!(proxy.server().addresses("web"), [web]);
    for mut session in [session, on_second, carried(&proxy).await] {
        still_lives(&mut session).await;
        exchange(session).await.unwrap();
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn address_in_use_refuses_the_whole_reload() {
    let (_acme, mut proxy) = start("sessions = 1").await;
    let session = carried(&proxy).await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = (taken.local_addr().unwrap(), taken);
    let free = SocketAddr::new("127.0.0.9".parse().unwrap(), taken.0.port());
    let extra = with("extra", &format!("[\"{free}\", \"{}\"]", taken.0));
    let refused = proxy.reload(BEFORE, &extra).unwrap_err();
    assert!(matches!(refused, ReloadError::Machine(_)), "{refused}");
    let message = format!("listener \"extra\": cannot bind {}: ", taken.0);
    assert!(refused.to_string().starts_with(&message), "{refused}");
    assert!(TcpStream::connect(free).await.is_err(), "what was bound for it is closed again");
    proxy.metric("vestibule_config_last_reload_successful", &[]).is(0).await;
    proxy.metric("vestibule_config_rejected_total", &[]).is(1).await;
    assert!(proxy.server().addresses("extra").is_empty());
    rejected(&proxy, ACME).await;
    drop(taken);
    proxy.reload(BEFORE, &extra).unwrap();
    exchange(session).await.unwrap();
    proxy.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(0).await;
    exchange(carried_at(free).await).await.unwrap();
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// A proxy whose listener `dns` can be taken away, and its text.
async fn udp(acme: &Echo) -> (Proxy, Echo, String) {
    let (proxy, hooli) = world(&[acme.address], |conf, _| conf.timeouts += "flow-idle = \"60s\"\n").await;
    let listener = "[[listener]]\nname = \"dns\"\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\n\
                    trusted-sources = [\"127.0.0.0/8\"]\n";
    (proxy, hooli, listener.to_owned())
}

/// So many who are new are answered. Until every worker has heard of a reload some may be turned away. All stay, so that no
/// two have the same port.
async fn new_ones_are_heard(address: SocketAddr, count: usize) -> Vec<Balancer> {
    let mut others = Vec::new();
    for _ in 0..count {
        let other = Balancer::to(address).await;
        let answer = eventually("an answer", async || {
            other.send(&datagram(CLIENT, ACME, b"new")).await;
            let answer = tokio::time::timeout(std::time::Duration::from_millis(50), other.answer()).await;
            answer.ok()
        });
        assert_eq!(answer.await, b"acme new");
        others.push(other);
    }
    others
}

/// One more of this name, at an address that it can come back to: its text, and where it is.
fn elsewhere(proxy: &mut Proxy, listener: &str, name: &str) -> (String, SocketAddr) {
    let fixed = listener.replace("127.0.0.1:0", &proxy.address("dns").to_string());
    let more = fixed.replace("127.0.0.1", "127.0.0.3").replace("\"dns\"", &format!("\"{name}\""));
    proxy.reload(BEFORE, &format!("{more}{BEFORE}")).unwrap();
    let address = proxy.address(name);
    (more, address)
}

#[tokio::test]
async fn removed_udp_listener_serves_its_flows_to_their_end() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli, listener) = udp(&acme).await;
    let address = proxy.address("dns");
    // Some, so that every worker has one.
    let mut flows = Vec::new();
    for _ in 0..8 {
        let flow = Balancer::to(address).await;
        assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
        flows.push(flow);
    }
    proxy.reload(&listener, "").unwrap();
    eventually("no flow to begin there", async || {
        // Each time somebody else: a worker may not have heard of it yet.
        let late = Balancer::to(address).await;
        late.send(&datagram(CLIENT, HOOLI, b"late")).await;
        let drained = proxy.value("vestibule_sessions_ended_total", &[("why", "drained")]).await;
        (drained > 0.5).then_some(())
    })
    .await;
    for flow in &flows {
        assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"two")).await, b"acme two");
    }
    // Shorter patience reaches flows that are there; then the sockets are closed.
    proxy.reload("flow-idle = \"60s\"", "flow-idle = \"200ms\"").unwrap();
    proxy.ended(&[("tenant", "acme"), ("why", "idle_timeout")]).is(8).await;
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    eventually("the address to be free", async || UdpSocket::bind(address).await.ok()).await;
    proxy.reload("[[pool]]\nname = \"hooli\"", &format!("{listener}[[pool]]\nname = \"hooli\"")).unwrap();
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn udp_listener_that_returns_keeps_its_flows() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli, listener) = udp(&acme).await;
    let (more, address) = elsewhere(&mut proxy, &listener, "more");
    let flow = Balancer::to(address).await;
    assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
    proxy.reload(&more, "").unwrap();
    assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"two")).await, b"acme two");
    proxy.reload(BEFORE, &format!("{more}{BEFORE}")).unwrap();
    // Whoever is new is heard, whichever socket it comes to, and who was there goes on.
    new_ones_are_heard(address, 8).await;
    assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"three")).await, b"acme three");
    proxy.reload("flow-idle = \"60s\"", "flow-idle = \"200ms\"").unwrap();
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn udp_listener_with_another_name_keeps_the_flows_of_its_address() {
    let acme = Echo::start("acme").await;
    let (mut proxy, _hooli, listener) = udp(&acme).await;
    let (before, address) = elsewhere(&mut proxy, &listener, "before");
    let after = before.replace("\"before\"", "\"after\"");
    let mut flows = Vec::new();
    for _ in 0..16 {
        let flow = Balancer::to(address).await;
        assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
        flows.push(flow);
    }
    proxy.reload(&before, &after).unwrap();
    let _others = new_ones_are_heard(address, 16).await;
    for flow in &flows {
        assert_eq!(flow.ask(&datagram(CLIENT, ACME, b"two")).await, b"acme two");
    }
    // Each is still its own, and nobody has begun a second one. Who is new may have come before a worker heard of it.
    proxy.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(32).await;
    proxy.metric("vestibule_sessions_active", &[("listener", "after")]).is_at_least(8).await;
    proxy.metric("vestibule_datagrams_overflowed_total", &[("listener", "after")]).is(0).await;
    // It goes, too, and takes all of its sockets with it.
    proxy.reload("flow-idle = \"60s\"", "flow-idle = \"200ms\"").unwrap();
    proxy.reload(&after, "").unwrap();
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    eventually("the address to be free", async || UdpSocket::bind(address).await.ok()).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}
