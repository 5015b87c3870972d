//! Tells the program which commit it is built from: `VESTIBULE_COMMIT` of `src/build_info.rs`.
//!
//! The commit comes from git if the package is the root of a repository, else from the environment variable
//! `VESTIBULE_COMMIT` (packages and container images are built without a repository), else it is `unknown`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that is read here and that `src/build_info.rs` is compiled with.
const VARIABLE: &str = "VESTIBULE_COMMIT";

fn main() {
    let root = Path::new(".");
    #[expect(clippy::disallowed_methods, reason = "a build script has no command line")]
    let variable = std::env::var(VARIABLE).ok();
    println!("cargo::rustc-env={VARIABLE}={}", commit(root, variable.as_deref()));
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    for path in watched(root) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

/// The commit of the repository whose root is `root`, else the variable's value, else `unknown`.
#[must_use]
pub fn commit(root: &Path, variable: Option<&str>) -> String {
    let variable = || variable.map(str::trim).filter(|value| !value.is_empty()).map(str::to_owned);
    of_repository(root).or_else(variable).unwrap_or_else(|| "unknown".to_owned())
}

fn of_repository(root: &Path) -> Option<String> {
    // A package inside of another repository, such as a vendored one, does not have that repository's commit.
    if !git(root, &["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    git(root, &["rev-parse", "--short=12", "HEAD"]).filter(|commit| !commit.is_empty())
}

/// The files that git writes when the commit changes. A file that does not exist would run this script each time.
fn watched(root: &Path) -> Vec<PathBuf> {
    // The reflog changes with each commit, also if the branch itself is packed.
    let mut names = vec!["HEAD".to_owned(), "logs/HEAD".to_owned()];
    names.extend(git(root, &["symbolic-ref", "--quiet", "HEAD"]));
    let paths = names.iter().filter_map(|name| git(root, &["rev-parse", "--git-path", name]));
    paths.map(|path| root.join(path)).filter(|path| path.exists()).collect()
}

/// What git prints, without the end of the line; nothing if git is not installed or fails.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
