//! Pure rules of admission: session limits, rate limits and bandwidth.

pub mod bandwidth;
pub mod bandwidth_queue;
pub mod direction_limiter;
pub(crate) mod pending;
pub mod ports;
pub mod quota;
pub mod rate_limiter;
pub(crate) mod session_share;
pub mod slots;
