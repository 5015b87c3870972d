//! Large and small at once: a session that changes between them, and sessions side by side.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::{ACME, Began, Conf, GLOBEX, eventually};
use super::raw::{Bytes, Raw, ping_pong};

/// A size from one byte to 300 KiB, small ones as likely as large ones.
fn size(random: &mut fastrand::Rng) -> u64 {
    let most = [10, 1_500, 40_000, 70_000, 307_200][random.usize(..5)];
    random.u64(1..=most)
}

/// Sends pieces of random sizes one way, and reads them in pieces of other sizes.
async fn pieces(from: &mut TcpStream, to: &mut TcpStream, streams: [(u64, u64); 2], seed: u64) {
    let ((mut from_read, mut from_write), (mut to_read, mut to_write)) = (from.split(), to.split());
    let sending = async |stream: u64, total: u64, to: &mut tokio::net::tcp::WriteHalf<'_>| {
        let mut random = fastrand::Rng::with_seed(seed + stream);
        let mut bytes = Bytes::new(stream);
        while bytes.count < total {
            let count = size(&mut random).min(total - bytes.count);
            bytes.send(to, count).await.unwrap();
            if random.u8(..) < 40 {
                tokio::task::yield_now().await;
            }
        }
    };
    let receiving = async |stream: u64, total: u64, from: &mut tokio::net::tcp::ReadHalf<'_>| {
        let mut random = fastrand::Rng::with_seed(seed + stream + 100);
        let mut bytes = Bytes::new(stream);
        while bytes.count < total {
            let count = size(&mut random).min(total - bytes.count);
            bytes.receive(from, count).await.unwrap();
        }
    };
    let [(one, one_total), (two, two_total)] = streams;
    tokio::join!(
        sending(one, one_total, &mut from_write),
        receiving(one, one_total, &mut to_read),
        sending(two, two_total, &mut to_write),
        receiving(two, two_total, &mut from_read),
    );
}

