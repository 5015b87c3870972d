//! What the kernel may answer, said in its place: each call and errno degrades by its rule, nobody else feels it, and once
//! it is over everything is as before. A binary of its own, one test after the other: the process has but one kernel.
#![cfg(any(debug_assertions, feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::items_after_statements,
    dead_code,
    unreachable_pub,
    reason = "a test that cannot go on says so by panicking, and uses a part of the harness"
)]

#[path = "faults/accept.rs"]
mod accept;
#[path = "faults/connect.rs"]
mod connect;
#[path = "faults/datagram.rs"]
mod datagram;
#[path = "faults/forward.rs"]
mod forward;
#[path = "it/harness.rs"]
mod harness;
#[path = "faults/listening.rs"]
mod listening;
#[path = "faults/process.rs"]
mod process;
#[path = "it/raw.rs"]
mod raw;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, MutexGuard};
use vestibule::fault::{InjectedFault, Injection, Syscall};

use self::harness::{GLOBEX, Proxy, exchange, read};

/// Any seed will do: where it matters, all calls fail.
const SEED: u64 = 20_261_128;

static KERNEL: Mutex<()> = Mutex::const_new(());

/// Nobody else's faults are in force while this lives.
async fn alone() -> MutexGuard<'static, ()> {
    KERNEL.lock().await
}

/// Puts one fault in force.
fn inject(fault: InjectedFault) -> Injection {
    Injection::new(SEED, [fault])
}

/// The next so many such calls fail.
fn next(call: Syscall, errno: rustix::io::Errno, count: u64) -> Injection {
    inject(InjectedFault::new(call, &[errno]).at_most(count))
}

/// Another tenant's session, from before the fault to after it.
struct Bystander(TcpStream);

impl Bystander {
    async fn of(proxy: &Proxy) -> Self {
        let mut bystander = Self(proxy.open(GLOBEX, b"").await);
        bystander.lives().await;
        bystander
    }

    async fn lives(&mut self) {
        self.0.write_all(b"still").await.unwrap();
        assert_eq!(read(&mut self.0, 5).await, b"still");
    }

    /// It is alive, a new one of its tenant is served, and all gauges are at zero once it has ended.
    async fn outlives(mut self, proxy: Proxy) {
        self.lives().await;
        assert_eq!(exchange(self.0).await.unwrap(), b"");
        proxy.others_are_unharmed().await;
        proxy.finish().await;
    }
}
