//! The outcome of a session: who ended it, at which step, and why. The words are identical in the access log, in the
//! metrics and in docs/observability.md.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The side that ended a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum EndedBy {
    /// The client, or the load balancer on its behalf.
    Client,
    /// The backend.
    Backend,
    /// vestibule itself, by a rule.
    Proxy,
}

/// The step at which a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum EndedAt {
    /// Between the kernel and the first byte.
    Accept,
    /// While the PROXY header was read.
    Header,
    /// While its tenant was looked up.
    Tenant,
    /// While a backend was picked.
    Pool,
    /// While a backend was connected.
    Connect,
    /// While bytes were forwarded.
    Forward,
}

/// Side, step and reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// The side that ended it.
    pub by: EndedBy,
    /// At which step.
    pub at: EndedAt,
    /// The reason.
    pub why: Reason,
}

impl EndedBy {
    /// The label in log, metrics and documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Backend => "backend",
            Self::Proxy => "proxy",
        }
    }
}

impl EndedAt {
    /// The label in log, metrics and documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Header => "header",
            Self::Tenant => "tenant",
            Self::Pool => "pool",
            Self::Connect => "connect",
            Self::Forward => "forward",
        }
    }
}

/// Builds `Reason`, its words, its descriptions and the closed set of outcomes from one table.
macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $why:ident = $word:literal: $($by:ident at $at:ident),+;)+) => {
        /// The reason of an end: a closed set, so that it can be a metric's label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[doc = $doc])+ #[serde(rename = $word)] $why,)+
        }

        impl Reason {
            /// Every reason, in the order of a session's life.
            pub const ALL: &[Self] = &[$(Self::$why,)+];

            /// The label in log, metrics and documentation.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$why => $word,)+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$why => concat!($($doc,)+).trim_ascii(),)+ }
            }
        }

        impl Outcome {
            /// The closed set: no session ends in another way.
            pub const ALL: &[Self] = &[$($(Self { by: EndedBy::$by, at: EndedAt::$at, why: Reason::$why },)+)+];
        }
    };
}

