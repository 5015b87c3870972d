//! Counts the differences between two configurations.

use std::collections::HashMap;

use crate::config::Config;

/// The number of added, removed and changed objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChangeCount {
    /// They are new.
    pub added: usize,
    /// They are there no more.
    pub removed: usize,
    /// They are not what they were.
    pub changed: usize,
}

/// The differences between two configurations, as counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigChanges {
    /// Listeners, by name.
    pub listeners: ChangeCount,
    /// Pools, by name.
    pub pools: ChangeCount,
    /// Tenants, by name.
    pub tenants: ChangeCount,
}

impl ConfigChanges {
    /// Compares them.
    #[must_use]
    pub fn between(before: &Config, after: &Config) -> Self {
        Self {
            listeners: ChangeCount::between(&before.listeners, &after.listeners, |listener| &listener.name),
            pools: ChangeCount::between(&before.pools, &after.pools, |pool| &pool.name),
            tenants: ChangeCount::between(&before.tenants, &after.tenants, |tenant| &tenant.name),
        }
    }
}

impl ChangeCount {
    fn between<T: PartialEq>(before: &[T], after: &[T], name: impl Fn(&T) -> &String) -> Self {
        let mut count = Self::default();
        // Most entries have the same position as before and need no lookup table.
        let same = before.iter().zip(after).take_while(|(before, after)| name(before) == name(after));
        let mut first = 0;
        for (before, after) in same {
            first += 1;
            count.changed += usize::from(before != after);
        }
        let (before, after) =
            (before.get(first..).unwrap_or_default(), after.get(first..).unwrap_or_default());
        let mut known: HashMap<_, _> = before.iter().map(|before| (name(before), before)).collect();
        for after in after {
            match known.remove(name(after)) {
                Some(before) => count.changed += usize::from(before != after),
                None => count.added += 1,
            }
        }
        count.removed = known.len();
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_removed_and_changed_objects_are_counted() {
        let all = |names: &[(&str, u8)]| -> Vec<(String, u8)> {
            names.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
        };
        let before = all(&[("a", 1), ("b", 1), ("c", 1), ("d", 1)]);
        let after = all(&[("a", 2), ("c", 1), ("e", 1), ("d", 2), ("f", 1)]);
        let count = ChangeCount::between(&before, &after, |(name, _)| name);
        assert_eq!(count, ChangeCount { added: 2, removed: 1, changed: 2 });
        assert_eq!(ChangeCount::between(&before, &before, |(name, _)| name), ChangeCount::default());
    }
}
