//! Copying: one read into the worker's scratch buffer, one write out of it, and a heap buffer only for what the
//! write left over.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::bandwidth::TenantResources;
use super::buffer::BufferReservation;
use crate::fault::{self, Syscall};

/// Bytes that were read and not written yet. It owns no memory while it is empty.
#[derive(Debug, Default)]
pub(super) struct PendingWrite(Option<Box<UnwrittenBytes>>);

#[derive(Debug)]
struct UnwrittenBytes {
    bytes: Box<[u8]>,
    written: usize,
    #[expect(dead_code, reason = "dropping it gives the part of the buffer memory back")]
    part: BufferReservation,
}

impl PendingWrite {
    /// Keeps these bytes, which count as the tenant's from now on.
    pub(super) fn new(bytes: impl Into<Box<[u8]>>, resources: TenantResources<'_>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Self::default();
        }
        let part = resources.worker.buffers.part(resources.quota, bytes.len());
        Self(Some(Box::new(UnwrittenBytes { bytes, written: 0, part })))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.left().len()
    }

    /// The bytes that are not written yet.
    pub(super) fn left(&self) -> &[u8] {
        self.0.as_ref().and_then(|held| held.bytes.get(held.written..)).unwrap_or_default()
    }

    /// Writes some of it; how much.
    pub(super) fn poll_write(
        &mut self,
        sink: &mut TcpStream,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<u64>> {
        fault::at(Syscall::Send)?;
        let count = ready!(Pin::new(sink).poll_write(context, self.left()))?;
        if let Some(held) = &mut self.0 {
            held.written += count;
        }
        if self.is_empty() {
            *self = Self::default();
        }
        Poll::Ready(Ok(count as u64))
    }

    /// Writes bytes that were just read, and keeps what the sink does not take; how much it took.
    pub(super) fn poll_write_first(
        &mut self,
        read: &[u8],
        sink: &mut TcpStream,
        resources: TenantResources<'_>,
        context: &mut Context<'_>,
    ) -> io::Result<u64> {
        debug_assert!(self.is_empty(), "bytes were read while others were held");
        fault::at(Syscall::Send)?;
        let count = match Pin::new(sink).poll_write(context, read) {
            Poll::Ready(result) => result?,
            Poll::Pending => 0,
        };
        if let Some(left) = read.get(count..).filter(|left| !left.is_empty()) {
            *self = Self::new(left, resources);
        }
        Ok(count as u64)
    }
}

/// Reads once; empty at the source's end. tokio takes a short read for an empty socket, so a small message costs
/// no second read that finds nothing.
pub(super) fn poll_read<'a>(
    source: &mut TcpStream,
    scratch: &'a mut [u8],
    context: &mut Context<'_>,
) -> Poll<io::Result<&'a [u8]>> {
    if fault::is_on() {
        // The kernel is asked only once there is something to read.
        ready!(source.poll_read_ready(context))?;
        fault::at(Syscall::Receive)?;
    }
    let mut buffer = ReadBuf::new(scratch);
    ready!(Pin::new(source).poll_read(context, &mut buffer))?;
    let count = buffer.filled().len();
    Poll::Ready(Ok(scratch.get(..count).unwrap_or_default()))
}
