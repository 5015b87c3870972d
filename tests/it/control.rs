//! The admin socket: pages, orders, who may give them, and what becomes of its file.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::harness::{ACME, GLOBEX, LIMIT, connect, eventually, exchange, http, is_reset, still_lives};
use super::process::{DRAIN_NEVER, PROGRAM, Serve, World, Written, program};

/// A process with an admin socket.
async fn start(world: &World, head: &str) -> (Serve, Written, PathBuf) {
    let config = world.config(head);
    let socket = with_socket(&config);
    (Serve::start(&config).await, config, socket)
}

pub fn with_socket(config: &Written) -> PathBuf {
    let socket = config.beside("admin.sock");
    config.rewrite("[admin]\n", &format!("[admin]\nsocket = \"{}\"\n", socket.display()));
    socket
}

/// The status and the body of an answer at the socket.
pub async fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(LIMIT, stream.read_to_string(&mut answer)).await.expect("an answer within the limit").unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// An order, and its answer.
async fn order(socket: &Path, path: &str, body: &str) -> (u16, Value) {
    let (status, body) = ask(socket, "POST", path, body).await;
    (status, serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}")))
}

#[tokio::test]
async fn admin_socket_serves_every_page_and_admin_address_refuses_commands() {
    let world = World::new().await;
    let (mut serve, _config, socket) = start(&world, DRAIN_NEVER).await;
    for path in ["/", "/metrics", "/status", "/config"] {
        let (status, body) = ask(&socket, "GET", path, "").await;
        assert_eq!(status, 200, "{path}");
        assert!(!body.is_empty(), "{path}");
        assert!(http(serve.admin, path, b"").await.0.starts_with("HTTP/1.1 200 "), "{path}");
    }
    assert_eq!(ask(&socket, "GET", "/absent", "").await.0, 404);
    for path in ["/reload", "/drain", "/weight"] {
        let (status, body) = ask(&socket, "GET", path, "").await;
        assert!(status == 405 && body.contains("use POST, found GET"), "{path}: {status} {body}");
        // Over the network nothing is changed, and who tries is told where it is.
        let mut stream = connect(serve.admin).await;
        let request =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(answer.contains(&format!("curl --unix-socket {} -X POST", socket.display())), "{answer}");
    }
    serve.has("vestibule_draining", &[], 0).await;
    serve.has("vestibule_config_reloads_total", &[], 0).await;
    serve.serves().await;
    serve.end().await;
}

#[tokio::test]
async fn reload_answers_with_the_active_configuration_or_all_errors() {
    let world = World::new().await;
    let (mut serve, config, socket) = start(&world, DRAIN_NEVER).await;
    let live = serve.carried().await;
    let (status, answer) = order(&socket, "/reload", "").await;
    assert_eq!((status, answer), (200, json!({"listeners": 1, "pools": 2, "tenants": 2})));

    config.rewrite("pool = \"globex\"\n", "pool = \"globex\"\n[tenant.limits]\nsessions = 0\nfrows = 1\n");
    let (status, answer) = order(&socket, "/reload", "").await;
    assert_eq!(status, 409);
    let faults = answer["faults"].as_array().unwrap();
    assert_eq!(faults.len(), 2, "{answer}");
    for (fault, key) in faults.iter().zip(["limits.sessions: must be", "limits.frows: unknown key"]) {
        assert_eq!(fault["file"], config.path.to_str().unwrap());
        assert!(
            fault["line"].as_u64().unwrap() > 20 && fault["text"].as_str().unwrap().contains(key),
            "{fault}"
        );
    }
    serve.has("vestibule_config_last_reload_successful", &[], 0).await;

    config.rewrite("sessions = 0\nfrows = 1\n", "sessions = 9\n");
    config.rewrite("workers = 2", "workers = 3");
    let (status, answer) = order(&socket, "/reload", "").await;
    assert_eq!(status, 409);
    assert!(answer["faults"][0]["text"].as_str().unwrap().starts_with("[process] changed: "), "{answer}");
    config.rewrite("workers = 3", "workers = 2");
    assert_eq!(order(&socket, "/reload", "").await.0, 200);
    serve.has("vestibule_config_rejected_total", &[], 2).await;
    let (_, shown) = ask(&socket, "GET", "/config", "").await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["config"]["tenants"][1]["limits"]["sessions"], 9, "{shown}");
    assert_eq!(shown["routes"][0], json!({"listener": "web", "tenant": "acme", "pool": "acme", "now": 1}));

    assert_eq!(exchange(live).await.unwrap(), b"");
    serve.serves().await;
    serve.end().await;
}

