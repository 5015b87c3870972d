//! One TCP life, from accept to its line in the log: the only place that knows the order of the steps.

mod dial;
pub mod moved;
mod visit;

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};
use tokio::sync::mpsc;

use crate::accept::Accepted;
use crate::account::Label;
use crate::account::log::{Journal, Marks, Record};
use crate::account::meter::Meter;
use crate::addr::{BackendAddr, ClientAddr, PeerAddr};
use crate::admission::pacer::Pacer;
use crate::admission::ports::{Port, Space};
use crate::admission::quota::Permit;
use crate::admission::slots::{self, Slots};
use crate::clock::{self, Moment};
use crate::connect::Opening;
use crate::forward::pace::Lent;
use crate::forward::pipe::Pipes;
use crate::forward::{self, Pair, Stop};
use crate::header::{self, Client};
use crate::id::{Claim, SessionId};
use crate::life::{Life, Local};
use crate::outcome::{At, By, Outcome, Why};
use crate::pool::{Failed, Picked, Pool, pick};
use crate::state::rejections::{Line, Rejections};
use crate::state::{Listener, Live, Snapshot};
use crate::takeover::Leaving;
use crate::tenant::Tenant;

use self::moved::Moved;

/// What a worker lends to its sessions.
#[derive(Debug)]
pub struct Worker {
    /// Its number, from 0.
    pub number: u16,
    /// What its sessions share.
    pub local: Rc<Local>,
    /// Its pipes.
    pub pipes: Pipes,
    /// Its queues for bandwidth.
    pub pacer: RefCell<Pacer>,
    /// Its end of the access log.
    pub journal: Journal,
    /// What it has left out of that.
    pub rejections: Rejections,
    /// Where sessions leave for another process, while they do.
    pub departures: RefCell<Option<mpsc::Sender<Leaving>>>,
    live: Arc<Live>,
    slots: Arc<Slots>,
    snapshot: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    rolls: RefCell<fastrand::Rng>,
    /// The snapshot's number of revocations that sessions were last visited for, and when they may be visited again.
    revocations: Cell<u32>,
    next_visit: Cell<Moment>,
}

impl Worker {
    /// A worker without sessions.
    #[must_use]
    pub fn new(number: u16, live: &Arc<Live>, local: Rc<Local>, journal: Journal) -> Self {
        Self {
            number,
            local,
            pipes: Pipes::new(Arc::clone(&live.pipes)),
            pacer: RefCell::default(),
            journal,
            rejections: Rejections::default(),
            departures: RefCell::default(),
            live: Arc::clone(live),
            slots: Arc::clone(&live.sessions),
            snapshot: RefCell::new(Cache::new(Arc::clone(&live.snapshot))),
            rolls: RefCell::new(fastrand::Rng::new()),
            revocations: Cell::new(live.snapshot.load().revocations),
            next_visit: Cell::default(),
        }
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(self.snapshot.borrow_mut().load())
    }

    /// Ends sessions without a whole header that have waited too long for how many there are.
    pub fn end_late_headers(&self, now: Moment) {
        for header in self.snapshot().listeners.iter().filter_map(|listener| listener.header.as_ref()) {
            header.pending.expire(header.timeout.duration(), now);
        }
    }

    /// What a session of this tenant is lent.
    fn lent<'a>(&'a self, permit: &'a Permit) -> Lent<'a> {
        Lent { pipes: &self.pipes, buffers: &self.live.buffers, pacer: &self.pacer, quota: permit.quota() }
    }

    fn roll(&self) -> u64 {
        self.rolls.borrow_mut().u64(..)
    }
}

/// What is told of a session when it has ended, as far as it has come.
struct Story<'a> {
    peer: PeerAddr,
    client: Option<ClientAddr>,
    endpoint: Claim,
    tenant: Option<&'a Tenant>,
    pool: Option<&'a Pool>,
    /// The local ports to the backend that was tried last.
    toward: Option<Arc<Space>>,
    /// The one that its connection to the backend uses.
    port: Option<Port>,
    attempts: u32,
    /// In microseconds.
    connect_us: Option<u32>,
    marks: Marks,
}

