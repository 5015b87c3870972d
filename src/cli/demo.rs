//! `vestibule demo`: tenants with the same addresses, their pools, and the proxy between them, in one process.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use crate::admin::status::Status;
use crate::config::Config;
use crate::lab::backend::{BackendBehavior, DatagramBackend, DatagramBehavior, TestBackend};
use crate::lab::load::consumer::{ConsumerLoad, ConsumerReport, ConsumerRequest};
use crate::lab::nlb::{self, Nlb, VpcEndpoint};
use crate::outcome::Reason;
use crate::server::Server;

#[derive(Debug, clap::Args)]
pub(super) struct DemoOptions {
    /// Stop after N seconds; without this option, at Ctrl-C
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
}

/// All consumers live in this network, as in the classic hands-on.
const NETWORK: &str = "10.100.0.0/16";
/// The tenants and their endpoints.
const TENANTS: [(&str, &str); 2] = [("acme", "vpce-0acce0000acce0000"), ("globex", "vpce-0910be00910be0000")];
/// A tenant that speaks UDP, in the same network, too.
const DATAGRAMS: (&str, &str) = ("initech", "vpce-0141e0ec0141e0ec0");
/// An endpoint that no tenant lists.
const STRANGER: &str = "vpce-0bad0bad0bad0bad0";
/// Backends of each tenant's pool.
const BACKENDS: usize = 2;
/// Consumers of each tenant that send requests.
const CONSUMERS: usize = 2;
/// Between two requests of a consumer.
const PAUSE: Duration = Duration::from_millis(2);
/// What one exchange of the demo's own may take.
const LIMIT: Duration = Duration::from_secs(5);

pub(super) fn run(options: &DemoOptions) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    match runtime.block_on(demo(options)) {
        Ok(verdict) => verdict,
        Err(error) => failed(error.as_ref()),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("the demo failed: {error}");
    ExitCode::FAILURE
}

/// The servers and clients that the demo starts.
struct DemoSetup {
    server: Server,
    nlb: Nlb,
    raw: Nlb,
    udp: Nlb,
    loads: Vec<Arc<ConsumerLoad>>,
    /// Held for their end.
    _backends: (Vec<TestBackend>, Vec<DatagramBackend>),
}

