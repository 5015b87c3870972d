//! Causes of a backend's changes, and failures of sessions: closed sets.

use crate::account::ProbeResult;

/// The cause of a backend's last change: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeCause {
    /// It was there from the start.
    Start,
    /// It came with a reload.
    Reload,
    /// A probe, with its result.
    Probe(ProbeResult),
    /// Sessions could not connect to it, too often in a row: it is ejected.
    ConnectFailures,
    /// It reset sessions before its first byte, too often in a row: it is ejected.
    Resets,
    /// Its ejection is over.
    EjectionOver,
    /// Its name led to it for the first time, or with another weight.
    Resolved,
    /// Its name does not lead to it any more.
    NotResolved,
    /// The operator gave it another weight.
    Ordered,
}

/// A session's failure before the backend's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionFailure {
    /// It could not connect.
    Connect,
    /// It was reset, or lost its connection.
    Reset {
        /// Whose session it was, by its label's serial number.
        tenant: u32,
    },
}

impl From<SessionFailure> for ChangeCause {
    fn from(failed: SessionFailure) -> Self {
        match failed {
            SessionFailure::Connect => Self::ConnectFailures,
            SessionFailure::Reset { .. } => Self::Resets,
        }
    }
}

impl ChangeCause {
    /// The label in log, metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Reload => "reload",
            Self::Probe(verdict) => verdict.as_str(),
            Self::ConnectFailures => "connect_failures",
            Self::Resets => "resets",
            Self::EjectionOver => "ejection_over",
            Self::Resolved => "resolved",
            Self::NotResolved => "not_resolved",
            Self::Ordered => "ordered",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_cause_has_its_own_label() {
        let causes = [
            ChangeCause::Start,
            ChangeCause::Reload,
            ChangeCause::ConnectFailures,
            ChangeCause::Resets,
            ChangeCause::EjectionOver,
            ChangeCause::Resolved,
            ChangeCause::NotResolved,
            ChangeCause::Ordered,
            ChangeCause::Probe(ProbeResult::Passed),
        ];
        let words: std::collections::BTreeSet<_> = causes.map(ChangeCause::as_str).into();
        assert_eq!(words.len(), causes.len());
    }
}
