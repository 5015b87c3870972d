//! Limits of bandwidth: they hold for copy and splice, sessions share them, and nothing is lost behind them.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use vestibule::account::Direction;
use vestibule::admission::quota::Quota;

use super::harness::{ACME, Began, Conf, GLOBEX, LIMIT, Proxy, end_of, eventually, exchange, is_reset, read};
use super::raw::{Bytes, Raw, receive_all, send_all};

/// The endpoint of the tenant with limits.
const UMBRELLA: &str = "vpce-0abcabcabcabcabca";

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

const BOTH: [Direction; 2] = Direction::ALL;

/// A proxy with one tenant more, whose traffic goes where acme's goes and who has these limits.
async fn proxy(raw: &Raw, limits: &str, conf: Conf) -> Proxy {
    let more = format!(
        "[[tenant]]\nname = \"umbrella\"\nendpoints = [\"{UMBRELLA}\"]\npool = \"acme\"\n[tenant.limits]\n{limits}\n"
    );
    raw.proxy(Conf { more, ..conf }).await
}

/// The same limit both ways.
fn each_way(bandwidth: &str) -> String {
    format!("to-backend = \"{bandwidth}\"\nto-client = \"{bandwidth}\"")
}

/// A client of the limited tenant and the backend's end of its session.
async fn session(raw: &Raw, proxy: &Proxy) -> (TcpStream, TcpStream) {
    let client = proxy.open(UMBRELLA, b"").await;
    (client, raw.accept().await)
}

async fn forwarded(proxy: &Proxy, way: Direction) -> f64 {
    let labels = [("tenant", "umbrella"), ("direction", way.as_str())];
    proxy.value("vestibule_forwarded_bytes_total", &labels).await
}

fn quota(proxy: &Proxy, tenant: &str) -> Arc<Quota> {
    let snapshot = proxy.server().live().snapshot.load();
    let tenant = snapshot.directory.tenants().iter().find(|known| known.label.name() == tenant);
    Arc::clone(&tenant.unwrap().quota)
}

/// Waits until so many sessions of the limited tenant wait.
async fn waiting(proxy: &Proxy, way: Direction, count: u64) {
    let quota = quota(proxy, "umbrella");
    eventually(&format!("{count} to wait"), async || (quota.budget(way).waiters() == count).then_some(()))
        .await;
}

/// Nobody waits, nothing is held, and no pipe or session is left.
async fn finish(proxy: Proxy) {
    let quota = quota(&proxy, "umbrella");
    for way in BOTH {
        waiting(&proxy, way, 0).await;
        eventually("nothing to be held", async || (quota.budget(way).held() == 0).then_some(())).await;
    }
    for gauge in ["vestibule_tenant_waiting", "vestibule_tenant_held_bytes", "vestibule_tenant_sessions"] {
        proxy.metric(gauge, &[]).is(0).await;
    }
    eventually("no pipe to be held", async || (quota.pipes.load(Relaxed) == 0).then_some(())).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// Sends without end.
fn flood(mut to: TcpStream) -> JoinHandle<()> {
    tokio::spawn(async move { Bytes::new(1).send(&mut to, 1 << 50).await.unwrap_or_default() })
}

/// Has so many sessions each way send without end until each has brought `least` bytes: that is the proof that none starves.
async fn greedy(raw: &Raw, proxy: &Proxy, sessions: usize, ways: &[Direction], least: u64) {
    let (mut readers, mut floods) = (JoinSet::new(), Vec::new());
    let all = Arc::new(Barrier::new(sessions * ways.len()));
    for way in ways.iter().copied() {
        for _ in 0..sessions {
            let (client, backend) = session(raw, proxy).await;
            let (from, mut to) =
                if way == Direction::ToClient { (backend, client) } else { (client, backend) };
            floods.push(flood(from));
            let all = Arc::clone(&all);
            readers.spawn(async move {
                let (mut chunk, mut count) = (vec![0; 64 * 1024], 0);
                let mut others = pin!(all.wait());
                let mut is_over = false;
                // It goes on until the last one has as much: until then the others are as greedy as before.
                while !is_over {
                    count +=
                        timeout(LIMIT, to.read(&mut chunk)).await.expect("bytes within the limit").unwrap()
                            as u64;
                    is_over = count >= least && timeout(Duration::ZERO, others.as_mut()).await.is_ok();
                }
            });
        }
    }
    readers.join_all().await;
    for flood in floods {
        flood.await.unwrap();
    }
}

#[expect(clippy::cast_precision_loss, reason = "a test's tolerance is wider")]
fn float(count: u64) -> f64 {
    count as f64
}

/// One session and ten are held to the rate each way: the process has not carried more than was granted, and held back the rest.
/// That it is not less is asserted in virtual time by tests/model/pace.rs, and measured by benches/fairness.
async fn is_held_to_its_rate(conf: Conf, spliced: bool) {
    const RATE: u64 = 8 * MIB;
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, &each_way("8MiB/s"), conf).await;
    for sessions in [1, 10] {
        let began = Began::now();
        let before = [forwarded(&proxy, BOTH[0]).await, forwarded(&proxy, BOTH[1]).await];
        greedy(&raw, &proxy, sessions, &BOTH, 16 * MIB / sessions as u64).await;
        for (way, before) in BOTH.into_iter().zip(before) {
            let carried = forwarded(&proxy, way).await - before;
            // The burst, a debt as large, and what had been dealt out before: as much as a late tick keeps, at each worker.
            let most = began.granted(float(RATE)) + float(RATE) * (0.1 + 0.1 + 1.0);
            assert!(carried <= most, "{carried} of {most} {way:?} with {sessions}");
            waiting(&proxy, way, 0).await;
        }
    }
    for way in BOTH {
        let labels = [("mode", "splice"), ("direction", way.as_str())];
        let through_pipes = proxy.value("vestibule_forward_mode_bytes_total", &labels).await;
        assert_eq!(through_pipes > float(RATE), spliced, "{through_pipes} bytes spliced {way:?}");
        assert!(quota(&proxy, "umbrella").budget(way).delayed() > Duration::from_secs(1));
    }
    finish(proxy).await;
}

