//! `/metrics`: the counters of all workers added up, as Prometheus text.

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
use crate::account::names::{self, Metric, MetricKind};
use crate::account::session_metrics::CounterShard;
use crate::account::{Direction, PerDirection};
use crate::build_info;
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
pub(crate) fn text(live: &Arc<LiveState>) -> prometheus::Result<String> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    registry.register(Box::new(MetricsCollector::new(Arc::clone(live))?))?;
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// Collects the counters at a scrape.
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
        let mut samples = Samples::default();
        process(&mut samples, &self.live);
        pools(&mut samples, &self.live);
        tenants(&mut samples, &self.live);
        for (worker, shard) in self.live.shards.iter().enumerate() {
            self::worker(&mut samples, worker, shard);
            routes(&mut samples, shard);
            listeners(&mut samples, shard);
            backends(&mut samples, shard);
        }
        samples.families()
    }
}

/// The values of a scrape; values of equal labels are added up.
#[derive(Default)]
struct Samples {
    numbers: BTreeMap<&'static str, BTreeMap<Vec<String>, f64>>,
    latencies: BTreeMap<&'static str, BTreeMap<Vec<String>, LatencyHistogram>>,
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

    fn per_direction(&mut self, metric: &Metric, labels: &[&str], values: PerDirection<u64>) {
        for direction in Direction::ALL {
            self.count(metric, &[labels, &[direction.as_str()]].concat(), *values.of(direction));
        }
    }

    fn latency(&mut self, metric: &Metric, label: &str, recorder: &LatencyRecorder) {
        let rows = self.latencies.entry(metric.name).or_default();
        rows.entry(vec![label.to_owned()]).or_default().add(&recorder.times());
    }

    fn families(mut self) -> Vec<MetricFamily> {
        names::ALL.iter().filter_map(|metric| self.family(metric)).collect()
    }