impl Story<'_> {
    /// The serial number of its tenant's label.
    fn tenant_number(&self) -> u32 {
        self.tenant.map_or(0, |tenant| tenant.label.serial())
    }

    /// The backend that was tried last.
    fn backend(&self) -> Option<BackendAddr> {
        self.toward.as_ref().map(|space| BackendAddr(space.backend()))
    }

    /// The connection to the backend is closed, or gone to another process: its local port is free, or in TIME_WAIT where
    /// our side closed first.
    fn leave_port(&mut self, outcome: Outcome) {
        let closed_first = (outcome.why == Why::Done && outcome.by == By::Client)
            || matches!(outcome.why, Why::IdleTimeout | Why::HalfCloseTimeout | Why::Drained);
        if let Some(mut port) = self.port.take().filter(|_| closed_first) {
            port.will_wait();
        }
    }
}

/// Carries a session from its first byte to its last, and accounts for it once, at the end. `aboard` is held as long.
///
/// One future for all of it: each that is awaited within another keeps a place for its arguments, for life.
pub async fn run(worker: Rc<Worker>, accepted: Accepted, listener: u32, aboard: impl Sized) {
    let snapshot = worker.snapshot();
    let Some(rules) = snapshot.listeners.get(listener as usize) else { return };
    let meter = Meter::new(Rc::clone(&worker.local.ledger), &rules.label);
    let session = SessionId::new(worker.number, worker.local.ledger.next_session());
    let mut life = Life::new(Rc::clone(&worker.local), meter, clock::now());
    let mut story = Story {
        peer: accepted.peer,
        client: None,
        endpoint: Claim::Absent,
        tenant: None,
        pool: None,
        toward: None,
        port: None,
        attempts: 0,
        connect_us: None,
        marks: Marks::default(),
    };
    let outcome = 'life: {
        let (pair, admitted, picked) = {
            let steps = Steps { worker: &worker, snapshot: &snapshot, listener, rules };
            // What leads to forwarding takes more room than forwarding does, and gives it back.
            match boxed(steps.lead(accepted, &mut life, &mut story)).await {
                Ok(led) => led,
                Err(outcome) => break 'life outcome,
            }
        };
        let lent = worker.lent(&admitted.permit);
        let mut relay = forward::relay(pair, &snapshot.patience, lent, &mut life);
        let outcome = loop {
            if let Stop::Ended(outcome) = (&mut relay).await {
                break outcome;
            }
            if let Some(outcome) = worker.check(&mut relay, &story, &admitted.permit) {
                break outcome;
            }
            // Apart, because few sessions ever leave, and each would keep room for it for its whole life.
            if worker.local.is_moving()
                && let Some(outcome) =
                    boxed(moved::depart(&worker, &mut relay, &story, &admitted.permit, session)).await
            {
                break outcome;
            }
        };
        drop(relay);
        judge(&picked, outcome, &life, &story);
        story.leave_port(outcome);
        outcome
    };
    tell(&worker, life, outcome, session, (&story, &snapshot));
    drop(aboard);
}

