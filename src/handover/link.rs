//! The link between an old process and its successor: messages with descriptors over a unix socket.
//!
//! A frame is the length of its head and of its tail, four bytes each in big-endian order, then the head as JSON and the
//! tail as it is. Its descriptors travel with the first byte (`SCM_RIGHTS`, unix(7)), so a frame begins where they arrive.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::message::LinkMessage;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Descriptors of one frame: the kernel takes 253 (`SCM_MAX_FD` in include/net/scm.h).
pub const MOST_FDS: usize = 64;

/// The bytes of a head.
const MOST_HEAD: usize = 1 << 20;

/// The most bytes of a tail: a session has two pending writes, and its pipes.
pub const MOST_TAIL: usize = 4 << 20;

/// Two lengths.
const PREFIX: usize = 8;

/// One received frame.
#[derive(Debug)]
pub struct LinkFrame {
    /// What is said.
    pub message: LinkMessage,
    /// The record of a transfer, or other bytes of the message.
    pub tail: Vec<u8>,
    /// In the message's order.
    pub fds: Vec<OwnedFd>,
}

/// One end of the link. Calls block; several threads may write, one reads.
#[derive(Debug)]
pub struct HandoverLink {
    stream: UnixStream,
    /// Held while a frame is written: what the socket does not take at once must not be parted by another's.
    writing: Mutex<()>,
}

