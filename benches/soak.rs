//! Long work through one proxy, and what it leaves behind: nothing. `cargo bench --bench soak` takes about ten minutes.
//!
//! 100 GB to the client through one session and 100 GB to the backend through another (`-- --gigabytes N`), then
//! 1,000,000 short sessions with noise over 1,000 tenants and four pools (`-- --sessions N`). No session may be misrouted and
//! nothing may fail; descriptors, gauges and anonymous memory have to be back where they were after a warm-up.
//! `-- --test` is over in seconds.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod stage;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use clap::Parser;
use serde_json::json;
use vestibule::clock::{self, Moment};
use vestibule::lab::backend::load::{HEAD, LoadRequest, SessionTag};
use vestibule::lab::nlb;

use self::stage::{Proc, VESTIBULE};

/// The made endpoints, each a tenant, and the pools that they have in turn.
const TENANTS: &str = "1000";
const POOLS: [&str; 4] = ["red", "green", "blue", "grey"];

/// An endpoint of one tenant more: the one whose single session carries the bulk.
const BULK: &str = "vpce-0b01cb01cb01cb01c";

/// Short sessions before the first sample: so many that each tenant has had some on each worker.
const WARM: u64 = 20_000;

/// Anonymous memory may grow by this much: with a million sessions, two bytes that each leaves behind would show.
const GROWTH: u64 = 2 * 1024 * 1024;

/// At least this part of the bulk has to go by splice.
const SPLICED: f64 = 0.99;

#[derive(clap::Parser)]
struct Options {
    /// Gigabytes to the client through one session, and to the backend through another
    #[arg(long, default_value_t = 100.0)]
    gigabytes: f64,
    /// Short sessions, noise not counted
    #[arg(long, default_value_t = 1_000_000)]
    sessions: u64,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The proxy, its backends, and where they are.
struct Environment {
    proxy: Proc,
    target: SocketAddr,
    admin: SocketAddr,
    _backends: Proc,
}

/// What the proxy holds at one moment.
struct Sample {
    at: &'static str,
    descriptors: usize,
    pipes: usize,
    anonymous: u64,
    resident: u64,
}

fn main() {
    let mut options = Options::parse();
    if options.test {
        (options.gigabytes, options.sessions) = (0.1, 2_000);
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "gigabytes of a bench")]
    let bytes = (options.gigabytes * 1e9) as u64;
    let slice = if options.test { "500ms" } else { "10s" };
    let dir = tempfile::tempdir().expect("a folder for configurations");
    let environment = Environment::start(dir.path());
    println!("kernel {}, vestibule {}, workers as many as CPUs", stage::kernel(), env!("CARGO_PKG_VERSION"));

    // What is taken once and kept (counters of each tenant, pipes of each worker) is taken first.
    environment.bulk(bytes / 20);
    environment.short(if options.test { WARM / 10 } else { WARM }, "uniform", slice);
    let mut samples = vec![environment.sample("start")];
    let (spliced, all) = environment.forwarded();
    let rates = environment.bulk(bytes);
    let (spliced, all) = (environment.forwarded().0 - spliced, environment.forwarded().1 - all);
    let spliced = spliced / all;
    samples.push(environment.sample("after the bulk"));
    let first = environment.short(options.sessions / 2, "zipf:1.1", slice);
    samples.push(environment.sample("middle"));
    let second = environment.short(options.sessions - options.sessions / 2, "zipf:1.1", slice);
    samples.push(environment.sample("end"));

