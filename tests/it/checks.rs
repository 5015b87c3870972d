//! Probes as the configuration has them, and the word that each has for what it found.

use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::proxy_protocol::SIGNATURE;

use super::harness::{Conf, Proxy, read};
use super::raw::{Held, Raw, Swallow};
use super::sessions::{asked, changed, greeting, is};

const EXCHANGE: &str = "kind = \"exchange\"\nexpect = ";

async fn start(address: SocketAddr, health: &str) -> Proxy {
    Conf { acme: vec![address], health: health.to_owned(), ..Conf::default() }.start().await
}

/// The probe of a backend says this.
async fn says(address: SocketAddr, health: &str, word: &str) {
    let proxy = start(address, health).await;
    let labels = [("pool", "acme"), ("result", word)];
    proxy.metric("vestibule_backend_probes_total", &labels).is_at_least(1).await;
    is(&proxy, "vestibule_backend_healthy", address, u32::from(word == "passed")).await;
    changed(&proxy, address, word).await;
    let all = proxy.value("vestibule_backend_probes_total", &[("pool", "acme")]).await;
    let own = proxy.value("vestibule_backend_probes_total", &labels).await;
    assert!(own >= all, "{word} and others");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn every_probe_result_has_its_label() {
    let quick = "interval = \"300ms\"\ntimeout = \"300ms\"\n";
    for (temper, health, word) in [
        (BackendBehavior::BlackHole, "kind = \"tcp\"", "passed"),
        (BackendBehavior::Http, "kind = \"http\"\npath = \"/up?x=1\"\nhost = \"db.internal\"", "passed"),
        (BackendBehavior::Http, "kind = \"http\"\nexpect-status = [\"204\", \"200-201\"]", "passed"),
        (BackendBehavior::Http, "kind = \"http\"\nexpect-status = [\"500-599\"]", "unexpected_status"),
        (BackendBehavior::Greeting, "kind = \"http\"", "answer_malformed"),
        (BackendBehavior::Echo, &format!("{EXCHANGE}\"hex:494e47\"\nsend = \"hex:50494e470d0a\""), "passed"),
        (
            BackendBehavior::Echo,
            &format!("{EXCHANGE}\"ING\"\nsend = \"PING\"\nmatch = \"contains\""),
            "passed",
        ),
        (
            BackendBehavior::Echo,
            &format!("{EXCHANGE}\"ING\"\nsend = \"PING\"\nmatch = \"prefix\""),
            "unexpected_answer",
        ),
        (BackendBehavior::Greeting, &format!("{EXCHANGE}\"acme\"\nmatch = \"prefix\""), "passed"),
        (BackendBehavior::HalfClosing, &format!("{EXCHANGE}\"bye\\nbye\"\nmatch = \"prefix\""), "closed"),
        (BackendBehavior::HalfClosing, &format!("{EXCHANGE}\"hello\""), "unexpected_answer"),
        (BackendBehavior::Reset, &format!("{EXCHANGE}\"hello\""), "reset"),
        (BackendBehavior::Mute, &format!("{quick}{EXCHANGE}\"hello\""), "answer_timeout"),
        (BackendBehavior::Source(1 << 24), &format!("{EXCHANGE}\"vestibule\""), "answer_too_long"),
    ] {
        let backend = TestBackend::start("acme-1", temper).await.unwrap();
        says(backend.address(), health, word).await;
    }
    let refusing = Held::bind();
    for health in ["kind = \"tcp\"", "kind = \"http\""] {
        says(refusing.address(), health, "connect_refused").await;
    }
    if let Some(swallow) = Swallow::start().await {
        says(swallow.address(), quick, "connect_timeout").await;
    }
}

#[tokio::test]
async fn tls_answer_to_a_plain_text_probe_is_detected() {
    let raw = Raw::bind().await;
    let proxy = start(raw.address(), "kind = \"http\"").await;
    // An alert of TLS 1.2: unexpected message.
    raw.accept().await.write_all(b"\x15\x03\x03\x00\x02\x02\x0a").await.unwrap();
    let labels = [("pool", "acme"), ("result", "answer_tls")];
    proxy.metric("vestibule_backend_probes_total", &labels).is(1).await;
    changed(&proxy, raw.address(), "answer_tls").await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn probe_sends_a_header_first_if_configured() {
    let raw = Raw::bind().await;
    let health = format!("{EXCHANGE}\"PONG\"\nsend = \"PING\"\nsend-proxy = true");
    let proxy = start(raw.address(), &health).await;
    let mut probe = raw.accept().await;
    let expected = [&SIGNATURE[..], &[0x20, 0, 0, 0], b"PING"].concat();
    assert_eq!(read(&mut probe, expected.len()).await, expected);
    probe.write_all(b"PONG").await.unwrap();
    let labels = [("pool", "acme"), ("result", "passed")];
    proxy.metric("vestibule_backend_probes_total", &labels).is(1).await;
    is(&proxy, "vestibule_backend_healthy", raw.address(), 1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn another_port_may_be_probed_than_that_of_the_traffic() {
    let (served, probed) =
        (greeting("acme-1").await, TestBackend::start("up", BackendBehavior::Http).await.unwrap());
    let health = format!("kind = \"http\"\nport = {}", probed.address().port());
    let proxy = start(served.address(), &health).await;
    is(&proxy, "vestibule_backend_healthy", served.address(), 1).await;
    assert_eq!((served.sessions(), probed.sessions() > 0), (0, true));
    assert_eq!(asked(&proxy).await, "acme-1");
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
