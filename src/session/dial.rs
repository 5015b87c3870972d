//! A session's connection to a backend: from the wait in its pool's queue to the attempt that succeeds.

use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{Steps, Story, micros};
use crate::account::meter::Connect;
use crate::clock;
use crate::clock::wheel::Span;
use crate::connect::{self, Failure, Opening, Origin, unless_reset};
use crate::header::Connection;
use crate::life::{Cut, Life};
use crate::outcome::{At, By, Outcome, Why};
use crate::pool::queue::Place;
use crate::pool::{Failed, Nobody, Picked, Pool, Tried};

impl<'a> Steps<'a> {
    /// A connection to a backend: to another one after each failure, while attempts, budget and backends are left.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps each argument twice")]
    pub(super) fn dial<'s>(
        &'s self,
        pool: &'s Pool,
        key: u64,
        opening: Opening,
        client: &'s mut Connection,
        life: &'s mut Life,
        story: &'s mut Story<'a>,
    ) -> impl Future<Output = Result<(TcpStream, Picked), Outcome>> + use<'s, 'a> {
        async move {
            pool.arrived(story.tenant_number());
            let mut tried = Tried::default();
            let mut failed = Outcome::reject(At::Pool, Why::NoBackend);
            while story.attempts < pool.attempts {
                let picked = match pool.pick_for(story.tenant_number(), key, self.worker.roll(), &mut tried) {
                    Ok(picked) => picked,
                    // A session that could not connect does not wait as well.
                    Err(nobody @ (Nobody::Free | Nobody::Share)) if tried.is_empty() => {
                        let place = pool.wait(story.tenant_number()).ok_or_else(|| no_place(nobody))?;
                        let start = clock::now();
                        let waited = wait(place, pool.queue_timeout, registered(client)?, life).await;
                        story.marks.queued_us = micros(clock::now().since(start)).max(1);
                        tried.add_picked(waited?)
                    }
                    Err(Nobody::Free | Nobody::Share | Nobody::Usable) => break,
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
                        life.meter.tried(picked.label(), Connect::Done);
                        life.meter.connected(took);
                        picked.connected();
                        return Ok((socket, picked));
                    }
                    Err(failure) => {
                        failed = failure.outcome();
                        let Failure::Backend(result) = failure else { break };
                        life.meter.tried(picked.label(), result);
                        // What is short here is not the backend's fault.
                        if !matches!(result, Connect::NoLocalPort | Connect::Shortage) {
                            pool.failed(&picked, Failed::Connect, clock::now())
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
        picked: &Picked,
        opening: Opening,
        client: &TcpStream,
        life: &mut Life,
        story: &mut Story<'_>,
    ) -> Result<TcpStream, Failure> {
        let (address, tenant) = (picked.address(), story.tenant_number());
        let mut result = Err(Failure::Backend(Connect::NoLocalPort));
        let start = usize::try_from(self.worker.roll()).unwrap_or(0);
        for source in connect::sources(&pool.sources, address, start) {
            let ports = &self.worker.live.ports;
            let space = story.toward.insert(ports.space(source, address.0));
            let origin = Origin { source, ports, space, tenant };
            let dialled = connect::dial(origin, opening, client, self.snapshot.connect, life).await;
            result = dialled.map(|(socket, port)| {
                story.port = Some(port);
                socket
            });
            if !matches!(result, Err(Failure::Backend(Connect::NoLocalPort))) {
                break;
            }
        }
        result
    }
}

/// There is neither a backend with room nor a place to wait.
fn no_place(nobody: Nobody) -> Outcome {
    Outcome::reject(At::Pool, if nobody == Nobody::Share { Why::PoolShare } else { Why::PoolFull })
}

/// Waits in line for a backend with room, as long as the client is there.
async fn wait(
    place: Place,
    at_most: Duration,
    client: &TcpStream,
    life: &mut Life,
) -> Result<Picked, Outcome> {
    life.wake_at(life.tick().after(Span::of(at_most)));
    let reset = pin!(client.ready(Interest::ERROR));
    match life.watch(unless_reset(reset, place)).await {
        // Room that is there because all sessions end is room for nobody.
        Ok(Some(_)) if life.is_over() => Err(Outcome::reject(At::Pool, Why::Drained)),
        Ok(Some(picked)) => Ok(picked),
        Ok(None) => Err(Outcome::new(By::Client, At::Pool, Why::Reset)),
        Err(Cut::Expired) => Err(Outcome::reject(At::Pool, Why::QueueTimeout)),
        Err(Cut::Drained) => Err(Outcome::reject(At::Pool, Why::Drained)),
    }
}

/// The client's socket, known to the worker's poll: from here on a reset of it is noticed.
fn registered(client: &mut Connection) -> Result<&TcpStream, Outcome> {
    client.registered().map_err(|_| Outcome::reject(At::Connect, Why::Shortage))
}
