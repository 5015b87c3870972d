//! Single sessions with backends that say their names, and what became of them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Proxy, exchange, header, header_of, is_reset};

pub const ROUND_ROBIN: &str = "balance = \"round-robin\"";

/// Another tenant that has acme's pool, and its endpoint.
pub const UMBRELLA: &str = "vpce-00b1e11a00b1e11a0";

/// The table of that tenant.
pub fn umbrella() -> String {
    format!("[[tenant]]\nname = \"umbrella\"\nendpoints = [\"{UMBRELLA}\"]\npool = \"acme\"")
}

/// A backend that says its name.
pub async fn greeting(name: &str) -> TestBackend {
    TestBackend::start(name, BackendBehavior::Greeting).await.unwrap()
}

/// The same, at an address.
pub async fn greeting_at(address: SocketAddr, name: &str) -> TestBackend {
    TestBackend::start_at(address, name, BackendBehavior::Greeting).await.unwrap()
}

/// A backend as the configuration has it, with more keys.
pub fn with(address: SocketAddr, keys: &str) -> String {
    format!("{{ address = \"{address}\", {keys} }}")
}

/// One session with a message, and the name of the backend that it came to.
pub async fn asked(proxy: &Proxy) -> String {
    asked_with(proxy, &header(ACME)).await
}

/// The same with this client and this endpoint.
pub async fn asked_of(proxy: &Proxy, client: &str, endpoint: &str) -> String {
    asked_with(proxy, &header_of(client, endpoint)).await
}

async fn asked_with(proxy: &Proxy, header: &[u8]) -> String {
    let stream = proxy.send(&[header, b"hello"].concat()).await;
    let answer = String::from_utf8(exchange(stream).await.unwrap()).unwrap();
    answer.strip_suffix("\nhello").unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

/// How many of so many sessions came to each backend.
pub async fn shares(proxy: &Proxy, sessions: u32) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..sessions {
        *shares.entry(asked(proxy).await).or_default() += 1;
    }
    shares
}

/// One session that comes to nobody.
pub async fn is_turned_away(proxy: &Proxy) {
    is_reset(&mut proxy.open(ACME, b"hello").await).await;
}

/// So many attempts to connect a backend of acme's pool ended so.
pub async fn connects(proxy: &Proxy, backend: SocketAddr, result: &str, count: u32) {
    let backend = backend.to_string();
    let labels = [("pool", "acme"), ("backend", backend.as_str()), ("result", result)];
    proxy.metric("vestibule_backend_connects_total", &labels).is(count).await;
}

/// What a metric says of one backend of acme's pool.
pub async fn is(proxy: &Proxy, name: &str, backend: SocketAddr, expected: u32) {
    let backend = backend.to_string();
    proxy.metric(name, &[("pool", "acme"), ("backend", &backend)]).is(expected).await;
}

/// Why a backend of acme's pool was last put in or out.
pub async fn changed(proxy: &Proxy, backend: SocketAddr, why: &str) {
    let backend = backend.to_string();
    let labels = [("pool", "acme"), ("backend", backend.as_str()), ("why", why)];
    proxy.metric("vestibule_backend_last_change_timestamp_seconds", &labels).is_at_least(1).await;
}

/// Why those backends of acme's pool are used that are.
pub async fn ground(proxy: &Proxy, word: &str) {
    proxy.metric("vestibule_pool_ground", &[("pool", "acme"), ("ground", word)]).is(1).await;
}

/// So many backends of acme's pool get new sessions.
pub async fn usable(proxy: &Proxy, count: u32) {
    proxy.metric("vestibule_pool_usable_backends", &[("pool", "acme")]).is(count).await;
}
