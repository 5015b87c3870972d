//! The access log: its file is opened anew, links are not followed, and a flood of lines harms no other tenant's.

use std::fs::{File, create_dir, read_to_string, remove_file, rename};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::timeout;

use super::control::{ask, with_socket};
use super::harness::{ACME, Conf, GLOBEX, LIMIT, STRANGER, eventually, exchange, http_get, is_reset};
use super::process::{DRAIN_NEVER, Serve, World, Written, lines_of};

/// The log's path beside the configuration, which names it.
fn with_log(world: &World) -> (Written, PathBuf) {
    let config = world.config(&format!("[log]\naccess = \"LOG\"\n{DRAIN_NEVER}"));
    let path = config.beside("access.log");
    config.rewrite("LOG", path.to_str().unwrap());
    (config, path)
}

async fn has_lines(path: &Path, count: usize) {
    eventually("lines in the access log", async || {
        let text = read_to_string(path).unwrap_or_default();
        (text.lines().count() == count).then_some(())
    })
    .await;
}

/// The sum of the series of a metric that have this label; they must exist.
async fn sum(serve: &Serve, name: &str, label: &str) -> usize {
    let page = http_get(serve.admin, "/metrics").await;
    let series = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
    let values: Vec<usize> = series.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(!values.is_empty(), "{name} {label}");
    values.iter().sum()
}

#[tokio::test]
async fn renamed_access_log_is_reopened_by_signal_and_request() {
    let world = World::new().await;
    let (config, path) = with_log(&world);
    let socket = with_socket(&config);
    let mut serve = Serve::start(&config).await;
    let live = serve.carried().await;
    serve.serves().await;
    has_lines(&path, 2).await;
    for (number, order) in ["SIGUSR1", "SIGHUP", "POST /reload"].into_iter().enumerate() {
        let old = config.beside(&format!("access.log.{number}"));
        rename(&path, &old).unwrap();
        match order {
            "SIGUSR1" => serve.signal(Signal::USR1),
            "SIGHUP" => serve.signal(Signal::HUP),
            _ => assert_eq!(ask(&socket, "POST", "/reload", "").await.0, 200),
        }
        eventually(order, async || path.exists().then_some(())).await;
        serve.serves().await;
        has_lines(&path, 2).await;
        has_lines(&old, 2).await;
    }
    assert_eq!(exchange(live).await.unwrap(), b"");
    has_lines(&path, 3).await;
    serve.end().await;
}

#[tokio::test]
async fn access_log_that_cannot_be_reopened_continues_in_the_old_file() {
    let world = World::new().await;
    let (config, path) = with_log(&world);
    let (socket, old) = (with_socket(&config), config.beside("access.log.1"));
    let mut serve = Serve::start(&config).await;
    serve.serves().await;
    rename(&path, &old).unwrap();
    create_dir(&path).unwrap();
    serve.signal(Signal::USR1);
    let said = serve.says("log.access: ").await;
    assert_eq!(said["level"], "ERROR");
    let (status, answer) = ask(&socket, "POST", "/reload", "").await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let text = answer["access_log"].as_str().unwrap();
    assert!(status == 200 && text.contains("the log continues in the file that is open"), "{answer}");
    serve.serves().await;
    has_lines(&old, 4).await;
    serve.end().await;
}

#[tokio::test]
async fn symbolic_link_as_the_access_log_is_refused_by_the_check_and_never_written_to() {
    let world = World::new().await;
    let (config, path) = with_log(&world);
    let target = config.beside("target");
    std::fs::write(&target, "precious").unwrap();
    std::os::unix::fs::symlink(&target, &path).unwrap();
    let check = config.run("check");
    let said = String::from_utf8(check.stderr).unwrap();
    assert!(check.status.code() == Some(1) && said.contains("symbolic links are not followed"), "{said}");
    let mut serve = Serve::start(&config).await;
    assert_eq!(serve.says("log.access: ").await["level"], "ERROR");
    serve.serves().await;
    eventually("the lost lines to be counted", async || {
        let dropped = sum(&serve, "vestibule_access_log_dropped_total", "class=\"session\"").await;
        (dropped >= 2).then_some(())
    })
    .await;
    assert_eq!(read_to_string(&target).unwrap(), "precious");
    remove_file(&path).unwrap();
    serve.signal(Signal::USR1);
    serve.says("access log reopened").await;
    serve.serves().await;
    has_lines(&path, 2).await;
    serve.end().await;
}

