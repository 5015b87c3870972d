//! The whole path once: two tenants, one client address, two backends, metrics and log.

use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Conf, GLOBEX, eventually, exchange};

#[tokio::test]
async fn equal_client_addresses_reach_their_own_tenants_backends() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let answer = exchange(proxy.open(ACME, b"hello").await).await.unwrap();
    assert_eq!(answer, b"acme-1\nhello");
    let answer = exchange(proxy.open(GLOBEX, b"hello").await).await.unwrap();
    assert_eq!(answer, b"hello");

    for tenant in ["acme", "globex"] {
        proxy.ended(&[("tenant", tenant), ("pool", tenant), ("by", "client"), ("why", "done")]).is(1).await;
        let bytes = [("tenant", tenant), ("direction", "to_backend")];
        proxy.metric("vestibule_forwarded_bytes_total", &bytes).is(5).await;
    }
    let copied = [("mode", "copy"), ("direction", "to_client")];
    proxy.metric("vestibule_forward_mode_bytes_total", &copied).is(5 + 12).await;
    proxy.metric("vestibule_connect_duration_seconds_count", &[("pool", "acme")]).is(1).await;
    proxy.metric("vestibule_session_duration_seconds_count", &[("listener", "web")]).is(2).await;

    // Each worker writes its own lines: which comes first is not said.
    let line =
        eventually("acme's line", async || proxy.log().into_iter().find(|line| line["tenant"] == "acme"));
    let line = line.await;
    assert_eq!(line["outcome"]["why"], "done");
    assert_eq!(line["endpoint"], ACME);
    assert_eq!(line["client"], "10.100.0.10:40000");
    assert_eq!(line["backend"], acme.address().to_string());
    assert_eq!(line["labels"]["plan"], "gold");
    assert_eq!(line["bytes"]["to_backend"], 5);
    assert_eq!(line["bytes"]["to_client"], 12);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
