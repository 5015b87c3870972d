//! Signals at a bad time: while the process starts, while its configuration cannot be read, and as PID 1 of a container.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::spawn_blocking;

use super::control::{ask, with_socket};
use super::harness::{LIMIT, eventually, exchange, http_get, still_lives};
use super::process::{PROGRAM, Serve, World, Written, program};
use super::takeover;

/// Puts a named pipe in the place of a file: whoever opens it waits, as on a file system that does not answer.
fn stall(path: &Path) {
    fs::remove_file(path).unwrap();
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// A process that waits for its configuration, and catches this signal.
async fn waiting(config: &Written, caught: Signal) -> Child {
    let child = program(config).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    eventually("the signal to be caught", async || {
        let text = fs::read_to_string(&status).unwrap();
        let mask = text.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
        (mask >> (caught.as_raw() - 1) & 1 == 1).then_some(())
    })
    .await;
    child
}

async fn counts(serve: &Serve, name: &str, count: u32) {
    eventually(name, async || {
        let page = http_get(serve.admin, "/metrics").await;
        page.contains(&format!("\n{name} {count}\n")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn signals_while_the_configuration_is_read_leave_the_process_alive_and_reload_once() {
    let world = World::new().await;
    let config = world.config("");
    let text = fs::read_to_string(&config.path).unwrap();
    stall(&config.path);
    let child = waiting(&config, Signal::USR2).await;
    for signal in [Signal::HUP, Signal::USR2, Signal::HUP] {
        kill_process(Pid::from_child(&child), signal).unwrap();
    }
    let pipe = config.path.clone();
    let mut to = spawn_blocking(move || File::options().write(true).open(pipe).unwrap()).await.unwrap();
    // The reload finds a file.
    let beside = config.beside("file");
    fs::write(&beside, &text).unwrap();
    fs::rename(&beside, &config.path).unwrap();
    to.write_all(text.as_bytes()).unwrap();
    drop(to);
    let mut serve = Serve::at_work(child).await;
    counts(&serve, "vestibule_config_reloads_total", 1).await;
    serve.says("SIGUSR2 is refused: a takeover needs admin.socket").await;
    serve.serves().await;
    counts(&serve, "vestibule_config_reloads_total", 1).await;
    serve.end().await;
}

#[tokio::test]
async fn signal_to_end_while_the_configuration_cannot_be_read_ends_the_process() {
    for signal in [Signal::TERM, Signal::INT] {
        let config = Written::new("");
        stall(&config.path);
        let child = waiting(&config, signal).await;
        kill_process(Pid::from_child(&child), signal).unwrap();
        let child = Mutex::new(child);
        let status = eventually("the end", async || child.lock().unwrap().try_wait().unwrap()).await;
        assert_eq!(status.code(), Some(0));
    }
}

#[tokio::test]
async fn stalled_reload_keeps_neither_a_drain_nor_a_second_signal_from_ending_the_process() {
    let world = World::new().await;
    let drain = "[drain]\nnotice = \"0s\"\nquiet = \"0s\"\nidle = \"300s\"\ndeadline = \"300s\"";
    for is_cut_off in [false, true] {
        let config = world.config(drain);
        let socket = with_socket(&config);
        let mut serve = Serve::start(&config).await;
        let mut live = serve.carried().await;
        stall(&config.path);
        serve.signal(Signal::HUP);
        // Waits for the same: one reload at a time.
        let order =
            tokio::spawn(
                async move { tokio::time::timeout(LIMIT, ask(&socket, "POST", "/reload", "")).await },
            );
        // It has been opened once there is a reader: a writer that must not wait finds one.
        let pipe = config.path.clone();
        let writer = eventually("the reload to open its file", async || {
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
            rustix::fs::open(&pipe, flags, Mode::empty()).ok()
        })
        .await;
        serve.signal(Signal::TERM);
        serve.says("listeners closed").await;
        still_lives(&mut live).await;
        if is_cut_off {
            serve.signal(Signal::TERM);
        } else {
            assert_eq!(exchange(live).await.unwrap(), b"");
        }
        assert_eq!(serve.ended().await.code(), Some(0));
        order.abort();
        drop(writer);
    }
}

/// `unshare` with the program as PID 1 of a namespace, as a container runtime has it; `None` where that is not allowed.
fn as_pid_1(config: &Written) -> Option<Command> {
    let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    let is_allowed =
        Command::new("unshare").args(unshare).arg("true").output().is_ok_and(|tried| tried.status.success());
    if !is_allowed {
        eprintln!("SKIPPED: PID namespaces cannot be made here");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(unshare).arg(PROGRAM).arg("serve").arg("--config").arg(&config.path);
    Some(command)
}

#[tokio::test]
async fn process_that_is_pid_1_refuses_a_successor_that_would_end_with_it() {
    let world = World::new().await;
    let (config, control) = takeover::config(&world);
    let Some(command) = as_pid_1(&config) else { return };
    let mut serve = Serve::of(command).await;
    let mut live = serve.carried().await;
    let id = serve.child.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let proxy: i32 = children.trim().parse().unwrap();

    kill_process(Pid::from_raw(proxy).unwrap(), Signal::USR2).unwrap();
    let refused = serve.says("SIGUSR2 is refused: this process is PID 1").await;
    assert!(refused["message"].as_str().unwrap().contains("start another container"), "{refused}");

    let mut successor = Command::new("nsenter");
    successor.args(["--target", &proxy.to_string(), "--pid", "--mount", PROGRAM, "serve", "--config"]);
    successor.arg(&config.path).arg("--takeover").arg(&control);
    let output = spawn_blocking(move || successor.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--takeover: the previous process refuses: this process is PID 1"), "{said}");
    counts(&serve, "vestibule_takeovers_total{result=\"failed\"}", 1).await;
    still_lives(&mut live).await;
    serve.serves().await;

    // One outside of its namespace lives on without it.
    let mut new = Serve::successor(&config, &control).await;
    assert_eq!(serve.ended().await.code(), Some(0));
    still_lives(&mut live).await;
    new.serves().await;
    assert_eq!(exchange(live).await.unwrap(), b"");
    eventually("no session", async || {
        let page = http_get(new.admin, "/metrics").await;
        let mut active = page.lines().filter(|line| line.starts_with("vestibule_sessions_active{"));
        active.all(|line| line.ends_with(" 0")).then_some(())
    })
    .await;
    new.end().await;
}
