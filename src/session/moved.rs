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

use super::{Story, Worker};
use crate::account::log::Marks;
use crate::account::meter::Meter;
use crate::account::{EachWay, Labels};
use crate::addr::{ClientAddr, PeerAddr};
use crate::admission::quota::{Kept, Permit, Revocation};
use crate::clock::wheel::Tick;
use crate::clock::{self, Birth};
use crate::forward::moved::{Record, Still};
use crate::forward::pace::Lent;
use crate::forward::{Patience, Relay, Stop};
use crate::id::{Claim, SessionId};
use crate::life::{Cut, Life};
use crate::outcome::{At, Outcome, Why};
use crate::pool::Picked;
use crate::state::{Live, Snapshot};
use crate::takeover::{Answer, Kind, Leaving, Parcel, Refused};

/// What is told of a session.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
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
    revocation: Revocation,
    queued_us: u32,
    would_reject: Option<Why>,
    would_delay: bool,
    bytes: EachWay<u64>,
    /// Since it was accepted.
    age_us: u64,
    relay: Record,
}

/// A session that has come from another process and can be carried on.
#[derive(Debug)]
pub struct Moved {
    told: Told,
    still: Still,
    /// Held until it has its own place.
    kept: Option<Arc<Kept>>,
}

impl Story<'_> {
    /// Counts the local port that its connection to the backend has already.
    pub(super) fn adopt_port(&mut self, moved: &Moved, live: &Live) {
        let is_ours = |own: &IpAddr| self.pool.is_some_and(|pool| pool.sources.contains(own));
        let source = moved.still.backend_source().filter(is_ours);
        let space = live.ports.space(source, moved.told.backend);
        self.port = Some(space.adopt(self.tenant_number()));
        self.toward = Some(space);
    }
}

impl Moved {
    /// Its place may be among these.
    pub fn has_place_in(&mut self, kept: &Arc<Kept>) {
        self.kept = Some(Arc::clone(kept));
    }

    pub(super) fn session(&self) -> SessionId {
        SessionId::of_number(self.told.session)
    }

    /// What is told of it at its end, as far as its tenant and its pool are here.
    pub(super) fn story<'a>(&self, snapshot: &'a Snapshot, labels: &Labels) -> Story<'a> {
        let told = &self.told;
        let [listener, tenant, pool] =
            [&told.listener, &told.tenant, &told.pool].map(|name| labels.intern(name));
        let endpoint = Claim::from_tlv(told.endpoint.as_ref().map(String::as_bytes));
        let place = snapshot.known_place(&tenant, endpoint, &listener);
        let mut pools = snapshot.pools.iter().map(Arc::as_ref);
        Story {
            peer: PeerAddr(told.peer),
            client: told.client.map(ClientAddr),
            endpoint,
            tenant: place.and_then(|place| snapshot.directory.tenants().get(place as usize)),
            pool: pools.find(|own| own.label.serial() == pool.serial()),
            toward: None,
            port: None,
            attempts: told.attempts,
            connect_us: told.connect_us,
            marks: Marks { queued_us: told.queued_us, ..Marks::default() },
        }
    }

    /// Its place among its tenant's sessions, whatever the limits say. A tenant that is gone has no limits.
    pub(super) fn adopt(&mut self, story: &Story<'_>, live: &Live) -> Permit {
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
    pub(super) fn pick(&self, story: &Story<'_>) -> Option<Picked> {
        story.pool?.adopt(self.told.backend, story.tenant_number())
    }

    /// Its life, from its accept on.
    pub(super) fn life(&self, worker: &Worker) -> Life {
        let (told, labels) = (&self.told, &worker.live.labels);
        let names = [&told.listener, &told.tenant, &told.pool].map(|name| labels.intern(name));
        let backend = labels.intern(&told.backend.to_string());
        let [listener, tenant, pool] = &names;
        let ledger = Rc::clone(&worker.local.ledger);
        let mut meter = Meter::taken_over(ledger, [listener, tenant, pool, &backend], told.bytes);
        meter.would_delay = told.would_delay;
        let started = Birth::before(clock::now(), Duration::from_micros(told.age_us));
        Life::begun(Rc::clone(&worker.local), meter, started)
    }

    /// Goes on with its bytes.
    pub(super) fn resume<'a>(
        self,
        patience: &'a Patience,
        lent: Lent<'a>,
        life: &'a mut Life,
    ) -> io::Result<Relay<'a>> {
        self.still.resume(patience, lent, life)
    }
}

