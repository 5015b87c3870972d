//! Rules that no compiler knows: who may import whom (`circles`: inside a room), how long files are, and, in `words`, which
//! words are used; `pages` checks the documents.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    dead_code,
    unreachable_pub,
    reason = "a test that cannot go on says so by panicking"
)]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/dependencies.rs"]
mod dependencies;
#[path = "tidy/markdown.rs"]
mod markdown;
#[path = "tidy/pages.rs"]
mod pages;
#[path = "it/scrape.rs"]
mod scrape;
#[path = "tidy/words.rs"]
mod words;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The modules of each floor, from the ground up: each imports from lower floors only.
const FLOORS: [&[&str]; 9] = [
    &["id", "addr", "clock", "outcome", "fault", "build_info", "atomic", "fair_share", "socket_options"],
    &["config", "proxy_protocol", "account"],
    &["admission", "pool", "session_context"],
    &["accept", "header", "tenant", "connect", "forward"],
    &["state", "probe", "resolve", "frozen"],
    &["session", "flow"],
    &["admin", "lab", "handover"],
    &["server"],
    &["cli"],
];

/// Up to this floor everything is pure: time is an argument, and nothing waits.
const PURE: usize = 2;

/// What a pure module has no word of.
const IMPURE: [&str; 6] = ["async", "await", "tokio", "TcpStream", "TcpListener", "UdpSocket"];

/// Words that say nothing of a thing.
const EMPTY: [&str; 6] = ["manager", "handler", "helper", "util", "inner", "data"];

/// A file may be this long.
const LINES: usize = 500;

#[test]
fn modules_import_from_lower_floors_only() {
    let mut faults = Vec::new();
    for source in sources(&["src"]) {
        let Some(module) = source.module() else { continue };
        let Some(own) = floor(&module) else {
            faults.push(format!("{}: the module {module} has no floor", source.path));
            continue;
        };
        for (line, import) in imports(&source) {
            if import != module && floor(&import).is_none_or(|other| other >= own) {
                faults.push(format!("{}:{line}: {module}, on floor {own}, imports {import}", source.path));
            }
        }
    }
    none(&faults);
}

#[test]
fn lower_floors_neither_wait_nor_read_a_clock() {
    let mut faults = Vec::new();
    for source in sources(&["src"]) {
        let pure = source.module().and_then(|module| floor(&module)).is_some_and(|floor| floor <= PURE);
        if !pure || source.path == "src/clock.rs" {
            continue;
        }
        let tokens = tokens(&source.text);
        for (at, (line, token)) in tokens.iter().enumerate() {
            let before = at.checked_sub(1).map_or("", |before| tokens[before].1.as_str());
            let is_call = tokens.get(at + 1).is_some_and(|next| next.1 == "(");
            let reads = match token.as_str() {
                // A method of that name tells a time that it was given.
                "now" | "wall" => is_call && !matches!(before, "." | "fn"),
                "elapsed" => is_call && before == ".",
                _ => false,
            };
            if reads || IMPURE.contains(&token.as_str()) {
                faults.push(format!("{}:{line}: {token}", source.path));
            }
        }
    }
    none(&faults);
}

#[test]
fn every_file_opens_with_a_sentence() {
    let mut faults = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let lines = source.text.lines().map_while(|line| line.strip_prefix("//! "));
        let opening: Vec<_> = lines.collect();
        if !opening.last().is_some_and(|last| last.ends_with('.') || last.contains(". ")) {
            faults.push(format!("{}: opens with no sentence", source.path));
        }
    }
    none(&faults);
}

#[test]
fn no_file_is_too_long() {
    let mut faults = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let lines = source.text.lines().count();
        if lines > LINES {
            faults.push(format!("{}: {lines} lines, and {LINES} are the most", source.path));
        }
    }
    none(&faults);
}

#[test]
fn names_have_no_empty_words() {
    let mut faults = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let tokens = tokens(&source.text);
        for (at, (line, name)) in tokens.iter().enumerate() {
            let beside = |at: Option<usize>| at.and_then(|at| tokens.get(at)).map_or("", |token| &token.1);
            let (before, after) = (beside(at.checked_sub(1)), beside(Some(at + 1)));
            // Methods, members of paths and their roots: where they are ours, their declaration is found.
            if matches!(before, "." | "::") || after == "::" {
                continue;
            }
            let is_empty = parts(name).iter().any(|word| EMPTY.contains(&word.trim_end_matches('s')));
            if is_empty || name.starts_with("get_") {
                faults.push(format!("{}:{line}: {name}", source.path));
            }
        }
    }
    none(&faults);
}

