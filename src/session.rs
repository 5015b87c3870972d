//! One TCP session, from accept to its log line: the only place that knows the order of the steps.

mod dial;
pub mod freeze;
mod visit;

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::accept::AcceptedConnection;
use crate::account::Label;
use crate::account::log::{AccessLogRecord, LogFlags};
use crate::account::session_metrics::SessionMetrics;
use crate::addr::{BackendAddr, ClientAddr, PeerAddr};
use crate::admission::ports::{LocalPort, PortSpace};
use crate::admission::quota::SessionPermit;
use crate::admission::slots;
use crate::clock::{self, Moment};
use crate::connect::ConnectPurpose;
use crate::forward::bandwidth::{TenantResources, WorkerResources};
use crate::forward::pipe::PipeCache;
use crate::forward::{self, ConnectionPair, RelayStop};
use crate::frozen::Departure;
use crate::header::{self, IdentifiedClient};
use crate::id::{EndpointClaim, SessionId};
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::pool::{PickedBackend, Pool, SessionFailure, pick};
use crate::session_context::SessionContext;
use crate::state::rejection_log::LogLine;
use crate::state::{ListenerState, Snapshot, WorkerContext};
use crate::tenant::Tenant;

use self::freeze::{FrozenSession, SessionRecord};

/// What only the sessions of a worker use.
#[derive(Debug)]
pub struct SessionWorker {
    /// What they share with its flows.
    pub context: Rc<WorkerContext>,
    /// What they use for forwarding.
    pub resources: WorkerResources,
    /// Where sessions leave for another process, while they do.
    pub departures: RefCell<Option<mpsc::Sender<Departure<SessionRecord>>>>,
    /// The snapshot's number of revocations that sessions were last visited for, and when they may be visited again.
    revocations: Cell<u32>,
    next_visit: Cell<Moment>,
}

impl SessionWorker {
    /// No sessions yet.
    #[must_use]
    pub fn new(context: &Rc<WorkerContext>) -> Rc<Self> {
        let live = &context.live;
        Rc::new(Self {
            context: Rc::clone(context),
            resources: WorkerResources {
                pipes: PipeCache::new(Arc::clone(&live.pipes)),
                buffers: Arc::clone(&live.buffers),
                bandwidth: RefCell::default(),
            },
            departures: RefCell::default(),
            revocations: Cell::new(context.with_snapshot(|snapshot| snapshot.revocations)),
            next_visit: Cell::default(),
        })
    }

    /// Ends sessions without a whole header that have waited too long for how many there are.
    pub fn end_late_headers(&self, now: Moment) {
        let snapshot = self.context.snapshot();
        for header in snapshot.listeners.iter().filter_map(|listener| listener.header.as_ref()) {
            header.pending.expire(header.timeout.duration(), now);
        }
    }

    /// The worker's resources for a session of this tenant.
    fn resources<'a>(&'a self, permit: &'a SessionPermit) -> TenantResources<'a> {
        TenantResources { worker: &self.resources, quota: permit.quota() }
    }
}

/// What is known about a session for its log line.
struct LogContext<'a> {
    peer: PeerAddr,
    client: Option<ClientAddr>,
    endpoint: EndpointClaim,
    tenant: Option<&'a Tenant>,
    pool: Option<&'a Pool>,
    path: Option<BackendPath>,
    attempts: u32,
    /// In microseconds.
    connect_us: Option<u32>,
    flags: LogFlags,
}

/// How the backend that was tried last is reached.
enum BackendPath {
    /// From one of these local ports, if any.
    Tried(Arc<PortSpace>),
    /// By a connection from this one.
    Connected(LocalPort),
}

impl BackendPath {
    fn space(&self) -> &Arc<PortSpace> {
        match self {
            Self::Tried(space) => space,
            Self::Connected(port) => port.space(),
        }
    }
}

