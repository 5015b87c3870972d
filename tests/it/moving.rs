//! Live sessions go from one process to another and back: not a byte is lost or doubled, and nobody notices.

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use vestibule::frozen::TransferReply;
use vestibule::handover::records::PendingTransfer;

use super::ferry::{Habit, Living, move_all, next, refuse};
use super::harness::{ACME, Conf, LIMIT, Proxy, are_read, end_of, eventually, is_reset, read};
use super::raw::{Bytes, Raw, ping_pong};
use super::sessions::{is_turned_away, umbrella, with};

const ENDED: &str = "vestibule_sessions_ended_total";
const TAKEN: &str = "vestibule_sessions_taken_over_total";
const MOVED: [(&str, &str); 4] = [("tenant", "acme"), ("by", "proxy"), ("at", "forward"), ("why", "moved")];

/// Two proxies with the same backend.
async fn two(raw: &Raw, conf: fn() -> Conf) -> [Proxy; 2] {
    [raw.proxy(conf()).await, raw.proxy(conf()).await]
}

/// What is told in a parcel.
fn told(leaving: &PendingTransfer) -> Value {
    let line = leaving.transfer.record.split(|byte| *byte == b'\n').next().unwrap();
    serde_json::from_slice::<Value>(line).unwrap()["told"].take()
}

/// Neither proxy holds anything any more, and the other tenant never noticed; their logs.
async fn finish(proxies: [Proxy; 2]) -> [Vec<Value>; 2] {
    let [one, two] = proxies;
    for proxy in [&one, &two] {
        proxy.others_are_unharmed().await;
    }
    [one.finish_with_log().await, two.finish_with_log().await]
}

/// The lines of acme's sessions.
fn acmes(log: &[Value]) -> Vec<&Value> {
    log.iter().filter(|line| line["tenant"] == "acme").collect()
}

async fn alive(client: &mut TcpStream, backend: &mut TcpStream) {
    ping_pong(client, backend, &mut fastrand::Rng::with_seed(1)).await;
}

#[tokio::test]
async fn sessions_of_every_kind_go_there_and_back_twenty_times() {
    let raw = Raw::bind().await;
    let [one, other] = two(&raw, Conf::default).await;
    let habits = [
        [Habit::Silent, Habit::Silent],
        [Habit::Chats, Habit::Chats],
        [Habit::Floods, Habit::Floods],
        [Habit::Floods, Habit::Chats],
        [Habit::EndsAtOnce, Habit::Floods],
        [Habit::Floods, Habit::EndsAtOnce],
        [Habit::EndsAtOnce, Habit::Silent],
        [Habit::Silent, Habit::EndsAtOnce],
    ];
    let mut living = Vec::new();
    for (seed, habits) in (1..).step_by(2).zip(habits) {
        living.push(Living::start(raw.session(&one).await, habits, seed));
    }
    for _ in 0..10 {
        move_all(&one, &other, |_| ()).await;
        move_all(&other, &one, |_| ()).await;
    }
    let mut counts = Vec::new();
    for session in living {
        let [to_backend, to_client] = session.finish().await;
        counts.push((to_backend, to_client));
    }
    for proxy in [&one, &other] {
        proxy.metric(ENDED, &MOVED).is(80).await;
        proxy.metric(TAKEN, &[("listener", "web")]).is(80).await;
    }
    let [log, others_log] = finish([one, other]).await;
    assert!(acmes(&others_log).is_empty(), "each has one line, where it ends");
    let bytes = |line: &Value| line["bytes"]["to_backend"].as_u64().zip(line["bytes"]["to_client"].as_u64());
    let mut logged: Vec<_> = acmes(&log).into_iter().map(|line| bytes(line).unwrap()).collect();
    logged.sort_unstable();
    counts.sort_unstable();
    assert_eq!(logged, counts);
    for line in acmes(&log) {
        assert_eq!((&line["outcome"]["why"], &line["attempts"]), (&"done".into(), &1.into()));
        assert_eq!(line["endpoint"], ACME);
        assert_eq!((&line["client"], &line["labels"]["plan"]), (&"10.100.0.10:40000".into(), &"gold".into()));
        assert!(line["connect_ms"].is_number() && line["total_ms"].as_f64().unwrap() > 100.0);
    }
}

