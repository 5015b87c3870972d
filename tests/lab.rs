//! `vestibule lab` as a newcomer runs it: what it claims, what it leaves, and what becomes of it when it is stopped.
//! It needs root, network namespaces, nginx and curl; where they are not there it says so.

#![expect(clippy::unwrap_used, reason = "a lab that says something else has failed")]

#[path = "it/printed.rs"]
mod printed;

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};

use self::printed::Printed;

/// The folders in which a run is seen: its namespaces, and its own.
const NAMED: &str = "/run/netns";
const FOLDER: &str = "/run/vestibule-lab";

/// What the story claims; one more says that all is removed.
const CLAIMS: usize = 12;

/// A lab that runs. One that a test does not end is interrupted, so that it removes its world.
struct Lab {
    child: Child,
    output: Printed,
    run: String,
}

impl Lab {
    /// Starts it, and reads the name of its run; `None` where it cannot run.
    fn start(words: &[&str]) -> Option<Self> {
        if !can_run() {
            return None;
        }
        let mut command = lab(words);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = Printed::of(&mut child);
        let mut lab = Self { child, output, run: String::new() };
        let text = lab.output.until("vestibule lab ");
        let title = text.lines().last().unwrap();
        title["vestibule lab ".len()..][..4].clone_into(&mut lab.run);
        Some(lab)
    }

    /// What else it prints, and how it ends.
    fn end(mut self) -> (String, ExitStatus) {
        (self.output.rest(), self.child.wait().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.signal(Signal::INT);
            self.child.wait().unwrap();
        }
    }
}

fn lab(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vestibule"));
    command.arg("lab").args(words).stdin(Stdio::null());
    command
}

/// Whether it can run; a line says why not. It must where `VESTIBULE_REQUIRE_PEERS=1`.
fn can_run() -> bool {
    let lacking = lacking();
    if !lacking.is_empty() {
        assert!(!is_required(), "{lacking}, and VESTIBULE_REQUIRE_PEERS is set");
        // Not eprintln!, which the test runner keeps to itself when a test passes.
        io::stderr().write_all(format!("left out: {lacking}\n").as_bytes()).unwrap();
    }
    lacking.is_empty()
}

/// What the lab says that it needs, or that namespaces cannot be made; empty where nothing is lacking.
fn lacking() -> &'static str {
    static LACKING: OnceLock<String> = OnceLock::new();
    LACKING.get_or_init(|| {
        // No run has this name: what is asked for is only whether it could be removed.
        let asked = lab(&["--down", "0000"]).output().unwrap();
        if !asked.status.success() {
            return String::from_utf8(asked.stderr).unwrap().trim_end().replace('\n', "; ");
        }
        let name = format!("vestibule-test-{}", std::process::id());
        let netns = |word: &str| Command::new("ip").args(["netns", word, &name]).output().unwrap();
        let made = netns("add");
        if !made.status.success() {
            return String::from_utf8(made.stderr).unwrap().trim_end().to_owned();
        }
        assert!(netns("delete").status.success());
        String::new()
    })
}

#[expect(clippy::disallowed_methods, reason = "how strict the tests are is no configuration of the lab's")]
fn is_required() -> bool {
    std::env::var("VESTIBULE_REQUIRE_PEERS").is_ok_and(|value| value == "1")
}

/// What there is of a run: namespaces, files, and processes that know its name.
fn left(run: &str) -> Vec<String> {
    let mut left = Vec::new();
    for entry in fs::read_dir(NAMED).into_iter().flatten() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with(&format!("vestibule-{run}-")) {
            left.push(name);
        }
    }
    if Path::new(FOLDER).join(run).exists() {
        left.push(format!("{FOLDER}/{run}"));
    }
    for entry in fs::read_dir("/proc").unwrap() {
        // A process that ends meanwhile has no command line.
        let line = fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&format!("{FOLDER}/{run}/")) || line.contains(&format!("lab-nlb {run}")) {
            left.push(line);
        }
    }
    left
}

#[track_caller]
fn is_gone(run: &str) {
    assert_eq!(left(run), Vec::<String>::new());
}

#[track_caller]
fn holds(text: &str, claims: usize) {
    let held = text.lines().filter(|line| line.trim_start().starts_with('✓')).count();
    assert!(held == claims && !text.contains('✗'), "{held} claims hold, of {claims}\n{text}");
}

#[test]
fn every_claim_holds_and_nothing_is_left() {
    let Some(lab) = Lab::start(&[]) else { return };
    let run = lab.run.clone();
    let (text, status) = lab.end();
    assert!(status.success(), "{status}\n{text}");
    holds(&text, CLAIMS + 1);
    // The same client to the port, by four ports: each tenant's own pool.
    for port in 40_001..=40_004 {
        for tenant in ["acme", "globex"] {
            let row = format!("   {tenant:<10}10.100.0.10:{port}{:9}{tenant}-", "");
            assert!(text.contains(&row), "no row {row}\n{text}");
        }
    }
    assert!(text.ends_with(" claims, and all of them hold.\n"), "{text}");
    is_gone(&run);
}

