//! `/metrics`: every worker's cells added up, as Prometheus text.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric as Row, MetricFamily, MetricType,
};
use prometheus::{Registry, TextEncoder};

use crate::account::latency::{LatencyHistogram, LatencyRecorder};
use crate::account::log_queue::{LineClass, Lines};
use crate::account::meter::CounterShard;
use crate::account::names::{self, Metric, MetricKind};
use crate::account::{Direction, PerDirection};
use crate::clock::{self, Moment};
use crate::pool::health::{FULL, HealthState};
use crate::state::LiveState;

/// The bounds of the connect time's buckets.
const CONNECT_BOUNDS: [Duration; 14] = [
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2_500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
];

/// The bounds of the session duration's buckets.
const DURATION_BOUNDS: [Duration; 10] = [
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(1_800),
    Duration::from_secs(7_200),
    Duration::from_secs(86_400),
];

/// The text of a scrape.
///
/// # Errors
/// What the prometheus crate refuses: a name or label that breaks its rules.
pub fn text(live: &Arc<LiveState>) -> prometheus::Result<String> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    registry.register(Box::new(MetricsCollector::new(Arc::clone(live))?))?;
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// Reads the cells when it is asked.
struct MetricsCollector {
    live: Arc<LiveState>,
    descriptions: Vec<Desc>,
}

impl MetricsCollector {
    fn new(live: Arc<LiveState>) -> prometheus::Result<Self> {
        let description = |metric: &Metric| {
            let labels = metric.labels.iter().map(ToString::to_string).collect();
            Desc::new(metric.name.to_owned(), metric.help.to_owned(), labels, HashMap::new())
        };
        let descriptions = names::ALL.iter().map(description).collect::<prometheus::Result<_>>()?;
        Ok(Self { live, descriptions })
    }
}

impl Collector for MetricsCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut sheet = Samples::default();
        process(&mut sheet, &self.live);
        pools(&mut sheet, &self.live);
        tenants(&mut sheet, &self.live);
        for (worker, shard) in self.live.shards.iter().enumerate() {
            self::worker(&mut sheet, worker, shard);
            routes(&mut sheet, shard);
            listeners(&mut sheet, shard);
            backends(&mut sheet, shard);
        }
        sheet.families()
    }
}

/// The values of a scrape: those of the same labels are added up.
#[derive(Default)]
struct Samples {
    numbers: BTreeMap<&'static str, BTreeMap<Vec<String>, f64>>,
    times: BTreeMap<&'static str, BTreeMap<Vec<String>, LatencyHistogram>>,
}

impl Samples {
    fn add(&mut self, metric: &Metric, labels: &[&str], value: f64) {
        debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
        let key = labels.iter().map(ToString::to_string).collect();
        *self.numbers.entry(metric.name).or_default().entry(key).or_default() += value;
    }

    fn count(&mut self, metric: &Metric, labels: &[&str], value: u64) {
        #[expect(clippy::cast_precision_loss, reason = "Prometheus has no other numbers")]
        self.add(metric, labels, value as f64);
    }

    fn each_way(&mut self, metric: &Metric, labels: &[&str], values: PerDirection<u64>) {
        for direction in Direction::ALL {
            self.count(metric, &[labels, &[direction.word()]].concat(), *values.way(direction));
        }
    }

    fn times(&mut self, metric: &Metric, label: &str, recorder: &LatencyRecorder) {
        let rows = self.times.entry(metric.name).or_default();
        rows.entry(vec![label.to_owned()]).or_default().add(&recorder.times());
    }

    fn families(mut self) -> Vec<MetricFamily> {
        names::ALL.iter().filter_map(|metric| self.family(metric)).collect()
    }

    fn family(&mut self, metric: &Metric) -> Option<MetricFamily> {
        let numbers = self.numbers.remove(metric.name).unwrap_or_default();
        let times = self.times.remove(metric.name).unwrap_or_default();
        let kind = match metric.kind {
            MetricKind::Counter => MetricType::COUNTER,
            MetricKind::Gauge => MetricType::GAUGE,
            MetricKind::Histogram => MetricType::HISTOGRAM,
        };
        let rows = numbers.into_iter().map(|(labels, value)| number_row(metric, labels, value));
        let rows: Vec<_> =
            rows.chain(times.into_iter().map(|(labels, times)| times_row(metric, labels, &times))).collect();
        if rows.is_empty() {
            return None;
        }
        let mut family = MetricFamily::default();
        family.set_name(metric.name.to_owned());
        family.set_help(metric.help.to_owned());
        family.set_field_type(kind);
        family.set_metric(rows);
        Some(family)
    }
}

