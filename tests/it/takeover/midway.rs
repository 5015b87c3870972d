//! What else happens while a takeover is in progress, and what a failed one leaves behind.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Signal, getpid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use vestibule::handover::message::LinkMessage;

use super::super::harness::{ACME, GLOBEX, connect, eventually, exchange, header, is_reset, still_lives};
use super::super::process::{Serve, World, Written};
use super::{Before, Heir, carried, config, door, is_empty, play};

#[tokio::test]
async fn successor_of_a_failed_takeover_ends_and_waiting_connections_stay() {
    let world = World::new().await;
    let (config, control) = config(&world);
    let door = door(&config);
    let address = door.local_addr().unwrap();
    // One that only the successor has; and a drain that would wait for ever for a door that does not close.
    let pool = "[[pool]]\nname = \"acme\"";
    let own = "[[listener]]\nname = \"own\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1\"]\n";
    config.rewrite(pool, &format!("{own}{pool}"));
    let drain = "[drain]\nnotice = \"0s\"\nquiet = \"0s\"\nidle = \"300s\"\ndeadline = \"300s\"\n";
    config.rewrite("[health]\n", &format!("{drain}[health]\n"));

    let (listening, path) = (UnixListener::bind(&control).unwrap(), control.clone());
    let (fail, fails) = mpsc::sync_channel(1);
    let played = spawn_blocking(move || {
        let link = play(&listening, &door, &path, getpid().as_raw_nonzero().get());
        link.send(&LinkMessage::Stopped, &[], &[]).unwrap();
        fails.recv().unwrap();
        drop(link);
        (listening, door)
    });
    let mut new = Serve::successor(&config, &control).await;
    new.serves().await;
    fail.send(()).unwrap();
    let (_listening, door) = played.await.unwrap();
    new.says("the previous process continues; this one drains").await;
    new.says("draining").await;
    let waits = connect(address).await;
    assert_eq!(new.ended().await.code(), Some(0));
    let (_accepted, peer) = door.accept().unwrap();
    assert_eq!(peer, waits.local_addr().unwrap());
    assert!(control.exists(), "the old process has its socket still");
}

#[tokio::test]
async fn reload_that_reads_while_a_takeover_begins_is_refused() {
    let Before { config, control, mut old, _world } = Before::start().await;
    // Without it there would be nothing to do, and the takeover done.
    let mut live = old.carried().await;
    let text = fs::read_to_string(&config.path).unwrap();
    fs::remove_file(&config.path).unwrap();
    mknodat(CWD, &config.path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    old.signal(Signal::HUP);
    let (path, at) = (config.path.clone(), control.clone());
    let (mut file, heir) = spawn_blocking(move || {
        // It is opened once somebody reads.
        let file = fs::File::options().write(true).open(path).unwrap();
        let heir = Heir::ask(&at);
        heir.ready();
        (file, heir)
    })
    .await
    .unwrap();
    file.write_all(text.as_bytes()).unwrap();
    drop(file);
    old.says("a takeover is in progress").await;
    old.says("reload refused; the configuration in force stays").await;
    drop(heir);
    old.says("takeover failed; this process continues").await;
    still_lives(&mut live).await;
    assert!(old.log().iter().all(|line| line["message"] != "reloaded"));
    fs::remove_file(&config.path).unwrap();
    fs::write(&config.path, text).unwrap();
    // It is known a moment later that the takeover is over.
    eventually("a reload", async || {
        old.signal(Signal::HUP);
        old.log().iter().any(|line| line["message"] == "reloaded").then_some(())
    })
    .await;
    old.serves().await;
    old.end().await;
}

/// From now on acme may have two sessions.
fn limit(config: &Written) {
    let acme = format!("[[tenant]]\nname = \"acme\"\nendpoints = [\"{ACME}\"]\npool = \"acme\"\n");
    config.rewrite(&acme, &format!("{acme}limits = {{ sessions = 2 }}\n"));
}

/// A session of acme, where there is room for one.
async fn place(serve: &Serve) -> Option<TcpStream> {
    let mut session = serve.open(ACME, b"live").await;
    let mut room = [0; 4];
    session.read_exact(&mut room).await.ok().map(|_| session)
}

async fn is_full(serve: &Serve) {
    is_reset(&mut serve.open(ACME, b"one too many").await).await;
    let other = serve.open(GLOBEX, b"payload").await;
    assert_eq!(exchange(other).await.unwrap(), b"payload");
}

#[tokio::test]
async fn reserved_slots_count_for_limits_and_are_no_sessions() {
    let world = World::new().await;
    let (config, control) = config(&world);
    limit(&config);
    let door = door(&config);
    let listening = UnixListener::bind(&control).unwrap();
    let (end, ends) = mpsc::sync_channel(1);
    let at = control.clone();
    let played = spawn_blocking(move || {
        let link = play(&listening, &door, &at, getpid().as_raw_nonzero().get());
        let holding = br#"{"all":9,"tenants":[["acme",2,1],["stranger",7,0]]}"#;
        link.send(&LinkMessage::Stopped, holding, &[]).unwrap();
        ends.recv().unwrap();
        link.send(&LinkMessage::Done, &[], &[]).unwrap();
    });
    let mut new = Serve::successor(&config, &control).await;
    for _ in 0..3 {
        is_full(&new).await;
    }
    is_empty(&new).await;
    end.send(()).unwrap();
    played.await.unwrap();
    // What has not come does not come.
    let mut sessions = Vec::new();
    for _ in 0..2 {
        sessions.push(eventually("a place", async || place(&new).await).await);
    }
    is_full(&new).await;
    for mut session in sessions {
        still_lives(&mut session).await;
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    is_empty(&new).await;
    new.end().await;
}

#[tokio::test]
async fn limit_holds_across_both_processes() {
    let Before { config, control, mut old, _world } = Before::start().await;
    limit(&config);
    old.signal(Signal::HUP);
    old.says("reloaded").await;
    let mut sessions = carried(&old, 2).await;
    is_full(&old).await;
    let header = header(ACME);
    let mut late = connect(old.web).await;
    late.write_all(&header[..20]).await.unwrap();
    old.counts("vestibule_sessions_pending", &[], 1).await;

    let mut new = Serve::successor(&config, &control).await;
    is_full(&new).await;
    new.counts("vestibule_sessions_taken_over_total", &[], 2).await;
    is_full(&new).await;
    // The old process has none any more, and yet no place.
    late.write_all(&header[20..]).await.unwrap();
    is_reset(&mut late).await;
    assert_eq!(old.ended().await.code(), Some(0));
    is_full(&new).await;
    for session in &mut sessions {
        still_lives(session).await;
    }
    assert_eq!(exchange(sessions.pop().unwrap()).await.unwrap(), b"");
    sessions.push(eventually("a place", async || place(&new).await).await);
    is_full(&new).await;
    for session in sessions {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    is_empty(&new).await;
    new.end().await;
}
