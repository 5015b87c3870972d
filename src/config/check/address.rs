//! Addresses that the process binds: no two of them may take the same port of the same address.

use std::net::SocketAddr;

use crate::config::Protocol;
use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::TableHead;
use crate::config::table::Field;
use crate::config::tables::{RawAdmin, RawHealth};
use crate::config::unit::BindPorts;

/// Ports that a table binds.
struct BindClaim<'w> {
    ports: BindPorts,
    /// The table that binds it, and the offset; none for a default.
    written: Option<(&'w TableHead, usize)>,
    /// `admin` or `health`, where it is the default of one.
    default: &'static str,
    protocol: Protocol,
}

impl BindClaim<'_> {
    fn overlaps(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.ports.first, other.ports.first);
        // An IPv6 socket takes IPv6 alone, so [::] leaves 0.0.0.0 free.
        self.protocol == other.protocol
            && ours.is_ipv4() == theirs.is_ipv4()
            && ours.port() <= other.ports.last
            && theirs.port() <= self.ports.last
            && (same_ip(ours, theirs) || ours.ip().is_unspecified() || theirs.ip().is_unspecified())
    }

    fn place(&self) -> String {
        match self.written {
            Some((head, offset)) => format!("{} ({})", head.title(), head.place(offset)),
            None => format!("{} (by default)", self.default),
        }
    }
}

/// Whether two addresses are one; link-local addresses of two interfaces are two.
fn same_ip(ours: SocketAddr, theirs: SocketAddr) -> bool {
    let scope = |address: SocketAddr| match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    };
    ours.ip() == theirs.ip() && scope(ours) == scope(theirs)
}

/// As it is written in a bind.
fn spelled(ports: &BindPorts) -> String {
    if ports.count() == 1 { ports.first.to_string() } else { format!("{}-{}", ports.first, ports.last) }
}

/// No listener takes what another one, the admin pages or the health endpoint take.
pub(super) fn listener_addresses_do_not_overlap(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    let mut claims = claims(written);
    // Port 0 is the system's choice, and the system chooses a free one.
    claims.retain(|claim| claim.ports.first.port() != 0);
    let order: Vec<_> = claims.into_iter().enumerate().collect();
    let mut by_port: Vec<_> = order.iter().collect();
    by_port.sort_by_key(|(_, claim)| claim.ports.first.port());
    let mut open: Vec<&(usize, BindClaim<'_>)> = Vec::new();
    let mut pairs = Vec::new();
    for next in by_port {
        open.retain(|earlier| earlier.1.ports.last >= next.1.ports.first.port());
        let touching = open.iter().filter(|earlier| earlier.1.overlaps(&next.1));
        pairs.extend(
            touching.map(|earlier| if earlier.0 < next.0 { (*earlier, next) } else { (next, *earlier) }),
        );
        open.push(next);
    }
    for ((_, first), (_, second)) in pairs {
        let Some((head, offset)) = second.written else { continue };
        let (found, taken) = (spelled(&second.ports), spelled(&first.ports));
        let message = format!(
            "must be an address that nothing else binds, found {found} where {} has {taken}",
            first.place()
        );
        faults.push(head.fault_at(offset, "bind", message));
    }
}

fn claims(written: &RawConfig) -> Vec<BindClaim<'_>> {
    let (admin, health) = (written.admin.as_ref(), written.health.as_ref());
    let (default_admin, default_health) = (RawAdmin::default(), RawHealth::default());
    let mut claims: Vec<_> = [
        single(
            "admin",
            admin.map(|table| &table.head),
            admin.map_or(&default_admin.bind, |table| &table.bind),
        ),
        single(
            "health",
            health.map(|table| &table.head),
            health.map_or(&default_health.bind, |table| &table.bind),
        ),
    ]
    .into_iter()
    .flatten()
    .collect();
    // The error is reported at the later one; a default has no line.
    claims.sort_by_key(|claim| claim.written.is_some());
    for listener in &written.listeners {
        // An invalid protocol is reported elsewhere.
        let Some(protocol) = listener.protocol.effective() else { continue };
        for ports in listener.bind.given().map(|list| list.items.as_slice()).unwrap_or_default() {
            let at = Some((&listener.head, ports.span().start));
            claims.push(BindClaim { ports: *ports.get_ref(), written: at, default: "", protocol });
        }
    }
    claims
}

fn single<'w>(
    name: &'static str,
    head: Option<&'w TableHead>,
    bind: &Field<SocketAddr>,
) -> Option<BindClaim<'w>> {
    let first = bind.effective()?;
    let written = bind.spanned().and_then(|bind| Some((head?, bind.span().start)));
    Some(BindClaim {
        ports: BindPorts { first, last: first.port() },
        written,
        default: name,
        protocol: Protocol::Tcp,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::unit::ports;

    fn overlap(ours: &str, theirs: &str) -> bool {
        let claim = |text| BindClaim {
            ports: ports(text).unwrap(),
            written: None,
            default: "admin",
            protocol: Protocol::Tcp,
        };
        let (ours, theirs) = (claim(ours), claim(theirs));
        assert_eq!(ours.overlaps(&theirs), theirs.overlaps(&ours));
        ours.overlaps(&theirs)
    }

    #[test]
    fn wildcard_overlaps_every_address_of_its_family() {
        assert!(overlap("0.0.0.0:80", "127.0.0.1:80"));
        assert!(overlap("[::]:80", "[::1]:80"));
        assert!(!overlap("[::]:80", "0.0.0.0:80"));
        assert!(!overlap("[::]:80", "127.0.0.1:80"));
        assert!(!overlap("127.0.0.1:80", "127.0.0.2:80"));
        assert!(!overlap("[fe80::1%1]:80", "[fe80::1%2]:80"));
        assert!(overlap("[fe80::1%1]:80", "[fe80::1%1]:80"));
    }

    #[test]
    fn ranges_overlap_from_their_first_to_their_last_port() {
        assert!(overlap("0.0.0.0:80-83", "0.0.0.0:83-90"));
        assert!(!overlap("0.0.0.0:80-83", "0.0.0.0:84-90"));
        assert!(overlap("0.0.0.0:80-90", "0.0.0.0:84-85"));
    }

    #[test]
    fn tcp_and_udp_can_share_a_port() {
        let claim = |protocol| BindClaim {
            ports: ports("127.0.0.1:53").unwrap(),
            written: None,
            default: "",
            protocol,
        };
        assert!(!claim(Protocol::Tcp).overlaps(&claim(Protocol::Udp)));
        assert!(claim(Protocol::Udp).overlaps(&claim(Protocol::Udp)));
    }

    #[test]
    fn default_bind_is_named_as_a_default() {
        let claim = BindClaim {
            ports: ports("127.0.0.1:9900").unwrap(),
            written: None,
            default: "admin",
            protocol: Protocol::Tcp,
        };
        assert_eq!(claim.place(), "admin (by default)");
    }
}