    println!("\n{:<16}{:>12}{:>8}{:>15}{:>14}", "", "descriptors", "pipes", "anonymous KiB", "resident KiB");
    for sample in &samples {
        println!(
            "{:<16}{:>12}{:>8}{:>15}{:>14}",
            sample.at,
            sample.descriptors,
            sample.pipes,
            sample.anonymous / 1024,
            sample.resident / 1024
        );
    }
    let sessions = (first.0 + second.0, first.1 + second.1);
    println!(
        "\n{:.1} GB through one session each way: {:.2} GB/s to the client, {:.2} GB/s to the backend, {:.2} % by splice\n\
         {} short sessions with {} of noise, none misrouted, none failed",
        options.gigabytes,
        rates.0,
        rates.1,
        spliced * 100.0,
        sessions.0,
        sessions.1
    );
    environment.check(&samples, spliced, !options.test);
    let rows = samples.iter().map(|sample| {
        json!({ "at": sample.at, "descriptors": sample.descriptors, "pipes": sample.pipes,
            "anonymous": sample.anonymous, "resident": sample.resident })
    });
    let rows: Vec<_> = rows.collect();
    stage::write_json(
        "soak",
        &json!({ "kernel": stage::kernel(), "gigabytes": options.gigabytes, "to_client_gb_per_second": rates.0,
            "to_backend_gb_per_second": rates.1, "spliced": spliced, "sessions": sessions.0, "noise": sessions.1,
            "samples": rows }),
    );
    println!("descriptors, gauges and memory are back where they were");
}

impl Environment {
    fn start(dir: &Path) -> Self {
        let addresses = POOLS.map(|pool| (pool, stage::free()));
        let mut command = Command::new(VESTIBULE);
        command.args(["backend", "--listen"]);
        command.args(addresses.map(|(pool, address)| format!("{pool}={address}")));
        let backends = Proc::start(&command);
        for (_, address) in addresses {
            stage::ready(address);
        }
        stage::write_tenants(TENANTS, &POOLS.join(","), &dir.join("tenants.toml"));
        let (target, admin, path) = (stage::free(), stage::free(), dir.join("vestibule.toml"));
        std::fs::write(&path, configuration(dir, target, admin, &addresses)).expect("a configuration");
        let mut command = Command::new(VESTIBULE);
        command.args(["serve", "--config"]).arg(&path);
        let proxy = Proc::start(&command);
        stage::ready(target);
        Self { proxy, target, admin, _backends: backends }
    }

    /// So many bytes to the client, and as many to the backend, through one session each; both in GB/s.
    fn bulk(&self, bytes: u64) -> (f64, f64) {
        (self.to_client(bytes), self.to_backend(bytes))
    }

    fn to_client(&self, bytes: u64) -> f64 {
        let start = clock::now();
        let mut stream = self.open(LoadRequest::Source);
        let mut buffer = vec![0; 256 * 1024];
        let mut left = bytes;
        while left > 0 {
            let count = stream.read(&mut buffer).expect("the source goes on");
            assert!(count > 0, "the session ended {left} bytes early");
            left = left.saturating_sub(count as u64);
        }
        rate(bytes, start)
    }

    fn to_backend(&self, bytes: u64) -> f64 {
        let start = clock::now();
        let mut stream = self.open(LoadRequest::Sink);
        let buffer = vec![0; 256 * 1024];
        let mut left = bytes;
        while left > 0 {
            stream.write_all(&buffer).expect("the sink takes all");
            left = left.saturating_sub(buffer.len() as u64);
        }
        // The backend ends when it has read everything.
        stream.shutdown(Shutdown::Write).expect("an end");
        assert_eq!(stream.read(&mut [0]).expect("the backend's end"), 0);
        rate(bytes, start)
    }

    /// A session whose backend has said who it is.
    fn open(&self, request: LoadRequest) -> TcpStream {
        let mut stream = TcpStream::connect(self.target).expect("a connection");
        let client = SocketAddr::from(([10, 100, 0, 10], 40_000));
        let mut first = nlb::header(client, self.target, Some(BULK));
        first.extend(request.head());
        stream.write_all(&first).expect("a header");
        let mut tag = [0; HEAD];
        stream.read_exact(&mut tag).expect("a tag");
        assert_eq!(&tag, SessionTag::new(POOLS[0]).as_bytes(), "misrouted");
        stream
    }

