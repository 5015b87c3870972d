//! Active health checks: each backend is asked at its interval, by tasks of the control thread.

pub mod exchange;
pub mod response;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::account::ProbeResult;
use crate::admission::ports::LocalPorts;
use crate::clock::{self, Moment};
use crate::config::ProbeConfig;
use crate::pool::Pool;
use crate::pool::backend::Backend;

/// First probes start at least so close to each other, so that a few backends are known at once.
const STEP: Duration = Duration::from_millis(2);

/// From one warning that a backend's probes cannot be sent to the next.
const WARNING: Duration = Duration::from_secs(60);

/// Bounds the concurrent probes of the process; each needs a descriptor of the reserve.
///
/// Where there are fewer lanes than probes want, those come later than their interval says, in turn, and none is left out.
#[derive(Debug)]
pub struct ProbeSlots(Semaphore);

impl ProbeSlots {
    /// Room for so many probes under way at once.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self(Semaphore::new(at_once))
    }
}

/// Spreads the first probes of backends that are due together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeStagger {
    /// Its place, from 0.
    pub place: usize,
    /// How many they are.
    pub of: usize,
}

/// Probes a backend of `pool`, and its replacements after reloads, until it is removed. Returns at once where the
/// pool has no probe.
///
/// What a probe waits for its lane is neither its time nor a failure.
pub async fn run(
    mut pool: Arc<Pool>,
    mut backend: Arc<Backend>,
    turn: ProbeStagger,
    (lanes, ports): (Arc<ProbeSlots>, Arc<LocalPorts>),
) {
    let Some(probe) = &pool.probe else { return };
    let mut schedule = ProbeSchedule::new(probe, turn, clock::now());
    let mut warned = None;
    loop {
        sleep(schedule.due.since(clock::now())).await;
        // After a reload, pool and backend are the replacements; the schedule continues.
        let Some(followed) = pool.follow(&backend) else { break };
        (pool, backend) = followed;
        let Some(probe) = &pool.probe else { break };
        // The semaphore is never closed.
        let Ok(lane) = lanes.0.acquire().await else { break };
        let start = clock::now();
        let verdict = exchange::ask(backend.address(), (&pool.sources, &ports), probe).await;
        drop(lane);
        if backend.is_removed() {
            break;
        }
        let now = clock::now();
        if let Some(change) = pool.observe(&backend, verdict, now.since(start), now) {
            change.log(&pool);
        }
        // A local shortage is not a failure of the backend: a busy process must not mark its backends unhealthy.
        if verdict.is_success().is_none() && is_due(warned, now) {
            warn(&pool, &backend, verdict);
            warned = Some(now);
        }
        schedule.advance(now, Duration::from_nanos(fastrand::u64(0..=schedule.most_jitter())));
    }
}

fn is_due(warned: Option<Moment>, now: Moment) -> bool {
    warned.is_none_or(|warned| now.since(warned) >= WARNING)
}

fn warn(pool: &Pool, backend: &Backend, verdict: ProbeResult) {
    tracing::warn!(
        pool = pool.label.name(),
        backend = backend.label().name(),
        reason = verdict.as_str(),
        "cannot send a probe"
    );
}

/// The probe schedule of a backend.
#[derive(Debug)]
struct ProbeSchedule {
    interval: Duration,
    due: Moment,
    /// From the first probe to the second, until that is due.
    second: Option<Duration>,
}

impl ProbeSchedule {
    /// The first probes of all are spread over what the interval leaves beside a probe's time, so that the first round is
    /// over within it; over half of it where that is more, for then few take their whole time.
    fn new(probe: &ProbeConfig, turn: ProbeStagger, now: Moment) -> Self {
        let span = probe.interval.saturating_sub(probe.timeout).max(probe.interval / 2);
        let parts = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let step = STEP.min(span / parts(turn.of).max(1));
        let offset = step.saturating_mul(parts(turn.place)).min(span);
        // The second probes spread over the whole interval, and so do all that follow.
        let rest = probe.interval.saturating_sub(span);
        let second = span + (rest / parts(turn.of).max(1)).saturating_mul(parts(turn.place)).min(rest);
        Self { interval: probe.interval, due: now + offset, second: Some(second) }
    }

    /// The greatest jitter of [`advance`](Self::advance), in nanoseconds: a fifth of the interval.
    fn most_jitter(&self) -> u64 {
        u64::try_from((self.interval / 5).as_nanos()).unwrap_or(u64::MAX)
    }

