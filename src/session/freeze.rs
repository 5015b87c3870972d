//! Freezes sessions for another process, and thaws those that came from there.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::oneshot;

use super::{BackendPath, LogContext, SessionWorker};
use crate::account::log::LogFlags;
use crate::account::session_metrics::SessionMetrics;
use crate::account::{Labels, PerDirection};
use crate::addr::{ClientAddr, PeerAddr};
use crate::admission::quota::{ReservedSlots, RevokePolicy, SessionPermit};
use crate::clock::wheel::Tick;
use crate::clock::{self, StartTime};
use crate::forward::bandwidth::TenantResources;
use crate::forward::freeze::{FrozenRelay, RelayRecord};
use crate::forward::{IdleTimeouts, Relay, RelayStop};
use crate::frozen::{Departure, Frozen, ThawError, TransferReply};
use crate::id::{EndpointClaim, SessionId};
use crate::outcome::{EndedAt, Outcome, Reason};
use crate::pool::PickedBackend;
use crate::session_context::{Cancelled, SessionContext};
use crate::state::{LiveState, Snapshot, WorkerContext};

/// The record of a session that moves to another process.
#[derive(Debug, Serialize, Deserialize)]
pub struct SessionRecord {
    listener: String,
    tenant: String,
    pool: String,
    backend: SocketAddr,
    endpoint: Option<String>,
    client: Option<SocketAddr>,
    peer: SocketAddr,
    session: u64,
    attempts: u32,
    connect_us: Option<u32>,
    /// What happens to it where its tenant is not there any more. An older process does not say it.
    #[serde(default)]
    revocation: RevokePolicy,
    queued_us: u32,
    would_reject: Option<Reason>,
    would_delay: bool,
    bytes: PerDirection<u64>,
    /// Since it was accepted.
    age_us: u64,
    relay: RelayRecord,
}

/// A session of another process, which can go on here.
#[derive(Debug)]
pub struct FrozenSession {
    record: SessionRecord,
    relay: FrozenRelay,
    /// Held until it has its own place.
    reserved: Option<Arc<ReservedSlots>>,
}

impl LogContext<'_> {
    /// Counts the local port that its connection to the backend has already.
    pub(super) fn adopt_port(&mut self, moved: &FrozenSession, live: &LiveState) {
        let is_ours = |own: &IpAddr| self.pool.is_some_and(|pool| pool.sources.contains(own));
        let source = moved.relay.backend_source().filter(is_ours);
        let space = live.ports.space(source, moved.record.backend);
        self.path = Some(BackendPath::Connected(space.adopt(self.tenant_number())));
    }
}

impl FrozenSession {
    /// Puts together what arrived. The session is unchanged: only the holder of this may confirm that it is taken.
    ///
    /// # Errors
    /// Why it cannot go on here.
    pub fn new(frozen: Frozen<SessionRecord>) -> Result<Box<Self>, ThawError> {
        let relay = FrozenRelay::new(frozen.record.relay, &frozen.held, frozen.fds)?;
        Ok(Box::new(Self { record: frozen.record, relay, reserved: None }))
    }

    /// Its place may be among these.
    pub fn may_use(&mut self, kept: &Arc<ReservedSlots>) {
        self.reserved = Some(Arc::clone(kept));
    }

    pub(super) fn session(&self) -> SessionId {
        SessionId::of_number(self.record.session)
    }

    /// What is told of it at its end, as far as its tenant and its pool are here.
    pub(super) fn log_context<'a>(&self, snapshot: &'a Snapshot, labels: &Labels) -> LogContext<'a> {
        let record = &self.record;
        let [listener, tenant, pool] =
            [&record.listener, &record.tenant, &record.pool].map(|name| labels.intern(name));
        let endpoint = EndpointClaim::from_tlv(record.endpoint.as_ref().map(String::as_bytes));
        let place = snapshot.known_place(&tenant, endpoint, &listener);
        let mut pools = snapshot.pools.iter().map(Arc::as_ref);
        LogContext {
            peer: PeerAddr(record.peer),
            client: record.client.map(ClientAddr),
            endpoint,
            tenant: place.and_then(|place| snapshot.directory.tenants().get(place as usize)),
            pool: pools.find(|own| own.label.serial() == pool.serial()),
            path: None,
            attempts: record.attempts,
            connect_us: record.connect_us,
            flags: LogFlags { queued_us: record.queued_us, ..LogFlags::default() },
        }
    }

    /// Its place among its tenant's sessions, whatever the limits say. A tenant that is gone has no limits.
    pub(super) fn adopt(&mut self, log_context: &LogContext<'_>, live: &LiveState) -> SessionPermit {
        let gone = || {
            let quota = live.quotas.find(&live.labels.intern(&self.record.tenant));
            quota.set_revocation(self.record.revocation);
            quota
        };
        let quota = log_context.tenant.map_or_else(gone, |tenant| Arc::clone(&tenant.quota));
        let permit = quota.adopt(self.record.would_reject);
        self.reserved = None;
        permit
    }

    /// Its place at its backend, where the pool has that.
    pub(super) fn pick(&self, log_context: &LogContext<'_>) -> Option<PickedBackend> {
        log_context.pool?.adopt(self.record.backend, log_context.tenant_number())
    }

    /// Its life, from its accept on.
    pub(super) fn session_context(&self, worker: &WorkerContext) -> SessionContext {
        let (record, labels) = (&self.record, &worker.live.labels);
        let names = [&record.listener, &record.tenant, &record.pool].map(|name| labels.intern(name));
        let backend = labels.intern(&record.backend.to_string());
        let [listener, tenant, pool] = &names;
        let worker_metrics = Rc::clone(&worker.metrics);
        let mut metrics =
            SessionMetrics::taken_over(worker_metrics, [listener, tenant, pool, &backend], record.bytes);
        metrics.would_delay = record.would_delay;
        let started = StartTime::before(clock::now(), Duration::from_micros(record.age_us));
        SessionContext::resumed(Rc::clone(&worker.local), metrics, started)
    }

    /// Continues forwarding.
    pub(super) fn thaw<'a>(
        self,
        timeouts: &'a IdleTimeouts,
        resources: TenantResources<'a>,
        session: &'a mut SessionContext,
    ) -> io::Result<Relay<'a>> {
        self.relay.thaw(timeouts, resources, session)
    }
}

