//! Faults of UDP: a datagram may be lost, and is counted; no listener stops, and no flow goes the wrong way.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use vestibule::fault::{InjectedFault, Syscall};
use vestibule::lab::nlb;

use super::harness::{ACME, Conf, LIMIT, Proxy, eventually, http_get};
use super::{Bystander, alone, inject, next};

/// A backend that answers each datagram with itself, and whoever asks it.
struct World {
    proxy: Proxy,
    socket: UdpSocket,
    bystander: Bystander,
    echo: JoinHandle<()>,
}

impl World {
    /// One worker: one socket hears all datagrams.
    async fn start() -> Self {
        let backend = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let acme = vec![backend.local_addr().unwrap()];
        let echo = tokio::spawn(async move {
            let mut room = vec![0; 65_536];
            loop {
                let Ok((count, from)) = backend.recv_from(&mut room).await else { continue };
                drop(backend.send_to(&room[..count], from).await);
            }
        });
        let listener = "[[listener]]\nname = \"dns\"\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\n\
            trusted-sources = [\"127.0.0.0/8\"]\n";
        let conf = Conf {
            acme,
            workers: 1,
            timeouts: "flow-idle = \"500ms\"\n".to_owned(),
            more: listener.to_owned(),
            ..Conf::default()
        };
        let proxy = conf.start().await;
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(proxy.address("dns")).await.unwrap();
        let bystander = Bystander::of(&proxy).await;
        Self { proxy, socket, bystander, echo }
    }

    async fn send(&self, client: &str, payload: &[u8]) {
        let (client, destination) = (client.parse().unwrap(), SocketAddr::from(([10, 0, 0, 1], 53)));
        let header = nlb::datagram_header(client, destination, Some(ACME));
        self.socket.send(&[&header, payload].concat()).await.unwrap();
    }

    async fn answer(&self) -> Vec<u8> {
        let mut room = vec![0; 65_536];
        let count = timeout(LIMIT, self.socket.recv(&mut room)).await.expect("an answer in time").unwrap();
        room.truncate(count);
        room
    }

    async fn ask(&self, client: &str, payload: &[u8]) {
        self.send(client, payload).await;
        assert_eq!(self.answer().await, payload);
    }

    async fn dropped(&self, direction: &str, why: &str, count: u32) {
        let labels = [("tenant", "acme"), ("direction", direction), ("why", why)];
        self.proxy.metric("vestibule_datagrams_dropped_total", &labels).is(count).await;
    }

    async fn finish(mut self) {
        self.bystander.lives().await;
        self.proxy.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(0).await;
        for tenant in self.proxy.server().live().snapshot.load().directory.tenants() {
            assert_eq!(tenant.quota.flows(), 0, "{} holds flows", tenant.label.name());
        }
        self.bystander.outlives(self.proxy).await;
        self.echo.abort();
    }
}

/// How long an answer is waited for before the question is asked again.
const RETRY: Duration = Duration::from_millis(50);

const ONE: &str = "10.100.0.10:40000";
const OTHER: &str = "10.100.0.11:40000";

#[tokio::test]
async fn unsendable_datagram_is_dropped_and_counted_and_its_flow_continues() {
    let _kernel = alone().await;
    for (errno, why) in [
        (Errno::NOBUFS, "shortage"),
        (Errno::NOMEM, "shortage"),
        (Errno::AGAIN, "full"),
        (Errno::PERM, "unreachable"),
    ] {
        let world = World::start().await;
        world.ask(ONE, b"before").await;
        let short = next(Syscall::SendDatagram, errno, 1);
        world.send(ONE, b"lost").await;
        world.dropped("to_backend", why, 1).await;
        drop(short);
        world.ask(ONE, b"after").await;
        world.ask(OTHER, b"another").await;
        world.dropped("to_client", why, 0).await;
        world.proxy.ended(&[("listener", "dns"), ("why", "idle_timeout")]).is(2).await;
        world.finish().await;
    }
}

#[tokio::test]
async fn listener_that_cannot_receive_pauses_and_continues() {
    let _kernel = alone().await;
    for errno in [Errno::NOMEM, Errno::NOBUFS] {
        let world = World::start().await;
        let short = next(Syscall::ReceiveDatagram, errno, 2);
        world.ask(ONE, b"late").await;
        assert_eq!(short.count(Syscall::ReceiveDatagram), 2);
        let labels = [("listener", "dns"), ("class", "shortage")];
        world.proxy.metric("vestibule_accept_errors_total", &labels).is(2).await;
        drop(short);
        world.ask(OTHER, b"as before").await;
        world.finish().await;
    }
}

#[tokio::test]
async fn flow_without_a_socket_opens_with_the_next_datagram() {
    let _kernel = alone().await;
    for (call, errno, why) in [
        (Syscall::Socket, Errno::MFILE, "shortage"),
        (Syscall::Socket, Errno::NOBUFS, "shortage"),
        (Syscall::Register, Errno::NOMEM, "shortage"),
        (Syscall::Register, Errno::NOSPC, "shortage"),
        (Syscall::Connect, Errno::ADDRNOTAVAIL, "no_local_port"),
    ] {
        let world = World::start().await;
        let short = next(call, errno, 1);
        world.send(ONE, b"lost").await;
        let labels = [("listener", "dns"), ("tenant", "acme"), ("at", "connect"), ("why", why)];
        world.proxy.ended(&labels).is(1).await;
        assert_eq!(short.count(call), 1);
        drop(short);
        // After a search for a port that failed the kernel is not asked again at once.
        eventually("a flow", async || {
            world.send(ONE, b"after").await;
            timeout(RETRY, world.answer()).await.ok()
        })
        .await;
        world.proxy.metric("vestibule_backend_ejections_total", &[]).is(0).await;
        world.finish().await;
    }
}

#[tokio::test]
async fn answer_that_cannot_be_received_ends_only_its_flow() {
    let _kernel = alone().await;
    let mut world = World::start().await;
    world.ask(ONE, b"before").await;
    world.ask(OTHER, b"before").await;
    // The first call takes the question, the second the answer.
    let short = inject(InjectedFault::new(Syscall::ReceiveDatagram, &[Errno::NOMEM]).after(1).at_most(1));
    world.send(ONE, b"lost").await;
    world.proxy.ended(&[("listener", "dns"), ("at", "forward"), ("why", "shortage")]).is(1).await;
    drop(short);
    world.ask(OTHER, b"after").await;
    world.ask(ONE, b"again").await;
    world.bystander.lives().await;
    world.finish().await;
}

#[tokio::test]
async fn panic_in_a_flow_ends_only_that_flow() {
    let _kernel = alone().await;
    let world = World::start().await;
    world.ask(ONE, b"before").await;
    world.ask(OTHER, b"before").await;
    let bug = next(Syscall::Panic, Errno::INVAL, 1);
    world.send(ONE, b"lost").await;
    let labels =
        [("listener", "dns"), ("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "internal")];
    world.proxy.ended(&labels).is(1).await;
    drop(bug);
    // The other one lives, and a new one begins.
    world.ask(OTHER, b"after").await;
    world.ask(ONE, b"again").await;
    world.proxy.ended(&[("listener", "dns"), ("why", "idle_timeout")]).is(2).await;
    assert_eq!(http_get(world.proxy.server().health(), "/healthz").await.trim(), "ok");
    world.finish().await;
}
