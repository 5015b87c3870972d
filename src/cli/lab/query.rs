//! Queries of the walkthrough: `curl` inside a network, and the state of the load balancer and the proxies.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::sleep;

use crate::clock;
use crate::lab::nlb::group::{TargetDescription, TargetHealth};
use crate::lab::vpc::Network;
use crate::lab::world::{ADMIN, HEALTH, PORT};

/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(50);
/// What anything that is waited for may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What one curl may take.
const CURL: [&str; 3] = ["--silent", "--max-time", "5"];

/// Runs curl inside a network.
pub(super) async fn curl(network: &Network, words: &[&str]) -> io::Result<Output> {
    let mut command = network.command("curl");
    command.args(CURL).args(words);
    tokio::task::spawn_blocking(move || command.output()).await?
}

/// What a backend's nginx answers.
#[derive(Debug, Deserialize)]
pub(super) struct NginxAnswer {
    /// The backend's name.
    pub(super) backend: String,
    /// The client address that it sees.
    pub(super) client: SocketAddr,
    /// Which proxy asked.
    pub(super) proxy: Ipv4Addr,
}

/// A proxy's status page.
pub(super) struct ProxyStatus(Value);

impl ProxyStatus {
    /// Asks a proxy, from the provider's network.
    pub(super) async fn of(provider: &Network, proxy: Ipv4Addr) -> io::Result<Self> {
        let output = curl(provider, &[&format!("http://{proxy}:{ADMIN}/status")]).await?;
        Ok(Self(serde_json::from_slice(&output.stdout)?))
    }

    /// The state of one of its backends.
    pub(super) fn backend(&self, address: &str) -> Option<&str> {
        let backends = self.pools().filter_map(|pool| pool.get("backends")?.as_array()).flatten();
        let mut of_it =
            backends.filter(|backend| backend.get("address").and_then(Value::as_str) == Some(address));
        of_it.next()?.get("state")?.as_str()
    }

    /// Whether probes have found all backends healthy.
    pub(super) fn all_healthy(&self) -> bool {
        let mut backends = self.pools().filter_map(|pool| pool.get("backends")?.as_array()).flatten();
        backends.all(|backend| backend.get("state").and_then(Value::as_str) == Some("healthy"))
    }

    /// Attempts beyond a session's first.
    pub(super) fn retries(&self, pool: &str) -> u64 {
        let mut pools = self.pools().filter(|found| found.get("name").and_then(Value::as_str) == Some(pool));
        pools.next().and_then(|pool| pool.get("retries")?.as_u64()).unwrap_or(0)
    }

    /// Sessions that ended for this reason before their tenant was known.
    pub(super) fn unidentified(&self, why: &str) -> u64 {
        self.0.get("unidentified").and_then(|reasons| reasons.get(why)?.as_u64()).unwrap_or(0)
    }

    /// Sessions now.
    pub(super) fn sessions(&self) -> u64 {
        self.0.get("sessions").and_then(Value::as_u64).unwrap_or(0)
    }

    fn pools(&self) -> impl Iterator<Item = &Value> {
        self.0.get("pools").and_then(Value::as_array).into_iter().flatten()
    }
}

/// What a proxy's health check is answered, as the load balancer hears it: the status, and the word that follows.
pub(super) async fn health(nlb: &Network, proxy: Ipv4Addr) -> io::Result<String> {
    let url = format!("http://{proxy}:{HEALTH}/healthz");
    let output = curl(nlb, &["--write-out", "%{http_code}", &url]).await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (word, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    Ok(format!("{status} {word}"))
}

/// The load balancer's view of its targets.
pub(super) struct TargetStates(Vec<TargetDescription>);

impl TargetStates {
    /// Asks the load balancer.
    pub(super) async fn of(orders: &Path) -> io::Result<Self> {
        Ok(Self(serde_json::from_str(&tell(orders, "GET /targets").await?)?))
    }

    /// What it thinks of a proxy.
    pub(super) fn standing(&self, proxy: Ipv4Addr) -> Option<TargetHealth> {
        self.of_proxy(proxy).map(|target| target.state)
    }

    /// Flows that a proxy was given so far.
    pub(super) fn flows(&self, proxy: Ipv4Addr) -> u64 {
        self.of_proxy(proxy).map_or(0, |target| target.flows)
    }

    fn of_proxy(&self, proxy: Ipv4Addr) -> Option<&TargetDescription> {
        self.0.iter().find(|target| target.address == SocketAddr::from((proxy, PORT)))
    }
}

/// Tells the load balancer to `register` or `deregister` a proxy.
pub(super) async fn order(orders: &Path, what: &str, proxy: Ipv4Addr) -> io::Result<()> {
    tell(orders, &format!("POST /{what}/{proxy}:{PORT}")).await.map(drop)
}

/// The body of what the load balancer answers.
async fn tell(orders: &Path, request: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(orders).await?;
    let request = format!("{request} HTTP/1.1\r\nhost: nlb\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(format!("the NLB answers {head}")));
    }
    Ok(body.to_owned())
}

/// Asks again and again until the answer is what is waited for. What cannot be asked yet is no fault.
pub(super) async fn until<T>(
    what: &str,
    mut ask: impl AsyncFnMut() -> io::Result<Option<T>>,
) -> io::Result<T> {
    let start = clock::now();
    loop {
        let said = match ask().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(error) => format!(": {error}"),
        };
        if clock::now().since(start) > LIMIT {
            let limit = LIMIT.as_secs();
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{what}: not reached within {limit} s{said}"),
            ));
        }
        sleep(LOOK).await;
    }
}
