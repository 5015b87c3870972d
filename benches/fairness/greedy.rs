//! Greedy sessions of one tenant, each measured on its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vestibule::lab::backend::load::LoadRequest;
use vestibule::lab::nlb;

use super::{Bench, METERED};

/// Jain's index of what each of so many sessions receives, and how many each worker has.
pub(super) fn share(
    bench: &Bench,
    sessions: usize,
    left_out: Duration,
    measured: Duration,
) -> (f64, [f64; 2]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let counts: Vec<Arc<AtomicU64>> = (0..sessions).map(|_| Arc::default()).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for count in &counts {
            tasks.spawn(receive(bench.target, Arc::clone(count)));
        }
        tokio::time::sleep(left_out).await;
        let read = || counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
        let before = read();
        tokio::time::sleep(measured).await;
        let after = read();
        let on = |worker| bench.metric("vestibule_worker_sessions_active", &[("worker", worker)]);
        let workers = [on("0"), on("1")];
        #[expect(clippy::cast_precision_loss, reason = "bytes of some seconds")]
        let shares: Vec<_> =
            after.iter().zip(before).map(|(after, before)| (after - before) as f64).collect();
        let (sum, squares) =
            shares.iter().fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let index = sum * sum / (shares.len() as f64 * squares);
        (index, workers)
    })
}

async fn receive(target: SocketAddr, count: Arc<AtomicU64>) {
    let mut stream = TcpStream::connect(target).await.expect("a connection");
    let client = SocketAddr::from(([10, 100, 0, 10], 4000));
    let first = [&nlb::header(client, target, Some(METERED))[..], &LoadRequest::Source.head()].concat();
    stream.write_all(&first).await.expect("a request");
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(read) = stream.read(&mut chunk).await {
        count.fetch_add(read as u64, Ordering::Relaxed);
        if read == 0 {
            return;
        }
    }
}