impl LogContext<'_> {
    /// The serial number of its tenant's label.
    fn tenant_number(&self) -> u32 {
        self.tenant.map_or(0, |tenant| tenant.label.serial())
    }

    /// The backend that was tried last.
    fn backend(&self) -> Option<BackendAddr> {
        self.path.as_ref().map(|path| BackendAddr(path.space().backend()))
    }

    /// The connection to the backend is closed, or gone to another process: its local port is free, or in TIME_WAIT where
    /// our side closed first.
    fn leave_port(&mut self, outcome: Outcome) {
        let closed_first = (outcome.why == Reason::Done && outcome.by == EndedBy::Client)
            || matches!(outcome.why, Reason::IdleTimeout | Reason::HalfCloseTimeout | Reason::Drained);
        if let Some(BackendPath::Connected(port)) = &mut self.path {
            if closed_first {
                port.will_wait();
            }
            // Drops the port, and keeps the backend for the log.
            self.path = Some(BackendPath::Tried(Arc::clone(port.space())));
        }
    }
}

/// Carries a session from its first byte to its last, and accounts for it once, at the end. `load` is held as long.
///
/// One future for all of it: each that is awaited within another keeps a place for its arguments, for life.
pub async fn run(worker: Rc<SessionWorker>, accepted: AcceptedConnection, listener: u32, load: impl Sized) {
    let context = &worker.context;
    let snapshot = context.snapshot();
    let Some(rules) = snapshot.listeners.get(listener as usize) else { return };
    let metrics = SessionMetrics::new(Rc::clone(&context.metrics), &rules.label);
    let id = SessionId::new(context.number, context.metrics.next_session());
    let mut session = SessionContext::new(Rc::clone(&context.local), metrics, clock::now());
    let mut log_context = LogContext {
        peer: accepted.peer,
        client: None,
        endpoint: EndpointClaim::Absent,
        tenant: None,
        pool: None,
        path: None,
        attempts: 0,
        connect_us: None,
        flags: LogFlags::default(),
    };
    let outcome = 'life: {
        let (pair, admitted, picked) = {
            let steps = SessionSteps { worker: &worker, snapshot: &snapshot, listener, rules };
            // What leads to forwarding takes more room than forwarding does, and gives it back.
            match boxed(steps.run_steps(accepted, &mut session, &mut log_context)).await {
                Ok(led) => led,
                Err(outcome) => break 'life outcome,
            }
        };
        let resources = worker.resources(&admitted.permit);
        let mut relay = forward::relay(pair, &snapshot.timeouts, resources, &mut session);
        if log_context.flags.queued_us > 0 {
            // A reload may have come while it waited in the pool's queue, and this worker's visit is yet to come.
            relay.visit_first();
        }
        let outcome = loop {
            if let RelayStop::Ended(outcome) = (&mut relay).await {
                break outcome;
            }
            if let Some(outcome) = worker.check(&mut relay, &log_context, &admitted.permit) {
                break outcome;
            }
            // Apart, because few sessions ever leave, and each would keep room for it for its whole life.
            if worker.context.local.is_transferring()
                && let Some(outcome) =
                    boxed(freeze::depart(&worker, &mut relay, &log_context, &admitted.permit, id)).await
            {
                break outcome;
            }
        };
        drop(relay);
        report_result(&picked, outcome, &session, &log_context);
        log_context.leave_port(outcome);
        outcome
    };
    account_for(&worker.context, session, outcome, id, (&log_context, &snapshot));
    drop(load);
}

