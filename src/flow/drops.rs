//! What the kernel dropped at a socket because its receive queue was full.

use std::os::fd::AsFd;

use crate::socket_options;

/// The kernel's drop counter of one socket, as far as it is counted already.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KernelDrops(u32);

impl KernelDrops {
    /// What the socket drops from now on; what it dropped before was counted by another process.
    pub(super) fn new(socket: &impl AsFd) -> Self {
        Self(read(socket).unwrap_or(0))
    }

    /// How many there were since the last call. Costs one call of the kernel; a socket that cannot be asked has none.
    pub(super) fn take(&mut self, socket: &impl AsFd) -> u64 {
        let Some(now) = read(socket) else { return 0 };
        // The kernel's count wraps, too.
        u64::from(now.wrapping_sub(std::mem::replace(&mut self.0, now)))
    }
}

fn read(socket: &impl AsFd) -> Option<u32> {
    Some(socket_options::memory(socket)?.drops)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use socket2::SockRef;

    use super::*;

    #[test]
    fn datagrams_beyond_the_queue_are_counted_once() {
        let [receiver, sender] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        SockRef::from(&receiver).set_recv_buffer_size(1).unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let mut drops = KernelDrops::default();
        assert_eq!(drops.take(&receiver), 0);
        (0..100).for_each(|_| assert_eq!(sender.send(&[0; 1_000]).unwrap(), 1_000));
        // On loopback what was sent is there, or was dropped.
        receiver.set_nonblocking(true).unwrap();
        let taken = std::iter::from_fn(|| receiver.recv(&mut [0; 1_000]).ok()).count();
        assert!(taken < 100);
        assert_eq!(drops.take(&receiver), 100 - taken as u64);
        assert_eq!((drops.take(&receiver), KernelDrops::new(&receiver).take(&receiver)), (0, 0));
    }
}
