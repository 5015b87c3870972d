//! Names of the source: each type name is declared once, and words of the old private vocabulary are absent.

use std::collections::BTreeMap;

use super::{Source, none, sources, tokens};

/// Words that make a sentence a riddle, in comments, messages and names.
const RIDDLES: [&str; 6] = ["nobody", "whoever", "somebody", "anybody", "everybody", "how-many"];

/// Names of the old vocabulary; docs/architecture.md has the terms that replace them.
const OLD_NAMES: [&str; 24] = [
    "Door", "Shop", "Crew", "Desk", "Life", "Purse", "Pacer", "Lent", "Story", "Told", "Marks", "Nobody",
    "Ground", "Vitals", "Chart", "Standing", "Roster", "Way", "Patience", "Spill", "Cut", "Leaving",
    "EachWay", "Ledger",
];

/// The riddles of a line.
fn riddles(line: &str) -> Vec<&'static str> {
    let line = line.to_lowercase();
    let words = line.split(|c: char| !c.is_alphanumeric() && c != '-');
    words.filter_map(|word| RIDDLES.into_iter().find(|riddle| *riddle == word)).collect()
}

/// The types that a file declares outside of its tests, with their lines.
fn declared(source: &Source) -> Vec<(usize, String)> {
    let tokens = tokens(source.text.split("\nmod tests {").next().unwrap_or_default());
    let is_type =
        |pair: &&[(usize, String)]| matches!(pair[0].1.as_str(), "struct" | "enum" | "trait" | "union");
    tokens.windows(2).filter(is_type).map(|pair| pair[1].clone()).filter(|(_, name)| name != "$").collect()
}

#[test]
fn type_names_are_declared_once() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources(&["src"]) {
        for (line, name) in declared(&source) {
            places.entry(name).or_default().push(format!("{}:{line}", source.path));
        }
    }
    assert!(places.len() > 300, "{} types", places.len());
    places.retain(|_, places| places.len() > 1);
    none(&places.iter().map(|(name, places)| format!("{name}: {}", places.join(", "))).collect::<Vec<_>>());
}

#[test]
fn source_has_no_forbidden_words() {
    let mut faults = Vec::new();
    for source in sources(&["src"]) {
        for (number, line) in (1..).zip(source.text.lines()) {
            faults.extend(
                riddles(line).into_iter().map(|word| format!("{}:{number}: the word {word}", source.path)),
            );
        }
        let old = tokens(&source.text).into_iter().filter(|(_, token)| OLD_NAMES.contains(&token.as_str()));
        faults.extend(old.map(|(line, name)| format!("{}:{line}: the old name {name}", source.path)));
    }
    none(&faults);
}

#[test]
fn riddles_and_declarations_are_found() {
    assert_eq!(riddles("/// Nobody's turn, and (whoever) waits"), ["nobody", "whoever"]);
    assert_eq!(riddles("busybody"), [""; 0]);
    let text = "pub struct A;\n// struct B;\nenum C {}\ntrait D {}".to_owned();
    let names = declared(&Source { path: String::new(), text });
    assert_eq!(names, [(1, "A".to_owned()), (3, "C".to_owned()), (4, "D".to_owned())]);
}