async fn demo(options: &DemoOptions) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let world = DemoSetup::start().await?;
    world.introduce();
    let (stop, stopped) = watch::channel(false);
    let mut consumers = JoinSet::new();
    for load in &world.loads {
        for _ in 0..CONSUMERS {
            let (load, stopped) = (Arc::clone(load), stopped.clone());
            consumers.spawn(async move { load.run(stopped).await });
        }
    }
    let shown = world.show_bad_input().await;
    let end = async {
        match options.seconds {
            Some(seconds) => sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = end => {}
        _ = tokio::signal::ctrl_c() => {}
        () = world.report_every_second() => {}
    }
    stop.send_replace(true);
    while consumers.join_next().await.is_some() {}
    let verdict = world.table() && shown;
    let DemoSetup { server, .. } = world;
    server.end();
    tokio::task::spawn_blocking(move || server.join()).await?;
    Ok(if verdict { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl DemoSetup {
    async fn start() -> Result<Self, Box<dyn std::error::Error>> {
        let mut backends = Vec::new();
        let mut config = String::from(HEAD);
        for (tenant, endpoint) in TENANTS {
            let mut addresses = Vec::new();
            for number in 1..=BACKENDS {
                let backend =
                    TestBackend::start(&format!("{tenant}-{number}"), BackendBehavior::Http).await?;
                addresses.push(format!("\"{}\"", backend.address()));
                backends.push(backend);
            }
            let echo = TestBackend::start(&format!("{tenant}-echo"), BackendBehavior::Greeting).await?;
            config.push_str(&raw_pool(tenant, echo.address()));
            let routes = format!("routes = {{ raw = \"{tenant}-raw\" }}\n");
            config.push_str(&tenant_table(tenant, endpoint, &addresses.join(", "), "", &routes));
            backends.push(echo);
        }
        let (tenant, endpoint) = DATAGRAMS;
        let (mut addresses, mut of_datagrams) = (Vec::new(), Vec::new());
        for number in 1..=BACKENDS {
            let backend =
                DatagramBackend::start(&format!("{tenant}-{number}"), DatagramBehavior::Introduction).await?;
            addresses.push(format!("\"{}\"", backend.address()));
            of_datagrams.push(backend);
        }
        config.push_str(&tenant_table(tenant, endpoint, &addresses.join(", "), PROBE, ""));
        let server = Server::start(&Config::parse("the demo's configuration", &config)?)?;
        let first =
            |listener| server.addresses(listener).first().copied().ok_or("a listener without an address");
        let endpoints = || -> Result<Vec<_>, ipnet::AddrParseError> {
            let ids = TENANTS.iter().map(|(_, id)| *id).chain([STRANGER]);
            ids.map(|id| Ok(VpcEndpoint { id: id.to_owned(), consumers: NETWORK.parse()? })).collect()
        };
        let nlb = Nlb::start(first("web")?, endpoints()?).await?;
        let raw = Nlb::start(first("raw")?, endpoints()?).await?;
        let consumers = VpcEndpoint { id: endpoint.to_owned(), consumers: NETWORK.parse()? };
        let udp = Nlb::start_udp(first("udp")?, vec![consumers]).await?;
        let tcp = TENANTS
            .iter()
            .enumerate()
            .map(|(place, (tenant, _))| (nlb.address(place), ConsumerRequest::Http, *tenant));
        let all = tcp.chain([(udp.address(0), ConsumerRequest::Datagram, tenant)]);
        let loads = all.filter_map(|(address, asks, tenant)| {
            Some(Arc::new(ConsumerLoad::new(address?, asks, &format!("{tenant}-"), PAUSE)))
        });
        let loads = loads.collect();
        Ok(Self { server, nlb, raw, udp, loads, _backends: (backends, of_datagrams) })
    }

    fn introduce(&self) {
        println!(
            "vestibule {}: one load balancer, three consumers with the same network\n",
            env!("CARGO_PKG_VERSION")
        );
        println!("  {:<8}{:<24}{:<16}try it from another terminal", "tenant", "VPC endpoint", "consumers");
        for (place, (tenant, endpoint)) in TENANTS.iter().enumerate() {
            if let Some(address) = self.nlb.address(place) {
                println!("  {tenant:<8}{endpoint:<24}{NETWORK:<16}curl http://{address}/");
            }
        }
        if let Some(address) = self.udp.address(0) {
            let (tenant, endpoint) = DATAGRAMS;
            let (ip, port) = (address.ip(), address.port());
            println!("  {tenant:<8}{endpoint:<24}{NETWORK:<16}echo 'who?' | nc -u -w1 {ip} {port}   (UDP)");
        }
        if let Some(address) = self.nlb.address(TENANTS.len()) {
            println!("  {:<8}{STRANGER:<24}{NETWORK:<16}curl http://{address}/   (is reset)", "unknown");
        }
        println!("\n  status   http://{}/", self.server.admin());
        println!("  metrics  http://{}/metrics", self.server.admin());
        println!("  health   http://{}/healthz\n", self.server.health());
    }

    /// What a stranger and a forger get. Whether each got what it should.
    async fn show_bad_input(&self) -> bool {
        let stranger = match self.nlb.address(TENANTS.len()) {
            Some(address) => timeout(LIMIT, exchange(address, b"GET / HTTP/1.1\r\n\r\n")).await,
            None => Ok(Err(io::ErrorKind::NotFound.into())),
        };
        let rejected = matches!(&stranger, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset);
        println!(
            "  unknown endpoint: {}",
            if rejected { "reset; no backend received it" } else { "NOT REJECTED" }
        );
        let delivered =
            timeout(LIMIT, self.forge()).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let said = match &delivered {
            Ok(true) => "forwarded as payload to acme's own backend, byte for byte",
            Ok(false) => "REACHED ANOTHER TENANT OR WAS CHANGED",
            Err(_) => "NO ANSWER",
        };
        println!("  forged second header, acme claiming to be globex: {said}\n");
        rejected && delivered.unwrap_or(false)
    }

    /// acme sends a header of its own, with globex's endpoint, through acme's endpoint.
    async fn forge(&self) -> io::Result<bool> {
        let [(acme, _), (_, endpoint)] = TENANTS;
        let client = SocketAddr::from(([10, 100, 0, 66], 6666));
        let forged = nlb::header(client, client, Some(endpoint));
        let address = self.raw.address(0).ok_or(io::ErrorKind::NotFound)?;
        let answer = exchange(address, &forged).await?;
        let mut expected = format!("{acme}-echo\n").into_bytes();
        expected.extend(&forged);
        Ok(answer == expected)
    }

    async fn report_every_second(&self) {
        let mut ticks = interval(Duration::from_secs(1));
        ticks.tick().await;
        for second in 1_u64.. {
            ticks.tick().await;
            let status = Status::of(self.server.live());
            let tenants = all_tenants().map(|(name, _)| {
                let tenant = status.tenants.iter().find(|tenant| tenant.name == name);
                let (ended, bytes) =
                    tenant.map_or((0, 0), |tenant| (tenant.ended, tenant.to_backend + tenant.to_client));
                format!("{name} {ended} sessions {} KiB", bytes / 1024)
            });
            let rejected = status.unidentified.get(Reason::UnknownEndpoint.as_str()).unwrap_or(&0);
            let tenants = tenants.collect::<Vec<_>>().join(" | ");
            println!("{second:>5} s  {tenants} | open {} | unknown endpoint {rejected}", status.sessions);
        }
    }

    /// The closing table. Whether every request went where it should.
    fn table(&self) -> bool {
        println!(
            "\n  {:<8}{:<24}{:<17}{:<11}{:>8}{:>10}{:>10}",
            "tenant", "VPC endpoint", "client addresses", "backend", "answers", "p50", "p99"
        );
        let mut fine = true;
        for ((tenant, endpoint), load) in all_tenants().zip(&self.loads) {
            let report = load.report();
            let (p50, p99) = (milliseconds(&report, 50.0), milliseconds(&report, 99.0));
            for (backend, answers) in &report.backends {
                let clients = match (answers.clients.first(), answers.clients.last()) {
                    (Some(first), Some(last)) => format!("{first}-{}", last_part(&last.to_string())),
                    _ => "-".to_owned(),
                };
                println!(
                    "  {tenant:<8}{endpoint:<24}{clients:<17}{backend:<11}{:>8}{p50:>10}{p99:>10}",
                    answers.count
                );
            }
            let right = report.answered > 0 && report.failed == 0 && report.misrouted == 0;
            if !right {
                println!("  {tenant}: {} failed, {} went to the wrong pool", report.failed, report.misrouted);
            }
            fine &= right;
        }
        println!(
            "\n  {}",
            if fine {
                "Every request reached its own tenant's pool."
            } else {
                "NOT EVERY REQUEST REACHED ITS POOL."
            }
        );
        fine
    }
}

/// Those of TCP, then the one of UDP: in the order of the loads.
fn all_tenants() -> impl Iterator<Item = (&'static str, &'static str)> {
    TENANTS.into_iter().chain([DATAGRAMS])
}

fn milliseconds(report: &ConsumerReport, percent: f64) -> String {
    format!("{:.2} ms", report.times.percentile(percent).as_secs_f64() * 1e3)
}

fn last_part(address: &str) -> &str {
    address.rsplit('.').next().unwrap_or(address)
}

/// Sends, ends, and reads to the end.
async fn exchange(address: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(question).await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// The demo's configuration, as an operator would write it; addresses of the backends follow.
const HEAD: &str = r#"
[process]
workers = 1

[admin]
bind = "127.0.0.1:0"

[health]
bind = "127.0.0.1:0"

[log]
access = "off"

[timeouts]
flow-idle = "1s"

[[listener]]
name = "web"
bind = "127.0.0.1:0"
trusted-sources = ["127.0.0.0/8"]

[[listener]]
name = "udp"
protocol = "udp"
bind = "127.0.0.1:0"
trusted-sources = ["127.0.0.0/8"]

[[listener]]
name = "raw"
bind = "127.0.0.1:0"
trusted-sources = ["127.0.0.0/8"]
"#;

/// How backends of datagrams are probed.
const PROBE: &str = r#"health = { kind = "exchange", protocol = "udp", send = "who?", expect = "backend" }
"#;

/// A tenant, and its pool.
fn tenant_table(tenant: &str, endpoint: &str, backends: &str, health: &str, routes: &str) -> String {
    format!(
        r#"
[[pool]]
name = "{tenant}"
backends = [{backends}]
send-proxy = "v2"
{health}
[[tenant]]
name = "{tenant}"
endpoints = ["{endpoint}"]
pool = "{tenant}"
{routes}"#
    )
}

/// Where a tenant's listener `raw` leads.
fn raw_pool(tenant: &str, echo: SocketAddr) -> String {
    format!("\n[[pool]]\nname = \"{tenant}-raw\"\nbackends = [\"{echo}\"]\n")
}
