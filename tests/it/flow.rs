//! UDP through real sockets: whose answers come back to whom, and what becomes of every other datagram.

mod follow;
mod idle;
mod limits;
mod moved;
mod revoke;
mod send_proxy;

use std::fmt::Write as _;
use std::net::SocketAddr;

use serde_json::Value;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use vestibule::addr::{ClientAddr, DestinationAddr};
use vestibule::lab::nlb;
use vestibule::proxy_protocol::{HeaderBuilder, Transport};

use super::harness::{ACME, Conf, LIMIT, Proxy, STRANGER, eventually};

/// A bystander that speaks UDP.
pub const HOOLI: &str = "vpce-0400110400110400a";

/// An address that every consumer has.
const CLIENT: &str = "10.100.0.10:40000";

/// A backend that answers each datagram with its name, who sent it, and what it holds.
pub struct Echo {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Echo {
    pub async fn start(name: &'static str) -> Self {
        Self::start_at("127.0.0.1:0", name).await
    }

    pub async fn start_at(address: &str, name: &'static str) -> Self {
        let socket = UdpSocket::bind(address).await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut room = vec![0; 65_536];
            loop {
                // An answer to somebody who has gone comes back as an error.
                let Ok((count, from)) = socket.recv_from(&mut room).await else { continue };
                let answer = if name.is_empty() {
                    room[..count].to_vec()
                } else {
                    [name.as_bytes(), b" ", &room[..count]].concat()
                };
                drop(socket.send_to(&answer, from).await);
            }
        });
        Self { address, task }
    }
}

/// A listener `dns` for UDP, acme's backends, and a bystander with one of its own.
pub async fn world(acme: &[SocketAddr], change: impl FnOnce(&mut Conf, &mut String)) -> (Proxy, Echo) {
    let hooli = Echo::start("hooli").await;
    let mut listener =
        String::from("bind = \"127.0.0.1:0\"\nprotocol = \"udp\"\ntrusted-sources = [\"127.0.0.0/8\"]\n");
    let mut conf = Conf { acme: acme.to_vec(), ..Conf::default() };
    change(&mut conf, &mut listener);
    write!(
        conf.more,
        "[[listener]]\nname = \"dns\"\n{listener}\n[[pool]]\nname = \"hooli\"\nbackends = [\"{}\"]\n\
         health = {{ kind = \"none\" }}\n[[tenant]]\nname = \"hooli\"\nendpoints = [\"{HOOLI}\"]\npool = \"hooli\"\n",
        hooli.address
    )
    .unwrap();
    (conf.start().await, hooli)
}

/// The load balancer's side: one socket, whoever speaks.
pub struct Balancer {
    pub socket: UdpSocket,
}

impl Balancer {
    pub async fn to(target: SocketAddr) -> Self {
        let any = if target.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let socket = UdpSocket::bind(any).await.unwrap();
        socket.connect(target).await.unwrap();
        Self { socket }
    }

    pub async fn send(&self, bytes: &[u8]) {
        self.socket.send(bytes).await.unwrap();
    }

    pub async fn ask(&self, bytes: &[u8]) -> Vec<u8> {
        self.send(bytes).await;
        self.answer().await
    }

    pub async fn answer(&self) -> Vec<u8> {
        let mut room = vec![0; 65_536];
        let count = timeout(LIMIT, self.socket.recv(&mut room)).await.expect("an answer in time").unwrap();
        room.truncate(count);
        room
    }

    /// Nothing has come.
    pub fn is_silent(&self) -> bool {
        self.socket.try_recv(&mut [0; 16]).is_err()
    }
}

/// A datagram as the load balancer sends it.
pub fn datagram(client: &str, endpoint: &str, payload: &[u8]) -> Vec<u8> {
    let destination = "10.0.0.1:53".parse().unwrap();
    let header = nlb::datagram_header(client.parse().unwrap(), destination, Some(endpoint));
    [&header, payload].concat()
}

/// The bystander is served as if nothing had happened, and another tenant's TCP session too.
pub async fn others_are_unharmed(proxy: &Proxy) {
    let answer = Balancer::to(proxy.address("dns")).await.ask(&datagram(CLIENT, HOOLI, b"unharmed")).await;
    assert_eq!(answer, b"hooli unharmed");
    proxy.others_are_unharmed().await;
}

/// Waits until no flow is left; then everything must have been given back.
pub async fn finish(proxy: Proxy) -> Vec<Value> {
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    for tenant in proxy.server().live().snapshot.load().directory.tenants() {
        assert_eq!(tenant.quota.flows(), 0, "{} holds flows", tenant.label.name());
    }
    proxy.finish_with_log().await
}

