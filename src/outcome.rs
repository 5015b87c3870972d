//! How a life ends: who ended it, at which step, and why. Every end has one, and the words are the same
//! in the access log, in metrics and in the README.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who ended a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum By {
    /// Whoever opened the connection (or the load balancer in its place).
    Client,
    /// The backend.
    Backend,
    /// vestibule itself, by a rule.
    Proxy,
}

/// At which step of its life a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum At {
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

/// Who, where, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// Who ended it.
    pub by: By,
    /// At which step.
    pub at: At,
    /// The reason.
    pub why: Why,
}

impl By {
    /// The word in log, metrics and documentation.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Backend => "backend",
            Self::Proxy => "proxy",
        }
    }
}

impl At {
    /// The word in log, metrics and documentation.
    #[must_use]
    pub const fn word(self) -> &'static str {
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

/// Builds `Why`, its words, its descriptions and the closed set of outcomes from one table.
macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $why:ident = $word:literal: $($by:ident at $at:ident),+;)+) => {
        /// The reason of an end: a closed set, so that it can be a metric's label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum Why {
            $($(#[doc = $doc])+ #[serde(rename = $word)] $why,)+
        }

        impl Why {
            /// Every reason, in the order of a session's life.
            pub const ALL: &[Self] = &[$(Self::$why,)+];

            /// The word in log, metrics and documentation.
            #[must_use]
            pub const fn word(self) -> &'static str {
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
            pub const ALL: &[Self] = &[$($(Self { by: By::$by, at: At::$at, why: Why::$why },)+)+];
        }
    };
}

outcomes! {
    /// Both sides have sent all they had; `by` is who ended first.
    Done = "done": Client at Forward, Backend at Forward;
    /// A connection closed before its first byte: a TCP health check or a listener test. Not logged.
    ZeroBytes = "zero_bytes": Client at Header;
    /// A header with the command LOCAL: the load balancer's own health check. Not logged.
    Local = "local": Client at Header;
    /// The peer is in none of the listener's `trusted-sources`.
    UntrustedSource = "untrusted_source": Proxy at Accept;
    /// The session had no whole header yet, had waited longest of `max-pending` that had none, and a newer one needed its place.
    PendingLimit = "pending_limit": Proxy at Header;
    /// The process has, or nearly has, `max-sessions` sessions, and the tenant holds more than its share.
    Shed = "shed": Proxy at Tenant;
    /// No whole header within `timeouts.header`, or within less where more than half of `max-pending` wait.
    HeaderTimeout = "header_timeout": Proxy at Header;
    /// The connection ended in the middle of its header.
    HeaderTruncated = "header_truncated": Client at Header;
    /// The first bytes are not the PROXY v2 signature.
    NoSignature = "no_signature": Proxy at Header;
    /// A datagram without a header; with `bare-datagrams = "follow"`, from a sender that has no flow.
    NoHeader = "no_header": Proxy at Header;
    /// A datagram without a header with `bare-datagrams = "follow"`, from a sender that has several flows or had them a moment ago.
    Ambiguous = "ambiguous": Proxy at Header;
    /// The header's version is not 2.
    BadVersion = "bad_version": Proxy at Header;
    /// The header's command is neither LOCAL nor PROXY.
    BadCommand = "bad_command": Proxy at Header;
    /// The header's address family or transport is none that the specification lists.
    BadFamily = "bad_family": Proxy at Header;
    /// A datagram header on a stream, or the reverse.
    WrongTransport = "wrong_transport": Proxy at Header;
    /// The header says that it is longer than 4,096 bytes.
    HeaderTooLong = "header_too_long": Proxy at Header;
    /// The header has no room for the addresses of its family.
    ShortAddress = "short_address": Proxy at Header;
    /// A TLV runs over the end of the header, or bytes are left over.
    TlvOverrun = "tlv_overrun": Proxy at Header;
    /// A CRC32C TLV that is not four bytes long, or a second one.
    BadCrcTlv = "bad_crc_tlv": Proxy at Header;
    /// The header's CRC32C does not match.
    CrcMismatch = "crc_mismatch": Proxy at Header;
    /// The header names two VPC endpoints that differ.
    AmbiguousEndpoint = "ambiguous_endpoint": Proxy at Header;
    /// The header names no VPC endpoint, and `on-no-endpoint` rejects.
    NoEndpoint = "no_endpoint": Proxy at Tenant;
    /// The header names a VPC endpoint that no tenant lists, and `on-unknown-endpoint` rejects.
    UnknownEndpoint = "unknown_endpoint": Proxy at Tenant;
    /// The tenant's state is `disabled`.
    TenantDisabled = "tenant_disabled": Proxy at Tenant;
    /// The tenant already has as many sessions as its `limits.sessions`.
    SessionLimit = "session_limit": Proxy at Tenant;
    /// The tenant's new sessions come faster than its `limits.session-rate`.
    SessionRate = "session_rate": Proxy at Tenant;
    /// The tenant already has as many flows as its `limits.flows`, and none that was silent for long.
    FlowLimit = "flow_limit": Proxy at Tenant;
    /// The datagram would have begun a flow, and was beyond the tenant's `limits.datagram-rate` or `limits.to-backend`.
    DatagramLimit = "datagram_limit": Proxy at Tenant;
    /// Neither route, tenant nor listener names a pool.
    NoPool = "no_pool": Proxy at Tenant;
    /// No backend of the pool may be used.
    NoBackend = "no_backend": Proxy at Pool;
    /// Every backend of the pool that may be used has its `max-sessions`, and so many wait already as may.
    PoolFull = "pool_full": Proxy at Pool;
    /// The tenant holds its share of the `max-sessions` of the pool's backends, and of the places to wait.
    PoolShare = "pool_share": Proxy at Pool;
    /// No backend of the pool had room within `queue.timeout`.
    QueueTimeout = "queue_timeout": Proxy at Pool;
    /// The last backend tried refused the connection.
    ConnectRefused = "connect_refused": Backend at Connect;
    /// The last backend tried did not answer within `timeouts.connect`.
    ConnectTimeout = "connect_timeout": Proxy at Connect;
    /// There is no way to the last backend tried.
    ConnectUnreachable = "connect_unreachable": Proxy at Connect;
    /// No local port is left towards the last backend tried, or the tenant holds its share of them.
    NoLocalPort = "no_local_port": Proxy at Connect;
    /// File descriptors or socket memory ran out.
    Shortage = "shortage": Proxy at Connect, Proxy at Header, Client at Forward, Backend at Forward;
    /// The connection to the last backend tried failed in another way.
    ConnectFailed = "connect_failed": Backend at Connect;
    /// The connection was reset, and the other side was reset in turn; of a flow: its backend's host said that nobody listens there any more.
    Reset = "reset": Client at Header, Client at Tenant, Client at Pool, Client at Connect, Client at Forward, Backend at Forward;
    /// No byte in either direction for `timeouts.idle`, or so long a wait at `tenant` for its bandwidth; no datagram for `timeouts.flow-idle`.
    IdleTimeout = "idle_timeout": Proxy at Tenant, Proxy at Forward;
    /// Bytes waited for one side, and it took none of them for `timeouts.stall`.
    Stalled = "stalled": Proxy at Forward;
    /// One side ended and the other sent nothing for `timeouts.half-close`.
    HalfCloseTimeout = "half_close_timeout": Proxy at Forward;
    /// The connection broke without a reset: nothing was acknowledged for `timeouts.tcp-user-timeout`, or its network is gone.
    Unanswered = "unanswered": Client at Header, Client at Tenant, Client at Forward, Backend at Forward;
    /// The flow was silent, and another one needed its place.
    Evicted = "evicted": Proxy at Forward;
    /// A reload disabled or removed the tenant, or took the endpoint away from it, and `on-revoke` is `end`.
    Revoked = "revoked": Proxy at Forward;
    /// The process is draining, and the session was silent or the deadline passed.
    Drained = "drained": Proxy at Header, Proxy at Tenant, Proxy at Pool, Proxy at Connect, Proxy at Forward;
    /// Another process has taken it over, and goes on with it: it ends there, and has its line there. Not logged.
    Moved = "moved": Proxy at Forward;
    /// A fault in vestibule itself; the log has the panic's message. Please report it.
    Internal = "internal": Proxy at Header, Proxy at Connect, Proxy at Forward;
}