/// Freezes a session; `None` where it goes on, as there is no descriptor left for a copy.
fn freeze(
    relay: &mut Relay<'_>,
    log_context: &LogContext<'_>,
    permit: &SessionPermit,
    id: SessionId,
) -> Option<Frozen<SessionRecord>> {
    let backend = log_context.backend()?.0;
    let (record, held, fds) = relay.freeze().ok()?;
    let session = relay.session();
    let [listener, tenant, pool] = session.metrics.labels().map(|label| label.name().to_owned());
    let record = SessionRecord {
        listener,
        tenant,
        pool,
        backend,
        endpoint: log_context.endpoint.to_record(),
        client: log_context.client.map(|client| client.0),
        peer: log_context.peer.0,
        session: id.number(),
        attempts: log_context.attempts,
        connect_us: log_context.connect_us,
        revocation: permit.quota().revocation(),
        queued_us: log_context.flags.queued_us,
        would_reject: log_context.flags.would_reject,
        would_delay: session.metrics.would_delay,
        bytes: session.metrics.bytes(),
        age_us: u64::try_from(session.started.age(clock::now()).as_micros()).unwrap_or(u64::MAX),
        relay: record,
    };
    Some(Frozen { record, held, fds })
}

/// The first event while a session waits to be transferred.
enum FirstEvent {
    /// Its turn.
    Turn(OwnedPermit<Departure<SessionRecord>>),
    /// Its end.
    End(Outcome),
    /// Sessions are visited again.
    Again,
    /// No session leaves any more.
    Closed,
}

/// Has a session leave for the other process; `Some` is its end here, and with `None` it goes on as if nothing had
/// happened. Until it is its turn it forwards; from then to the answer nothing is read, written or said of it here.
pub(super) async fn depart(
    worker: &SessionWorker,
    relay: &mut Relay<'_>,
    log_context: &LogContext<'_>,
    permit: &SessionPermit,
    id: SessionId,
) -> Option<Outcome> {
    let turn = loop {
        match first_event(worker, relay).await {
            FirstEvent::Turn(turn) => break turn,
            FirstEvent::End(outcome) => return Some(outcome),
            FirstEvent::Again => {
                if let Some(outcome) = worker.check(relay, log_context, permit) {
                    return Some(outcome);
                }
            }
            FirstEvent::Closed => return None,
        }
    };
    let frozen = freeze(relay, log_context, permit, id)?;
    let (reply, answered) = oneshot::channel();
    turn.send(Departure { frozen, reply });
    match wait_for_reply(relay.session(), answered).await {
        Ok(TransferReply::Taken) => {
            // It is alive and counted: a connection identified only now does not get its slot, unless the transfer
            // is over.
            if let Some(tenant) = log_context.tenant.filter(|_| worker.departures.borrow().is_some()) {
                tenant.quota.reserve_session();
            }
            Some(Outcome::reject(EndedAt::Forward, Reason::Moved))
        }
        Ok(TransferReply::Stays) => {
            relay.thaw();
            None
        }
        // Either process may have it: end it without a reset to client or backend.
        Err(outcome) => Some(outcome),
    }
}

async fn first_event(worker: &SessionWorker, relay: &mut Relay<'_>) -> FirstEvent {
    let Some(departures) = worker.departures.borrow().clone() else { return FirstEvent::Closed };
    let mut turn = pin!(departures.reserve_owned());
    poll_fn(|context| {
        if !worker.context.local.is_transferring() {
            return Poll::Ready(FirstEvent::Closed);
        }
        if let Poll::Ready(turn) = turn.as_mut().poll(context) {
            return Poll::Ready(turn.map_or(FirstEvent::Closed, FirstEvent::Turn));
        }
        match Pin::new(&mut *relay).poll(context) {
            Poll::Ready(RelayStop::Ended(outcome)) => Poll::Ready(FirstEvent::End(outcome)),
            Poll::Ready(RelayStop::Visit) => Poll::Ready(FirstEvent::Again),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Waits for the answer, as long as the process is not over.
async fn wait_for_reply(
    session: &mut SessionContext,
    mut answered: oneshot::Receiver<TransferReply>,
) -> Result<TransferReply, Outcome> {
    loop {
        match session.watch(&mut answered).await {
            Ok(answer) => return Ok(answer.unwrap_or(TransferReply::Stays)),
            Err(Cancelled::Expired) => session.wake_at(Tick::NEVER),
            Err(Cancelled::Drained) => return Err(Outcome::reject(EndedAt::Forward, Reason::Drained)),
        }
    }
}
