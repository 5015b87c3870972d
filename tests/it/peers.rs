//! Peers that others wrote: nginx and HAProxy behind the proxy, HAProxy in front of it, curl as the consumer.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::net::TcpStream;
use vestibule::lab::nlb::{Nlb, VpcEndpoint};

use super::harness::{ACME, Conf, Proxy, STRANGER, eventually};

/// Where system packages put servers, and an ordinary user's PATH may not look.
const FOLDERS: [&str; 3] = ["", "/usr/sbin/", "/usr/local/sbin/"];

/// How to call each of `names`; `None`, and a line that says so, where one is not installed. It must be where
/// `VESTIBULE_REQUIRE_PEERS=1`.
pub fn installed<const N: usize>(names: [&str; N]) -> Option<[String; N]> {
    let found = names.map(find);
    for (name, program) in names.iter().zip(&found) {
        if program.is_none() {
            assert!(!are_required(), "{name} is not installed, and VESTIBULE_REQUIRE_PEERS is set");
            // Not eprintln!, which the test runner keeps to itself when a test passes.
            let line = format!("left out: {name} is not installed\n");
            io::stderr().write_all(line.as_bytes()).unwrap();
        }
    }
    found.iter().all(Option::is_some).then(|| found.map(Option::unwrap))
}

fn find(name: &str) -> Option<String> {
    FOLDERS.iter().map(|folder| format!("{folder}{name}")).find(|program| {
        // To dnsdist and dnsperf -v is something else.
        let version = match name {
            "curl" | "dnsdist" => "-V",
            "dnsperf" => "-h",
            _ => "-v",
        };
        let shown = Command::new(program).arg(version).stdout(Stdio::null()).stderr(Stdio::null()).status();
        shown.is_ok_and(|status| status.success())
    })
}

#[expect(clippy::disallowed_methods, reason = "how strict the tests are is no configuration of the proxy's")]
fn are_required() -> bool {
    std::env::var("VESTIBULE_REQUIRE_PEERS").is_ok_and(|value| value == "1")
}

/// A server in the foreground; it ends with this.
pub struct Peer {
    pub address: SocketAddr,
    child: Child,
    dir: TempDir,
    /// Keeps the port from everybody but the server.
    _reserved: Socket,
}

impl Peer {
    /// Starts a server that listens at `address`, and waits until it does.
    async fn start(dir: TempDir, (reserved, address): (Socket, SocketAddr), command: &mut Command) -> Self {
        let log = File::create(dir.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let peer = Self { address, child, dir, _reserved: reserved };
        eventually("a peer that listens", async || TcpStream::connect(address).await.ok()).await;
        peer
    }

    /// nginx, which reads a PROXY header; `location` is configuration inside of `server`.
    async fn nginx(program: &str, dir: TempDir, location: &str) -> Self {
        let port = reserve();
        let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {kind};"))
            .join("\n    ");
        let text = format!(
            "daemon off;
master_process off;
pid pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    {temp}
    server {{
        listen {address} proxy_protocol;
        {location}
    }}
}}
",
            address = port.1
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, text).unwrap();
        let mut command = Command::new(program);
        command.arg("-p").arg(dir.path()).args(["-e", "stderr", "-c"]).arg(&file);
        Self::start(dir, port, &mut command).await
    }

    /// HAProxy; `bind` is what follows its address, `rules` the rest of its one proxy.
    async fn haproxy(program: &str, bind: &str, rules: &str) -> Self {
        let port = reserve();
        let dir = TempDir::new().unwrap();
        let text = format!(
            "global
    maxconn 100
defaults
    timeout connect 20s
    timeout client 20s
    timeout server 20s
listen peer
    bind {address} {bind}
    {rules}
",
            address = port.1
        );
        let file = dir.path().join("haproxy.cfg");
        fs::write(&file, text).unwrap();
        Self::start(dir, port, Command::new(program).arg("-db").arg("-f").arg(&file)).await
    }

    /// dnsdist, by UDP and TCP at one address; `rules` is the rest of its configuration.
    pub async fn dnsdist(program: &str, rules: &str) -> Self {
        let port = reserve();
        let dir = TempDir::new().unwrap();
        // Nobody is asked on the internet whether there is a newer one.
        let text = format!("setSecurityPollSuffix('')\nsetLocal('{}')\n{rules}\n", port.1);
        let file = dir.path().join("dnsdist.conf");
        fs::write(&file, text).unwrap();
        let mut command = Command::new(program);
        command.args(["--supervised", "--disable-syslog", "-C"]).arg(&file);
        Self::start(dir, port, &mut command).await
    }

    /// HAProxy between a consumer and `target`: its headers have a checksum, and as unique ID the consumer's
    /// address in hexadecimal.
    async fn haproxy_in_front_of(program: &str, target: SocketAddr) -> Self {
        let text = format!(
            "mode tcp
    unique-id-format id-%{{+X}}o%ci:%cp
    server s {target} send-proxy-v2 proxy-v2-options crc32c,unique-id"
        );
        Self::haproxy(program, "", &text).await
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // One that has ended already is an error here, and the log says why it ended.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log"));
            eprintln!("the peer at {} said:\n{}", self.address, log.unwrap_or_default());
        }
    }
}

