//! A reader of one TOML table that collects every fault instead of stopping at the first.

use std::collections::BTreeMap;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::error::{ConfigError, SourceText};
use super::suggest;

/// What a key may hold where it is one value.
pub(super) trait FromToml {
    /// The value.
    type Value;

    /// Reads the value.
    ///
    /// # Errors
    /// What must hold and what was found, for the operator to read.
    fn from_toml(value: &DeValue<'_>) -> Result<Self::Value, String>;

    /// What the value must be, to follow "must be"; empty where the type says enough.
    fn range() -> String {
        String::new()
    }
}

/// The value of a key.
#[derive(Clone, Debug, Default)]
pub(super) enum ParsedField<T> {
    /// Nothing: the default holds.
    #[default]
    Absent,
    /// Something that is a fault already: no rule needs to speak of it again.
    Faulty,
    /// A value, and the bytes where it stands.
    Given(Spanned<T>),
}

impl<T> ParsedField<T> {
    /// The value, where there is one.
    pub(super) fn given(&self) -> Option<&T> {
        self.spanned().map(Spanned::get_ref)
    }

    /// The value and where it stands.
    pub(super) fn spanned(&self) -> Option<&Spanned<T>> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Faulty => None,
        }
    }

    /// Whether the key is absent.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    /// The value, where there is one.
    pub(super) fn value(self) -> Option<T> {
        match self {
            Self::Given(value) => Some(value.into_inner()),
            Self::Absent | Self::Faulty => None,
        }
    }
}

/// A list of values, as far as they could be read.
#[derive(Clone, Debug)]
pub(super) struct ParsedList<T> {
    /// Those that could be read.
    pub(super) items: Vec<Spanned<T>>,
    /// Whether these are all that were written.
    pub(super) complete: bool,
}

impl<T> ParsedList<T> {
    /// Whether nothing was written between the brackets.
    pub(super) fn is_empty(&self) -> bool {
        self.complete && self.items.is_empty()
    }
}

impl<T> From<ParsedList<T>> for Vec<T> {
    fn from(list: ParsedList<T>) -> Self {
        list.items.into_iter().map(Spanned::into_inner).collect()
    }
}

/// Keys that the operator chose, and their texts.
#[derive(Clone, Debug)]
pub(super) struct ParsedPairs(pub(super) Vec<(Spanned<String>, Spanned<String>)>);

impl From<ParsedPairs> for BTreeMap<String, String> {
    fn from(pairs: ParsedPairs) -> Self {
        pairs.0.into_iter().map(|(key, value)| (key.into_inner(), value.into_inner())).collect()
    }
}

/// The kind, name and place of a table.
#[derive(Clone, Debug)]
pub(super) struct TableHead {
    kind: &'static str,
    /// The table's own name, as far as there is one; it may be malformed.
    name: Option<String>,
    /// Which of its kind in its file, from 1; 0 where the kind stands once.
    number: usize,
    source: Arc<SourceText>,
    offset: usize,
}

impl TableHead {
    /// A table that stands once, such as `[process]`. The file itself is the one of kind "".
    pub(super) fn single(kind: &'static str, source: &Arc<SourceText>, offset: usize) -> Self {
        Self { kind, name: None, number: 0, source: Arc::clone(source), offset }
    }

    /// A table that stands many times and has a name, such as `[[tenant]]`.
    pub(super) fn named(
        kind: &'static str,
        number: usize,
        source: &Arc<SourceText>,
        offset: usize,
        table: &DeTable<'_>,
    ) -> Self {
        let name = table.get("name").and_then(|name| name.get_ref().as_str()).map(str::to_owned);
        Self { kind, name, number, source: Arc::clone(source), offset }
    }

    /// The table's own name.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The byte where the table begins.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// The table as messages name it: `process`, `tenant "acme"`, `tenant #3`.
    pub(super) fn title(&self) -> String {
        match (&self.name, self.number) {
            (Some(name), _) => format!("{} {}", self.kind, quoted(name)),
            (None, 0) => self.kind.to_owned(),
            (None, number) => format!("{} #{number}", self.kind),
        }
    }

    /// `file:line` of a byte of the table's file.
    pub(super) fn place(&self, offset: usize) -> String {
        self.source.place(offset)
    }

    /// A fault of a key, at a byte.
    pub(super) fn fault_at(&self, offset: usize, key: &str, message: String) -> ConfigError {
        let title = self.title();
        let subject = if title.is_empty() { key.to_owned() } else { format!("{title}: {key}") };
        self.source.fault(offset, subject, message)
    }

