//! A session that leaves for another process, and one that comes from there: what is told of it, beside its bytes.

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

use super::{LogContext, SessionWorker};
use crate::account::log::LogFlags;
use crate::account::meter::SessionMetrics;
use crate::account::{Labels, PerDirection};
use crate::addr::{ClientAddr, PeerAddr};
use crate::admission::quota::{ReservedSlots, RevokePolicy, SessionPermit};
use crate::clock::wheel::Tick;
use crate::clock::{self, StartTime};
use crate::forward::moved::{FrozenRelay, RelayRecord};
use crate::forward::pace::WorkerResources;
use crate::forward::{IdleTimeouts, Relay, RelayStop};
use crate::id::{EndpointClaim, SessionId};
use crate::life::{Cancelled, SessionContext};
use crate::outcome::{EndedAt, Outcome, Reason};
use crate::pool::PickedBackend;
use crate::state::{LiveState, Snapshot};
use crate::takeover::{PendingTransfer, Transfer, TransferError, TransferKind, TransferReply};

/// What is told of a session.
#[derive(Debug, Serialize, Deserialize)]
struct SessionTransferRecord {
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

/// A session that has come from another process and can be carried on.
#[derive(Debug)]
pub struct TransferredSession {
    told: SessionTransferRecord,
    still: FrozenRelay,
    /// Held until it has its own place.
    kept: Option<Arc<ReservedSlots>>,
}

impl LogContext<'_> {
    /// Counts the local port that its connection to the backend has already.
    pub(super) fn adopt_port(&mut self, moved: &TransferredSession, live: &LiveState) {
        let is_ours = |own: &IpAddr| self.pool.is_some_and(|pool| pool.sources.contains(own));
        let source = moved.still.backend_source().filter(is_ours);
        let space = live.ports.space(source, moved.told.backend);
        self.port = Some(space.adopt(self.tenant_number()));
        self.toward = Some(space);
    }
}

impl TransferredSession {
    /// Its place may be among these.
    pub fn has_place_in(&mut self, kept: &Arc<ReservedSlots>) {
        self.kept = Some(Arc::clone(kept));
    }

    pub(super) fn session(&self) -> SessionId {
        SessionId::of_number(self.told.session)
    }

    /// What is told of it at its end, as far as its tenant and its pool are here.
    pub(super) fn story<'a>(&self, snapshot: &'a Snapshot, labels: &Labels) -> LogContext<'a> {
        let told = &self.told;
        let [listener, tenant, pool] =
            [&told.listener, &told.tenant, &told.pool].map(|name| labels.intern(name));
        let endpoint = EndpointClaim::from_tlv(told.endpoint.as_ref().map(String::as_bytes));
        let place = snapshot.known_place(&tenant, endpoint, &listener);
        let mut pools = snapshot.pools.iter().map(Arc::as_ref);
        LogContext {
            peer: PeerAddr(told.peer),
            client: told.client.map(ClientAddr),
            endpoint,
            tenant: place.and_then(|place| snapshot.directory.tenants().get(place as usize)),
            pool: pools.find(|own| own.label.serial() == pool.serial()),
            toward: None,
            port: None,
            attempts: told.attempts,
            connect_us: told.connect_us,
            marks: LogFlags { queued_us: told.queued_us, ..LogFlags::default() },
        }
    }

    /// Its place among its tenant's sessions, whatever the limits say. A tenant that is gone has no limits.
    pub(super) fn adopt(&mut self, story: &LogContext<'_>, live: &LiveState) -> SessionPermit {
        let gone = || {
            let quota = live.quotas.find(&live.labels.intern(&self.told.tenant));
            quota.set_revocation(self.told.revocation);
            quota
        };
        let quota = story.tenant.map_or_else(gone, |tenant| Arc::clone(&tenant.quota));
        let permit = quota.adopt(self.told.would_reject);
        self.kept = None;
        permit
    }

    /// Its place at its backend, where the pool has that.
    pub(super) fn pick(&self, story: &LogContext<'_>) -> Option<PickedBackend> {
        story.pool?.adopt(self.told.backend, story.tenant_number())
    }

    /// Its life, from its accept on.
    pub(super) fn life(&self, worker: &SessionWorker) -> SessionContext {
        let (told, labels) = (&self.told, &worker.live.labels);
        let names = [&told.listener, &told.tenant, &told.pool].map(|name| labels.intern(name));
        let backend = labels.intern(&told.backend.to_string());
        let [listener, tenant, pool] = &names;
        let ledger = Rc::clone(&worker.local.ledger);
        let mut meter = SessionMetrics::taken_over(ledger, [listener, tenant, pool, &backend], told.bytes);
        meter.would_delay = told.would_delay;
        let started = StartTime::before(clock::now(), Duration::from_micros(told.age_us));
        SessionContext::begun(Rc::clone(&worker.local), meter, started)
    }

    /// Goes on with its bytes.
    pub(super) fn resume<'a>(
        self,
        patience: &'a IdleTimeouts,
        lent: WorkerResources<'a>,
        life: &'a mut SessionContext,
    ) -> io::Result<Relay<'a>> {
        self.still.resume(patience, lent, life)
    }
}

