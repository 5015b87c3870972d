//! What systemd is told by a service of `Type=notify`.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use tokio::net::UnixDatagram;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::harness::{LIMIT, connect, exchange};
use super::process::{Serve, World, Written, program};
use super::takeover::{Heir, config};

/// Systemd's end.
struct Systemd {
    socket: UnixDatagram,
}

impl Systemd {
    fn at(config: &Written) -> Self {
        Self { socket: UnixDatagram::bind(config.beside("notify")).unwrap() }
    }

    /// The next message in which this stands.
    async fn hears(&self, what: &str) -> String {
        self.hears_all(&[what]).await
    }

    /// The next messages until each of these has stood in one; the last of them. Two threads tell: in which order the
    /// status comes is open.
    async fn hears_all(&self, what: &[&str]) -> String {
        self.hears_all_without(what, None).await
    }

    /// As [`hears_all`](Self::hears_all); and until then not once this.
    async fn hears_all_without(&self, what: &[&str], never: Option<&str>) -> String {
        let mut missing = what.to_vec();
        let heard = async {
            loop {
                let mut room = [0; 4096];
                let count = self.socket.recv(&mut room).await.unwrap();
                let message = String::from_utf8(room[..count].to_vec()).unwrap();
                assert!(never.is_none_or(|never| !message.contains(never)), "{message}");
                missing.retain(|what| !message.contains(what));
                if missing.is_empty() {
                    return message;
                }
            }
        };
        timeout(LIMIT, heard).await.unwrap_or_else(|_| panic!("waited in vain for one of {what:?}"))
    }
}

#[tokio::test]
async fn systemd_is_notified_of_start_reloads_and_stop() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"2s\"\nquiet = \"0s\"\nidle = \"300s\"\ndeadline = \"300s\"";
    let config = world.config(drain);
    let systemd = Systemd::at(&config);
    let mut command = program(&config);
    command.env("NOTIFY_SOCKET", config.beside("notify")).env("WATCHDOG_USEC", "400000");
    let mut serve = Serve::of(command).await;
    systemd.hears_all(&["READY=1\n", "STATUS=serving, 0 sessions\n"]).await;
    // More than once: it goes on.
    for _ in 0..3 {
        systemd.hears("WATCHDOG=1\n").await;
    }
    serve.signal(Signal::HUP);
    let reloading = systemd.hears("RELOADING=1\n").await;
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    systemd.hears("READY=1\n").await;
    let text = fs::read_to_string(&config.path).unwrap();
    fs::write(&config.path, "nonsense").unwrap();
    serve.signal(Signal::HUP);
    systemd.hears_all(&["RELOADING=1\n", "READY=1\n", "; last reload refused"]).await;
    fs::write(&config.path, text).unwrap();
    serve.signal(Signal::HUP);
    systemd.hears("STATUS=serving, 0 sessions\n").await;

    let live = serve.carried().await;
    serve.signal(Signal::TERM);
    let stopping = systemd.hears("STOPPING=1\n").await;
    assert!(stopping.contains("EXTEND_TIMEOUT_USEC="), "{stopping}");
    systemd.hears("STATUS=draining, still accepting: 1 sessions").await;
    serve.serves().await;
    let closing = systemd.hears("STATUS=draining, listeners closed: 1 sessions left").await;
    assert!(closing.contains("EXTEND_TIMEOUT_USEC="), "{closing}");
    exchange(live).await.unwrap();
    assert_eq!(serve.ended().await.code(), Some(0));
}

#[tokio::test]
async fn missing_notify_socket_does_not_stop_the_process() {
    let world = World::new().await;
    let config = world.config("[drain]\nnotice = \"0s\"\nquiet = \"0s\"");
    let mut command = program(&config);
    command.env("NOTIFY_SOCKET", config.beside("absent"));
    let mut serve = Serve::of(command).await;
    serve.says("cannot notify systemd").await;
    serve.serves().await;
    serve.signal(Signal::TERM);
    assert_eq!(serve.ended().await.code(), Some(0));
}

/// A process that can be taken over, and says so to systemd.
struct Watched {
    config: Written,
    control: PathBuf,
    systemd: Systemd,
    old: Serve,
    _world: World,
}

impl Watched {
    async fn start() -> Self {
        let world = World::new().await;
        let (config, control) = config(&world);
        let systemd = Systemd::at(&config);
        let mut command = program(&config);
        command.env("NOTIFY_SOCKET", config.beside("notify"));
        let old = Serve::of(command).await;
        Self { config, control, systemd, old, _world: world }
    }
}

#[tokio::test]
async fn successor_that_fails_late_never_becomes_the_main_process() {
    let Watched { config: _config, control, systemd, mut old, _world } = Watched::start().await;
    let pending = connect(old.web).await;
    let at = control.clone();
    let heir = spawn_blocking(move || {
        let heir = Heir::ask(&at);
        heir.ready();
        heir
    });
    let heir = heir.await.unwrap();
    old.says("sessions that cannot be handed over yet continue in this process").await;
    drop(heir);
    old.says("takeover failed; this process continues").await;
    old.serves().await;
    old.signal(Signal::TERM);
    systemd.hears_all_without(&["STOPPING=1\n"], Some("MAINPID=")).await;
    drop(pending);
    old.signal(Signal::TERM);
    assert_eq!(old.ended().await.code(), Some(0));
    assert!(!control.exists(), "it takes its socket along");
}

#[tokio::test]
async fn successor_that_took_everything_becomes_the_main_process() {
    let Watched { config, control, systemd, mut old, _world } = Watched::start().await;
    let mut new = Serve::successor(&config, &control).await;
    systemd.hears(&format!("MAINPID={}", new.child.id())).await;
    assert_eq!(old.ended().await.code(), Some(0));
    assert!(control.exists(), "it is the successor's");
    new.serves().await;
    new.end().await;
}