    /// A fault of a key that is not there: it stands where the table begins.
    pub(super) fn fault(&self, key: &str, message: String) -> ConfigError {
        self.fault_at(self.offset, key, message)
    }
}

/// A table while its keys are taken out of it.
pub(super) struct Section<'i, 'f> {
    head: &'f TableHead,
    /// What stands before a key in messages, such as `health.`.
    prefix: &'static str,
    /// Where the table begins.
    offset: usize,
    table: DeTable<'i>,
    known: Vec<&'static str>,
    faults: &'f mut Vec<ConfigError>,
}

impl<'i, 'f> Section<'i, 'f> {
    /// Opens a table of the kind that its head names.
    pub(super) fn open(head: &'f TableHead, table: DeTable<'i>, faults: &'f mut Vec<ConfigError>) -> Self {
        Self { head, prefix: "", offset: head.offset, table, known: Vec::new(), faults }
    }

    /// Opens a table within this one, which begins at `offset`; `prefix` stands before its keys in messages.
    pub(super) fn nested(&mut self, prefix: &'static str, table: Spanned<DeTable<'i>>) -> Section<'i, '_> {
        let (offset, table) = (table.span().start, table.into_inner());
        Section { head: self.head, prefix, offset, table, known: Vec::new(), faults: self.faults }
    }

    /// Declares known keys beforehand: one that is there is no typo for a similar one that is absent.
    pub(super) fn know(&mut self, keys: impl Iterator<Item = &'static str>) {
        self.known.extend(keys);
    }

    /// Records a fault of a key, at a byte.
    pub(super) fn fault_at(&mut self, offset: usize, key: &str, message: String) {
        let key = format!("{}{key}", self.prefix);
        self.faults.push(self.head.fault_at(offset, &key, message));
    }

    /// Where faults of tables that were taken out of this one go.
    pub(super) fn faults(&mut self) -> &mut Vec<ConfigError> {
        self.faults
    }