#[test]
fn kept_lab_can_be_entered_and_removed() {
    let Some(lab_kept) = Lab::start(&["--keep"]) else { return };
    let run = lab_kept.run.clone();
    let (text, status) = lab_kept.end();
    assert!(status.success(), "{status}\n{text}");
    holds(&text, CLAIMS);
    // The commands as printed, each inside the network that the line before enters.
    let (_, ways) = text.split_once("Look around").unwrap();
    let command = |what: &str| {
        let line = ways.lines().find(|line| line.trim_start().starts_with(what)).unwrap();
        line.trim_start()[what.len()..].trim_start().to_owned()
    };
    let within = |enter: &str, words: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("echo '{words}' | {enter}")]);
        let output = shell.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{enter}: {words}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for tenant in ["acme", "globex"] {
        let answer = within(&command(&format!("run commands as {tenant}'s consumer")), &command("and there"));
        assert!(answer.contains(&format!("\"backend\":\"{tenant}-")), "{answer}");
        assert!(answer.contains("\"client\":\"10.100.0.10:"), "{answer}");
    }
    let metrics =
        within(&command("run commands in the provider's network"), &command("and there, proxy-2's metrics"));
    assert!(metrics.contains("vestibule_sessions_ended_total{"), "{metrics}");
    let targets = || within("sh", &command("the NLB's view of its targets"));
    assert!(targets().contains(r#""address":"10.100.2.11:8080","state":"healthy""#), "{}", targets());
    within("sh", &command("deregister proxy-1"));
    assert!(targets().contains(r#""address":"10.100.2.11:8080","state":"draining""#), "{}", targets());
    assert!(!left(&run).is_empty());

    // Another run is in nobody's way, and leaves alone what was kept.
    let other = Lab::start(&[]).unwrap();
    let down = lab(&["--down", &other.run]).output().unwrap();
    assert!(String::from_utf8(down.stdout).unwrap().contains("is in use"));
    drop(other);
    assert!(targets().contains("\"state\":\"healthy\""), "{}", targets());

    let down = lab(&["--down", &run]).output().unwrap();
    assert!(down.status.success(), "{down:?}");
    assert_eq!(String::from_utf8(down.stdout).unwrap(), format!("run {run} is removed\n"));
    is_gone(&run);
}

#[test]
fn interrupt_removes_everything() {
    for (signal, at) in [(Signal::INT, "1  The lab"), (Signal::TERM, "2  "), (Signal::INT, "4  proxy-1")] {
        let Some(mut lab) = Lab::start(&[]) else { return };
        lab.output.until(at);
        lab.signal(signal);
        let run = lab.run.clone();
        let (text, status) = lab.end();
        assert_eq!(status.code(), Some(130), "{text}");
        assert!(text.contains("interrupted\n") && text.contains("Removed: namespaces"), "{text}");
        is_gone(&run);
    }
}

#[test]
fn leftovers_of_a_killed_command_are_removed_by_the_next() {
    let Some(mut killed) = Lab::start(&[]) else { return };
    killed.output.until("4  proxy-1");
    let run = killed.run.clone();
    assert!(left(&run).len() > 6, "{:?}", left(&run));
    killed.signal(Signal::KILL);
    killed.child.wait().unwrap();
    let next = Lab::start(&[]).unwrap();
    is_gone(&run);
    drop(next);
}

#[test]
fn lab_that_cannot_start_reports_the_error_and_is_removed() {
    if !can_run() {
        return;
    }
    // An nginx that is installed, and does not run.
    let folder = tempfile::tempdir().unwrap();
    let nginx = folder.path().join("nginx");
    fs::write(&nginx, "#!/bin/sh\n[ \"$1\" = -v ] || { echo broken by the test; exit 1; }\n").unwrap();
    fs::set_permissions(&nginx, fs::Permissions::from_mode(0o755)).unwrap();
    let mut paths = vec![folder.path().to_owned()];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let output = lab(&["--keep"]).env("PATH", std::env::join_paths(paths).unwrap()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    // Whichever of the four ends first.
    let fault =
        text.lines().find_map(|line| line.split_once("✗ DOES NOT HOLD: The lab continues. ")).unwrap().1;
    let (nginx, _) = fault.split_once(" ended").unwrap();
    assert!(["acme-1", "acme-2", "globex-1", "globex-2"].contains(&nginx), "{text}");
    assert!(text.contains(" broken by the test\n") && text.contains("Removed: namespaces"), "{text}");
    let (_, title) = text.split_once("vestibule lab ").unwrap();
    is_gone(&title[..4]);
}

#[test]
fn lab_run_name_has_its_own_form() {
    for name in ["../x", "12345", "12G4", ""] {
        let output = lab(&["--down", name]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {output:?}");
    }
}

#[test]
fn missing_requirement_is_reported_with_its_remedy() {
    let output = lab(&[]).env("PATH", "").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    for line in [
        "ip must be installed; try: apt-get install iproute2",
        "curl must be installed; try: apt-get install curl",
    ] {
        assert!(said.lines().any(|said| said == line), "{said}");
    }
}