/// Has the backend of a session send until nothing goes on; how much it sent.
async fn clog(backend: &mut TcpStream) -> u64 {
    const PATIENCE: std::time::Duration = std::time::Duration::from_millis(500);
    let (mut bytes, mut sent) = (Bytes::new(3), 0);
    loop {
        let mut message = std::io::Cursor::new(vec![0; 64 * 1024]);
        bytes.send(&mut message, 64 * 1024).await.unwrap();
        // A part of the last one may be sent when the time is up.
        let mut rest = &message.get_ref()[..];
        while !rest.is_empty() {
            let Ok(count) = timeout(PATIENCE, backend.write(rest)).await else { return sent };
            let count = count.unwrap();
            sent += count as u64;
            rest = &rest[count..];
        }
    }
}

/// A session whose client reads nothing has bytes held in `what`, goes with them, and loses none.
async fn held(conf: fn() -> Conf, what: &str, descriptors: usize) {
    let raw = Raw::bind().await;
    let [one, other] = two(&raw, conf).await;
    let (mut client, mut backend) = raw.session(&one).await;
    let sent = clog(&mut backend).await;
    let mut found = 0;
    for (from, to) in [(&one, &other), (&other, &one), (&one, &other)] {
        move_all(from, to, |leaving| {
            found = told(leaving)["relay"]["to_client"][what].as_u64().unwrap_or(0);
            assert_eq!(leaving.transfer.fds.len(), descriptors);
        })
        .await;
        assert!(found > 0, "nothing is held in its {what}");
    }
    let held = other.value("vestibule_pipes_in_use", &[]).await;
    assert_eq!(held > 0.5, what == "pipe");
    let mut bytes = Bytes::new(3);
    bytes.receive(&mut client, sent).await.unwrap();
    alive(&mut client, &mut backend).await;
    drop((client, backend));
    other.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(1).await;
    finish([one, other]).await;
}

#[tokio::test]
async fn bytes_in_a_pipe_are_transferred() {
    held(Conf::default, "pipe", 4).await;
}

#[tokio::test]
async fn buffered_bytes_are_transferred() {
    let conf = || Conf { process: "pipe-memory = \"0B\"".to_owned(), ..Conf::default() };
    held(conf, "spill", 2).await;
}

#[tokio::test]
async fn session_waiting_for_bandwidth_is_transferred_and_waits_on() {
    let raw = Raw::bind().await;
    let conf = || {
        let limits = "to-client = \"4MB/s\"\nto-backend = \"4MB/s\"".to_owned();
        Conf { limits, ..Conf::default() }
    };
    let [one, other] = two(&raw, conf).await;
    let mut living = Vec::new();
    for seed in [1, 3, 5] {
        living.push(Living::start(raw.session(&one).await, [Habit::Floods, Habit::Floods], seed));
    }
    let mut were_moved = 0;
    for _ in 0..10 {
        let waits = |proxy: &Proxy| {
            let snapshot = proxy.server().live().snapshot.load();
            let quota = &snapshot.directory.tenants()[0].quota;
            vestibule::account::Direction::ALL.iter().map(|way| quota.budget(*way).waiters()).sum::<u64>()
        };
        eventually("somebody to wait", async || (waits(&one) > 0).then_some(())).await;
        // A session that was handed over is counted once a worker has taken it.
        move_all(&one, &other, |_| were_moved += 1).await;
        assert_eq!(waits(&one), 0);
        other.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(3).await;
        move_all(&other, &one, |_| were_moved += 1).await;
        assert_eq!(waits(&other), 0);
        one.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(3).await;
    }
    assert_eq!(were_moved, 60);
    for session in living {
        session.finish().await;
    }
    for proxy in [&one, &other] {
        proxy.metric("vestibule_tenant_waiting", &[]).is(0).await;
        proxy.metric("vestibule_tenant_held_bytes", &[]).is(0).await;
    }
    finish([one, other]).await;
}

#[tokio::test]
async fn refused_session_continues_in_its_process() {
    let raw = Raw::bind().await;
    let one = raw.proxy(Conf::default()).await;
    let mut living = Vec::new();
    let habits = [Habit::Silent, Habit::Chats, Habit::Floods, Habit::EndsAtOnce];
    for (seed, habit) in (1..).step_by(2).zip(habits) {
        living.push(Living::start(raw.session(&one).await, [habit, Habit::Floods], seed));
    }
    for _ in 0..20 {
        refuse(&one, habits.len()).await;
    }
    for session in living {
        session.finish().await;
    }
    one.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(4).await;
    one.metric(ENDED, &MOVED).is(0).await;
    one.others_are_unharmed().await;
    one.finish().await;
}

