//! Faults while bytes are forwarded: reads, writes, splices and pipes.

use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use vestibule::fault::{InjectedFault, Injection, Syscall};

use super::harness::{Conf, Proxy, end_of, is_reset, read};
use super::raw::{Bytes, Raw, receive_all, send_all};
use super::{Bystander, SEED, alone, inject, next};

const MIB: u64 = 1024 * 1024;

async fn spliced(proxy: &Proxy) -> f64 {
    proxy.value("vestibule_forward_mode_bytes_total", &[("mode", "splice")]).await
}

/// What was refused is copied, nothing is lost or out of order, and afterwards it is spliced again.
async fn copies_meanwhile(faults: Injection) {
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let mut bystander = Bystander::of(&proxy).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let (mut sent, mut received) = (Bytes::new(7), Bytes::new(7));
    let (mut asked, mut heard) = (Bytes::new(8), Bytes::new(8));
    for _ in 0..4 {
        let (one, two) = (sent.send(&mut backend, 4 * MIB), received.receive(&mut client, 4 * MIB));
        let (one, two) = tokio::join!(one, two);
        one.and(two).unwrap();
        let (one, two) = (asked.send(&mut client, 4 * MIB), heard.receive(&mut backend, 4 * MIB));
        let (one, two) = tokio::join!(one, two);
        one.and(two).unwrap();
        bystander.lives().await;
    }
    proxy.metric("vestibule_pipes_refused_total", &[]).is_at_least(2).await;
    proxy.metric("vestibule_sessions_ended_total", &[]).is(0).await;
    drop(faults);
    let before = spliced(&proxy).await;
    tokio::join!(send_all(&mut backend, 9, 16 * MIB), receive_all(&mut client, 9, 16 * MIB));
    assert!(spliced(&proxy).await > before, "it is not spliced again");
    drop((client, backend));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn refused_splice_from_a_socket_falls_back_to_copy() {
    let _kernel = alone().await;
    for errno in [Errno::INVAL, Errno::NOMEM, Errno::PERM] {
        copies_meanwhile(inject(InjectedFault::new(Syscall::SpliceIn, &[errno]))).await;
    }
}

#[tokio::test]
async fn refused_splice_loses_no_bytes_of_the_pipe() {
    let _kernel = alone().await;
    for errno in [Errno::INVAL, Errno::NOMEM, Errno::NOBUFS] {
        copies_meanwhile(inject(InjectedFault::new(Syscall::SpliceOut, &[errno]))).await;
    }
}

#[tokio::test]
async fn splices_that_fail_now_and_then_lose_nothing() {
    let _kernel = alone().await;
    let now_and_then =
        |call| InjectedFault::new(call, &[Errno::INVAL, Errno::NOMEM, Errno::INTR]).per_million(200_000);
    let faults = [now_and_then(Syscall::SpliceIn), now_and_then(Syscall::SpliceOut)];
    copies_meanwhile(Injection::new(SEED, faults)).await;
}

#[tokio::test]
async fn failed_pipe_creation_falls_back_to_copy() {
    let _kernel = alone().await;
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
        copies_meanwhile(inject(InjectedFault::new(Syscall::Pipe, &[errno]))).await;
    }
}

#[tokio::test]
async fn pipe_that_cannot_grow_is_used_at_its_size() {
    let _kernel = alone().await;
    let raw = Raw::bind().await;
    let proxy = raw.proxy(Conf::default()).await;
    let bystander = Bystander::of(&proxy).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let small = inject(InjectedFault::new(Syscall::PipeSize, &[Errno::PERM]));
    tokio::join!(send_all(&mut backend, 9, 16 * MIB), receive_all(&mut client, 9, 16 * MIB));
    assert!(small.count(Syscall::PipeSize) > 0 && spliced(&proxy).await > 0.0);
    drop((client, backend, small));
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
    bystander.outlives(proxy).await;
}

