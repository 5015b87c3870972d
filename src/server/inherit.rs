//! Sockets bound before the process started, by systemd (`LISTEN_FDS`) or another process: each is used for the
//! address that it has.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use rustix::net::sockopt::ipv6_v6only;
use socket2::SockRef;

use crate::handover::message::{OfferedSocket, SocketRole};

/// Inherited sockets by type.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// Listening sockets.
    pub tcp: Vec<TcpListener>,
    /// Sockets that receive datagrams.
    pub udp: Vec<UdpSocket>,
    /// Listening sockets with a path.
    pub unix: Vec<UnixListener>,
    /// Where addresses of port 0 were bound: whose they are, as they are configured, and as they are.
    pub ports: Vec<(String, SocketAddr, SocketAddr)>,
    /// Whether sockets may be left over: a predecessor's, whose configuration had more addresses.
    pub may_be_more: bool,
    /// Whether the file of the socket with a path goes to this process.
    pub has_file: bool,
}

impl InheritedSockets {
    /// What systemd passed to this process, by `LISTEN_FDS`. It is passed once: a second call finds nothing. To be called
    /// before the first thread starts, for it takes the variables out of the environment.
    ///
    /// # Errors
    /// Where a descriptor is none of the three.
    pub fn from_environment() -> io::Result<Self> {
        let mut passed = ListenFd::from_env();
        let mut all = Self::default();
        for place in 0..passed.len() {
            if let Ok(Some(socket)) = passed.take_tcp_listener(place) {
                all.tcp.push(socket);
            } else if let Ok(Some(socket)) = passed.take_udp_socket(place) {
                all.udp.push(socket);
            } else if let Ok(Some(socket)) = passed.take_unix_listener(place) {
                all.unix.push(socket);
            } else {
                let message = format!("descriptor {} is not a TCP, UDP or unix socket", 3 + place);
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        }
        Ok(all)
    }

    /// What the previous process offers, for the addresses of this one's configuration.
    pub(super) fn offered(sockets: Vec<(OfferedSocket, OwnedFd)>) -> Self {
        let mut all = Self { may_be_more: true, ..Self::default() };
        for (OfferedSocket { role, bound }, socket) in sockets {
            let (name, configured) = match role {
                SocketRole::Listener { name, udp: true, configured } => {
                    all.udp.push(socket.into());
                    (name, configured)
                }
                SocketRole::Listener { name, udp: false, configured } => {
                    all.tcp.push(socket.into());
                    (name, configured)
                }
                SocketRole::Admin { configured } => {
                    all.tcp.push(socket.into());
                    ("admin".to_owned(), configured)
                }
                SocketRole::Health { configured } => {
                    all.tcp.push(socket.into());
                    ("health".to_owned(), configured)
                }
                SocketRole::Control { has_file, .. } => {
                    all.has_file = has_file;
                    all.unix.push(socket.into());
                    continue;
                }
            };
            all.ports.extend(bound.map(|bound| (name, configured, bound)));
        }
        all
    }

    /// The address that was bound where this one is configured.
    pub(super) fn bound(&self, whose: &str, configured: SocketAddr) -> SocketAddr {
        let is_it =
            |(name, address, _): &&(String, SocketAddr, SocketAddr)| name == whose && *address == configured;
        self.ports.iter().find(is_it).map_or(configured, |(_, _, bound)| *bound)
    }

    /// Takes the listening sockets of an address, ready to accept.
    pub(super) fn tcp(&mut self, address: SocketAddr, backlog: i32) -> io::Result<Vec<TcpListener>> {
        let taken: Vec<_> =
            self.tcp.extract_if(.., |socket| socket.local_addr().is_ok_and(|own| own == address)).collect();
        for socket in &taken {
            socket.set_nonblocking(true)?;
            hears_only(socket, address)?;
            // Replaces the backlog that systemd has set; listen(2) may be called again.
            SockRef::from(socket).listen(backlog)?;
            SockRef::from(socket).set_tcp_nodelay(true)?;
        }
        Ok(taken)
    }

    /// Takes the sockets of an address, ready to receive.
    pub(super) fn udp(&mut self, address: SocketAddr) -> io::Result<Vec<UdpSocket>> {
        let taken: Vec<_> =
            self.udp.extract_if(.., |socket| socket.local_addr().is_ok_and(|own| own == address)).collect();
        for socket in &taken {
            socket.set_nonblocking(true)?;
            hears_only(socket, address)?;
        }
        Ok(taken)
    }

    /// Takes the listening socket of a path.
    pub(super) fn unix(&mut self, path: &Path) -> io::Result<Option<UnixListener>> {
        let place = self.unix.iter().position(|socket| path_of(socket).as_deref() == Some(path));
        let taken = place.map(|place| self.unix.swap_remove(place));
        taken.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(taken)
    }

    /// Sockets that were not used, as text for the operator.
    pub(super) fn rest(&self) -> Vec<String> {
        if self.may_be_more {
            return Vec::new();
        }
        let shown = |protocol: &str, address: io::Result<SocketAddr>| {
            address.map_or_else(
                |_| format!("{protocol} without an address"),
                |address| format!("{protocol} {address}"),
            )
        };
        let tcp = self.tcp.iter().map(|socket| shown("TCP", socket.local_addr()));
        let udp = self.udp.iter().map(|socket| shown("UDP", socket.local_addr()));
        let unix = self.unix.iter().map(|socket| {
            path_of(socket)
                .map_or_else(|| "a socket without a path".to_owned(), |path| path.display().to_string())
        });
        tcp.chain(udp).chain(unix).collect()
    }
}

fn path_of(socket: &UnixListener) -> Option<PathBuf> {
    socket.local_addr().ok()?.as_pathname().map(Path::to_owned)
}

/// `[::]` and `0.0.0.0` are two addresses, and each is configured for itself. One socket for both would bring IPv4's peers
/// in as IPv6's, which no trusted network has.
fn hears_only(socket: impl AsFd, address: SocketAddr) -> io::Result<()> {
    if address.ip() == Ipv6Addr::UNSPECIFIED && !ipv6_v6only(socket)? {
        let message = "a socket that also accepts IPv4; set BindIPv6Only=ipv6-only in its unit";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_socket_is_taken_by_address_and_protocol_and_the_rest_is_listed() {
        let any = "127.0.0.1:0";
        let (tcp, udp) = (TcpListener::bind(any).unwrap(), UdpSocket::bind(any).unwrap());
        let (at, of_udp) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let mut all = InheritedSockets {
            tcp: vec![tcp],
            udp: vec![udp],
            unix: vec![unix],
            ..InheritedSockets::default()
        };
        assert_eq!(all.rest(), [format!("TCP {at}"), format!("UDP {of_udp}"), path.display().to_string()]);
        if at != of_udp {
            assert!(all.tcp(of_udp, 1).unwrap().is_empty() && all.udp(at).unwrap().is_empty());
        }
        assert_eq!(all.tcp(at, 1).unwrap().len(), 1);
        assert_eq!(all.udp(of_udp).unwrap().len(), 1);
        assert!(all.unix(Path::new("/elsewhere")).unwrap().is_none());
        assert!(all.unix(&path).unwrap().is_some());
        assert!(all.rest().is_empty());
    }

    #[test]
    fn dual_stack_socket_is_refused() {
        let Ok(both) = TcpListener::bind("[::]:0") else { return };
        let at = both.local_addr().unwrap();
        // Linux's default, net.ipv6.bindv6only, may be the other way round.
        let is_both = !ipv6_v6only(&both).unwrap();
        let mut all = InheritedSockets { tcp: vec![both], ..InheritedSockets::default() };
        assert_eq!(all.tcp(at, 1).is_err(), is_both);
    }
}
