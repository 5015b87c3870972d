//! The flow table alone: ns for each datagram, bytes for each flow, and how long it takes at most to end idle ones in one
//! call. `cargo bench --bench flows`
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use divan::{Bencher, black_box};
use rustix::event::epoll;
use vestibule::addr::{ClientAddr, PeerAddr};
use vestibule::clock::Moment;
use vestibule::flow::table::{DatagramAction, FlowClient, FlowId, FlowPath, FlowTable};
use vestibule::id::EndpointClaim;

/// What the shell keeps for a flow, about.
type Kept = [u64; 16];

const IDLE: Duration = Duration::from_secs(120);
const START: Moment = Moment::from_nanos(0);

/// Flows that are looked at in one call, and how long the next one waits, as the shell has it.
const AT_ONCE: usize = 32;
const REST: Duration = Duration::from_millis(1);

const MANY: u32 = 100_000;
/// As many as there are descriptors for on a small machine.
const WITH_SOCKETS: u32 = 10_000;
/// Bytes of a flow at most, and how long a call may take.
const MOST_BYTES: u64 = 600;
const LONGEST: Duration = Duration::from_millis(1);

/// Clients behind a few senders, as a load balancer's are.
fn flow(number: u32) -> (FlowPath, FlowClient) {
    let [a, b, c, d] = number.to_be_bytes();
    let peer = PeerAddr(([10, 0, 0, d % 8], 20_000).into());
    let client = Some(ClientAddr(([10, 100 + a, b, c], 10_000 + u16::from(d)).into()));
    let endpoint = EndpointClaim::from_tlv(Some(b"vpce-08d2bf15fac5001c9"));
    (FlowPath { socket: 0, local: None, peer }, FlowClient { client, endpoint })
}

/// Flows of a hundred tenants.
fn filled(count: u32) -> (FlowTable<Kept>, Vec<FlowId>) {
    let mut table = FlowTable::new(IDLE);
    let open = |number| {
        let (path, who) = flow(number);
        table.open(path, who, number % 100, [0; 16], START)
    };
    let ids = (0..count).map(open).collect();
    (table, ids)
}

/// Flows of which each has a sender and a tenant of its own: as much memory as so many can take.
fn strangers(count: u32) -> FlowTable<Kept> {
    let mut table = FlowTable::new(IDLE);
    for number in 0..count {
        let (path, who) = flow(number);
        let [_, b, c, d] = number.to_be_bytes();
        let peer = PeerAddr(([10, b, c, d], 20_000).into());
        table.open(FlowPath { peer, ..path }, who, number, [0; 16], START);
    }
    table
}

/// Flows that may be idle for a shorter time than when they began.
fn shortened() -> FlowTable<Kept> {
    let (mut table, _) = filled(MANY);
    table.set_idle(IDLE / 2);
    table
}

/// Flows with what costs most at their end: a connected socket that a poll watches.
fn connected() -> FlowTable<(UdpSocket, Kept)> {
    let backend = UdpSocket::bind("127.0.0.1:0").expect("a backend");
    let address = backend.local_addr().expect("its address");
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("a poll");
    let mut table = FlowTable::new(IDLE);
    for number in 0..WITH_SOCKETS {
        let socket = UdpSocket::bind("127.0.0.2:0").expect("a socket");
        socket.connect(address).expect("a connection");
        epoll::add(&poll, &socket, epoll::EventData::new_u64(number.into()), epoll::EventFlags::IN)
            .expect("a place on the poll");
        let (path, who) = flow(number);
        table.open(path, who, number % 100, (socket, [0; 16]), START);
    }
    // The poll goes on as long as a socket is on it; closing those costs what it does in the worker.
    std::mem::forget(poll);
    table
}

#[divan::bench(args = [64, 1_000, MANY])]
fn hear(bencher: Bencher, count: u32) {
    let (mut table, _) = filled(count);
    bencher.bench_local(move || {
        let (path, who) = flow(fastrand::u32(..count));
        assert!(matches!(table.on_datagram(black_box(path), Some(who), START), DatagramAction::ToBackend(_)));
    });
}

#[divan::bench(args = [64, 1_000, MANY])]
fn answer(bencher: Bencher, count: u32) {
    let (mut table, ids) = filled(count);
    bencher.bench_local(move || {
        let id = ids[fastrand::usize(..ids.len())];
        assert!(table.answer(black_box(id), START).is_some());
    });
}

#[divan::bench(args = [64, 1_000, MANY])]
fn open_and_close(bencher: Bencher, count: u32) {
    let (mut table, _) = filled(count);
    let mut next = count;
    bencher.bench_local(move || {
        next = next.wrapping_add(1).max(count);
        let (path, who) = flow(next);
        let id = table.open(path, who, 0, [0; 16], START);
        assert!(table.close(black_box(id)).is_some());
    });
}

/// Bytes of memory for each of many flows, and the longest of the calls that end them all.
fn bounds() {
    for (whose, fill) in [
        ("of a hundred tenants", (|| filled(MANY).0) as fn() -> FlowTable<Kept>),
        ("of a tenant each", || strangers(MANY)),
    ] {
        let mut table = None;
        let used = allocation_counter::measure(|| table = Some(fill()));
        let bytes = u64::try_from(used.bytes_current).expect("more than before") / u64::from(MANY);
        let own = size_of::<Kept>();
        println!("{MANY} flows {whose}: {bytes} bytes each, of which the flow's own are {own}");
        assert!(bytes <= MOST_BYTES, "{bytes} bytes");
    }
    // The least of a few runs: what else the machine does only adds.
    let longest = (0..5).map(|_| longest_call(shortened(), Duration::ZERO)).min().expect("a run");
    println!("{MANY} flows that end at once: the longest call takes {longest:?} for {AT_ONCE}");
    let with_sockets = (0..5).map(|_| longest_call(connected(), REST)).min().expect("a run");
    println!("{WITH_SOCKETS} with their sockets: {with_sockets:?}");
    // A busy machine may take the processor away in each of the runs, and then says nothing of the table.
    if !std::env::args().any(|option| option == "--test") {
        assert!(longest.max(with_sockets) <= LONGEST, "a call took longer than {LONGEST:?}");
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench measures")]
fn longest_call<T>(mut table: FlowTable<T>, rest: Duration) -> Duration {
    let (mut longest, end) = (Duration::ZERO, START + IDLE * 2);
    while !table.is_empty() {
        let start = Instant::now();
        table.expire(end, AT_ONCE, |_, _, _| {});
        longest = longest.max(start.elapsed());
        std::thread::park_timeout(rest);
    }
    longest
}

fn main() {
    bounds();
    divan::main();
}
