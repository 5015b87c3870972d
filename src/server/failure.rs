//! Ends the process when an essential task stops, instead of leaving a process that looks alive.

use std::process;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use super::drain::WorkerStage;

/// The exit status: an internal software error (`EX_SOFTWARE`, sysexits.h).
pub const STATUS: i32 = 70;

/// How long the exit may take before the process is aborted.
const EXIT: Duration = Duration::from_secs(5);

static BEFORE_EXIT: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// What is done before the process ends by a failure, such as writing the rest of its log. The first call counts.
pub fn before_exit(flush: impl Fn() + Send + Sync + 'static) {
    BEFORE_EXIT.set(Box::new(flush)).unwrap_or_default();
}

/// Ends the process at once.
pub(super) fn end(what: &str) -> ! {
    tracing::error!(
        what,
        status = STATUS,
        "an essential task stopped because of an internal error; the process ends so that it is restarted"
    );
    let abort = || {
        // A spurious early return is harmless.
        thread::park_timeout(EXIT);
        process::abort()
    };
    // If the thread cannot start, the exit has no time limit.
    thread::Builder::new().name("exit".to_owned()).spawn(abort).map(drop).unwrap_or_default();
    if let Some(flush) = BEFORE_EXIT.get() {
        flush();
    }
    process::exit(STATUS)
}

/// Held by an essential task or thread: if it panics, the process ends.
pub(super) struct EssentialTask {
    worker: Option<u16>,
    what: &'static str,
}

impl EssentialTask {
    /// One of a worker.
    pub(super) fn of_worker(number: u16, what: &'static str) -> Self {
        Self { worker: Some(number), what }
    }

    /// One of the whole process.
    pub(super) fn new(what: &'static str) -> Self {
        Self { worker: None, what }
    }
}

impl Drop for EssentialTask {
    fn drop(&mut self) {
        if thread::panicking() {
            let of = self.worker.map_or_else(String::new, |number| format!(" of worker {number}"));
            end(&format!("{}{of}", self.what));
        }
    }
}

/// A task whose panic ends the process.
pub async fn essential(what: &'static str, task: impl Future<Output = ()>) {
    let _vital = EssentialTask::new(what);
    task.await;
}

/// The same of one that goes on for as long as the process serves: where it returns before, that ends the process too.
pub(super) async fn lasting(
    what: &'static str,
    stages: tokio::sync::watch::Receiver<WorkerStage>,
    task: impl Future<Output = ()>,
) {
    essential(what, task).await;
    if is_serving(&stages) {
        end(what);
    }
}

/// Whether the process has not been told to end. A closed channel is its end.
pub(super) fn is_serving(stages: &tokio::sync::watch::Receiver<WorkerStage>) -> bool {
    stages.has_changed().is_ok() && matches!(*stages.borrow(), WorkerStage::Serving)
}
