//! A session's connection to a backend: from the wait in its pool's queue to the attempt that succeeds.

use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{BackendPath, LogContext, SessionSteps, micros};
use crate::account::session_metrics::ConnectResult;
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::connect::{self, ConnectError, ConnectPurpose, SourcePorts, unless_reset};
use crate::header::ClientSocket;
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::pool::queue::QueuePlace;
use crate::pool::{PickError, PickedBackend, Pool, SessionFailure, TriedBackends};
use crate::session_context::{Cancelled, SessionContext};

impl<'a> SessionSteps<'a> {
    /// A connection to a backend: to another one after each failure, while attempts, budget and backends are left.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps each argument twice")]
    pub(super) fn dial<'s>(
        &'s self,
        pool: &'s Pool,
        key: u64,
        opening: ConnectPurpose,
        client: &'s mut ClientSocket,
        session: &'s mut SessionContext,
        log_context: &'s mut LogContext<'a>,
    ) -> impl Future<Output = Result<(TcpStream, PickedBackend), Outcome>> + use<'s, 'a> {
        async move {
            pool.count_session(log_context.tenant_number());
            let mut tried = TriedBackends::default();
            let mut failed = Outcome::reject(EndedAt::Pool, Reason::NoBackend);
            while log_context.attempts < pool.attempts {
                let picked =
                    match pool.pick_for(log_context.tenant_number(), key, fastrand::u64(..), &mut tried) {
                        Ok(picked) => picked,
                        // A session that has tried a backend does not enter the queue.
                        Err(error @ (PickError::Free | PickError::Share)) if tried.is_empty() => {
                            let place = pool
                                .join_queue(log_context.tenant_number())
                                .ok_or_else(|| pick_failed(error))?;
                            let start = clock::now();
                            let waited = wait(place, pool.queue_timeout, registered(client)?, session).await;
                            log_context.flags.queued_us = micros(clock::now().since(start)).max(1);
                            tried.add_picked(waited?)
                        }
                        Err(PickError::Free | PickError::Share | PickError::Usable) => break,
                    };
                if log_context.attempts > 0 && !pool.may_retry(clock::now()) {
                    break;
                }
                log_context.attempts += 1;
                let begun = clock::now();
                match self.dial_one(pool, &picked, opening, registered(client)?, session, log_context).await {
                    Ok(socket) => {
                        let took = clock::now().since(begun);
                        log_context.connect_us = Some(micros(took));
                        session.metrics.count_connect(picked.label(), ConnectResult::Done);
                        session.metrics.record_connect_time(took);
                        picked.connected();
                        return Ok((socket, picked));
                    }
                    Err(failure) => {
                        failed = failure.outcome();
                        let ConnectError::Backend(result) = failure else { break };
                        session.metrics.count_connect(picked.label(), result);
                        // What is short here is not the backend's fault.
                        if !matches!(result, ConnectResult::NoLocalPort | ConnectResult::Shortage) {
                            pool.failed(&picked, SessionFailure::Connect, clock::now())
                                .iter()
                                .for_each(|change| change.log(pool));
                        }
                    }
                }
            }
            Err(failed)
        }
    }

    /// Tries one backend, from each source address in turn, a random one first, as long as only the local ports are at
    /// fault.
    async fn dial_one(
        &self,
        pool: &Pool,
        picked: &PickedBackend,
        opening: ConnectPurpose,
        client: &TcpStream,
        session: &mut SessionContext,
        log_context: &mut LogContext<'_>,
    ) -> Result<TcpStream, ConnectError> {
        let (address, tenant) = (picked.address(), log_context.tenant_number());
        let mut result = Err(ConnectError::Backend(ConnectResult::NoLocalPort));
        let start = fastrand::usize(..);
        for source in connect::sources(&pool.sources, address, start) {
            let ports = &self.worker.context.live.ports;
            let path = log_context.path.insert(BackendPath::Tried(ports.space(source, address.0)));
            let origin = SourcePorts { source, ports, space: path.space(), tenant };
            let dialled = connect::dial(origin, opening, client, self.snapshot.connect, session).await;
            result = dialled.map(|(socket, port)| {
                log_context.path = Some(BackendPath::Connected(port));
                socket
            });
            if !matches!(result, Err(ConnectError::Backend(ConnectResult::NoLocalPort))) {
                break;
            }
        }
        result
    }
}

/// No backend has room and the queue is full.
fn pick_failed(error: PickError) -> Outcome {
    Outcome::reject(
        EndedAt::Pool,
        if error == PickError::Share { Reason::PoolShare } else { Reason::PoolFull },
    )
}

/// Waits in line for a backend with room, as long as the client is there.
async fn wait(
    place: QueuePlace,
    at_most: Duration,
    client: &TcpStream,
    session: &mut SessionContext,
) -> Result<PickedBackend, Outcome> {
    session.wake_at(session.tick().after(TickSpan::of(at_most)));
    let reset = pin!(client.ready(Interest::ERROR));
    match session.watch(unless_reset(reset, place)).await {
        // Slots freed by the end of all sessions are not used for new ones.
        Ok(Some(_)) if session.is_over() => Err(Outcome::reject(EndedAt::Pool, Reason::Drained)),
        Ok(Some(picked)) => Ok(picked),
        Ok(None) => Err(Outcome::new(EndedBy::Client, EndedAt::Pool, Reason::Reset)),
        Err(Cancelled::Expired) => Err(Outcome::reject(EndedAt::Pool, Reason::QueueTimeout)),
        Err(Cancelled::Drained) => Err(Outcome::reject(EndedAt::Pool, Reason::Drained)),
    }
}

/// The client's socket, known to the worker's poll: from here on a reset of it is noticed.
fn registered(client: &mut ClientSocket) -> Result<&TcpStream, Outcome> {
    client.registered().map_err(|_| Outcome::reject(EndedAt::Connect, Reason::Shortage))
}
