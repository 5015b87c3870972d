//! Backends for datagrams: one that sends each back, under its own name where the load generator asks, and one that says
//! who it is and who asks.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::introduction;
use super::load::{HEAD, LoadRequest, SessionTag};
use crate::id::EndpointClaim;
use crate::lab::datagram::{DatagramPort, ReceiveBuffer};
use crate::lab::{ANYWHERE, Tasks};
use crate::proxy_protocol::{self, ParsedHeader, ParserRules, Transport};

/// How a backend answers a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramBehavior {
    /// Sends it back; one that begins with [`LoadRequest::Echo`] with the backend's [`SessionTag`] there.
    Echo,
    /// Answers with its name and, after a PROXY header, the client as JSON, like
    /// [`Http`](super::BackendBehavior::Http).
    Introduction,
}

/// A backend for datagrams.
#[derive(Debug)]
pub struct DatagramBackend {
    name: Arc<str>,
    address: SocketAddr,
    count: Arc<AtomicU64>,
    /// Held for their end.
    _tasks: Tasks,
}

impl DatagramBackend {
    /// Starts one at a port of loopback that the system chooses.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn start(name: &str, manner: DatagramBehavior) -> io::Result<Self> {
        Self::start_at(ANYWHERE, name, manner).await
    }

    /// Starts one at an address.
    ///
    /// # Errors
    /// Where the address cannot be bound.
    pub async fn start_at(address: SocketAddr, name: &str, manner: DatagramBehavior) -> io::Result<Self> {
        let port = DatagramPort::bind(address).await?;
        let address = port.local_addr()?;
        let name: Arc<str> = name.into();
        let count = Arc::new(AtomicU64::new(0));
        let mut tasks = Tasks::new();
        let (own_name, own_count) = (Arc::clone(&name), Arc::clone(&count));
        tasks.spawn(async move {
            let mut room = ReceiveBuffer::default();
            while port.readable().await.is_ok() {
                // An answer to a closed socket comes back as an ICMP error, and says nothing about this socket.
                port.receive(&mut room, |from, bytes, each| {
                    let count = match manner {
                        DatagramBehavior::Echo => echo(&port, SessionTag::new(&own_name), from, bytes, each),
                        DatagramBehavior::Introduction => introduce(&port, &own_name, from, bytes, each),
                    };
                    own_count.fetch_add(count, Ordering::Relaxed);
                })
                .unwrap_or_default();
            }
        });
        Ok(Self { name, address, count, _tasks: tasks })
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

    /// Datagrams that it has heard.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Sends back a run of datagrams; how many they were.
fn echo(port: &DatagramPort, tag: SessionTag, from: SocketAddr, bytes: &mut [u8], each: usize) -> u64 {
    let mut count = 0;
    for datagram in bytes.chunks_mut(each) {
        count += 1;
        if let Some(head) =
            datagram.first_chunk_mut::<HEAD>().filter(|head| **head == LoadRequest::Echo.head())
        {
            *head = *tag.as_bytes();
        }
    }
    // A datagram that the kernel does not accept is lost.
    port.send(from, bytes, each).map(|_| ()).unwrap_or_default();
    count.max(1)
}

/// Answers each of a run of datagrams; how many they were.
fn introduce(port: &DatagramPort, name: &str, from: SocketAddr, bytes: &[u8], each: usize) -> u64 {
    let rules = ParserRules { transport: Transport::Datagram, verify_crc: true };
    // One of no bytes is one.
    let count = bytes.len().div_ceil(each).max(1);
    for place in 0..count {
        let rest = bytes.get(place * each..).unwrap_or_default();
        let answer = match proxy_protocol::parse(rest.get(..each).unwrap_or(rest), rules) {
            ParsedHeader::Done(header, _) => {
                introduction(name, header.client(), EndpointClaim::from_tlv(header.endpoint()))
            }
            ParsedHeader::Partial(_) | ParsedHeader::Malformed(_) => {
                introduction(name, None, EndpointClaim::Absent)
            }
        };
        port.send(from, answer.as_bytes(), answer.len()).map(|_| ()).unwrap_or_default();
    }
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something, or nothing yet.
    fn is_taken(received: &io::Result<()>) -> bool {
        received.as_ref().map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |()| true)
    }

    #[tokio::test]
    async fn echo_backend_returns_each_datagram_with_its_name() {
        let backend = DatagramBackend::start("acme", DatagramBehavior::Echo).await.unwrap();
        let port = DatagramPort::connect(backend.address()).await.unwrap();
        let question = [&LoadRequest::Echo.head()[..], b"one"].concat();
        let tagged = [&SessionTag::new("acme").as_bytes()[..], b"one"].concat();
        let mut room = ReceiveBuffer::default();
        for (sent, each, expected) in [
            (b"plain".to_vec(), 5, vec![b"plain".to_vec()]),
            (Vec::new(), 1, vec![Vec::new()]),
            (question.clone(), question.len(), vec![tagged.clone()]),
            (
                [&question[..], &question, b"end"].concat(),
                question.len(),
                vec![tagged.clone(), tagged, b"end".to_vec()],
            ),
        ] {
            assert_eq!(port.send(backend.address(), &sent, each).unwrap(), sent.len());
            let mut got = Vec::new();
            while got.len() < expected.len() {
                port.readable().await.unwrap();
                let received = port.receive(&mut room, |_, bytes, each| {
                    got.extend(bytes.chunks(each).map(<[u8]>::to_vec));
                    if bytes.is_empty() {
                        got.push(Vec::new());
                    }
                });
                assert!(is_taken(&received), "{received:?}");
            }
            assert_eq!(got, expected);
        }
        assert_eq!((backend.heard(), backend.name()), (6, "acme"));
    }

    #[tokio::test]
    async fn http_answer_names_backend_and_client() {
        let backend = DatagramBackend::start("acme-1", DatagramBehavior::Introduction).await.unwrap();
        let port = DatagramPort::connect(backend.address()).await.unwrap();
        let (client, endpoint) = ("10.100.0.10:40000".parse().unwrap(), "vpce-08d2bf15fac5001c9");
        let header = crate::lab::nlb::datagram_header(client, backend.address(), Some(endpoint));
        let mut room = ReceiveBuffer::default();
        for (question, expected) in [
            (&b"who?"[..], serde_json::json!({ "backend": "acme-1", "client": null, "endpoint": null })),
            (b"", serde_json::json!({ "backend": "acme-1", "client": null, "endpoint": null })),
            (
                &[&header[..], b"who?"].concat(),
                serde_json::json!({ "backend": "acme-1", "client": "10.100.0.10:40000", "endpoint": endpoint }),
            ),
        ] {
            port.send(backend.address(), question, question.len()).unwrap();
            let mut answer = None;
            while answer.is_none() {
                port.readable().await.unwrap();
                let received =
                    port.receive(&mut room, |_, bytes, _| answer = serde_json::from_slice(bytes).ok());
                assert!(is_taken(&received), "{received:?}");
            }
            assert_eq!(answer, Some(expected));
        }
    }
}
