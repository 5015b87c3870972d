//! One local port, held as long as a connection uses it.

use std::sync::Arc;

use super::{FreePort, PortSpace, TimeWaitPort};
use crate::account::lock;

/// A local port in use until this is dropped.
#[derive(Debug)]
pub struct LocalPort {
    pub(super) space: Arc<PortSpace>,
    pub(super) tenant: u32,
    pub(super) number: u16,
    pub(super) waits: bool,
}

impl LocalPort {
    /// The ports it is one of.
    #[must_use]
    pub fn space(&self) -> &Arc<PortSpace> {
        &self.space
    }

    /// The port; `None` where the kernel chooses.
    #[must_use]
    pub fn number(&self) -> Option<u16> {
        Some(self.number).filter(|number| *number > 0)
    }

    /// Whether it is one of these.
    #[must_use]
    pub fn is_of(&self, space: &Arc<PortSpace>) -> bool {
        Arc::ptr_eq(&self.space, space)
    }

    /// The tenant that it is counted for.
    #[must_use]
    pub fn tenant(&self) -> u32 {
        self.tenant
    }

    /// Our side closed first: the port is in TIME_WAIT once the connection is over.
    pub fn will_wait(&mut self) {
        self.waits = true;
    }

    /// The kernel refused it: another process uses it, or it is in a TIME_WAIT that is not known of here. It is not tried
    /// again before that would be over.
    pub fn refused(mut self) {
        let (tick, number) = (self.space.shared.tick(), std::mem::take(&mut self.number));
        let mut state = lock(&self.space.state);
        if number == 0 {
            state.barred = tick + 1;
        } else {
            state.parked.push_back(FreePort { number, since: tick });
        }
    }
}

impl Drop for LocalPort {
    fn drop(&mut self) {
        let since = self.space.shared.tick();
        let mut state = lock(&self.space.state);
        state.live -= 1;
        if self.waits {
            state.waiting.push_back(TimeWaitPort { number: self.number, since, tenant: self.tenant });
        } else {
            state.let_go(self.tenant);
            state.rest(self.number, since);
        }
    }
}
