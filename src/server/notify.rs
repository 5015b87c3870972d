//! Notifications to systemd (`Type=notify`, `sd_notify(3)`), if `NOTIFY_SOCKET` is set.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::thread::Builder;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::clock;
use crate::fault::{self, Syscall};
use crate::state::LiveState;
use crate::state::drain_progress::DrainPhase;
use crate::state::worker_loads::WorkerLoads;

/// How often it is looked whether there is something to tell.
const LOOK: Duration = Duration::from_secs(1);

/// How often the number of sessions alone is worth telling, in looks; and how often a drain asks for more time.
const SELDOM: u32 = 5;

/// How much longer systemd is asked to wait for a drain each time: several times as long as it takes to ask again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reports readiness: at the start, and again after a reload.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// A process serves in this one's place, once it says [`ready`] itself.
///
/// Sent before this returns: the process may end at once after a handover.
pub(crate) fn main_pid(pid: u32) {
    if let Err(error) = sd_notify::notify(&[NotifyState::MainPid(pid)]) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

/// Reports a reload in progress; [`ready`] ends it.
pub(super) fn reloading() {
    // The time, of systemd's own clock, is what Type=notify-reload tells this one from an earlier reload by.
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
}

/// Reports that the process stops.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping, more_time()]);
}

/// Systemd would kill a drain that takes longer than `TimeoutStopSec`; asked in time, it waits.
fn more_time() -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(PATIENCE.as_micros()).unwrap_or(u32::MAX))
}

/// Messages that may wait for systemd.
const WAITING: usize = 64;

/// A thread of its own, as a systemd that takes nothing in must hold up neither the health check nor a reload. `None`
/// where `NOTIFY_SOCKET` is not set.
static TELLER: LazyLock<Option<SyncSender<String>>> = LazyLock::new(|| {
    std::env::var_os("NOTIFY_SOCKET")?;
    let (sender, messages) = sync_channel::<String>(WAITING);
    let tell_all = move || {
        for message in messages {
            if let Err(error) = sd_notify::notify(&[NotifyState::Custom(&message)]) {
                tracing::warn!(%error, "cannot notify systemd");
            }
        }
    };
    Builder::new().name("notify".to_owned()).spawn(tell_all).ok().map(|_| sender)
});

fn notify(states: &[NotifyState<'_>]) {
    let Some(teller) = &*TELLER else { return };
    let lines: Vec<_> = states.iter().map(ToString::to_string).collect();
    // One that does not listen misses what there is no room for.
    teller.try_send(lines.join("\n")).unwrap_or_default();
}

/// Sends the status when it changes, and pings the watchdog, if any, that all workers go on. For as long as the
/// process runs.
pub(super) async fn run(live: Arc<LiveState>, loads: Arc<WorkerLoads>) {
    let watchdog = sd_notify::watchdog_enabled();
    // At twice the rate that is asked for, as `sd_watchdog_enabled(3)` recommends.
    let look = watchdog.map_or(LOOK, |limit| (limit / 2).clamp(Duration::from_millis(1), LOOK));
    let mut ticks = interval(look);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = LastStatus::default();
    let mut beats = Vec::new();
    loop {
        ticks.tick().await;
        fault::panic_at(Syscall::ControlPanic);
        let news = told.changed_status(&live, &loads);
        let mut states: Vec<_> = news.as_deref().map(NotifyState::Status).into_iter().collect();
        if news.is_some() && live.is_draining() {
            states.push(more_time());
        }
        if watchdog.is_some() {
            let now: Vec<u64> = live.shards.iter().map(|shard| shard.worker.ticks.value()).collect();
            // A worker that stands still is not told of: systemd acts once its time is over.
            if now.len() != beats.len() || now.iter().zip(&beats).all(|(now, before)| now != before) {
                states.push(NotifyState::Watchdog);
                beats = now;
            }
        }
        if !states.is_empty() {
            notify(&states);
        }
    }
}

/// The status sent last.
#[derive(Default)]
struct LastStatus {
    /// What is told of at once where it changes.
    what: Option<(DrainPhase, bool)>,
    text: String,
    looks: u32,
}

impl LastStatus {
    /// What there is to tell now, if anything.
    fn changed_status(&mut self, live: &LiveState, loads: &WorkerLoads) -> Option<String> {
        let what = (live.draining.phase(), live.reloads.last_was_successful());
        self.looks += 1;
        if self.what == Some(what) && self.looks < SELDOM {
            return None;
        }
        self.looks = 0;
        let text = text(what, loads.total(), live.draining.time(clock::now()).map(|(_, left)| left));
        if self.what == Some(what) && self.text == text {
            return None;
        }
        self.what = Some(what);
        self.text.clone_from(&text);
        Some(text)
    }
}

fn text((phase, successful): (DrainPhase, bool), sessions: usize, left: Option<Duration>) -> String {
    let refused = if successful { "" } else { "; last reload refused, see the log" };
    let left = left.map_or(0, |left| left.as_secs());
    match phase {
        DrainPhase::Serving => format!("serving, {sessions} sessions{refused}"),
        DrainPhase::Notice => {
            format!("draining, still accepting: {sessions} sessions, {left} s to the deadline")
        }
        DrainPhase::Closing => {
            format!("draining, listeners closed: {sessions} sessions left, {left} s to the deadline")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notify_status_is_one_line() {
        assert_eq!(text((DrainPhase::Serving, true), 12, None), "serving, 12 sessions");
        let refused = text((DrainPhase::Serving, false), 0, None);
        assert_eq!(refused, "serving, 0 sessions; last reload refused, see the log");
        let left = Some(Duration::from_secs(290));
        for (phase, said) in
            [(DrainPhase::Notice, "still accepting"), (DrainPhase::Closing, "listeners closed")]
        {
            let text = text((phase, true), 3, left);
            assert!(text.contains(said) && text.ends_with("290 s to the deadline"), "{text}");
        }
    }
}