impl HandoverLink {
    /// Takes over a connected socket; each wait for the other side takes `timeout` at most.
    ///
    /// # Errors
    /// Where the system does not let it block.
    pub fn new(stream: UnixStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self { stream, writing: Mutex::default() })
    }

    /// From now on a read waits for the other side this long, or until it says something or goes.
    ///
    /// # Errors
    /// Where the time is zero.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Nothing is heard any more that is said from now on; what was said before is still read.
    pub fn stop_receiving(&self) {
        // It fails only if the other side has closed the connection, which then sends nothing either.
        self.stream.shutdown(Shutdown::Read).unwrap_or_default();
    }

    /// Ends it for both sides: after a frame that was not sent whole, the next would be taken for the rest of it. What was said
    /// before is still read.
    pub fn shut_down(&self) {
        // It fails only if the other side has closed the connection.
        self.stream.shutdown(Shutdown::Both).unwrap_or_default();
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Where the other side has gone, or does not hear in time.
    pub fn send(&self, message: &LinkMessage, tail: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let head = serde_json::to_vec(message)?;
        if head.len() > MOST_HEAD || tail.len() > MOST_TAIL || fds.len() > MOST_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "message too long"));
        }
        let mut frame = Vec::with_capacity(PREFIX + head.len() + tail.len());
        for len in [head.len(), tail.len()] {
            frame.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
        frame.extend_from_slice(&head);
        frame.extend_from_slice(tail);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
        }
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = loop {
            match sendmsg(&self.stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                sent => break sent?,
            }
        };
        // The descriptors went with the first byte.
        (&self.stream).write_all(frame.get(sent..).unwrap_or_default()).inspect_err(|_| self.shut_down())
    }

    /// Receives the next frame; `None` once the other side has closed.
    ///
    /// # Errors
    /// Where it says nothing in time, or something that is no message.
    pub fn receive(&self) -> io::Result<Option<LinkFrame>> {
        let mut prefix = [0; PREFIX];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let came = loop {
            let mut room = [IoSliceMut::new(&mut prefix)];
            match recvmsg(&self.stream, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                came => break came?.bytes,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if came == 0 {
            return Ok(None);
        }
        (&self.stream).read_exact(prefix.get_mut(came..).unwrap_or_default())?;
        let both = u64::from_be_bytes(prefix);
        let head = self.read(both >> 32, MOST_HEAD)?;
        let tail = self.read(both & u64::from(u32::MAX), MOST_TAIL)?;
        Ok(Some(LinkFrame { message: serde_json::from_slice(&head)?, tail, fds }))
    }

    fn read(&self, len: u64, most: usize) -> io::Result<Vec<u8>> {
        let beyond = || io::Error::new(io::ErrorKind::InvalidData, "message too long");
        let len = usize::try_from(len).ok().filter(|len| *len <= most).ok_or_else(beyond)?;
        let mut bytes = vec![0; len];
        (&self.stream).read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl AsFd for HandoverLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const READ_TIMEOUT: Duration = Duration::from_secs(10);

    fn pair() -> (HandoverLink, HandoverLink) {
        let (one, other) = UnixStream::pair().unwrap();
        (HandoverLink::new(one, READ_TIMEOUT).unwrap(), HandoverLink::new(other, READ_TIMEOUT).unwrap())
    }

    /// A file that says which one it is.
    fn marked(mark: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[mark], 0).unwrap();
        file
    }

    fn mark(fd: OwnedFd) -> u8 {
        let mut byte = [0];
        File::from(fd).read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    }

    #[test]
    fn frames_arrive_whole_with_their_own_descriptors() {
        let (one, other) = pair();
        std::thread::scope(|scope| {
            for sender in 0..4_u8 {
                let one = &one;
                scope.spawn(move || {
                    for round in 0..50_u8 {
                        let files: Vec<_> = (0..round % 7).map(|_| marked(sender)).collect();
                        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                        let tail = vec![sender; usize::from(round) * 3_000];
                        let id = u32::from(sender) << 8 | u32::from(round);
                        one.send(&LinkMessage::Parcel { id }, &tail, &fds).unwrap();
                    }
                });
            }
            let mut next = [0; 4];
            for _ in 0..200 {
                let frame = other.receive().unwrap().unwrap();
                let LinkMessage::Parcel { id } = frame.message else { panic!("{:?}", frame.message) };
                let (sender, id) = (u8::try_from(id >> 8).unwrap(), id & 0xff);
                assert_eq!(std::mem::replace(&mut next[usize::from(sender)], id + 1), id);
                assert_eq!(frame.tail.len(), id as usize * 3_000);
                assert!(frame.tail.iter().all(|byte| *byte == sender));
                assert_eq!(frame.fds.len(), id as usize % 7);
                assert!(frame.fds.into_iter().all(|fd| mark(fd) == sender));
            }
        });
    }

    #[test]
    fn as_many_descriptors_as_may_go_and_none_more() {
        let (one, other) = pair();
        let file = marked(7);
        let fds = [file.as_fd(); MOST_FDS];
        one.send(&LinkMessage::Ready, &[], &fds).unwrap();
        let frame = other.receive().unwrap().unwrap();
        assert_eq!((frame.message, frame.fds.len()), (LinkMessage::Ready, MOST_FDS));
        assert!(one.send(&LinkMessage::Ready, &[], &[file.as_fd(); MOST_FDS + 1]).is_err());
        assert!(one.send(&LinkMessage::Ready, &vec![0; MOST_TAIL + 1], &[]).is_err());
    }

    #[test]
    fn messages_before_the_end_are_received_and_none_after_it() {
        let (one, other) = pair();
        one.send(&LinkMessage::Taken { id: 1 }, &[], &[]).unwrap();
        other.stop_receiving();
        assert!(one.send(&LinkMessage::Taken { id: 2 }, &[], &[]).is_err(), "the other side is told");
        assert_eq!(other.receive().unwrap().unwrap().message, LinkMessage::Taken { id: 1 });
        assert!(other.receive().unwrap().is_none());
    }

    #[test]
    fn malformed_message_is_an_error() {
        for bytes in [&[0xff; 8][..], &[0, 0, 0, 2, 0, 0, 0, 0, b'{', b'}'], &[0, 0, 0, 9, 0]] {
            let (one, other) = UnixStream::pair().unwrap();
            (&one).write_all(bytes).unwrap();
            drop(one);
            assert!(HandoverLink::new(other, READ_TIMEOUT).unwrap().receive().is_err(), "{bytes:?}");
        }
    }
}
