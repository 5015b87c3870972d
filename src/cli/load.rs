//! `vestibule load`: what the load generator was asked for.

mod render;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::interval;

use super::{backend, plot};
use crate::config::unit;
use crate::id::EndpointId;
use crate::lab::load::schedule::Skew;
use crate::lab::load::{self, FRONT, LoadMode, LoadPlan, LoadProgress, LoadReport, LoadWork, MOST_CLIENTS};

pub(super) const EXAMPLES: &str = "\
Examples:
  vestibule load --target 127.0.0.1:8080 --endpoint vpce-08d2bf15fac5001c9 --mode connect
  vestibule load --target 127.0.0.1:8080 --endpoints 1000 --pools app --write-tenants tenants.toml
  vestibule load --target 127.0.0.1:8080 --endpoints 1000 --pools app --skew zipf:1.1 \\
      --mode roundtrip --sessions 64 --rate 5000 --duration 30s --plot latency.svg
  vestibule load --target 127.0.0.1:5353 --endpoint vpce-08d2bf15fac5001c9 --mode udp \\
      --sessions 1000 --window 4 --size 1200B --timeout 500ms";

#[derive(Debug, clap::Args)]
pub(super) struct LoadOptions {
    /// The proxy's address
    #[arg(long, value_name = "ADDRESS", value_parser = backend::address)]
    target: SocketAddr,
    /// Send this VPC endpoint ID; may be repeated
    #[arg(long, value_name = "ID", num_args = 1.., conflicts_with = "endpoints", value_parser = endpoint)]
    endpoint: Vec<String>,
    /// Send N generated endpoint IDs; without this and --endpoint no header is sent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    endpoints: Option<u32>,
    /// Expected pools of the endpoints, in turn; a session answered by another pool's backend is misrouted
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pools: Vec<String>,
    /// Write the endpoints as [[tenant]] tables to a file, and exit
    #[arg(long, value_name = "FILE")]
    write_tenants: Option<PathBuf>,
    /// Distribution of sessions over endpoints: uniform, or zipf:EXPONENT
    #[arg(long, default_value = "uniform")]
    skew: Skew,
    /// What each session does
    #[arg(long, value_enum, default_value = "connect")]
    mode: LoadModeName,
    /// Concurrent sessions, or flows with one source port each
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    sessions: u32,
    /// Bytes per message, or per read or write in the bulk modes, without the header; at least 16, udp: 24 to 65000 [default:
    /// 64B, bulk modes 128KiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<usize>,
    /// Operations per second of all sessions together (open loop: latency counts from the due time)
    #[arg(long, value_name = "N/s", value_parser = rate)]
    rate: Option<f64>,
    /// Duration of the measurement
    #[arg(long, default_value = "10s", value_parser = unit::duration)]
    duration: Duration,
    /// Duration of the load before the measurement
    #[arg(long, default_value = "1s", value_parser = unit::duration)]
    warmup: Duration,
    /// Also report each interval of this length; at most 10000 intervals
    #[arg(long, value_parser = unit::duration)]
    interval: Option<Duration>,
    /// Number of client addresses, used at random
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_CLIENTS)))]
    clients: u32,
    /// Percentage of connections that are health checks, empty, with a split header, or from an unknown endpoint
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = percent)]
    noise: u8,
    /// udp: datagrams per flow that wait for an answer at the same time [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    window: Option<u32>,
    /// udp: a datagram without an answer after this time is lost [default: 1s]
    #[arg(long, value_parser = unit::duration)]
    timeout: Option<Duration>,
    /// Also run this backend, in the same process; may be repeated
    #[arg(long, value_name = "NAME=ADDRESS", num_args = 1.., value_parser = backend::named)]
    serve: Vec<(String, SocketAddr)>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Write the latency distribution as SVG
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LoadModeName {
    /// Connect, one message and its answer, close
    Connect,
    /// Messages and answers over open connections
    Roundtrip,
    /// Receive as much as possible
    ToClient,
    /// Send as much as possible
    ToBackend,
    /// Datagrams and answers, each datagram with a header
    Udp,
}

impl LoadModeName {
    /// The bytes of a message, or of one read or write, where nothing is said.
    const fn size(self) -> usize {
        match self {
            Self::Connect | Self::Roundtrip | Self::Udp => 64,
            Self::ToClient | Self::ToBackend => 128 * 1024,
        }
    }
}

impl LoadOptions {
    fn size(&self) -> usize {
        self.size.unwrap_or(self.mode.size())
    }

    fn work(&self) -> LoadWork {
        match self.mode {
            LoadModeName::Connect => LoadWork::Sessions(LoadMode::Connect),
            LoadModeName::Roundtrip => LoadWork::Sessions(LoadMode::RoundTrip),
            LoadModeName::ToClient => LoadWork::Sessions(LoadMode::ToClient),
            LoadModeName::ToBackend => LoadWork::Sessions(LoadMode::ToBackend),
            LoadModeName::Udp => LoadWork::Flows {
                window: self.window.unwrap_or(1) as usize,
                timeout: self.timeout.unwrap_or(Duration::from_secs(1)),
            },
        }
    }

