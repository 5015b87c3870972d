//! Active health checks: each backend is asked at its interval, by tasks of the control thread.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::account::meter::Connect;
use crate::addr::BackendAddr;
use crate::config::Probe;
use crate::connect::{self, Opening};
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
        let result = tcp(address, &pool.sources, limit).await;
        if let Some(first) = first.take() {
            first();
        }
        // What is short here is no fault of the backend's: a busy process must not take its backends for dead.
        if matches!(result, Connect::Shortage | Connect::NoLocalPort) {
            tracing::warn!(
                backend = backend.label().name(),
                reason = result.word(),
                "a probe could not be sent"
            );
            continue;
        }
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
    }
}

/// Opens a connection as a session would, from each source in turn as long as only the local ports are at fault, and
/// resets it: a close would leave a port in TIME_WAIT for each probe.
async fn tcp(address: BackendAddr, sources: &[IpAddr], limit: Duration) -> Connect {
    let mut result = Connect::NoLocalPort;
    for source in connect::sources(sources, address, 0) {
        result = attempt(address, source, limit).await;
        if result != Connect::NoLocalPort {
            break;
        }
    }
    result
}

async fn attempt(address: BackendAddr, source: Option<IpAddr>, limit: Duration) -> Connect {
    let connected = async {
        let socket = connect::start(address, source, Opening::Listens)?;
        socket.writable().await?;
        socket.take_error()?.map_or(Ok(socket), Err)
    };
    match timeout(limit, connected).await {
        Ok(Ok(socket)) => {
            socket.set_zero_linger().unwrap_or_default();
            Connect::Done
        }
        Ok(Err(error)) => connect::classify(&error),
        Err(_) => Connect::Timeout,
    }
}
