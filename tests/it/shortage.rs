//! A process that runs out of descriptors, or whose log nobody reads, goes on.

use std::fs::File;
use std::io;

use rustix::fs::{FileType, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::harness::{ACME, GLOBEX, LIMIT, connect, eventually, exchange, http_get, read};
use super::process::{Serve, World, Written, lines_of, sum};

/// Lines so long that a few hundred fill the queue to the log's writer.
fn long_lines(config: &Written) {
    let labels = format!("[[tenant]]\nlabels = {{ note = \"{}\" }}", "x".repeat(20_000));
    config.rewrite("[[tenant]]", &labels);
}

#[tokio::test]
async fn accepting_pauses_without_descriptors_and_continues_with_them() {
    let world = World::new().await;
    let mut serve = Serve::limited(&world.config("max-sessions = 500"), 312).await;
    let warning = serve.says("max-sessions exceeds the file-descriptor limit").await;
    assert_eq!((&warning["level"], &warning["max_sessions"]), (&"WARN".into(), &500.into()));
    assert!(warning["possible"].as_u64().unwrap() < 60, "{warning}");
    let mut live = serve.carried().await;

    // More sessions than descriptors; those that are not accepted wait in the kernel.
    let mut flood = Vec::new();
    for _ in 0..400 {
        flood.push(serve.open(ACME, b"x").await);
    }
    let paused = serve.says("accepting pauses").await;
    assert_eq!((&paused["level"], &paused["listener"]), (&"WARN".into(), &"web".into()));
    live.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut live, 5).await, b"still");

    drop(flood);
    for endpoint in [ACME, GLOBEX] {
        eventually("a new session", async || {
            let answer = exchange(serve.open(endpoint, b"payload").await).await;
            (answer.ok()? == b"payload").then_some(())
        })
        .await;
    }
    assert_eq!(exchange(live).await.unwrap(), b"");
    eventually("all sessions to have ended", async || {
        let page = http_get(serve.admin, "/metrics").await;
        let shortages = sum(&page, "vestibule_accept_errors_total", &[("class", "shortage")]);
        assert!(shortages > 0.5, "{page}");
        assert!(sum(&page, "vestibule_accept_errors_total", &[("class", "fatal")]) < 0.5, "{page}");
        let accepted = sum(&page, "vestibule_connections_accepted_total", &[]);
        let ended = sum(&page, "vestibule_sessions_ended_total", &[]);
        let active = sum(&page, "vestibule_sessions_active", &[]);
        (accepted > 402.5 && (accepted - ended).abs() < 0.5 && active < 0.5).then_some(())
    })
    .await;
    serve.end().await;
}

#[tokio::test]
async fn session_without_a_backend_descriptor_is_reset_with_its_reason() {
    let world = World::new().await;
    let mut serve = Serve::limited(&world.config("max-sessions = 500"), 312).await;
    // One descriptor more or less decides whether the last is short at accept or at connect: where accepting pauses,
    // one of these is given back, until there is one to accept with and none to connect with.
    let mut idle = Vec::new();
    for _ in 0..8 {
        idle.push(connect(serve.web).await);
    }
    let mut live = Vec::new();
    let refused = loop {
        let mut stream = serve.open(ACME, b"x").await;
        let mut byte = [0];
        let first = tokio::select! {
            biased;
            first = stream.read(&mut byte) => first,
            _ = serve.says("accepting pauses") => {
                drop(idle.pop());
                tokio::time::timeout(LIMIT, stream.read(&mut byte)).await.expect("an answer or a reset")
            }
        };
        match first {
            Ok(count) => assert_eq!(count, 1, "a plain end"),
            Err(error) => break error,
        }
        live.push(stream);
        assert!(live.len() < 160, "more sessions than descriptors");
    };
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionReset);
    eventually("the log", async || {
        let short = serve.sessions(1).await.into_iter().find(|line| line["outcome"]["why"] == "shortage")?;
        assert_eq!((&short["outcome"]["by"], &short["outcome"]["at"]), (&"proxy".into(), &"connect".into()));
        assert_eq!(short["tenant"], "acme");
        Some(())
    })
    .await;
    for mut stream in live {
        stream.write_all(b"still").await.unwrap();
        assert_eq!(read(&mut stream, 5).await, b"still");
        assert_eq!(exchange(stream).await.unwrap(), b"");
    }
    drop(idle);
    serve.serves().await;
    serve.end().await;
}