outcomes! {
    /// Normal end: both sides closed after their last byte; `by` is the side that closed first.
    Done = "done": Client at Forward, Backend at Forward;
    /// The client closed before it sent a byte: a TCP health check or a port scan. Not logged.
    ZeroBytes = "zero_bytes": Client at Header;
    /// The PROXY header has the command LOCAL: a health check of the load balancer itself. Not logged.
    Local = "local": Client at Header;
    /// The connection came from an address outside the listener's `trusted-sources`; check who bypasses the load balancer.
    UntrustedSource = "untrusted_source": Proxy at Accept;
    /// `max-pending` connections without a complete header were open, and this one, the oldest, was closed to make room for a new one.
    PendingLimit = "pending_limit": Proxy at Header;
    /// The process is at or near `max-sessions`, and the tenant holds more than its share.
    Shed = "shed": Proxy at Tenant;
    /// The PROXY header was not complete within `timeouts.header`; the time is shorter while more than half of `max-pending` is in use.
    HeaderTimeout = "header_timeout": Proxy at Header;
    /// The client closed in the middle of the PROXY header.
    HeaderTruncated = "header_truncated": Client at Header;
    /// The first bytes are not a PROXY v2 header; check that `proxy_protocol_v2.enabled` is on in the target group.
    NoSignature = "no_signature": Proxy at Header;
    /// A UDP datagram without a PROXY header; with `bare-datagrams = "follow"`, from a source address that has no flow.
    NoHeader = "no_header": Proxy at Header;
    /// A UDP datagram without a PROXY header (`bare-datagrams = "follow"`) from a source address that has or recently had several flows.
    Ambiguous = "ambiguous": Proxy at Header;
    /// The PROXY header's version is not 2.
    BadVersion = "bad_version": Proxy at Header;
    /// The PROXY header's command is neither LOCAL nor PROXY.
    BadCommand = "bad_command": Proxy at Header;
    /// The PROXY header's address family or transport is unknown.
    BadFamily = "bad_family": Proxy at Header;
    /// The PROXY header announces UDP on a TCP connection, or TCP in a UDP datagram.
    WrongTransport = "wrong_transport": Proxy at Header;
    /// The PROXY header announces more than 4,096 bytes.
    HeaderTooLong = "header_too_long": Proxy at Header;
    /// The PROXY header is too short for the addresses of its family.
    ShortAddress = "short_address": Proxy at Header;
    /// A TLV of the PROXY header exceeds the header, or bytes remain after the last TLV.
    TlvOverrun = "tlv_overrun": Proxy at Header;
    /// The PROXY header has a CRC32C TLV of a wrong length, or more than one.
    BadCrcTlv = "bad_crc_tlv": Proxy at Header;
    /// The CRC32C of the PROXY header is wrong: the header was damaged or forged.
    CrcMismatch = "crc_mismatch": Proxy at Header;
    /// The PROXY header names two different VPC endpoints.
    AmbiguousEndpoint = "ambiguous_endpoint": Proxy at Header;
    /// The PROXY header names no VPC endpoint (the client did not come through PrivateLink), and `on-no-endpoint` is `reject`.
    NoEndpoint = "no_endpoint": Proxy at Tenant;
    /// No tenant lists this VPC endpoint, and `on-unknown-endpoint` is `reject`; add the endpoint to a tenant.
    UnknownEndpoint = "unknown_endpoint": Proxy at Tenant;
    /// The tenant has `state = "disabled"`.
    TenantDisabled = "tenant_disabled": Proxy at Tenant;
    /// The tenant is at its `limits.sessions`.
    SessionLimit = "session_limit": Proxy at Tenant;
    /// The tenant opens sessions faster than its `limits.session-rate`.
    SessionRate = "session_rate": Proxy at Tenant;
    /// The tenant is at its `limits.flows`, and none of its flows was idle long enough to be replaced.
    FlowLimit = "flow_limit": Proxy at Tenant;
    /// The datagram would have started a flow but exceeds the tenant's `limits.datagram-rate` or `limits.to-backend`.
    DatagramLimit = "datagram_limit": Proxy at Tenant;
    /// Neither the tenant's `routes`, the tenant nor the listener names a pool.
    NoPool = "no_pool": Proxy at Tenant;
    /// No backend of the pool can be used: all are unhealthy, removed or have weight 0.
    NoBackend = "no_backend": Proxy at Pool;
    /// All usable backends of the pool are at their `max-sessions`, and the queue is full.
    PoolFull = "pool_full": Proxy at Pool;
    /// The tenant holds its share of the pool's `max-sessions` and of the queue.
    PoolShare = "pool_share": Proxy at Pool;
    /// The session waited `queue.timeout` in the pool's queue, and no backend had room.
    QueueTimeout = "queue_timeout": Proxy at Pool;
    /// The last backend tried refused the connection.
    ConnectRefused = "connect_refused": Backend at Connect;
    /// The last backend tried did not answer within `timeouts.connect`.
    ConnectTimeout = "connect_timeout": Proxy at Connect;
    /// There is no network route to the last backend tried.
    ConnectUnreachable = "connect_unreachable": Proxy at Connect;
    /// No local port was free towards the backend (for UDP: towards all backends), or the tenant holds its share of them; see docs/sizing.md.
    NoLocalPort = "no_local_port": Proxy at Connect;
    /// The proxy ran out of file descriptors or socket memory.
    Shortage = "shortage": Proxy at Connect, Proxy at Header, Client at Forward, Backend at Forward;
    /// The connection to the last backend tried failed with another error.
    ConnectFailed = "connect_failed": Backend at Connect;
    /// One side reset the connection (TCP RST), and the other side was reset too; for a UDP flow: the backend's host answered ICMP port unreachable.
    Reset = "reset": Client at Header, Client at Tenant, Client at Pool, Client at Connect, Client at Forward, Backend at Forward;
    /// No byte in either direction for `timeouts.idle` (UDP: no datagram for `timeouts.flow-idle`), or no bandwidth for the first bytes during that time.
    IdleTimeout = "idle_timeout": Proxy at Tenant, Proxy at Forward;
    /// One side accepted none of the bytes waiting for it for `timeouts.stall`.
    Stalled = "stalled": Proxy at Forward;
    /// One side closed, and the other sent nothing for `timeouts.half-close`.
    HalfCloseTimeout = "half_close_timeout": Proxy at Forward;
    /// The connection was lost without a reset: nothing was acknowledged for `timeouts.tcp-user-timeout`, keepalive failed, or the network is unreachable.
    Unanswered = "unanswered": Client at Header, Client at Tenant, Client at Forward, Backend at Forward;
    /// The UDP flow was idle, and its place was given to a new flow.
    Evicted = "evicted": Proxy at Forward;
    /// A reload disabled or removed the tenant or took away its endpoint, and `on-revoke` is `end`.
    Revoked = "revoked": Proxy at Forward;
    /// The process drains: the session was idle for `drain.idle` or still open at `drain.deadline`.
    Drained = "drained": Proxy at Header, Proxy at Tenant, Proxy at Pool, Proxy at Connect, Proxy at Forward;
    /// Taken over by the new process, which continues the session and counts and logs its end. Not logged.
    Moved = "moved": Proxy at Forward;
    /// A bug in vestibule: a panic ended this session. The process log has the message; please report it.
    Internal = "internal": Proxy at Header, Proxy at Connect, Proxy at Forward;
}

