//! Listening sockets that break: the load balancer hears of it for as long as it lasts, and it does not last.

use rustix::io::Errno;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use vestibule::fault::{InjectedFault, Injection, Syscall};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;

use super::harness::{ACME, Conf, LIMIT, Proxy, end_of, eventually, exchange, http};
use super::{Bystander, SEED, alone};

const STOPPED: &str = "vestibule_listener_sockets_stopped";

/// One listening socket, so that nothing is accepted while it is broken.
async fn proxy(acme: &TestBackend, more: &str) -> Proxy {
    Conf { acme: vec![acme.address()], workers: 1, more: more.to_owned(), ..Conf::default() }.start().await
}

/// The next such call breaks its socket, and none can be opened again.
fn broken(call: Syscall) -> Injection {
    let breaks = InjectedFault::new(call, &[Errno::INVAL]).at_most(1);
    Injection::new(SEED, [breaks, InjectedFault::new(Syscall::Listen, &[Errno::ADDRINUSE])])
}

async fn health(proxy: &Proxy, status: &str, word: &str) {
    eventually(word, async || {
        let (head, body) = http(proxy.server().health(), "/healthz", b"").await;
        (head.starts_with(&format!("HTTP/1.1 {status} ")) && body.contains(word)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn failed_listening_socket_fails_the_health_check_until_reopened() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = proxy(&acme, "").await;
    let mut bystander = Bystander::of(&proxy).await;
    let faults = broken(Syscall::Accept);
    let waiting = TcpStream::connect(proxy.address("web")).await;
    proxy.metric("vestibule_accept_errors_total", &[("class", "fatal")]).is(1).await;
    proxy.metric(STOPPED, &[]).is(1).await;
    health(&proxy, "503", "listener_stopped").await;
    // Who waited in its queue is reset with it, perhaps before it knew that it was connected; those who were in go on.
    if let Ok(mut waiting) = waiting {
        end_of(&mut waiting).await.unwrap_err();
    }
    bystander.lives().await;
    // It is tried more than once.
    eventually("attempts", async || (faults.count(Syscall::Listen) > 1).then_some(())).await;
    drop(faults);
    proxy.metric(STOPPED, &[]).is(0).await;
    health(&proxy, "200", "ok").await;
    assert_eq!(exchange(proxy.open(ACME, b"served").await).await.unwrap(), b"served");
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn reload_that_gives_up_the_address_of_a_broken_socket_ends_the_alarm() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let mut proxy = proxy(&acme, "").await;
    let mut bystander = Bystander::of(&proxy).await;
    let faults = broken(Syscall::Accept);
    drop(TcpStream::connect(proxy.address("web")).await);
    proxy.metric(STOPPED, &[]).is(1).await;
    health(&proxy, "503", "listener_stopped").await;
    let (from, to) = ("name = \"web\"\nbind = \"127.0.0.1:0\"", "name = \"web\"\nbind = \"127.0.0.2:0\"");
    proxy.reload(from, to).unwrap();
    proxy.metric(STOPPED, &[]).is(0).await;
    health(&proxy, "200", "ok").await;
    drop(faults);
    assert_eq!(exchange(proxy.open(ACME, b"served").await).await.unwrap(), b"served");
    bystander.lives().await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn failed_udp_socket_is_reopened_and_its_flows_continue() {
    let _kernel = alone().await;
    let backend = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let echo = {
        let address = backend.local_addr().unwrap();
        tokio::spawn(async move {
            let mut room = vec![0; 2048];
            loop {
                let (count, from) = backend.recv_from(&mut room).await.unwrap();
                backend.send_to(&room[..count], from).await.unwrap();
            }
        });
        address
    };
    let more = format!(
        "[[listener]]\nname = \"dns\"\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\ntrusted-sources = [\"127.0.0.0/8\"]\n\
         pool = \"echo\"\n[[pool]]\nname = \"echo\"\nbackends = [\"{echo}\"]\n[pool.health]\nkind = \"none\"\n\
         [[tenant]]\nname = \"hooli\"\nendpoints = [\"{HOOLI}\"]\npool = \"echo\""
    );
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = Conf {
        acme: vec![acme.address()],
        workers: 1,
        more,
        timeouts: "flow-idle = \"500ms\"\n".to_owned(),
        ..Conf::default()
    };
    let proxy = conf.start().await;
    let mut bystander = Bystander::of(&proxy).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(proxy.address("dns")).await.unwrap();
    let header =
        nlb::datagram_header("10.1.1.1:1234".parse().unwrap(), "10.0.0.1:53".parse().unwrap(), Some(HOOLI));
    let ask = async |text: &[u8]| {
        client.send(&[&header, text].concat()).await.unwrap_or_default();
        let mut room = [0; 64];
        let heard = timeout(LIMIT / 100, client.recv(&mut room)).await;
        matches!(heard, Ok(Ok(count)) if &room[..count] == text).then_some(())
    };
    eventually("an answer", async || ask(b"before").await).await;
    let faults = broken(Syscall::ReceiveDatagram);
    client.send(&[&header, &b"breaks"[..]].concat()).await.unwrap();
    proxy.metric(STOPPED, &[]).is(1).await;
    proxy.metric("vestibule_accept_errors_total", &[("listener", "dns"), ("class", "fatal")]).is(1).await;
    health(&proxy, "503", "listener_stopped").await;
    bystander.lives().await;
    drop(faults);
    proxy.metric(STOPPED, &[]).is(0).await;
    health(&proxy, "200", "ok").await;
    eventually("an answer", async || ask(b"after").await).await;
    bystander.outlives(proxy).await;
}

const HOOLI: &str = "vpce-0a0000000000000d0";
