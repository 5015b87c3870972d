//! Address roles as types, so that a client is never confused with a peer.

use std::fmt;
use std::net::SocketAddr;

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub SocketAddr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// The client's address, as the PROXY header states it. Consumers' addresses overlap, so it does not identify a
    /// tenant.
    ClientAddr
}
role! {
    /// What the client connected to, as the PROXY header tells.
    DestinationAddr
}
role! {
    /// The other end of our socket: the load balancer's private address.
    PeerAddr
}
role! {
    /// Where we accept.
    ListenAddr
}
role! {
    /// The address of a backend.
    BackendAddr
}

impl ClientAddr {
    /// An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) as the IPv4 address that it stands for; any other as it is.
    #[must_use]
    pub fn canonical(self) -> Self {
        Self(SocketAddr::new(self.0.ip().to_canonical(), self.0.port()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_client_is_the_ipv4_client() {
        let client = |text: &str| ClientAddr(text.parse().unwrap()).canonical().to_string();
        assert_eq!(client("[::ffff:10.0.0.1]:80"), "10.0.0.1:80");
        assert_eq!([client("[fd00::1]:443"), client("10.0.0.1:80")], ["[fd00::1]:443", "10.0.0.1:80"]);
    }

    #[test]
    fn address_is_displayed_as_written() {
        for text in ["10.0.0.1:80", "[fd00::1]:443"] {
            assert_eq!(ClientAddr(text.parse().unwrap()).to_string(), text);
            assert_eq!(ListenAddr(text.parse().unwrap()).to_string(), text);
        }
    }
}
