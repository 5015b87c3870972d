//! Faults of vestibule itself outside of any session: the process ends, or does not start.

use std::process::Command;

use rustix::io::Errno;
use vestibule::fault::{InjectedFault, Syscall};
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::server::failure::STATUS;

use super::harness::{Conf, LIMIT};
use super::{alone, inject};

/// Says to this program which part of a process of its own shall panic.
const PART: &str = "VESTIBULE_TEST_PANICS";

#[tokio::test]
async fn panic_in_a_workers_timers_or_the_control_thread_ends_the_process_with_a_message() {
    let _kernel = alone().await;
    let call = match std::env::var_os(PART) {
        Some(part) if part == "worker" => Syscall::WorkerPanic,
        Some(_) => Syscall::ControlPanic,
        None => return ends().await,
    };
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let acme = vec![([127, 0, 0, 1], 9).into()];
    let _proxy = Conf { acme, ..Conf::default() }.start().await;
    let _bug = inject(InjectedFault::new(call, &[Errno::INVAL]).at_most(1));
    tokio::time::sleep(LIMIT).await;
}

/// Runs this test in processes that panic.
async fn ends() {
    for (part, told) in
        [("worker", "what=\"the timers of worker "), ("control", "what=\"systemd notification\"")]
    {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = "process::panic_in_a_workers_timers_or_the_control_thread_ends_the_process_with_a_message";
        command.args(["--exact", name, "--nocapture"]).env(PART, part);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(STATUS), "{said}");
        assert!(said.contains(told) && said.contains("injected"), "{said}");
    }
}

#[tokio::test]
async fn worker_without_a_runtime_is_a_failed_start() {
    let _kernel = alone().await;
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let conf = || Conf { acme: vec![acme.address()], ..Conf::default() };
    let short = inject(InjectedFault::new(Syscall::WorkerStart, &[Errno::MFILE]).after(1).at_most(1));
    let error = conf().try_start().await.err().expect("no start");
    assert!(error.to_string().starts_with("cannot start a worker thread: "), "{error}");
    drop(short);
    let proxy = conf().start().await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}
