//! Pools and timeouts that change in a reload: what is known by name stays known, and nobody is misrouted or dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vestibule::state::ChangeCount;

use super::super::dns::Names;
use super::super::harness::{closed_port, header, http};
use super::*;

/// Two backends that say their names.
async fn greeting(pool: &str) -> (TestBackend, TestBackend, Proxy) {
    let one = TestBackend::start("one", BackendBehavior::Greeting).await.unwrap();
    let two = TestBackend::start("two", BackendBehavior::Greeting).await.unwrap();
    let conf = Conf { acme: vec![one.address()], pool: pool.to_owned(), ..Conf::default() };
    (one, two, conf.start().await)
}

/// A session, and who answers it.
async fn answered(proxy: &Proxy) -> (TcpStream, String) {
    let mut stream = proxy.open(ACME, b"").await;
    let name = read(&mut stream, 4).await;
    (stream, String::from_utf8(name).unwrap().trim_end().to_owned())
}

#[tokio::test]
async fn replaced_backend_gets_new_sessions_and_the_old_one_keeps_its_own() {
    let (one, two, mut proxy) = greeting("").await;
    let (mut old, name) = answered(&proxy).await;
    assert_eq!(name, "one");
    let changes = proxy.reload(
        &format!("backends = [\"{}\"]", one.address()),
        &format!("backends = [\"{}\"]", two.address()),
    );
    assert_eq!(changes.unwrap().pools, ChangeCount { changed: 1, ..ChangeCount::default() });
    for _ in 0..5 {
        let (session, name) = answered(&proxy).await;
        assert_eq!(name, "two");
        exchange(session).await.unwrap();
    }
    still_lives(&mut old).await;
    let labels = [("pool", "acme"), ("backend", &*one.address().to_string())].map(|(k, v)| (k, v.to_owned()));
    let labels = labels.each_ref().map(|(key, value)| (*key, value.as_str()));
    proxy.metric("vestibule_backend_sessions_active", &labels).is(1).await;
    exchange(old).await.unwrap();
    proxy.metric("vestibule_backend_sessions_active", &labels).is(0).await;
    assert_eq!((one.sessions(), two.sessions()), (1, 5));
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn ejection_and_sessions_of_a_backend_outlive_a_pool_change() {
    let one = TestBackend::start("one", BackendBehavior::Greeting).await.unwrap();
    let (_socket, dead) = closed_port(0).unwrap();
    let pool = "balance = \"least-sessions\"\nretry-budget = 100\n\
                ejection = { consecutive-failures = 3, base-time = \"600s\" }\n";
    let conf = Conf { acme: vec![one.address(), dead], pool: pool.to_owned(), ..Conf::default() };
    let mut proxy = conf.start().await;
    let dead = dead.to_string();
    let ejected = [("pool", "acme"), ("backend", dead.as_str())];
    let mut held = Vec::new();
    while proxy.value("vestibule_backend_ejected", &ejected).await < 0.5 {
        held.push(answered(&proxy).await.0);
    }
    let count = u32::try_from(held.len()).unwrap();
    let changes =
        proxy.reload("balance = \"least-sessions\"\n", "balance = \"p2c\"\nattempts = 1\n").unwrap();
    assert_eq!(changes.pools.changed, 1);
    // With one attempt, whoever was sent to the dead one would fail.
    for _ in 0..20 {
        let (session, name) = answered(&proxy).await;
        assert_eq!(name, "one");
        exchange(session).await.unwrap();
    }
    proxy.metric("vestibule_backend_ejected", &ejected).is(1).await;
    proxy.metric("vestibule_backend_ejections_total", &ejected).is(1).await;
    let live = Arc::clone(proxy.server().live());
    let load = || live.snapshot.load().pools[0].candidates().backends()[0].load();
    eventually("the held sessions alone", async || (load() == count).then_some(())).await;
    for session in held {
        exchange(session).await.unwrap();
    }
    eventually("nobody", async || (load() == 0).then_some(())).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn health_stays_known_and_probes_of_a_pool_that_goes_end() {
    let one = TestBackend::start("one", BackendBehavior::Greeting).await.unwrap();
    let health = "kind = \"tcp\"\ninterval = \"50ms\"\ntimeout = \"50ms\"\n";
    let conf = Conf { acme: vec![one.address()], health: health.to_owned(), ..Conf::default() };
    let mut proxy = conf.start().await;
    let ready = async |proxy: &Proxy| http(proxy.server().health(), "/healthz", b"").await.1;
    eventually("ready", async || (ready(&proxy).await == "ok\n").then_some(())).await;
    let live = Arc::clone(proxy.server().live());
    let acme = || Arc::clone(&live.snapshot.load().pools[0]);
    let first = acme();
    let backends = format!("backends = [\"{}\"]\n", one.address());
    let mut text = backends.clone();
    for attempts in 1..20 {
        let next = format!("{backends}attempts = {attempts}\n");
        proxy.reload(&text, &next).unwrap();
        text = next;
        assert_eq!(ready(&proxy).await, "ok\n", "an heir is known");
        assert_eq!(acme().candidates().tier().as_str(), "healthy");
    }
    // The same probe goes on, for the new pool, and lets go of the old one.
    let (probes, second) =
        (acme().candidates().backends()[0].probes().map(|(_, count)| count).sum::<u64>(), acme());
    assert!(!Arc::ptr_eq(&first, &second) && first.is_replaced());
    let old = Arc::downgrade(&first);
    drop(first);
    eventually("the old pool to go", async || (old.strong_count() == 0).then_some(())).await;
    eventually("more probes", async || {
        let now: u64 = second.candidates().backends()[0].probes().map(|(_, count)| count).sum();
        (now > probes).then_some(())
    })
    .await;
    drop(second);
    // Another probe: the old one's task ends at once, and the new one's begins.
    proxy.reload("interval = \"50ms\"", "interval = \"60ms\"").unwrap();
    assert_eq!(acme().candidates().tier().as_str(), "healthy");
    let listed = format!(
        "[[pool]]\nname = \"acme\"\n{text}\n[pool.health]\n{}\n",
        health.replace("50ms\"\nt", "60ms\"\nt")
    );
    let last = Arc::downgrade(&acme());
    let other = listed.replace("name = \"acme\"", "name = \"other\"");
    let tenant = format!("endpoints = [\"{ACME}\"]\npool = \"acme\"");
    proxy.reload_all(&[(&listed, &other), (&tenant, &tenant.replace("\"acme\"", "\"other\""))]).unwrap();
    eventually("the pool to go", async || (last.strong_count() == 0).then_some(())).await;
    exchange(answered(&proxy).await.0).await.unwrap();
    assert_eq!(ready(&proxy).await, "ok\n", "a new pool does not make the process start again");
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

// A reload waits for the answer, and the server of these names must not wait for the reload.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_dns_name_added_by_a_reload_resolves_at_once() {
    let names = Names::start().await;
    names.host("app.example.com.", 0, &["127.0.0.1"]);
    let one = TestBackend::start("one", BackendBehavior::Greeting).await.unwrap();
    let two = TestBackend::start("two", BackendBehavior::Greeting).await.unwrap();
    let dns = format!(
        "[dns]\nservers = [\"{}\"]\nmin-ttl = \"1s\"\nmax-ttl = \"1s\"\nallow-answers = [\"127.0.0.0/8\"]",
        names.address()
    );
    let mut proxy = Conf { acme: vec![one.address()], more: dns, ..Conf::default() }.start().await;
    exchange(answered(&proxy).await.0).await.unwrap();
    let by_name = format!("backends = [\"app.example.com:{}\"]", two.address().port());
    proxy.reload(&format!("backends = [\"{}\"]", one.address()), &by_name).unwrap();
    let (session, name) = answered(&proxy).await;
    assert_eq!(name, "two", "it was looked up before");
    // From then on it is followed, over reloads too.
    let found = [("pool", "acme"), ("result", "found")];
    proxy.metric("vestibule_name_lookups_total", &found).is_at_least(1).await;
    proxy.reload(&by_name, &format!("attempts = 1\n{by_name}")).unwrap();
    exchange(answered(&proxy).await.0).await.unwrap();
    proxy.metric("vestibule_name_lookups_total", &found).is_at_least(2).await;
    exchange(session).await.unwrap();
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(3).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn session_keeps_its_timeouts_and_the_next_gets_the_new_ones() {
    let (_acme, mut proxy) = start("sessions = 9").await;
    let mut old = carried(&proxy).await;
    proxy.reload("[timeouts]\n", "[timeouts]\nidle = \"200ms\"\n").unwrap();
    let _new = carried(&proxy).await;
    proxy.ended(&[("tenant", "acme"), ("why", "idle_timeout")]).is(1).await;
    still_lives(&mut old).await;
    exchange(old).await.unwrap();
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn two_hundred_reloads_fail_and_misroute_no_session() {
    let (one, two, mut proxy) = greeting("").await;
    let address = proxy.address("web");
    let pools = format!(
        "[[pool]]\nname = \"second\"\nbackends = [\"{}\"]\nhealth = {{ kind = \"none\" }}\n[[pool]]\nname = \"globex\"",
        two.address()
    );
    proxy.reload("[[pool]]\nname = \"globex\"", &pools).unwrap();
    let held: Vec<_> = [answered(&proxy).await.0, answered(&proxy).await.0].into();
    let is_over = Arc::new(AtomicBool::new(false));
    let callers = (0..4).map(|_| {
        let is_over = Arc::clone(&is_over);
        tokio::spawn(async move {
            let mut names = std::collections::BTreeMap::<String, u32>::new();
            while !is_over.load(Ordering::Relaxed) {
                let mut stream = super::super::harness::connect(address).await;
                stream.write_all(&header(ACME)).await.unwrap();
                let answer = exchange(stream).await.unwrap();
                *names.entry(String::from_utf8(answer).unwrap()).or_default() += 1;
            }
            names
        })
    });
    let callers: Vec<_> = callers.collect();
    let (first, second) = (
        format!("endpoints = [\"{ACME}\"]\npool = \"acme\""),
        format!("endpoints = [\"{ACME}\"]\npool = \"second\""),
    );
    let (whole, part) = ("backends = [\"", "attempts = 2\nbackends = [\"");
    let own = format!("{whole}{}", one.address());
    let other = format!("{part}{}", one.address());
    for turn in 0..100 {
        // The tenant moves, and the pool that it leaves or comes to changes, too.
        let (from, to) = if turn % 2 == 0 { (&first, &second) } else { (&second, &first) };
        proxy.reload(from, to).unwrap();
        let (from, to) = if turn % 2 == 0 { (&own, &other) } else { (&other, &own) };
        proxy.reload(from, to).unwrap();
        tokio::task::yield_now().await;
    }
    is_over.store(true, Ordering::Relaxed);
    for caller in callers {
        let names = caller.await.unwrap();
        assert!(names.keys().all(|name| ["one\n", "two\n"].contains(&name.as_str())), "{names:?}");
    }
    let done = u32::try_from(one.sessions() + two.sessions()).unwrap();
    for mut session in held {
        still_lives(&mut session).await;
        exchange(session).await.unwrap();
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(done).await;
    proxy.ended(&[("tenant", "acme")]).is(done).await;
    proxy.metric("vestibule_config_reloads_total", &[]).is(201).await;
    // Nothing that was replaced is kept, once nobody holds it.
    let live = Arc::clone(proxy.server().live());
    eventually("old snapshots to go", async || (live.replaced() == 0).then_some(())).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
