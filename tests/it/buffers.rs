//! Bytes that wait for slow readers: how much user memory they take, and that none is lost.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::harness::{Conf, Proxy};
use super::raw::{Bytes, Raw, receive_all, send_all};

const MIB: u64 = 1024 * 1024;

/// What the backend of each session sends: more than the kernel's buffers hold.
const WHOLE: u64 = 32 * MIB;

/// A client that reads nothing, and the backend's end, which sends.
type Stalled = (TcpStream, JoinHandle<()>);

/// Sessions whose backends send and whose clients read nothing, once nothing moves any more.
async fn stalled(proxy: &Proxy, raw: &Raw, count: u64) -> Vec<Stalled> {
    let mut sessions = Vec::new();
    for seed in 0..count {
        let (client, mut backend) = raw.session(proxy).await;
        sessions.push((client, tokio::spawn(async move { send_all(&mut backend, seed, WHOLE).await })));
    }
    nothing_moves(proxy).await;
    sessions
}

/// Waits until nothing more is forwarded.
async fn nothing_moves(proxy: &Proxy) {
    let (mut before, mut still) = (0.0, 0);
    while still < 20 {
        sleep(Duration::from_millis(20)).await;
        let now = proxy.value("vestibule_forwarded_bytes_total", &[("tenant", "acme")]).await;
        still = if now > before { 0 } else { still + 1 };
        before = now;
    }
}

/// Every client reads to the end.
async fn receive(sessions: Vec<Stalled>) {
    for (seed, (mut client, sending)) in (0..).zip(sessions) {
        receive_all(&mut client, seed, WHOLE).await;
        sending.await.unwrap();
    }
}

#[tokio::test]
async fn clients_that_read_nothing_hold_less_than_16_kib_each_of_user_memory() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() }).await;
    let sessions = stalled(&proxy, &raw, 12).await;
    let held = proxy.value("vestibule_buffer_memory_bytes", &[]).await;
    assert!(held < 12.0 * 16.0 * 1024.0, "{held} bytes");
    proxy.metric("vestibule_buffer_memory_limit_bytes", &[]).is(32 << 20).await;
    // With the kernel's queues, and for this tenant only.
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[("tenant", "acme")]).is_at_least(12 << 12).await;
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[("tenant", "globex")]).is(0).await;
    proxy.others_are_unharmed().await;
    receive(sessions).await;
    proxy.metric("vestibule_buffer_memory_bytes", &[]).is(0).await;
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(12).await;
    proxy.finish().await;
}

#[tokio::test]
async fn bytes_beyond_buffer_memory_are_read_in_small_parts_and_arrive_whole() {
    let raw = Raw::bind().await;
    let process = "pipe-memory = \"0B\"\nbuffer-memory = \"0B\"".to_owned();
    let proxy = raw.proxy(Conf { process, ..Conf::default() }).await;
    let sessions = stalled(&proxy, &raw, 4).await;
    let held = proxy.value("vestibule_buffer_memory_bytes", &[]).await;
    assert!(held <= 4.0 * 4096.0, "{held} bytes");
    proxy.metric("vestibule_buffer_memory_refused_total", &[]).is_at_least(4).await;
    proxy.others_are_unharmed().await;
    receive(sessions).await;
    proxy.metric("vestibule_buffer_memory_bytes", &[]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(4).await;
    proxy.finish().await;
}

#[tokio::test]
async fn clients_that_reset_while_bytes_wait_for_them_give_their_memory_back() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() }).await;
    for (client, sending) in stalled(&proxy, &raw, 4).await {
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(sending.await.is_err(), "the backend's write failed");
    }
    proxy.metric("vestibule_buffer_memory_bytes", &[]).is(0).await;
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "reset")]).is(4).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

/// The kernel's send queue alone would take 2.6 MB at once of a loopback connection.
#[tokio::test]
async fn kernel_takes_no_more_than_unsent_memory_for_a_client_that_reads_nothing() {
    let raw = Raw::bind().await;
    let process = "pipe-memory = \"0B\"\nunsent-memory = \"64KiB\"".to_owned();
    let proxy = raw.proxy(Conf { process, ..Conf::default() }).await;
    let sessions = stalled(&proxy, &raw, 1).await;
    let forwarded = proxy.value("vestibule_forwarded_bytes_total", &[("tenant", "acme")]).await;
    assert!(forwarded < 1024.0 * 1024.0, "{forwarded} bytes");
    proxy.others_are_unharmed().await;
    receive(sessions).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    proxy.finish().await;
}

/// A session in bulk transfer has a pipe, and its send queue no bound; without pipes it has one.
#[tokio::test]
async fn default_bound_of_unsent_bytes_keeps_the_memory_of_many_stalled_readers_small() {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() }).await;
    let sessions = stalled(&proxy, &raw, 100).await;
    let held = proxy.value("vestibule_buffer_memory_bytes", &[]).await;
    assert!(held <= 100.0 * 8.0 * 1024.0, "{held} bytes");
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[("tenant", "acme")]).is_at_least(100 << 12).await;
    let with_kernel = proxy.value("vestibule_tenant_stalled_memory_bytes", &[("tenant", "acme")]).await;
    assert!(with_kernel <= 100.0 * 512.0 * 1024.0, "{with_kernel} bytes");
    proxy.others_are_unharmed().await;
    for (client, sending) in sessions {
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(sending.await.is_err(), "the backend's write failed");
    }
    proxy.metric("vestibule_tenant_stalled_memory_bytes", &[]).is(0).await;
    proxy.ended(&[("tenant", "acme"), ("by", "client"), ("why", "reset")]).is(100).await;
    proxy.finish().await;
}

#[tokio::test]
async fn beyond_eight_pipes_of_a_tenant_a_session_takes_one_only_once_its_client_reads() {
    const COUNT: u64 = 12;
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let (mut sessions, mut total) = (Vec::new(), 0);
    for seed in 0..COUNT {
        let (client, mut backend) = raw.session(&proxy).await;
        let mut sent = Bytes::new(seed);
        for kib in [20, 40] {
            sent.send(&mut backend, kib * 1024).await.unwrap();
            total += u32::try_from(kib * 1024).unwrap();
            proxy.metric("vestibule_forwarded_bytes_total", &[("tenant", "acme")]).is(total).await;
        }
        sessions.push((client, backend, sent));
    }
    // Two large reads in a row, of backends that send more than the clients' windows have room for.
    let sending = sessions.into_iter().map(|(client, mut backend, mut sent)| {
        (client, tokio::spawn(async move { sent.send(&mut backend, WHOLE).await.map(|()| backend) }))
    });
    let sending: Vec<_> = sending.collect();
    nothing_moves(&proxy).await;
    proxy.metric("vestibule_pipes_in_use", &[]).is(8).await;
    let spliced = [("mode", "splice"), ("direction", "to_client")];
    for (seed, (mut client, backend)) in (0..).zip(sending) {
        let before = proxy.value("vestibule_forward_mode_bytes_total", &spliced).await;
        Bytes::new(seed).receive(&mut client, WHOLE + 60 * 1024).await.unwrap();
        drop(backend.await.unwrap().unwrap());
        let after = proxy.value("vestibule_forward_mode_bytes_total", &spliced).await;
        assert!(after - before > 4.0 * 1024.0 * 1024.0, "session {seed}: {before} to {after} bytes spliced");
    }
    proxy.others_are_unharmed().await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(12).await;
    proxy.finish().await;
}
