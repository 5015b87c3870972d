//! What the load generator and its backends say to each other.
//!
//! A session starts with a request of 16 bytes; the first 16 bytes that come back are the backend's tag, so that
//! the client knows which backend answered. An echo's tag stands in the place of the request.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The bytes of a request, and of a tag.
pub const HEAD: usize = 16;

/// What a session asks of its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadRequest {
    /// Everything back.
    Echo,
    /// Bytes without end.
    Source,
    /// Take bytes without end.
    Sink,
}

/// A backend's name, cut or padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionTag([u8; HEAD]);

impl LoadRequest {
    /// The request as it is sent.
    #[must_use]
    pub const fn head(self) -> [u8; HEAD] {
        match self {
            Self::Echo => *b"vestibule/echo  ",
            Self::Source => *b"vestibule/source",
            Self::Sink => *b"vestibule/sink  ",
        }
    }

    fn read(head: [u8; HEAD]) -> Option<Self> {
        [Self::Echo, Self::Source, Self::Sink].into_iter().find(|request| request.head() == head)
    }
}

impl SessionTag {
    /// The tag of a name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut tag = [0; HEAD];
        for (to, from) in tag.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self(tag)
    }

    /// The tag as it is sent.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; HEAD] {
        &self.0
    }
}

/// What a session is read into at first: room for a small message, and nothing to speak of to clear.
const SMALL: usize = 4 * 1024;

/// What it is read into, or sent from, once there is more.
const LARGE: usize = 256 * 1024;

/// Serves one session.
pub(super) async fn serve(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let mut buffer = vec![0; SMALL];
    // The rest of the first message comes with its head, mostly.
    let mut count = 0;
    while count < HEAD {
        match stream.read(buffer.get_mut(count..).unwrap_or_default()).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => count += read,
        }
    }
    let Some(head) = buffer.first_chunk_mut() else { return Ok(()) };
    let request = LoadRequest::read(*head).ok_or(io::ErrorKind::InvalidData)?;
    *head = *SessionTag::new(name).as_bytes();
    if request == LoadRequest::Echo {
        return echo(&mut stream, buffer, count).await;
    }
    stream.write_all(head).await?;
    buffer.resize(LARGE, 0);
    if request == LoadRequest::Sink {
        while stream.read(&mut buffer).await? > 0 {}
        return Ok(());
    }
    loop {
        stream.write_all(&buffer).await?;
    }
}

/// Sends back the `count` bytes that the buffer holds, and what comes after them.
async fn echo(stream: &mut TcpStream, mut buffer: Vec<u8>, mut count: usize) -> io::Result<()> {
    while count > 0 {
        stream.write_all(buffer.get(..count).unwrap_or_default()).await?;
        if count == buffer.len() {
            buffer.resize(LARGE, 0);
        }
        count = stream.read(&mut buffer).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_distinguished() {
        for request in [LoadRequest::Echo, LoadRequest::Source, LoadRequest::Sink] {
            assert_eq!(LoadRequest::read(request.head()), Some(request));
        }
        assert_eq!(LoadRequest::read([0; HEAD]), None);
    }

    #[test]
    fn long_name_is_cut_and_short_name_is_padded() {
        assert_eq!(SessionTag::new("acme").as_bytes(), b"acme\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(SessionTag::new("a-name-of-twenty-one").as_bytes(), b"a-name-of-twenty");
    }
}