impl Outcome {
    /// An outcome of the closed set.
    #[must_use]
    pub const fn new(by: By, at: At, why: Why) -> Self {
        Self { by, at, why }
    }

    /// A rejection: the proxy ended it, by a rule.
    #[must_use]
    pub const fn reject(at: At, why: Why) -> Self {
        Self { by: By::Proxy, at, why }
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
        !matches!(self.why, Why::ZeroBytes | Why::Local | Why::Moved)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {} at {}", self.why.word(), self.by.word(), self.at.word())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn words_are_unique_and_every_outcome_stands_once() {
        let words: BTreeSet<_> = Why::ALL.iter().map(|why| why.word()).collect();
        assert_eq!(words.len(), Why::ALL.len());
        let outcomes: BTreeSet<_> = Outcome::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(outcomes.len(), Outcome::ALL.len());
        for (place, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(outcome.place(), Some(place));
            assert!(!outcome.why.meaning().is_empty());
        }
    }

    #[test]
    fn in_a_record_the_words_are_the_same() {
        for why in Why::ALL {
            let word = serde_json::to_string(why).unwrap();
            assert_eq!(word, format!("\"{}\"", why.word()));
            assert_eq!(serde_json::from_str::<Why>(&word).unwrap(), *why);
        }
        assert_eq!(serde_json::to_string(&By::Proxy).unwrap(), format!("\"{}\"", By::Proxy.word()));
    }

    #[test]
    fn what_must_not_occur_has_no_place() {
        assert_eq!(Outcome::new(By::Backend, At::Accept, Why::Done).place(), None);
    }

    #[test]
    fn health_checks_are_not_logged() {
        assert!(!Outcome::new(By::Client, At::Header, Why::Local).is_logged());
        assert!(!Outcome::reject(At::Forward, Why::Moved).is_logged());
        assert!(Outcome::reject(At::Header, Why::CrcMismatch).is_logged());
        assert_eq!(
            Outcome::reject(At::Header, Why::CrcMismatch).to_string(),
            "crc_mismatch by proxy at header"
        );
    }
}
