//! Socket options that no library names.

use std::os::fd::AsFd;

use nix::libc::{self, c_int};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::SetStruct;
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

/// Words of the answer (`SK_MEMINFO_VARS` in `include/uapi/linux/sock_diag.h`).
const MEMORY_WORDS: usize = 9;

/// Words of what is read of `struct tcp_info` in include/uapi/linux/tcp.h: up to `tcpi_notsent_bytes`, the last, since Linux 4.6.
const TCP_WORDS: usize = 37;

/// Where the two words of `tcpi_bytes_acked` are.
const ACKNOWLEDGED: std::ops::Range<usize> = 30..32;

/// `IP_LOCAL_PORT_RANGE` in include/uapi/linux/in.h, since Linux 6.3.
const IP_LOCAL_PORT_RANGE: c_int = 51;

sockopt_impl!(
    /// The memory that the kernel holds for a socket, and what it dropped there; since Linux 4.12.
    MemoryInfo,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; MEMORY_WORDS]
);

sockopt_impl!(
    /// The state of a TCP connection.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u32; TCP_WORDS]
);

/// The ports that the kernel chooses from at connect, for IPv6 as well: the highest in the upper 16 bits, the lowest in the
/// lower ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpLocalPortRange;

setsockopt_impl!(IpLocalPortRange, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, u32, SetStruct<u32>);

/// What the kernel holds for a socket. Sizes are bytes of memory, which a queued byte takes up to four of.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SocketMemory {
    /// In the send queue: it falls as the other end acknowledges bytes.
    pub sending: u32,
    /// In the receive queue: what has arrived and was not read.
    pub received: u32,
    /// The most that the send queue takes.
    pub send_limit: u32,
    /// Packets dropped because the receive queue was full. The count wraps.
    pub drops: u32,
}

/// Asks the kernel for the memory of a socket; `None` where it does not say.
#[must_use]
pub(crate) fn memory(socket: &impl AsFd) -> Option<SocketMemory> {
    let words = getsockopt(socket, MemoryInfo).ok()?;
    let word = |name: c_int| words.get(usize::try_from(name).ok()?).copied();
    Some(SocketMemory {
        sending: word(libc::SK_MEMINFO_WMEM_QUEUED)?,
        received: word(libc::SK_MEMINFO_RMEM_ALLOC)?,
        send_limit: word(libc::SK_MEMINFO_SNDBUF)?,
        drops: word(libc::SK_MEMINFO_DROPS)?,
    })
}

/// The bytes of a TCP connection that were written and not sent yet; `None` where the kernel does not say.
#[must_use]
pub(crate) fn unsent(socket: &impl AsFd) -> Option<u32> {
    getsockopt(socket, TcpInfo).ok()?.last().copied()
}

/// The bytes of a TCP connection that the other end has acknowledged; `None` where the kernel does not say.
#[must_use]
pub(crate) fn acknowledged(socket: &impl AsFd) -> Option<u64> {
    let words = getsockopt(socket, TcpInfo).ok()?;
    let mut bytes = [0; 8];
    let halves = words.get(ACKNOWLEDGED)?.iter().flat_map(|word| word.to_ne_bytes());
    bytes.iter_mut().zip(halves).for_each(|(byte, read)| *byte = read);
    Some(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use socket2::{Domain, Socket, Type};

    use super::*;

    fn bound(kind: Type) -> Socket {
        let socket = Socket::new(Domain::IPV4, kind, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket
    }

    #[test]
    fn memory_and_unsent_bytes_of_a_connection_grow_while_its_reader_reads_nothing() {
        let listener = bound(Type::STREAM);
        listener.listen(1).unwrap();
        let stream = bound(Type::STREAM);
        stream.connect(&listener.local_addr().unwrap()).unwrap();
        let before = memory(&stream).unwrap();
        assert_eq!((before.sending, before.received, before.drops, unsent(&stream)), (0, 0, 0, Some(0)));
        // The handshake's SYN may count.
        assert!(acknowledged(&stream).unwrap() <= 1);
        stream.set_nonblocking(true).unwrap();
        while stream.send(&[0; 4_096]).is_ok() {}
        let after = memory(&stream).unwrap();
        assert!(after.sending > 0 && after.send_limit > 0 && unsent(&stream).unwrap() > 0, "{after:?}");
        // No more than a receive queue holds.
        assert!((2..=6 << 20).contains(&acknowledged(&stream).unwrap()));
    }

    #[test]
    fn socket_that_is_no_tcp_connection_has_no_unsent_bytes() {
        let socket = bound(Type::DGRAM);
        assert!(memory(&socket).is_some());
        assert_eq!((unsent(&socket), acknowledged(&socket)), (None, None));
    }
}