    /// The next probe is due nine tenths of the interval, and the jitter, after this one was: however long that took, the
    /// mean is the interval. Where that is more than an interval ago, what was missed is missed.
    fn advance(&mut self, now: Moment, jitter: Duration) {
        self.due = match self.second.take() {
            Some(second) => self.due + second,
            None => self.due + self.interval / 10 * 9 + jitter,
        };
        if now.since(self.due) > self.interval {
            self.due = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ProbeCheck;

    const START: Moment = Moment::from_nanos(1_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    fn config(interval: Duration, timeout: Duration) -> ProbeConfig {
        ProbeConfig {
            interval,
            timeout,
            rise: 1,
            fall: 1,
            port: None,
            send_proxy: false,
            ask: ProbeCheck::Connect,
        }
    }

    fn schedule(interval: Duration, timeout: Duration, place: usize, of: usize) -> ProbeSchedule {
        ProbeSchedule::new(&config(interval, timeout), ProbeStagger { place, of }, START)
    }

    #[test]
    fn first_probe_round_ends_within_the_interval() {
        for (interval, timeout, of, place, expected_ms) in [
            (5 * SECOND, SECOND, 1, 0, 0),
            (5 * SECOND, SECOND, 3, 2, 4),
            (5 * SECOND, SECOND, 2_000, 1_999, 3_998),
            (5 * SECOND, SECOND, 10_000, 5_000, 2_000),
            (5 * SECOND, SECOND, 10_000, 10_000, 4_000),
            (5 * SECOND, 5 * SECOND, 10_000, 10_000, 2_500),
            (5 * SECOND, SECOND, 0, 0, 0),
        ] {
            let due = schedule(interval, timeout, place, of).due;
            assert_eq!(
                due.since(START).as_millis(),
                expected_ms,
                "{place} of {of}, {timeout:?} of {interval:?}"
            );
        }
    }

    #[test]
    fn second_probe_round_is_spread_over_the_interval() {
        for (place, first_ms, second_ms) in [(0, 0, 4_000), (1_000, 2_000, 6_500), (1_999, 3_998, 8_997)] {
            let mut schedule = schedule(5 * SECOND, SECOND, place, 2_000);
            assert_eq!(schedule.due.since(START).as_millis(), first_ms);
            schedule.advance(schedule.due, SECOND);
            assert_eq!(schedule.due.since(START).as_millis(), second_ms);
        }
    }

    #[test]
    fn mean_probe_rate_does_not_depend_on_probe_duration() {
        let mut schedule = ProbeSchedule { second: None, ..schedule(SECOND, SECOND, 0, 1) };
        let (mut least, mut most) = (SECOND, SECOND);
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..10_000 {
            let before = schedule.due;
            let now = before + SECOND.mul_f64(random.f64());
            schedule.advance(now, Duration::from_nanos(random.u64(0..=schedule.most_jitter())));
            let gap = schedule.due.since(before);
            (least, most) = (least.min(gap), most.max(gap));
        }
        let millis = |span: Duration| span.as_secs_f64() * 1e3;
        assert!((900.0..905.0).contains(&millis(least)), "{least:?}");
        assert!((1_095.0..=1_100.0).contains(&millis(most)), "{most:?}");
        let mean = millis(schedule.due.since(START)) / 1e4;
        assert!((998.0..1_002.0).contains(&mean), "{mean}");
    }

    #[test]
    fn missed_probes_are_not_repeated() {
        let mut schedule = ProbeSchedule { second: None, ..schedule(SECOND, SECOND, 0, 1) };
        let late = START + 100 * SECOND;
        schedule.advance(late, SECOND / 10);
        assert_eq!(schedule.due, late);
        schedule.advance(late + SECOND * 2, SECOND / 10);
        assert_eq!(schedule.due, late + SECOND, "at most one");
    }

    #[test]
    fn shortage_is_logged_once_a_minute() {
        assert!(is_due(None, START));
        assert!(!is_due(Some(START), START + Duration::from_millis(59_999)));
        assert!(is_due(Some(START), START + WARNING));
    }

    #[test]
    fn waiting_probe_takes_little_memory() {
        let backend = crate::addr::BackendAddr("127.0.0.1:1".parse().unwrap());
        let size =
            size_of_val(&exchange::ask(backend, (&[], &LocalPorts::default()), &config(5 * SECOND, SECOND)));
        assert!(size < 2_048, "{size} bytes for each backend");
    }
}