/// Bulk both ways, then small messages, over and over.
async fn changes(seed: u64) {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..12 {
        let streams =
            [(seed + round, random.u64(1..8_000_000)), (seed + round + 50, random.u64(1..8_000_000))];
        pieces(&mut client, &mut backend, streams, seed * 1000 + round).await;
        ping_pong(&mut client, &mut backend, &mut random).await;
    }
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    for mode in ["copy", "splice"] {
        for direction in ["to_backend", "to_client"] {
            let labels = [("mode", mode), ("direction", direction)];
            proxy.metric("vestibule_forward_mode_bytes_total", &labels).is_at_least(1).await;
        }
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn alternating_large_and_small_messages_stay_in_order_1() {
    changes(1).await;
}

#[tokio::test]
async fn alternating_large_and_small_messages_stay_in_order_2() {
    changes(2).await;
}

#[tokio::test]
async fn alternating_large_and_small_messages_stay_in_order_3() {
    changes(3).await;
}

#[tokio::test]
async fn last_segment_of_a_large_message_is_not_delayed() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut sent, mut received) = (Bytes::new(1), Bytes::new(1));
    // A corked socket holds each last segment back for 200 ms (tcp(7), `TCP_CORK`): where one is faster, none is corked.
    let mut fast = 0;
    for _ in 0..400 {
        let began = Began::now();
        let moved = tokio::join!(sent.send(&mut client, 50_001), received.receive(&mut backend, 50_001));
        moved.0.and(moved.1).unwrap();
        fast += u32::from(!began.is_past(std::time::Duration::from_millis(200)));
        if fast == 20 {
            break;
        }
    }
    assert_eq!(fast, 20, "of 400 rounds");
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.metric("vestibule_forward_mode_bytes_total", &[("mode", "splice")]).is_at_least(100_000).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Sends a stream of its own through an echo and gets it back.
async fn echoed(mut client: TcpStream, seed: u64, total: u64) {
    let (mut reading, mut writing) = client.split();
    let sending = async {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = Bytes::new(seed);
        while bytes.count < total {
            let count = size(&mut random).min(total - bytes.count);
            bytes.send(&mut writing, count).await.unwrap();
        }
        tokio::io::AsyncWriteExt::shutdown(&mut writing).await.unwrap();
    };
    tokio::join!(sending, super::raw::receive_all(&mut reading, seed, total));
}

#[tokio::test]
async fn five_hundred_sessions_get_only_their_own_bytes() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    // Fewer pipes than sessions: they go from one to the next.
    let conf = Conf { acme: vec![acme.address()], ..Conf::default() };
    let proxy = Conf { process: "pipe-memory = \"2MiB\"".to_owned(), ..conf }.start().await;
    let mut sessions = JoinSet::new();
    let (mut random, mut totals) = (fastrand::Rng::with_seed(9), [0, 0]);
    for seed in 0..500_u64 {
        let endpoint = usize::from(seed % 2 == 1);
        let total = size(&mut random) * if seed % 10 < 2 { 5 } else { 1 };
        totals[endpoint] += u32::try_from(total).unwrap();
        let client = proxy.open([ACME, GLOBEX][endpoint], b"").await;
        sessions.spawn(echoed(client, seed, total));
    }
    sessions.join_all().await;
    for (tenant, total) in [("acme", totals[0]), ("globex", totals[1])] {
        proxy.ended(&[("tenant", tenant), ("by", "client"), ("why", "done")]).is(250).await;
        proxy.ended(&[("tenant", tenant)]).is(250).await;
        for direction in ["to_backend", "to_client"] {
            let labels = [("tenant", tenant), ("direction", direction)];
            proxy.metric("vestibule_forwarded_bytes_total", &labels).is(total).await;
        }
    }
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn greedy_session_does_not_starve_another_on_its_worker() {
    /// A round takes eight messages each way at most, and a turn 512 KiB; the rest is for a machine that is busy.
    const MOST: u64 = 64 * 1024 * 1024;
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf { workers: 1, ..Conf::default() }).await;
    let (client, backend) = raw.session(&proxy).await;
    let (mut small, mut small_backend) = raw.session(&proxy).await;
    let moved = Arc::new(AtomicU64::new(0));
    let threads = greedy(client, backend, &moved);
    let (mut random, mut rounds) = (fastrand::Rng::with_seed(1), Vec::new());
    let has_moved = async |least| {
        eventually("bulk", async || (moved.load(Ordering::Relaxed) >= least).then_some(())).await;
    };
    has_moved(MOST).await;
    for _ in 0..100 {
        let before = moved.load(Ordering::Relaxed);
        ping_pong(&mut small, &mut small_backend, &mut random).await;
        rounds.push(moved.load(Ordering::Relaxed) - before);
    }
    // Nor does it starve itself.
    has_moved(moved.load(Ordering::Relaxed) + MOST).await;
    rounds.sort_unstable();
    assert!(rounds[rounds.len() / 2] < MOST, "bytes of the greedy one in each round: {rounds:?}");
    drop((small, small_backend));
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "done")]).is(1).await;
    for thread in threads {
        thread.stop();
    }
    proxy.ended(&[("tenant", "acme")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// A thread that works at one end of a connection until it is stopped.
struct Worker {
    socket: std::net::TcpStream,
    thread: std::thread::JoinHandle<()>,
}

impl Worker {
    fn spawn(socket: TcpStream, work: impl FnOnce(std::net::TcpStream) + Send + 'static) -> Self {
        let socket = socket.into_std().unwrap();
        socket.set_nonblocking(false).unwrap();
        let own = socket.try_clone().unwrap();
        Self { socket, thread: std::thread::spawn(move || work(own)) }
    }

    fn stop(self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap_or_default();
        self.thread.join().unwrap();
    }
}

/// The backend sends without end, the client reads, and neither waits for the test.
fn greedy(client: TcpStream, backend: TcpStream, moved: &Arc<AtomicU64>) -> [Worker; 2] {
    let moved = Arc::clone(moved);
    let reads = Worker::spawn(client, move |mut client| {
        let mut chunk = vec![0; 1024 * 1024];
        while let Ok(count @ 1..) = client.read(&mut chunk) {
            moved.fetch_add(count as u64, Ordering::Relaxed);
        }
    });
    let writes = Worker::spawn(backend, |mut backend| {
        let chunk = vec![0; 256 * 1024];
        while backend.write_all(&chunk).is_ok() {}
    });
    [reads, writes]
}
