//! The rules of a listener.

use crate::config::error::ConfigError;
use crate::config::raw::RawConfig;
use crate::config::section::quoted;
use crate::config::table::Headed;
use crate::config::tables::RawListener;
use crate::config::value::{Keyword, ProxyProtocolMode};
use crate::config::{BareDatagrams, Fallback, Protocol};

/// Every rule, for every listener.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    for listener in &written.listeners {
        faults.extend(a_listener_binds_something(listener));
        faults.extend(a_listener_binds_at_most_1024_ports(listener));
        faults.extend(no_datagram_is_pending(listener));
        faults.extend(bare_datagrams_are_of_udp(listener));
        match listener.proxy_protocol.effective() {
            Some(ProxyProtocolMode::Require) => {
                faults.extend(headers_count_from_trusted_sources_only(listener));
                faults.extend(header_identifies_the_tenant(listener));
            }
            Some(ProxyProtocolMode::Off) => {
                faults.extend(without_headers_the_tenant_is_named(listener));
                rules_of_headers_stand_with_headers_only(listener, faults);
            }
            None => {}
        }
    }
}

fn a_listener_binds_something(listener: &Headed<RawListener>) -> Option<ConfigError> {
    listener.bind.given().filter(|bind| bind.is_empty())?;
    let message = "must hold at least one address, such as \"0.0.0.0:8080\", found an empty list";
    Some(listener.fault(&listener.bind, message.to_owned()))
}

fn no_datagram_is_pending(listener: &Headed<RawListener>) -> Option<ConfigError> {
    listener.protocol.given().filter(|protocol| **protocol == Protocol::Udp)?;
    let found = listener.max_pending.given()?;
    let message = format!(
        "must be absent where protocol = \"udp\", because a datagram holds the whole header or none of \
         it, found {found}"
    );
    Some(listener.fault(&listener.max_pending, message))
}

fn bare_datagrams_are_of_udp(listener: &Headed<RawListener>) -> Option<ConfigError> {
    listener.protocol.effective().filter(|protocol| *protocol == Protocol::Tcp)?;
    let found = BareDatagrams::word(listener.bare_datagrams.given()?);
    let default = listener.protocol.default_note();
    let message = format!(
        "must be absent where protocol = \"tcp\"{default}, because a TCP listener receives no datagrams, \
         found {found}"
    );
    Some(listener.fault(&listener.bare_datagrams, message))
}

/// How many ports a listener may bind: each takes a socket for each worker.
const MOST_PORTS: usize = 1024;

fn a_listener_binds_at_most_1024_ports(listener: &Headed<RawListener>) -> Option<ConfigError> {
    let ports: usize = listener.bind.given()?.items.iter().map(|ports| ports.get_ref().count()).sum();
    (ports > MOST_PORTS).then(|| {
        let message = format!("must hold at most {MOST_PORTS} ports in all, found {ports}");
        listener.fault(&listener.bind, message)
    })
}

const REMEDY: &str = "name the load balancer's private networks, such as [\"10.0.0.0/16\"]";

fn headers_count_from_trusted_sources_only(listener: &Headed<RawListener>) -> Option<ConfigError> {
    if listener.trusted_sources.is_absent() {
        let default = listener.proxy_protocol.default_note();
        let must = format!("must be present where proxy-protocol = \"require\"{default}");
        return Some(listener.fault(&listener.trusted_sources, format!("{must}, found none: {REMEDY}")));
    }
    listener.trusted_sources.given().filter(|trusted| trusted.is_empty())?;
    let message = format!("must hold at least one network, found an empty list: {REMEDY}");
    Some(listener.fault(&listener.trusted_sources, message))
}

fn header_identifies_the_tenant(listener: &Headed<RawListener>) -> Option<ConfigError> {
    let found = quoted(listener.tenant.given()?);
    let message = format!(
        "must be absent where proxy-protocol = \"require\", because the header identifies the tenant, \
         found {found}: on-no-endpoint = \"tenant:NAME\" assigns the traffic without an endpoint ID"
    );
    Some(listener.fault(&listener.tenant, message))
}

fn without_headers_the_tenant_is_named(listener: &Headed<RawListener>) -> Option<ConfigError> {
    listener.tenant.is_absent().then(|| {
        let message = "must be present where proxy-protocol = \"off\", because nothing else identifies \
                       the tenant, found none";
        listener.fault(&listener.tenant, message.to_owned())
    })
}

fn rules_of_headers_stand_with_headers_only(listener: &Headed<RawListener>, faults: &mut Vec<ConfigError>) {
    let keys = [
        listener.verify_crc.written(bool::to_string),
        listener.on_no_endpoint.written(fallback),
        listener.on_unknown_endpoint.written(fallback),
        listener.bare_datagrams.written(BareDatagrams::word),
    ];
    for (key, offset, found) in keys.into_iter().flatten() {
        let message = format!(
            "must be absent where proxy-protocol = \"off\", because no header is read, found {found}"
        );
        faults.push(listener.head.fault_at(offset, &key, message));
    }
}

fn fallback(fallback: &Fallback) -> String {
    match fallback {
        Fallback::Reject => "\"reject\"".to_owned(),
        Fallback::Tenant(name) => quoted(&format!("tenant:{name}")),
    }
}
