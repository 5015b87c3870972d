//! How an attempt to connect a backend ended: a closed set, so that it can be a metric's label.

/// How an attempt to connect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Connect {
    Done,
    Refused,
    Timeout,
    Unreachable,
    NoLocalPort,
    Shortage,
    Failed,
}

impl Connect {
    /// Every result.
    pub const ALL: [Self; 7] = [
        Self::Done,
        Self::Refused,
        Self::Timeout,
        Self::Unreachable,
        Self::NoLocalPort,
        Self::Shortage,
        Self::Failed,
    ];

    /// The word in metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "connect_refused",
            Self::Timeout => "connect_timeout",
            Self::Unreachable => "connect_unreachable",
            Self::NoLocalPort => "no_local_port",
            Self::Shortage => "shortage",
            Self::Failed => "connect_failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_has_a_word_of_its_own() {
        let words: std::collections::BTreeSet<_> = Connect::ALL.map(Connect::word).into();
        assert_eq!(words.len(), Connect::ALL.len());
    }
}
