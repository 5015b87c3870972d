//! A successor takes over from a running process: sockets, sessions and flows, and what either side does when the other dies.

mod midway;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use vestibule::handover::link::{HandoverLink, LinkFrame};
use vestibule::handover::message::{LinkMessage, OfferedSocket, SocketRole, VERSION};

use super::harness::{ACME, LIMIT, connect, eventually, exchange, header, is_reset, read, still_lives};
use super::process::{Serve, World, Written};

/// A configuration whose process can be taken over, and the way to it.
pub fn config(world: &World) -> (Written, PathBuf) {
    let config = world.config("");
    let control = config.beside("control");
    config.rewrite("[admin]\n", &format!("[admin]\nsocket = \"{}\"\n", control.display()));
    (config, control)
}

/// A process that can be taken over.
struct Before {
    config: Written,
    control: PathBuf,
    old: Serve,
    /// Its backends: whoever takes this apart has to hold them too.
    _world: World,
}

impl Before {
    async fn start() -> Self {
        let world = World::new().await;
        let (config, control) = config(&world);
        let old = Serve::start(&config).await;
        Self { config, control, old, _world: world }
    }
}

/// So many sessions that live.
async fn carried(serve: &Serve, count: usize) -> Vec<TcpStream> {
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(serve.carried().await);
    }
    sessions
}

/// Nothing is held any more.
async fn is_empty(serve: &Serve) {
    for gauge in
        ["vestibule_sessions_active", "vestibule_tenant_sessions", "vestibule_backend_sessions_active"]
    {
        serve.counts(gauge, &[], 0).await;
    }
}