#[tokio::test]
async fn weight_request_sets_the_weight_and_a_wrong_one_is_refused() {
    let world = World::new().await;
    let (mut serve, _config, socket) = start(&world, DRAIN_NEVER).await;
    let address = world.acme.address();
    let weight = |weight: u32| json!({"pool": "acme", "backend": address, "weight": weight}).to_string();
    let (status, answer) = order(&socket, "/weight", &weight(0)).await;
    let weighed = json!({"pool": "acme", "backend": address, "from": 100, "to": 0, "usable": 0});
    assert_eq!((status, answer), (200, weighed));
    is_reset(&mut serve.open(ACME, b"x").await).await;
    assert_eq!(exchange(serve.open(GLOBEX, b"unharmed").await).await.unwrap(), b"unharmed");
    let labels = format!("vestibule_backend_weight{{pool=\"acme\",backend=\"{address}\"}}");
    let page = super::harness::http_get(serve.admin, "/metrics").await;
    let sorted = format!("vestibule_backend_weight{{backend=\"{address}\",pool=\"acme\"}} 0");
    assert!(page.contains(&format!("{labels} 0")) || page.contains(&sorted));
    // It outlives a reload that does not change the backend.
    assert_eq!(order(&socket, "/reload", "").await.0, 200);
    is_reset(&mut serve.open(ACME, b"x").await).await;
    let query = format!("/weight?pool=acme&backend={address}&weight=1000");
    let (status, answer) = order(&socket, &query, "").await;
    assert_eq!(
        (status, &answer["from"], &answer["to"], &answer["usable"]),
        (200, &json!(0), &json!(1000), &json!(1))
    );
    serve.serves().await;

    for (status, body, said) in [
        (400, weight(1001), "weight (0 to 1000)"),
        (400, "{}".to_owned(), "missing field `pool`"),
        (400, weight(1).replace('}', ",\"more\":1}"), "unknown field `more`"),
        (
            404,
            weight(1).replace("\"acme\"", "\"absent\""),
            "pool: must be a configured pool, found \"absent\"",
        ),
        (
            404,
            weight(1).replace(&address.to_string(), "10.0.0.1:1"),
            "must be the address of a backend of pool \"acme\"",
        ),
    ] {
        let (found, answer) = order(&socket, "/weight", &body).await;
        assert_eq!(found, status, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(said), "{body}: {answer}");
    }
    assert_eq!(ask(&socket, "POST", "/weight", &" ".repeat(5000)).await.0, 413);
    serve.end().await;
}

#[tokio::test]
async fn drain_request_acts_like_the_signal_and_reports_progress() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"6s\"\nquiet = \"100ms\"\nidle = \"300s\"\ndeadline = \"300s\"";
    let (mut serve, _config, socket) = start(&world, drain).await;
    serve.has("vestibule_drain_stage", &[("stage", "serving")], 1).await;
    serve.has("vestibule_drain_stage", &[("stage", "notice")], 0).await;
    let mut live = serve.carried().await;
    assert_eq!(order(&socket, "/drain", "").await, (200, json!({"draining": true})));
    serve.counts("vestibule_drain_stage", &[("stage", "notice")], 1).await;
    serve.has("vestibule_drain_sessions_left", &[], 1).await;
    let status = async || {
        let (_, page) = http(serve.admin, "/status", b"").await;
        serde_json::from_str::<Value>(&page).unwrap()["drain"].clone()
    };
    let shown = status().await;
    assert_eq!((&shown["stage"], &shown["sessions_left"]), (&json!("notice"), &json!(1)));
    assert!(shown["seconds_to_deadline"].as_u64().unwrap() > 200, "{shown}");
    // Who stops a process by both must not cut off what drains: this is the first signal, not the second.
    serve.signal(Signal::TERM);
    serve.serves().await;
    let still = serve.says("still draining").await;
    assert_eq!((&still["stage"], &still["sessions_left"]), (&json!("notice"), &json!(1)));
    serve.says("listeners closed").await;
    serve.counts("vestibule_drain_stage", &[("stage", "closing")], 1).await;
    assert_eq!(status().await["stage"], "closing");
    still_lives(&mut live).await;
    assert_eq!(exchange(live).await.unwrap(), b"");
    assert_eq!(serve.ended().await.code(), Some(0));
    assert!(!socket.exists(), "the socket goes with its process");
    serve.says("drained").await;
}

#[tokio::test]
async fn drain_command_without_a_signal_ends_the_process() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"0s\"\nquiet = \"0s\"";
    let (mut serve, _config, socket) = start(&world, drain).await;
    serve.serves().await;
    assert_eq!(order(&socket, "/drain", "").await.0, 200);
    assert_eq!(serve.ended().await.code(), Some(0));
}

