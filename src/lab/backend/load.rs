//! What the load generator and its backends say to each other.
//!
//! A session starts with a request of 16 bytes; the first 16 bytes that come back are the backend's tag, so that
//! whoever asked knows who answered. An echo's tag stands in the place of the request.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The bytes of a request, and of a tag.
pub const HEAD: usize = 16;

/// What a session asks of its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Everything back.
    Echo,
    /// Bytes without end.
    Source,
    /// Take bytes without end.
    Sink,
}

/// A backend's name, cut or padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag([u8; HEAD]);

impl Request {
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

impl Tag {
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

/// Serves one session.
pub(super) async fn serve(mut stream: TcpStream, name: &str, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.resize(64 * 1024, 0);
    let mut head = [0; HEAD];
    stream.read_exact(&mut head).await?;
    let tag = Tag::new(name);
    match Request::read(head) {
        None => Err(io::ErrorKind::InvalidData.into()),
        Some(Request::Echo) => echo(&mut stream, tag, buffer).await,
        Some(Request::Source) => {
            stream.write_all(tag.as_bytes()).await?;
            loop {
                stream.write_all(buffer).await?;
            }
        }
        Some(Request::Sink) => {
            stream.write_all(tag.as_bytes()).await?;
            while stream.read(buffer).await? > 0 {}
            Ok(())
        }
    }
}

async fn echo(stream: &mut TcpStream, tag: Tag, buffer: &mut [u8]) -> io::Result<()> {
    // The rest of the first message came with its head, and goes back in one segment with the tag.
    let (start, rest) = buffer.split_at_mut(HEAD);
    start.copy_from_slice(tag.as_bytes());
    let mut count = HEAD + stream.read(rest).await?;
    if count == HEAD {
        return Ok(());
    }
    while count > 0 {
        stream.write_all(buffer.get(..count).unwrap_or_default()).await?;
        count = stream.read(buffer).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        for request in [Request::Echo, Request::Source, Request::Sink] {
            assert_eq!(Request::read(request.head()), Some(request));
        }
        assert_eq!(Request::read([0; HEAD]), None);
    }

    #[test]
    fn a_long_name_is_cut_and_a_short_one_padded() {
        assert_eq!(Tag::new("acme").as_bytes(), b"acme\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(Tag::new("a-name-of-twenty-one").as_bytes(), b"a-name-of-twenty");
    }
}