#[tokio::test]
async fn log_without_a_reader_blocks_no_session() {
    let world = World::new().await;
    let (mut serve, out) = Serve::unread(&world.config("")).await;
    let room = rustix::pipe::fcntl_setpipe_size(&out, 4096).unwrap();
    // A line has more than 200 bytes: the pipe is full long before the last.
    let rounds = room / 200;
    for _ in 0..rounds {
        serve.serves().await;
    }
    eventually("all sessions to have ended", async || {
        let page = http_get(serve.admin, "/metrics").await;
        assert!(sum(&page, "vestibule_access_log_dropped_total", &[]) < 0.5, "{page}");
        let ended = sum(&page, "vestibule_sessions_ended_total", &[("why", "done")]);
        (ended > f64::from(u32::try_from(2 * rounds).unwrap()) - 0.5).then_some(())
    })
    .await;
    // Once somebody reads, nothing is missing.
    serve.out = lines_of(out);
    serve.end().await;
    assert_eq!(serve.sessions(2 * rounds).await.len(), 2 * rounds);
}

#[tokio::test]
async fn soft_descriptor_limit_is_raised_and_logged() {
    let world = World::new().await;
    let mut serve = Serve::limited_softly(&world.config(""), 300, 2_000).await;
    let line = serve.says("serving").await;
    assert_eq!((&line["file_descriptors"], &line["workers"]), (&2_000.into(), &2.into()));
    let sessions = line["max_sessions"].as_u64().unwrap();
    assert!((500..1_000).contains(&sessions), "{line}");
    serve.serves().await;
    let page = http_get(serve.admin, "/metrics").await;
    assert!(
        (sum(&page, "vestibule_sessions_limit", &[]) - f64::from(u32::try_from(sessions).unwrap())).abs()
            < 0.5
    );
    assert!((sum(&page, "process_max_fds", &[]) - 2_000.0).abs() < 0.5);
    serve.end().await;
}

#[tokio::test]
async fn named_pipe_log_without_a_reader_drops_lines_and_no_session() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.fifo");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let world = World::new().await;
    let log =
        format!("[log]\naccess = \"{}\"\n[drain]\nnotice = \"300s\"\ndeadline = \"300s\"", path.display());
    // Nobody has opened it: the start does not wait for a reader.
    let config = world.config(&log);
    long_lines(&config);
    let mut serve = Serve::start(&config).await;
    serve.serves().await;
    eventually("lines to be dropped", async || {
        let done = http_get(serve.health, "/healthz").await;
        assert_eq!(done.trim(), "ok");
        for _ in 0..200 {
            serve.serves().await;
        }
        let page = http_get(serve.admin, "/metrics").await;
        (sum(&page, "vestibule_access_log_dropped_total", &[]) > 0.5).then_some(())
    })
    .await;
    serve.end().await;
}

#[tokio::test]
async fn slow_log_loses_lines_and_counts_them() {
    let world = World::new().await;
    let config = world.config("[log]\naccess = \"LOG\"");
    let path = config.beside("log");
    config.rewrite("LOG", path.to_str().unwrap());
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // With both ends, opening it waits for nobody; it is read later, as by a disk that stands still.
    let log = File::options().read(true).write(true).open(&path).unwrap();
    rustix::pipe::fcntl_setpipe_size(&log, 4096).unwrap();
    long_lines(&config);
    let mut serve = Serve::start(&config).await;
    let dropped = async || {
        let page = http_get(serve.admin, "/metrics").await;
        sum(&page, "vestibule_access_log_dropped_total", &[])
    };
    let mut rounds = 0;
    timeout(LIMIT * 3, async {
        while dropped().await < 10.0 {
            serve.serves().await;
            rounds += 1;
        }
    })
    .await
    .expect("lines to be dropped");
    let lines = lines_of(log);
    serve.serves().await;
    // Every session has its line or is counted.
    eventually("the rest of the lines", async || {
        let missed = num(dropped().await);
        let told = lines.lock().unwrap().len() + missed;
        (told == 2 * (rounds + 1)).then_some(())
    })
    .await;
    for line in &*lines.lock().unwrap() {
        assert_eq!(serde_json::from_str::<serde_json::Value>(line).unwrap()["outcome"]["why"], "done");
    }
    serve.end().await;
}

fn num(value: f64) -> usize {
    value.to_string().parse().unwrap()
}
