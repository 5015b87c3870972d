//! A day of 20 hosts that die, fall silent, flap and come back, under load: which backend serves which sessions, and how
//! fast pools notice. `cargo bench --bench pools` takes about twelve minutes (`-- --minutes N`).
//!
//! Each host serves one backend for each of four algorithms. Before the day, with all hosts up, each backend's part of the
//! sessions is held against its weight. During it no client may see a failure, and a host that went may not be used longer
//! than `fall` intervals and a second. A host ends without sessions that it has taken and not served, as the clients of such
//! ones have to see it (see [`TestBackend::hear`]). The picture is target/pools-NAME.svg. `-- --test` is over in half a minute.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod stage;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use plotters::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;
use vestibule::clock::{self, Moment};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::day::{DayAction, DayEvent, script};

use self::stage::{Proc, VESTIBULE};

const HOSTS: usize = 20;
const POOLS: [&str; 4] = ["round-robin", "least-sessions", "p2c", "maglev"];
const WEIGHTS: [u32; 4] = [100, 150, 200, 250];

/// Of the probes: `fall` intervals and a second are what a host that went may still be used.
const INTERVAL: Duration = Duration::from_secs(1);
const FALL: u32 = 3;

/// From one look at the proxy's status to the next.
const LOOK: Duration = Duration::from_millis(100);

