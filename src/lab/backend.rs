//! Backends of many tempers.

mod datagram;
pub mod load;

pub use self::datagram::{DatagramBackend, DatagramBehavior};

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use axum::http::{Request, Response, header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{SockFilter, SockRef};
use tokio::io::{AsyncReadExt, AsyncWriteExt, join};
use tokio::net::{TcpListener, TcpStream};

use super::{ANYWHERE, Tasks, accept, listen, reap};
use crate::addr::ClientAddr;
use crate::header::read_optional;
use crate::id::EndpointClaim;

/// How a backend behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendBehavior {
    /// Answers every HTTP/1.1 request with its name and, after a PROXY header, the client.
    Http,
    /// Sends back what it gets, and ends when its peer has.
    Echo,
    /// Says its name and a line's end at once, then echoes.
    Greeting,
    /// Sends so many bytes of [`pattern`], then ends.
    Source(u64),
    /// Reads to the end, then answers with the count and the CRC32C of what it got, and ends.
    Sink,
    /// Accepts, and neither reads nor writes.
    BlackHole,
    /// Resets at once.
    Reset,
    /// Resets once it has read so many bytes.
    ResetAfter(u64),
    /// Says "bye" and a line's end, ends its side at once, and reads on.
    HalfClosing,
    /// Reads, and says nothing.
    Mute,
    /// Does what the load generator asks of it: see [`load`].
    Load,
}

/// A backend on loopback.
#[derive(Debug)]
pub struct TestBackend {
    name: Arc<str>,
    address: SocketAddr,
    socket: Arc<TcpListener>,
    counts: Arc<BackendCounts>,
    /// Held for their end.
    _tasks: Tasks,
}

#[derive(Debug, Default)]
struct BackendCounts {
    sessions: AtomicU64,
    open: AtomicU64,
    received: AtomicU64,
}

impl TestBackend {
    /// Starts a backend.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn start(name: &str, temper: BackendBehavior) -> io::Result<Self> {
        Self::start_at(ANYWHERE, name, temper).await
    }

    /// Starts a backend at an address.
    ///
    /// # Errors
    /// Where the address cannot be bound.
    pub async fn start_at(address: SocketAddr, name: &str, temper: BackendBehavior) -> io::Result<Self> {
        let (socket, address) = listen(address).await?;
        let socket = Arc::new(socket);
        let name: Arc<str> = name.into();
        let counts = Arc::new(BackendCounts::default());
        let mut tasks = Tasks::new();
        let (own_name, own_counts) = (Arc::clone(&name), Arc::clone(&counts));
        let listen_socket = Arc::clone(&socket);
        tasks.spawn(async move {
            let mut sessions = Tasks::new();
            loop {
                let stream = accept(&listen_socket).await;
                reap(&mut sessions);
                own_counts.sessions.fetch_add(1, Ordering::Relaxed);
                own_counts.open.fetch_add(1, Ordering::Relaxed);
                let (name, counts) = (Arc::clone(&own_name), OpenConnection(Arc::clone(&own_counts)));
                sessions.spawn(async move {
                    // A connection error is caused by the peer, not by this backend.
                    behave(stream, temper, &name, &counts.0).await.unwrap_or_default();
                });
            }
        });
        Ok(Self { name, address, socket, counts, _tasks: tasks })
    }

    /// An address where nothing listens.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn refusing() -> io::Result<SocketAddr> {
        Ok(listen(ANYWHERE).await?.1)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bound address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it hears new connections. One that does not drops their first segment, as a host that is gone would; those
    /// that stand go on. So a backend can end without a session that it has taken and never served.
    ///
    /// # Errors
    /// Where the kernel takes no filter.
    pub fn hear(&self, hears: bool) -> io::Result<()> {
        let socket = SockRef::from(&*self.socket);
        if hears { socket.detach_filter() } else { socket.attach_filter(&NO_SYN) }
    }

    /// Connections so far.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.counts.sessions.load(Ordering::Relaxed)
    }

    /// Connections now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.counts.open.load(Ordering::Relaxed)
    }

    /// Bytes that a sink, a mute, a resetting or a half-closing one has read.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.counts.received.load(Ordering::Relaxed)
    }
}

/// Drops segments with SYN: the flags are byte 13 of the TCP header, where a socket's filter begins (`tcp_filter` in
/// net/ipv4/`tcp_ipv4.c`).
const NO_SYN: [SockFilter; 4] = [
    SockFilter::new(0x30, 0, 0, 13),
    SockFilter::new(0x45, 0, 1, 0x02),
    SockFilter::new(0x06, 0, 0, 0),
    SockFilter::new(0x06, 0, 0, u32::MAX),
];

