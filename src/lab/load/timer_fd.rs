//! A clock that wakes to the microsecond: tokio's timers have milliseconds, and spinning would take the core that the
//! backend runs on.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

use crate::clock::{self, Moment};

/// A timer of the kernel's: `timerfd_create(2)`.
#[derive(Debug)]
pub(super) struct TimerFd(AsyncFd<OwnedFd>);

impl TimerFd {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an OwnedFd keeps its descriptor, as both ask"
        )]
        let timer = AsyncFd::new(timer)?;
        Ok(Self(timer))
    }

    /// Waits until `due`; returns at once where it lies behind.
    pub(super) async fn wait_until(&self, due: Moment) -> io::Result<()> {
        let left = due.since(clock::now());
        if left.is_zero() {
            return Ok(());
        }
        let once = Itimerspec { it_interval: timespec(Duration::ZERO), it_value: timespec(left) };
        rustix::time::timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        let mut expirations = [0; 8];
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut expirations) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn timer_fd_fires_on_time_and_never_early() {
        let alarm = TimerFd::new().unwrap();
        for micros in [0, 50, 3_000] {
            let due = clock::now() + Duration::from_micros(micros);
            alarm.wait_until(due).await.unwrap();
            assert!(clock::now() >= due);
        }
    }
}