#[tokio::test]
async fn tenant_is_held_to_its_rate_with_splice_and_copy() {
    let without_pipes = Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() };
    tokio::join!(is_held_to_its_rate(Conf::default(), true), is_held_to_its_rate(without_pipes, false));
}

#[tokio::test]
async fn no_greedy_session_starves_on_either_of_two_workers() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, &each_way("8MiB/s"), Conf::default()).await;
    let workers = async {
        proxy.metric("vestibule_sessions_active", &[("tenant", "umbrella")]).is(50).await;
        for worker in ["0", "1"] {
            // Beyond a quarter and sixteen more, a connection is handed over.
            proxy.metric("vestibule_worker_sessions_active", &[("worker", worker)]).is_at_least(5).await;
        }
    };
    tokio::join!(greedy(&raw, &proxy, 50, &[Direction::ToClient], MIB), workers);
    finish(proxy).await;
}

#[tokio::test]
async fn light_session_is_served_beside_greedy_ones() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, &each_way("8MiB/s"), Conf::default()).await;
    let (mut client, mut backend) = session(&raw, &proxy).await;
    let quota = quota(&proxy, "umbrella");
    let talk = async {
        // How soon it is served is asserted in virtual time by tests/model/pace.rs, and measured by benches/fairness.
        eventually("others to wait", async || {
            BOTH.iter().all(|way| quota.budget(*way).waiters() > 0).then_some(())
        })
        .await;
        for _ in 0..100 {
            client.write_all(b"question").await.unwrap();
            assert_eq!(read(&mut backend, 8).await, b"question");
            backend.write_all(b"answer").await.unwrap();
            assert_eq!(read(&mut client, 6).await, b"answer");
        }
    };
    tokio::join!(greedy(&raw, &proxy, 8, &BOTH, 4 * MIB), talk);
    drop((client, backend));
    finish(proxy).await;
}