/// Reads what another process tells of a session. Nothing has happened to it yet: only who has this in hand may say that
/// it is taken.
///
/// # Errors
/// Why it cannot be carried on here.
pub fn decode(parcel: Parcel) -> Result<Box<Moved>, Refused> {
    let (told, tail) = parcel.read::<Told>(Kind::Session)?;
    let tail = tail.to_vec();
    let still = Still::new(told.relay, &tail, parcel.fds)?;
    Ok(Box::new(Moved { told, still, kept: None }))
}

fn pack(
    relay: &mut Relay<'_>,
    story: &Story<'_>,
    permit: &Permit,
    session: SessionId,
) -> Result<Parcel, Refused> {
    let (record, tail, fds) = relay.pack().map_err(|_| Refused::Shortage)?;
    let life = relay.life();
    let [listener, tenant, pool] = life.meter.labels().map(|label| label.name().to_owned());
    let Some(backend) = story.backend().map(|backend| backend.0) else {
        return Err(Refused::Malformed("it has no backend".to_owned()));
    };
    let told = Told {
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
    Parcel::pack(Kind::Session, &told, &tail, fds)
}

/// What came first while a session waited for its turn to leave.
enum First {
    /// Its turn.
    Turn(OwnedPermit<Leaving>),
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
    worker: &Worker,
    relay: &mut Relay<'_>,
    story: &Story<'_>,
    permit: &Permit,
    session: SessionId,
) -> Option<Outcome> {
    let turn = loop {
        match first(worker, relay).await {
            First::Turn(turn) => break turn,
            First::End(outcome) => return Some(outcome),
            First::Again => {
                if let Some(outcome) = worker.check(relay, story, permit) {
                    return Some(outcome);
                }
            }
            First::Nobody => return None,
        }
    };
    relay.stand_still();
    let Ok(parcel) = pack(relay, story, permit, session) else {
        relay.go_on();
        return None;
    };
    let (answer, answered) = oneshot::channel();
    turn.send(Leaving { parcel, answer });
    match hear(relay.life(), answered).await {
        Ok(Answer::Taken) => {
            // It lives, and counts: who says only now who it is does not get its place, unless nobody leaves any more.
            if let Some(tenant) = story.tenant.filter(|_| worker.departures.borrow().is_some()) {
                tenant.quota.keep_session();
            }
            Some(Outcome::reject(At::Forward, Why::Moved))
        }
        Ok(Answer::Stays) => {
            relay.go_on();
            None
        }
        // Nobody knows who has it; the end says nothing to anybody.
        Err(outcome) => Some(outcome),
    }
}

async fn first(worker: &Worker, relay: &mut Relay<'_>) -> First {
    let Some(departures) = worker.departures.borrow().clone() else { return First::Nobody };
    let mut turn = pin!(departures.reserve_owned());
    poll_fn(|context| {
        if !worker.local.is_moving() {
            return Poll::Ready(First::Nobody);
        }
        if let Poll::Ready(turn) = turn.as_mut().poll(context) {
            return Poll::Ready(turn.map_or(First::Nobody, First::Turn));
        }
        match Pin::new(&mut *relay).poll(context) {
            Poll::Ready(Stop::Ended(outcome)) => Poll::Ready(First::End(outcome)),
            Poll::Ready(Stop::Visit) => Poll::Ready(First::Again),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Waits for the answer, as long as the process is not over.
async fn hear(life: &mut Life, mut answered: oneshot::Receiver<Answer>) -> Result<Answer, Outcome> {
    loop {
        match life.watch(&mut answered).await {
            Ok(answer) => return Ok(answer.unwrap_or(Answer::Stays)),
            Err(Cut::Expired) => life.wake_at(Tick::NEVER),
            Err(Cut::Drained) => return Err(Outcome::reject(At::Forward, Why::Drained)),
        }
    }
}
