//! Bandwidth against plain sums: random sessions on two workers, whose ticks come when they like.

use vestibule::account::Direction;
use vestibule::admission::bandwidth::BandwidthBudget;
use vestibule::admission::bandwidth_queue::BandwidthQueue;
use vestibule::admission::direction_limiter::{BandwidthContext, DirectionLimiter, ReadGrant};
use vestibule::admission::quota::Quota;
use vestibule::clock::Moment;
use vestibule::config::BandwidthLimit;

use super::*;

const WAY: Direction = Direction::ToClient;

fn at_ms(ms: u64) -> Moment {
    // Not at the clock's start, where nothing can have been kept.
    Moment::from_nanos((10_000 + ms) * 1_000_000)
}

/// What a session sends.
#[derive(Clone, Copy, Debug)]
enum Appetite {
    /// All that it may.
    Greedy,
    /// So many bytes every so many milliseconds.
    Light(u64, u64),
    /// As much as it may, for so many milliseconds of twice as many.
    OnAndOff(u64),
}

fn appetite() -> impl Strategy<Value = Appetite> {
    prop_oneof![
        3 => Just(Appetite::Greedy),
        1 => (1..900_u64, 1..300_u64).prop_map(|(bytes, every)| Appetite::Light(bytes, every)),
        1 => (1..400_u64).prop_map(Appetite::OnAndOff),
    ]
}

struct Session {
    worker: usize,
    appetite: Appetite,
    limiter: DirectionLimiter,
    /// Bytes that are there to be read.
    ready: u64,
    since: u64,
    read: u64,
    /// The longest that a message had to wait.
    slowest_ms: u64,
    waker: Waker,
}

struct World {
    quota: Arc<Quota>,
    pacers: [BandwidthQueue; 2],
    /// When each worker's ticks come: how many milliseconds after the fiftieth.
    phases: [u64; 2],
    ticks: [u32; 2],
    sessions: Vec<Session>,
    /// Bytes in each millisecond.
    read: Vec<u64>,
}

/// So many reads a session does in a millisecond.
const READS: usize = 32;

impl World {
    fn new(rate: u64, burst: u64, phases: [u64; 2], sessions: &[(usize, Appetite)]) -> Self {
        let quota = Arc::new(Quota::default());
        quota.budget(WAY).set(Some(BandwidthLimit { bytes_per_second: rate, burst }), at_ms(0));
        let session = |(worker, appetite): &(usize, Appetite)| Session {
            worker: *worker,
            appetite: *appetite,
            limiter: DirectionLimiter::default(),
            ready: 0,
            since: 0,
            read: 0,
            slowest_ms: 0,
            waker: Waker::noop().clone(),
        };
        let sessions = sessions.iter().map(session).collect();
        Self { quota, pacers: Default::default(), phases, ticks: [1; 2], sessions, read: Vec::new() }
    }

    fn budget(&self) -> &BandwidthBudget {
        self.quota.budget(WAY)
    }

    /// A millisecond; `late` are the workers whose ticks have to wait.
    fn pass(&mut self, late: [bool; 2]) {
        let ms = self.read.len() as u64;
        for worker in [0, 1] {
            let due = (ms + 50 - self.phases[worker]) / 50;
            if !late[worker] && due >= u64::from(self.ticks[worker]) {
                self.ticks[worker] = u32::try_from(due).unwrap() + 1;
                self.pacers[worker].advance(at_ms(ms));
            }
        }
        let mut read = 0;
        for session in &mut self.sessions {
            match session.appetite {
                Appetite::Greedy => session.ready = u64::MAX,
                Appetite::OnAndOff(span) => {
                    session.ready = if (ms / span).is_multiple_of(2) { u64::MAX } else { 0 }
                }
                Appetite::Light(bytes, every) if ms.is_multiple_of(every) => {
                    if session.ready == 0 {
                        session.since = ms;
                    }
                    session.ready += bytes;
                }
                Appetite::Light(..) => {}
            }
            let tick = tick(self.ticks[session.worker]);
            let queue = &mut self.pacers[session.worker];
            read += session.turn(&self.quota, queue, tick, ms);
        }
        self.read.push(read);
    }

    fn total(&self) -> u64 {
        self.read.iter().sum()
    }
}

impl Session {
    /// Reads as long as there is something and it may; how much.
    fn turn(&mut self, quota: &Arc<Quota>, queue: &mut BandwidthQueue, tick: Tick, ms: u64) -> u64 {
        let mut read = 0;
        for _ in 0..READS {
            let mut context = BandwidthContext { quota, queue, direction: WAY };
            if self.ready == 0 && !self.limiter.is_waiting(context.queue) {
                self.limiter.leave(context.queue, at_ms(ms));
                return read;
            }
            let Some(grant) = self.limiter.request(&mut context, 64 * 1024, &self.waker, tick, at_ms(ms))
            else {
                return read;
            };
            assert!(matches!(grant, ReadGrant::Taken(_) | ReadGrant::Queued(_)), "{grant:?}");
            let count = (grant.most() as u64).min(self.ready);
            assert!(grant.most() > 0 && grant.most() <= 64 * 1024);
            self.limiter.settle(&mut context, grant, count, at_ms(ms));
            if self.ready != u64::MAX {
                self.ready -= count;
                if self.ready == 0 {
                    self.slowest_ms = self.slowest_ms.max(ms - self.since);
                }
            }
            self.read += count;
            read += count;
        }
        read
    }
}

fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let count = shares.len() as f64;
    sum * sum / (count * squares)
}

#[expect(clippy::cast_precision_loss, reason = "a test's tolerance is wider")]
fn float(count: u64) -> f64 {
    count as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sessions_never_get_more_than_the_rate(
        rate in prop_oneof![20_000..1_000_000_u64, 1_000_000..200_000_000_u64],
        burst_ms in 1..1000_u64,
        phases in prop::array::uniform2(0..50_u64),
        sessions in prop::collection::vec((0..2_usize, appetite()), 1..30),
        late in prop::collection::vec((0..2_usize, 0..4000_u64, 0..120_u64), 0..6),
        leavers in prop::collection::vec((any::<Index>(), 0..4000_u64), 0..4),
    ) {
        let burst = rate * burst_ms / 1000;
        let mut world = World::new(rate, burst, phases, &sessions);
        for ms in 0..4000 {
            for (which, when) in &leavers {
                if *when == ms && world.sessions.len() > 1 {
                    let mut session = world.sessions.swap_remove(which.index(world.sessions.len()));
                    session.limiter.leave(&mut world.pacers[session.worker], at_ms(ms));
                }
            }
            let is_late = |worker| late.iter().any(|(who, from, span)| *who == worker && (*from..from + span).contains(&ms));
            world.pass([is_late(0), is_late(1)]);
        }
        // Over any window: what comes in, the bucket (two ticks at least), the debt of the light (two), and what was
        // dealt before it and used in it (as much as a late tick keeps, at each worker).
        let bucket = burst.max(rate / 10);
        let most = |ms: u64| rate * ms / 1000 + bucket + rate / 10 + 2 * bucket.max(rate / 2) + 64 * 1024;
        let mut sums = vec![0];
        for read in &world.read {
            sums.push(sums.last().unwrap() + read);
        }
        for window in [1, 50, 333, 1000, 3000, 4000_usize] {
            for (from, to) in sums.iter().zip(&sums[window..]) {
                prop_assert!(to - from <= most(window as u64), "{} in {window} ms of {rate}", to - from);
            }
        }
        // Nothing is lost: where somebody greedy is there all the time, all that comes in is used.
        let greedy = world.sessions.iter().filter(|session| matches!(session.appetite, Appetite::Greedy)).count();
        if greedy > 0 && late.is_empty() && leavers.is_empty() {
            let pending = rate / 5 + 2 * 4096 * sessions.len() as u64;
            prop_assert!(world.total() + pending >= rate * 4, "{} of {}", world.total(), rate * 4);
        }
        // At the end nobody waits, and nothing is kept: after the debt is paid the bucket is as full as ever.
        for session in &mut world.sessions {
            session.limiter.leave(&mut world.pacers[session.worker], at_ms(4000));
        }
        prop_assert!(world.pacers.iter().all(BandwidthQueue::is_empty));
        prop_assert_eq!(world.budget().waiters(), 0);
        let full = world.budget().take(u64::MAX >> 24, 1, at_ms(4000 + 1200));
        prop_assert!(full >= bucket - bucket / 1000 - 1 && full <= bucket + 1, "{full} of {bucket}");
    }

    #[test]
    fn greedy_sessions_have_equal_shares_wherever_they_are(
        rate in prop_oneof![50_000..1_000_000_u64, 1_000_000..4_000_000_u64, 4_000_000..200_000_000_u64],
        phases in prop::array::uniform2(0..50_u64),
        split in 1..49_usize,
    ) {
        // Each has ten turns in it: of a page at least, and two a second where they are less than a read.
        let seconds = (50 * 10 * 4096 / rate).max(5);
        let sessions: Vec<_> = (0..50).map(|number| (usize::from(number < split), Appetite::Greedy)).collect();
        let mut world = World::new(rate, rate / 10, phases, &sessions);
        for _ in 0..1000 {
            world.pass([false; 2]);
        }
        let before: Vec<_> = world.sessions.iter().map(|session| session.read).collect();
        for _ in 0..seconds * 1000 {
            world.pass([false; 2]);
        }
        let shares: Vec<_> = world.sessions.iter().zip(before).map(|(session, before)| float(session.read - before)).collect();
        prop_assert!(jain(&shares) > 0.98, "{shares:?}");
        let total: f64 = shares.iter().sum();
        let expected = float(rate * seconds);
        prop_assert!((total / expected - 1.0).abs() < 0.02, "{total} of {expected}");
    }

    #[test]
    fn light_session_does_not_wait(
        rate in 1_000_000..200_000_000_u64,
        phases in prop::array::uniform2(0..50_u64),
        greedy in 1..40_usize,
        bytes in 1..500_u64,
    ) {
        // A message of at most 500 bytes in 25 ms: 1 KiB in a tick is everybody's.
        let mut sessions = vec![(0, Appetite::Light(bytes, 25)), (1, Appetite::Light(bytes, 26))];
        sessions.extend((0..greedy).map(|number| (number % 2, Appetite::Greedy)));
        let mut world = World::new(rate, rate / 10, phases, &sessions);
        for _ in 0..3000 {
            world.pass([false; 2]);
        }
        for session in &world.sessions[..2] {
            prop_assert_eq!(session.slowest_ms, 0);
        }
    }
}