/// A port of the system's choice for a server that opens it by itself. The socket is bound but does not listen: as
/// both have `SO_REUSEADDR`, the server may bind too, and the system gives the port to nobody else meanwhile.
fn reserve() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// A load balancer in front of the listener `web`: acme's endpoint, and a stranger's.
async fn nlb(proxy: &Proxy) -> Nlb {
    let endpoint = |id: &str| VpcEndpoint { id: id.to_owned(), consumers: "10.100.0.0/16".parse().unwrap() };
    Nlb::start(proxy.address("web"), vec![endpoint(ACME), endpoint(STRANGER)]).await.unwrap()
}

/// What curl prints; its status is in the error.
async fn curl(program: &str, arguments: &[&str]) -> Result<String, i32> {
    let mut command = Command::new(program);
    // -q: nobody's own settings. The limit is for a test that hangs.
    command.args(["-q", "-sS", "--noproxy", "*", "--max-time", "60"]).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output());
    let output = output.await.unwrap().unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap());
    }
    eprintln!("curl: {}", String::from_utf8_lossy(&output.stderr));
    Err(output.status.code().unwrap_or(-1))
}

/// What nginx answers: who asks, and which request of the connection it is.
const WHO: &str =
    r#"location / { return 200 "$proxy_protocol_addr:$proxy_protocol_port $connection_requests\n"; }"#;

const SEND_PROXY: &str = "send-proxy = \"v2\"";

