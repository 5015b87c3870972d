//! The names of one kind of table: each stands once, and what refers to one must be known.

use std::cell::Cell;
use std::collections::HashMap;

use toml::Spanned;

use crate::config::error::ConfigError;
use crate::config::section::{ParsedField, TableHead, quoted};
use crate::config::suggest;

/// The tables of one kind, by their names.
pub(super) struct NameIndex<'w> {
    kind: &'static str,
    by_name: HashMap<&'w str, (&'w TableHead, usize), foldhash::fast::RandomState>,
    /// Whether every table has a name; where one has none, an unknown name may well be its own.
    complete: bool,
    /// How many more names may be compared to find a close one: 100,000 faults must not take minutes.
    looks: Cell<usize>,
}

/// How many names are compared in all before suggestions end.
const LOOKS: usize = 1_000_000;

impl<'w> NameIndex<'w> {
    /// No names yet, of a kind such as `pool`.
    pub(super) fn new(kind: &'static str) -> Self {
        Self { kind, by_name: HashMap::default(), complete: true, looks: Cell::new(LOOKS) }
    }

    /// Adds a table. A name that stands twice is a fault of the second.
    pub(super) fn add(
        &mut self,
        head: &'w TableHead,
        name: &ParsedField<String>,
        faults: &mut Vec<ConfigError>,
    ) {
        let Some(written) = head.name() else {
            self.complete = false;
            return;
        };
        let offset = name.spanned().map(|name| name.span().start);
        let entry = self.by_name.entry(written);
        if let (std::collections::hash_map::Entry::Occupied(first), Some(offset)) = (&entry, offset) {
            let (other, place) = first.get();
            let message = format!(
                "must be a name that no other {} has, found {} at {} too",
                self.kind,
                quoted(written),
                other.place(*place)
            );
            faults.push(head.fault_at(offset, "name", message));
        }
        entry.or_insert((head, offset.unwrap_or_default()));
    }

    /// Records a fault where a key names what is not there.
    pub(super) fn require(
        &self,
        head: &TableHead,
        key: &str,
        name: Option<&Spanned<String>>,
        faults: &mut Vec<ConfigError>,
    ) {
        let Some(name) = name else { return };
        let wanted = name.get_ref().as_str();
        if !self.complete || self.by_name.contains_key(wanted) {
            return;
        }
        let kind = self.kind;
        let hint = match self.closest(wanted) {
            Some(close) => format!(": did you mean \"{close}\"?"),
            None if self.by_name.is_empty() => format!(": no [[{kind}]] is configured"),
            None => String::new(),
        };
        let message = format!("must name a configured {kind}, found {}{hint}", quoted(wanted));
        faults.push(head.fault_at(name.span().start, key, message));
    }

    fn closest(&self, wanted: &str) -> Option<&'w str> {
        self.looks.set(self.looks.get().checked_sub(self.by_name.len())?);
        let mut names: Vec<&str> = self.by_name.keys().copied().collect();
        names.sort_unstable();
        suggest::closest(wanted, names.into_iter())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::error::SourceText;
    use toml::de::DeTable;

    fn head(name: &str) -> TableHead {
        let text = format!("name = \"{name}\"");
        let table = DeTable::parse(&text).unwrap().into_inner();
        TableHead::named("pool", 1, &Arc::new(SourceText::new("a.toml".into(), 0, "")), 0, &table)
    }

    #[test]
    fn suggestions_end_when_they_have_cost_enough() {
        let (first, second) = (head("shared"), head("other"));
        let mut names = NameIndex::new("pool");
        let mut faults = Vec::new();
        for head in [&first, &second] {
            names.add(head, &ParsedField::Absent, &mut faults);
        }
        names.looks.set(3);
        for _ in 0..2 {
            names.require(&first, "pool", Some(&Spanned::new(0..0, "shard".to_owned())), &mut faults);
        }
        let [with, without] = faults.as_slice() else { panic!("two faults") };
        assert!(with.message().ends_with("found \"shard\": did you mean \"shared\"?"));
        assert!(without.message().ends_with("found \"shard\""));
    }
}
