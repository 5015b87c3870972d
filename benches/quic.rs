//! A QUIC connection that lives for five minutes, and an idle one beside it. `cargo bench --bench quic` takes that long.
//!
//! Both go through the load balancer and the proxy. The busy one has a stream every 100 ms and a bulk one every 10 s, each
//! checked to the byte in both directions; the idle one lives by keep-alives, one in 30 s. At the end both are the same
//! connections as at the start, each in the one flow that it began. `-- --seconds N` takes as long; `-- --test` is over
//! in seconds.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

#[path = "../tests/it/quic/peer.rs"]
mod peer;
mod stage;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use quinn::{IdleTimeout, TransportConfig};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use vestibule::clock::{self, Moment};
use vestibule::config::Config;
use vestibule::lab::nlb::{Nlb, VpcEndpoint};
use vestibule::server::Server as Vestibule;

use self::peer::{Client, Server};

const ACME: &str = "vpce-0acce0000acce0000";

/// Between two streams of the busy connection, and each one's bytes each way.
const PAUSE: Duration = Duration::from_millis(100);
const SHORT: u64 = 20_000;

/// Between two bulk streams, unless the connection's life is short, and each one's bytes each way.
const BULK_PAUSE: Duration = Duration::from_secs(10);
const BULK: u64 = 8 * 1024 * 1024;

/// Keep-alives of the idle connection.
const KEEP_ALIVES: u32 = 10;

/// An idle connection ends after that many times as long as between two keep-alives.
const PATIENCE: u32 = 3;

/// Streams at once: more have to wait, which the longest stream time shows.
const AT_ONCE: usize = 64;

