//! The rules of a listener.

use crate::config::error::ConfigError;
use crate::config::raw::{RawConfig, RawListener};
use crate::config::section::quoted;
use crate::config::value::ProxyProtocolMode;
use crate::config::{BareDatagrams, Fallback, Protocol};

/// Every rule, for every listener.
pub(super) fn rules(written: &RawConfig, faults: &mut Vec<ConfigError>) {
    for listener in &written.listeners {
        faults.extend(a_listener_binds_something(listener));
        faults.extend(a_listener_binds_at_most_1024_ports(listener));
        faults.extend(no_datagram_is_pending(listener));
        faults.extend(bare_datagrams_are_of_udp(listener));
        match listener.proxy_protocol.effective(&ProxyProtocolMode::Require) {
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

fn a_listener_binds_something(listener: &RawListener) -> Option<ConfigError> {
    let bind = listener.bind.spanned().filter(|bind| bind.get_ref().is_empty())?;
    let message = "must hold at least one address, such as \"0.0.0.0:8080\", found an empty list";
    Some(listener.head.fault_at(bind.span().start, "bind", message.to_owned()))
}

fn no_datagram_is_pending(listener: &RawListener) -> Option<ConfigError> {
    listener.protocol.given().filter(|protocol| **protocol == Protocol::Udp)?;
    let (offset, found) = listener.max_pending.said(|count| count.0.to_string())?;
    let message = format!(
        "must be absent where protocol = \"udp\", because a datagram holds the whole header or none of \
         it, found {found}"
    );
    Some(listener.head.fault_at(offset, "max-pending", message))
}

fn bare_datagrams_are_of_udp(listener: &RawListener) -> Option<ConfigError> {
    listener.protocol.effective(&Protocol::Tcp).filter(|protocol| **protocol == Protocol::Tcp)?;
    let (offset, found) = listener.bare_datagrams.said(bare)?;
    let default = if listener.protocol.is_absent() { " (the default)" } else { "" };
    let message = format!(
        "must be absent where protocol = \"tcp\"{default}, because a TCP listener receives no datagrams, \
         found {found}"
    );
    Some(listener.head.fault_at(offset, "bare-datagrams", message))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what a field is said with takes a reference")]
fn bare(bare: &BareDatagrams) -> String {
    match bare {
        BareDatagrams::Refuse => "\"refuse\"".to_owned(),
        BareDatagrams::Follow => "\"follow\"".to_owned(),
    }
}

/// How many ports a listener may bind: each takes a socket for each worker.
const MOST_PORTS: usize = 1024;

fn a_listener_binds_at_most_1024_ports(listener: &RawListener) -> Option<ConfigError> {
    let bind = listener.bind.spanned()?;
    let ports: usize = bind.get_ref().items.iter().map(|ports| ports.get_ref().count()).sum();
    (ports > MOST_PORTS).then(|| {
        let message = format!("must hold at most {MOST_PORTS} ports in all, found {ports}");
        listener.head.fault_at(bind.span().start, "bind", message)
    })
}

const REMEDY: &str = "name the load balancer's private networks, such as [\"10.0.0.0/16\"]";

fn headers_count_from_trusted_sources_only(listener: &RawListener) -> Option<ConfigError> {
    let key = "trusted-sources";
    if listener.trusted_sources.is_absent() {
        let default = if listener.proxy_protocol.is_absent() { " (the default)" } else { "" };
        let must = format!("must be present where proxy-protocol = \"require\"{default}");
        return Some(listener.head.fault(key, format!("{must}, found none: {REMEDY}")));
    }
    let trusted = listener.trusted_sources.spanned().filter(|trusted| trusted.get_ref().is_empty())?;
    let message = format!("must hold at least one network, found an empty list: {REMEDY}");
    Some(listener.head.fault_at(trusted.span().start, key, message))
}

fn header_identifies_the_tenant(listener: &RawListener) -> Option<ConfigError> {
    let tenant = listener.tenant.spanned()?;
    let found = quoted(tenant.get_ref());
    let message = format!(
        "must be absent where proxy-protocol = \"require\", because the header identifies the tenant, \
         found {found}: on-no-endpoint = \"tenant:NAME\" assigns the traffic without an endpoint ID"
    );
    Some(listener.head.fault_at(tenant.span().start, "tenant", message))
}

fn without_headers_the_tenant_is_named(listener: &RawListener) -> Option<ConfigError> {
    listener.tenant.is_absent().then(|| {
        let message = "must be present where proxy-protocol = \"off\", because nothing else identifies \
                       the tenant, found none";
        listener.head.fault("tenant", message.to_owned())
    })
}

fn rules_of_headers_stand_with_headers_only(listener: &RawListener, faults: &mut Vec<ConfigError>) {
    let keys = [
        ("verify-crc", listener.verify_crc.said(bool::to_string)),
        ("on-no-endpoint", listener.on_no_endpoint.said(fallback)),
        ("on-unknown-endpoint", listener.on_unknown_endpoint.said(fallback)),
        ("bare-datagrams", listener.bare_datagrams.said(bare)),
    ];
    for (key, written) in keys {
        let Some((offset, found)) = written else { continue };
        let message = format!(
            "must be absent where proxy-protocol = \"off\", because no header is read, found {found}"
        );
        faults.push(listener.head.fault_at(offset, key, message));
    }
}

fn fallback(fallback: &Fallback) -> String {
    match fallback {
        Fallback::Reject => "\"reject\"".to_owned(),
        Fallback::Tenant(name) => quoted(&format!("tenant:{name}")),
    }
}
