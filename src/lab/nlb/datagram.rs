//! The load balancer's UDP side: each consumer's flow, and the header in front of every datagram of it.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::{Nlb, VpcEndpoint, client, datagram_header};
use crate::clock::{self, Moment};
use crate::lab::{ANYWHERE, Tasks, reap, toward};

/// A flow that is silent for so long ends: NLB's own figure (its guide, "Listeners", "UDP idle timeout").
const IDLE: Duration = Duration::from_secs(120);

/// Flows of one endpoint at once. A datagram that would begin one more is dropped.
const FLOWS: usize = 1_024;

/// Room for the longest datagram.
const ROOM: usize = 64 * 1024;

/// Bytes of a socket's queue, where bursts wait; the kernel cuts it to `net.core.rmem_max`.
const QUEUE: usize = 4 * 1024 * 1024;

impl Nlb {
    /// Opens one loopback address for each endpoint, and sends every datagram that comes there to `target`, behind a
    /// header. A consumer's address is a flow: it has one client's address, and one socket toward the target. What the
    /// target answers goes back to the consumer from the address that was asked.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn start_udp(target: SocketAddr, endpoints: Vec<VpcEndpoint>) -> io::Result<Self> {
        let mut tasks = Tasks::new();
        let (mut addresses, mut counts) = (Vec::new(), Vec::new());
        for endpoint in endpoints {
            let count = Arc::new(AtomicU64::new(0));
            let listen_socket = NlbUdpSocket::open(target, endpoint, Arc::clone(&count)).await?;
            addresses.push(listen_socket.socket.local_addr()?);
            counts.push(count);
            tasks.spawn(Arc::new(listen_socket).serve());
        }
        Ok(Self { addresses, counts, _tasks: tasks })
    }
}

/// An endpoint's address, and the flows of its consumers.
struct NlbUdpSocket {
    socket: UdpSocket,
    target: SocketAddr,
    endpoint: VpcEndpoint,
    /// Flows so far.
    count: Arc<AtomicU64>,
    flows: Mutex<HashMap<SocketAddr, Arc<NlbFlow>>>,
    idle: Duration,
    most: usize,
}

/// What goes between one consumer and the target.
struct NlbFlow {
    socket: UdpSocket,
    header: Vec<u8>,
    /// When its last datagram came, from either side.
    last: AtomicU64,
}

impl NlbFlow {
    fn hear(&self) {
        self.last.store(clock::now().as_nanos(), Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        clock::now().since(Moment::from_nanos(self.last.load(Ordering::Relaxed)))
    }
}

impl NlbUdpSocket {
    async fn open(target: SocketAddr, endpoint: VpcEndpoint, count: Arc<AtomicU64>) -> io::Result<Self> {
        let socket = UdpSocket::bind(ANYWHERE).await?;
        SockRef::from(&socket).set_recv_buffer_size(QUEUE)?;
        Ok(Self { socket, target, endpoint, count, flows: Mutex::default(), idle: IDLE, most: FLOWS })
    }

    async fn serve(self: Arc<Self>) {
        let mut answers = Tasks::new();
        let (mut room, mut whole) = (vec![0; ROOM], Vec::with_capacity(ROOM));
        loop {
            let Ok((len, consumer)) = self.socket.recv_from(&mut room).await else {
                // The ICMP error of an earlier answer whose consumer has gone.
                continue;
            };
            let flow = match self.known(consumer) {
                Some(flow) => flow,
                None => match self.begin(consumer).await {
                    Ok(Some(flow)) => {
                        reap(&mut answers);
                        answers.spawn(Arc::clone(&self).answer(consumer, Arc::clone(&flow)));
                        flow
                    }
                    // All slots are in use, or no port is free: the datagram is lost.
                    Ok(None) | Err(_) => continue,
                },
            };
            whole.clear();
            whole.extend_from_slice(&flow.header);
            whole.extend_from_slice(room.get(..len).unwrap_or_default());
            // The error concerns an earlier datagram, or this one is too long: it is lost.
            flow.socket.send(&whole).await.unwrap_or_default();
        }
    }