#[tokio::test]
async fn end_of_stream_arrives_after_all_delayed_bytes() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, &each_way("4MiB/s"), Conf::default()).await;
    let began = Began::now();
    for client_first in [true, false] {
        let (client, backend) = session(&raw, &proxy).await;
        let (mut first, mut second) = if client_first { (client, backend) } else { (backend, client) };
        // Both send at once, and the kernel takes it all: the ends are there long before the bytes are through.
        let ((mut first_in, mut first_out), (mut second_in, mut second_out)) =
            (first.split(), second.split());
        tokio::join!(
            send_all(&mut first_out, 1, 2 * MIB + 1),
            receive_all(&mut second_in, 1, 2 * MIB + 1),
            async {
                send_all(&mut second_out, 2, 3 * MIB + 3).await;
                receive_all(&mut first_in, 2, 3 * MIB + 3).await;
            }
        );
    }
    began.lasted(Duration::from_millis(900));
    proxy.ended(&[("tenant", "umbrella"), ("why", "done")]).is(2).await;
    let labels = [("tenant", "umbrella"), ("direction", "to_backend")];
    proxy.metric("vestibule_forwarded_bytes_total", &labels).is(5 * 1024 * 1024 + 4).await;
    finish(proxy).await;
}

#[tokio::test]
async fn waiting_for_bandwidth_is_not_idle_time() {
    let raw = Raw::bind().await;
    let conf = Conf { timeouts: "idle = \"300ms\"\nhalf-close = \"300ms\"".to_owned(), ..Conf::default() };
    // At 16 KiB in a second, 4 KiB at once: eight sessions have their turn every two seconds.
    let proxy = proxy(&raw, "to-client = \"16KiB/s\"", conf).await;
    let began = Began::now();
    let mut sessions = JoinSet::new();
    for seed in 0..8 {
        let (mut client, mut backend) = session(&raw, &proxy).await;
        sessions.spawn(async move {
            send_all(&mut backend, seed, 9 * KIB).await;
            // The one half has ended, the other waits.
            client.shutdown().await.unwrap();
            receive_all(&mut client, seed, 9 * KIB).await;
        });
    }
    sessions.join_all().await;
    began.lasted(Duration::from_secs(2));
    proxy.ended(&[("tenant", "umbrella"), ("why", "done")]).is(8).await;
    let labels = [("tenant", "umbrella"), ("direction", "to_client")];
    proxy.metric("vestibule_tenant_delayed_seconds_total", &labels).is_at_least(8).await;
    finish(proxy).await;
}

