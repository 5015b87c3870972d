//! `vestibule check --against`: what a reload would change, and whom it concerns.

use std::process::{Command, Output};

use serde_json::Value;

use super::control::with_socket;
use super::harness::exchange;
use super::process::{DRAIN_NEVER, PROGRAM, Serve, World, Written};

/// Asks.
fn check(config: &Written, against: &str, json: bool) -> (Option<i32>, String, String) {
    let mut command = Command::new(PROGRAM);
    command.arg("check").arg("--config").arg(&config.path).args(["--against", against]);
    if json {
        command.arg("--json");
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test]
async fn check_against_a_process_prints_the_changes() {
    let world = World::new().await;
    let config = world.config(DRAIN_NEVER);
    let socket = with_socket(&config);
    let mut serve = Serve::start(&config).await;
    let admin = format!("http://{}", serve.admin);
    let nothing = "no changes\n".to_owned();
    assert_eq!(check(&config, &admin, false), (Some(0), nothing, String::new()));

    let live = serve.carried().await;
    config.rewrite("name = \"acme\"\nendpoints", "name = \"acme\"\nroutes = { web = \"globex\" }\nendpoints");
    let text = "tenant \"acme\": moved: web acme -> globex; 1 session now\n\
                1 change, affecting 1 session\n";
    for place in [admin.clone(), format!("unix:{}", socket.display())] {
        assert_eq!(check(&config, &place, false), (Some(0), text.to_owned(), String::new()));
    }
    let (code, said, _) = check(&config, &admin, true);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &said["sessions"], &said["changes"][0]["kind"]), (Some(0), &1.into(), &"moved".into()));

    config.rewrite("workers = 2", "workers = 3");
    let (code, said, _) = check(&config, &admin, false);
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("[process]: refused, needs a restart or a takeover: workers 2 -> 3\n"),
        "{said}"
    );
    assert!(said.ends_with("the reload would be refused; no change would be applied\n"), "{said}");
    config.rewrite("workers = 3", "workers = none");
    let (code, said, faults) = check(&config, &admin, false);
    assert!(code == Some(1) && said.is_empty() && faults.contains(":2: "), "{faults}");

    exchange(live).await.unwrap();
    serve.end().await;
    config.rewrite("workers = none", "workers = 2");
    for place in [admin, format!("unix:{}", socket.display())] {
        let (code, said, error) = check(&config, &place, false);
        assert!(code == Some(2) && said.is_empty(), "{said}");
        assert!(error.starts_with("cannot reach "), "{error}");
    }
    assert_eq!(check(&config, "localhost", false).0, Some(2));
}
