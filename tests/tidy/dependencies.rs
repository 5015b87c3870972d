//! Rules for dependencies that need no network: their licences are those of `deny.toml`, and none needs a newer Rust than ours.

use std::fs;
use std::process::Command;

use super::none;

/// Every package that the program, its tests and its benches are compiled from.
fn packages() -> Vec<serde_json::Value> {
    let arguments = ["metadata", "--format-version", "1", "--offline", "--locked"];
    let platform = ["--filter-platform", "x86_64-unknown-linux-gnu"];
    let output = Command::new(env!("CARGO")).args(arguments).args(platform).output().unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let mut metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages: Vec<_> = metadata["packages"].as_array_mut().unwrap().drain(..).collect();
    assert!(packages.len() > 50, "{} packages", packages.len());
    packages
}

fn name(package: &serde_json::Value) -> &str {
    package["name"].as_str().unwrap()
}

#[test]
fn licence_of_every_dependency_is_allowed_by_deny_toml() {
    let rules = fs::read_to_string("deny.toml").unwrap().parse::<toml::Table>().unwrap();
    let allowed: Vec<_> =
        rules["licenses"]["allow"].as_array().unwrap().iter().filter_map(toml::Value::as_str).collect();
    let mut faults = Vec::new();
    for package in packages() {
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_allowed(licence, &allowed) {
            faults.push(format!("{}: the licence {licence} is not allowed by deny.toml", name(&package)));
        }
    }
    none(&faults);
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT", "ISC"];
    for yes in ["MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "MIT AND ISC", "(GPL-3.0 OR MIT) AND ISC"] {
        assert!(is_allowed(yes, &allowed), "{yes}");
    }
    for no in ["none", "GPL-3.0", "MIT AND GPL-3.0", "MIT WITH exception", "(MIT OR ISC) AND GPL-3.0"] {
        assert!(!is_allowed(no, &allowed), "{no}");
    }
}

/// Whether an SPDX expression is satisfied: AND binds more tightly than OR, and old packages write `/` for OR.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut words = words.as_slice();
    let result = any(&mut words, allowed);
    assert!(words.is_empty(), "{expression}: {words:?} is left");
    result
}

fn any(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut result = all(words, allowed);
    while take(words, "OR") {
        result |= all(words, allowed);
    }
    result
}

fn all(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut result = one(words, allowed);
    while take(words, "AND") {
        result &= one(words, allowed);
    }
    result
}

fn one(words: &mut &[&str], allowed: &[&str]) -> bool {
    if take(words, "(") {
        let result = any(words, allowed);
        assert!(take(words, ")"), "a parenthesis is not closed before {words:?}");
        return result;
    }
    let (licence, rest) = words.split_first().unwrap();
    *words = rest;
    let has_exception = take(words, "WITH");
    *words = &words[usize::from(has_exception)..];
    !has_exception && allowed.contains(licence)
}

fn take(words: &mut &[&str], word: &str) -> bool {
    let is_next = words.first() == Some(&word);
    *words = &words[usize::from(is_next)..];
    is_next
}

#[test]
fn no_dependency_needs_a_newer_rust_than_ours() {
    let version = |text: &str| text.split('.').map(|part| part.parse().unwrap()).collect::<Vec<u32>>();
    let packages = packages();
    let ours = packages.iter().find(|package| name(package) == env!("CARGO_PKG_NAME")).unwrap();
    // 1.88 and 1.88.0 are the same.
    let newest = [version(ours["rust_version"].as_str().unwrap()), vec![u32::MAX]].concat();
    let newer = packages
        .iter()
        .filter(|package| package["rust_version"].as_str().map(version) > Some(newest.clone()));
    none(
        &newer
            .map(|package| format!("{}: needs Rust {}", name(package), package["rust_version"]))
            .collect::<Vec<_>>(),
    );
}
