//! Every metric: its name, its help and its labels, in one place.

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Prometheus's own words")]
pub enum Kind {
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
    pub kind: Kind,
}

macro_rules! metrics {
    ($($name:ident: $kind:ident $text:literal [$($label:literal),*] $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $name: Metric =
                Metric { name: $text, help: $help, labels: &[$($label),*], kind: Kind::$kind };
        )+

        /// Every metric of the data path; the process's own (`process_*`) come from the prometheus crate.
        pub const ALL: &[Metric] = &[$($name,)+];
    };
}

metrics! {
    ACCEPTED: Counter "vestibule_connections_accepted_total" ["listener"]
        "Connections accepted, and datagrams that began a flow or were not let in.";
    ACCEPT_ERRORS: Counter "vestibule_accept_errors_total" ["listener", "class"]
        "Errors of accept: `peer` (it had gone), `shortage` (descriptors or memory; accepting pauses), `fatal` (the listener stopped).";
    PENDING: Gauge "vestibule_sessions_pending" ["listener"]
        "Sessions that have not yet sent a whole header.";
    PENDING_LIMIT: Gauge "vestibule_sessions_pending_limit" ["listener"]
        "Sessions of the listener that may wait for their headers at once: `max-pending`, or its part of what the file descriptors allow.";
    TAKEOVERS: Counter "vestibule_takeovers_total" ["result"]
        "Takeovers that the process was part of, as the old or the new one, by result: `done` or `failed`.";
    TAKEN_OVER: Counter "vestibule_sessions_taken_over_total" ["listener"]
        "Sessions and flows that came alive from another process, which counts them as ended: `moved`.";
    ACTIVE: Gauge "vestibule_sessions_active" ["listener", "tenant", "pool"]
        "Sessions and flows now; tenant and pool are empty until they are known.";
    ENDED: Counter "vestibule_sessions_ended_total" ["listener", "tenant", "pool", "by", "at", "why"]
        "Sessions and flows that ended, by outcome. Every accepted connection ends in exactly one, and so does every session that was taken over, and every datagram that begins a flow or is not let in.";
    BYTES: Counter "vestibule_forwarded_bytes_total" ["listener", "tenant", "pool", "direction"]
        "Bytes forwarded.";
    DATAGRAMS: Counter "vestibule_forwarded_datagrams_total" ["listener", "tenant", "pool", "direction"]
        "Datagrams of flows forwarded.";
    DATAGRAMS_DROPPED: Counter "vestibule_datagrams_dropped_total" ["listener", "tenant", "pool", "direction", "why"]
        "Datagrams that were dropped while their flow went on: `rate`, `bandwidth`, `too_long`, `full`, `shortage`, `refused`, `unreachable`.";
    DATAGRAMS_WOULD_DROP: Counter "vestibule_datagrams_would_drop_total" ["listener", "tenant", "pool", "direction", "why"]
        "Datagrams that the tenant's limits would have dropped, were they not only observed.";
    DATAGRAMS_OVERFLOWED: Counter "vestibule_datagrams_overflowed_total" ["listener", "direction"]
        "Datagrams that the kernel dropped because the receive queue of a socket was full: `to_backend` at the listening sockets, `to_client` at the sockets towards backends.";
    MODE_BYTES: Counter "vestibule_forward_mode_bytes_total" ["mode", "direction"]
        "Bytes forwarded by `copy` through a buffer, or by `splice` inside the kernel.";
    PIPES: Gauge "vestibule_pipes_in_use" []
        "Splice pipes that sessions hold.";
    PIPE_MEMORY: Gauge "vestibule_pipe_memory_bytes" []
        "Memory of all splice pipes, held and pooled.";
    PIPES_REFUSED: Counter "vestibule_pipes_refused_total" []
        "Times that a session went on copying because no pipe was to be had.";
    BUFFER_MEMORY: Gauge "vestibule_buffer_memory_bytes" []
        "Memory of bytes that were read and that the other side of their session has not taken, beside those in pipes.";
    BUFFER_MEMORY_LIMIT: Gauge "vestibule_buffer_memory_limit_bytes" []
        "Memory that bytes which wait for a slow reader may take: `buffer-memory`.";
    BUFFERS_REFUSED: Counter "vestibule_buffer_memory_refused_total" []
        "Reads of at most 4 KiB, only while the other side takes bytes, because the tenant's part of `buffer-memory` was used up.";
    DURATION: Histogram "vestibule_session_duration_seconds" ["listener"]
        "From accept to the end; health checks left out.";
    CONNECT_TIME: Histogram "vestibule_connect_duration_seconds" ["pool"]
        "How long successful attempts to connect a backend took.";
    CONNECT_CALLS: Counter "vestibule_worker_connect_seconds_total" ["worker"]
        "Time that each worker thread spent within the calls that start a connection to a backend, where it serves no other session.";
    LOCAL_PORTS: Gauge "vestibule_local_ports_in_use" ["backend", "protocol", "state"]
        "Local ports in use towards the backend's address, over all source addresses: `live` by connections, `waiting` in TIME_WAIT or refused by the kernel. A UDP flow's port is used towards all backends: the label is empty.";
    LOCAL_PORTS_LIMIT: Gauge "vestibule_local_ports_limit" ["backend", "protocol"]
        "Local ports that may be in use towards the backend's address, over the source addresses in use; for UDP towards all backends, with an empty label.";
    BACKEND_ACTIVE: Gauge "vestibule_backend_sessions_active" ["pool", "backend"]
        "Sessions on the backend now.";
    BACKEND_CONNECTS: Counter "vestibule_backend_connects_total" ["pool", "backend", "result"]
        "Attempts to connect the backend, by result.";
    BACKEND_BYTES: Counter "vestibule_backend_bytes_total" ["pool", "backend", "direction"]
        "Bytes forwarded to and from the backend.";
    BACKEND_HEALTHY: Gauge "vestibule_backend_healthy" ["pool", "backend"]
        "1 where the last probes let the backend be used, 0 where they do not, and -1 before the first.";
    BACKEND_PROBES: Counter "vestibule_backend_probes_total" ["pool", "backend", "result"]
        "Probes of the backend, by result: `passed`, or what was wrong.";
    BACKEND_PROBE_TIME: Gauge "vestibule_backend_last_probe_seconds" ["pool", "backend"]
        "How long the last probe of the backend took.";
    BACKEND_WEIGHT: Gauge "vestibule_backend_weight" ["pool", "backend"]
        "The weight in force: less than the configured one while the backend comes back, 0 while it gets no new sessions.";
    BACKEND_RESETS: Counter "vestibule_backend_early_resets_total" ["pool", "backend"]
        "Sessions that the backend reset, or lost, before its first byte.";
    BACKEND_EJECTED: Gauge "vestibule_backend_ejected" ["pool", "backend"]
        "1 while failed sessions keep the backend out.";
    BACKEND_EJECTIONS: Counter "vestibule_backend_ejections_total" ["pool", "backend"]
        "Times that failed sessions put the backend out.";
    BACKEND_CHANGED: Gauge "vestibule_backend_last_change_timestamp_seconds" ["pool", "backend", "why"]
        "When the backend was last put in or out, in Unix time, and why: a probe's result, `connect_failures`, `resets`, `ejection_over`, `resolved`, `ordered`, `start`.";
    POOL_GROUND: Gauge "vestibule_pool_ground" ["pool", "ground"]
        "1 for why the backends in use are used: `healthy`, `backup`, `unknown`, `ejected`, `panic`, or `nobody` is.";
    POOL_USABLE: Gauge "vestibule_pool_usable_backends" ["pool"]
        "Backends that get new sessions.";
    POOL_QUEUED: Gauge "vestibule_pool_sessions_queued" ["pool"]
        "Sessions that wait for a backend with room.";
    LOOKUPS: Counter "vestibule_name_lookups_total" ["pool", "name", "result"]
        "Lookups of the pool's names, by result: `found`, or why not; then the backends stay as they are.";
    POOL_RETRIES: Counter "vestibule_pool_retries_total" ["pool", "result"]
        "Attempts beyond a session's first: `made`, or `refused` by the retry budget.";
    WORKER_SESSIONS: Gauge "vestibule_worker_sessions_active" ["worker"]
        "Sessions of each worker thread.";
    HANDED_OVER: Counter "vestibule_worker_handed_over_total" ["worker"]
        "Fresh connections that the worker handed to one with fewer sessions.";
    LOG_DROPPED: Counter "vestibule_access_log_dropped_total" ["class"]
        "Lines of the access log that were dropped because its writer was behind, or could not write them: `session`, `rejection` (a tenant's limit), `stray` (no tenant known).";
    LOG_LEFT_OUT: Counter "vestibule_access_log_left_out_total" ["class"]
        "Lines left out of the access log because more than 10 a second would tell the same: `rejection` (for each tenant) or `stray` (for each listener and reason).";
    SESSIONS_LIMIT: Gauge "vestibule_sessions_limit" []
        "Sessions that the process takes at once.";
    TENANT_SESSIONS: Gauge "vestibule_tenant_sessions" ["tenant"]
        "Sessions of a tenant that has limits.";
    TENANT_SESSIONS_LIMIT: Gauge "vestibule_tenant_sessions_limit" ["tenant"]
        "Sessions that the tenant may have at once, where that is limited.";
    TENANT_FLOWS: Gauge "vestibule_tenant_flows" ["tenant"]
        "Flows of a tenant that has limits.";
    TENANT_FLOWS_LIMIT: Gauge "vestibule_tenant_flows_limit" ["tenant"]
        "Flows that the tenant may have at once, where that is limited.";
    TENANT_REJECTED: Counter "vestibule_tenant_rejected_total" ["tenant", "why"]
        "Sessions and flows of the tenant that were rejected: `session_limit`, `session_rate`, `flow_limit`, `shed`, `tenant_disabled`.";
    TENANT_WOULD_REJECT: Counter "vestibule_tenant_would_reject_total" ["tenant", "why"]
        "Sessions and flows of the tenant that would have been rejected, were its limits not only observed.";
    TENANT_DELAYED: Counter "vestibule_tenant_delayed_seconds_total" ["tenant", "direction"]
        "How long the tenant's sessions have waited for its bandwidth, all together.";
    TENANT_WOULD_DELAY: Counter "vestibule_tenant_would_delay_total" ["tenant", "direction"]
        "Reads that would have had to wait for the tenant's bandwidth, were its limits not only observed.";
    TENANT_WAITING: Gauge "vestibule_tenant_waiting" ["tenant", "direction"]
        "Sessions of the tenant that wait for its bandwidth.";
    TENANT_HELD: Gauge "vestibule_tenant_held_bytes" ["tenant", "direction"]
        "Bytes that the sessions of a tenant with a bandwidth hold, because their other ends do not take them.";
    RELOADS: Counter "vestibule_config_reloads_total" []
        "Reloads that put their configuration in force.";
    RELOADS_REJECTED: Counter "vestibule_config_rejected_total" []
        "Reloads that were refused, for a fault or for a change that needs a restart; nothing changed.";
    RELOAD_SUCCESSFUL: Gauge "vestibule_config_last_reload_successful" []
        "1 where the last reload, or the start, put its configuration in force.";
    RELOADED: Gauge "vestibule_config_last_reload_timestamp_seconds" []
        "When a reload, or the start, last put its configuration in force, in Unix time.";
    LISTENERS_STOPPED: Gauge "vestibule_listener_sockets_stopped" []
        "Listening sockets that broke and are not open again yet; the health check says 503 while there are any.";
    TENANTS: Gauge "vestibule_tenants" []
        "Tenants of the live snapshot.";
    DRAINING: Gauge "vestibule_draining" []
        "1 while the process drains.";
    DRAIN_STAGE: Gauge "vestibule_drain_stage" ["stage"]
        "1 for how far the process has come to its end: `serving`, `notice` (still accepting), `closing` (listeners closed).";
    DRAIN_LEFT: Gauge "vestibule_drain_sessions_left" []
        "Sessions and flows that a drain waits for; 0 before it.";
    ADMIN_OPEN: Gauge "vestibule_admin_connections" ["endpoint"]
        "Connections now at the health port (`health`), the admin address (`admin`) and the admin socket (`admin_socket`).";
    ADMIN_ENDED: Counter "vestibule_admin_connections_total" ["endpoint", "result"]
        "Connections there that ended, by result: `answered`, `closed` by the peer without an answer, `displaced` by a newer one because all places were taken, or `first_byte_timeout`, `request_timeout`, `answer_timeout`, `send_timeout`.";
    BUILD: Gauge "vestibule_build_info" ["version"]
        "1, with the version as a label.";
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
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            assert!(metric.name.ends_with("_seconds") || metric.kind != Kind::Histogram, "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
}