#[tokio::test]
async fn nginx_reads_the_header_that_we_pass_on_and_a_connection_serves_many_requests() {
    let Some([nginx, curl_program]) = installed(["nginx", "curl"]) else { return };
    let nginx = Peer::nginx(&nginx, TempDir::new().unwrap(), WHO).await;
    let conf = Conf { acme: vec![nginx.address], pool: SEND_PROXY.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let nlb = nlb(&proxy).await;

    let url = format!("http://{}/", nlb.address(0).unwrap());
    let answer = curl(&curl_program, &[&*url; 3]).await.unwrap();
    assert_eq!(answer, "10.100.0.10:40000 1\n10.100.0.10:40000 2\n10.100.0.10:40000 3\n");
    let answer = curl(&curl_program, &[&url]).await.unwrap();
    assert_eq!(answer, "10.100.0.11:40000 1\n", "the next consumer has an address of its own");
    assert_eq!(nlb.connections(0), 2);
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;

    let stranger = format!("http://{}/", nlb.address(1).unwrap());
    // 56 is curl's word for a reset while it receives.
    assert_eq!(curl(&curl_program, &[&stranger]).await, Err(56));
    proxy.ended(&[("why", "unknown_endpoint")]).is(1).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn large_file_is_complete_from_nginx_to_curl_and_back() {
    const SIZE: u32 = 50 << 20;
    let Some([nginx, curl_program]) = installed(["nginx", "curl"]) else { return };
    let dir = TempDir::new().unwrap();
    let mut content = vec![0; SIZE as usize];
    fastrand::Rng::with_seed(7).fill(&mut content);
    fs::write(dir.path().join("large"), &content).unwrap();
    fs::create_dir(dir.path().join("up")).unwrap();
    let location = format!(
        "root {root};
        location /up/ {{ dav_methods PUT; client_max_body_size 0; }}",
        root = dir.path().display()
    );
    let nginx = Peer::nginx(&nginx, dir, &location).await;
    let conf = Conf { acme: vec![nginx.address], pool: SEND_PROXY.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let nlb = nlb(&proxy).await;

    let home = TempDir::new().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let base = format!("http://{}", nlb.address(0).unwrap());
    curl(&curl_program, &["-f", "-o", &path("large"), &format!("{base}/large")]).await.unwrap();
    assert_eq!(checksum(&home.path().join("large")), crc32c::crc32c(&content), "what curl has");
    proxy.metric("vestibule_forwarded_bytes_total", &[("direction", "to_client")]).is_at_least(SIZE).await;

    curl(&curl_program, &["-f", "-T", &path("large"), &format!("{base}/up/large")]).await.unwrap();
    let arrived = nginx.dir.path().join("up/large");
    assert_eq!(checksum(&arrived), crc32c::crc32c(&content), "what nginx has");
    proxy.metric("vestibule_forwarded_bytes_total", &[("direction", "to_backend")]).is_at_least(SIZE).await;
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

fn checksum(path: &Path) -> u32 {
    crc32c::crc32c(&fs::read(path).unwrap())
}

/// HAProxy adds no endpoint ID: its traffic is acme's by the listener's rule.
fn conf_for_haproxy(backend: SocketAddr) -> Conf {
    let mut conf = Conf { acme: vec![backend], pool: SEND_PROXY.to_owned(), ..Conf::default() };
    conf.listener.push_str("\non-no-endpoint = \"tenant:acme\"");
    conf
}

#[tokio::test]
async fn haproxys_header_with_checksum_and_unique_id_is_accepted_and_passed_on_to_nginx() {
    let Some([nginx, haproxy, curl_program]) = installed(["nginx", "haproxy", "curl"]) else { return };
    let nginx = Peer::nginx(&nginx, TempDir::new().unwrap(), WHO).await;
    let proxy = conf_for_haproxy(nginx.address).start().await;
    let haproxy = Peer::haproxy_in_front_of(&haproxy, proxy.address("web")).await;

    let url = format!("http://{}/", haproxy.address);
    let answer = curl(&curl_program, &["-w", "%{local_ip}:%{local_port}", &url]).await.unwrap();
    let (seen, local) = answer.split_once(" 1\n").unwrap();
    assert_eq!(seen, local, "nginx sees curl's own address through two proxies");
    let log = async || proxy.log().into_iter().find(|line| line["client"] == local);
    let line = eventually("curl's line in the log", log).await;
    assert_eq!((&line["tenant"], &line["outcome"]["why"]), (&"acme".into(), &"done".into()));
    assert!(line.get("endpoint").is_none(), "{line}");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn haproxy_verifies_the_header_that_we_pass_on_and_finds_the_unique_id_in_it() {
    let Some([haproxy, curl_program]) = installed(["haproxy", "curl"]) else { return };
    let who = r#"mode http
    http-request return status 200 content-type text/plain lf-string "%[src]:%[src_port] %[fc_pp_unique_id]\n""#;
    let behind = Peer::haproxy(&haproxy, "accept-proxy", who).await;
    let proxy = conf_for_haproxy(behind.address).start().await;
    let before = Peer::haproxy_in_front_of(&haproxy, proxy.address("web")).await;

    let url = format!("http://{}/", before.address);
    let answer = curl(&curl_program, &["-w", "%{local_port}", &url]).await.unwrap();
    let (seen, port) = answer.split_once('\n').unwrap();
    let hexadecimal = format!("{:04X}", port.parse::<u16>().unwrap());
    assert_eq!(seen, format!("127.0.0.1:{port} id-7F000001:{hexadecimal}"));

    // A header with an endpoint's ID has its checksum over that too.
    let nlb = nlb(&proxy).await;
    let url = format!("http://{}/", nlb.address(0).unwrap());
    assert_eq!(curl(&curl_program, &[&*url; 2]).await.unwrap(), "10.100.0.10:40000 \n10.100.0.10:40000 \n");
    assert_eq!(nlb.connections(0), 1);
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
