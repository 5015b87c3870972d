//! A session's connection to a backend: from the wait in its pool's queue to the attempt that succeeds.

use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{LogContext, SessionSteps, micros};
use crate::account::meter::ConnectResult;
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::connect::{self, ConnectError, ConnectPurpose, SourcePorts, unless_reset};
use crate::header::ClientSocket;
use crate::life::{Cancelled, SessionContext};
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::pool::queue::QueuePlace;
use crate::pool::{PickError, PickedBackend, Pool, SessionFailure, TriedBackends};

impl<'a> SessionSteps<'a> {
    /// A connection to a backend: to another one after each failure, while attempts, budget and backends are left.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps each argument twice")]
    pub(super) fn dial<'s>(
        &'s self,
        pool: &'s Pool,
        key: u64,
        opening: ConnectPurpose,
        client: &'s mut ClientSocket,
        life: &'s mut SessionContext,
        story: &'s mut LogContext<'a>,
    ) -> impl Future<Output = Result<(TcpStream, PickedBackend), Outcome>> + use<'s, 'a> {
        async move {
            pool.arrived(story.tenant_number());
            let mut tried = TriedBackends::default();
            let mut failed = Outcome::reject(EndedAt::Pool, Reason::NoBackend);
            while story.attempts < pool.attempts {
                let picked = match pool.pick_for(story.tenant_number(), key, self.worker.roll(), &mut tried) {
                    Ok(picked) => picked,
                    // A session that could not connect does not wait as well.
                    Err(nobody @ (PickError::Free | PickError::Share)) if tried.is_empty() => {
                        let place = pool.wait(story.tenant_number()).ok_or_else(|| no_place(nobody))?;
                        let start = clock::now();
                        let waited = wait(place, pool.queue_timeout, registered(client)?, life).await;
                        story.marks.queued_us = micros(clock::now().since(start)).max(1);
                        tried.add_picked(waited?)
                    }
                    Err(PickError::Free | PickError::Share | PickError::Usable) => break,
                };
                if story.attempts > 0 && !pool.may_retry(clock::now()) {
                    break;
                }
                story.attempts += 1;
                let begun = clock::now();
                match self.dial_one(pool, &picked, opening, registered(client)?, life, story).await {
                    Ok(socket) => {
                        let took = clock::now().since(begun);
                        story.connect_us = Some(micros(took));
                        life.meter.tried(picked.label(), ConnectResult::Done);
                        life.meter.connected(took);
                        picked.connected();
                        return Ok((socket, picked));
                    }
                    Err(failure) => {
                        failed = failure.outcome();
                        let ConnectError::Backend(result) = failure else { break };
                        life.meter.tried(picked.label(), result);
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
        life: &mut SessionContext,
        story: &mut LogContext<'_>,
    ) -> Result<TcpStream, ConnectError> {
        let (address, tenant) = (picked.address(), story.tenant_number());
        let mut result = Err(ConnectError::Backend(ConnectResult::NoLocalPort));
        let start = usize::try_from(self.worker.roll()).unwrap_or(0);
        for source in connect::sources(&pool.sources, address, start) {
            let ports = &self.worker.live.ports;
            let space = story.toward.insert(ports.space(source, address.0));
            let origin = SourcePorts { source, ports, space, tenant };
            let dialled = connect::dial(origin, opening, client, self.snapshot.connect, life).await;
            result = dialled.map(|(socket, port)| {
                story.port = Some(port);
                socket
            });
            if !matches!(result, Err(ConnectError::Backend(ConnectResult::NoLocalPort))) {
                break;
            }
        }
        result
    }
}

/// There is neither a backend with room nor a place to wait.
fn no_place(nobody: PickError) -> Outcome {
    Outcome::reject(
        EndedAt::Pool,
        if nobody == PickError::Share { Reason::PoolShare } else { Reason::PoolFull },
    )
}

/// Waits in line for a backend with room, as long as the client is there.
async fn wait(
    place: QueuePlace,
    at_most: Duration,
    client: &TcpStream,
    life: &mut SessionContext,
) -> Result<PickedBackend, Outcome> {
    life.wake_at(life.tick().after(TickSpan::of(at_most)));
    let reset = pin!(client.ready(Interest::ERROR));
    match life.watch(unless_reset(reset, place)).await {
        // Room that is there because all sessions end is room for nobody.
        Ok(Some(_)) if life.is_over() => Err(Outcome::reject(EndedAt::Pool, Reason::Drained)),
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