    /// Takes the answers of one flow back to its consumer, until it is idle.
    async fn answer(self: Arc<Self>, consumer: SocketAddr, flow: Arc<NlbFlow>) {
        let mut room = vec![0; ROOM];
        while let Some(left) = self.left(consumer, &flow) {
            // On an error no socket listens at the target; the flow continues. After the timeout everything is
            // checked again.
            if let Ok(Ok(len)) = timeout(left, flow.socket.recv(&mut room)).await {
                flow.hear();
                self.socket.send_to(room.get(..len).unwrap_or_default(), consumer).await.unwrap_or_default();
            }
        }
    }

    /// How long the flow may still be silent. One that has been silent for too long goes.
    fn left(&self, consumer: SocketAddr, flow: &NlbFlow) -> Option<Duration> {
        let mut flows = self.flows();
        let left = self.idle.checked_sub(flow.silence()).filter(|left| !left.is_zero());
        if left.is_none() {
            flows.remove(&consumer);
        }
        left
    }

    /// The consumer's flow, which has just been heard.
    fn known(&self, consumer: SocketAddr) -> Option<Arc<NlbFlow>> {
        let flows = self.flows();
        let flow = flows.get(&consumer)?;
        // Sent under the lock, so that the flow cannot expire in between.
        flow.hear();
        Some(Arc::clone(flow))
    }

    /// A new flow, where there is a place.
    async fn begin(&self, consumer: SocketAddr) -> io::Result<Option<Arc<NlbFlow>>> {
        if self.flows().len() >= self.most {
            return Ok(None);
        }
        let socket = UdpSocket::bind(toward(self.target)).await?;
        socket.connect(self.target).await?;
        SockRef::from(&socket).set_recv_buffer_size(QUEUE)?;
        let client = client(self.endpoint.consumers, self.count.fetch_add(1, Ordering::Relaxed));
        let header = datagram_header(client, self.target, Some(&self.endpoint.id));
        let flow = Arc::new(NlbFlow { socket, header, last: AtomicU64::new(clock::now().as_nanos()) });
        self.flows().insert(consumer, Arc::clone(&flow));
        Ok(Some(flow))
    }