#[derive(clap::Parser)]
struct Options {
    /// How long the day is
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Sessions a second during the day
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// Which day
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Briefly: that it runs
    #[arg(long)]
    test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The proxy and the hosts behind it.
struct Environment {
    _proxy: Proc,
    target: SocketAddr,
    admin: SocketAddr,
    hosts: Vec<Host>,
}

/// A backend of each pool, in the order of [`POOLS`]; none while it is down.
struct Host {
    addresses: Vec<SocketAddr>,
    backends: Vec<TestBackend>,
}

/// What the proxy says at one moment.
struct Look {
    at: Duration,
    /// Whether probes have found all of them healthy.
    is_healthy: bool,
    /// By pool and address: the weight in force, and the sessions so far.
    backends: BTreeMap<(String, String), (f64, u64)>,
}

/// A host that went, and when it was used no more, in each pool.
struct Outage {
    host: usize,
    act: DayAction,
    from: Duration,
    until: Duration,
    noticed: [Option<Duration>; POOLS.len()],
    used_again: [Option<Duration>; POOLS.len()],
}

fn main() {
    let mut options = Options::parse();
    if options.test {
        (options.minutes, options.rate) = (0.3, 200);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(run(&options));
}

async fn run(options: &Options) {
    let dir = tempfile::tempdir().expect("a folder for configurations");
    let mut environment = Environment::start(dir.path()).await;
    println!("kernel {}, vestibule {}", stage::kernel(), env!("CARGO_PKG_VERSION"));
    let steady = if options.test { 1 } else { 60 };
    let shares = environment.steady(Duration::from_secs(steady)).await;
    println!(
        "\nall hosts up, {steady} s of sessions as fast as they go: the farthest from a backend's weight"
    );
    for (pool, (sessions, off)) in POOLS.iter().zip(&shares) {
        println!("{pool:<16}{sessions:>10} sessions{:>8.1} %", off * 100.0);
        // Chance alone is more than that in a second.
        assert!(options.test || *off <= 0.05, "{pool}: {off}");
    }
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    let events = script(options.seed, HOSTS, length);
    let (report, looks) = environment.day(&events, length, options.rate).await;
    let outages = outages(&events, &looks, &environment.hosts);
    let operations = stage::number(&report, "operations");
    println!(
        "\nday {} of {:.1} minutes at {}/s: {operations:.0} sessions, none failed, none misrouted; {} outages",
        options.seed,
        options.minutes,
        options.rate,
        outages.len()
    );
    let times = summary(&outages);
    for (pool, place) in POOLS.iter().zip(0..) {
        draw(place, &looks, &outages, &environment.hosts, &picture(pool)).expect("a picture");
    }
    println!("pictures: target/pools-*.svg");
    let rows: Vec<_> =
        shares.iter().map(|(sessions, off)| json!({ "sessions": sessions, "off": off })).collect();
    stage::write_json(
        "pools",
        &json!({ "kernel": stage::kernel(), "shares": rows, "operations": operations, "outages": outages.len(),
            "noticed_ms": times }),
    );
}

impl Environment {
    async fn start(dir: &Path) -> Self {
        let mut hosts = Vec::new();
        for _ in 0..HOSTS {
            let mut host = Host { addresses: POOLS.map(|_| stage::free()).to_vec(), backends: Vec::new() };
            host.rise().await;
            hosts.push(host);
        }
        let (target, admin, path) = (stage::free(), stage::free(), dir.join("vestibule.toml"));
        stage::write_tenants("4", &POOLS.join(","), &dir.join("tenants.toml"));
        std::fs::write(&path, configuration(target, admin, &hosts)).expect("a configuration");
        let mut command = Command::new(VESTIBULE);
        command.args(["serve", "--config"]).arg(&path);
        let proxy = Proc::start(&command);
        let environment = Self { _proxy: proxy, target, admin, hosts };
        let start = clock::now();
        loop {
            if TcpStream::connect(admin).await.is_ok() && environment.look(start).await.is_healthy {
                return environment;
            }
            assert!(clock::now().since(start) < Duration::from_secs(10), "the proxy does not start");
            sleep(LOOK).await;
        }
    }

    fn load(&self, seconds: f64, rest: &[&str]) -> tokio::task::JoinHandle<Value> {
        let mut command = Command::new(VESTIBULE);
        command.args(["load", "--json", "--target"]).arg(self.target.to_string());
        command.args([
            "--endpoints",
            "4",
            "--pools",
            &POOLS.join(","),
            "--skew",
            "uniform",
            "--mode",
            "connect",
        ]);
        command.args([
            "--clients",
            "1000000",
            "--warmup",
            "0s",
            "--duration",
            &format!("{:.0}ms", seconds * 1000.0),
        ]);
        command.args(rest).stdin(Stdio::null());
        tokio::task::spawn_blocking(move || stage::load("the day", &mut command))
    }

    /// Sessions of each pool, and how far the farthest backend was from its part of them.
    async fn steady(&self, span: Duration) -> Vec<(u64, f64)> {
        let start = clock::now();
        let before = self.look(start).await;
        self.load(span.as_secs_f64(), &["--sessions", "32"]).await.expect("the load");
        let after = self.look(start).await;
        let shares = POOLS.iter().enumerate().map(|(place, pool)| {
            let served = self.hosts.iter().map(|host| {
                let key = ((*pool).to_owned(), host.addresses[place].to_string());
                after.backends[&key].1 - before.backends[&key].1
            });
            let served: Vec<u64> = served.collect();
            let (sessions, total) = (served.iter().sum::<u64>(), (0..HOSTS).map(weight).sum::<u32>());
            let off = served.iter().enumerate().map(|(host, served)| {
                #[expect(clippy::cast_precision_loss, reason = "a share has fewer digits")]
                let (served, due) =
                    (*served as f64, sessions as f64 * f64::from(weight(host)) / f64::from(total));
                (served / due - 1.0).abs()
            });
            (sessions, off.fold(0.0, f64::max))
        });
        shares.collect()
    }

    /// The day: what the load says of it, and what the proxy said while it lasted.
    async fn day(&mut self, events: &[DayEvent], length: Duration, rate: u32) -> (Value, Vec<Look>) {
        let load = self.load(length.as_secs_f64(), &["--sessions", "256", "--rate", &format!("{rate}/s")]);
        let (start, mut looks, mut left) = (clock::now(), Vec::new(), events);
        while clock::now().since(start) < length {
            while let Some((event, rest)) =
                left.split_first().filter(|(event, _)| event.at <= clock::now().since(start))
            {
                self.hosts[event.host].suffer(event.act).await;
                left = rest;
            }
            looks.push(self.look(start).await);
            sleep(LOOK).await;
        }
        (load.await.expect("the load"), looks)
    }

    async fn look(&self, start: Moment) -> Look {
        let at = clock::now().since(start);
        let status: Value = serde_json::from_str(&get(self.admin, "/status").await).expect("the status");
        let metrics = get(self.admin, "/metrics").await;
        let connects = metrics.lines().filter(|line| line.starts_with("vestibule_backend_connects_total{"));
        let connects: Vec<&str> = connects.filter(|line| line.contains("result=\"done\"")).collect();
        let done = |pool: &str, address: &str| {
            let labels = [format!("pool=\"{pool}\""), format!("backend=\"{address}\"")];
            let line = connects.iter().find(|line| labels.iter().all(|label| line.contains(label)));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
        };
        let (mut backends, mut is_healthy) = (BTreeMap::new(), true);
        for pool in status["pools"].as_array().expect("pools") {
            let name = pool["name"].as_str().expect("its name");
            for backend in pool["backends"].as_array().expect("backends") {
                let address = backend["address"].as_str().expect("its address");
                let weight = stage::number(backend, "weight_in_force");
                is_healthy &= backend["state"] == "healthy" && weight > 0.0;
                backends.insert((name.to_owned(), address.to_owned()), (weight, done(name, address)));
            }
        }
        Look { at, is_healthy, backends }
    }
}

impl Host {
    async fn rise(&mut self) {
        for (pool, address) in POOLS.iter().zip(&self.addresses) {
            self.backends.push(
                TestBackend::start_at(*address, pool, BackendBehavior::Load).await.expect("its address"),
            );
        }
    }

    async fn suffer(&mut self, act: DayAction) {
        match act {
            DayAction::Stall => self.hear(false),
            DayAction::Kill => {
                self.hear(false);
                // Connections accepted so far are served.
                let start = clock::now();
                sleep(Duration::from_millis(50)).await;
                while self.backends.iter().any(|backend| backend.open() > 0)
                    && clock::now().since(start) < 5 * LOOK
                {
                    sleep(Duration::from_millis(5)).await;
                }
                self.backends.clear();
            }
            DayAction::Return if self.backends.is_empty() => self.rise().await,
            DayAction::Return => self.hear(true),
        }
    }

    fn hear(&self, hears: bool) {
        self.backends.iter().for_each(|backend| backend.hear(hears).expect("a filter"));
    }
}

fn weight(host: usize) -> u32 {
    WEIGHTS[host % WEIGHTS.len()]
}

fn configuration(target: SocketAddr, admin: SocketAddr, hosts: &[Host]) -> String {
    let mut text = format!(
        "include = [\"tenants.toml\"]\n[admin]\nbind = \"{admin}\"\n[health]\nbind = \"{}\"\n[log]\naccess = \"off\"\nlevel = \"error\"\n\
         [timeouts]\nconnect = \"500ms\"\n[[listener]]\nname = \"web\"\nbind = \"{target}\"\n\
         trusted-sources = [\"127.0.0.0/8\"]\n",
        stage::free(),
    );
    for (place, pool) in POOLS.iter().enumerate() {
        let backends = hosts.iter().enumerate().map(|(host, own)| {
            format!("  {{ address = \"{}\", weight = {} }},\n", own.addresses[place], weight(host))
        });
        // Writing to a string does not fail.
        write!(
            text,
            "[[pool]]\nname = \"{pool}\"\nbalance = \"{pool}\"\nattempts = 5\nslow-start = \"3s\"\nbackends = [\n{}]\n\
             [pool.health]\ninterval = \"{}s\"\ntimeout = \"500ms\"\nrise = 2\nfall = {FALL}\n\
             [pool.ejection]\nconsecutive-failures = 3\nbase-time = \"5s\"\n",
            backends.collect::<String>(),
            INTERVAL.as_secs(),
        )
        .unwrap_or_default();
    }
    text
}

async fn get(admin: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(admin).await.expect("the admin address");
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("a request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    let answer = String::from_utf8(answer).expect("text");
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).expect("a body")
}

/// The outages of the script, and what the proxy's status said of each.
fn outages(events: &[DayEvent], looks: &[Look], hosts: &[Host]) -> Vec<Outage> {
    let mut outages = Vec::new();
    for (place, event) in events.iter().enumerate().filter(|(_, event)| event.act != DayAction::Return) {
        let back = events
            .iter()
            .skip(place)
            .find(|other| other.host == event.host && other.act == DayAction::Return);
        let until = back.expect("it comes back").at;
        let next = events
            .iter()
            .skip(place + 1)
            .find(|other| other.host == event.host && other.act != DayAction::Return);
        let next = next.map_or(Duration::MAX, |next| next.at);
        let first = |pool: usize, from: Duration, to: Duration, used: bool| {
            let key = (POOLS[pool].to_owned(), hosts[event.host].addresses[pool].to_string());
            let look = looks.iter().find(|look| look.at >= from && (look.backends[&key].0 > 0.0) == used);
            look.map(|look| look.at).filter(|at| *at < to).map(|at| at.saturating_sub(from))
        };
        outages.push(Outage {
            host: event.host,
            act: event.act,
            from: event.at,
            until,
            noticed: std::array::from_fn(|pool| first(pool, event.at, until, false)),
            used_again: std::array::from_fn(|pool| first(pool, until, next, true)),
        });
    }
    outages
}

/// Prints how long it took to notice that a host went, and fails where it took too long; the medians and the most, in
/// milliseconds.
fn summary(outages: &[Outage]) -> Vec<(u128, u128)> {
    let limit = INTERVAL * FALL + Duration::from_secs(1);
    println!("{:<16}{:>24}{:>24}", "", "out of use after", "in use again after");
    let mut rows = Vec::new();
    for (place, pool) in POOLS.iter().enumerate() {
        let long = outages.iter().filter(|outage| outage.until.saturating_sub(outage.from) > limit);
        let mut noticed: Vec<Duration> = long
            .map(|outage| {
                let took = outage.noticed[place].unwrap_or(Duration::MAX);
                let Outage { host, act, from, .. } = outage;
                assert!(
                    took <= limit,
                    "{pool}: host {host} ({act:?} at {from:?}) was used for {took:?} more"
                );
                took
            })
            .collect();
        let mut again: Vec<Duration> = outages.iter().filter_map(|outage| outage.used_again[place]).collect();
        noticed.sort_unstable();
        again.sort_unstable();
        let ends = |times: &[Duration]| {
            let at = |place: usize| times.get(place).map_or(0, Duration::as_millis);
            (at(times.len() / 2), at(times.len().saturating_sub(1)))
        };
        let (out, back) = (ends(&noticed), ends(&again));
        println!("{pool:<16}{:>10} ms, most {:>5}{:>11} ms, most {:>5}", out.0, out.1, back.0, back.1);
        rows.push(out);
    }
    rows
}

fn picture(pool: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    // The build may have its folder elsewhere.
    std::fs::create_dir_all(&folder).expect("target/");
    folder.join(format!("pools-{pool}.svg"))
}

/// A row for each host: its sessions a second over time, and behind them when it was down.
fn draw(
    place: usize,
    looks: &[Look],
    outages: &[Outage],
    hosts: &[Host],
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    const LEFT: i32 = 150;
    const TOP: i32 = 70;
    const WIDTH: i32 = 1_000;
    const ROW: i32 = 30;
    let pixels = |at: Duration, whole: Duration| {
        #[expect(clippy::cast_possible_truncation, reason = "a picture's width")]
        let x = (at.as_secs_f64() / whole.as_secs_f64() * f64::from(WIDTH)) as i32;
        LEFT + x.min(WIDTH)
    };
    let whole = looks.last().map_or(INTERVAL, |look| look.at);
    let rows = i32::try_from(hosts.len())?;
    let size = (u32::try_from(LEFT + WIDTH + 30)?, u32::try_from(TOP + rows * ROW + 60)?);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    let text =
        |text: String, at: (i32, i32), size: i32| Text::new(text, at, ("sans-serif", size).into_font());
    root.draw(&text(
        format!("Sessions per second of each host's backend, {}", POOLS[place]),
        (LEFT, 15),
        20,
    ))?;
    let legend = [(RED, "killed"), (RGBColor(255, 165, 0), "silent")];
    for ((color, word), x) in legend.iter().zip([LEFT, LEFT + 110]) {
        root.draw(&Rectangle::new([(x, 45), (x + 14, 59)], color.mix(0.3).filled()))?;
        root.draw(&text((*word).to_owned(), (x + 20, 45), 14))?;
    }
    let series: Vec<Vec<(Duration, f64)>> =
        hosts.iter().map(|host| by_second(looks, POOLS[place], &host.addresses[place].to_string())).collect();
    let most = series.iter().flatten().map(|(_, rate)| *rate).fold(1.0, f64::max);
    for ((host, points), row) in series.iter().enumerate().zip(0..) {
        let bottom = TOP + (row + 1) * ROW - 3;
        for outage in outages.iter().filter(|outage| outage.host == host) {
            let color = if outage.act == DayAction::Kill { legend[0].0 } else { legend[1].0 };
            let corners = [
                (pixels(outage.from, whole), bottom - ROW + 3),
                (pixels(outage.until, whole).max(pixels(outage.from, whole) + 1), bottom),
            ];
            root.draw(&Rectangle::new(corners, color.mix(0.3).filled()))?;
        }
        let line = points.iter().map(|(at, rate)| {
            #[expect(clippy::cast_possible_truncation, reason = "a row's height")]
            let height = ((rate / most).sqrt() * f64::from(ROW - 5)) as i32;
            (pixels(*at, whole), bottom - height)
        });
        root.draw(&PathElement::new(line.collect::<Vec<_>>(), BLUE.stroke_width(1)))?;
        root.draw(&PathElement::new(vec![(LEFT, bottom), (LEFT + WIDTH, bottom)], BLACK.mix(0.2)))?;
        root.draw(&text(format!("host {}, weight {}", host + 1, weight(host)), (10, bottom - 17), 14))?;
    }
    let bottom = TOP + rows * ROW;
    let step = if whole > Duration::from_secs(120) { 60 } else { 5 };
    for second in (0..=whole.as_secs()).step_by(step) {
        let x = pixels(Duration::from_secs(second), whole);
        root.draw(&PathElement::new(vec![(x, bottom), (x, bottom + 6)], BLACK))?;
        root.draw(&text(format!("{}:{:02}", second / 60, second % 60), (x - 10, bottom + 10), 14))?;
    }
    // Both a usual second and that of the last host left are to be seen.
    let scale = format!("a row is {most:.0} sessions/s high, and half as high a quarter of them");
    root.draw(&text(scale, (LEFT + WIDTH - 400, 45), 14))?;
    root.present()?;
    Ok(())
}

/// Sessions a second of one backend, over each second.
fn by_second(looks: &[Look], pool: &str, address: &str) -> Vec<(Duration, f64)> {
    let key = (pool.to_owned(), address.to_owned());
    let mut points = Vec::new();
    let mut last: Option<(Duration, u64)> = None;
    for look in looks {
        let served = look.backends[&key].1;
        match last {
            Some((at, before)) if look.at.saturating_sub(at) >= Duration::from_secs(1) => {
                #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
                points.push((look.at, (served - before) as f64 / look.at.saturating_sub(at).as_secs_f64()));
                last = Some((look.at, served));
            }
            None => last = Some((look.at, served)),
            Some(_) => {}
        }
    }
    points
}
