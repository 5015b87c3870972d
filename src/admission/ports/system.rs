//! The system's settings of local ports: the range, and when a port in TIME_WAIT is free again.

use std::ops::RangeInclusive;
use std::sync::Arc;

/// When the kernel reuses a port in TIME_WAIT, as `net.ipv4.tcp_tw_reuse` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeWaitReuse {
    /// 0: not before its 60 seconds are over, and a few more until the kernel notices that.
    Never,
    /// 1: after a second.
    Always,
    /// 2: after a second where the backend's address is a loopback address.
    Loopback,
}

/// The local ports that there are, in the order in which they are used first: every second one, then the rest. The kernel
/// does the same (`__inet_hash_connect`), so that `bind()` without a port finds some that are free.
#[derive(Clone, Debug)]
pub struct LocalPortRange(pub(super) Arc<[u16]>, RangeInclusive<u16>);

impl LocalPortRange {
    /// The ports from `low` to `high` that are not reserved.
    #[must_use]
    pub fn new(low: u16, high: u16, is_reserved: impl Fn(u16) -> bool) -> Self {
        let is_free = |port: &u16| *port > 0 && !is_reserved(*port);
        let first = (low..=high).step_by(2);
        let second = (low..=high).skip(1).step_by(2);
        Self(first.chain(second).filter(is_free).collect(), low..=high)
    }

    /// The count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the port is within their bounds; reserved ports between them are, too.
    #[must_use]
    pub fn spans(&self, port: u16) -> bool {
        self.1.contains(&port)
    }
}

impl Default for LocalPortRange {
    /// The kernel's own default.
    fn default() -> Self {
        Self::new(32_768, 60_999, |_| false)
    }
}
