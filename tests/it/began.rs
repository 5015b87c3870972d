//! Time in a test: only ever as a lower bound, which a busy machine makes looser and never breaks.

use std::time::Duration;

use vestibule::clock::{self, Moment};

/// When something began.
#[derive(Clone, Copy)]
pub struct Began(Moment);

impl Began {
    pub fn now() -> Self {
        Self(clock::now())
    }

    /// It took at least so long, but for a tick of the deadline wheel.
    pub fn lasted(self, least: Duration) {
        let took = clock::now().since(self.0);
        assert!(took + Duration::from_millis(50) >= least, "{took:?}, and at least {least:?} are expected");
    }

    /// Whether so long has passed: to be asked for as long as it has not, or of the fastest of many.
    pub fn is_past(self, span: Duration) -> bool {
        clock::now().since(self.0) >= span
    }

    /// What so many bytes a second come to by now, at most.
    pub fn granted(self, rate: f64) -> f64 {
        rate * clock::now().since(self.0).as_secs_f64()
    }
}
