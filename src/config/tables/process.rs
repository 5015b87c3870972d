//! The tables that stand once: process, admin, health, log, timeouts, drain and DNS.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::section::Section;
use crate::config::table::{Field, Key, Kind, List, Presence, RawTable, Table, table};
use crate::config::value::{
    ByteSize, Count, HostName, Hours, Int, Nameserver, PositiveTime, SocketPath, UrlPath,
};
use crate::config::{AccessLogTarget, LogFormat, LogLevel};

table! {
    "", reload, "Keys before all tables.";
    RawInclude;
    keys {
        "include" include: List<String>, optional ["tenants.d/*.toml"],
            "More files, merged into this one; paths are relative to this file. A pattern may match no file, a plain name must \
             exist. Included files may contain [[tenant]], [[pool]] and [[listener]] only.";
    }
}

table! {
    "[process]", restart, "Workers, limits and memory of the process.";
    RawProcess => ProcessConfig;
    keys {
        "workers" workers: Int<usize, 0, 1024> => usize, default 0, "Worker threads; 0 = one per CPU.";
        "max-sessions" max_sessions: Count<usize, 0> => usize, default 0,
            "Open sessions and flows; 0 = what the file-descriptor limit allows. Near this limit the tenants with most sessions get \
             no new ones; one tenant alone gets at most 78 % (docs/limits.md).";
        "pipe-memory" pipe_memory: ByteSize => u64, default "64MiB",
            "Maximum memory of all splice pipes; \"0B\" = never splice, always copy. Pipes also use at most a quarter of the file \
             descriptors.";
        "buffer-memory" buffer_memory: ByteSize => u64, default "32MiB",
            "Maximum user-space memory for bytes that the receiving side does not accept yet, of all sessions. Beyond it, or beyond \
             a tenant's share, reads are limited to 4 KiB.";
        "unsent-memory" unsent_memory: ByteSize => u64, default "128KiB",
            "Maximum of bytes in the kernel's send queue of one connection that are not sent yet (`TCP_NOTSENT_LOWAT`); does not \
             apply while the session has a splice pipe, nor to short sessions. \"0B\" = net.ipv4.tcp_notsent_lowat, unlimited by \
             default.";
        "watch" watch: bool => bool, default false,
            "Reload when this file or an included file changes, appears or is removed.";
    }
}

table! {
    "[admin]", restart, "The admin address and the admin socket.";
    RawAdmin => #[serde(default)] AdminConfig;
    keys {
        "bind" bind: SocketAddr => SocketAddr, default "127.0.0.1:9900",
            "Read-only pages: /metrics, /status (JSON), /config (JSON), / (HTML). There is no authentication, so the default is \
             loopback.";
        "hosts" hosts: List<HostName> => Vec<String>, optional ["proxy.internal"],
            "Accepted Host headers besides IP addresses and localhost; any other is answered with 421 (against DNS rebinding).";
        "socket" socket: SocketPath => Option<PathBuf>, optional "/run/vestibule/admin.sock",
            "Unix socket with mode 0600 that also accepts commands: reload, drain, weight, takeover.";
    }
}

table! {
    "[health]", restart, "The target of the load balancer's health check; a PROXY v2 header is optional.";
    RawHealth => #[serde(default)] HealthConfig;
    keys {
        "bind" bind: SocketAddr => SocketAddr, default "0.0.0.0:8081", "A port of its own, different from all listeners.";
        "path" path: UrlPath => String, default "/healthz", "The path that answers.";
        "trusted-sources" trusted_sources: List<IpNet> => Vec<IpNet>, optional ["10.0.0.0/16"],
            "Networks of the health checks, such as the load balancer's: 96 of the 128 connections are reserved for them. Default: \
             no reservation.";
    }
}