/// Accounts for a session, once.
fn tell(
    worker: &Worker,
    life: Life,
    outcome: Outcome,
    session: SessionId,
    (story, snapshot): (&Story<'_>, &Snapshot),
) {
    if outcome.is_logged() && worker.journal.is_on() {
        let strays = || snapshot.strays(life.meter.labels()[0]);
        let strays = if story.tenant.is_none() { strays() } else { None };
        match worker.rejections.line(outcome, story.tenant, strays, clock::now()) {
            Ok(entry) => write(worker, &life, outcome, session, story, entry),
            Err(class) => worker.journal.leave_out(class),
        }
    }
    let total = life.started.age(clock::now());
    life.meter.end(outcome, total);
}

/// Writes the line of a session's end.
fn write(worker: &Worker, life: &Life, outcome: Outcome, session: SessionId, story: &Story<'_>, entry: Line) {
    let bytes = life.meter.bytes();
    let would_delay = life.meter.would_delay;
    let total = life.started.age(clock::now());
    let number = life.meter.labels()[1].serial();
    // By their names here: they need not be in any snapshot.
    let [listener, tenant, pool] = life.meter.labels().map(Label::name);
    let known = |name| Some(name).filter(|name: &&str| !name.is_empty());
    let record = Record {
        time: clock::wall(),
        session,
        listener,
        tenant: known(tenant),
        endpoint: story.endpoint.id(),
        client: story.client,
        peer: story.peer,
        pool: known(pool),
        backend: story.backend(),
        attempts: story.attempts,
        bytes,
        datagrams: None,
        connect_ms: story.connect_us.map(|span| Duration::from_micros(span.into())),
        total_ms: total,
        outcome,
        marks: Marks {
            would_delay,
            left_out: u32::try_from(entry.left_out).unwrap_or(u32::MAX),
            ..story.marks
        },
        labels: story.tenant.and_then(|tenant| tenant.labels.as_deref()),
    };
    worker.journal.write(entry.class, number, &record);
}

/// Carries on with a session that another process has begun, from what that has told to its last byte. `aboard` is held as
/// long.
///
/// Where its tenant, pool or backend is not here any more it goes on all the same, and is counted under their names.
///
/// Boxed, so that what was told of it takes no room while it lives.
pub async fn resume(worker: Rc<Worker>, mut moved: Box<Moved>, aboard: impl Sized) {
    let (snapshot, session, _slot) = (worker.snapshot(), moved.session(), worker.slots.take_anyway());
    let mut story = moved.story(&snapshot, &worker.live.labels);
    let permit = moved.adopt(&story, &worker.live);
    let picked = moved.pick(&story);
    story.adopt_port(&moved, &worker.live);
    let mut life = moved.life(&worker);
    story.marks.would_reject = permit.would_reject();
    let outcome = 'life: {
        let lent = worker.lent(&permit);
        let Ok(mut relay) = moved.resume(&snapshot.patience, lent, &mut life) else {
            break 'life Outcome::reject(At::Connect, Why::Shortage);
        };
        loop {
            if let Stop::Ended(outcome) = (&mut relay).await {
                break outcome;
            }
            if let Some(outcome) = worker.check(&mut relay, &story, &permit) {
                break outcome;
            }
            if worker.local.is_moving()
                && let Some(outcome) =
                    boxed(moved::depart(&worker, &mut relay, &story, &permit, session)).await
            {
                break outcome;
            }
        }
    };
    if let Some(picked) = &picked {
        judge(picked, outcome, &life, &story);
    }
    story.leave_port(outcome);
    tell(&worker, life, outcome, session, (&story, &snapshot));
    drop(aboard);
}

/// On the heap, in blocks of 896 bytes, the allocator's size below 1,024.
fn boxed<F: Future>(lead: F) -> Pin<Box<F>> {
    debug_assert!(size_of::<F>() <= 896, "{} bytes", size_of::<F>());
    Box::pin(lead)
}

/// What an admitted session holds: a place of its tenant and one of the process.
struct Admitted {
    permit: Permit,
    _slot: slots::Permit,
}

/// The steps of a session, on the snapshot that it was born with.
struct Steps<'a> {
    worker: &'a Worker,
    snapshot: &'a Snapshot,
    listener: u32,
    rules: &'a Listener,
}

impl<'a> Steps<'a> {
    /// Every step up to forwarding.
    async fn lead(
        &self,
        accepted: Accepted,
        life: &mut Life,
        story: &mut Story<'a>,
    ) -> Result<(Pair, Admitted, Picked), Outcome> {
        let (mut client, pool, admitted) = self.enter(accepted, life, story).await?;
        let speaks = pool.send_proxy || client.payload_len() > 0;
        let opening = if speaks { Opening::Speaks } else { Opening::Listens };
        let key = pool
            .key(|| pick::by_client(client.address), || pick::by_endpoint(client.endpoint, client.address));
        let dialled = self.dial(pool, key, opening, &mut client.connection, life, story).await;
        let (backend, load) = dialled.inspect_err(|_| client.connection.reset_on_close())?;
        let (connection, first) = client.into_parts(pool.send_proxy);
        let client = connection.into_registered().map_err(|_| Outcome::reject(At::Connect, Why::Shortage))?;
        Ok((Pair { client, backend, first }, admitted, load))
    }

