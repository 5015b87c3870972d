//! Sessions that live long and carry bytes in which every fault shows, and the way from one process to another.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use vestibule::handover::records::PendingTransfer;
use vestibule::handover::transfers::{Departures, NextDeparture};

use super::harness::{LIMIT, Proxy};
use super::raw::Bytes;

/// What one end of a session does until it is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// Says nothing before the end.
    Silent,
    /// Small messages, so that they are copied.
    Chats,
    /// As much as it can, so that it is spliced.
    Floods,
    /// Says something, ends its side at once, and listens.
    EndsAtOnce,
}

/// A session under way, both of whose ends belong to the test.
pub struct Living {
    end: watch::Sender<bool>,
    senders: [JoinHandle<u64>; 2],
    receivers: [JoinHandle<u64>; 2],
}

impl Living {
    /// Starts what the client and the backend of a session do. Its streams have this seed and the next.
    pub fn start(session: (TcpStream, TcpStream), habits: [Habit; 2], seed: u64) -> Self {
        let (end, ends) = watch::channel(false);
        let (from_client, to_client) = session.0.into_split();
        let (from_backend, to_backend) = session.1.into_split();
        let [client, backend] = habits;
        Self {
            senders: [
                tokio::spawn(send(to_client, client, seed, ends.clone())),
                tokio::spawn(send(to_backend, backend, seed + 1, ends)),
            ],
            receivers: [
                tokio::spawn(receive(from_backend, seed)),
                tokio::spawn(receive(from_client, seed + 1)),
            ],
            end,
        }
    }

    /// Both ends send no more, and all that was sent has arrived; how much, from the client and from the backend.
    pub async fn finish(self) -> [u64; 2] {
        self.end.send_replace(true);
        let mut counts = [0; 2];
        for ((sender, receiver), count) in self.senders.into_iter().zip(self.receivers).zip(&mut counts) {
            let sent = timeout(3 * LIMIT, sender).await.expect("everything to be taken").unwrap();
            let received = timeout(3 * LIMIT, receiver).await.expect("everything to arrive").unwrap();
            assert_eq!(sent, received, "sent and received");
            *count = sent;
        }
        counts
    }
}

async fn send(mut to: OwnedWriteHalf, habit: Habit, seed: u64, mut end: watch::Receiver<bool>) -> u64 {
    let mut bytes = Bytes::new(seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut is_over = end.clone();
    let over = async move {
        is_over.wait_for(|end| *end).await.unwrap();
    };
    let work = async {
        match habit {
            Habit::Silent => std::future::pending().await,
            Habit::EndsAtOnce => {}
            Habit::Chats => loop {
                bytes.send(&mut to, random.u64(1..500)).await.unwrap();
                sleep(Duration::from_millis(random.u64(0..5))).await;
            },
            Habit::Floods => {
                // In whole chunks: one that is cut short would be counted and not sent.
                while !*end.borrow_and_update() {
                    bytes.send(&mut to, 64 * 1024).await.unwrap();
                }
            }
        }
    };
    match habit {
        // What is under way is finished.
        Habit::Floods | Habit::EndsAtOnce => work.await,
        Habit::Silent | Habit::Chats => tokio::select! {
            () = over => {}
            () = work => {}
        },
    }
    bytes.send(&mut to, 1_000).await.unwrap();
    to.shutdown().await.unwrap();
    bytes.count
}

async fn receive(mut from: OwnedReadHalf, seed: u64) -> u64 {
    let mut bytes = Bytes::new(seed);
    // A silent one is waited for as long as the test takes.
    from.readable().await.unwrap();
    loop {
        let mut chunk = vec![0; 64 * 1024];
        let count = tokio::io::AsyncReadExt::read(&mut from, &mut chunk).await.unwrap();
        if count == 0 {
            return bytes.count;
        }
        bytes.check(&chunk[..count]);
    }
}

/// The next session or flow to leave.
pub async fn next(leaving: &mut Departures) -> Option<PendingTransfer> {
    loop {
        if let NextDeparture::Transfer(transfer) = leaving.next().await? {
            return Some(transfer);
        }
    }
}

/// Moves everything that forwards from one proxy to another, until nothing is left; `look` sees each parcel.
pub async fn move_all(from: &Proxy, to: &Proxy, mut look: impl FnMut(&PendingTransfer)) {
    let mut leaving = from.server().start_transfer().await;
    let ferry = async {
        while let Some(parcel) = next(&mut leaving).await {
            look(&parcel);
            to.server().accept_transfer(parcel).await;
        }
    };
    let empty = async {
        from.metric("vestibule_sessions_active", &[]).is(0).await;
        from.server().stop_transfer().await;
    };
    tokio::join!(ferry, empty);
}

/// Has everything that forwards offered, and every offer refused, until so many were; then it stays.
pub async fn refuse(from: &Proxy, count: usize) {
    let mut leaving = from.server().start_transfer().await;
    for _ in 0..count {
        drop(timeout(LIMIT, next(&mut leaving)).await.expect("an offer in time").unwrap());
    }
    from.server().stop_transfer().await;
}
