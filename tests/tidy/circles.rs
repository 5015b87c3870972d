//! Circles inside a room: of two modules with the same parent, only one may use the other, directly or through others.
//!
//! What a module's children use, it uses. A child may use its parent and a parent its children: they are one thing.

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, none, sources, tokens};

/// A module, or a path that begins with one: the names from the crate's root on.
type Names = Vec<String>;

/// For each module, those that it uses, with the first place where it does.
type Uses = BTreeMap<Names, BTreeMap<Names, String>>;

/// What a file names.
struct Named {
    /// Each path with its line.
    paths: Vec<(usize, Names)>,
    /// The names that it imports, each with the path that it stands for.
    imports: BTreeMap<String, Names>,
}

#[test]
fn modules_of_a_room_do_not_use_each_other_in_circles() {
    none(&circles(&sources(&["src"])));
}

/// One line for each use that is part of a circle.
fn circles(sources: &[Source]) -> Vec<String> {
    let files: BTreeMap<Names, &Source> =
        sources.iter().filter_map(|source| Some((module(source)?, source))).collect();
    let named: BTreeMap<&Names, Named> =
        files.iter().map(|(module, source)| (module, named(&source.text, module, &files))).collect();
    let mut uses = Uses::new();
    for (module, source) in &files {
        for (line, path) in &named[module].paths {
            let target = declared_in(path, &named);
            let common = module.iter().zip(&target).take_while(|(own, other)| own == other).count();
            // Otherwise another room, itself, a parent or a child.
            if common > 0 && common < module.len().min(target.len()) {
                let place = format!("{}:{line}", source.path);
                let own = uses.entry(module[..=common].to_vec()).or_default();
                own.entry(target[..=common].to_vec()).or_insert(place);
            }
        }
    }
    let mut found = Vec::new();
    for (module, used) in &uses {
        for (other, place) in used.iter().filter(|(other, _)| reaches(other, module, &uses)) {
            let (module, other) = (module.join("::"), other.join("::"));
            found
                .push(format!("{place}: {module} uses {other}, which uses {module}, perhaps through others"));
        }
    }
    found
}

/// Whether a module uses another one, directly or through others.
fn reaches(from: &Names, to: &Names, uses: &Uses) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        if seen.insert(module) {
            next.extend(uses.get(module).into_iter().flat_map(BTreeMap::keys));
        }
    }
    seen.contains(to)
}

/// The module of a file; none for the crate's roots and for tests.
fn module(source: &Source) -> Option<Names> {
    let path = source.path.strip_prefix("src/")?.strip_suffix(".rs")?;
    let module: Names = path.split('/').map(str::to_owned).collect();
    (path != "lib" && path != "main" && !module.iter().any(|name| name == "tests")).then_some(module)
}

/// The module that declares what a path leads to, through the imports of others.
fn declared_in(path: &[String], named: &BTreeMap<&Names, Named>) -> Names {
    let mut path = path.to_vec();
    loop {
        let is_module = |len: &usize| named.contains_key(&path[..*len].to_vec());
        let (module, rest) = path.split_at((1..=path.len()).rev().find(is_module).unwrap_or(0));
        let import = rest.first().and_then(|name| named.get(&module.to_vec())?.imports.get(name));
        let Some(import) = import else { return module.to_vec() };
        path = import.iter().chain(&rest[1..]).cloned().collect();
    }
}

/// What a module's file names outside of its tests.
fn named(text: &str, module: &Names, files: &BTreeMap<Names, &Source>) -> Named {
    let tokens = tokens(text);
    let is_tests = |three: &[(usize, String)]| three.iter().map(|token| &token.1).eq(["mod", "tests", "{"]);
    let tokens = &tokens[..tokens.windows(3).position(is_tests).unwrap_or(tokens.len())];
    let token = |at: usize| tokens.get(at).map_or("", |token| token.1.as_str());
    let mut named = Named { paths: Vec::new(), imports: BTreeMap::new() };
    for start in (0..tokens.len()).filter(|start| token(start + 1) == "::") {
        let before = start.checked_sub(1).map_or("", token);
        let child = || Some([&module[..], &[token(start).to_owned()]].concat());
        let root = match token(start) {
            // The middle of a path, and `pub(in ...)`.
            _ if matches!(before, "::" | "in") => None,
            "crate" => Some(Vec::new()),
            "self" => Some(module.clone()),
            "super" => Some(module[..module.len() - 1].to_vec()),
            _ => child().filter(|child| files.contains_key(child)),
        };
        let Some(root) = root else { continue };
        let mut found = Vec::new();
        read_tree(tokens, start + 1, root, &mut found);
        for (line, path, name) in found {
            if before == "use" {
                named.imports.insert(name, path.clone());
            }
            named.paths.push((line, path));
        }
    }
    named
}

/// Reads on behind the start of a path: each path that it leads to, with its line and the name that it has from here on. Returns
/// where it ends.
fn read_tree(
    tokens: &[(usize, String)],
    mut at: usize,
    mut path: Names,
    found: &mut Vec<(usize, Names, String)>,
) -> usize {
    let token = |at: usize| tokens.get(at).map_or("", |token| token.1.as_str());
    let line = tokens[at].0;
    while token(at) == "::" {
        at += 1;
        match token(at) {
            "{" => {
                at += 1;
                while !matches!(token(at), "}" | "") {
                    let mut branch = path.clone();
                    branch.extend((token(at) != "self").then(|| token(at).to_owned()));
                    at = read_tree(tokens, at + 1, branch, found);
                    at += usize::from(token(at) == ",");
                }
                return at + 1;
            }
            "super" => drop(path.pop()),
            // All names, and the types of a generic one.
            "*" | "<" => break,
            name => path.push(name.to_owned()),
        }
        at += 1;
    }
    let name = if token(at) == "as" { token(at + 1) } else { path.last().map_or("", String::as_str) };
    found.push((line, path.clone(), name.to_owned()));
    at + if token(at) == "as" { 2 } else { 0 }
}

#[test]
fn circles_are_found_through_children_and_imports() {
    let found = |c: &str| {
        let file = |path: &str, text: &str| Source { path: path.to_owned(), text: text.to_owned() };
        circles(&[
            file("src/r.rs", "mod a; mod b; mod c; use self::a::A; pub use self::c::{self, C as D};"),
            file("src/r/a.rs", "use super::R;\nuse super::b::{x::X};"),
            file("src/r/b.rs", "mod x;"),
            file("src/r/b/x.rs", "use super::super::D;\nmod tests { use super::super::super::a::A; }"),
            file("src/r/c.rs", c),
            file("src/s.rs", "use crate::r::a::A;"),
        ])
    };
    assert_eq!(found("use crate::s::S; pub(in crate::r) struct C;"), [""; 0]);
    let circle = found("\nfn c() { super::a::a(); }");
    let places: Vec<_> = circle.iter().map(|line| line.split_once(',').unwrap().0).collect();
    assert_eq!(
        places,
        ["src/r/a.rs:2: r::a uses r::b", "src/r/b/x.rs:1: r::b uses r::c", "src/r/c.rs:2: r::c uses r::a"]
    );
}