    fn family(&mut self, metric: &Metric) -> Option<MetricFamily> {
        let numbers = self.numbers.remove(metric.name).unwrap_or_default();
        let times = self.latencies.remove(metric.name).unwrap_or_default();
        let kind = match metric.kind {
            MetricKind::Counter => MetricType::COUNTER,
            MetricKind::Gauge => MetricType::GAUGE,
            MetricKind::Histogram => MetricType::HISTOGRAM,
        };
        let rows = numbers.into_iter().map(|(labels, value)| number_row(metric, labels, value));
        let rows: Vec<_> = rows
            .chain(times.into_iter().map(|(labels, times)| latency_row(metric, labels, &times)))
            .collect();
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

fn latency_row(metric: &Metric, labels: Vec<String>, times: &LatencyHistogram) -> Row {
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

fn process(samples: &mut Samples, live: &LiveState) {
    let snapshot = live.snapshot.load();
    samples.count(&names::SESSIONS_LIMIT, &[], live.sessions.limit() as u64);
    for listener in &snapshot.listeners {
        if let Some(limit) = listener.pending_limit() {
            samples.count(&names::PENDING_LIMIT, &[listener.label.name()], limit as u64);
        }
    }
    samples.count(&names::LISTENERS_STOPPED, &[], live.stopped_listeners.count() as u64);
    samples.count(&names::TENANTS, &[], snapshot.directory.tenants().len() as u64);
    samples.count(&names::PIPE_MEMORY, &[], live.pipes.used());
    samples.count(&names::BUFFER_MEMORY, &[], live.buffers.used());
    samples.count(&names::BUFFER_MEMORY_LIMIT, &[], live.buffers.limit());
    let losses = live.log.missing_lines();
    for class in LineClass::ALL {
        let of = |lines: Lines| lines.get(class as usize).copied().unwrap_or_default();
        samples.count(&names::LOG_DROPPED, &[class.as_str()], of(losses.dropped));
        if class != LineClass::Session {
            samples.count(&names::LOG_LEFT_OUT, &[class.as_str()], of(losses.left_out));
        }
    }
    samples.count(&names::RELOADS, &[], live.reloads.done());
    samples.count(&names::RELOADS_REJECTED, &[], live.reloads.refused());
    for (result, count) in live.takeovers.results() {
        samples.count(&names::TAKEOVERS, &[result], count);
    }
    samples.count(&names::RELOAD_SUCCESSFUL, &[], u64::from(live.reloads.last_was_successful()));
    samples.add(&names::RELOADED, &[], live.reloads.last_done().as_secs_f64());
    samples.count(&names::DRAINING, &[], u64::from(live.is_draining()));
    let phase = live.draining.phase();
    samples.count(&names::DRAIN_STAGE, &[phase.as_str()], 1);
    let left = if live.is_draining() { live.sessions_now() } else { 0 };
    samples.count(&names::DRAIN_LEFT, &[], left);
    for (endpoint, count) in live.admin_connections.open() {
        samples.count(&names::ADMIN_OPEN, &[endpoint.as_str()], count);
    }
    for (endpoint, ended, count) in live.admin_connections.ended() {
        samples.count(&names::ADMIN_ENDED, &[endpoint.as_str(), ended.as_str()], count);
    }
    let tcp = live.ports.usage().into_iter().map(|usage| (usage.backend.to_string(), "tcp", usage));
    // A local UDP port is used for all backends.
    let udp = live.udp_ports.usage().into_iter().map(|usage| (String::new(), "udp", usage));
    for (backend, protocol, usage) in tcp.chain(udp) {
        samples.count(&names::LOCAL_PORTS, &[&backend, protocol, "live"], usage.live as u64);
        samples.count(&names::LOCAL_PORTS, &[&backend, protocol, "waiting"], usage.waiting as u64);
        samples.count(&names::LOCAL_PORTS_LIMIT, &[&backend, protocol], usage.limit as u64);
    }
    samples.count(&names::BUILD, &[build_info::VERSION, build_info::COMMIT], 1);
}

/// What probes, names and sessions say of backends, which no worker counts.
fn pools(samples: &mut Samples, live: &LiveState) {
    let (now, wall) = (clock::now(), clock::wall());
    let unix = |moment: Moment| {
        let then = wall.checked_sub(now.since(moment)).unwrap_or(UNIX_EPOCH);
        then.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
    };
    for pool in &live.snapshot.load().pools {
        let (name, candidates) = (pool.label.name(), pool.candidates());
        samples.count(&names::POOL_GROUND, &[name, candidates.tier().as_str()], 1);
        samples.count(&names::POOL_USABLE, &[name], candidates.used().len() as u64);
        samples.count(&names::POOL_QUEUED, &[name], pool.waiting() as u64);
        let (made, refused) = pool.retries();
        samples.count(&names::POOL_RETRIES, &[name, "made"], made);
        samples.count(&names::POOL_RETRIES, &[name, "refused"], refused);
        for (target, lookups) in pool.names().zip(pool.lookups()) {
            let target = target.to_string();
            for (lookup, count) in lookups.counts().filter(|(_, count)| *count > 0) {
                samples.count(&names::LOOKUPS, &[name, &target, lookup.as_str()], count);
            }
        }
        for backend in candidates.backends() {
            let labels = [name, backend.label().name()];
            let healthy = match backend.state() {
                HealthState::Healthy => 1.0,
                HealthState::Unhealthy => 0.0,
                HealthState::Unknown => -1.0,
            };
            samples.add(&names::BACKEND_HEALTHY, &labels, healthy);
            samples.add(&names::BACKEND_WEIGHT, &labels, f64::from(backend.weight()) / f64::from(FULL));
            samples.count(&names::BACKEND_RESETS, &labels, backend.early_resets());
            samples.count(&names::BACKEND_EJECTED, &labels, u64::from(backend.is_ejected()));
            samples.count(&names::BACKEND_EJECTIONS, &labels, backend.ejections());
            let (changed, cause) = backend.summary().changed;
            samples.add(&names::BACKEND_CHANGED, &[labels[0], labels[1], cause.as_str()], unix(changed));
            if pool.probe.is_some() {
                let took = Duration::from_micros(backend.probe_us().into());
                samples.add(&names::BACKEND_PROBE_TIME, &labels, took.as_secs_f64());
            }
            for (verdict, count) in backend.probes().filter(|(_, count)| *count > 0) {
                samples.count(&names::BACKEND_PROBES, &[labels[0], labels[1], verdict.as_str()], count);
            }
        }
    }
}

/// What is in use of each tenant's limits, and what they did; of a tenant without limits only that it was rejected.
/// Tenants that never had a session are left out: of 100,000 they may be most.
fn tenants(samples: &mut Samples, live: &LiveState) {
    let routes = live.shards.iter().flat_map(|shard| shard.routes());
    let labels: BTreeMap<_, _> = routes.map(|route| (route.tenant.serial(), route.tenant.clone())).collect();
    for label in labels.values() {
        let (name, Some(quota)) = (label.name(), live.quotas.known(label)) else { continue };
        if quota.is_limited() {
            samples.count(&names::TENANT_SESSIONS, &[name], quota.sessions() as u64);
        }
        if quota.is_limited() && (quota.flows() > 0 || quota.flows_limit().is_some()) {
            samples.count(&names::TENANT_FLOWS, &[name], quota.flows() as u64);
        }
        if let Some(limit) = quota.flows_limit() {
            samples.count(&names::TENANT_FLOWS_LIMIT, &[name], limit as u64);
        }
        if let Some(limit) = quota.sessions_limit() {
            samples.count(&names::TENANT_SESSIONS_LIMIT, &[name], limit as u64);
        }
        for (why, count) in quota.rejected().filter(|(_, count)| *count > 0) {
            samples.count(&names::TENANT_REJECTED, &[name, why.as_str()], count);
        }
        for (why, count) in quota.would_reject().filter(|(_, count)| *count > 0) {
            samples.count(&names::TENANT_WOULD_REJECT, &[name, why.as_str()], count);
        }
        let stalled = quota.stalled_memory();
        if stalled > 0 || quota.is_limited() {
            samples.count(&names::TENANT_STALLED, &[name], stalled);
        }
        for direction in Direction::ALL {
            let (budget, labels) = (quota.budget(direction), [name, direction.as_str()]);
            if budget.is_limited() {
                samples.add(&names::TENANT_DELAYED, &labels, budget.delayed().as_secs_f64());
                samples.count(&names::TENANT_WOULD_DELAY, &labels, budget.would_delay());
                samples.count(&names::TENANT_WAITING, &labels, budget.waiters());
                samples.count(&names::TENANT_HELD, &labels, budget.held());
            }
        }
    }
}

fn worker(samples: &mut Samples, number: usize, shard: &CounterShard) {
    let number = number.to_string();
    let counters = &shard.worker;
    let active = shard.routes().iter().map(|route| route.active.value()).sum();
    samples.count(&names::WORKER_SESSIONS, &[&number], active);
    let connecting = Duration::from_nanos(counters.connect_calls.value());
    samples.add(&names::CONNECT_CALLS, &[&number], connecting.as_secs_f64());
    samples.count(&names::HANDED_OVER, &[&number], counters.handed_over.value());
    samples.count(&names::PIPES, &[], counters.pipes.value());
    samples.count(&names::PIPES_REFUSED, &[], counters.pipes_refused.value());
    samples.count(&names::BUFFERS_REFUSED, &[], counters.buffers_refused.value());
    samples.per_direction(&names::MODE_BYTES, &["copy"], counters.copied.values());
    samples.per_direction(&names::MODE_BYTES, &["splice"], counters.spliced.values());
}

fn routes(samples: &mut Samples, shard: &CounterShard) {
    // Held to the end: otherwise a row could be folded into the aggregate row meanwhile and be counted twice.
    let routes = shard.routes();
    for route in &routes {
        let labels = [route.listener.name(), route.tenant.name(), route.pool.name()];
        samples.count(&names::ACTIVE, &labels, route.active.value());
        for (outcome, count) in route.ended().filter(|(_, count)| *count > 0) {
            let end = [outcome.by.as_str(), outcome.at.as_str(), outcome.why.as_str()];
            samples.count(&names::ENDED, &[&labels[..], &end].concat(), count);
        }
        // Without a pool nothing is ever forwarded.
        if !route.pool.name().is_empty() {
            samples.per_direction(&names::BYTES, &labels, route.bytes.values());
        }
        if route.datagrams() != PerDirection::default() {
            samples.per_direction(&names::DATAGRAMS, &labels, route.datagrams());
        }
        let lost = route.dropped().map(|(drop, counts)| (&names::DATAGRAMS_DROPPED, drop, counts));
        let would = route.would_drop().map(|(drop, counts)| (&names::DATAGRAMS_WOULD_DROP, drop, counts));
        for (metric, drop, counts) in lost.chain(would) {
            for direction in Direction::ALL.into_iter().filter(|way| *counts.of(*way) > 0) {
                let drop = [direction.as_str(), drop.as_str()];
                samples.count(metric, &[&labels[..], &drop].concat(), *counts.of(direction));
            }
        }
    }
}

fn listeners(samples: &mut Samples, shard: &CounterShard) {
    let listeners = shard.listeners();
    for counters in &listeners {
        let listener = counters.listener.name();
        samples.count(&names::ACCEPTED, &[listener], counters.accepted.value());
        samples.count(&names::TAKEN_OVER, &[listener], counters.taken_over.value());
        samples.count(&names::PENDING, &[listener], counters.pending.value());
        for (class, count) in [
            ("peer", &counters.errors_peer),
            ("shortage", &counters.errors_shortage),
            ("fatal", &counters.errors_fatal),
        ] {
            samples.count(&names::ACCEPT_ERRORS, &[listener, class], count.value());
        }
        if let Some(overflowed) = counters.overflowed.get() {
            for direction in Direction::ALL {
                let count = overflowed.of(direction).value();
                samples.count(&names::DATAGRAMS_OVERFLOWED, &[listener, direction.as_str()], count);
            }
        }
        samples.latency(&names::DURATION, listener, &counters.duration);
    }
}

fn backends(samples: &mut Samples, shard: &CounterShard) {
    // As in `routes`.
    let (backends, pools) = (shard.backends(), shard.pools());
    for counters in &backends {
        let labels = [counters.pool.name(), counters.backend.name()];
        samples.count(&names::BACKEND_ACTIVE, &labels, counters.active.value());
        samples.per_direction(&names::BACKEND_BYTES, &labels, counters.bytes.values());
        for (result, count) in counters.connects() {
            samples.count(&names::BACKEND_CONNECTS, &[labels[0], labels[1], result.as_str()], count);
        }
    }
    for counters in &pools {
        samples.latency(&names::CONNECT_TIME, counters.pool.name(), &counters.connect_time);
    }
}