/// Reads what another process tells of a session. Nothing has happened to it yet: only who has this in hand may say that
/// it is taken.
///
/// # Errors
/// Why it cannot be carried on here.
pub fn decode(parcel: Transfer) -> Result<Box<TransferredSession>, TransferError> {
    let (told, tail) = parcel.read::<SessionTransferRecord>(TransferKind::Session)?;
    let tail = tail.to_vec();
    let still = FrozenRelay::new(told.relay, &tail, parcel.fds)?;
    Ok(Box::new(TransferredSession { told, still, kept: None }))
}

fn pack(
    relay: &mut Relay<'_>,
    story: &LogContext<'_>,
    permit: &SessionPermit,
    session: SessionId,
) -> Result<Transfer, TransferError> {
    let (record, tail, fds) = relay.pack().map_err(|_| TransferError::Shortage)?;
    let life = relay.life();
    let [listener, tenant, pool] = life.meter.labels().map(|label| label.name().to_owned());
    let Some(backend) = story.backend().map(|backend| backend.0) else {
        return Err(TransferError::Malformed("it has no backend".to_owned()));
    };
    let told = SessionTransferRecord {
        listener,
        tenant,
        pool,
        backend,
        endpoint: story.endpoint.told(),
        client: story.client.map(|client| client.0),
        peer: story.peer.0,
        session: session.number(),
        attempts: story.attempts,
        connect_us: story.connect_us,
        revocation: permit.quota().revocation(),
        queued_us: story.marks.queued_us,
        would_reject: story.marks.would_reject,
        would_delay: life.meter.would_delay,
        bytes: life.meter.bytes(),
        age_us: u64::try_from(life.started.age(clock::now()).as_micros()).unwrap_or(u64::MAX),
        relay: record,
    };
    Transfer::pack(TransferKind::Session, &told, &tail, fds)
}

/// What came first while a session waited for its turn to leave.
enum FirstEvent {
    /// Its turn.
    Turn(OwnedPermit<PendingTransfer>),
    /// Its end.
    End(Outcome),
    /// Sessions are visited again.
    Again,
    /// Nobody leaves any more.
    Nobody,
}

/// Has a session leave for the other process; `Some` is its end here, and with `None` it goes on as if nothing had
/// happened. Until it is its turn it forwards; from then to the answer nothing is read, written or said of it here.
pub(super) async fn depart(
    worker: &SessionWorker,
    relay: &mut Relay<'_>,
    story: &LogContext<'_>,
    permit: &SessionPermit,
    session: SessionId,
) -> Option<Outcome> {
    let turn = loop {
        match first(worker, relay).await {
            FirstEvent::Turn(turn) => break turn,
            FirstEvent::End(outcome) => return Some(outcome),
            FirstEvent::Again => {
                if let Some(outcome) = worker.check(relay, story, permit) {
                    return Some(outcome);
                }
            }
            FirstEvent::Nobody => return None,
        }
    };
    relay.stand_still();
    let Ok(parcel) = pack(relay, story, permit, session) else {
        relay.go_on();
        return None;
    };
    let (answer, answered) = oneshot::channel();
    turn.send(PendingTransfer { parcel, answer });
    match hear(relay.life(), answered).await {
        Ok(TransferReply::Taken) => {
            // It lives, and counts: who says only now who it is does not get its place, unless nobody leaves any more.
            if let Some(tenant) = story.tenant.filter(|_| worker.departures.borrow().is_some()) {
                tenant.quota.keep_session();
            }
            Some(Outcome::reject(EndedAt::Forward, Reason::Moved))
        }
        Ok(TransferReply::Stays) => {
            relay.go_on();
            None
        }
        // Nobody knows who has it; the end says nothing to anybody.
        Err(outcome) => Some(outcome),
    }
}

async fn first(worker: &SessionWorker, relay: &mut Relay<'_>) -> FirstEvent {
    let Some(departures) = worker.departures.borrow().clone() else { return FirstEvent::Nobody };
    let mut turn = pin!(departures.reserve_owned());
    poll_fn(|context| {
        if !worker.local.is_moving() {
            return Poll::Ready(FirstEvent::Nobody);
        }
        if let Poll::Ready(turn) = turn.as_mut().poll(context) {
            return Poll::Ready(turn.map_or(FirstEvent::Nobody, FirstEvent::Turn));
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
async fn hear(
    life: &mut SessionContext,
    mut answered: oneshot::Receiver<TransferReply>,
) -> Result<TransferReply, Outcome> {
    loop {
        match life.watch(&mut answered).await {
            Ok(answer) => return Ok(answer.unwrap_or(TransferReply::Stays)),
            Err(Cancelled::Expired) => life.wake_at(Tick::NEVER),
            Err(Cancelled::Drained) => return Err(Outcome::reject(EndedAt::Forward, Reason::Drained)),
        }
    }
}
