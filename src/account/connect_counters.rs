//! Results of connection attempts and probes: closed sets, so that they can be metric labels.

/// The result of an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ConnectResult {
    Done,
    Refused,
    Timeout,
    Unreachable,
    NoLocalPort,
    Shortage,
    Failed,
}

impl ConnectResult {
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

    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
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

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ProbeResult {
    /// The backend does what is asked of it.
    Passed,
    /// Nothing listens there.
    ConnectRefused,
    /// It did not accept in time.
    ConnectTimeout,
    /// There is no way to it.
    ConnectUnreachable,
    /// The connection failed in another way.
    ConnectFailed,
    /// It reset the connection before its answer was whole.
    Reset,
    /// It ended the connection before its answer was whole.
    Closed,
    /// Its answer was not whole in time.
    AnswerTimeout,
    /// Its answer has no end within the bytes that are read.
    AnswerTooLong,
    /// Its answer is no HTTP/1 response.
    AnswerMalformed,
    /// It answers with TLS, and was asked in the clear.
    AnswerTls,
    /// Its HTTP status is none of the expected.
    UnexpectedStatus,
    /// Its answer is not the expected one.
    UnexpectedAnswer,
    /// No local port was left: says nothing of the backend.
    NoLocalPort,
    /// Descriptors or memory were short here: says nothing of the backend.
    Shortage,
}

impl ProbeResult {
    /// Every result.
    pub const ALL: [Self; 15] = [
        Self::Passed,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectUnreachable,
        Self::ConnectFailed,
        Self::Reset,
        Self::Closed,
        Self::AnswerTimeout,
        Self::AnswerTooLong,
        Self::AnswerMalformed,
        Self::AnswerTls,
        Self::UnexpectedStatus,
        Self::UnexpectedAnswer,
        Self::NoLocalPort,
        Self::Shortage,
    ];

    /// The label in log, metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectUnreachable => "connect_unreachable",
            Self::ConnectFailed => "connect_failed",
            Self::Reset => "reset",
            Self::Closed => "closed",
            Self::AnswerTimeout => "answer_timeout",
            Self::AnswerTooLong => "answer_too_long",
            Self::AnswerMalformed => "answer_malformed",
            Self::AnswerTls => "answer_tls",
            Self::UnexpectedStatus => "unexpected_status",
            Self::UnexpectedAnswer => "unexpected_answer",
            Self::NoLocalPort => "no_local_port",
            Self::Shortage => "shortage",
        }
    }

    /// Whether the backend is healthy; `None` if the probe could not tell.
    #[must_use]
    pub const fn is_success(self) -> Option<bool> {
        match self {
            Self::Passed => Some(true),
            Self::NoLocalPort | Self::Shortage => None,
            Self::ConnectRefused
            | Self::ConnectTimeout
            | Self::ConnectUnreachable
            | Self::ConnectFailed
            | Self::Reset
            | Self::Closed
            | Self::AnswerTimeout
            | Self::AnswerTooLong
            | Self::AnswerMalformed
            | Self::AnswerTls
            | Self::UnexpectedStatus
            | Self::UnexpectedAnswer => Some(false),
        }
    }
}

impl From<ConnectResult> for ProbeResult {
    fn from(result: ConnectResult) -> Self {
        match result {
            ConnectResult::Done => Self::Passed,
            ConnectResult::Refused => Self::ConnectRefused,
            ConnectResult::Timeout => Self::ConnectTimeout,
            ConnectResult::Unreachable => Self::ConnectUnreachable,
            ConnectResult::NoLocalPort => Self::NoLocalPort,
            ConnectResult::Shortage => Self::Shortage,
            ConnectResult::Failed => Self::ConnectFailed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsent_probe_has_no_verdict() {
        let silent = ProbeResult::ALL.into_iter().filter(|verdict| verdict.is_success().is_none());
        assert_eq!(silent.collect::<Vec<_>>(), [ProbeResult::NoLocalPort, ProbeResult::Shortage]);
        for result in ConnectResult::ALL {
            let same = result == ConnectResult::Done || ProbeResult::from(result).as_str() == result.as_str();
            assert!(same, "{result:?}");
        }
        let words: std::collections::BTreeSet<_> = ProbeResult::ALL.map(ProbeResult::as_str).into();
        assert_eq!(words.len(), ProbeResult::ALL.len());
        assert!(ProbeResult::ALL.iter().enumerate().all(|(place, verdict)| *verdict as usize == place));
    }

    #[test]
    fn every_result_has_its_own_label() {
        let words: std::collections::BTreeSet<_> = ConnectResult::ALL.map(ConnectResult::as_str).into();
        assert_eq!(words.len(), ConnectResult::ALL.len());
    }
}
