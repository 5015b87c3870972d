//! What else happens while a takeover is under way, and what a failed one leaves behind.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Signal, getpid};
use tokio::task::spawn_blocking;
use vestibule::takeover::message::Message;

use super::super::harness::{connect, eventually, still_lives};
use super::super::process::{Serve, World};
use super::{Before, Heir, config, play};

#[tokio::test]
async fn a_successor_whose_takeover_failed_ends_soon_and_what_waits_is_the_old_ones() {
    let world = World::new().await;
    let (config, control) = config(&world);
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = door.local_addr().unwrap();
    let web = "[[listener]]\nname = \"web\"\nbind = ";
    config.rewrite(&format!("{web}\"127.0.0.1:0\""), &format!("{web}\"{address}\""));
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
        link.send(&Message::Stopped, &[], &[]).unwrap();
        fails.recv().unwrap();
        drop(link);
        (listening, door)
    });
    let mut new = Serve::successor(&config, &control).await;
    new.serves().await;
    fail.send(()).unwrap();
    let (_listening, door) = played.await.unwrap();
    new.says("the old process lives and goes on; this one drains").await;
    new.says("draining").await;
    let waits = connect(address).await;
    assert_eq!(new.ended().await.code(), Some(0));
    let (_accepted, peer) = door.accept().unwrap();
    assert_eq!(peer, waits.local_addr().unwrap());
    assert!(control.exists(), "the old process has its socket still");
}

#[tokio::test]
async fn a_reload_that_reads_while_a_takeover_begins_is_refused() {
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
    old.says("a takeover is under way").await;
    old.says("the reload is refused; what was in force stays").await;
    drop(heir);
    old.says("the takeover failed; this process goes on").await;
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