#[tokio::test]
async fn flood_of_unidentified_sessions_logs_few_lines_and_counts_the_rest() {
    const AT_ONCE: usize = 50;
    let world = World::new().await;
    let config = world.config(DRAIN_NEVER);
    let mut serve = Serve::start(&config).await;
    let mut strays = 0;
    let left_out =
        async |serve: &Serve| sum(serve, "vestibule_access_log_left_out_total", "class=\"stray\"").await;
    // As many as it takes: ten in a second have their lines.
    timeout(LIMIT, async {
        while left_out(&serve).await < 20 {
            let mut flood = Vec::new();
            for _ in 0..AT_ONCE {
                flood.push(serve.open(STRANGER, b"").await);
            }
            for stream in &mut flood {
                is_reset(stream).await;
            }
            strays += AT_ONCE;
        }
    })
    .await
    .expect("lines to be left out");
    serve.serves().await;
    let why = |line: &Value, why: &str| line["outcome"]["why"] == why;
    eventually(
        "each stray to have its line or to be counted, and each session to have its line",
        async || {
            let lines = serve.sessions(0).await;
            let told = lines.iter().filter(|line| why(line, "unknown_endpoint")).count();
            let sessions = lines.iter().filter(|line| why(line, "done")).count();
            let missing = left_out(&serve).await;
            (sessions == 2 && missing + told == strays).then_some(())
        },
    )
    .await;
    let said = serve.says("access log lines of connections without a tenant suppressed").await;
    assert!(said["level"] == "WARN" && said["lines"].as_u64().unwrap() > 0, "{said}");
    let dropped = sum(&serve, "vestibule_access_log_dropped_total", "class=").await;
    assert_eq!(dropped, 0);
    serve.end().await;
}

#[tokio::test]
async fn one_tenants_lines_do_not_push_out_anothers_where_the_log_is_slow() {
    let world = World::new().await;
    let (config, path) = with_log(&world);
    // Its lines are long, so that a few fill its part of the queue.
    let greedy = format!("endpoints = [\"{ACME}\"]\nlabels = {{ note = \"{}\" }}", "x".repeat(20_000));
    config.rewrite(&format!("endpoints = [\"{ACME}\"]"), &greedy);
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // With both ends, opening it waits for no other; it is read later, as by a disk that stands still.
    let log = File::options().read(true).write(true).open(&path).unwrap();
    let mut serve = Serve::start(&config).await;
    let dropped =
        async |serve: &Serve| sum(serve, "vestibule_access_log_dropped_total", "class=\"session\"").await;
    let mut sent = 0;
    timeout(LIMIT * 3, async {
        while dropped(&serve).await < 10 {
            for _ in 0..10 {
                assert_eq!(exchange(serve.open(ACME, b"greedy").await).await.unwrap(), b"greedy");
            }
            sent += 10;
        }
    })
    .await
    .expect("lines to be dropped");
    let said = serve.says("access log lines dropped").await;
    assert!(said["level"] == "WARN" && said["sessions"].as_u64().unwrap() > 0, "{said}");
    for _ in 0..50 {
        assert_eq!(exchange(serve.open(GLOBEX, b"other").await).await.unwrap(), b"other");
    }
    let lines = lines_of(log);
    eventually(
        "each line of the other tenant, and those of the greedy one that were not dropped",
        async || {
            let missing = dropped(&serve).await;
            let lines = lines.lock().unwrap();
            let of = |tenant: &str| {
                let mark = format!("\"tenant\":\"{tenant}\"");
                lines.iter().filter(|line| line.contains(&mark)).count()
            };
            (of("globex") == 50 && of("acme") + missing == sent).then_some(())
        },
    )
    .await;
    serve.end().await;
}

#[tokio::test]
async fn unidentified_udp_datagrams_log_few_lines() {
    let listener = "[[listener]]\nname = \"dns\"\nprotocol = \"udp\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = \
                    [\"127.0.0.0/8\"]\npool = \"globex\"\n";
    let conf =
        Conf { acme: vec!["127.0.0.1:9".parse().unwrap()], more: listener.to_owned(), ..Conf::default() };
    let proxy = conf.start().await;
    let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(proxy.address("dns")).unwrap();
    let left_out = proxy.metric("vestibule_access_log_left_out_total", &[("class", "stray")]);
    timeout(LIMIT, async {
        while proxy.value("vestibule_access_log_left_out_total", &[("class", "stray")]).await < 20.0 {
            for _ in 0..50 {
                client.send(b"no header at all, and no flow").unwrap();
            }
        }
    })
    .await
    .expect("lines to be left out");
    left_out.is_at_least(20).await;
    proxy.logged("no_header").await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