impl Outcome {
    /// An outcome of the closed set.
    #[must_use]
    pub const fn new(by: EndedBy, at: EndedAt, why: Reason) -> Self {
        Self { by, at, why }
    }

    /// A rejection: the proxy ended it, by a rule.
    #[must_use]
    pub const fn reject(at: EndedAt, why: Reason) -> Self {
        Self { by: EndedBy::Proxy, at, why }
    }

    /// Its place in [`Outcome::ALL`]; `None` for a combination that must not occur.
    #[must_use]
    pub fn place(self) -> Option<usize> {
        Self::ALL.iter().position(|known| *known == self)
    }

    /// Whether this end stands in the access log. Load balancers ask every few seconds, and what has moved has not ended:
    /// that is counted only.
    #[must_use]
    pub const fn is_logged(self) -> bool {
        !matches!(self.why, Reason::ZeroBytes | Reason::Local | Reason::Moved)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {} at {}", self.why.as_str(), self.by.as_str(), self.at.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn words_are_unique_and_every_outcome_stands_once() {
        let words: BTreeSet<_> = Reason::ALL.iter().map(|why| why.as_str()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        let outcomes: BTreeSet<_> = Outcome::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(outcomes.len(), Outcome::ALL.len());
        for (place, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(outcome.place(), Some(place));
            assert!(!outcome.why.meaning().is_empty());
        }
    }

    #[test]
    fn record_uses_the_same_words() {
        for why in Reason::ALL {
            let word = serde_json::to_string(why).unwrap();
            assert_eq!(word, format!("\"{}\"", why.as_str()));
            assert_eq!(serde_json::from_str::<Reason>(&word).unwrap(), *why);
        }
        assert_eq!(
            serde_json::to_string(&EndedBy::Proxy).unwrap(),
            format!("\"{}\"", EndedBy::Proxy.as_str())
        );
    }

    #[test]
    fn impossible_outcome_has_no_index() {
        assert_eq!(Outcome::new(EndedBy::Backend, EndedAt::Accept, Reason::Done).place(), None);
    }

    #[test]
    fn health_checks_are_not_logged() {
        assert!(!Outcome::new(EndedBy::Client, EndedAt::Header, Reason::Local).is_logged());
        assert!(!Outcome::reject(EndedAt::Forward, Reason::Moved).is_logged());
        assert!(Outcome::reject(EndedAt::Header, Reason::CrcMismatch).is_logged());
        assert_eq!(
            Outcome::reject(EndedAt::Header, Reason::CrcMismatch).to_string(),
            "crc_mismatch by proxy at header"
        );
    }
}
