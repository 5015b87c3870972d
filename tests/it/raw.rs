//! A backend that the test plays itself, and streams of bytes in which every fault shows.

use std::io;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::harness::{ACME, Conf, LIMIT, Proxy, read};

/// A listening socket whose connections the test takes one by one.
pub struct Raw {
    socket: TcpListener,
    address: SocketAddr,
}

impl Raw {
    pub async fn bind() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        Self { socket, address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The proxy's next connection.
    pub async fn accept(&self) -> TcpStream {
        let (stream, _) = timeout(LIMIT, self.socket.accept()).await.expect("a connection").unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A proxy with this backend alone.
    pub async fn proxy(&self, conf: Conf) -> Proxy {
        Conf { acme: vec![self.address], ..conf }.start().await
    }

    /// A client of acme and the backend's end of its session.
    pub async fn session(&self, proxy: &Proxy) -> (TcpStream, TcpStream) {
        let client = proxy.open(ACME, b"").await;
        (client, self.accept().await)
    }
}

/// A port that is this test's own, whether something listens there or not: whoever asks for a free port gets
/// another.
pub struct Held {
    _socket: Socket,
    address: SocketAddr,
}

impl Held {
    /// While nobody calls [`listen`](Self::listen), connections are refused.
    pub fn bind() -> Self {
        let socket = bound(([127, 0, 0, 1], 0).into());
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        Self { _socket: socket, address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections are taken, until what this returns is dropped.
    pub fn listen(&self) -> Raw {
        let socket = bound(self.address);
        socket.listen(128).unwrap();
        Raw { socket: TcpListener::from_std(socket.into()).unwrap(), address: self.address }
    }
}

fn bound(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket
}

/// A listening socket whose queue is full: it does not answer. `None` where the system answers all the same.
pub struct Swallow {
    address: SocketAddr,
    _socket: Socket,
    _queue: Vec<TcpStream>,
}

impl Swallow {
    pub async fn start() -> Option<Self> {
        let socket = bound(([127, 0, 0, 1], 0).into());
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let mut queue = Vec::new();
        for _ in 0..16 {
            match timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
                Ok(connected) => queue.push(connected.unwrap()),
                Err(_) => return Some(Self { address, _socket: socket, _queue: queue }),
            }
        }
        eprintln!("SKIPPED: this system answers for a socket whose queue is full");
        None
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A prime: no chunk, page or pipe is a multiple of it, so a piece that is lost, doubled or out of place shows.
const PERIOD: usize = 1_000_003;

static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut block = vec![0; PERIOD];
    fastrand::Rng::with_seed(1).fill(&mut block);
    block
});

/// The bytes that are sent, or compared, at once.
const CHUNK: usize = 256 * 1024;

/// An endless stream of bytes: equal for equal seeds, and otherwise different everywhere.
#[derive(Clone)]
pub struct Bytes {
    seed: u64,
    /// Bytes so far.
    pub count: u64,
}

impl Bytes {
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    fn next(&mut self, most: usize) -> &'static [u8] {
        let period = PERIOD as u64;
        let place = usize::try_from((self.seed % period * 7_919 + self.count) % period).unwrap();
        let end = (place + most).min(PERIOD);
        self.count += (end - place) as u64;
        &BLOCK[place..end]
    }

    /// Writes the next `count` bytes.
    pub async fn send(&mut self, to: &mut (impl AsyncWrite + Unpin), count: u64) -> io::Result<()> {
        let end = self.count + count;
        while self.count < end {
            let left = usize::try_from(end - self.count).unwrap();
            to.write_all(self.next(left.min(CHUNK))).await?;
        }
        Ok(())
    }

    /// Compares what was read with what comes next.
    pub fn check(&mut self, mut read: &[u8]) {
        while !read.is_empty() {
            let at = self.count;
            let expected = self.next(read.len());
            let (part, rest) = read.split_at(expected.len());
            assert!(part == expected, "stream {}: not what was sent, at byte {at} or later", self.seed);
            read = rest;
        }
    }

    /// Reads the next `count` bytes and compares them.
    pub async fn receive(&mut self, from: &mut (impl AsyncRead + Unpin), count: u64) -> io::Result<()> {
        let end = self.count + count;
        let read = self.receive_to_end(&mut from.take(count)).await?;
        assert!(self.count == end, "stream {}: ended after {read} of {count} bytes", self.seed);
        Ok(())
    }

    /// Reads to the end and compares; how many bytes.
    pub async fn receive_to_end(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<u64> {
        let mut chunk = vec![0; CHUNK];
        let start = self.count;
        loop {
            let read = timeout(LIMIT, from.read(&mut chunk)).await.expect("bytes within the limit")?;
            if read == 0 {
                return Ok(self.count - start);
            }
            self.check(&chunk[..read]);
        }
    }
}

/// Sends one stream and ends it.
pub async fn send_all(to: &mut (impl AsyncWrite + Unpin), seed: u64, count: u64) {
    Bytes::new(seed).send(to, count).await.unwrap();
    to.shutdown().await.unwrap();
}

/// Receives one stream to its end, and nothing else.
pub async fn receive_all(from: &mut (impl AsyncRead + Unpin), seed: u64, count: u64) {
    assert_eq!(Bytes::new(seed).receive_to_end(from).await.unwrap(), count, "bytes of stream {seed}");
}

/// Small messages there and back, each at once.
pub async fn ping_pong(client: &mut TcpStream, backend: &mut TcpStream, random: &mut fastrand::Rng) {
    for _ in 0..random.u8(1..8) {
        let mut message = vec![0; random.usize(1..200)];
        random.fill(&mut message);
        client.write_all(&message).await.unwrap();
        assert!(read(backend, message.len()).await == message);
        backend.write_all(&message).await.unwrap();
        assert!(read(client, message.len()).await == message);
    }
}
