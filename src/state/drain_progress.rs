//! The progress of the shutdown, for status and metrics.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;

/// A phase of the shutdown: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum DrainPhase {
    /// No drain has been requested.
    Serving,
    /// The health check says 503, and connections are still accepted.
    Notice,
    /// Listening sockets are closed; existing sessions may finish.
    Closing,
}

impl DrainPhase {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Serving, Self::Notice, Self::Closing];

    /// The label in log, metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Notice => "notice",
            Self::Closing => "closing",
        }
    }
}

/// The progress of a drain.
#[derive(Debug, Default)]
pub struct DrainProgress {
    phase: AtomicU8,
    /// When it began, and when it is over at the latest, in nanoseconds.
    since: AtomicU64,
    deadline: AtomicU64,
}

impl DrainProgress {
    /// The notice begins; what is left after `deadline` is ended.
    pub fn begin(&self, now: Moment, deadline: Duration) {
        self.since.store(now.as_nanos(), Ordering::Release);
        self.deadline.store((now + deadline).as_nanos(), Ordering::Release);
        self.phase.store(DrainPhase::Notice as u8, Ordering::Release);
    }

    /// The listening sockets close.
    pub fn close(&self) {
        self.phase.store(DrainPhase::Closing as u8, Ordering::Release);
    }

    /// The phase.
    #[must_use]
    pub fn phase(&self) -> DrainPhase {
        let phase = self.phase.load(Ordering::Acquire);
        DrainPhase::ALL.into_iter().rfind(|known| *known as u8 <= phase).unwrap_or(DrainPhase::Serving)
    }

    /// How long it has been going on, and how long it may go on yet; `None` before it begins.
    #[must_use]
    pub fn time(&self, now: Moment) -> Option<(Duration, Duration)> {
        let moment = |nanos: &AtomicU64| Moment::from_nanos(nanos.load(Ordering::Acquire));
        let begun = self.phase() > DrainPhase::Serving;
        begun.then(|| (now.since(moment(&self.since)), moment(&self.deadline).since(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_phase_only_advances_and_reports_its_time() {
        let (draining, at) =
            (DrainProgress::default(), |seconds: u64| Moment::from_nanos(seconds * 1_000_000_000));
        assert_eq!((draining.phase(), draining.time(at(9))), (DrainPhase::Serving, None));
        draining.begin(at(10), Duration::from_secs(300));
        let seconds = |moment| draining.time(moment).map(|(took, left)| (took.as_secs(), left.as_secs()));
        assert_eq!((draining.phase(), seconds(at(15))), (DrainPhase::Notice, Some((5, 295))));
        draining.close();
        assert_eq!((draining.phase(), seconds(at(400))), (DrainPhase::Closing, Some((390, 0))));
        assert_eq!(DrainPhase::ALL.map(DrainPhase::as_str), ["serving", "notice", "closing"]);
    }
}
