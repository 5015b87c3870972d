//! `[admin]` and `[health]`.

use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The admin address and the admin socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminConfig {
    /// The address of the read-only pages.
    pub bind: SocketAddr,
    /// The socket that takes orders too; none takes none.
    pub socket: Option<PathBuf>,
    /// Names, in lower case, by which the address may be asked, beside IP addresses and `localhost`.
    #[serde(default)]
    pub hosts: Vec<String>,
}

/// The endpoint for the load balancer's health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthConfig {
    /// Its address.
    pub bind: SocketAddr,
    /// The path that answers, with its leading slash.
    pub path: String,
    /// Networks whose checks have reserved slots; empty means every network.
    #[serde(default)]
    pub trusted_sources: Vec<IpNet>,
}
