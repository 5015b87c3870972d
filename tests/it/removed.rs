//! What is configured no more leaves the metrics, and its counts stay.

use super::harness::{Conf, GLOBEX, eventually, exchange, http_get};

#[tokio::test]
async fn removed_tenant_leaves_the_metrics_and_its_counts_stay_in_one_row() {
    let conf = Conf { acme: vec!["127.0.0.1:9".parse().unwrap()], ..Conf::default() };
    let mut proxy = conf.start().await;
    let live = proxy.open(GLOBEX, b"live").await;
    assert_eq!(exchange(proxy.open(GLOBEX, b"over").await).await.unwrap(), b"over");
    let done = [("tenant", "globex"), ("why", "done")];
    proxy.ended(&done).is(1).await;
    proxy.reload("name = \"globex\"\nendpoints", "name = \"successor\"\nendpoints").unwrap();
    // Its endpoint is another tenant's now.
    assert_eq!(exchange(proxy.open(GLOBEX, b"new").await).await.unwrap(), b"new");
    // Its last session: where a reload has not ended it.
    drop(live);
    eventually("the rows of the removed tenant to leave", async || {
        let page = http_get(proxy.server().admin(), "/metrics").await;
        let is_gone = !page.contains("tenant=\"globex\"");
        let folded = page.lines().find(|line| {
            line.starts_with("vestibule_sessions_ended_total{") && line.contains("tenant=\"(removed)\"")
        });
        (is_gone && folded.is_some()).then_some(())
    })
    .await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