#[derive(clap::Parser)]
struct Options {
    /// How long the connections live
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the busy connection did.
#[derive(Default)]
struct Work {
    streams: u64,
    bytes: u64,
    /// Of the short streams, and of the bulk ones.
    longest: [Duration; 2],
}

fn main() {
    let options = Options::parse();
    let session = Duration::from_secs(if options.test { 2 } else { options.seconds.max(1) });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(run(session));
}

async fn run(session: Duration) {
    println!("kernel {}, vestibule {}, {} s", stage::kernel(), env!("CARGO_PKG_VERSION"), session.as_secs());
    let (busy_way, idle_way) = (transport(session, false), transport(session, true));
    let backend = Server::start("acme", &busy_way);
    let vestibule = Vestibule::start(&configuration(backend.address)).expect("a proxy");
    let endpoint =
        VpcEndpoint { id: ACME.to_owned(), consumers: "10.100.0.0/16".parse().expect("a network") };
    let nlb = Nlb::start_udp(vestibule.addresses("quic")[0], vec![endpoint]).await.expect("a load balancer");
    let address = nlb.address(0).expect("an endpoint");

    let idle = Client::connect(&backend, address, &idle_way).await;
    idle.exchange(0, 1).await;
    let busy = Arc::new(Client::connect(&backend, address, &busy_way).await);
    let ids = [busy.connection.stable_id(), idle.connection.stable_id()];
    let work = work(&busy, session).await;

    assert_eq!([busy.connection.stable_id(), idle.connection.stable_id()], ids);
    for (client, who) in [(&*busy, "the busy connection"), (&idle, "the idle connection")] {
        assert!(client.connection.close_reason().is_none(), "{who}: {:?}", client.connection.close_reason());
    }
    // It is still heard where it was.
    idle.exchange(1, 1).await;
    let theirs = backend.connections();
    assert_eq!(theirs.len(), 2, "connections that the backend has seen");
    assert_eq!(backend.remotes().len(), 2, "addresses that streams came from");
    let sent = idle.connection.stats();
    // Those that look for longer datagrams are no sign of life.
    let pings = sent.frame_tx.ping.saturating_sub(sent.path.sent_plpmtud_probes);
    assert!(pings >= u64::from(KEEP_ALIVES) / 2, "{pings} pings of the idle connection");
    let (flows, datagrams) = look(vestibule.admin());
    assert_eq!((flows, nlb.connections(0)), (2.0, 2), "one flow for each connection");

    let lost = |connection: &quinn::Connection| connection.stats().path.lost_packets;
    let [mine, theirs] =
        [[&busy.connection, &idle.connection].map(lost), [lost(&theirs[0]), lost(&theirs[1])]];
    let milliseconds = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    println!();
    for (what, figure) in [
        ("streams of the busy connection", work.streams.to_string()),
        ("bytes each way, all checked", work.bytes.to_string()),
        ("datagrams to the backend", datagrams[0].to_string()),
        ("datagrams to the client", datagrams[1].to_string()),
        ("flows, none ended, no datagram dropped", flows.to_string()),
        ("longest short stream", milliseconds(work.longest[0])),
        ("longest bulk stream", milliseconds(work.longest[1])),
        ("packets lost on the way to the backend", mine.iter().sum::<u64>().to_string()),
        ("packets lost on the way to the client", theirs.iter().sum::<u64>().to_string()),
        ("pings of the idle connection", pings.to_string()),
    ] {
        println!("{what:<40}{figure:>14}");
    }
    busy.close().await;
    idle.close().await;
    vestibule.end();
    vestibule.join();
}

/// Streams in their time, for as long as the connection lives.
async fn work(busy: &Arc<Client>, session: Duration) -> Work {
    let (begun, mut work, mut streams) = (clock::now(), Work::default(), JoinSet::new());
    let (mut ticks, between) = (tokio::time::interval(PAUSE), BULK_PAUSE.min(session / 2));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut bulk_at = begun;
    while clock::now().since(begun) < session {
        ticks.tick().await;
        let mut lens = vec![SHORT];
        if clock::now() >= bulk_at {
            lens.push(BULK);
            bulk_at = bulk_at + between;
        }
        for len in lens {
            while streams.len() >= AT_ONCE {
                note(&mut work, streams.join_next().await);
            }
            let (client, number) = (Arc::clone(busy), work.streams + streams.len() as u64 + 2);
            streams.spawn(async move {
                let start: Moment = clock::now();
                client.exchange(number, len).await;
                (len, clock::now().since(start))
            });
        }
        while let Some(done) = streams.try_join_next() {
            note(&mut work, Some(done));
        }
    }
    while let Some(done) = streams.join_next().await {
        note(&mut work, Some(done));
    }
    work
}

fn note(work: &mut Work, done: Option<Result<(u64, Duration), tokio::task::JoinError>>) {
    let (len, took) = done.expect("a stream").expect("a stream that is whole");
    work.streams += 1;
    work.bytes += len;
    let longest = &mut work.longest[usize::from(len == BULK)];
    *longest = took.max(*longest);
}

/// How a connection holds itself alive, if it does.
fn transport(session: Duration, lives_idle: bool) -> Arc<TransportConfig> {
    let between = session / KEEP_ALIVES;
    let idle = IdleTimeout::try_from(between * PATIENCE).expect("an idle time");
    let mut config = TransportConfig::default();
    config.max_idle_timeout(Some(idle)).keep_alive_interval(lives_idle.then_some(between));
    Arc::new(config)
}

fn configuration(backend: SocketAddr) -> Config {
    let text = format!(
        "[admin]\nbind = \"127.0.0.1:0\"\n[health]\nbind = \"127.0.0.1:0\"\n[log]\naccess = \"off\"\n\
         [[listener]]\nname = \"quic\"\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\ntrusted-sources = [\"127.0.0.0/8\"]\n\
         [[pool]]\nname = \"acme\"\nbackends = [\"{backend}\"]\nhealth = {{ kind = \"none\" }}\n\
         [[tenant]]\nname = \"acme\"\nendpoints = [\"{ACME}\"]\npool = \"acme\"\n"
    );
    Config::parse("quic.toml", &text).unwrap_or_else(|faults| panic!("{faults}"))
}

/// Flows so far, and datagrams to the backend and to the client. No flow may have ended, and no datagram been dropped.
fn look(admin: SocketAddr) -> (f64, [f64; 2]) {
    let all = stage::scrape(admin);
    let sum = |name: &str, label: &str| -> f64 {
        let of_name = |line: &&(String, f64)| line.0.starts_with(name) && line.0.contains(label);
        all.iter().filter(of_name).map(|(_, value)| value).sum()
    };
    for none in ["vestibule_sessions_ended_total{", "vestibule_datagrams_dropped_total{"] {
        let found: Vec<_> =
            all.iter().filter(|(name, value)| name.starts_with(none) && *value > 0.0).collect();
        assert!(found.is_empty(), "{found:?}");
    }
    let passed = |direction: &str| sum("vestibule_forwarded_datagrams_total{", direction);
    (sum("vestibule_connections_accepted_total{", "quic"), [passed("to_backend"), passed("to_client")])
}