#[test]
fn no_test_asserts_that_something_was_fast() {
    let mut faults = Vec::new();
    for source in sources(&["tests"]) {
        // Models have a time of their own, and lower bounds are one type's.
        if source.path.starts_with("tests/model") || source.path == "tests/it/began.rs" {
            continue;
        }
        let tokens = tokens(&source.text);
        let token = |at: usize| tokens.get(at).map_or("", |token| token.1.as_str());
        for (at, (line, name)) in tokens.iter().enumerate() {
            let is_call = at > 0 && token(at - 1) == "." && token(at + 1) == "(";
            let reads = name == "Instant" || (is_call && matches!(name.as_str(), "since" | "elapsed"));
            if reads || (name == "timeout" && token(at + 1) == "(" && is_asserted(&tokens[at + 1..])) {
                faults.push(format!("{}:{line}: {name}: order, counts or states, or `Began`", source.path));
            }
        }
    }
    none(&faults);
}

/// Whether a call's arguments have a time of their own, and that it is not over is asserted.
fn is_asserted(call: &[(usize, String)]) -> bool {
    let mut depth = 0_usize;
    let end = call.iter().position(|(_, token)| {
        depth += usize::from(token == "(");
        depth -= usize::from(token == ")");
        depth == 0
    });
    let (arguments, after) = call.split_at(end.unwrap_or(call.len()));
    let has_time =
        arguments.iter().take_while(|(_, token)| token != ",").any(|(_, token)| token.starts_with("from_"));
    let after: Vec<_> = after.iter().skip(1).take(4).map(|(_, token)| token.as_str()).collect();
    has_time && matches!(after[..], [".", "await", ".", "unwrap" | "expect"])
}

#[test]
fn source_has_no_todo_markers() {
    let marks =
        [concat!("to", "do!"), concat!("un", "implemented!"), concat!("FIX", "ME"), concat!("#[ign", "ore")];
    let mut faults = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        for (number, line) in (1..).zip(source.text.lines()) {
            for mark in marks.iter().filter(|mark| line.contains(**mark)) {
                faults.push(format!("{}:{number}: {mark}", source.path));
            }
        }
    }
    none(&faults);
}

#[test]
fn every_label_of_a_metric_has_known_values() {
    none(&scrape::labels_without_values());
}

#[test]
fn no_file_names_a_path_of_a_developers_machine() {
    let listed = Command::new("git").args(["ls-files", "-z"]).output();
    let Some(listed) = listed.ok().filter(|listed| listed.status.success()) else { return };
    let roots = ["work", "farm", "root"].map(|root| format!("/{root}/"));
    let mut faults = Vec::new();
    for path in String::from_utf8(listed.stdout).unwrap().split_terminator('\0') {
        // One that is removed, and whose removal is not committed yet, names nothing.
        let bytes = fs::read(path).unwrap_or_default();
        for (number, line) in (1..).zip(String::from_utf8_lossy(&bytes).lines()) {
            let starts = roots.iter().flat_map(|root| line.match_indices(root.as_str()));
            let mut befores = starts.map(|(at, _)| line[..at].chars().next_back());
            if befores.any(|before| !before.is_some_and(|c| c.is_ascii_alphanumeric())) {
                faults.push(format!("{path}:{number}: {line}"));
            }
        }
    }
    none(&faults);
}

