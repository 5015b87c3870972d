//! What the process takes at once, and how its workers share it.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{Backend, Temper};

use super::harness::{ACME, Conf, GLOBEX, Proxy, end_of, exchange, read};

/// A session that is known to be carried.
async fn carried(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.open(ACME, b"x").await;
    assert_eq!(read(&mut stream, 1).await, b"x");
    stream
}

/// How many sessions each of the two workers has.
async fn of_workers(proxy: &Proxy) -> [f64; 2] {
    let of = async |worker| proxy.value("vestibule_worker_sessions_active", &[("worker", worker)]).await;
    [of("0").await, of("1").await]
}

#[tokio::test]
async fn the_last_session_is_taken_and_the_next_is_shed() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let conf = Conf { acme: vec![acme.address()], process: "max-sessions = 3".to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    proxy.metric("vestibule_sessions_limit", &[]).is(3).await;
    let mut sessions = vec![carried(&proxy).await, carried(&proxy).await];
    // A session is one from its first moment: without a header it takes its place too.
    let pending = proxy.connect().await;
    proxy.metric("vestibule_sessions_pending", &[]).is(1).await;
    proxy.ended(&[]).is(0).await;

    assert_eq!(end_of(&mut proxy.connect().await).await.unwrap(), 0);
    let shed = [("tenant", ""), ("by", "proxy"), ("at", "accept"), ("why", "shed")];
    proxy.ended(&shed).is(1).await;
    assert_eq!(proxy.logged("shed").await["listener"], "web");
    // Whoever is in is not touched.
    for session in &mut sessions {
        session.write_all(b"still").await.unwrap();
        assert_eq!(read(session, 5).await, b"still");
    }
    assert_eq!(acme.sessions(), 2);

    drop(pending);
    proxy.ended(&[("why", "zero_bytes")]).is(1).await;
    // The last place is not for the tenant that has all the others.
    let mut other = proxy.open(GLOBEX, b"x").await;
    assert_eq!(read(&mut other, 1).await, b"x");
    assert_eq!(end_of(&mut proxy.connect().await).await.unwrap(), 0);
    proxy.ended(&shed).is(2).await;
    for session in sessions.into_iter().chain([other]) {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("why", "done")]).is(3).await;
    proxy.metric("vestibule_sessions_active", &[]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn workers_share_what_comes_and_hand_over_what_is_too_much() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let mut sessions = [Vec::new(), Vec::new()];
    let mut before = of_workers(&proxy).await;
    while sessions[0].len() < 60 || sessions[1].len() < 20 {
        let session = carried(&proxy).await;
        let now = of_workers(&proxy).await;
        let worker = usize::from(now[1] > before[1]);
        assert!((now[worker] - before[worker] - 1.0).abs() < 0.5, "{before:?} and then {now:?}");
        sessions[worker].push(session);
        before = now;
        assert!(sessions[0].len() + sessions[1].len() < 400, "one worker gets everything");
    }
    // One worker loses all its sessions. The kernel does not know, and goes on giving half to the other.
    let [heavy, light] = sessions;
    for session in light {
        exchange(session).await.unwrap();
    }
    proxy.metric("vestibule_worker_sessions_active", &[("worker", "1")]).is(0).await;
    let handed_over =
        async |worker| proxy.value("vestibule_worker_handed_over_total", &[("worker", worker)]).await;
    let earlier = [handed_over("0").await, handed_over("1").await];
    let mut later = Vec::new();
    while handed_over("0").await - earlier[0] < 0.5 {
        later.push(carried(&proxy).await);
        assert!(later.len() < 100, "nothing is handed over");
    }
    assert!((handed_over("1").await - earlier[1]).abs() < 0.5, "the lighter one keeps what it gets");
    let now = of_workers(&proxy).await;
    assert!(now[1] > 0.5, "{now:?}");
    // Who was handed over is served as well as anybody.
    for session in heavy.into_iter().chain(later) {
        assert_eq!(exchange(session).await.unwrap(), b"");
    }
    proxy.ended(&[("by", "proxy")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn many_sessions_at_once_are_on_both_workers() {
    let acme = Backend::start("acme-1", Temper::Echo).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let mut sessions = Vec::new();
    for _ in 0..200 {
        sessions.push(carried(&proxy).await);
    }
    let [one, two] = of_workers(&proxy).await;
    assert!((one + two - 200.0).abs() < 0.5, "{one} and {two}");
    // Beyond a quarter and sixteen more, a connection is handed over: 82 is the least that one can have.
    assert!(one.min(two) > 81.5, "{one} and {two}");
    for (place, session) in sessions.iter_mut().enumerate() {
        let payload = format!("session {place}");
        session.write_all(payload.as_bytes()).await.unwrap();
        assert_eq!(read(session, payload.len()).await, payload.as_bytes());
    }
    for session in sessions {
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(200).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
