//! What else happens while a takeover is under way, and what a failed one leaves behind.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use rustix::process::getpid;
use tokio::task::spawn_blocking;
use vestibule::takeover::message::Message;

use super::super::harness::connect;
use super::super::process::{Serve, World};
use super::{config, play};

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
