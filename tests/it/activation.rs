//! Sockets that systemd has bound before the process began (`LISTEN_FDS`).

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use super::control::{ask, with_socket};
use super::flow::{Balancer, Echo};
use super::harness::{ACME, http};
use super::process::{DRAIN_NEVER, PROGRAM, Serve, World, Written};

/// `vestibule serve` with these two as its descriptors 3 and 4, as systemd starts it.
fn activated(config: &Written, first: impl Into<OwnedFd>, second: impl Into<OwnedFd>) -> Command {
    let mut command = Command::new("sh");
    let script = "exec 3<&0 4<&1 </dev/null >/dev/null; \
                  LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" serve --config \"$1\"";
    command.arg("-c").arg(script).arg(PROGRAM).arg(&config.path);
    command.stdin(Stdio::from(first.into())).stdout(Stdio::from(second.into())).stderr(Stdio::piped());
    command
}

fn bind(config: &Written, table: &str, address: SocketAddr) {
    config.rewrite(&format!("{table}\nbind = \"127.0.0.1:0\""), &format!("{table}\nbind = \"{address}\""));
}

#[tokio::test]
async fn activated_listener_and_admin_socket_are_used_unchanged() {
    let world = World::new().await;
    let config = world.config(DRAIN_NEVER);
    // Not to be shared: nobody else could bind it, and both workers accept from it all the same.
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    bind(&config, "name = \"web\"", web.local_addr().unwrap());
    let socket = with_socket(&config);
    let admin = UnixListener::bind(&socket).unwrap();
    let address = web.local_addr().unwrap();
    let mut serve = Serve::at_work(activated(&config, web, admin).spawn().unwrap()).await;
    assert_eq!(serve.web, address);
    let mut live = Vec::new();
    for _ in 0..40 {
        live.push(serve.carried().await);
    }
    let page = http(serve.admin, "/metrics", b"").await.1;
    for worker in 0..2 {
        let row = format!("vestibule_worker_sessions_active{{worker=\"{worker}\"}} ");
        let count = page.lines().find_map(|line| line.strip_prefix(&row)?.parse::<f64>().ok()).unwrap();
        assert!(count > 0.5, "worker {worker} has none");
    }
    serve.serves().await;
    assert_eq!(ask(&socket, "GET", "/status", "").await.0, 200);
    drop(live);
    serve.end().await;
    assert!(socket.exists(), "it is systemd's to remove");
}

#[tokio::test]
async fn datagrams_come_to_one_worker_and_the_health_check_is_answered() {
    let (world, echo) = (World::new().await, Echo::start("echo").await);
    let config = world.config(DRAIN_NEVER);
    let dns = UdpSocket::bind("127.0.0.1:0").unwrap();
    let health = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, health_at) = (dns.local_addr().unwrap(), health.local_addr().unwrap());
    bind(&config, "[health]", health_at);
    let text = std::fs::read_to_string(&config.path).unwrap();
    let more = format!(
        "[[listener]]\nname = \"dns\"\nbind = \"{at}\"\nprotocol = \"udp\"\ntrusted-sources = [\"127.0.0.1\"]\n\
         [[pool]]\nname = \"echo\"\nbackends = [\"{}\"]\n[pool.health]\nkind = \"none\"\n",
        echo.address
    );
    let routes = format!("endpoints = [\"{ACME}\"]\nroutes = {{ dns = \"echo\" }}");
    let text = text.replace(&format!("endpoints = [\"{ACME}\"]"), &routes);
    std::fs::write(&config.path, format!("{text}{more}")).unwrap();
    let mut serve = Serve::at_work(activated(&config, dns, health).spawn().unwrap()).await;
    assert_eq!(serve.health, health_at);
    assert!(http(serve.health, "/healthz", b"").await.0.starts_with("HTTP/1.1 200 "));
    for _ in 0..10 {
        let balancer = Balancer::to(at).await;
        for question in ["one", "two"] {
            let datagram = super::flow::datagram("10.0.0.1:4000", ACME, question.as_bytes());
            assert_eq!(balancer.ask(&datagram).await, format!("echo {question}").into_bytes());
        }
    }
    // Another tenant of the same process is unharmed.
    serve.serves().await;
    serve.end().await;
}

#[tokio::test]
async fn unused_activated_socket_is_an_error_that_names_it() {
    let world = World::new().await;
    let config = world.config(DRAIN_NEVER);
    let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let names = format!("TCP {}, UDP {}", tcp.local_addr().unwrap(), udp.local_addr().unwrap());
    let output = activated(&config, tcp, udp).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("addresses only, found {names}; configure these addresses")), "{said}");
    // What is no socket at all.
    let file = std::fs::File::open(&config.path).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = activated(&config, file, tcp).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("LISTEN_FDS: must pass listening sockets only, found: descriptor 3"), "{said}");
}
