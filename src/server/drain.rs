//! The graceful shutdown: notice, quiet, idle, deadline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::notify;
use crate::clock::wheel::TickSpan;
use crate::clock::{self, Moment};
use crate::config::DrainConfig;
use crate::state::LiveState;
use crate::state::worker_loads::WorkerLoads;

/// What workers do in the shutdown. It only goes forward. What status and metrics say of it is the
/// [phase](crate::state::drain_progress::DrainPhase).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkerStage {
    /// Connections are accepted.
    Serving,
    /// Listening sockets are closed; sessions that are silent for `idle` are ended.
    Closing {
        /// The idle timeouts of a session.
        idle: TickSpan,
    },
    /// Every session is ended.
    Over,
}

/// How often the drain looks around.
const LOOK: Duration = Duration::from_millis(20);

/// How often it says how far it has come.
const TELL: Duration = Duration::from_secs(5);

/// Waits for the order to drain and carries it out; returns once the process is over.
pub(super) async fn run(
    live: &LiveState,
    loads: &WorkerLoads,
    stage: watch::Sender<WorkerStage>,
    mut orders: watch::Receiver<bool>,
) {
    let mut stages = stage.subscribe();
    tokio::select! {
        ordered = orders.wait_for(|drain| *drain) => {
            if ordered.is_ok() {
                live.draining.begin(clock::now(), live.config.load().drain.deadline);
                notify::stopping();
            }
        }
        () = over(&mut stages) => return,
    }
    // Those in force when it starts.
    let rules = live.config.load().drain;
    tokio::select! {
        () = drain(&rules, live, loads, &stage) => {}
        () = over(&mut stages) => {}
    }
    stage.send_replace(WorkerStage::Over);
}

/// Waits until the process is over. A closed channel is its end too.
pub(super) async fn over(stages: &mut watch::Receiver<WorkerStage>) {
    let reached = stages.wait_for(|stage| *stage == WorkerStage::Over).await;
    drop(reached);
}

async fn drain(
    rules: &DrainConfig,
    live: &LiveState,
    loads: &WorkerLoads,
    stage: &watch::Sender<WorkerStage>,
) {
    let start = clock::now();
    let left = |now: Moment| rules.deadline.saturating_sub(now.since(start));
    tracing::info!(sessions = loads.total(), notice = ?rules.notice, quiet = ?rules.quiet, "draining");
    let mut last_new = start;
    let mut seen = identified(live);
    let mut progress = ProgressLog { live, loads, told: start };
    loop {
        let now = clock::now();
        progress.tell(now);
        let count = identified(live);
        if count != seen {
            (seen, last_new) = (count, now);
        }
        if left(now).is_zero() || (now.since(start) >= rules.notice && now.since(last_new) >= rules.quiet) {
            break;
        }
        sleep(LOOK).await;
    }
    tracing::info!(sessions = loads.total(), idle = ?rules.idle, "listeners closed");
    live.draining.close();
    stage.send_replace(WorkerStage::Closing { idle: TickSpan::of(rules.idle) });
    // A socket that closes first serves what the kernel had accepted: until all have, new sessions may still come.
    while loads.open_sockets() + loads.total() > 0 && !left(clock::now()).is_zero() {
        progress.tell(clock::now());
        sleep(LOOK).await;
    }
    tracing::info!(sessions_ended = loads.total(), took = ?clock::now().since(start), "drained");
}

/// Logs the progress of a drain.
struct ProgressLog<'l> {
    live: &'l LiveState,
    loads: &'l WorkerLoads,
    told: Moment,
}

impl ProgressLog<'_> {
    fn tell(&mut self, now: Moment) {
        let Some((_, left)) = self.live.draining.time(now).filter(|_| now.since(self.told) >= TELL) else {
            return;
        };
        self.told = now;
        let stage = self.live.draining.phase().as_str();
        tracing::info!(
            stage,
            sessions_left = self.loads.total(),
            deadline_in_s = left.as_secs(),
            "still draining"
        );
    }
}

/// Sessions that came so far. Health checks are left out: they go on as long as the load balancer knows the target.
fn identified(live: &LiveState) -> u64 {
    live.shards.iter().map(|shard| shard.worker.identified.value()).sum()
}