/// Counts a session's end and writes its line, once.
fn account_for(
    context: &WorkerContext,
    session: SessionContext,
    outcome: Outcome,
    id: SessionId,
    (log_context, snapshot): (&LogContext<'_>, &Snapshot),
) {
    if outcome.is_logged() && context.access_log.is_on() {
        let strays = || snapshot.strays(session.metrics.labels()[0]);
        let strays = if log_context.tenant.is_none() { strays() } else { None };
        match context.rejections.line(outcome, log_context.tenant, strays, clock::now()) {
            Ok(entry) => write(context, &session, outcome, id, log_context, entry),
            Err(class) => context.access_log.leave_out(class),
        }
    }
    let total = session.started.age(clock::now());
    session.metrics.end(outcome, total);
}

/// Writes the line of a session's end.
fn write(
    context: &WorkerContext,
    session: &SessionContext,
    outcome: Outcome,
    id: SessionId,
    log_context: &LogContext<'_>,
    entry: LogLine,
) {
    let bytes = session.metrics.bytes();
    let would_delay = session.metrics.would_delay;
    let total = session.started.age(clock::now());
    let number = session.metrics.labels()[1].serial();
    // By their names here: they need not be in any snapshot.
    let [listener, tenant, pool] = session.metrics.labels().map(Label::name);
    let known = |name| Some(name).filter(|name: &&str| !name.is_empty());
    let record = AccessLogRecord {
        time: clock::wall(),
        session: id,
        listener,
        tenant: known(tenant),
        endpoint: log_context.endpoint.id(),
        client: log_context.client,
        peer: log_context.peer,
        pool: known(pool),
        backend: log_context.backend(),
        attempts: log_context.attempts,
        bytes,
        datagrams: None,
        connect_ms: log_context.connect_us.map(|span| Duration::from_micros(span.into())),
        total_ms: total,
        outcome,
        flags: LogFlags {
            would_delay,
            left_out: u32::try_from(entry.left_out).unwrap_or(u32::MAX),
            ..log_context.flags
        },
        labels: log_context.tenant.and_then(|tenant| tenant.labels.as_deref()),
    };
    context.access_log.write(entry.class, number, &record);
}

/// Thaws a session that another process has begun, and carries it from what that has told to its last byte. `load` is held as
/// long.
///
/// Where its tenant, pool or backend is not here any more it goes on all the same, and is counted under their names.
///
/// Boxed, so that what was told of it takes no room while it lives.
pub async fn thaw(worker: Rc<SessionWorker>, mut frozen: Box<FrozenSession>, load: impl Sized) {
    let live = &worker.context.live;
    let (snapshot, id, _slot) = (worker.context.snapshot(), frozen.session(), live.sessions.take_anyway());
    let mut log_context = frozen.log_context(&snapshot, &live.labels);
    let permit = frozen.adopt(&log_context, live);
    let picked = frozen.pick(&log_context);
    log_context.adopt_port(&frozen, live);
    let mut session = frozen.session_context(&worker.context);
    log_context.flags.would_reject = permit.would_reject();
    let outcome = 'life: {
        let resources = worker.resources(&permit);
        let Ok(mut relay) = frozen.thaw(&snapshot.timeouts, resources, &mut session) else {
            break 'life Outcome::reject(EndedAt::Connect, Reason::Shortage);
        };
        loop {
            if let RelayStop::Ended(outcome) = (&mut relay).await {
                break outcome;
            }
            if let Some(outcome) = worker.check(&mut relay, &log_context, &permit) {
                break outcome;
            }
            if worker.context.local.is_transferring()
                && let Some(outcome) =
                    boxed(freeze::depart(&worker, &mut relay, &log_context, &permit, id)).await
            {
                break outcome;
            }
        }
    };
    if let Some(picked) = &picked {
        report_result(picked, outcome, &session, &log_context);
    }
    log_context.leave_port(outcome);
    account_for(&worker.context, session, outcome, id, (&log_context, &snapshot));
    drop(load);
}

/// On the heap, in blocks of 896 bytes, the allocator's size below 1,024.
fn boxed<F: Future>(lead: F) -> Pin<Box<F>> {
    debug_assert!(size_of::<F>() <= 896, "{} bytes", size_of::<F>());
    Box::pin(lead)
}

/// The slots of an admitted session: one of its tenant and one of the process.
struct AdmittedSession {
    permit: SessionPermit,
    _slot: slots::SlotPermit,
}

/// The steps of a session, on the snapshot of its start.
struct SessionSteps<'a> {
    worker: &'a SessionWorker,
    snapshot: &'a Snapshot,
    listener: u32,
    rules: &'a ListenerState,
}

impl<'a> SessionSteps<'a> {
    /// All steps up to forwarding.
    async fn run_steps(
        &self,
        accepted: AcceptedConnection,
        session: &mut SessionContext,
        log_context: &mut LogContext<'a>,
    ) -> Result<(ConnectionPair, AdmittedSession, PickedBackend), Outcome> {
        let (mut client, pool, admitted) = self.prepare(accepted, session, log_context).await?;
        let speaks = pool.send_proxy || client.payload_len() > 0;
        let opening = if speaks { ConnectPurpose::Speaks } else { ConnectPurpose::Listens };
        let key = pool
            .key(|| pick::by_client(client.address), || pick::by_endpoint(client.endpoint, client.address));
        let dialled = self.dial(pool, key, opening, &mut client.connection, session, log_context).await;
        let (backend, load) = dialled.inspect_err(|_| client.connection.reset_on_close())?;
        let (connection, first) = client.into_parts(pool.send_proxy);
        let client =
            connection.into_registered().map_err(|_| Outcome::reject(EndedAt::Connect, Reason::Shortage))?;
        Ok((ConnectionPair { client, backend, first }, admitted, load))
    }