table! {
    "[log]", restart, "The process log and the access log.";
    RawLog => LogConfig;
    keys {
        "level" level: LogLevel => LogLevel, default "info", "The lowest level in the process log.";
        "format" format: LogFormat => LogFormat, default "json",
            "The format of the process log. The access log is always JSON.";
        "access" access: AccessLogTarget => AccessLogTarget, default "stdout",
            "Access log: stdout, off or a file path, which must not be a symbolic link. A new file gets mode 0600. SIGUSR1 or a \
             reload reopens it after a rotation.";
    }
}

table! {
    "[timeouts]", reload, "The timeouts of each step of a session.";
    RawTimeouts => #[derive(Copy)] TimeoutConfig;
    keys {
        "header" header: PositiveTime => Duration, default "60s",
            "From accept to a complete PROXY header. Long, because an NLB sends the header with the client's first payload.";
        "connect" connect: PositiveTime => Duration, default "3s", "One connection attempt to one backend.";
        "idle" idle: PositiveTime => Duration, default "350s",
            "No byte in either direction; the default is the TCP idle timeout of an NLB.";
        "half-close" half_close: PositiveTime => Duration, default "60s",
            "One side has closed and the other sends nothing.";
        "flow-idle" flow_idle: PositiveTime => Duration, default "120s",
            "UDP: no datagram in either direction; the default is the fixed UDP idle timeout of an NLB.";
        "stall" stall: Duration => Duration, default "100s",
            "One side accepts none of the bytes that wait for it. Keep it below tcp-user-timeout; \"0s\" = no limit of its own.";
        "tcp-user-timeout" tcp_user_timeout: Hours<24> => Duration, default "120s",
            "Sent bytes are not acknowledged (`TCP_USER_TIMEOUT`); \"0s\" = the kernel's default, about 15 minutes.";
    }
}

table! {
    "[drain]", reload, "The phases of a graceful shutdown.";
    RawDrain => #[derive(Copy)] DrainConfig;
    keys {
        "notice" notice: Duration => Duration, default "30s",
            "The health check answers 503 and connections are still accepted: at least this long ...";
        "quiet" quiet: Duration => Duration, default "10s", "... and until no connection has arrived for this long.";
        "idle" idle: Duration => Duration, default "30s",
            "After the listeners are closed: sessions idle for this long are ended.";
        "deadline" deadline: Duration => Duration, default "300s",
            "From the start of the drain: all remaining sessions are ended. The default is the deregistration delay of an NLB \
             target.";
    }
}

table! {
    "[dns]", restart, "Lookups of backends that are host names or service names.";
    RawDns => DnsConfig;
    keys {
        "servers" servers: List<Nameserver> => Vec<SocketAddr>, optional ["10.0.0.2"],
            "\"IP\" or \"IP:port\" (port 53 if none is given; IPv6 with a port needs brackets). Default: the servers in \
             /etc/resolv.conf.";
        "timeout" timeout: PositiveTime => Duration, default "2s", "For one query to one server.";
        "min-ttl" min_ttl: PositiveTime => Duration, default "1s",
            "Lower bound for the TTL of an answer; at most max-ttl.";
        "max-ttl" max_ttl: PositiveTime => Duration, default "1m", "Upper bound for the TTL of an answer.";
        "allow-answers" allow_answers: List<IpNet> => Vec<IpNet>, optional ["127.0.0.0/8"],
            "Networks in which an answer may contain loopback, link-local (169.254.0.0/16, fe80::/10) or EC2 metadata \
             (fd00:ec2::/32) addresses. Without it they are refused (loopback is accepted for \"name:port\" if all `servers` are \
             loopback addresses), and an address on which this process listens always is: a DNS name must not lead to this \
             machine. Addresses in the configuration, in /etc/hosts and of localhost are not restricted.";
    }
}

// A process of another version may lack a key when its configuration is compared with a file.
impl Default for AdminConfig {
    fn default() -> Self {
        RawAdmin::default().into()
    }
}

impl Default for HealthConfig {
    fn default() -> Self {
        RawHealth::default().into()
    }
}