fn row(metric: &Metric, labels: Vec<String>) -> Row {
    let pairs = metric.labels.iter().zip(labels).map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value(value);
        pair
    });
    let mut row = Row::default();
    row.set_label(pairs.collect());
    row
}

fn number_row(metric: &Metric, labels: Vec<String>, value: f64) -> Row {
    let mut row = row(metric, labels);
    if metric.kind == MetricKind::Counter {
        let mut counter = Counter::default();
        counter.set_value(value);
        row.set_counter(counter);
    } else {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        row.set_gauge(gauge);
    }
    row
}

fn times_row(metric: &Metric, labels: Vec<String>, times: &LatencyHistogram) -> Row {
    let bounds: &[Duration] =
        if metric.name == names::CONNECT_TIME.name { &CONNECT_BOUNDS } else { &DURATION_BOUNDS };
    let buckets = bounds.iter().map(|bound| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound.as_secs_f64());
        bucket.set_cumulative_count(times.at_most(*bound));
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(times.count());
    histogram.set_sample_sum(times.sum_seconds());
    let mut row = row(metric, labels);
    row.set_histogram(histogram);
    row
}

fn process(sheet: &mut Samples, live: &LiveState) {
    let snapshot = live.snapshot.load();
    sheet.count(&names::SESSIONS_LIMIT, &[], live.sessions.limit() as u64);
    for listener in &snapshot.listeners {
        if let Some(limit) = listener.pending_limit() {
            sheet.count(&names::PENDING_LIMIT, &[listener.label.name()], limit as u64);
        }
    }
    sheet.count(&names::LISTENERS_STOPPED, &[], live.stopped_listeners.count() as u64);
    sheet.count(&names::TENANTS, &[], snapshot.directory.tenants().len() as u64);
    sheet.count(&names::PIPE_MEMORY, &[], live.pipes.used());
    sheet.count(&names::BUFFER_MEMORY, &[], live.buffers.used());
    sheet.count(&names::BUFFER_MEMORY_LIMIT, &[], live.buffers.limit());
    let losses = live.log.losses();
    for class in LineClass::ALL {
        let of = |lines: Lines| lines.get(class as usize).copied().unwrap_or_default();
        sheet.count(&names::LOG_DROPPED, &[class.word()], of(losses.dropped));
        if class != LineClass::Session {
            sheet.count(&names::LOG_LEFT_OUT, &[class.word()], of(losses.left_out));
        }
    }
    sheet.count(&names::RELOADS, &[], live.reloads.done());
    sheet.count(&names::RELOADS_REJECTED, &[], live.reloads.refused());
    for (result, count) in live.takeovers.results() {
        sheet.count(&names::TAKEOVERS, &[result], count);
    }
    sheet.count(&names::RELOAD_SUCCESSFUL, &[], u64::from(live.reloads.last_was_successful()));
    sheet.add(&names::RELOADED, &[], live.reloads.last_done().as_secs_f64());
    sheet.count(&names::DRAINING, &[], u64::from(live.is_draining()));
    let phase = live.draining.phase();
    sheet.count(&names::DRAIN_STAGE, &[phase.word()], 1);
    let left = if live.is_draining() { live.sessions_now() } else { 0 };
    sheet.count(&names::DRAIN_LEFT, &[], left);
    for (endpoint, count) in live.admin_connections.open() {
        sheet.count(&names::ADMIN_OPEN, &[endpoint.word()], count);
    }
    for (endpoint, ended, count) in live.admin_connections.ended() {
        sheet.count(&names::ADMIN_ENDED, &[endpoint.word(), ended.word()], count);
    }
    let tcp = live.ports.usage().into_iter().map(|usage| (usage.backend.to_string(), "tcp", usage));
    // A UDP port is for all backends.
    let udp = live.udp_ports.usage().into_iter().map(|usage| (String::new(), "udp", usage));
    for (backend, protocol, usage) in tcp.chain(udp) {
        sheet.count(&names::LOCAL_PORTS, &[&backend, protocol, "live"], usage.live as u64);
        sheet.count(&names::LOCAL_PORTS, &[&backend, protocol, "waiting"], usage.waiting as u64);
        sheet.count(&names::LOCAL_PORTS_LIMIT, &[&backend, protocol], usage.limit as u64);
    }
    sheet.count(&names::BUILD, &[env!("CARGO_PKG_VERSION")], 1);
}