/// A listener where a datagram without a header may belong to the one flow of its sender.
const FOLLOW: &str = "bare-datagrams = \"follow\"\n";

/// Flows go soon.
pub fn soon(conf: &mut Conf) {
    conf.timeouts += "flow-idle = \"300ms\"\n";
}

/// A proxy that assigns datagrams without a header to the flow of their path, and its load balancer.
async fn following(acme: SocketAddr) -> (Proxy, Echo, Balancer) {
    let (proxy, hooli) = world(&[acme], |conf, listener| {
        listener.push_str(FOLLOW);
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    (proxy, hooli, balancer)
}

#[tokio::test]
async fn flow_forwards_both_directions_and_is_counted() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    for question in ["one", "two"] {
        let answer = balancer.ask(&datagram(CLIENT, ACME, question.as_bytes())).await;
        assert_eq!(answer, format!("acme {question}").as_bytes());
    }
    let of_acme = [("listener", "dns"), ("tenant", "acme"), ("pool", "acme")];
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    for direction in ["to_backend", "to_client"] {
        let labels = [&of_acme[..], &[("direction", direction)]].concat();
        proxy.metric("vestibule_forwarded_datagrams_total", &labels).is(2).await;
        let bytes = if direction == "to_backend" { 6 } else { 16 };
        proxy.metric("vestibule_forwarded_bytes_total", &labels).is(bytes).await;
    }
    others_are_unharmed(&proxy).await;
    proxy.ended(&[("listener", "dns"), ("tenant", "acme"), ("why", "idle_timeout")]).is(1).await;
    let log = finish(proxy).await;
    let line = log.iter().find(|line| line["tenant"] == "acme").unwrap();
    let expected = serde_json::json!({ "to_backend": 2, "to_client": 2 });
    assert_eq!(
        (&line["tenant"], &line["endpoint"], &line["datagrams"]),
        (&"acme".into(), &ACME.into(), &expected)
    );
    assert_eq!((&line["client"], &line["attempts"]), (&CLIENT.into(), &1.into()));
    assert_eq!(line["backend"], acme.address.to_string());
}

#[tokio::test]
async fn consumers_with_equal_addresses_behind_one_load_balancer_get_their_own_answers() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    for turn in 0..50 {
        let (mine, yours) = (format!("mine {turn}"), format!("yours {turn}"));
        balancer.send(&datagram(CLIENT, ACME, mine.as_bytes())).await;
        balancer.send(&datagram(CLIENT, HOOLI, yours.as_bytes())).await;
        let mut answers = [balancer.answer().await, balancer.answer().await];
        answers.sort();
        assert_eq!(answers, [format!("acme {mine}").into_bytes(), format!("hooli {yours}").into_bytes()]);
    }
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(2).await;
    finish(proxy).await;
}

