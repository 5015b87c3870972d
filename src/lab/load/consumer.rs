//! Load: requests one after another, over new connections or in datagrams, each checked for the backend that
//! answered.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::account::latency::LatencyHistogram;
use crate::account::lock;
use crate::clock;
use crate::lab::toward;

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(10);

/// What a load has seen so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConsumerReport {
    /// Requests that were answered by the right pool.
    pub answered: u64,
    /// Requests that got no answer, or one that could not be read.
    pub failed: u64,
    /// Requests that a backend of another pool answered.
    pub misrouted: u64,
    /// What each backend has answered.
    pub backends: BTreeMap<String, AnswerCounts>,
    /// From connect to the end of the answer.
    pub times: LatencyHistogram,
}

/// What one backend has answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AnswerCounts {
    /// How often.
    pub count: u64,
    /// The clients that it saw, as the header tells, at most 16 of them.
    pub clients: BTreeSet<IpAddr>,
}

/// Clients that are remembered for each backend.
const CLIENTS: usize = 16;

/// How it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConsumerRequest {
    /// An HTTP request over a connection of its own.
    Http,
    /// A datagram. Every so often another port asks, and so another flow.
    Datagram,
}

/// One consumer's load.
#[derive(Debug)]
pub(crate) struct ConsumerLoad {
    target: SocketAddr,
    asks: ConsumerRequest,
    /// What the names of the right pool's backends start with.
    expected: String,
    pause: Duration,
    report: Mutex<ConsumerReport>,
}

#[derive(Deserialize)]
struct ConsumerAnswer {
    backend: String,
    client: Option<SocketAddr>,
}

impl ConsumerLoad {
    /// A load on `target`, whose answers should come from backends whose names start with `expected`; `pause` lies
    /// between an answer and the next request.
    #[must_use]
    pub(crate) fn new(target: SocketAddr, asks: ConsumerRequest, expected: &str, pause: Duration) -> Self {
        Self { target, asks, expected: expected.to_owned(), pause, report: Mutex::default() }
    }

    /// What it has seen so far.
    #[must_use]
    pub(crate) fn report(&self) -> ConsumerReport {
        lock(&self.report).clone()
    }

    /// Sends requests until `stop` says so; the one under way then is finished.
    pub(crate) async fn run(&self, stop: watch::Receiver<bool>) {
        let mut flow = None;
        while !*stop.borrow() {
            let start = clock::now();
            let answer = async {
                match self.asks {
                    ConsumerRequest::Http => request(self.target).await,
                    ConsumerRequest::Datagram => ask(self.target, &mut flow).await,
                }
            };
            let answer = timeout(LIMIT, answer).await;
            let took = clock::now().since(start);
            self.note(answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())), took);
            sleep(self.pause).await;
        }
    }

    fn note(&self, answer: io::Result<ConsumerAnswer>, took: Duration) {
        let mut report = lock(&self.report);
        match answer {
            Ok(answer) => {
                if answer.backend.starts_with(&self.expected) {
                    report.answered += 1;
                } else {
                    report.misrouted += 1;
                }
                report.times.record(took);
                let answers = report.backends.entry(answer.backend).or_default();
                answers.count += 1;
                if let Some(client) = answer.client.filter(|_| answers.clients.len() < CLIENTS) {
                    answers.clients.insert(client.ip());
                }
            }
            Err(_) => report.failed += 1,
        }
    }
}

/// One HTTP request over its own connection; returns the backend that answered.
async fn request(target: SocketAddr) -> io::Result<ConsumerAnswer> {
    let mut stream = TcpStream::connect(target).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: lab\r\nconnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    read(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Questions of one port.
const OF_A_FLOW: u32 = 100;

/// One datagram over the flow, or over another where that has asked enough; who answered.
async fn ask(target: SocketAddr, flow: &mut Option<(UdpSocket, u32)>) -> io::Result<ConsumerAnswer> {
    let (socket, left) = if let Some(flow) = flow.take().filter(|(_, left)| *left > 0) {
        flow
    } else {
        let socket = UdpSocket::bind(toward(target)).await?;
        socket.connect(target).await?;
        (socket, OF_A_FLOW)
    };
    socket.send(b"who?").await?;
    let mut answer = [0; 1024];
    let count = socket.recv(&mut answer).await?;
    let answer = serde_json::from_slice(answer.get(..count).unwrap_or_default())?;
    // After an error another flow sends the next request: a late answer is ignored.
    *flow = Some((socket, left - 1));
    Ok(answer)
}

/// The backend that answered: the lab's backends state it in a JSON body.
fn read(answer: &[u8]) -> Option<ConsumerAnswer> {
    let text = std::str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return None;
    }
    serde_json::from_str(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::backend::{BackendBehavior, DatagramBackend, DatagramBehavior, TestBackend};

    #[test]
    fn only_a_whole_answer_counts() {
        let whole = read(b"HTTP/1.1 200 OK\r\n\r\n{\"backend\":\"a\",\"client\":\"10.1.1.1:5\"}\n").unwrap();
        assert_eq!((whole.backend.as_str(), whole.client), ("a", Some("10.1.1.1:5".parse().unwrap())));
        for bad in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 503 No\r\n\r\n{\"backend\":\"a\"}",
            "HTTP/1.1 200 OK\r\n\r\n{",
        ] {
            assert!(read(bad.as_bytes()).is_none(), "{bad}");
        }
        assert!(read(&[0xFF]).is_none());
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        let backend = TestBackend::start("acme-1", BackendBehavior::Http).await.unwrap();
        let right = ConsumerLoad::new(backend.address(), ConsumerRequest::Http, "acme-", Duration::ZERO);
        let wrong = ConsumerLoad::new(backend.address(), ConsumerRequest::Http, "globex-", Duration::ZERO);
        let dead = ConsumerLoad::new(
            TestBackend::refusing().await.unwrap(),
            ConsumerRequest::Http,
            "acme-",
            Duration::ZERO,
        );
        let (stop, stopped) = watch::channel(false);
        let until = async {
            while right.report().answered < 3 || wrong.report().misrouted < 3 || dead.report().failed < 3 {
                tokio::task::yield_now().await;
            }
            stop.send_replace(true);
        };
        tokio::join!(right.run(stopped.clone()), wrong.run(stopped.clone()), dead.run(stopped), until);
        let report = right.report();
        assert_eq!((report.failed, report.misrouted), (0, 0));
        let answers = AnswerCounts { count: report.answered, clients: BTreeSet::new() };
        assert_eq!(report.backends, BTreeMap::from([("acme-1".to_owned(), answers)]));
        assert_eq!(report.times.count(), report.answered);
        assert_eq!((wrong.report().answered, dead.report().answered), (0, 0));
    }

    #[tokio::test]
    async fn datagrams_are_asked_over_flow_after_flow() {
        let backend = DatagramBackend::start("acme-1", DatagramBehavior::Introduction).await.unwrap();
        let load = ConsumerLoad::new(backend.address(), ConsumerRequest::Datagram, "acme-", Duration::ZERO);
        let (stop, stopped) = watch::channel(false);
        let until = async {
            while load.report().answered < u64::from(OF_A_FLOW) * 2 + 1 {
                tokio::task::yield_now().await;
            }
            stop.send_replace(true);
        };
        tokio::join!(load.run(stopped), until);
        let report = load.report();
        assert_eq!((report.failed, report.misrouted, report.answered), (0, 0, backend.heard()));
    }
}
