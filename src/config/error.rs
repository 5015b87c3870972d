//! Faults of a configuration: `file:line: where: what must hold, what was found`.

use std::fmt;
use std::sync::Arc;

/// One error of a configuration, with its file and line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    file: Arc<str>,
    /// The file's place among those that were read, and the byte in it: what faults are sorted by.
    order: (usize, usize),
    line: Option<usize>,
    subject: String,
    message: String,
}

impl ConfigError {
    /// A fault of a whole file; `order` is the file's place among those that were read.
    pub(super) fn of_file(file: Arc<str>, order: usize, message: String) -> Self {
        Self { file, order: (order, 0), line: None, subject: String::new(), message }
    }

    /// The file, as the operator named it.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The line, from 1; none where the file could not be read.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        self.line
    }

    /// The table and the key, such as `tenant "acme": pool`; empty where the fault is the whole file's.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The rule, and what was found.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.subject.is_empty() {
            write!(f, ": {}", self.subject)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

/// All errors of a configuration, ordered by file and line. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Sorts the errors, and drops duplicates.
    pub(super) fn sorted(mut faults: Vec<ConfigError>) -> Self {
        faults.sort_by(|a, b| (a.order, &a.subject).cmp(&(b.order, &b.subject)));
        faults.dedup();
        Self(faults)
    }

    /// The count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none; a configuration without faults is returned instead.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each of them, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.0.iter()
    }
}

impl<'f> IntoIterator for &'f ConfigErrors {
    type Item = &'f ConfigError;
    type IntoIter = std::slice::Iter<'f, ConfigError>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, fault) in self.iter().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            fmt::Display::fmt(fault, f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A source text: its name, and the offsets of its lines.
#[derive(Debug)]
pub(super) struct SourceText {
    name: Arc<str>,
    order: usize,
    starts: Vec<usize>,
}

impl SourceText {
    /// The `order`-th text.
    pub(super) fn new(name: Arc<str>, order: usize, text: &str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Self { name, order, starts: ends.map(|(end, _)| end + 1).collect() }
    }

    /// The line of a byte, from 1.
    fn line(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset) + 1
    }

    /// `file:line` of a byte, for a message that names a second place.
    pub(super) fn place(&self, offset: usize) -> String {
        format!("{}:{}", self.name, self.line(offset))
    }

    /// An error at a byte.
    pub(super) fn fault(&self, offset: usize, subject: String, message: String) -> ConfigError {
        let (file, order) = (Arc::clone(&self.name), (self.order, offset));
        ConfigError { file, order, line: Some(self.line(offset)), subject, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_offset_is_on_the_line_where_it_begins() {
        let source = SourceText::new("a.toml".into(), 0, "x\n\nyz\n");
        let lines: Vec<usize> = (0..7).map(|offset| source.line(offset)).collect();
        assert_eq!(lines, [1, 1, 2, 3, 3, 3, 4]);
        assert_eq!(source.place(4), "a.toml:3");
    }

    #[test]
    fn errors_are_sorted_by_file_and_line_without_duplicates() {
        let first = SourceText::new("z.toml".into(), 0, "\n\n");
        let second = SourceText::new("a.toml".into(), 1, "");
        let unread = ConfigError::of_file("b.toml".into(), 2, "must be readable, found: nothing".into());
        let faults = ConfigErrors::sorted(vec![
            unread.clone(),
            second.fault(0, "log: level".into(), "three".into()),
            first.fault(2, "b".into(), "two".into()),
            first.fault(2, "b".into(), "two".into()),
            first.fault(1, "c".into(), "one".into()),
        ]);
        let expected = "z.toml:2: c: one\nz.toml:3: b: two\na.toml:1: log: level: three\n\
                        b.toml: must be readable, found: nothing";
        assert_eq!(faults.to_string(), expected);
        assert_eq!((faults.len(), faults.is_empty()), (4, false));
        let parts: Vec<_> =
            faults.iter().map(|fault| (fault.file(), fault.line(), fault.subject())).collect();
        assert_eq!(parts.last(), Some(&("b.toml", None, "")));
        assert_eq!((&faults).into_iter().last().map(ConfigError::message), Some(unread.message()));
    }
}
