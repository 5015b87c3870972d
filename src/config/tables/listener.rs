//! Listeners.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::section::{ParsedList, Section};
use crate::config::table::{Field, Key, Kind, List, OneOrMany, Presence, RawTable, Table, table};
use crate::config::unit::BindPorts;
use crate::config::value::{Count, ProxyProtocolMode, TableName};
use crate::config::{BareDatagrams, Fallback, ListenerIdentity, Protocol};

table! {
    "[[listener]]", reload, "Addresses and ports on which sessions or flows arrive, and their rules.";
    RawListener => ListenerConfig;
    keys {
        "name" name: TableName => String, required "web", "Its name, unique among listeners.";
        "bind" bind: OneOrMany<BindPorts> => Vec<SocketAddr>, required "0.0.0.0:8080",
            "An address, a port range such as \"0.0.0.0:8000-8003\", or a list; at most 1024 ports. Each port is an NLB target of its own. `[::]` is IPv6 only.";
        "protocol" protocol: Protocol => Protocol, default "tcp",
            "The transport protocol. The same port by TCP and by UDP is not a conflict.";
        "proxy-protocol" proxy_protocol: ProxyProtocolMode, default "require",
            "Whether a PROXY v2 header names the client and its endpoint.";
        "trusted-sources" trusted_sources: List<IpNet>, usual ["10.0.0.0/16"],
            "Networks that may connect: the load balancer's subnets, because a PROXY header is not authenticated. With \
             proxy-protocol = \"off\" it is optional: the default is then all networks.";
        "verify-crc" verify_crc: bool, default true, "A wrong CRC32C in the header ends the session.";
        "pool" pool: String => Option<String>, usual "shared", "Pool of tenants that name none.";
        "on-no-endpoint" on_no_endpoint: Fallback, default "reject",
            "Header without a VPC endpoint ID: reject, or tenant:NAME.";
        "on-unknown-endpoint" on_unknown_endpoint: Fallback, default "reject",
            "Endpoint ID that no tenant lists: reject, or tenant:NAME.";
        "max-pending" max_pending: Count<usize, 1> => usize, default 4096,
            "Connections without a complete header; beyond it the oldest one is closed. All listeners together get at most an \
             eighth of the file descriptors for them. An error with protocol = \"udp\".";
        "tenant" tenant: String, optional "acme",
            "With proxy-protocol = \"off\": the tenant of all sessions, required there; verify-crc, on-no-endpoint and \
             on-unknown-endpoint are errors then.";
        "bare-datagrams" bare_datagrams: BareDatagrams, conditional "refuse",
            "With protocol = \"udp\": drop a datagram without a header, or forward it to the only flow of its source address (see \
             docs/udp.md).";
    }
    made {
        "How the tenant is identified." identity: ListenerIdentity = identity;
    }
}

fn identity(raw: &RawListener) -> ListenerIdentity {
    let trusted = raw.trusted_sources.given().cloned().map(Vec::from).unwrap_or_default();
    if raw.proxy_protocol.effective() == Some(ProxyProtocolMode::Off) {
        let tenant = raw.tenant.given().cloned().unwrap_or_default();
        return ListenerIdentity::Fixed { tenant, trusted };
    }
    ListenerIdentity::Header {
        trusted,
        verify_crc: raw.verify_crc.clone().into_value(),
        on_no_endpoint: raw.on_no_endpoint.clone().into_value(),
        on_unknown_endpoint: raw.on_unknown_endpoint.clone().into_value(),
        bare_datagrams: raw.bare_datagrams.clone().into_value(),
    }
}

impl From<ParsedList<BindPorts>> for Vec<SocketAddr> {
    fn from(list: ParsedList<BindPorts>) -> Self {
        list.items.iter().flat_map(|ports| ports.get_ref().iter()).collect()
    }
}
