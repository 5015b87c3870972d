//! The reference `config/reference.toml` and the manual page vestibule.toml(5), as the declared tables say.

use super::table::{Key, Presence, Table};

/// Where the generated part of the reference begins and where it ends.
const MARKS: [&str; 2] =
    ["# ---- All keys, generated from their declarations ----\n", "# ---- Examples ----\n"];

/// The column where comments begin, and that where lines end.
const COLUMNS: (usize, usize) = (36, 120);

/// The reference with its part between the marks generated anew.
#[must_use]
pub fn renewed(reference: &str, tables: &[Table]) -> String {
    let (before, rest) = reference.split_once(MARKS[0]).unwrap_or((reference, ""));
    let (_, after) = rest.split_once(MARKS[1]).unwrap_or(("", rest));
    [before, MARKS[0], "\n", &toml(tables), MARKS[1], after].concat()
}

/// The tables as a file that has every key. A key is a comment where it has no default, or may not stand with the others.
#[must_use]
pub fn toml(tables: &[Table]) -> String {
    let mut text = String::new();
    for table in tables {
        if !table.heading.is_empty() {
            push(&mut text, table.heading, table.doc);
        }
        for key in table.keys {
            let name = format!("{}.{}", table.name(), key.name);
            let is_comment = matches!(key.presence, Presence::Optional(_) | Presence::Conditional(_))
                || tables.iter().any(|other| other.name() == name);
            push(
                &mut text,
                &format!("{}{}", if is_comment { "# " } else { "" }, key.assignment()),
                &key.sentences(),
            );
        }
        text.push('\n');
    }
    text
}

/// Adds a line and its comment.
fn push(text: &mut String, line: &str, comment: &str) {
    let (start, end) = COLUMNS;
    let mut column = line.len().max(start - 2) + 2;
    text.extend([format!("{line:column$}#")]);
    for word in comment.split(' ') {
        if column + 2 + word.len() > end {
            text.extend([format!("\n{:start$}#", if line.starts_with("# ") { "#" } else { "" })]);
            column = start;
        }
        text.extend([" ", word]);
        column += 1 + word.len();
    }
    text.push('\n');
}

/// The tables as sections of a manual page, in roff.
#[must_use]
pub fn manual(tables: &[Table]) -> String {
    let mut page = String::new();
    for table in tables {
        let heading = if table.heading.is_empty() { "Top level" } else { table.heading };
        page.extend([".SS ", heading, "\n", &escaped(table.doc), "\n"]);
        if table.needs_restart {
            page.push_str("A change needs a restart or a takeover.\n");
        }
        for key in table.keys {
            let (line, text) = (escaped(&key.assignment()), escaped(&key.sentences()));
            page.extend([".TP\n\\fB", &line, "\\fR\n", &text, "\n"]);
        }
    }
    page
}

/// A text with nothing in it that roff takes for a command.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

impl Key {
    /// The key with its default, or with an example.
    fn assignment(&self) -> String {
        format!("{} = {}", self.name, self.presence.value())
    }

    /// What it does, what it must be, and what holds where it is absent.
    fn sentences(&self) -> String {
        let is_required = matches!(self.presence, Presence::Required(_));
        let mut text = if is_required { "Required. ".to_owned() } else { String::new() };
        text.extend(self.doc.chars().filter(|c| *c != '`'));
        let range = (self.range)();
        if !range.is_empty() {
            text.extend([" Must be ", &range, "."]);
        }
        let has_default = matches!(self.presence, Presence::Default(_) | Presence::Conditional(_));
        if !has_default && !is_required && !text.contains("efault:") && !text.contains("efault is") {
            text.push_str(" Default: none.");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::{Deserialize, Serialize};
    use toml::de::DeTable;

    use super::*;
    use crate::config::diff::render::keys;
    use crate::config::error::{ConfigErrors, SourceText};
    use crate::config::section::{Section, TableHead};
    use crate::config::table::{Field, Kind, RawTable, table};
    use crate::config::tables::TABLES;
    use crate::config::value::{Hours, Int};

    table! {
        "[mirror]", restart, "A table that only this test has.";
        RawMirror => #[expect(unreachable_pub, reason = "only this test has it")] MirrorConfig;
        keys {
            "copy-share" copy_share: Int<u32, 1, 100> => u32, default 7, "Percent of the sessions that are mirrored.";
            "longest-delay" longest_delay: Hours<2> => Duration, default "90m", "How long a copy may lag.";
            "target-name" target_name: String => Option<String>, optional "shadow", "The pool of the copies.";
        }
    }

    fn read(text: &str) -> Result<MirrorConfig, String> {
        let source = SourceText::new("mirror.toml".into(), 0, text).into();
        let mut faults = Vec::new();
        let table = DeTable::parse(text).unwrap().into_inner();
        let raw =
            RawMirror::read(Section::open(&TableHead::single("mirror", &source, 0), table, &mut faults));
        if faults.is_empty() { Ok(raw.into()) } else { Err(ConfigErrors::sorted(faults).to_string()) }
    }

    #[test]
    fn key_that_is_declared_once_is_read_and_has_its_default_and_its_messages() {
        let config = read("longest-delay = \"5m\"").unwrap();
        let longest_delay = Duration::from_secs(300);
        assert_eq!(config, MirrorConfig { copy_share: 7, longest_delay, target_name: None });
        let message = read("\ncopy-share = 0\nlongest-delay = \"121m\"\ntarget-nam = \"x\"").unwrap_err();
        assert_eq!(
            message,
            "mirror.toml:2: mirror: copy-share: must be a whole number from 1 to 100, found 0\n\
             mirror.toml:3: mirror: longest-delay: must be at most 2h, found 7260s\n\
             mirror.toml:4: mirror: target-nam: unknown key; did you mean \"target-name\"?"
        );
    }

    #[test]
    fn key_that_is_declared_once_is_in_the_reference_the_manual_and_the_difference() {
        let expected = "\
[mirror]                            # A table that only this test has.
copy-share = 7                      # Percent of the sessions that are mirrored. Must be from 1 to 100.
longest-delay = \"90m\"               # How long a copy may lag. Must be at most 2h.
# target-name = \"shadow\"            # The pool of the copies. Default: none.

";
        assert_eq!(toml(&[RawMirror::TABLE]), expected);
        let page = manual(&[RawMirror::TABLE]);
        assert!(
            page.starts_with(".SS [mirror]\nA table that only this test has.\nA change needs a restart"),
            "{page}"
        );
        let entry = ".TP\n\\fBlongest\\-delay = \"90m\"\\fR\nHow long a copy may lag. Must be at most 2h.\n";
        assert!(page.contains(entry), "{page}");
        let (before, after) = (read("").unwrap(), read("copy-share = 8\ntarget-name = \"x\"").unwrap());
        let changes: Vec<_> = keys(&before, &after).iter().map(ToString::to_string).collect();
        assert_eq!(changes, ["copy-share 7 -> 8", "target-name none -> x"]);
    }

    #[test]
    fn comments_are_wrapped() {
        let mut text = String::new();
        push(&mut text, "key = 1", &"word ".repeat(40));
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.len() <= COLUMNS.1), "{text}");
    }

    #[test]
    fn reference_is_generated() {
        let file = std::fs::read_to_string("config/reference.toml").unwrap();
        let renewed = renewed(&file, &TABLES);
        let wrong = "run: cargo run --example generate -- target/generated && cp target/generated/reference.toml config/";
        assert!(file == renewed, "config/reference.toml is not what the declarations say; {wrong}");
    }
}
