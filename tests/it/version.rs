//! Version and commit of the program: what `build.rs` finds, and where the program shows it.

use std::path::Path;
use std::process::Command;

use vestibule::build_info::{COMMIT, VERSION};
use vestibule::lab::backend::{BackendBehavior, TestBackend};

use super::harness::Conf;

#[path = "../../build.rs"]
mod build;

fn git(folder: &Path, arguments: &[&str]) -> String {
    let identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"];
    let output = Command::new("git").arg("-C").arg(folder).args(identity).args(arguments).output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn version_option_shows_version_and_commit() {
    let output = Command::new(env!("CARGO_BIN_EXE_vestibule")).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, format!("vestibule {VERSION} (commit {COMMIT})\n"));
}

#[tokio::test]
async fn build_info_has_version_and_commit_as_labels() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let proxy = Conf { acme: vec![acme.address()], ..Conf::default() }.start().await;
    let labels = [("version", VERSION), ("commit", COMMIT)];
    proxy.metric("vestibule_build_info", &labels).is(1).await;
    proxy.finish().await;
}

#[test]
fn commit_comes_from_the_repository_first() {
    let folder = tempfile::tempdir().unwrap();
    git(folder.path(), &["init", "--quiet"]);
    // Without a commit there is none to show.
    assert_eq!(build::commit(folder.path(), Some("0123456789ab")), "0123456789ab");
    git(folder.path(), &["commit", "--quiet", "--allow-empty", "--message", "first"]);
    let commit = git(folder.path(), &["rev-parse", "HEAD"]);
    assert_eq!(build::commit(folder.path(), Some("0123456789ab")), commit[..12]);
}

#[test]
fn commit_of_a_surrounding_repository_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    git(folder.path(), &["init", "--quiet"]);
    git(folder.path(), &["commit", "--quiet", "--allow-empty", "--message", "first"]);
    let vendored = folder.path().join("vendor");
    std::fs::create_dir(&vendored).unwrap();
    assert_eq!(build::commit(&vendored, Some("0123456789ab")), "0123456789ab");
}

#[test]
fn commit_without_a_repository_is_the_variable_or_unknown() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(build::commit(folder.path(), Some("0123456789ab\n")), "0123456789ab");
    assert_eq!(build::commit(folder.path(), Some("")), "unknown");
    assert_eq!(build::commit(folder.path(), None), "unknown");
}
