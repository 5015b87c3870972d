//! The files: the main one, those that it includes, and the tables that stand in each.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::DeTable;

use super::error::{ConfigError, ConfigErrors, SourceText};
use super::raw::RawConfig;
use super::section::{ParsedField, ParsedList, Section, TableHead, into_array, into_table, quoted, shown};
use super::table::{Headed, RawTable, Table};
use super::tables::{RawInclude, TABLES};

/// Reads a file and all that it includes. Faults of form are handed on with what could be read.
///
/// # Errors
/// Where a file cannot be read or is no TOML: then too much is missing to say what the rest means.
pub(super) fn read(path: &Path) -> Result<RawConfig, ConfigErrors> {
    let mut reading = ConfigReader::default();
    if let Some((source, text)) = reading.open(path) {
        reading.main(&source, &text, path);
    }
    reading.finish()
}

/// Reads a text that stands in no file, and all that it includes from the working directory.
///
/// # Errors
/// As [`read`].
pub(super) fn parse(name: &str, text: &str) -> Result<RawConfig, ConfigErrors> {
    let mut reading = ConfigReader::default();
    let source = reading.source(name.into(), text);
    reading.main(&source, text, Path::new(""));
    reading.finish()
}

/// The patterns that a main file includes; `None` where that cannot be told.
pub(super) fn includes(path: &Path) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(path).ok()?;
    let tables = DeTable::parse(&text).ok()?.into_inner();
    let Some(include) = tables.get("include") else { return Some(Vec::new()) };
    let patterns = include.get_ref().as_array()?.iter();
    patterns.map(|pattern| pattern.get_ref().as_str().map(str::to_owned)).collect()
}

/// The state while files are read.
#[derive(Default)]
struct ConfigReader {
    written: RawConfig,
    files: usize,
    /// A part is missing, so that what refers to it cannot be judged.
    broken: bool,
}

/// What an included file may hold.
const INCLUDED: &str = "[[tenant]], [[pool]] and [[listener]]";

impl ConfigReader {
    fn finish(self) -> Result<RawConfig, ConfigErrors> {
        if self.broken { Err(ConfigErrors::sorted(self.written.faults)) } else { Ok(self.written) }
    }

    fn source(&mut self, name: Arc<str>, text: &str) -> Arc<SourceText> {
        let order = self.files;
        self.files += 1;
        Arc::new(SourceText::new(name, order, text))
    }

