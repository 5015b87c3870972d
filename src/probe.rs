//! Active health checks: each backend is asked at its interval, by tasks of the control thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::account::meter::Connect;
use crate::addr::BackendAddr;
use crate::config::Probe;
use crate::connect;
use crate::pool::Pool;

/// The first probes of a pool's backends start so far apart, so that thousands do not start at once.
const STAGGER: Duration = Duration::from_millis(2);

/// Probes the backend at `place` of `pool` for ever; `first` is called after the first result.
/// Returns at once where the pool has no probe.
pub async fn run(pool: Arc<Pool>, place: usize, first: impl FnOnce()) {
    let Probe::Tcp { interval: every, timeout: limit, port, .. } = pool.probe else { return };
    let Some(backend) = pool.backends().get(place) else { return };
    let mut address = backend.address();
    if let Some(port) = port {
        address.0.set_port(port);
    }
    let stagger = STAGGER.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX));
    sleep(stagger.min(every / 2)).await;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut first = Some(first);
    loop {
        ticks.tick().await;
        let result = tcp(address, limit).await;
        if let Some(state) = backend.observe(result == Connect::Done) {
            pool.refresh();
            tracing::info!(
                pool = pool.label.name(),
                backend = backend.label().name(),
                state = state.word(),
                probe = result.word(),
                usable = pool.usable(),
                "backend changed"
            );
        }
        if let Some(first) = first.take() {
            first();
        }
    }
}

/// Opens a connection and resets it: a close would leave a port in TIME_WAIT for each probe.
async fn tcp(address: BackendAddr, limit: Duration) -> Connect {
    let connected = timeout(limit, TcpStream::connect(address.0)).await;
    match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(socket) => {
            socket.set_zero_linger().unwrap_or_default();
            Connect::Done
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Connect::Timeout,
        Err(error) => connect::classify(&error),
    }
}