    /// Every step up to the dial. Apart, so that what these steps need takes no room beside the dial.
    async fn enter(
        &self,
        accepted: Accepted,
        life: &mut Life,
        story: &mut Story<'a>,
    ) -> Result<(Client, &'a Pool, Admitted), Outcome> {
        let client = self.hear(accepted, life, story).await?;
        let heard = self.place(&client, life, story);
        let (pool, admitted) = heard.inspect_err(|_| client.connection.reset_on_close())?;
        let lent = self.worker.lent(&admitted.permit);
        let (payload, idle) = (client.payload_len(), self.snapshot.patience.idle);
        let paid = lent.pay_first(payload, idle, || client.connection.take_error(), life).await;
        paid.inspect_err(|_| client.connection.reset_on_close())?;
        Ok((client, pool, admitted))
    }

    /// Who speaks.
    async fn hear(
        &self,
        accepted: Accepted,
        life: &mut Life,
        story: &mut Story<'a>,
    ) -> Result<Client, Outcome> {
        if !self.rules.trusts(accepted.peer) {
            return Err(Outcome::reject(At::Accept, Why::UntrustedSource));
        }
        let client = match &self.rules.header {
            Some(rules) => header::read(accepted.socket, rules, life).await?,
            None => Client::without_header(accepted.socket, accepted.peer),
        };
        story.client = client.address;
        story.endpoint = client.endpoint;
        Ok(client)
    }

    /// Whose traffic it is, where it goes, and whether there is room for it.
    fn place(
        &self,
        client: &Client,
        life: &mut Life,
        story: &mut Story<'a>,
    ) -> Result<(&'a Pool, Admitted), Outcome> {
        let tenant = self.snapshot.directory.find(client.endpoint, self.rules.tenants)?;
        let pool = tenant.pool_on(self.listener, self.rules.pool);
        let pool = pool.and_then(|place| self.snapshot.pools.get(place as usize)).map(Arc::as_ref);
        life.meter.assign(&tenant.label, pool.map(|pool| &pool.label));
        story.tenant = Some(tenant);
        story.pool = pool;
        tenant.admit()?;
        let pool = pool.ok_or(Outcome::reject(At::Tenant, Why::NoPool))?;
        let reject = |why| Outcome::reject(At::Tenant, why);
        // Before the tenant is asked: without a slot nothing is taken of its rate.
        let slot = self.worker.slots.take().ok_or_else(|| reject(tenant.quota.reject(Why::Shed)))?;
        let permit = tenant.quota.admit(clock::now()).map_err(reject)?;
        story.marks.would_reject = permit.would_reject();
        Ok((pool, Admitted { permit, _slot: slot }))
    }
}

/// What a session that was forwarded says of its backend.
fn judge(picked: &Picked, outcome: Outcome, life: &Life, story: &Story<'_>) {
    if life.meter.bytes().to_client > 0 {
        picked.answered();
    } else if outcome.by == By::Backend && matches!(outcome.why, Why::Reset | Why::Unanswered) {
        let Some(pool) = story.pool else { return };
        let failed = Failed::Reset { tenant: story.tenant_number() };
        pool.failed(picked, failed, clock::now()).iter().for_each(|change| change.log(pool));
    }
}

/// Rounded; beyond an hour and a quarter all are as long.
fn micros(span: Duration) -> u32 {
    u32::try_from((span.as_nanos() + 500) / 1000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, F: Future>(_: impl Fn(Rc<Worker>, A) -> F) -> usize {
        size_of::<F>()
    }

    /// With its place on board it is 680 bytes, and the allocator gives it 768.
    #[test]
    fn a_session_that_forwards_is_small() {
        let size = size(|worker, accepted: Accepted| run(worker, accepted, 0, ()));
        assert!(size <= 664, "{size} bytes");
    }

    #[test]
    fn one_that_comes_from_another_process_is_no_larger() {
        let size = size(|worker, moved: Box<Moved>| resume(worker, moved, ()));
        assert!(size <= 664, "{size} bytes");
    }
}
