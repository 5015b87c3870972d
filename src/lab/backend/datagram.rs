//! A backend for datagrams: each goes back to where it came from, under the backend's name where the load generator asks.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::load::{HEAD, Request, Tag};
use crate::lab::datagram::{Port, Room};
use crate::lab::{ANYWHERE, Tasks};

/// A backend that echoes datagrams. One that begins with [`Request::Echo`] comes back with its [`Tag`] there.
#[derive(Debug)]
pub struct Datagrams {
    name: Arc<str>,
    address: SocketAddr,
    count: Arc<AtomicU64>,
    /// Held for their end.
    _tasks: Tasks,
}

impl Datagrams {
    /// Starts one at a port of loopback that the system chooses.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn start(name: &str) -> io::Result<Self> {
        Self::start_at(ANYWHERE, name).await
    }

    /// Starts one at an address.
    ///
    /// # Errors
    /// Where the address cannot be bound.
    pub async fn start_at(address: SocketAddr, name: &str) -> io::Result<Self> {
        let port = Port::bind(address).await?;
        let address = port.local_addr()?;
        let (tag, count) = (Tag::new(name), Arc::new(AtomicU64::new(0)));
        let mut tasks = Tasks::new();
        let own_count = Arc::clone(&count);
        tasks.spawn(async move {
            let mut room = Room::default();
            while port.readable().await.is_ok() {
                // An answer to somebody who has gone comes back as an error, and says nothing of this socket.
                port.receive(&mut room, |from, bytes, each| {
                    own_count.fetch_add(answer(&port, tag, from, bytes, each), Ordering::Relaxed);
                })
                .unwrap_or_default();
            }
        });
        Ok(Self { name: name.into(), address, count, _tasks: tasks })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
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
fn answer(port: &Port, tag: Tag, from: SocketAddr, bytes: &mut [u8], each: usize) -> u64 {
    let mut count = 0;
    for datagram in bytes.chunks_mut(each) {
        count += 1;
        if let Some(head) = datagram.first_chunk_mut::<HEAD>().filter(|head| **head == Request::Echo.head()) {
            *head = *tag.as_bytes();
        }
    }
    // What is not taken is lost, as datagrams are.
    port.send(from, bytes, each).map(|_| ()).unwrap_or_default();
    count.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_sends_back_each_datagram_under_its_name_where_that_is_asked() {
        let backend = Datagrams::start("acme").await.unwrap();
        let port = Port::connect(backend.address()).await.unwrap();
        let question = [&Request::Echo.head()[..], b"one"].concat();
        let tagged = [&Tag::new("acme").as_bytes()[..], b"one"].concat();
        let mut room = Room::default();
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
                assert!(received.is_ok_and(|()| true) || got.len() < expected.len());
            }
            assert_eq!(got, expected);
        }
        assert_eq!((backend.heard(), backend.name()), (6, "acme"));
    }
}
