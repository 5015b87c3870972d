//! The memory of bytes that were read and that the other side has not taken: one bound for the process, and a share of it
//! for each tenant.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::admission::quota::Quota;
use crate::session_context::SCRATCH;
use crate::socket_options;

/// The first read of a direction brings no more, and so does the first after a short one: what the other side takes is not
/// known yet, and what it does not take has to be kept. A message of 16 KiB does not fill it: after a short read the socket
/// is known to be empty, and is not read in vain.
pub(super) const FIRST: usize = 20 * 1024;

/// The least that is read where the other side has little room, or the memory is short.
pub(super) const LEAST: usize = 4 * 1024;

/// Bounds the memory of all bytes that wait for slow readers.
#[derive(Debug)]
pub struct BufferBudget {
    limit: u64,
    used: AtomicU64,
}

/// A reserved part of it, released on drop.
#[derive(Debug)]
pub(super) struct BufferReservation {
    buffers: Arc<BufferBudget>,
    tenant: Arc<Quota>,
    /// Rounded up.
    kib: u32,
}

impl BufferBudget {
    /// No bytes wait yet, and `limit` bytes may.
    #[must_use]
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0) })
    }

    /// The bytes in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bytes that may be in use.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether a session of the tenant reads in small parts, and only while the other side takes bytes: a whole read more, and
    /// the tenant would hold more than what is free (Choudhury and Hahne, "Dynamic queue length thresholds", 1998, with alpha
    /// 1): half of all where it is alone, a third each where two are slow.
    pub(super) fn is_short(&self, tenant: &Quota) -> bool {
        let free = self.limit.saturating_sub(self.used());
        u64::from(tenant.buffered.load(Ordering::Relaxed)) * Quota::KIB + SCRATCH as u64 > free
    }

    /// Bytes that were read already take their part, whether there is room for them or not.
    pub(super) fn part(self: &Arc<Self>, tenant: &Arc<Quota>, bytes: usize) -> BufferReservation {
        let kib = u32::try_from((bytes as u64).div_ceil(Quota::KIB)).unwrap_or(u32::MAX);
        self.used.fetch_add(u64::from(kib) * Quota::KIB, Ordering::Relaxed);
        tenant.buffered.fetch_add(kib, Ordering::Relaxed);
        BufferReservation { buffers: Arc::clone(self), tenant: Arc::clone(tenant), kib }
    }
}

impl Drop for BufferReservation {
    fn drop(&mut self) {
        self.buffers.used.fetch_sub(u64::from(self.kib) * Quota::KIB, Ordering::Relaxed);
        self.tenant.buffered.fetch_sub(self.kib, Ordering::Relaxed);
    }
}

/// The bytes that the socket's send queue takes beside those that are in it, where it is to have no more than `unsent` bytes that
/// are not sent (0: any number); `None` where the kernel does not say. Where it is about to enlarge the queue it takes more.
pub(super) fn room(sink: &impl AsFd, unsent: u32) -> Option<usize> {
    let memory = socket_options::memory(sink)?;
    let room = memory.send_limit.saturating_sub(memory.sending);
    let room =
        if unsent == 0 { room } else { room.min(unsent.saturating_sub(socket_options::unsent(sink)?)) };
    usize::try_from(room).ok()
}

/// Has the kernel take no more for the socket than `unsent` bytes beyond what it has sent (`TCP_NOTSENT_LOWAT`, tcp(7)): a
/// connection whose reader stalls pins so much, and one that is fast is not slowed, however much is on its way. 0 leaves it to
/// `net.ipv4.tcp_notsent_lowat`.
pub(super) fn bound_unsent(socket: &impl AsFd, unsent: u32) {
    // A connection that has gone says so when it is read.
    socket2::SockRef::from(socket).set_tcp_notsent_lowat(unsent).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_for_process_and_tenant_until_they_are_dropped() {
        let buffers = BufferBudget::new(SCRATCH as u64 * 4);
        let (tenant, other) = (Arc::new(Quota::default()), Arc::new(Quota::default()));
        assert!(!buffers.is_short(&tenant));
        let one = buffers.part(&tenant, SCRATCH);
        assert!(!buffers.is_short(&tenant));
        let two = buffers.part(&tenant, SCRATCH);
        assert!(buffers.is_short(&tenant), "one more would be more than what is free");
        assert!(!buffers.is_short(&other));
        let three = buffers.part(&other, SCRATCH * 3);
        assert_eq!(buffers.used(), SCRATCH as u64 * 5, "what was read is kept, also beyond the limit");
        assert!(buffers.is_short(&other));
        drop((one, two, three));
        assert_eq!((buffers.used(), buffers.is_short(&tenant)), (0, false));
        assert!(BufferBudget::new(0).is_short(&tenant));
    }

    #[test]
    fn send_queue_that_takes_no_more_has_little_room() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let bounded = connect();
        bound_unsent(&bounded, 4096);
        assert!(room(&bounded, 4096).unwrap() <= 4096);
        let stream = connect();
        assert!(room(&stream, 0).unwrap() >= FIRST);
        stream.set_nonblocking(true).unwrap();
        while std::io::Write::write(&mut &stream, &vec![0; SCRATCH]).is_ok() {}
        assert!(room(&stream, 0).unwrap() < SCRATCH);
    }
}