#[tokio::test]
async fn datagram_without_a_header_belongs_to_the_only_flow_of_its_path() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli, balancer) = following(acme.address).await;
    balancer.send(b"who am I").await;
    proxy.ended(&[("listener", "dns"), ("by", "proxy"), ("at", "header"), ("why", "no_header")]).is(1).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
    assert_eq!(balancer.ask(b"two").await, b"acme two");
    assert_eq!(balancer.ask(b"").await, b"acme ");
    balancer.ask(&datagram(CLIENT, HOOLI, b"three")).await;
    balancer.send(b"whose").await;
    proxy.ended(&[("listener", "dns"), ("at", "header"), ("why", "ambiguous")]).is(1).await;
    assert!(balancer.is_silent());
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn bare_datagram_is_refused_by_default() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"one")).await, b"acme one");
    balancer.send(b"two").await;
    proxy.ended(&[("listener", "dns"), ("by", "proxy"), ("at", "header"), ("why", "no_header")]).is(1).await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"three")).await, b"acme three");
    assert!(balancer.is_silent());
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn bare_datagram_of_a_sender_that_had_two_speakers_reaches_no_flow() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli, balancer) = following(acme.address).await;
    balancer.ask(&datagram(CLIENT, HOOLI, b"one")).await;
    // The second speaker goes on until the first one's flow is over.
    eventually("the end of the first flow", async || {
        assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"two")).await, b"acme two");
        let ended =
            proxy.value("vestibule_sessions_ended_total", &[("tenant", "hooli"), ("why", "idle_timeout")]);
        (ended.await > 0.5).then_some(())
    })
    .await;
    balancer.send(b"whose").await;
    proxy.ended(&[("listener", "dns"), ("at", "header"), ("why", "ambiguous")]).is(1).await;
    assert!(balancer.is_silent());
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn datagram_without_a_flow_is_counted_by_reason() {
    let (proxy, _hooli) = world(&[], |conf, listener| {
        conf.acme = vec!["127.0.0.1:9".parse().unwrap()];
        *listener = listener.replace("127.0.0.0/8", "127.0.0.1/32");
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let whole = datagram(CLIENT, ACME, b"");
    let mut damaged = whole.clone();
    damaged[20] ^= 1;
    let mut stream = nlb::header(CLIENT.parse().unwrap(), "10.0.0.1:53".parse().unwrap(), Some(ACME));
    stream.extend(b"payload");
    let (client, destination) = (CLIENT.parse().unwrap(), "10.0.0.1:53".parse().unwrap());
    let two = HeaderBuilder::proxy(Transport::Datagram, ClientAddr(client), DestinationAddr(destination));
    let two = two.endpoint(ACME).unwrap().endpoint(STRANGER).unwrap().build();
    for (bytes, at, why) in [
        (two, "header", "ambiguous_endpoint"),
        (damaged, "header", "crc_mismatch"),
        (whole[..50].to_vec(), "header", "header_truncated"),
        (stream, "header", "wrong_transport"),
        (nlb::health_check_header(), "header", "local"),
        (datagram(CLIENT, STRANGER, b"x"), "tenant", "unknown_endpoint"),
        (datagram(CLIENT, super::harness::INITECH, b"x"), "tenant", "tenant_disabled"),
    ] {
        balancer.send(&bytes).await;
        proxy.ended(&[("listener", "dns"), ("at", at), ("why", why)]).is(1).await;
    }
    let stranger = UdpSocket::bind("127.0.0.2:0").await.unwrap();
    stranger.send_to(&datagram(CLIENT, ACME, b"x"), proxy.address("dns")).await.unwrap();
    proxy.ended(&[("listener", "dns"), ("at", "accept"), ("why", "untrusted_source")]).is(1).await;
    assert!(balancer.is_silent());
    others_are_unharmed(&proxy).await;
    let log = finish(proxy).await;
    assert!(log.iter().all(|line| line["outcome"]["why"] != "local"), "health checks are counted only");
}

#[tokio::test]
async fn datagrams_of_every_length_pass_whole() {
    let acme = Echo::start("").await;
    let (proxy, _hooli, balancer) = following(acme.address).await;
    for len in [0, 1, 1_400, 1_472, 1_473, 9_000, 65_407] {
        let payload: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
        assert!(balancer.ask(&datagram(CLIENT, ACME, &payload)).await == payload, "{len} bytes");
    }
    let longest = vec![7; 65_507];
    assert!(balancer.ask(&longest).await == longest, "the longest, without a header, by the known flow");
    finish(proxy).await;
}

#[tokio::test]
async fn before_the_first_answer_a_flow_moves_on_from_a_backend_that_is_not_there() {
    let acme = Echo::start("acme").await;
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (proxy, _hooli) = world(&[gone, acme.address], |conf, _| {
        conf.pool = "balance = \"round-robin\"".to_owned();
        soon(conf);
    })
    .await;
    for turn in 0..4 {
        let balancer = Balancer::to(proxy.address("dns")).await;
        let question = format!("question {turn}");
        let answer = balancer.ask(&datagram(CLIENT, ACME, question.as_bytes())).await;
        assert_eq!(answer, format!("acme {question}").as_bytes(), "the first datagram is not lost");
    }
    for (result, expected) in [("connect_refused", 2), ("done", 4)] {
        let labels = [("pool", "acme"), ("result", result)];
        proxy.metric("vestibule_backend_connects_total", &labels).is(expected).await;
    }
    proxy
        .metric("vestibule_forwarded_datagrams_total", &[("tenant", "acme"), ("direction", "to_backend")])
        .is(4)
        .await;
    others_are_unharmed(&proxy).await;
    let log = finish(proxy).await;
    let attempts: u64 =
        log.iter().filter(|line| line["tenant"] == "acme").filter_map(|line| line["attempts"].as_u64()).sum();
    assert_eq!(attempts, 6);
}

#[tokio::test]
async fn flow_of_a_dead_backend_ends_and_the_next_datagram_opens_another() {
    let acme = Echo::start("acme").await;
    let address = acme.address;
    let (proxy, _hooli) = world(&[address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    balancer.ask(&datagram(CLIENT, ACME, b"one")).await;
    drop(acme);
    eventually("the backend's end", async || UdpSocket::bind(address).await.ok().map(drop)).await;
    balancer.send(&datagram(CLIENT, ACME, b"two")).await;
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("at", "forward"), ("why", "reset")]).is(1).await;
    balancer.send(&datagram(CLIENT, ACME, b"three")).await;
    proxy
        .ended(&[("tenant", "acme"), ("by", "backend"), ("at", "connect"), ("why", "connect_refused")])
        .is(1)
        .await;
    let _acme = Echo::start_at(&address.to_string(), "back").await;
    assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"four")).await, b"back four");
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn answers_leave_from_the_address_that_was_asked() {
    let acme = Echo::start("acme").await;
    for (bind, trusted, asked) in
        [("0.0.0.0:0", "127.0.0.0/8", ["127.0.0.1", "127.0.0.3"]), ("[::]:0", "::1/128", ["[::1]", "[::1]"])]
    {
        let (proxy, _hooli) = world(&[acme.address], |conf, listener| {
            *listener = format!("bind = \"{bind}\"\nprotocol = \"udp\"\ntrusted-sources = [\"{trusted}\"]\n");
            soon(conf);
        })
        .await;
        let port = proxy.address("dns").port();
        for ip in asked {
            // A connected socket hears nobody else.
            let balancer = Balancer::to(format!("{ip}:{port}").parse().unwrap()).await;
            assert_eq!(balancer.ask(&datagram(CLIENT, ACME, b"here")).await, b"acme here");
        }
        finish(proxy).await;
    }
}