    /// Reads a file's text, in UTF-8.
    fn open(&mut self, path: &Path) -> Option<(Arc<SourceText>, String)> {
        let name: Arc<str> = path.display().to_string().into();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.broken = true;
                let message = format!("must be readable, found: {}", without_number(&error));
                self.written.faults.push(ConfigError::of_file(name, self.files, message));
                self.files += 1;
                return None;
            }
        };
        match String::from_utf8(bytes) {
            Ok(text) => Some((self.source(name, &text), text)),
            Err(error) => {
                self.broken = true;
                let offset = error.utf8_error().valid_up_to();
                let byte = error.as_bytes().get(offset).copied().unwrap_or_default();
                let source = self.source(name, &String::from_utf8_lossy(error.as_bytes()));
                let message = format!("must be UTF-8, found the byte 0x{byte:02X}");
                self.written.faults.push(source.fault(offset, "text".to_owned(), message));
                None
            }
        }
    }

    fn main(&mut self, source: &Arc<SourceText>, text: &str, path: &Path) {
        let Some(tables) = self.tables(source, text) else { return };
        let head = TableHead::single("", source, 0);
        let mut faults = std::mem::take(&mut self.written.faults);
        let mut section = Section::open(&head, tables, &mut faults);
        let include = RawInclude::take(&mut section).include;
        self.singles(source, &mut section);
        self.many(source, &mut section);
        section.finish();
        self.written.faults.append(&mut faults);
        self.include(&head, &include, path);
        self.written.head = Some(head);
    }

    fn included(&mut self, path: &Path) {
        let Some((source, text)) = self.open(path) else { return };
        let Some(tables) = self.tables(&source, &text) else { return };
        let head = TableHead::single("", &source, 0);
        let mut faults = std::mem::take(&mut self.written.faults);
        let mut section = Section::open(&head, tables, &mut faults);
        if let ParsedField::Given(include) = section.take_raw("include") {
            let found = shown(include.get_ref());
            let message =
                format!("must be in the main file; an included file cannot include others, found {found}");
            section.fault_at(include.span().start, "include", message);
        }
        for key in TABLES.iter().filter(|table| is_single(table)).map(Table::name) {
            if let ParsedField::Given(single) = section.take_raw(key) {
                let message = format!(
                    "must be in the main file; an included file holds only {INCLUDED}, found [{key}]"
                );
                section.fault_at(single.span().start, key, message);
            }
        }
        self.many(&source, &mut section);
        section.finish();
        self.written.faults.append(&mut faults);
    }

    /// Parses a text as TOML. A key that stands twice leaves the rest readable; other faults do not.
    fn tables<'i>(&mut self, source: &Arc<SourceText>, text: &'i str) -> Option<DeTable<'i>> {
        let (tables, errors) = DeTable::parse_recoverable(text);
        let mut whole = true;
        for error in errors {
            let span = error.span().unwrap_or(text.len()..text.len());
            let found = text.get(span.clone()).unwrap_or_default();
            let before = text.get(..span.start).unwrap_or_default();
            let header = before.rsplit('\n').next().is_some_and(|line| line.trim_start().starts_with('['));
            whole &= error.message() == DUPLICATE && !header;
            let rest = text.get(span.start..).unwrap_or_default();
            let message = syntax(error.message(), found, rest, header);
            self.written.faults.push(source.fault(span.start, "syntax".to_owned(), message));
        }
        self.broken |= !whole;
        whole.then(|| tables.into_inner())
    }

    /// Takes the tables that stand once.
    fn singles(&mut self, source: &Arc<SourceText>, section: &mut Section<'_, '_>) {
        let written = &mut self.written;
        written.process = single(source, section);
        written.admin = single(source, section);
        written.health = single(source, section);
        written.log = single(source, section);
        written.timeouts = single(source, section);
        written.drain = single(source, section);
        written.dns = single(source, section);
        written.tenant_defaults = single(source, section);
    }

    /// Takes the tables that stand many times.
    fn many(&mut self, source: &Arc<SourceText>, section: &mut Section<'_, '_>) {
        let listeners = self.each(source, section);
        self.written.listeners.extend(listeners);
        let pools = self.each(source, section);
        self.written.pools.extend(pools);
        let tenants = self.each(source, section);
        self.written.tenants.extend(tenants);
    }

    /// Takes every table of a kind.
    fn each<R: RawTable>(
        &mut self,
        source: &Arc<SourceText>,
        section: &mut Section<'_, '_>,
    ) -> Vec<Headed<R>> {
        let kind = R::TABLE.name();
        let value = match section.take_raw(kind) {
            ParsedField::Given(value) => value,
            ParsedField::Absent => return Vec::new(),
            ParsedField::Faulty => {
                self.broken = true;
                return Vec::new();
            }
        };
        let offset = value.span().start;
        let must = format!("must be written as [[{kind}]], one table for each");
        let values = match into_array(value.into_inner()) {
            Ok(values) => values,
            Err(other) => {
                self.broken = true;
                let found = if other.is_table() { format!("[{kind}]") } else { shown(&other) };
                section.fault_at(offset, kind, format!("{must}, found {found}"));
                return Vec::new();
            }
        };
        let mut tables = Vec::with_capacity(values.len());
        for (before, value) in values.into_iter().enumerate() {
            let offset = value.span().start;
            match into_table(value.into_inner()) {
                Ok(table) => {
                    let head = TableHead::named(kind, before + 1, source, offset, &table);
                    tables.push(Headed::read(head, table, section.faults()));
                }
                Err(other) => {
                    self.broken = true;
                    section.fault_at(offset, kind, format!("{must}, found {}", shown(&other)));
                }
            }
        }
        tables
    }

    /// Reads what the main file includes, each file once.
    fn include(&mut self, head: &TableHead, patterns: &ParsedField<ParsedList<String>>, main: &Path) {
        let folder = main.parent().unwrap_or(Path::new(""));
        self.broken |= patterns.given().map_or(!patterns.is_absent(), |list| !list.complete);
        let mut seen: HashSet<PathBuf> = identity(main).into_iter().collect();
        for pattern in patterns.given().map(|list| list.items.as_slice()).unwrap_or_default() {
            let files = match matching(folder, pattern.get_ref()) {
                Ok(files) => files,
                Err(message) => {
                    self.broken = true;
                    self.written.faults.push(head.fault_at(pattern.span().start, "include", message));
                    continue;
                }
            };
            for file in files {
                if identity(&file).is_none_or(|file| seen.insert(file)) {
                    self.included(&file);
                }
            }
        }
    }
}

