//! Load: requests one after another, over fresh connections or in datagrams, each checked for who answered.

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

use crate::account::latency::Times;
use crate::account::lock;
use crate::clock;
use crate::lab::toward;

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(10);

/// What a load has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were answered by the right pool.
    pub answered: u64,
    /// Requests that got no answer, or one that could not be read.
    pub failed: u64,
    /// Requests that a backend of another pool answered.
    pub misrouted: u64,
    /// What each backend has answered.
    pub backends: BTreeMap<String, Answers>,
    /// From connect to the end of the answer.
    pub times: Times,
}

/// What one backend has answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// How often.
    pub count: u64,
    /// The clients that it saw, as the header tells, at most 16 of them.
    pub clients: BTreeSet<IpAddr>,
}

/// Clients that are remembered for each backend.
const CLIENTS: usize = 16;

/// How it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// An HTTP request over a connection of its own.
    Http,
    /// A datagram. Every so often another port asks, and so another flow.
    Datagram,
}

/// One consumer's load.
#[derive(Debug)]
pub struct Load {
    target: SocketAddr,
    asks: Asks,
    /// What the names of the right pool's backends start with.
    expected: String,
    pause: Duration,
    report: Mutex<Report>,
}

#[derive(Deserialize)]
struct Answer {
    backend: String,
    client: Option<SocketAddr>,
}

impl Load {
    /// A load on `target`, whose answers should come from backends whose names start with `expected`; `pause` lies
    /// between an answer and the next request.
    #[must_use]
    pub fn new(target: SocketAddr, asks: Asks, expected: &str, pause: Duration) -> Self {
        Self { target, asks, expected: expected.to_owned(), pause, report: Mutex::default() }
    }

    /// What it has seen so far.
    #[must_use]
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// Sends requests until `stop` says so; the one under way then is finished.
    pub async fn run(&self, stop: watch::Receiver<bool>) {
        let mut flow = None;
        while !*stop.borrow() {
            let start = clock::now();
            let answer = async {
                match self.asks {
                    Asks::Http => request(self.target).await,
                    Asks::Datagram => ask(self.target, &mut flow).await,
                }
            };
            let answer = timeout(LIMIT, answer).await;
            let took = clock::now().since(start);
            self.note(answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())), took);
            sleep(self.pause).await;
        }
    }

    fn note(&self, answer: io::Result<Answer>, took: Duration) {
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

/// One HTTP request over a connection of its own; who answered.
async fn request(target: SocketAddr) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(target).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: lab\r\nconnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    read(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Questions of one port.
const OF_A_FLOW: u32 = 100;

/// One datagram over the flow, or over another where that has asked enough; who answered.
async fn ask(target: SocketAddr, flow: &mut Option<(UdpSocket, u32)>) -> io::Result<Answer> {
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
    // After an error another flow asks: what comes late is nobody's answer.
    *flow = Some((socket, left - 1));
    Ok(answer)
}

/// Who answered: the lab's backends say so in a JSON body.
fn read(answer: &[u8]) -> Option<Answer> {
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
    use crate::lab::backend::{Backend, Datagrams, Manner, Temper};

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
        let backend = Backend::start("acme-1", Temper::Http).await.unwrap();
        let right = Load::new(backend.address(), Asks::Http, "acme-", Duration::ZERO);
        let wrong = Load::new(backend.address(), Asks::Http, "globex-", Duration::ZERO);
        let dead = Load::new(Backend::refusing().await.unwrap(), Asks::Http, "acme-", Duration::ZERO);
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
        let answers = Answers { count: report.answered, clients: BTreeSet::new() };
        assert_eq!(report.backends, BTreeMap::from([("acme-1".to_owned(), answers)]));
        assert_eq!(report.times.count(), report.answered);
        assert_eq!((wrong.report().answered, dead.report().answered), (0, 0));
    }

    #[tokio::test]
    async fn datagrams_are_asked_over_flow_after_flow() {
        let backend = Datagrams::start("acme-1", Manner::Introduction).await.unwrap();
        let load = Load::new(backend.address(), Asks::Datagram, "acme-", Duration::ZERO);
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