    /// Every step up to the dial. Apart, so that what these steps need takes no room beside the dial.
    async fn prepare(
        &self,
        accepted: AcceptedConnection,
        session: &mut SessionContext,
        log_context: &mut LogContext<'a>,
    ) -> Result<(IdentifiedClient, &'a Pool, AdmittedSession), Outcome> {
        let client = self.read_header(accepted, session, log_context).await?;
        let heard = self.admit(&client, session, log_context);
        let (pool, admitted) = heard.inspect_err(|_| client.connection.reset_on_close())?;
        let resources = self.worker.resources(&admitted.permit);
        let (payload, idle) = (client.payload_len(), self.snapshot.timeouts.idle);
        let paid = resources.charge_first(payload, idle, || client.connection.take_error(), session).await;
        paid.inspect_err(|_| client.connection.reset_on_close())?;
        Ok((client, pool, admitted))
    }

    /// Reads the client's header.
    async fn read_header(
        &self,
        accepted: AcceptedConnection,
        session: &mut SessionContext,
        log_context: &mut LogContext<'a>,
    ) -> Result<IdentifiedClient, Outcome> {
        if !self.rules.trusts(accepted.peer) {
            return Err(Outcome::reject(EndedAt::Accept, Reason::UntrustedSource));
        }
        let client = match &self.rules.header {
            Some(rules) => header::read(accepted.socket, rules, session).await?,
            None => IdentifiedClient::without_header(accepted.socket, accepted.peer),
        };
        log_context.client = client.address;
        log_context.endpoint = client.endpoint;
        Ok(client)
    }

    /// Whose traffic it is, where it goes, and whether there is room for it.
    fn admit(
        &self,
        client: &IdentifiedClient,
        session: &mut SessionContext,
        log_context: &mut LogContext<'a>,
    ) -> Result<(&'a Pool, AdmittedSession), Outcome> {
        let tenant = self.snapshot.directory.find(client.endpoint, self.rules.tenants)?;
        let pool = tenant.pool_on(self.listener, self.rules.pool);
        let pool = pool.and_then(|place| self.snapshot.pools.get(place as usize)).map(Arc::as_ref);
        session.metrics.assign_tenant(&tenant.label, pool.map(|pool| &pool.label));
        log_context.tenant = Some(tenant);
        log_context.pool = pool;
        tenant.admit()?;
        let pool = pool.ok_or(Outcome::reject(EndedAt::Tenant, Reason::NoPool))?;
        let reject = |why| Outcome::reject(EndedAt::Tenant, why);
        // Before the tenant is asked: without a slot nothing is taken of its rate.
        let slot = self.worker.context.live.sessions.take();
        let slot = slot.ok_or_else(|| reject(tenant.quota.reject(Reason::Shed)))?;
        let permit = tenant.quota.admit(clock::now()).map_err(reject)?;
        log_context.flags.would_reject = permit.would_reject();
        Ok((pool, AdmittedSession { permit, _slot: slot }))
    }
}

/// Reports the result of a forwarded session to its backend's health.
fn report_result(
    picked: &PickedBackend,
    outcome: Outcome,
    session: &SessionContext,
    log_context: &LogContext<'_>,
) {
    if session.metrics.bytes().to_client > 0 {
        picked.answered();
    } else if outcome.by == EndedBy::Backend && matches!(outcome.why, Reason::Reset | Reason::Unanswered) {
        let Some(pool) = log_context.pool else { return };
        let failed = SessionFailure::Reset { tenant: log_context.tenant_number() };
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

    fn size<A, F: Future>(_: impl Fn(Rc<SessionWorker>, A) -> F) -> usize {
        size_of::<F>()
    }

    /// With its slot in the worker it has 624 bytes, and the allocator gives it 640.
    #[test]
    fn forwarding_session_is_small() {
        let size = size(|worker, accepted: AcceptedConnection| run(worker, accepted, 0, ()));
        assert!(size <= 608, "{size} bytes");
    }

    #[test]
    fn taken_over_session_is_no_larger() {
        let size = size(|worker, frozen: Box<FrozenSession>| thaw(worker, frozen, ()));
        assert!(size <= 608, "{size} bytes");
    }
}