#[track_caller]
fn none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// A file of Rust.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The module that it belongs to; none for the crates' roots.
    fn module(&self) -> Option<String> {
        let name = self.path.strip_prefix("src/")?.split('/').next()?;
        let name = name.strip_suffix(".rs").unwrap_or(name);
        (name != "lib" && name != "main").then(|| name.to_owned())
    }

    /// How far below the crate's root its module lies.
    fn depth(&self) -> usize {
        self.path.split('/').count() - 1
    }
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in folders {
        collect(Path::new(folder), &mut paths);
    }
    paths.retain(|path| path.extension().is_some_and(|end| end == "rs"));
    assert!(!paths.is_empty());
    paths.sort();
    let read = |path: PathBuf| Source {
        text: fs::read_to_string(&path).unwrap(),
        path: path.into_os_string().into_string().unwrap(),
    };
    paths.into_iter().map(read).collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, paths);
        } else {
            paths.push(path);
        }
    }
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// The top modules that a file names, with their lines: `crate::x`, `crate::{x, y::z}`; and "crate" where a chain
/// of `super` ends at the crate's root.
fn imports(source: &Source) -> Vec<(usize, String)> {
    let tokens = tokens(&source.text);
    let token = |at: usize| tokens.get(at).map_or("", |token| token.1.as_str());
    let mut found = Vec::new();
    let (mut braces, mut inline) = (0_usize, Vec::new());
    for (at, (line, name)) in tokens.iter().enumerate() {
        match name.as_str() {
            "{" => {
                braces += 1;
                if at >= 2 && token(at - 2) == "mod" {
                    inline.push(braces);
                }
            }
            "}" => {
                inline.retain(|depth| *depth != braces);
                braces = braces.saturating_sub(1);
            }
            "crate" if token(at + 1) == "::" && token(at + 2) != "{" => {
                found.push((*line, token(at + 2).to_owned()));
            }
            "crate" if token(at + 1) == "::" => {
                let mut depth = 0_usize;
                for (before, (line, name)) in (at + 2..).zip(&tokens[at + 3..]) {
                    let starts = matches!(token(before), "{" | ",") && depth == 0;
                    match name.as_str() {
                        "{" => depth += 1,
                        "}" if depth == 0 => break,
                        "}" => depth -= 1,
                        _ if starts => found.push((*line, name.clone())),
                        _ => {}
                    }
                }
            }
            "super" if at == 0 || token(at - 1) != "::" => {
                let chain = (at..).step_by(2).take_while(|at| token(*at) == "super").count();
                if chain >= source.depth() + inline.len() {
                    found.push((*line, "crate".to_owned()));
                }
            }
            _ => {}
        }
    }
    found
}

/// The parts of a name, in small letters.
fn parts(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_small = false;
    for c in name.chars() {
        if c == '_' || (c.is_uppercase() && was_small) {
            words.push(String::new());
        }
        if c != '_' {
            words.last_mut().unwrap().extend(c.to_lowercase());
        }
        was_small = c.is_lowercase();
    }
    words
}

/// Names, `::` and other marks with their lines; comments, texts and characters are left out.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let mut tokens = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let is_name = first.is_alphanumeric() || first == '_';
        let len = if let Some(len) = unspoken(rest) {
            len
        } else if is_name {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let (token, after) = rest.split_at(len);
        if unspoken(rest).is_none() && !first.is_whitespace() {
            tokens.push((line, token.to_owned()));
        }
        line += token.matches('\n').count();
        rest = after;
    }
    tokens
}

/// How long the comment, text or character is that `rest` starts with.
fn unspoken(rest: &str) -> Option<usize> {
    let until =
        |end: &str, from: usize| rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len());
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(until("*/", 2));
    }
    let plain = rest.trim_start_matches(['b', 'c']);
    let prefix = rest.len() - plain.len();
    if let Some(raw) = plain.strip_prefix('r').filter(|_| prefix <= 1) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            return Some(until(&format!("\"{}", "#".repeat(hashes)), prefix + hashes + 2));
        }
    }
    if plain.starts_with('"') && prefix <= 1 {
        return Some(prefix + quoted(plain, '"'));
    }
    // What is no character is a lifetime.
    let mut chars = plain.strip_prefix('\'').filter(|_| prefix <= 1)?.chars();
    let is_character = chars.next() == Some('\\') || chars.next() == Some('\'');
    is_character.then(|| prefix + quoted(plain, '\''))
}

/// How long a text between `mark`s is, with them.
fn quoted(text: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == mark && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

#[test]
fn tokens_are_told_from_texts_and_comments() {
    let text = "fn a<'b>() { // no\n r#\"no \"no\"#; \"n\\\"o\"; '\\''; 'n'; b'n'; /* no\n */ crate::c }";
    let found: Vec<_> = tokens(text).into_iter().map(|(_, token)| token).collect();
    assert_eq!(found.join(" "), "fn a < ' b > ( ) { ; ; ; ; ; crate :: c }");
    assert_eq!(parts("get_BigData"), ["get", "big", "data"]);
}

#[test]
fn imports_are_found_in_every_form() {
    let text = "use crate::{a::{x, y}, b, self::z};\nuse super::c;\nmod tests { use super::*; use super::super::d; }\ncrate::e::f();";
    let found = |path: &str| {
        let source = Source { path: path.to_owned(), text: text.to_owned() };
        imports(&source).into_iter().map(|(line, name)| format!("{name} {line}")).collect::<Vec<_>>()
    };
    assert_eq!(found("src/m.rs"), ["a 1", "b 1", "self 1", "crate 2", "crate 3", "e 4"]);
    assert_eq!(found("src/m/n.rs"), ["a 1", "b 1", "self 1", "e 4"]);
}