#[tokio::test]
async fn reset_of_a_waiting_session_is_detected() {
    for client_resets in [true, false] {
        let raw = Raw::bind().await;
        let proxy = proxy(&raw, &each_way("1KiB/s"), Conf::default()).await;
        let (client, backend) = session(&raw, &proxy).await;
        let (mut resetting, mut other) = if client_resets { (client, backend) } else { (backend, client) };
        // What is left would take a minute.
        Bytes::new(1).send(&mut resetting, 60 * KIB).await.unwrap();
        waiting(&proxy, if client_resets { Direction::ToBackend } else { Direction::ToClient }, 1).await;
        resetting.set_zero_linger().unwrap();
        drop(resetting);
        let (mut rest, mut chunk) = (0, [0; 4096]);
        let end = loop {
            match timeout(LIMIT, other.read(&mut chunk)).await.expect("an end within the limit") {
                Ok(count) => rest += count as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(rest < 60 * KIB, "the reset came only behind all that was held back");
        let by = if client_resets { "client" } else { "backend" };
        proxy.ended(&[("tenant", "umbrella"), ("by", by), ("why", "reset")]).is(1).await;
        finish(proxy).await;
    }
}

#[tokio::test]
async fn session_waiting_for_bandwidth_ends_with_the_process() {
    let raw = Raw::bind().await;
    let mut proxy = proxy(&raw, "to-client = \"1KiB/s\"", Conf::default()).await;
    let (mut client, mut backend) = session(&raw, &proxy).await;
    Bytes::new(1).send(&mut backend, 60 * KIB).await.unwrap();
    waiting(&proxy, Direction::ToClient, 1).await;
    let labels = [("tenant", "umbrella"), ("direction", "to_client")];
    proxy.metric("vestibule_tenant_waiting", &labels).is(1).await;
    Bytes::new(1).receive(&mut client, 1).await.unwrap();
    let quota = quota(&proxy, "umbrella");
    proxy.end().await;
    assert!(end_of(&mut client).await.is_err(), "it was cut short, and says so");
    is_reset(&mut backend).await;
    assert_eq!((quota.budget(Direction::ToClient).waiters(), quota.sessions()), (0, 0));
}

#[tokio::test]
async fn observe_mode_does_not_delay_and_counts_would_be_delays() {
    let raw = Raw::bind().await;
    let limits = format!("mode = \"observe\"\n{}", each_way("64KiB/s"));
    let proxy = proxy(&raw, &limits, Conf::default()).await;
    let (mut client, mut backend) = session(&raw, &proxy).await;
    tokio::join!(send_all(&mut client, 1, 4 * MIB), receive_all(&mut backend, 1, 4 * MIB));
    tokio::join!(send_all(&mut backend, 2, 4 * MIB), receive_all(&mut client, 2, 4 * MIB));
    drop((client, backend));
    assert_eq!(proxy.logged("done").await["would_delay"], true);
    for way in BOTH {
        let labels = [("tenant", "umbrella"), ("direction", way.as_str())];
        proxy.metric("vestibule_tenant_would_delay_total", &labels).is_at_least(1).await;
        proxy.metric("vestibule_tenant_delayed_seconds_total", &labels).is(0).await;
        assert_eq!(quota(&proxy, "umbrella").budget(way).delayed(), Duration::ZERO);
    }
    finish(proxy).await;
}

#[tokio::test]
async fn limits_of_two_tenants_are_independent() {
    let raw = Raw::bind().await;
    let proxy = proxy(&raw, &each_way("1MiB/s"), Conf::default()).await;
    let beside = async {
        for _ in 0..20 {
            let payload = vec![7; 256 * 1024];
            let mut stream = proxy.open(GLOBEX, b"").await;
            let (mut reader, mut writer) = stream.split();
            let mut answer = vec![0; payload.len()];
            let (sent, received) = tokio::join!(writer.write_all(&payload), reader.read_exact(&mut answer));
            sent.unwrap();
            received.unwrap();
            assert!(answer == payload);
            assert_eq!(exchange(stream).await.unwrap(), b"");
        }
    };
    tokio::join!(greedy(&raw, &proxy, 4, &BOTH, MIB), beside);
    for way in BOTH {
        assert_eq!(quota(&proxy, "globex").budget(way).delayed(), Duration::ZERO);
    }
    finish(proxy).await;
}

/// Has so many sessions want a pipe each, with their clients not reading on.
async fn stuck(
    raw: &Raw,
    proxy: &Proxy,
    endpoint: &str,
    count: u64,
) -> Vec<(TcpStream, JoinHandle<std::io::Result<()>>)> {
    let mut stuck = Vec::new();
    for seed in 0..count {
        let mut client = proxy.open(endpoint, b"").await;
        let mut backend = raw.accept().await;
        let sending = tokio::spawn(async move { Bytes::new(seed).send(&mut backend, 256 * MIB).await });
        Bytes::new(seed).receive(&mut client, 8 * MIB).await.unwrap();
        stuck.push((client, sending));
    }
    stuck
}

#[tokio::test]
async fn no_tenant_takes_all_the_pipes() {
    let raw = Raw::bind().await;
    let conf = Conf { process: "pipe-memory = \"1MiB\"".to_owned(), ..Conf::default() };
    let proxy = proxy(&raw, "to-client = \"100GiB/s\"", conf).await;
    let pipes = async |tenant: &str, least| {
        let quota = quota(&proxy, tenant);
        eventually("a pipe", async || (quota.pipes.load(Relaxed) >= least).then_some(())).await;
        quota.pipes.load(Relaxed)
    };
    let greedy = stuck(&raw, &proxy, UMBRELLA, 6).await;
    proxy.metric("vestibule_pipes_refused_total", &[]).is_at_least(1).await;
    assert!(pipes("umbrella", 1).await <= 2, "half of four");
    assert!(quota(&proxy, "umbrella").budget(Direction::ToClient).held() > 0);
    let late = stuck(&raw, &proxy, ACME, 1).await;
    assert_eq!(pipes("acme", 1).await, 1, "who comes later finds one all the same");
    assert!(pipes("umbrella", 1).await <= 2);
    for (client, sending) in greedy.into_iter().chain(late) {
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(sending.await.unwrap().is_err());
    }
    proxy.metric("vestibule_pipes_in_use", &[]).is(0).await;
    assert_eq!(pipes("acme", 0).await, 0);
    finish(proxy).await;
}