#[tokio::test]
async fn transfer_of_an_unknown_version_is_refused() {
    let raw = Raw::bind().await;
    let [one, other] = two(&raw, Conf::default).await;
    let (mut client, mut backend) = raw.session(&one).await;
    alive(&mut client, &mut backend).await;
    let changes: [fn(&mut PendingTransfer); 4] = [
        |leaving| {
            let text = String::from_utf8(leaving.transfer.record.clone()).unwrap();
            leaving.transfer.record = text.replacen("\"version\":1", "\"version\":2", 1).into_bytes();
        },
        |leaving| leaving.transfer.record.extend_from_slice(b"more"),
        |leaving| drop(leaving.transfer.fds.pop()),
        |leaving| leaving.transfer.record.clear(),
    ];
    for change in changes {
        let mut leaving = one.server().start_transfer().await;
        let mut transfer = timeout(LIMIT, next(&mut leaving)).await.unwrap().unwrap();
        change(&mut transfer);
        other.server().accept_transfer(transfer).await;
        alive(&mut client, &mut backend).await;
        one.server().stop_transfer().await;
    }
    other.metric(TAKEN, &[]).is(0).await;
    one.metric("vestibule_sessions_active", &[]).is(1).await;
    drop((client, backend));
    one.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(1).await;
    finish([one, other]).await;
}

#[tokio::test]
async fn probes_in_progress_continue_while_no_lane_is_free() {
    const SESSIONS: usize = 70;
    let raw = Raw::bind().await;
    let one = raw.proxy(Conf::default()).await;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(raw.session(&one).await);
    }
    let leaving = one.server().start_transfer().await;
    // As many as the channel has room for stand still; the last to come find none.
    eventually("the channel to be full", async || (leaving.waiting() == 64).then_some(())).await;
    for (client, _) in &mut sessions {
        client.write_all(b"hello").await.unwrap();
    }
    let passed = || sessions.iter().filter(|(_, backend)| backend.try_read(&mut [0; 5]).is_ok()).count();
    let mut answered = 0;
    while answered < SESSIONS - 64 {
        tokio::task::yield_now().await;
        answered += passed();
    }
    one.metric("vestibule_forwarded_bytes_total", &[("direction", "to_backend")]).is(30).await;
    assert_eq!(passed(), 0, "who stands still passes nothing on");
    drop(leaving);
    one.server().stop_transfer().await;
    while answered < SESSIONS {
        tokio::task::yield_now().await;
        answered += passed();
    }
    drop(sessions);
    one.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(70).await;
    one.others_are_unharmed().await;
    one.finish().await;
}

#[tokio::test]
async fn session_reading_its_header_is_transferred_once_it_forwards() {
    let raw = Raw::bind().await;
    let [one, other] = two(&raw, Conf::default).await;
    let mut client = one.connect().await;
    let header = super::harness::header(ACME);
    client.write_all(&header[..20]).await.unwrap();
    one.metric("vestibule_sessions_pending", &[]).is(1).await;
    let ((), mut backend) = tokio::join!(move_all(&one, &other, |_| ()), async {
        client.write_all(&header[20..]).await.unwrap();
        client.write_all(b"first").await.unwrap();
        raw.accept().await
    });
    assert_eq!(read(&mut backend, 5).await, b"first");
    alive(&mut client, &mut backend).await;
    drop((client, backend));
    other.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(1).await;
    finish([one, other]).await;
}

#[tokio::test]
async fn repeated_transfers_do_not_reset_the_idle_time() {
    let raw = Raw::bind().await;
    let conf = || Conf { timeouts: "idle = \"2s\"".to_owned(), ..Conf::default() };
    let [one, other] = two(&raw, conf).await;
    let (mut client, _backend) = raw.session(&one).await;
    let mut moves = 0;
    // Were its silence to begin anew each time, this would have no end.
    let ended = async |proxy: &Proxy| proxy.value(ENDED, &[("why", "idle_timeout")]).await > 0.5;
    timeout(LIMIT, async {
        while !ended(&one).await && !ended(&other).await {
            move_all(&one, &other, |_| moves += 1).await;
            move_all(&other, &one, |_| moves += 1).await;
        }
    })
    .await
    .expect("its end");
    assert!(moves > 1, "it never moved");
    assert_eq!(end_of(&mut client).await.unwrap(), 0);
    finish([one, other]).await;
}