/// Counts a connection as open as long as it lives.
struct OpenConnection(Arc<BackendCounts>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn behave(
    mut stream: TcpStream,
    temper: BackendBehavior,
    name: &str,
    counts: &BackendCounts,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match temper {
        BackendBehavior::Http => http(stream, name).await,
        BackendBehavior::Echo => echo(stream).await,
        BackendBehavior::Greeting => {
            stream.write_all(format!("{name}\n").as_bytes()).await?;
            echo(stream).await
        }
        BackendBehavior::Source(bytes) => source(stream, bytes).await,
        BackendBehavior::Sink => {
            let (count, crc) = drain(&mut stream, u64::MAX, counts).await?;
            stream.write_all(format!("{count} {crc:08x}\n").as_bytes()).await
        }
        BackendBehavior::BlackHole => std::future::pending().await,
        BackendBehavior::Reset => stream.set_zero_linger(),
        BackendBehavior::ResetAfter(bytes) => {
            drain(&mut stream, bytes, counts).await?;
            stream.set_zero_linger()
        }
        BackendBehavior::HalfClosing => {
            stream.write_all(b"bye\n").await?;
            stream.shutdown().await?;
            drain(&mut stream, u64::MAX, counts).await.map(|_| ())
        }
        BackendBehavior::Mute => drain(&mut stream, u64::MAX, counts).await.map(|_| ()),
        BackendBehavior::Load => load::serve(stream, name).await,
    }
}

async fn http(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let first = read_optional(&mut stream).await?;
    let answer = service_fn(async |_: Request<_>| {
        let body = introduction(name, first.client, first.endpoint);
        let mut response = Response::new(Body::from(body));
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        Ok::<_, Infallible>(response)
    });
    let (read, write) = stream.split();
    let stream = TokioIo::new(join(first.rest.as_slice().chain(read), write));
    http1::Builder::new().serve_connection(stream, answer).await.map_err(io::Error::other)
}

/// The backend's name and the client, as a line of JSON.
fn introduction(name: &str, client: Option<ClientAddr>, endpoint: EndpointClaim) -> String {
    let json = serde_json::json!({
        "backend": name,
        "client": client.map(|client| client.to_string()),
        "endpoint": endpoint.id().map(|endpoint| endpoint.to_string()),
    });
    format!("{json}\n")
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

async fn source(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    let mut sent = 0;
    while sent < bytes {
        let count = usize::try_from(bytes - sent).unwrap_or(usize::MAX).min(chunk.len());
        let part = chunk.get_mut(..count).unwrap_or_default();
        pattern(sent, part);
        stream.write_all(part).await?;
        sent += count as u64;
    }
    stream.shutdown().await
}

/// Reads up to `limit` bytes or the end; how many, and their CRC32C.
async fn drain(stream: &mut TcpStream, limit: u64, counts: &BackendCounts) -> io::Result<(u64, u32)> {
    let mut chunk = vec![0; 64 * 1024];
    let (mut count, mut crc) = (0, 0);
    while count < limit {
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        crc = crc32c::crc32c_append(crc, chunk.get(..read).unwrap_or_default());
        count += read as u64;
        counts.received.fetch_add(read as u64, Ordering::Relaxed);
    }
    Ok((count, crc))
}

/// Fills `bytes` with a pattern that depends on the offset alone: a byte that is lost, doubled or out of place
/// shows, and two streams that are crossed differ.
pub fn pattern(offset: u64, bytes: &mut [u8]) {
    for (at, byte) in (offset..).zip(bytes) {
        // The high bits of a multiplicative hash of the position (Knuth, volume 3, section 6.4).
        *byte = (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56).to_le_bytes()[0];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(backend: &TestBackend, question: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(backend.address()).await?;
        stream.write_all(question).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn each_behavior_answers_as_declared() {
        let start = |temper| TestBackend::start("one", temper);
        let echo = start(BackendBehavior::Echo).await.unwrap();
        assert_eq!(ask(&echo, b"hello").await.unwrap(), b"hello");
        assert_eq!((echo.sessions(), echo.name()), (1, "one"));
        let greeting = start(BackendBehavior::Greeting).await.unwrap();
        assert_eq!(ask(&greeting, b"hello").await.unwrap(), b"one\nhello");
        let source = start(BackendBehavior::Source(100_000)).await.unwrap();
        let mut expected = vec![0; 100_000];
        pattern(0, &mut expected);
        assert!(ask(&source, b"").await.unwrap() == expected);
        let sink = start(BackendBehavior::Sink).await.unwrap();
        let answer = format!("5 {:08x}\n", crc32c::crc32c(b"hello"));
        assert_eq!(ask(&sink, b"hello").await.unwrap(), answer.as_bytes());
        let bye = start(BackendBehavior::HalfClosing).await.unwrap();
        assert_eq!(ask(&bye, b"hello").await.unwrap(), b"bye\n");
        let reset = start(BackendBehavior::ResetAfter(5)).await.unwrap();
        assert_eq!(ask(&reset, b"hello").await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let refusing = TestBackend::refusing().await.unwrap();
        let refused = TcpStream::connect(refusing).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn http_request_has_a_user_agent() {
        let backend = TestBackend::start("acme-1", BackendBehavior::Http).await.unwrap();
        let answer = ask(&backend, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains(r#""backend":"acme-1""#), "{answer}");
    }

    #[test]
    fn pattern_depends_on_the_offset() {
        let mut whole = [0; 64];
        pattern(100, &mut whole);
        let mut part = [0; 10];
        pattern(120, &mut part);
        assert_eq!(whole[20..30], part);
    }
}