#[tokio::test]
async fn shortage_in_a_read_or_write_resets_the_session_with_its_reason() {
    let _kernel = alone().await;
    for (call, errno, by_client) in [
        // What the client sends cannot be read, or cannot be written to the backend.
        (Syscall::Receive, Errno::NOMEM, "client"),
        (Syscall::Receive, Errno::NOBUFS, "client"),
        (Syscall::Send, Errno::NOMEM, "backend"),
        (Syscall::Send, Errno::NOBUFS, "backend"),
    ] {
        let raw = Raw::bind().await;
        let proxy = raw.proxy(Conf::default()).await;
        let bystander = Bystander::of(&proxy).await;
        let (mut client, mut backend) = raw.session(&proxy).await;
        let short = next(call, errno, 1);
        client.write_all(b"lost").await.unwrap();
        is_reset(&mut client).await;
        is_reset(&mut backend).await;
        assert_eq!(short.count(call), 1);
        let labels = [("tenant", "acme"), ("by", by_client), ("at", "forward"), ("why", "shortage")];
        proxy.ended(&labels).is(1).await;
        drop(short);
        let (client, backend) = raw.session(&proxy).await;
        drop((client, backend));
        proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(1).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn broken_connection_resets_the_other_side_and_names_the_cause() {
    let _kernel = alone().await;
    for (errno, why) in
        [(Errno::CONNRESET, "reset"), (Errno::TIMEDOUT, "unanswered"), (Errno::HOSTUNREACH, "unanswered")]
    {
        let raw = Raw::bind().await;
        let proxy = raw.proxy(Conf::default()).await;
        let bystander = Bystander::of(&proxy).await;
        let (mut client, mut backend) = raw.session(&proxy).await;
        let broken = next(Syscall::Receive, errno, 1);
        client.write_all(b"lost").await.unwrap();
        end_of(&mut client).await.unwrap_err();
        is_reset(&mut backend).await;
        drop(broken);
        proxy.ended(&[("tenant", "acme"), ("by", "client"), ("at", "forward"), ("why", why)]).is(1).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn answer_sent_before_a_failed_write_arrives_before_the_reset() {
    let _kernel = alone().await;
    for (errno, why) in [(Errno::PIPE, "reset"), (Errno::CONNRESET, "reset"), (Errno::TIMEDOUT, "unanswered")]
    {
        let raw = Raw::bind().await;
        let proxy = raw.proxy(Conf::default()).await;
        let bystander = Bystander::of(&proxy).await;
        let (mut client, mut backend) = raw.session(&proxy).await;
        let broken = next(Syscall::Send, errno, 1);
        client.write_all(b"lost").await.unwrap();
        super::harness::eventually("the fault", async || (broken.count(Syscall::Send) == 1).then_some(()))
            .await;
        backend.write_all(b"answer").await.unwrap();
        assert_eq!(read(&mut client, 6).await, b"answer");
        drop(backend);
        is_reset(&mut client).await;
        drop(broken);
        proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("at", "forward"), ("why", why)]).is(1).await;
        bystander.outlives(proxy).await;
    }
}

#[tokio::test]
async fn lost_bytes_are_reported_by_a_reset_after_any_silence() {
    let _kernel = alone().await;
    let raw = Raw::bind().await;
    let conf = Conf { timeouts: "half-close = \"300ms\"".to_owned(), ..Conf::default() };
    let proxy = raw.proxy(conf).await;
    let bystander = Bystander::of(&proxy).await;
    let (mut client, mut backend) = raw.session(&proxy).await;
    let broken = next(Syscall::Send, Errno::PIPE, 1);
    client.write_all(b"lost").await.unwrap();
    // The backend says nothing, and does not end.
    is_reset(&mut client).await;
    is_reset(&mut backend).await;
    drop(broken);
    proxy.ended(&[("tenant", "acme"), ("by", "backend"), ("at", "forward"), ("why", "reset")]).is(1).await;
    proxy.ended(&[("tenant", "acme"), ("why", "half_close_timeout")]).is(0).await;
    bystander.outlives(proxy).await;
}