/// Whether a table stands once, and in the main file only.
fn is_single(table: &Table) -> bool {
    !table.name().is_empty() && !table.heading.starts_with("[[") && !table.name().contains('.')
}

/// Takes a table that stands once.
fn single<R: RawTable>(source: &Arc<SourceText>, section: &mut Section<'_, '_>) -> Option<Headed<R>> {
    let ParsedField::Given(table) = section.take_table(R::TABLE.name()) else { return None };
    let head = TableHead::single(R::TABLE.name(), source, table.span().start);
    Some(Headed::read(head, table.into_inner(), section.faults()))
}

/// What the TOML parser says of a key that stands twice.
const DUPLICATE: &str = "duplicate key";

/// The files that a pattern names, relative to a folder, in order.
pub(super) fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
    let shown = quoted(pattern);
    if !pattern.contains(['*', '?', '[']) {
        let file = folder.join(pattern);
        let there = file.try_exists().unwrap_or(true);
        return if there && !pattern.is_empty() {
            Ok(vec![file])
        } else {
            Err(format!("must name an existing file, or contain a \"*\" if it may match none, found {shown}"))
        };
    }
    // The folder is a path, not a pattern: its brackets are literal.
    let within = glob::Pattern::escape(&folder.display().to_string());
    let pattern = Path::new(&within).join(pattern);
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let files = glob::glob_with(&pattern.display().to_string(), options).map_err(|error| {
        format!("must be a path with \"*\", \"?\" or \"[...]\" in it, found {shown}: {}", error.msg)
    })?;
    // A folder that cannot be listed is returned like a file: reading it then reports the error.
    Ok(files.map(|file| file.unwrap_or_else(|error| error.path().to_owned())).collect())
}

/// What tells two names of one file apart from two files.
fn identity(file: &Path) -> Option<PathBuf> {
    file.canonicalize().ok()
}

/// The system's words for an error, without its number.
fn without_number(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

/// What the TOML parser found, in the form of the other faults; `rest` is the text from there on.
fn syntax(message: &str, found: &str, rest: &str, header: bool) -> String {
    if message == DUPLICATE {
        return if header {
            format!("must have each table once, found [{found}] again")
        } else {
            format!("must have each key once in its table, found {found} again")
        };
    }
    let found = match (found.lines().next(), rest.lines().next()) {
        (Some(found), _) if !found.is_empty() => quoted(found),
        (_, Some(rest)) if !rest.is_empty() => quoted(rest),
        (_, Some(_)) => "the end of the line".to_owned(),
        (_, None) => "the end of the file".to_owned(),
    };
    // A bare word that begins like "inf" or "nan" is parsed as a float.
    let hint = if message.starts_with("invalid float") { "; a text needs quotes" } else { "" };
    format!("must be TOML, found {found}: {message}{hint}")
}