/// What probes, names and sessions say of backends, which no worker counts.
fn pools(sheet: &mut Samples, live: &LiveState) {
    let (now, wall) = (clock::now(), clock::wall());
    let unix = |moment: Moment| {
        let then = wall.checked_sub(now.since(moment)).unwrap_or(UNIX_EPOCH);
        then.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
    };
    for pool in &live.snapshot.load().pools {
        let (name, roster) = (pool.label.name(), pool.roster());
        sheet.count(&names::POOL_GROUND, &[name, roster.ground().word()], 1);
        sheet.count(&names::POOL_USABLE, &[name], roster.used().len() as u64);
        sheet.count(&names::POOL_QUEUED, &[name], pool.waiting() as u64);
        let (made, refused) = pool.retries();
        sheet.count(&names::POOL_RETRIES, &[name, "made"], made);
        sheet.count(&names::POOL_RETRIES, &[name, "refused"], refused);
        for (target, lookups) in pool.names().zip(pool.lookups()) {
            let target = target.to_string();
            for (lookup, count) in lookups.counts().filter(|(_, count)| *count > 0) {
                sheet.count(&names::LOOKUPS, &[name, &target, lookup.word()], count);
            }
        }
        for backend in roster.backends() {
            let labels = [name, backend.label().name()];
            let healthy = match backend.state() {
                HealthState::Healthy => 1.0,
                HealthState::Unhealthy => 0.0,
                HealthState::Unknown => -1.0,
            };
            sheet.add(&names::BACKEND_HEALTHY, &labels, healthy);
            sheet.add(&names::BACKEND_WEIGHT, &labels, f64::from(backend.weight()) / f64::from(FULL));
            sheet.count(&names::BACKEND_RESETS, &labels, backend.early_resets());
            sheet.count(&names::BACKEND_EJECTED, &labels, u64::from(backend.is_ejected()));
            sheet.count(&names::BACKEND_EJECTIONS, &labels, backend.ejections());
            let (changed, cause) = backend.summary().changed;
            sheet.add(&names::BACKEND_CHANGED, &[labels[0], labels[1], cause.word()], unix(changed));
            if pool.probe.is_some() {
                let took = Duration::from_micros(backend.probe_us().into());
                sheet.add(&names::BACKEND_PROBE_TIME, &labels, took.as_secs_f64());
            }
            for (verdict, count) in backend.probes().filter(|(_, count)| *count > 0) {
                sheet.count(&names::BACKEND_PROBES, &[labels[0], labels[1], verdict.word()], count);
            }
        }
    }
}

/// What is in use of each tenant's limits, and what they did; of a tenant without limits only that it was rejected.
/// Tenants that never had a session are left out: of 100,000 they may be most.
fn tenants(sheet: &mut Samples, live: &LiveState) {
    let routes = live.shards.iter().flat_map(|shard| shard.routes());
    let labels: BTreeMap<_, _> = routes.map(|route| (route.tenant.serial(), route.tenant.clone())).collect();
    for label in labels.values() {
        let (name, Some(quota)) = (label.name(), live.quotas.known(label)) else { continue };
        if quota.is_limited() {
            sheet.count(&names::TENANT_SESSIONS, &[name], quota.sessions() as u64);
        }
        if quota.is_limited() && (quota.flows() > 0 || quota.flows_limit().is_some()) {
            sheet.count(&names::TENANT_FLOWS, &[name], quota.flows() as u64);
        }
        if let Some(limit) = quota.flows_limit() {
            sheet.count(&names::TENANT_FLOWS_LIMIT, &[name], limit as u64);
        }
        if let Some(limit) = quota.sessions_limit() {
            sheet.count(&names::TENANT_SESSIONS_LIMIT, &[name], limit as u64);
        }
        for (why, count) in quota.rejected().filter(|(_, count)| *count > 0) {
            sheet.count(&names::TENANT_REJECTED, &[name, why.word()], count);
        }
        for (why, count) in quota.would_reject().filter(|(_, count)| *count > 0) {
            sheet.count(&names::TENANT_WOULD_REJECT, &[name, why.word()], count);
        }
        for direction in Direction::ALL {
            let (budget, labels) = (quota.budget(direction), [name, direction.word()]);
            if budget.is_limited() {
                sheet.add(&names::TENANT_DELAYED, &labels, budget.delayed().as_secs_f64());
                sheet.count(&names::TENANT_WOULD_DELAY, &labels, budget.would_delay());
                sheet.count(&names::TENANT_WAITING, &labels, budget.waiting());
                sheet.count(&names::TENANT_HELD, &labels, budget.held());
            }
        }
    }
}

