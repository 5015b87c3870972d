//! The parts of the contract that this version does not build: recognised, and refused instead of ignored.

use toml::de::DeValue;

/// One key that is refused. Once it is built, its line goes.
pub(super) struct Part {
    /// The kind of table that holds it.
    table: &'static str,
    /// The key.
    pub(super) key: &'static str,
    refused: Refused,
    /// What must hold, to stand before ", found".
    pub(super) must: &'static str,
}

/// Which values of a key are refused.
enum Refused {
    /// Each.
    All,
    /// Each but the one that asks for nothing.
    AllBut(fn(&DeValue<'_>) -> bool),
}

/// What becomes of a value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It asks for nothing, and nobody reads it.
    Inert,
    /// It is a fault.
    Refused,
}

impl Part {
    /// Judges a value of the key.
    pub(super) fn verdict(&self, value: &DeValue<'_>) -> Verdict {
        match self.refused {
            Refused::AllBut(inert) if inert(value) => Verdict::Inert,
            Refused::All | Refused::AllBut(_) => Verdict::Refused,
        }
    }
}

/// The refused keys of a kind of table.
pub(super) fn parts_of(kind: &str) -> impl Iterator<Item = &'static Part> {
    UNBUILT.iter().filter(move |part| part.table == kind)
}

use Refused::{All, AllBut};

#[rustfmt::skip]
const UNBUILT: &[Part] = &[
    part("process", "watch", AllBut(is_false), "must be false: reloading when a file changes is not built in this version"),
    part("admin", "socket", All, "must be absent: the control socket is not built in this version"),
];

const fn part(table: &'static str, key: &'static str, refused: Refused, must: &'static str) -> Part {
    Part { table, key, refused, must }
}

fn is_false(value: &DeValue<'_>) -> bool {
    value.as_bool() == Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(table: &str, key: &str, value: &str) -> Verdict {
        let value = DeValue::parse(value).unwrap();
        let part = parts_of(table).find(|part| part.key == key).unwrap();
        part.verdict(value.get_ref())
    }

    #[test]
    fn values_that_ask_for_nothing_are_inert() {
        assert_eq!(verdict("process", "watch", "false"), Verdict::Inert);
        for value in ["true", "0", "\"false\""] {
            assert_eq!(verdict("process", "watch", value), Verdict::Refused, "{value}");
        }
    }

    #[test]
    fn every_message_says_that_it_is_not_built() {
        assert!(UNBUILT.iter().all(
            |part| part.must.starts_with("must be ") && part.must.contains(" not built in this version")
        ));
        assert_eq!(verdict("admin", "socket", "\"/run/x\""), Verdict::Refused);
        assert_eq!(parts_of("pool").count(), 0);
    }
}
