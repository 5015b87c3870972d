//! Addresses that a DNS answer must not contain. The owner of a tenant's name must not reach this machine, its admin
//! pages or the
//! cloud's metadata through the proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;

use crate::config::DnsConfig;

/// The addresses at which this process listens now.
pub type Own = Box<dyn Fn() -> Vec<SocketAddr> + Send + Sync>;

/// Filters the addresses of DNS answers.
pub(super) struct AddressFilter {
    allowed: Vec<IpNet>,
    /// Whether the configuration names DNS servers, all of them on this machine.
    has_local_servers: bool,
    own: Own,
}

impl AddressFilter {
    pub(super) fn new(config: &DnsConfig, own: Own) -> Self {
        let servers = &config.servers;
        let has_local_servers =
            !servers.is_empty() && servers.iter().all(|server| server.ip().to_canonical().is_loopback());
        Self { allowed: config.allow_answers.clone(), has_local_servers, own }
    }

    /// Removes the addresses that no answer may contain, and returns them.
    ///
    /// A loopback address is allowed where two things come together: the configuration names DNS servers that are all on this
    /// machine, as for Consul or dnsmasq, and `has_own_port`: the port is the configuration's and not the answer's.
    pub(super) fn refuse(&self, found: &mut Vec<IpAddr>, has_own_port: bool) -> Vec<IpAddr> {
        let is_local = |address: &IpAddr| has_own_port && self.has_local_servers && address.is_loopback();
        let is_listed = |address: &IpAddr| self.allowed.iter().any(|network| network.contains(address));
        let is_allowed = |address: &IpAddr| is_local(address) || is_listed(address);
        found
            .extract_if(.., |address| !is_usable(*address) || (is_special(*address) && !is_allowed(address)))
            .collect()
    }

    /// Whether this process listens there.
    pub(super) fn is_own(&self, address: SocketAddr) -> bool {
        let is_it = |own: &SocketAddr| {
            own.port() == address.port()
                && (own.ip() == address.ip()
                    || (own.ip().is_unspecified() && own.is_ipv4() == address.is_ipv4() && is_local(address)))
        };
        (self.own)().iter().any(is_it)
    }
}

/// Whether a backend can have the address.
pub(super) fn is_usable(address: IpAddr) -> bool {
    let is_mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !is_mapped && !is_broadcast && !address.is_unspecified() && !address.is_multicast()
}

/// Whether the address means another host on each host.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => {
            // The services that EC2 has at 169.254.0.0/16 are at fd00:ec2::/32 too.
            address.is_loopback()
                || address.is_unicast_link_local()
                || matches!(address.segments(), [0xfd00, 0x0ec2, ..])
        }
    }
}

/// Whether the address is one of this machine: a route to it has the address itself as its source. Nothing is sent. Binding
/// the address would not tell where `net.ipv4.ip_nonlocal_bind` is on.
fn is_local(address: SocketAddr) -> bool {
    if address.ip().is_loopback() {
        return true;
    }
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Without a socket it is not known. A lookup that is refused changes nothing, and is tried again.
    let Ok(socket) = UdpSocket::bind((any, 0)) else { return true };
    socket.connect(address).and_then(|()| socket.local_addr()).is_ok_and(|source| source.ip() == address.ip())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of_servers(servers: &[&str], allowed: &[&str], own: &[&str]) -> AddressFilter {
        let config = DnsConfig {
            servers: servers.iter().map(|address| address.parse().unwrap()).collect(),
            timeout: Duration::from_secs(1),
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(1),
            allow_answers: allowed.iter().map(|network| network.parse().unwrap()).collect(),
        };
        let own: Vec<SocketAddr> = own.iter().map(|address| address.parse().unwrap()).collect();
        AddressFilter::new(&config, Box::new(move || own.clone()))
    }

    fn guard(allowed: &[&str], own: &[&str]) -> AddressFilter {
        of_servers(&[], allowed, own)
    }

    fn refused(guard: &AddressFilter, addresses: &[&str]) -> (Vec<String>, Vec<String>) {
        let mut found: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let refused = guard.refuse(&mut found, true);
        let texts = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect();
        (texts(&found), texts(&refused))
    }

    const SPECIAL: [&str; 7] =
        ["127.0.0.1", "127.255.0.9", "169.254.169.254", "::1", "fe80::1", "febf::1", "fd00:ec2::254"];

    #[test]
    fn special_addresses_are_refused_unless_their_network_is_allowed() {
        let plain =
            ["10.0.0.1", "128.0.0.1", "169.253.0.1", "fd00::1", "fd00:ec3::1", "fec0::1", "2001:db8::1"];
        let none = guard(&[], &[]);
        assert_eq!(refused(&none, &plain).0, plain);
        assert_eq!(refused(&none, &SPECIAL).1, SPECIAL);
        assert_eq!(
            refused(&none, &["127.0.0.1", "10.0.0.1"]),
            (vec!["10.0.0.1".to_owned()], vec!["127.0.0.1".to_owned()])
        );
        let some = guard(&["127.0.0.0/24", "fe80::/10"], &[]);
        assert_eq!(refused(&some, &SPECIAL).0, ["127.0.0.1", "fe80::1", "febf::1"]);
    }

    #[test]
    fn loopback_address_is_allowed_from_local_servers_for_a_configured_port() {
        let local = of_servers(&["127.0.0.1:53", "[::1]:53"], &[], &[]);
        assert_eq!(refused(&local, &SPECIAL).0, ["127.0.0.1", "127.255.0.9", "::1"]);
        let mut found: Vec<IpAddr> = SPECIAL.iter().map(|address| address.parse().unwrap()).collect();
        assert_eq!(local.refuse(&mut found, false).len(), SPECIAL.len(), "the port is the answer's");
        for servers in [&[][..], &["127.0.0.1:53", "10.0.0.2:53"]] {
            assert_eq!(refused(&of_servers(servers, &[], &[]), &SPECIAL).1, SPECIAL, "{servers:?}");
        }
    }

    #[test]
    fn addresses_that_no_backend_can_have_are_always_refused() {
        let unusable = ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "::ffff:127.0.0.1"];
        assert_eq!(refused(&guard(&["0.0.0.0/0", "::/0"], &[]), &unusable).1, unusable);
    }

    #[test]
    fn own_addresses_are_known_by_port_and_by_the_machines_addresses() {
        let is_own = |own: &str, address: &str| guard(&[], &[own]).is_own(address.parse().unwrap());
        assert!(is_own("127.0.0.1:9900", "127.0.0.1:9900"));
        assert!(!is_own("127.0.0.1:9900", "127.0.0.1:9901"));
        assert!(!is_own("127.0.0.1:9900", "127.0.0.2:9900"));
        assert!(is_own("0.0.0.0:80", "127.0.0.2:80"));
        assert!(is_own("[::]:80", "[::1]:80"));
        assert!(!is_own("[::]:80", "127.0.0.1:80"));
        // A documentation address (RFC 5737) is no machine's.
        assert!(!is_own("0.0.0.0:80", "192.0.2.1:80"));
    }
}