    /// What does not go together.
    fn fault(&self) -> Option<String> {
        let is_udp = matches!(self.mode, LoadModeName::Udp);
        let size = self.size();
        if is_udp && !(FRONT..=LARGEST).contains(&size) {
            return Some(format!(
                "--size: must be from {FRONT}B to {LARGEST}B in --mode udp, found \"{size}B\""
            ));
        }
        if is_udp && self.noise > 0 {
            return Some("--noise: needs a TCP mode, found --mode udp".to_owned());
        }
        let of_udp = [("--window", self.window.is_some()), ("--timeout", self.timeout.is_some())];
        if let Some((option, _)) = of_udp.into_iter().find(|(_, is_given)| *is_given && !is_udp) {
            return Some(format!("{option}: needs --mode udp, found another mode"));
        }
        if self.timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Some("--timeout: must be more than 0s, such as \"1s\", found \"0s\"".to_owned());
        }
        let least = self.duration / MOST_INTERVALS;
        if let Some(interval) = self.interval.filter(|interval| interval.is_zero() || *interval < least) {
            return Some(format!(
                "--interval: must be at least {:?} with --duration {:?}, found {interval:?}",
                least.max(Duration::from_millis(1)),
                self.duration
            ));
        }
        None
    }
}

/// Intervals of a report: each takes some ten kilobytes.
const MOST_INTERVALS: u32 = 10_000;

/// The longest datagram that leaves room for the load balancer's header.
const LARGEST: usize = 65_000;

fn size(text: &str) -> Result<usize, String> {
    let bytes = unit::size(text).map_err(|error| error.to_string())?;
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| (16..=16 * 1024 * 1024).contains(bytes))
        .ok_or_else(|| format!("must be from 16B to 16MiB, found \"{text}\""))
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    let rate = number.parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| {
        format!("must be a number of operations a second, such as \"5000/s\", found \"{text}\"")
    })
}

fn endpoint(text: &str) -> Result<String, String> {
    let is_one = EndpointId::from_bytes(text.as_bytes()).is_some();
    is_one.then(|| text.to_owned()).ok_or_else(|| {
        format!("must be a VPC endpoint's ID, such as \"vpce-08d2bf15fac5001c9\", found \"{text}\"")
    })
}

fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<u8>().ok();
    number
        .filter(|percent| *percent <= 100)
        .ok_or_else(|| format!("must be a percentage, such as \"5%\", found \"{text}\""))
}