    /// Takes a value as it stands.
    pub(super) fn take_raw(&mut self, key: &'static str) -> ParsedField<DeValue<'i>> {
        self.known.push(key);
        match self.table.remove(key) {
            Some(value) => ParsedField::Given(value),
            // The misspelt key is already reported, so its absence is not reported as well.
            None if self.is_misspelt(key) => ParsedField::Faulty,
            None => ParsedField::Absent,
        }
    }

    /// Whether a key that is left is a slip for `key`. Compares few keys, for there are 100,000 tables of them.
    fn is_misspelt(&self, key: &str) -> bool {
        self.table.keys().map(Spanned::get_ref).any(|left| {
            left.len().abs_diff(key.len()) <= 3
                && left.bytes().next() == key.bytes().next()
                && !self.known.contains(&left.as_ref())
                && suggest::closest(left, std::iter::once(key)).is_some()
        })
    }

    /// Takes the value of a key.
    pub(super) fn take<T: FromToml>(&mut self, key: &'static str) -> ParsedField<T::Value> {
        match self.take_raw(key) {
            ParsedField::Given(value) => {
                self.read::<T>(key, &value).map_or(ParsedField::Faulty, ParsedField::Given)
            }
            ParsedField::Absent => ParsedField::Absent,
            ParsedField::Faulty => ParsedField::Faulty,
        }
    }

    /// Takes a list; every value of it is read, and each that is malformed is a fault of its own.
    pub(super) fn take_list<T: FromToml>(&mut self, key: &'static str) -> ParsedField<ParsedList<T::Value>> {
        match self.take_raw(key) {
            ParsedField::Given(value) => self.list::<T>(key, value),
            ParsedField::Absent => ParsedField::Absent,
            ParsedField::Faulty => ParsedField::Faulty,
        }
    }

    /// Takes a list that may stand without its brackets where it is one value.
    pub(super) fn take_one_or_many<T: FromToml>(
        &mut self,
        key: &'static str,
    ) -> ParsedField<ParsedList<T::Value>> {
        match self.take_raw(key) {
            ParsedField::Given(value) if value.get_ref().is_array() => self.list::<T>(key, value),
            ParsedField::Given(value) => self.read::<T>(key, &value).map_or(ParsedField::Faulty, |item| {
                ParsedField::Given(Spanned::new(
                    item.span(),
                    ParsedList { items: vec![item], complete: true },
                ))
            }),
            ParsedField::Absent => ParsedField::Absent,
            ParsedField::Faulty => ParsedField::Faulty,
        }
    }

    fn list<T: FromToml>(
        &mut self,
        key: &str,
        value: Spanned<DeValue<'i>>,
    ) -> ParsedField<ParsedList<T::Value>> {
        let span = value.span();
        let Some(values) = self.array(key, value) else { return ParsedField::Faulty };
        let written = values.len();
        let items: Vec<_> = values.iter().filter_map(|value| self.read::<T>(key, value)).collect();
        let complete = items.len() == written;
        ParsedField::Given(Spanned::new(span, ParsedList { items, complete }))
    }

    /// Reads a value as a list.
    pub(super) fn array(&mut self, key: &str, value: Spanned<DeValue<'i>>) -> Option<DeArray<'i>> {
        let offset = value.span().start;
        match into_array(value.into_inner()) {
            Ok(values) => Some(values),
            Err(other) => {
                self.fault_at(offset, key, format!("must be a list in brackets, found {}", shown(&other)));
                None
            }
        }
    }

    /// Takes a table whose keys are the operator's own.
    pub(super) fn take_pairs(&mut self, key: &'static str) -> ParsedField<ParsedPairs> {
        let table = match self.take_table(key) {
            ParsedField::Given(table) => table,
            ParsedField::Absent => return ParsedField::Absent,
            ParsedField::Faulty => return ParsedField::Faulty,
        };
        let (span, table) = (table.span(), table.into_inner());
        let mut pairs = Vec::with_capacity(table.len());
        for (name, value) in table {
            let within = format!("{key}.{}", bare_or_quoted(name.get_ref()));
            if let Some(value) = self.read::<String>(&within, &value) {
                pairs.push((Spanned::new(name.span(), name.into_inner().into_owned()), value));
            }
        }
        ParsedField::Given(Spanned::new(span, ParsedPairs(pairs)))
    }

    /// Takes a table and the byte where it begins.
    pub(super) fn take_table(&mut self, key: &'static str) -> ParsedField<DeTable<'i>> {
        let value = match self.take_raw(key) {
            ParsedField::Given(value) => value,
            ParsedField::Absent => return ParsedField::Absent,
            ParsedField::Faulty => return ParsedField::Faulty,
        };
        let span = value.span();
        match into_table(value.into_inner()) {
            Ok(table) => ParsedField::Given(Spanned::new(span, table)),
            Err(other) => {
                self.fault_at(span.start, key, format!("must be one table, found {}", shown(&other)));
                ParsedField::Faulty
            }
        }
    }

    fn read<T: FromToml>(&mut self, key: &str, value: &Spanned<DeValue<'i>>) -> Option<Spanned<T::Value>> {
        match T::from_toml(value.get_ref()) {
            Ok(read) => Some(Spanned::new(value.span(), read)),
            Err(message) => {
                self.fault_at(value.span().start, key, message);
                None
            }
        }
    }

    /// Records that a key is not there, with an example of it.
    pub(super) fn missing(&mut self, key: &str, example: &str) {
        self.fault_at(self.offset, key, format!("must be present, such as {key} = {example}, found none"));
    }

    /// Ends the reading: a key that was not taken is an unknown key.
    pub(super) fn finish(mut self) {
        for (key, _) in std::mem::take(&mut self.table) {
            let (offset, key) = (key.span().start, key.into_inner());
            let known = match suggest::closest(&key, self.known.iter().copied()) {
                Some(close) => format!("did you mean \"{close}\"?"),
                None => format!("known keys are {}", listed(&self.known)),
            };
            self.fault_at(offset, &bare_or_quoted(&key), format!("unknown key; {known}"));
        }
    }
}

/// A key as it may be written.
fn bare_or_quoted(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.len() <= 64 && key.chars().all(bare) { key.to_owned() } else { quoted(key) }
}

fn listed(keys: &[&str]) -> String {
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    keys.dedup();
    keys.join(", ")
}

/// A text in quotes, cut where it is long, with nothing in it that could disturb a terminal.
pub(super) fn quoted(text: &str) -> String {
    const MOST: usize = 64;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}...", text.get(..end).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

/// A value as a table, or back as it was.
pub(super) fn into_table(value: DeValue<'_>) -> Result<DeTable<'_>, DeValue<'_>> {
    if let DeValue::Table(table) = value { Ok(table) } else { Err(value) }
}

/// A value as a list, or back as it was.
pub(super) fn into_array(value: DeValue<'_>) -> Result<DeArray<'_>, DeValue<'_>> {
    if let DeValue::Array(values) = value { Ok(values) } else { Err(value) }
}

/// A value as messages show it.
pub(super) fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quoted(text),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(yes) => yes.to_string(),
        DeValue::Datetime(date) => format!("the date {date}"),
        DeValue::Array(values) if values.is_empty() => "an empty list".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}