#[tokio::test]
async fn admin_socket_of_a_dead_process_is_replaced_and_of_a_live_one_is_not() {
    let world = World::new().await;
    let (mut first, config, socket) = start(&world, DRAIN_NEVER).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&socket), 0o600);
    let second = config.run("serve");
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("the socket of a running process") && said.contains("--takeover"), "{said}");
    first.serves().await;
    assert_eq!(ask(&socket, "GET", "/status", "").await.0, 200);

    kill_process(Pid::from_child(&first.child), Signal::KILL).unwrap();
    first.ended().await;
    assert!(socket.exists());
    let mut third = Serve::start(&config).await;
    third.says("replaced the admin socket of a process that no longer runs").await;
    assert_eq!((ask(&socket, "GET", "/status", "").await.0, mode(&socket)), (200, 0o600));
    third.end().await;
    assert!(!socket.exists());
}

#[tokio::test]
async fn connection_beyond_the_limit_displaces_the_longest_silent() {
    const PLACES: usize = 32;
    let world = World::new().await;
    let (mut serve, _config, socket) = start(&world, DRAIN_NEVER).await;
    let mut silent = Vec::new();
    for _ in 0..2 * PLACES {
        silent.push(UnixStream::connect(&socket).await.unwrap());
    }
    let mut half = Vec::new();
    for _ in 0..2 * PLACES {
        let mut stream = connect(serve.admin).await;
        // It may have been closed already, for a later one.
        stream.write_all(b"GET /").await.unwrap_or_default();
        half.push(stream);
    }
    serve.serves().await;
    assert!(http(serve.admin, "/status", b"").await.0.starts_with("HTTP/1.1 200 "));
    assert_eq!(ask(&socket, "GET", "/status", "").await.0, 200);
    let first = timeout(LIMIT, silent[0].read(&mut [0])).await.expect("the end of the first");
    assert_eq!(first.unwrap_or(0), 0);
    for endpoint in ["admin", "admin_socket"] {
        let displaced = [("endpoint", endpoint), ("result", "displaced")];
        eventually("a connection to give way", async || {
            (serve.value("vestibule_admin_connections_total", &displaced).await >= 1.0).then_some(())
        })
        .await;
    }
    drop((silent, half));
    serve.end().await;
}

#[tokio::test]
async fn command_from_a_web_page_is_refused_and_the_socket_accepts_any_host() {
    let world = World::new().await;
    let (mut serve, _config, socket) = start(&world, DRAIN_NEVER).await;
    for (path, headers, status) in [
        ("/drain", "host: admin\r\norigin: http://evil.example\r\n", "403"),
        ("/reload", "host: evil.example\r\norigin: http://evil.example\r\n", "403"),
        ("/drain", "host: admin\r\norigin: null\r\n", "403"),
        ("/reload", "host: any.name\r\n", "200"),
    ] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        let request =
            format!("POST {path} HTTP/1.1\r\n{headers}connection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers}: {answer}");
        assert!(status == "200" || answer.contains("found an Origin header"), "{answer}");
    }
    serve.counts("vestibule_draining", &[], 0).await;
    serve.counts("vestibule_config_reloads_total", &[], 1).await;
    serve.serves().await;
    serve.end().await;
}

/// `vestibule serve` as nobody, who has no capability; `None` where this is not to be tried, which is said.
async fn as_nobody(config: &Written) -> Option<Serve> {
    let tried = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", PROGRAM, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !tried.is_ok_and(|status| status.success()) {
        assert!(
            std::env::var_os("VESTIBULE_REQUIRE_PEERS").is_none(),
            "setpriv, or the right to use it, is required"
        );
        eprintln!("not tried: setpriv to an ordinary user");
        return None;
    }
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--inh-caps=-all",
        "--no-new-privs",
    ]);
    let serve = program(config);
    command.arg(serve.get_program()).args(serve.get_args());
    Some(Serve::of(command).await)
}

#[tokio::test]
async fn ordinary_user_can_run_the_process() {
    let world = World::new().await;
    let config = world.config(DRAIN_NEVER);
    let socket = with_socket(&config);
    // The folder is that user's, as systemd's RuntimeDirectory= makes it.
    let open = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    open(socket.parent().unwrap(), 0o777);
    open(&config.path, 0o644);
    let Some(mut serve) = as_nobody(&config).await else { return };
    serve.serves().await;
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&socket).unwrap());
    assert_eq!(owner, 65534);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(order(&socket, "/reload", "").await.0, 200);
    serve.end().await;
    assert!(!socket.exists());
}