    /// At least so many short sessions; how many, and how much noise was among them.
    fn short(&self, sessions: u64, skew: &str, slice: &str) -> (u64, u64) {
        let (mut done, mut noise) = (0, 0);
        while done < sessions {
            let mut command = Command::new(VESTIBULE);
            command.args(["load", "--json", "--target"]).arg(self.target.to_string());
            command.args(["--endpoints", TENANTS, "--pools", &POOLS.join(","), "--skew", skew]);
            command.args(["--mode", "connect", "--sessions", "64", "--noise", "5%", "--warmup", "0s"]);
            let report = stage::load("soak", command.args(["--duration", slice]));
            let count = |key: &str| report[key].as_u64().expect("a count");
            done += count("operations");
            noise += count("noise");
        }
        (done, noise)
    }

    /// Once no session is left.
    fn sample(&self, at: &'static str) -> Sample {
        stage::until("a gauge is not back at zero", || self.gauges().is_empty());
        // The scrape's own connection goes, too.
        let mut before = self.proxy.descriptors();
        stage::until("the descriptors do not settle", || {
            std::mem::replace(&mut before, self.proxy.descriptors()) == before
        });
        let (descriptors, pipes) = before;
        let (anonymous, resident) = (self.proxy.anonymous(), self.proxy.resident());
        Sample { at, descriptors, pipes, anonymous, resident }
    }

    /// The gauges of sessions and pipes that are not zero.
    fn gauges(&self) -> Vec<(String, f64)> {
        let is_gauge = |name: &str| {
            let name = name.split('{').next().unwrap_or_default();
            name.ends_with("_active") || name.ends_with("_pending") || name == "vestibule_pipes_in_use"
        };
        let all = stage::scrape(self.admin);
        assert!(all.iter().any(|(name, _)| name.starts_with("vestibule_sessions_active")), "{all:?}");
        all.into_iter().filter(|(name, value)| is_gauge(name) && *value != 0.0).collect()
    }

    /// Bytes so far: those that went by splice, and all.
    fn forwarded(&self) -> (f64, f64) {
        let all = stage::scrape(self.admin);
        let sum = |mode: &str| -> f64 {
            let of_mode =
                |name: &str| name.starts_with("vestibule_forward_mode_bytes_total") && name.contains(mode);
            all.iter().filter(|(name, _)| of_mode(name)).map(|(_, value)| value).sum()
        };
        (sum("splice"), sum("splice") + sum("copy"))
    }

    /// `warm`: every tenant had sessions before the first sample.
    fn check(&self, samples: &[Sample], spliced: f64, warm: bool) {
        let (start, end) = (&samples[0], &samples[samples.len() - 1]);
        // Pipes are kept for the next session, and bounded: pipes_in_use is among the gauges.
        stage::until("descriptors leaked", || self.proxy.descriptors().0 <= start.descriptors);
        let grown = end.anonymous.saturating_sub(start.anonymous);
        assert!(!warm || grown <= GROWTH, "anonymous memory grew by {grown} bytes");
        assert!(spliced >= SPLICED, "only {spliced} of the bytes were spliced");
    }
}

fn configuration(dir: &Path, target: SocketAddr, admin: SocketAddr, pools: &[(&str, SocketAddr)]) -> String {
    let mut text = format!(
        "include = [\"tenants.toml\"]\n[admin]\nbind = \"{admin}\"\n[health]\nbind = \"{}\"\n[log]\naccess = \"{}\"\n\
         [[listener]]\nname = \"web\"\nbind = \"{target}\"\ntrusted-sources = [\"127.0.0.0/8\"]\n\
         [[tenant]]\nname = \"bulk\"\nendpoints = [\"{BULK}\"]\npool = \"{}\"\n",
        stage::free(),
        dir.join("access.log").display(),
        POOLS[0]
    );
    for (pool, address) in pools {
        // Writing to a string does not fail.
        writeln!(text, "[[pool]]\nname = \"{pool}\"\nbackends = [\"{address}\"]").unwrap_or_default();
    }
    text
}

fn rate(bytes: u64, start: Moment) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
    let gigabytes = bytes as f64 / 1e9;
    gigabytes / clock::now().since(start).as_secs_f64()
}
