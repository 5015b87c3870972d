//! `[process] watch`: a configuration file that changes is read again.

use std::future::pending;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

use crate::admin::control::Control as _;
use crate::config::sources::ConfigSources;
use crate::server::ProcessControl;

/// After a change, wait so long without another one: several files may be changed together.
const QUIET: Duration = Duration::from_millis(200);

/// So many times [`QUIET`] at the most.
const ROUNDS: u32 = 10;

/// How often files are looked at where nothing was told: folders that came later, and file systems that tell nothing.
const LOOK: Duration = Duration::from_secs(10);

/// Room for what is told at once.
const ROOM: usize = 4096;

/// Reloads whenever the files are others than the `known` ones, for as long as the process runs.
pub(super) async fn run(main: PathBuf, mut known: ConfigSources, control: Arc<ProcessControl>) {
    let mut watch = FolderWatch::new();
    if let Err(error) = &watch {
        tracing::warn!(%error, every = ?LOOK, "cannot use inotify; files are polled instead");
    }
    loop {
        if let Ok(watch) = &mut watch {
            watch.follow(&known);
        }
        // A file may have changed between the last check and the watch of a new folder.
        let now = sources(&main, known.clone()).await;
        if now.are_as(&known) {
            known = now;
            let told = async { if let Ok(watch) = &watch { watch.told().await } else { pending().await } };
            // After a timeout the files are checked as well.
            drop(timeout(LOOK, told).await);
            continue;
        }
        known = settled(&main, now).await;
        tracing::info!(file = %main.display(), "configuration file changed");
        let control = Arc::clone(&control);
        // `reload` logs and counts the result. The next change starts the next attempt.
        if let Err(error) = tokio::task::spawn_blocking(move || control.reload()).await {
            tracing::error!(%error, "internal error during a reload");
        }
    }
}

/// Looks until nothing has changed for [`QUIET`]: a file that is being written has its first half.
async fn settled(main: &Path, mut now: ConfigSources) -> ConfigSources {
    for _ in 0..ROUNDS {
        sleep(QUIET).await;
        let next = sources(main, now.clone()).await;
        let same = next.are_as(&now);
        now = next;
        if same {
            break;
        }
    }
    now
}

/// Looks at the files, which may take a while.
async fn sources(main: &Path, before: ConfigSources) -> ConfigSources {
    let (main, kept) = (main.to_owned(), before.clone());
    tokio::task::spawn_blocking(move || ConfigSources::of(&main, &before)).await.unwrap_or(kept)
}

/// Watches folders for changes (inotify).
struct FolderWatch {
    inotify: AsyncFd<OwnedFd>,
}

impl FolderWatch {
    fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an OwnedFd keeps its descriptor, as both ask"
        )]
        let inotify = AsyncFd::new(inotify)?;
        Ok(Self { inotify })
    }

    /// Watches these folders too. One that is watched already stays so, and one that is gone tells nothing more.
    fn follow(&mut self, sources: &ConfigSources) {
        // Without events for each write: a log file in the same folder would cause them all the time.
        let what = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        for folder in &sources.folders {
            if let Err(error) = inotify::add_watch(&self.inotify, folder, what) {
                tracing::debug!(folder = %folder.display(), %error, "cannot watch a folder");
            }
        }
    }

    /// Waits until something is told, and takes it all in. What it was does not matter: the files are looked at.
    async fn told(&self) {
        let Ok(mut ready) = self.inotify.readable().await else { return sleep(LOOK).await };
        let mut room = [MaybeUninit::uninit(); ROOM];
        let mut events = Reader::new(&self.inotify, &mut room);
        let mut any = false;
        loop {
            match events.next() {
                Ok(_) => any = true,
                Err(Errno::AGAIN) => {
                    ready.clear_ready();
                    break;
                }
                Err(_) => break,
            }
        }
        if !any {
            // No event was read: the descriptor is broken, or the wakeup was spurious. Waits, to avoid a busy loop.
            sleep(QUIET).await;
        }
    }
}