#[tokio::test]
async fn transferred_sessions_of_removed_objects_continue_and_limits_admit_them() {
    let raw = Raw::bind().await;
    let one = raw.proxy(Conf::default()).await;
    let strict = Conf {
        limits: "sessions = 1".to_owned(),
        pool: "balance = \"least-sessions\"".to_owned(),
        ..Conf::default()
    };
    // The same tenant with a limit; and a process that knows neither its backend nor its pool nor the tenant itself.
    let limited = raw.proxy(strict).await;
    let elsewhere = Raw::bind().await;
    let stranger = elsewhere.proxy(Conf::default()).await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        sessions.push(raw.session(&one).await);
    }
    move_all(&one, &limited, |_| ()).await;
    limited.metric("vestibule_tenant_sessions", &[("tenant", "acme")]).is(3).await;
    let backend = [("pool", "acme"), ("backend", &raw.address().to_string())];
    limited.metric("vestibule_backend_sessions_active", &backend).is(3).await;
    assert_eq!(limited.server().live().snapshot.load().pools[0].candidates().backends()[0].load(), 3);
    is_reset(&mut limited.open(ACME, b"one too many").await).await;
    move_all(&limited, &stranger, |leaving| {
        let bytes = String::from_utf8(leaving.transfer.record.clone()).unwrap();
        assert!(bytes.contains("\"pool\":\"acme\""));
    })
    .await;
    stranger.metric("vestibule_backend_sessions_active", &backend).is(3).await;
    for (client, backend) in &mut sessions {
        alive(client, backend).await;
    }
    drop(sessions);
    stranger.metric(ENDED, &[("tenant", "acme"), ("pool", "acme"), ("why", "done")]).is(3).await;
    for proxy in [one, limited, stranger] {
        proxy.others_are_unharmed().await;
        proxy.finish().await;
    }
}

#[tokio::test]
async fn ending_process_does_not_affect_transferred_sessions() {
    let raw = Raw::bind().await;
    let [mut one, other] = two(&raw, Conf::default).await;
    let (mut client, mut backend) = raw.session(&one).await;
    let (mut stays, _kept) = raw.session(&one).await;
    alive(&mut client, &mut backend).await;
    let mut leaving = one.server().start_transfer().await;
    let (first, second) = (next(&mut leaving).await.unwrap(), next(&mut leaving).await.unwrap());
    let client_port = |leaving: &PendingTransfer| told(leaving)["peer"].as_str().unwrap().to_owned();
    let is_first = client_port(&first) == client.local_addr().unwrap().to_string();
    let (goes, unanswered) = if is_first { (first, second) } else { (second, first) };
    // One is taken, and of the other nobody says anything before the process is over.
    other.server().accept_transfer(goes).await;
    one.metric(ENDED, &MOVED).is(1).await;
    one.end().await;
    assert_eq!(unanswered.answer.send(TransferReply::Taken), Err(TransferReply::Taken));
    drop(unanswered.transfer);
    // It is not reset: somebody else might have held it.
    assert_eq!(end_of(&mut stays).await.unwrap(), 0);
    alive(&mut client, &mut backend).await;
    are_read([&client, &backend]).await;
    drop((client, backend));
    other.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(1).await;
    other.others_are_unharmed().await;
    other.finish().await;
}

#[tokio::test]
async fn session_that_is_taken_over_counts_for_its_tenant_in_a_shared_pool() {
    let raw = Raw::bind().await;
    let conf = || Conf {
        backends: vec![with(raw.address(), "max-sessions = 10")],
        more: umbrella(),
        ..Conf::default()
    };
    let [one, other] = [conf().start().await, conf().start().await];
    let mut held = Vec::new();
    for _ in 0..7 {
        held.push(raw.session(&one).await);
    }
    move_all(&one, &other, |_| ()).await;
    // A worker may accept a new session before it has begun with one that was sent to it.
    other.metric("vestibule_sessions_active", &[("tenant", "acme")]).is(7).await;
    is_turned_away(&other).await;
    other.ended(&[("tenant", "acme"), ("at", "pool"), ("why", "pool_share")]).is(1).await;
    // What has left counts there no more.
    held.push(raw.session(&one).await);
    drop(held);
    other.metric(ENDED, &[("tenant", "acme"), ("why", "done")]).is(7).await;
    finish([one, other]).await;
}