pub(super) fn run(options: &LoadOptions) -> ExitCode {
    match carry_out(options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(options: &LoadOptions) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let endpoints = endpoints(options);
    if let Some(path) = &options.write_tenants {
        if endpoints.is_empty() {
            return Err("--write-tenants: needs --endpoints or --endpoint, found neither".into());
        }
        std::fs::write(path, tenants(&endpoints)).map_err(|error| unwritable(path, &error))?;
        eprintln!("{} tenants written to {}", endpoints.len(), path.display());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(fault) = options.fault() {
        return Err(fault.into());
    }
    if let Some(path) = &options.plot {
        // Said before the load, not after it.
        std::fs::File::create(path).map_err(|error| unwritable(path, &error))?;
    }
    let plan = LoadPlan {
        target: options.target,
        endpoints,
        skew: options.skew,
        work: options.work(),
        sessions: options.sessions as usize,
        size: options.size(),
        rate: options.rate,
        duration: options.duration,
        warmup: options.warmup,
        interval: options.interval,
        clients: options.clients,
        noise: options.noise,
    };
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let report = runtime.block_on(async {
        // Held until the load has ended.
        let is_udp = matches!(options.mode, LoadModeName::Udp);
        let (tcp, udp) = if is_udp { (&[][..], &options.serve[..]) } else { (&options.serve[..], &[][..]) };
        let _backends = (backend::start(tcp).await?, backend::start_udp(udp).await?);
        watched(plan).await.map_err(|error| error.to_string())
    })?;
    if options.json {
        println!("{:#}", render::as_json(&report, options.interval));
    } else {
        print!("{}", render::as_text(&report, options.mode, options.interval));
    }
    if let Some(path) = &options.plot {
        draw(&report, path)?;
    }
    Ok(if report.is_fine() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn draw(report: &LoadReport, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let title = format!("{} operations in {:.1} s", report.operations, report.took.as_secs_f64());
    plot::svg(&report.latency, &title, path).map_err(|error| unwritable(path, error.as_ref()).into())
}

fn unwritable(path: &Path, error: &dyn std::error::Error) -> String {
    format!("{}: cannot write the file: {error}", path.display())
}

/// The IDs, each with its pool.
fn endpoints(options: &LoadOptions) -> Vec<(String, String)> {
    let made = (0..options.endpoints.unwrap_or(0)).map(made_id);
    let ids = options.endpoint.iter().cloned().chain(made);
    let mut pools = options.pools.iter().cycle();
    ids.map(|id| (id, pools.next().cloned().unwrap_or_default())).collect()
}

/// The ID of the n-th made endpoint: spread over the digits, and the same in every run.
fn made_id(number: u32) -> String {
    let spread = u64::from(number).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    format!("vpce-0{spread:016x}")
}

fn tenants(endpoints: &[(String, String)]) -> String {
    let mut text = String::from("# Written by `vestibule load --write-tenants`.\n");
    for (number, (id, pool)) in endpoints.iter().enumerate() {
        // Writing to a string does not fail.
        write!(text, "\n[[tenant]]\nname = \"made-{number}\"\nendpoints = [\"{id}\"]\n").unwrap_or_default();
        if !pool.is_empty() {
            writeln!(text, "pool = \"{pool}\"").unwrap_or_default();
        }
    }
    text
}

/// Runs the plan, with a progress line each second on a terminal.
async fn watched(plan: LoadPlan) -> io::Result<LoadReport> {
    let progress = Arc::new(LoadProgress::default());
    let mut ticks = interval(Duration::from_secs(1));
    ticks.tick().await;
    let load = load::run(plan, Arc::clone(&progress));
    tokio::pin!(load);
    let mut before = 0;
    loop {
        tokio::select! {
            report = &mut load => {
                if io::stderr().is_terminal() {
                    eprint!("\r\x1b[K");
                }
                return report;
            }
            _ = ticks.tick() => {
                let operations = progress.operations.load(Ordering::Relaxed);
                if io::stderr().is_terminal() {
                    let failed = progress.failed.load(Ordering::Relaxed);
                    let mebibytes = progress.bytes.load(Ordering::Relaxed) >> 20;
                    eprint!("\r\x1b[K{} operations/s, {mebibytes} MiB, {failed} failed", operations - before);
                    // A failure to print progress does not stop the load.
                    io::stderr().flush().unwrap_or_default();
                }
                before = operations;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_ids_are_well_formed_and_differ() {
        let ids: std::collections::BTreeSet<_> = (0..1000).map(made_id).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| EndpointId::from_bytes(id.as_bytes()).is_some()));
    }

    #[test]
    fn options_are_read_or_explained() {
        assert_eq!(size("64B"), Ok(64));
        assert_eq!(size("16KiB"), Ok(16 * 1024));
        assert!(size("15B").is_err() && size("1GiB").is_err() && size("x").is_err());
        assert_eq!(rate("5000/s"), Ok(5000.0));
        assert!(rate("0/s").is_err() && rate("-1").is_err() && rate("NaN").is_err());
        assert_eq!(percent("5%"), Ok(5));
        assert_eq!(endpoint("vpce-1a2b3c4d").as_deref(), Ok("vpce-1a2b3c4d"));
        assert!(endpoint("vpce-zz").is_err());
        assert!(percent("101%").is_err() && percent("x").is_err());
    }

    /// What is said of a command line that does not go together.
    fn fault(line: &str) -> Option<String> {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            options: LoadOptions,
        }
        let words = ["load", "--target", "127.0.0.1:1"].into_iter().chain(line.split_whitespace());
        <Alone as clap::Parser>::try_parse_from(words).unwrap().options.fault()
    }

    #[test]
    fn conflicting_options_are_refused() {
        for line in [
            "",
            "--interval 1ms",
            "--mode udp",
            "--mode udp --size 24B",
            "--mode udp --size 65000B",
            "--size 16B --noise 5%",
        ] {
            assert_eq!(fault(line), None, "{line}");
        }
        for (line, option) in [
            ("--mode udp --size 23B", "--size: must be from 24B to 65000B"),
            ("--mode udp --size 64KiB", "--size: "),
            ("--mode udp --noise 1%", "--noise: "),
            ("--mode udp --timeout 0s", "--timeout: must be more than 0s"),
            ("--mode connect --timeout 1s", "--timeout: needs --mode udp"),
            ("--interval 0s", "--interval: must be at least 1ms with --duration 10s, found 0ns"),
            ("--duration 100s --interval 9ms", "--interval: must be at least 10ms with --duration 100s"),
            ("--window 2", "--window: "),
        ] {
            assert!(fault(line).is_some_and(|fault| fault.starts_with(option)), "{line}");
        }
    }

    #[test]
    fn tenants_are_written_as_a_configuration() {
        let text = tenants(&[
            ("vpce-1a2b3c4d".to_owned(), "app".to_owned()),
            ("vpce-1a2b3c4e".to_owned(), String::new()),
        ]);
        assert!(
            text.contains("name = \"made-0\"\nendpoints = [\"vpce-1a2b3c4d\"]\npool = \"app\"\n"),
            "{text}"
        );
        assert!(text.ends_with("name = \"made-1\"\nendpoints = [\"vpce-1a2b3c4e\"]\n"), "{text}");
    }
}