    fn flows(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<NlbFlow>>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{self, ParsedHeader, ParserRules, Transport};

    const LIMIT: Duration = Duration::from_secs(20);

    fn endpoint(id: &str) -> VpcEndpoint {
        VpcEndpoint { id: id.to_owned(), consumers: "10.100.0.0/16".parse().unwrap() }
    }

    async fn consumer(asks: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind(ANYWHERE).await.unwrap();
        // A connected socket: it receives from the address that it sends to.
        socket.connect(asks).await.unwrap();
        socket
    }

    async fn heard(socket: &UdpSocket) -> Vec<u8> {
        let mut room = vec![0; ROOM];
        let len = timeout(LIMIT, socket.recv(&mut room)).await.expect("an answer in time").unwrap();
        room.truncate(len);
        room
    }

    /// What the target received: client, endpoint, payload and the address for an answer.
    async fn arrived(target: &UdpSocket) -> (SocketAddr, String, Vec<u8>, SocketAddr) {
        let mut room = vec![0; ROOM];
        let (len, from) = timeout(LIMIT, target.recv_from(&mut room)).await.expect("a datagram").unwrap();
        let rules = ParserRules { transport: Transport::Datagram, verify_crc: true };
        let ParsedHeader::Done(header, header_len) = proxy_protocol::parse(&room[..len], rules) else {
            panic!("no header")
        };
        let endpoint = String::from_utf8(header.endpoint().unwrap().to_vec()).unwrap();
        (header.client().unwrap().0, endpoint, room[header_len..len].to_vec(), from)
    }

    #[tokio::test]
    async fn consumers_get_their_own_answers_and_every_datagram_has_its_header() {
        let target = UdpSocket::bind(ANYWHERE).await.unwrap();
        let endpoints = vec![endpoint("vpce-0aa"), endpoint("vpce-0bb")];
        let nlb = Nlb::start_udp(target.local_addr().unwrap(), endpoints).await.unwrap();
        let mut consumers = Vec::new();
        for asks in [0, 0, 1] {
            consumers.push(consumer(nlb.address(asks).unwrap()).await);
        }
        let expected = [
            ("10.100.0.10:40000", "vpce-0aa"),
            ("10.100.0.11:40000", "vpce-0aa"),
            ("10.100.0.10:40000", "vpce-0bb"),
        ];
        for turn in 0..20 {
            let mut answers = Vec::new();
            for (number, (consumer, (client, endpoint))) in consumers.iter().zip(expected).enumerate() {
                consumer.send(format!("{number} {turn}").as_bytes()).await.unwrap();
                let (found, over, payload, from) = arrived(&target).await;
                assert_eq!((found, &*over), (client.parse().unwrap(), endpoint), "{turn}");
                assert_eq!(payload, format!("{number} {turn}").as_bytes());
                answers.push((payload, from));
            }
            for (payload, from) in answers.iter().rev() {
                target.send_to(payload, from).await.unwrap();
            }
            for (number, consumer) in consumers.iter().enumerate() {
                assert_eq!(heard(consumer).await, format!("{number} {turn}").as_bytes());
            }
        }
        assert_eq!((nlb.connections(0), nlb.connections(1)), (2, 1));
    }

    #[tokio::test]
    async fn datagrams_of_every_length_pass_and_the_flow_outlives_a_target_that_is_not_there() {
        let target = UdpSocket::bind(ANYWHERE).await.unwrap();
        let address = target.local_addr().unwrap();
        let nlb = Nlb::start_udp(address, vec![endpoint("vpce-0aa")]).await.unwrap();
        let consumer = consumer(nlb.address(0).unwrap()).await;
        for len in [0, 1, 1_472, 9_000, 65_407] {
            consumer.send(&vec![7; len]).await.unwrap();
            let (_, _, payload, from) = arrived(&target).await;
            assert!(payload == vec![7; len], "{len}");
            target.send_to(&payload, from).await.unwrap();
            assert_eq!(heard(&consumer).await.len(), len);
        }
        drop(target);
        consumer.send(b"lost").await.unwrap();
        let target = UdpSocket::bind(address).await.unwrap();
        // The last one brought an error back, which the next send may take: it is lost, too, then.
        let again = async {
            loop {
                consumer.send(b"again").await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let client = tokio::select! {
            (client, ..) = arrived(&target) => client,
            () = again => panic!("no end"),
        };
        assert_eq!(client, "10.100.0.10:40000".parse().unwrap());
        assert_eq!(nlb.connections(0), 1);
    }

    /// A socket with other bounds, whose tasks end with the set.
    async fn listen_socket(
        target: &UdpSocket,
        idle: Duration,
        most: usize,
    ) -> (Arc<NlbUdpSocket>, SocketAddr, Tasks) {
        let opened =
            NlbUdpSocket::open(target.local_addr().unwrap(), endpoint("vpce-0aa"), Arc::default()).await;
        let listen_socket = Arc::new(NlbUdpSocket { idle, most, ..opened.unwrap() });
        let mut tasks = Tasks::new();
        tasks.spawn(Arc::clone(&listen_socket).serve());
        let address = listen_socket.socket.local_addr().unwrap();
        (listen_socket, address, tasks)
    }

    #[tokio::test]
    async fn idle_flow_expires_and_the_next_datagram_opens_another() {
        let target = UdpSocket::bind(ANYWHERE).await.unwrap();
        let (listen_socket, address, _tasks) = listen_socket(&target, Duration::from_millis(50), FLOWS).await;
        let consumer = consumer(address).await;
        consumer.send(b"one").await.unwrap();
        assert_eq!(arrived(&target).await.0, "10.100.0.10:40000".parse().unwrap());
        let gone = async {
            while !listen_socket.flows().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, gone).await.expect("the flow's end");
        consumer.send(b"two").await.unwrap();
        let (client, _, _, from) = arrived(&target).await;
        assert_eq!(client, "10.100.0.11:40000".parse().unwrap());
        target.send_to(b"answer", from).await.unwrap();
        assert_eq!(heard(&consumer).await, b"answer");
    }

    #[tokio::test]
    async fn last_flow_within_the_limit_is_opened_and_the_next_is_not() {
        let target = UdpSocket::bind(ANYWHERE).await.unwrap();
        let (listen_socket, address, _tasks) = listen_socket(&target, IDLE, 2).await;
        let [one, two, three] = [consumer(address).await, consumer(address).await, consumer(address).await];
        for (consumer, payload) in [(&one, b"one"), (&two, b"two"), (&three, b"too"), (&one, b"end")] {
            consumer.send(payload).await.unwrap();
        }
        for expected in [b"one", b"two", b"end"] {
            assert_eq!(arrived(&target).await.2, expected);
        }
        assert_eq!(listen_socket.flows().len(), 2);
    }
}