fn worker(sheet: &mut Samples, number: usize, shard: &CounterShard) {
    let number = number.to_string();
    let cells = &shard.worker;
    let active = shard.routes().iter().map(|route| route.active.value()).sum();
    sheet.count(&names::WORKER_SESSIONS, &[&number], active);
    let connecting = Duration::from_nanos(cells.connect_calls.value());
    sheet.add(&names::CONNECT_CALLS, &[&number], connecting.as_secs_f64());
    sheet.count(&names::HANDED_OVER, &[&number], cells.handed_over.value());
    sheet.count(&names::PIPES, &[], cells.pipes.value());
    sheet.count(&names::PIPES_REFUSED, &[], cells.pipes_refused.value());
    sheet.count(&names::BUFFERS_REFUSED, &[], cells.buffers_refused.value());
    sheet.each_way(&names::MODE_BYTES, &["copy"], cells.copied.values());
    sheet.each_way(&names::MODE_BYTES, &["splice"], cells.spliced.values());
}

fn routes(sheet: &mut Samples, shard: &CounterShard) {
    // Held to the end: meanwhile no row is added to the one of what is gone, and would be counted twice.
    let routes = shard.routes();
    for route in &routes {
        let labels = [route.listener.name(), route.tenant.name(), route.pool.name()];
        sheet.count(&names::ACTIVE, &labels, route.active.value());
        for (outcome, count) in route.ended().filter(|(_, count)| *count > 0) {
            let end = [outcome.by.word(), outcome.at.word(), outcome.why.word()];
            sheet.count(&names::ENDED, &[&labels[..], &end].concat(), count);
        }
        // Without a pool nothing is ever forwarded.
        if !route.pool.name().is_empty() {
            sheet.each_way(&names::BYTES, &labels, route.bytes.values());
        }
        if route.datagrams() != PerDirection::default() {
            sheet.each_way(&names::DATAGRAMS, &labels, route.datagrams());
        }
        let lost = route.lost().map(|(loss, counts)| (&names::DATAGRAMS_DROPPED, loss, counts));
        let would = route.would_lose().map(|(loss, counts)| (&names::DATAGRAMS_WOULD_DROP, loss, counts));
        for (metric, loss, counts) in lost.chain(would) {
            for direction in Direction::ALL.into_iter().filter(|way| *counts.way(*way) > 0) {
                let drop = [direction.word(), loss.word()];
                sheet.count(metric, &[&labels[..], &drop].concat(), *counts.way(direction));
            }
        }
    }
}

fn listeners(sheet: &mut Samples, shard: &CounterShard) {
    let listeners = shard.listeners();
    for cells in &listeners {
        let listener = cells.listener.name();
        sheet.count(&names::ACCEPTED, &[listener], cells.accepted.value());
        sheet.count(&names::TAKEN_OVER, &[listener], cells.taken_over.value());
        sheet.count(&names::PENDING, &[listener], cells.pending.value());
        for (class, count) in [
            ("peer", &cells.errors_peer),
            ("shortage", &cells.errors_shortage),
            ("fatal", &cells.errors_fatal),
        ] {
            sheet.count(&names::ACCEPT_ERRORS, &[listener, class], count.value());
        }
        if let Some(overflowed) = cells.overflowed.get() {
            for direction in Direction::ALL {
                let count = overflowed.way(direction).value();
                sheet.count(&names::DATAGRAMS_OVERFLOWED, &[listener, direction.word()], count);
            }
        }
        sheet.times(&names::DURATION, listener, &cells.duration);
    }
}

fn backends(sheet: &mut Samples, shard: &CounterShard) {
    // As in `routes`.
    let (backends, pools) = (shard.backends(), shard.pools());
    for cells in &backends {
        let labels = [cells.pool.name(), cells.backend.name()];
        sheet.count(&names::BACKEND_ACTIVE, &labels, cells.active.value());
        sheet.each_way(&names::BACKEND_BYTES, &labels, cells.bytes.values());
        for (result, count) in cells.connects() {
            sheet.count(&names::BACKEND_CONNECTS, &[labels[0], labels[1], result.word()], count);
        }
    }
    for cells in &pools {
        sheet.times(&names::CONNECT_TIME, cells.pool.name(), &cells.connect_time);
    }
}