#[tokio::test]
async fn without_proxy_protocol_the_listeners_tenant_is_served() {
    let acme = Echo::start("acme").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, listener| {
        *listener =
            "bind = \"127.0.0.1:0\"\nprotocol = \"udp\"\nproxy-protocol = \"off\"\ntenant = \"acme\"\n"
                .to_owned();
        soon(conf);
    })
    .await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    assert_eq!(balancer.ask(b"plain").await, b"acme plain");
    proxy.others_are_unharmed().await;
    let line = proxy.logged("idle_timeout").await;
    assert_eq!(line["client"], balancer.socket.local_addr().unwrap().to_string());
    finish(proxy).await;
}

#[tokio::test]
async fn burst_of_many_flows_is_answered_complete_and_in_order() {
    let acme = Echo::start("").await;
    let (proxy, _hooli) = world(&[acme.address], |conf, _| soon(conf)).await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    let clients: Vec<_> = (0..8).map(|number| format!("10.100.0.{number}:5000")).collect();
    let mut next = vec![0_u32; clients.len()];
    // So many as the sockets' buffers hold.
    for round in 0..10_u32 {
        for turn in 4 * round..4 * round + 4 {
            for client in &clients {
                let payload = format!("{client} {turn:04} {}", "x".repeat(600));
                balancer.send(&datagram(client, ACME, payload.as_bytes())).await;
            }
        }
        for _ in 0..4 * clients.len() {
            let answer = String::from_utf8(balancer.answer().await).unwrap();
            let (client, turn) = (answer.split(' ').next().unwrap(), answer.split(' ').nth(1).unwrap());
            let place = clients.iter().position(|known| known == client).unwrap();
            assert_eq!(turn.parse::<u32>().unwrap(), next[place], "{client}");
            next[place] += 1;
        }
    }
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(8).await;
    finish(proxy).await;
}

#[tokio::test]
async fn many_answers_to_one_question_pass_in_their_order_however_they_are_taken() {
    let backend = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = backend.local_addr().unwrap();
    // Longer than a busy machine keeps a flow waiting.
    let (proxy, _hooli) = world(&[address], |conf, _| conf.timeouts += "flow-idle = \"2s\"\n").await;
    let balancer = Balancer::to(proxy.address("dns")).await;
    // At first each is taken by itself, then all that there are; between the two nothing is lost, doubled or joined.
    for question in 0..60_u8 {
        balancer.send(&datagram(CLIENT, ACME, &[question])).await;
        let mut room = [0; 2];
        let (count, flow) = backend.recv_from(&mut room).await.unwrap();
        assert_eq!((count, room[0]), (1, question));
        // Of several lengths, an empty one among them.
        for answer in 0..question % 7 {
            backend.send_to(&vec![question; usize::from(answer)], flow).await.unwrap();
        }
        for answer in 0..question % 7 {
            assert_eq!(balancer.answer().await, vec![question; usize::from(answer)]);
        }
    }
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(1).await;
    let answers: u32 = (0..60).map(|question| question % 7).sum();
    let passed = [("tenant", "acme"), ("direction", "to_client")];
    proxy.metric("vestibule_forwarded_datagrams_total", &passed).is(answers).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}
