//! Every metric: its name, its help and its labels, in one place.

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Prometheus's own words")]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// `vestibule_<noun>_<unit>`, with `_total` for counters.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// The labels; the values of each come from a closed set.
    pub labels: &'static [&'static str],
    /// What it is.
    pub kind: MetricKind,
}

macro_rules! metrics {
    ($($name:ident: $kind:ident $text:literal [$($label:literal),*] $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $name: Metric =
                Metric { name: $text, help: $help, labels: &[$($label),*], kind: MetricKind::$kind };
        )+

        /// Every metric of the data path; the process's own (`process_*`) come from the prometheus crate.
        pub const ALL: &[Metric] = &[$($name,)+];
    };
}

metrics! {
    ACCEPTED: Counter "vestibule_connections_accepted_total" ["listener"]
        "TCP connections accepted, plus UDP datagrams that started a flow or were rejected.";
    ACCEPT_ERRORS: Counter "vestibule_accept_errors_total" ["listener", "class"]
        "Errors of accept(2) by class: `peer` (the client closed first; harmless), `shortage` (no descriptors or memory; accepting pauses for 100 ms), `fatal` (the listening socket failed and is reopened).";
    PENDING: Gauge "vestibule_sessions_pending" ["listener"]
        "Accepted connections whose PROXY header is not yet complete.";
    PENDING_LIMIT: Gauge "vestibule_sessions_pending_limit" ["listener"]
        "Maximum of `vestibule_sessions_pending`: the listener's `max-pending`, or less if the file-descriptor limit allows less.";
    TAKEOVERS: Counter "vestibule_takeovers_total" ["result"]
        "Takeovers between an old and a new process that this process took part in, by result: `done` or `failed`.";
    TAKEN_OVER: Counter "vestibule_sessions_taken_over_total" ["listener"]
        "Sessions and flows taken over from the previous process, which counts them as ended with the reason `moved`.";
    ACTIVE: Gauge "vestibule_sessions_active" ["listener", "tenant", "pool"]
        "Open sessions and flows; the tenant and pool labels are empty until they are known.";
    ENDED: Counter "vestibule_sessions_ended_total" ["listener", "tenant", "pool", "by", "at", "why"]
        "Ended sessions and flows by reason. Each accepted connection, each session taken over, and each datagram that starts a flow or is rejected is counted here exactly once.";
    BYTES: Counter "vestibule_forwarded_bytes_total" ["listener", "tenant", "pool", "direction"]
        "Payload bytes forwarded, without PROXY headers.";
    DATAGRAMS: Counter "vestibule_forwarded_datagrams_total" ["listener", "tenant", "pool", "direction"]
        "UDP datagrams forwarded.";
    DATAGRAMS_DROPPED: Counter "vestibule_datagrams_dropped_total" ["listener", "tenant", "pool", "direction", "why"]
        "UDP datagrams dropped by vestibule while their flow continued, by reason: `rate` or `bandwidth` (the tenant's limits), `too_long` (does not fit with its header), `full` (the socket's send buffer is full), `shortage` (no kernel memory), `refused` (ICMP port unreachable), `unreachable` (no route).";
    DATAGRAMS_WOULD_DROP: Counter "vestibule_datagrams_would_drop_total" ["listener", "tenant", "pool", "direction", "why"]
        "UDP datagrams that the tenant's limits would have dropped; the tenant is in observe mode, so they were forwarded.";
    DATAGRAMS_OVERFLOWED: Counter "vestibule_datagrams_overflowed_total" ["listener", "direction"]
        "UDP datagrams dropped by the kernel because a receive buffer was full: `to_backend` at the listening sockets, `to_client` at the sockets towards backends.";
    MODE_BYTES: Counter "vestibule_forward_mode_bytes_total" ["mode", "direction"]
        "Bytes forwarded by `copy` (through a user-space buffer) or by `splice` (inside the kernel).";
    PIPES: Gauge "vestibule_pipes_in_use" []
        "Splice pipes in use by sessions.";
    PIPE_MEMORY: Gauge "vestibule_pipe_memory_bytes" []
        "Memory of all splice pipes, in use and idle; the bound is `pipe-memory`.";
    PIPES_REFUSED: Counter "vestibule_pipes_refused_total" []
        "Times that a session used copy instead of splice because no pipe was available.";
    BUFFER_MEMORY: Gauge "vestibule_buffer_memory_bytes" []
        "User-space memory of bytes that were read but that the other side has not accepted yet; splice pipes are not included.";
    BUFFER_MEMORY_LIMIT: Gauge "vestibule_buffer_memory_limit_bytes" []
        "Maximum of `vestibule_buffer_memory_bytes`: the setting `buffer-memory`.";
    BUFFERS_REFUSED: Counter "vestibule_buffer_memory_refused_total" []
        "Reads limited to 4 KiB because the tenant's share of `buffer-memory` was used up.";
    DURATION: Histogram "vestibule_session_duration_seconds" ["listener"]
        "Time from accept to the end of a session; health checks are not included.";
    CONNECT_TIME: Histogram "vestibule_connect_duration_seconds" ["pool"]
        "Time of each successful connection attempt to a backend; failed attempts and queueing are not included.";
    CONNECT_CALLS: Counter "vestibule_worker_connect_seconds_total" ["worker"]
        "Time that a worker thread spent inside connect(2); the thread serves no session during that time.";
    LOCAL_PORTS: Gauge "vestibule_local_ports_in_use" ["backend", "protocol", "state"]
        "Local ports in use towards a backend, over all source addresses: `live` (open connections) or `waiting` (TIME_WAIT, or in use by another program). UDP ports are shared by all backends, so their backend label is empty.";
    LOCAL_PORTS_LIMIT: Gauge "vestibule_local_ports_limit" ["backend", "protocol"]
        "Local ports available towards a backend, over all source addresses. UDP ports are shared by all backends, so their backend label is empty.";
    BACKEND_ACTIVE: Gauge "vestibule_backend_sessions_active" ["pool", "backend"]
        "Open sessions and flows on the backend.";
    BACKEND_CONNECTS: Counter "vestibule_backend_connects_total" ["pool", "backend", "result"]
        "Connection attempts to the backend by result: `done`, `connect_refused`, `connect_timeout`, `connect_unreachable`, `connect_failed`, `no_local_port` or `shortage` (the last two are shortages of the proxy, not faults of the backend).";
    BACKEND_BYTES: Counter "vestibule_backend_bytes_total" ["pool", "backend", "direction"]
        "Payload bytes forwarded to and from the backend.";
    BACKEND_HEALTHY: Gauge "vestibule_backend_healthy" ["pool", "backend"]
        "Result of the active health check: 1 healthy, 0 unhealthy, -1 not probed yet.";
    BACKEND_PROBES: Counter "vestibule_backend_probes_total" ["pool", "backend", "result"]
        "Health probes of the backend by result: `passed`, or the error.";
    BACKEND_PROBE_TIME: Gauge "vestibule_backend_last_probe_seconds" ["pool", "backend"]
        "Duration of the last health probe of the backend.";
    BACKEND_WEIGHT: Gauge "vestibule_backend_weight" ["pool", "backend"]
        "Effective weight of the backend: 0 while it gets no new sessions, below the configured weight during slow start.";
    BACKEND_RESETS: Counter "vestibule_backend_early_resets_total" ["pool", "backend"]
        "Sessions that the backend reset or lost before it sent its first byte.";
    BACKEND_EJECTED: Gauge "vestibule_backend_ejected" ["pool", "backend"]
        "1 while the backend is ejected because sessions on it failed, else 0.";
    BACKEND_EJECTIONS: Counter "vestibule_backend_ejections_total" ["pool", "backend"]
        "Times that the backend was ejected because sessions on it failed.";
    BACKEND_CHANGED: Gauge "vestibule_backend_last_change_timestamp_seconds" ["pool", "backend", "why"]
        "Unix time at which the backend was last taken out of use or put back, and why: the result of a probe, `connect_failures`, `resets`, `ejection_over`, `resolved` or `not_resolved` (DNS), `ordered` (weight set by an operator), `reload`, `start`.";
    POOL_GROUND: Gauge "vestibule_pool_ground" ["pool", "ground"]
        "1 for the selection tier in use: `healthy`, `backup`, `unknown` (not probed yet), `ejected`, `panic` (health is ignored) or `none` (no backend can be used; sessions are reset).";
    POOL_USABLE: Gauge "vestibule_pool_usable_backends" ["pool"]
        "Backends of the pool that get new sessions.";
    POOL_QUEUED: Gauge "vestibule_pool_sessions_queued" ["pool"]
        "Sessions in the pool's queue: all backends are at their `max-sessions`.";
    LOOKUPS: Counter "vestibule_name_lookups_total" ["pool", "name", "result"]
        "DNS lookups of the pool's names by result: `found`, or the error; after an error the pool keeps its backends. `address_refused`: all addresses in the answer are forbidden (`dns.allow-answers`).";
    POOL_RETRIES: Counter "vestibule_pool_retries_total" ["pool", "result"]
        "Connection attempts after a session's first one: `made`, or `refused` by the retry budget.";
    WORKER_SESSIONS: Gauge "vestibule_worker_sessions_active" ["worker"]
        "Open sessions and flows of each worker thread.";
    HANDED_OVER: Counter "vestibule_worker_handed_over_total" ["worker"]
        "New connections that the worker passed to a worker with fewer sessions.";
    LOG_DROPPED: Counter "vestibule_access_log_dropped_total" ["class"]
        "Access-log lines lost because the disk or the reader is too slow or full, by class: `session`, `rejection` (a tenant's limits), `stray` (no tenant known).";
    LOG_LEFT_OUT: Counter "vestibule_access_log_left_out_total" ["class"]
        "Access-log lines suppressed because more than 10 per second would say the same, by class: `rejection` (counted per tenant) or `stray` (no tenant known; counted per listener and reason).";
    SESSIONS_LIMIT: Gauge "vestibule_sessions_limit" []
        "Maximum of open sessions and flows of the process: `max-sessions`, or what the file-descriptor limit allows.";
    TENANT_SESSIONS: Gauge "vestibule_tenant_sessions" ["tenant"]
        "Open sessions of a tenant that has limits.";
    TENANT_SESSIONS_LIMIT: Gauge "vestibule_tenant_sessions_limit" ["tenant"]
        "The tenant's `limits.sessions`; no row without that limit.";
    TENANT_FLOWS: Gauge "vestibule_tenant_flows" ["tenant"]
        "Open UDP flows of a tenant that has limits.";
    TENANT_FLOWS_LIMIT: Gauge "vestibule_tenant_flows_limit" ["tenant"]
        "The tenant's `limits.flows`; no row without that limit.";
    TENANT_REJECTED: Counter "vestibule_tenant_rejected_total" ["tenant", "why"]
        "Rejected sessions and flows of the tenant by reason: `session_limit`, `session_rate`, `flow_limit`, `shed` (the process is full), `tenant_disabled`.";
    TENANT_WOULD_REJECT: Counter "vestibule_tenant_would_reject_total" ["tenant", "why"]
        "Sessions and flows that the tenant's limits would have rejected; the tenant is in observe mode, so they were admitted.";
    TENANT_DELAYED: Counter "vestibule_tenant_delayed_seconds_total" ["tenant", "direction"]
        "Total time that sessions of the tenant waited for its bandwidth limit.";
    TENANT_WOULD_DELAY: Counter "vestibule_tenant_would_delay_total" ["tenant", "direction"]
        "Reads that the tenant's bandwidth limit would have delayed; the tenant is in observe mode, so they were not.";
    TENANT_WAITING: Gauge "vestibule_tenant_waiting" ["tenant", "direction"]
        "Sessions of the tenant that wait for its bandwidth limit now.";
    TENANT_STALLED: Gauge "vestibule_tenant_stalled_memory_bytes" ["tenant"]
        "Memory held for sessions of the tenant whose other side accepts no bytes: vestibule's buffers and the kernel's socket queues, read each second; without limits a tenant has a row only while this is above zero.";
    TENANT_HELD: Gauge "vestibule_tenant_held_bytes" ["tenant", "direction"]
        "Bytes buffered by sessions of a tenant with a bandwidth limit because the other side does not accept them.";
    RELOADS: Counter "vestibule_config_reloads_total" []
        "Reloads that took effect.";
    RELOADS_REJECTED: Counter "vestibule_config_rejected_total" []
        "Reloads refused because of a configuration error or a change that needs a restart; the running configuration stays.";
    RELOAD_SUCCESSFUL: Gauge "vestibule_config_last_reload_successful" []
        "1 if the last reload (or the start) took effect, 0 if it was refused.";
    RELOADED: Gauge "vestibule_config_last_reload_timestamp_seconds" []
        "Unix time at which the running configuration took effect.";
    LISTENERS_STOPPED: Gauge "vestibule_listener_sockets_stopped" []
        "Listening sockets that failed and are not open again yet; the health check answers 503 while this is above 0.";
    TENANTS: Gauge "vestibule_tenants" []
        "Tenants in the running configuration.";
    DRAINING: Gauge "vestibule_draining" []
        "1 while the process drains, else 0.";
    DRAIN_STAGE: Gauge "vestibule_drain_stage" ["stage"]
        "1 for the current stage: `serving`, `notice` (health check answers 503, connections are still accepted), `closing` (listeners are closed, sessions may finish).";
    DRAIN_LEFT: Gauge "vestibule_drain_sessions_left" []
        "Open sessions and flows that the drain waits for; 0 while the process does not drain.";
    ADMIN_OPEN: Gauge "vestibule_admin_connections" ["endpoint"]
        "Open connections at the health port (`health`), the admin address (`admin`) and the admin socket (`admin_socket`).";
    ADMIN_ENDED: Counter "vestibule_admin_connections_total" ["endpoint", "result"]
        "Closed connections at the health port, admin address and admin socket by result: `answered`, `closed` (by the peer, without an answer), `displaced` (a newer connection needed the place), `first_byte_timeout`, `request_timeout`, `answer_timeout`, `send_timeout`.";
    BUILD: Gauge "vestibule_build_info" ["version", "commit"]
        "1, with version and git commit of the program as labels.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_follow_the_rules() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(metric.name.starts_with("vestibule_"), "{}", metric.name);
            assert_eq!(
                metric.name.ends_with("_total"),
                metric.kind == MetricKind::Counter,
                "{}",
                metric.name
            );
            assert!(
                metric.name.ends_with("_seconds") || metric.kind != MetricKind::Histogram,
                "{}",
                metric.name
            );
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
}