#[tokio::test]
async fn sessions_continue_and_new_ones_are_served_during_takeover() {
    let Before { config, control, mut old, _world } = Before::start().await;
    let mut talks = old.carried().await;
    let over = exchange(old.open(ACME, b"before").await).await.unwrap();
    assert_eq!(over, b"before");
    let pending = connect(old.web).await;

    let mut new = Serve::successor(&config, &control).await;
    assert_eq!(new.web, old.web);
    new.serves().await;
    still_lives(&mut talks).await;
    // What has not said who it is stays, and moves once it has.
    let mut pending = pending;
    pending.write_all(&[&header(ACME)[..], b"late"].concat()).await.unwrap();
    assert_eq!(read(&mut pending, 4).await, b"late");
    assert_eq!(old.ended().await.code(), Some(0));
    for session in [talks, pending] {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    // One line for each session, by the process in which it ended.
    let lines = new.sessions(4).await;
    let bytes = |line: &Value| line["bytes"]["to_backend"].as_u64().unwrap();
    let mut of_acme: Vec<_> = lines.iter().filter(|line| line["tenant"] == "acme").map(bytes).collect();
    of_acme.sort_unstable();
    assert_eq!(of_acme, [4, 7, 9], "with what the old process forwarded");
    assert!(lines.iter().all(|line| line["outcome"]["why"] == "done"), "{lines:?}");
    assert_eq!(bytes(&old.sessions(1).await[0]), 6);
    is_empty(&new).await;
    new.says("took over").await;
    new.end().await;
    assert!(!control.exists(), "the last one takes its socket along");
}

#[tokio::test]
async fn successor_may_have_another_number_of_workers() {
    let Before { config, control, mut old, _world } = Before::start().await;
    let mut sessions = Vec::new();
    for (from, to) in
        [("workers = 2", "workers = 1"), ("workers = 1", "workers = 3"), ("workers = 3", "workers = 2")]
    {
        sessions.extend(carried(&old, 8).await);
        config.rewrite(from, to);
        let new = Serve::successor(&config, &control).await;
        assert_eq!(old.ended().await.code(), Some(0));
        old = new;
        for session in &mut sessions {
            still_lives(session).await;
        }
        // Each of the sockets has somebody who accepts at it.
        for _ in 0..20 {
            old.serves().await;
        }
    }
    old.has("vestibule_sessions_taken_over_total", &[], 24).await;
    for session in sessions {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    is_empty(&old).await;
    old.end().await;
}

#[tokio::test]
async fn successor_that_cannot_start_changes_nothing() {
    let Before { config, control, mut old, _world } = Before::start().await;
    let mut live = old.carried().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let more = format!(
        "[[listener]]\nname = \"more\"\nbind = \"{}\"\ntrusted-sources = [\"127.0.0.1\"]\n",
        taken.local_addr().unwrap()
    );
    for (from, to, says) in [
        ("workers = 2", "workers = \"two\"", "process: workers: must be"),
        ("[[pool]]\nname = \"acme\"", &format!("{more}[[pool]]\nname = \"acme\""), "cannot bind "),
    ] {
        config.rewrite(from, to);
        let output = config.successor(&control);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(says), "{said}");
        config.rewrite(to, from);
        still_lives(&mut live).await;
        old.serves().await;
    }
    old.has("vestibule_takeovers_total", &[("result", "failed")], 1).await;
    assert_eq!(exchange(live).await.unwrap(), b"");
    is_empty(&old).await;
    old.end().await;
}

#[tokio::test]
async fn takeover_without_a_running_process_names_the_error() {
    let world = World::new().await;
    let (config, control) = config(&world);
    let output = config.successor(&control);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot reach a running vestibule at "), "{said}");
}

/// A successor that is the test itself.
pub struct Heir {
    link: HandoverLink,
    sockets: Vec<OfferedSocket>,
}

/// Asks for the link as a successor does.
fn ask(control: &Path) -> HandoverLink {
    let mut stream = UnixStream::connect(control).unwrap();
    let request =
        "POST /takeover HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: vestibule-takeover\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    HandoverLink::new(stream, LIMIT).unwrap()
}

fn next(link: &HandoverLink) -> LinkFrame {
    link.receive().unwrap().expect("the old process says something")
}

fn hello(link: &HandoverLink, version: u32) {
    link.send(&LinkMessage::Hello { version, program: "test".to_owned() }, &[], &[]).unwrap();
}

impl Heir {
    /// Comes as far as the sockets.
    pub fn ask(control: &Path) -> Self {
        let link = ask(control);
        hello(&link, VERSION);
        let mut sockets = Vec::new();
        loop {
            let frame = next(&link);
            match frame.message {
                LinkMessage::Sockets(offered) => {
                    assert_eq!(offered.len(), frame.fds.len());
                    sockets.extend(offered);
                }
                LinkMessage::AllSockets { .. } => return Self { link, sockets },
                LinkMessage::Hello { .. }
                | LinkMessage::Refused { .. }
                | LinkMessage::Ready
                | LinkMessage::Stopped
                | LinkMessage::Parcel { .. }
                | LinkMessage::FlowsSent
                | LinkMessage::Taken { .. }
                | LinkMessage::Stays { .. }
                | LinkMessage::Done => panic!("{:?}", frame.message),
            }
        }
    }

    /// The next session, with its number. That all flows have come may be said before it: there are none.
    fn parcel(&self) -> (u32, LinkFrame) {
        loop {
            let frame = next(&self.link);
            if let LinkMessage::Parcel { id } = frame.message {
                return (id, frame);
            }
            assert_eq!(frame.message, LinkMessage::FlowsSent);
        }
    }

    /// Says that it could serve.
    pub fn ready(&self) {
        self.link.send(&LinkMessage::Ready, &[], &[]).unwrap();
        assert_eq!(next(&self.link).message, LinkMessage::Stopped);
    }
}

#[tokio::test]
async fn successor_gets_every_socket() {
    let Before { config: _config, control, mut old, _world } = Before::start().await;
    let at = control.clone();
    let sockets = spawn_blocking(move || Heir::ask(&at).sockets).await.unwrap();
    let listeners = sockets.iter().filter(
        |offered| matches!(&offered.role, SocketRole::Listener { name, udp: false, .. } if name == "web"),
    );
    assert_eq!(listeners.count(), 2, "one of each worker");
    let count =
        |is_it: fn(&SocketRole) -> bool| sockets.iter().filter(|offered| is_it(&offered.role)).count();
    assert_eq!(count(|role| matches!(role, SocketRole::Admin { .. })), 1);
    assert_eq!(count(|role| matches!(role, SocketRole::Health { .. })), 1);
    assert_eq!(count(|role| matches!(role, SocketRole::Control { has_file: true, .. })), 1);
    // It has gone without a word.
    old.says("takeover failed; this process continues").await;
    old.serves().await;
    is_empty(&old).await;
    old.end().await;
}

#[tokio::test]
async fn takeover_with_an_unknown_version_is_refused() {
    let Before { config: _config, control, mut old, _world } = Before::start().await;
    let at = control.clone();
    let said = spawn_blocking(move || {
        let link = ask(&at);
        hello(&link, VERSION + 1);
        next(&link).message
    });
    let LinkMessage::Refused { why } = said.await.unwrap() else { panic!("it is not refused") };
    assert!(why.contains("restart instead"), "{why}");
    old.serves().await;
    old.has("vestibule_takeovers_total", &[("result", "failed")], 1).await;
    old.end().await;
}

#[tokio::test]
async fn one_successor_at_a_time() {
    let Before { config, control, mut old, _world } = Before::start().await;
    let at = control.clone();
    let first = spawn_blocking(move || Heir::ask(&at)).await.unwrap();
    let output = config.successor(&control);
    assert_eq!(output.status.code(), Some(1));
    old.serves().await;
    drop(first);
    old.says("takeover failed; this process continues").await;
    let mut new = Serve::successor(&config, &control).await;
    assert_eq!(old.ended().await.code(), Some(0));
    new.serves().await;
    new.end().await;
}

#[tokio::test]
async fn successor_killed_before_it_answers_has_moved_nothing() {
    let Before { config: _config, control, mut old, _world } = Before::start().await;
    let mut sessions = carried(&old, 5).await;
    let at = control.clone();
    // It is as dead as one can be that never answers: its descriptors are closed, and the link too.
    let seen = spawn_blocking(move || {
        let heir = Heir::ask(&at);
        heir.ready();
        let (_, frame) = heir.parcel();
        assert!(!frame.fds.is_empty());
        frame.tail.len()
    });
    assert!(seen.await.unwrap() > 0);
    old.says("takeover failed; this process continues").await;
    for session in &mut sessions {
        still_lives(session).await;
    }
    old.serves().await;
    old.has("vestibule_takeovers_total", &[("result", "failed")], 1).await;
    old.has("vestibule_sessions_ended_total", &[("why", "moved")], 0).await;
    for session in sessions {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    is_empty(&old).await;
    old.end().await;
}

#[tokio::test]
async fn killed_successor_loses_only_the_sessions_it_had_taken() {
    let Before { config: _config, control, mut old, _world } = Before::start().await;
    let sessions = carried(&old, 5).await;
    let at = control.clone();
    let taken = spawn_blocking(move || {
        let heir = Heir::ask(&at);
        heir.ready();
        let (id, _) = heir.parcel();
        heir.link.send(&LinkMessage::Taken { id }, &[], &[]).unwrap();
    });
    taken.await.unwrap();
    old.says("takeover failed; this process continues").await;
    let (mut alive, mut gone) = (Vec::new(), 0);
    for mut session in sessions {
        let told = session.write_all(b"still").await.is_ok();
        if told && tokio::time::timeout(LIMIT, end_or(&mut session)).await.unwrap() {
            alive.push(session);
        } else {
            gone += 1;
        }
    }
    assert_eq!((alive.len(), gone), (4, 1));
    old.has("vestibule_sessions_ended_total", &[("why", "moved")], 1).await;
    old.serves().await;
    for session in alive {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    is_empty(&old).await;
    old.end().await;
}

/// Whether "still" comes back.
async fn end_or(session: &mut TcpStream) -> bool {
    use tokio::io::AsyncReadExt;
    let mut room = [0; 5];
    session.read_exact(&mut room).await.is_ok() && room == *b"still"
}

/// A door of the old process that a test plays; from now on it is that of the listener `web`.
fn door(config: &Written) -> TcpListener {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let web = "[[listener]]\nname = \"web\"\nbind = ";
    let bound = format!("{web}\"{}\"", door.local_addr().unwrap());
    config.rewrite(&format!("{web}\"127.0.0.1:0\""), &bound);
    door
}

/// An old process, of this number, that the test plays until its successor is ready.
fn play(listening: &UnixListener, door: &TcpListener, path: &Path, pid: i32) -> HandoverLink {
    let (mut stream, _) = listening.accept().unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        request.push(byte[0]);
    }
    stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").unwrap();
    let link = HandoverLink::new(stream, LIMIT).unwrap();
    assert!(matches!(next(&link).message, LinkMessage::Hello { .. }));
    let configured = door.local_addr().unwrap();
    let role = SocketRole::Listener { name: "web".to_owned(), udp: false, configured };
    let own = SocketRole::Control { path: path.to_owned(), has_file: true };
    let offered =
        vec![OfferedSocket { role, bound: Some(configured) }, OfferedSocket { role: own, bound: None }];
    link.send(&LinkMessage::Sockets(offered), &[], &[door.as_fd(), listening.as_fd()]).unwrap();
    link.send(&LinkMessage::AllSockets { program: "test".to_owned(), pid }, &[], &[]).unwrap();
    assert_eq!(next(&link).message, LinkMessage::Ready);
    link
}

#[tokio::test]
async fn killed_old_process_leaves_its_sockets_to_the_successor() {
    let world = World::new().await;
    let (config, control) = config(&world);
    // An old process that the test plays: with a real one nobody would know where it was.
    let door = door(&config);
    let address = door.local_addr().unwrap();
    let (listening, path) = (UnixListener::bind(&control).unwrap(), control.clone());
    let played = spawn_blocking(move || {
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        let link = play(&listening, &door, &path, i32::try_from(dead.id()).unwrap());
        // It has ended, and nobody has asked for its status: its number is still its own.
        drop((link, door, listening));
        dead.wait().unwrap();
    });
    let mut new = Serve::successor(&config, &control).await;
    played.await.unwrap();
    assert_eq!(new.web, address);
    new.says("the previous process died").await;
    new.serves().await;
    is_empty(&new).await;
    new.end().await;
}

#[tokio::test]
async fn two_signals_end_a_successor() {
    let Before { config, control, mut old, _world } = Before::start().await;
    let mut live = old.carried().await;
    let mut new = Serve::successor(&config, &control).await;
    assert_eq!(old.ended().await.code(), Some(0));
    new.signal(Signal::TERM);
    new.says("draining").await;
    new.signal(Signal::TERM);
    is_reset(&mut live).await;
    assert_eq!(new.ended().await.code(), Some(0));
    let lines = new.sessions(1).await;
    assert_eq!((&lines[0]["tenant"], &lines[0]["outcome"]["why"]), (&"acme".into(), &"drained".into()));
}

/// A process that no handle ends.
struct Orphan(rustix::process::Pid);

impl Orphan {
    fn signal(&self, signal: Signal) {
        // It may have ended already.
        rustix::process::kill_process(self.0, signal).unwrap_or_default();
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[tokio::test]
async fn signal_makes_the_process_start_its_successor() {
    let Before { config: _config, control: _control, mut old, _world } = Before::start().await;
    let mut live = old.carried().await;
    old.signal(Signal::USR2);
    let pid = i32::try_from(old.says("successor started").await["pid"].as_u64().unwrap()).unwrap();
    let heir = Orphan(rustix::process::Pid::from_raw(pid).unwrap());
    assert_eq!(old.ended().await.code(), Some(0));
    still_lives(&mut live).await;
    old.serves().await;
    old.has("vestibule_sessions_taken_over_total", &[], 1).await;
    assert_eq!(exchange(live).await.unwrap(), b"");
    is_empty(&old).await;
    heir.signal(Signal::TERM);
    old.says("draining").await;
    heir.signal(Signal::TERM);
    eventually("its end", async || std::net::TcpStream::connect(old.web).is_err().then_some(())).await;
}

#[tokio::test]
async fn takeover_signal_without_an_admin_socket_is_refused() {
    let world = World::new().await;
    let mut alone = Serve::start(&world.config("")).await;
    alone.signal(Signal::USR2);
    alone.says("SIGUSR2 is refused: a takeover needs admin.socket").await;
    alone.serves().await;
    alone.end().await;
}
