//! How keys are declared: `table!` has one entry for each key of a table. The reader, the defaults, the ranges, the checked
//! values, the reference, the manual page and the difference of two configurations come from it.

use std::ops::Deref;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::section::{FromToml, ParsedField, ParsedList, ParsedPairs, Section, TableHead};

/// A table of the configuration and its keys.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// As it stands in a file, such as `[drain]` or `[[pool]]`.
    pub heading: &'static str,
    /// Whether a change needs a restart or a takeover, so that a reload with one is refused.
    pub needs_restart: bool,
    /// What the table is for.
    pub doc: &'static str,
    /// Its keys, in the order of the reference.
    pub keys: &'static [Key],
}

/// A key of a table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// What stands before it in messages, such as `health.`.
    pub(super) prefix: &'static str,
    /// Its name in a file.
    pub name: &'static str,
    /// What holds where it is absent.
    pub presence: Presence,
    /// What it must be, to follow "must be"; empty where its type says enough.
    pub range: fn() -> String,
    /// What it does.
    pub doc: &'static str,
}

/// What holds where a key is absent, with a value as it is written in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// This default.
    Default(&'static str),
    /// This default, which may be written only where another key has a certain value.
    Conditional(&'static str),
    /// Nothing; an example.
    Optional(&'static str),
    /// Nothing, but most files have it, and a rule may require it; an example.
    Usual(&'static str),
    /// It must be present; an example.
    Required(&'static str),
}

impl Presence {
    /// The default or the example, as it is written in a file.
    #[must_use]
    pub fn value(&self) -> &'static str {
        match self {
            Self::Default(value)
            | Self::Conditional(value)
            | Self::Optional(value)
            | Self::Usual(value)
            | Self::Required(value) => value,
        }
    }
}

impl Table {
    /// Its name, without brackets.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.heading.trim_matches(['[', ']'])
    }
}

/// What a key may hold: a single value, or a list or table of them.
pub(super) trait Kind {
    /// The value as it was read, with the places of its parts.
    type Parsed;

    /// Takes the key out of its table.
    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<Self::Parsed>;

    /// Reads a default; none for kinds that have no default.
    fn parse(_default: &DeValue<'_>) -> Option<Self::Parsed> {
        None
    }

    /// What a value must be, to follow "must be"; empty where the type says enough.
    fn range() -> String {
        String::new()
    }
}

impl<T: FromToml> Kind for T {
    type Parsed = T::Value;

    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<T::Value> {
        section.take::<T>(key)
    }

    fn parse(default: &DeValue<'_>) -> Option<T::Value> {
        T::from_toml(default).ok()
    }

    fn range() -> String {
        T::range()
    }
}

/// A list in brackets.
pub(super) struct List<T>(std::marker::PhantomData<T>);

impl<T: FromToml> Kind for List<T> {
    type Parsed = ParsedList<T::Value>;

    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<Self::Parsed> {
        section.take_list::<T>(key)
    }

    fn parse(default: &DeValue<'_>) -> Option<Self::Parsed> {
        let read = |value: &Spanned<DeValue<'_>>| {
            Some(Spanned::new(value.span(), T::from_toml(value.get_ref()).ok()?))
        };
        Some(ParsedList {
            items: default.as_array()?.iter().map(read).collect::<Option<_>>()?,
            complete: true,
        })
    }

    fn range() -> String {
        T::range()
    }
}

/// A list, or one value without brackets.
pub(super) struct OneOrMany<T>(std::marker::PhantomData<T>);

impl<T: FromToml> Kind for OneOrMany<T> {
    type Parsed = ParsedList<T::Value>;

    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<Self::Parsed> {
        section.take_one_or_many::<T>(key)
    }
}

/// Keys that the operator chooses, each with a text.
pub(super) struct Pairs;

impl Kind for Pairs {
    type Parsed = ParsedPairs;

    fn take(section: &mut Section<'_, '_>, key: &'static str) -> ParsedField<ParsedPairs> {
        section.take_pairs(key)
    }
}

/// A key of a table that was read, and what was written there.
pub(super) struct Field<K: Kind> {
    pub(super) key: &'static Key,
    parsed: ParsedField<K::Parsed>,
}

impl<K: Kind> Field<K> {
    /// A key that is absent.
    pub(super) fn absent(key: &'static Key) -> Self {
        Self { key, parsed: ParsedField::Absent }
    }

    /// Takes the key out of its table.
    pub(super) fn take(section: &mut Section<'_, '_>, key: &'static Key) -> Self {
        let mut parsed = K::take(section, key.name);
        if let (ParsedField::Absent, Presence::Required(example)) = (&parsed, key.presence) {
            section.missing(key.name, example);
            parsed = ParsedField::Faulty;
        }
        Self { key, parsed }
    }

    /// Forgets what was written.
    pub(super) fn clear(&mut self) {
        self.parsed = ParsedField::Absent;
    }

    /// The value as it was written, moved out.
    pub(super) fn into_given(self) -> Option<K::Parsed> {
        self.parsed.value()
    }

    /// The value that counts, the default included. Called where no fault was found.
    pub(super) fn into_value(self) -> K::Parsed {
        let key = self.key;
        self.parsed.value().unwrap_or_else(|| default::<K>(key))
    }

    /// The key as messages name it within its table's title.
    pub(super) fn path(&self) -> String {
        format!("{}{}", self.key.prefix, self.key.name)
    }

    /// The key, where its value stands, and the value in words; none where it is not given.
    pub(super) fn written(&self, words: impl Fn(&K::Parsed) -> String) -> Option<(String, usize, String)> {
        self.parsed.spanned().map(|value| (self.path(), value.span().start, words(value.get_ref())))
    }

    /// " (the default)" where the key is absent, to follow the value that counts.
    pub(super) fn default_note(&self) -> &'static str {
        if self.parsed.is_absent() { " (the default)" } else { "" }
    }
}

impl<K: Kind<Parsed: Clone>> Field<K> {
    /// The value that counts; none where it is a fault already.
    pub(super) fn effective(&self) -> Option<K::Parsed> {
        match &self.parsed {
            ParsedField::Given(value) => Some(value.get_ref().clone()),
            ParsedField::Absent => Some(default::<K>(self.key)),
            ParsedField::Faulty => None,
        }
    }

    /// Takes another table's value where this one has none.
    pub(super) fn inherit(&mut self, from: &Self) {
        if self.parsed.is_absent() {
            self.parsed.clone_from(&from.parsed);
        }
    }
}

/// The declared default.
fn default<K: Kind>(key: &Key) -> K::Parsed {
    let written = key.presence.value();
    let plain = written.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    // 100,000 tenants have such defaults: a text needs no parser of TOML.
    let value = match plain.filter(|text| !text.contains(['"', '\\'])) {
        Some(text) => K::parse(&DeValue::String(text.into())),
        None => DeValue::parse(written).ok().and_then(|value| K::parse(value.get_ref())),
    };
    value.expect("a declared default is valid")
}

impl<K: Kind<Parsed: Clone>> Clone for Field<K> {
    fn clone(&self) -> Self {
        Self { key: self.key, parsed: self.parsed.clone() }
    }
}

impl<K: Kind> Deref for Field<K> {
    type Target = ParsedField<K::Parsed>;

    fn deref(&self) -> &Self::Target {
        &self.parsed
    }
}

/// The keys of a table as they were written.
pub(super) trait RawTable: Default {
    /// The declaration.
    const TABLE: Table;

    /// Takes the keys out of an opened table.
    fn take(section: &mut Section<'_, '_>) -> Self;

    /// Takes the values of another table where this one has none.
    fn inherit(&mut self, from: &Self);

    /// Reads the whole of an opened table.
    fn read(mut section: Section<'_, '_>) -> Self {
        section.know(Self::TABLE.keys.iter().map(|key| key.name));
        let read = Self::take(&mut section);
        section.finish();
        read
    }

    /// Reads a table within another one, where it is one.
    fn within(section: &mut Section<'_, '_>, name: &'static str, prefix: &'static str) -> Self {
        match section.take_table(name) {
            ParsedField::Given(table) => Self::read(section.nested(prefix, table)),
            ParsedField::Absent | ParsedField::Faulty => Self::default(),
        }
    }
}

/// A table with its place.
pub(super) struct Headed<R> {
    pub(super) head: TableHead,
    pub(super) keys: R,
}

impl<R: RawTable> Headed<R> {
    /// Reads the table.
    pub(super) fn read(head: TableHead, table: DeTable<'_>, faults: &mut Vec<ConfigError>) -> Self {
        let keys = R::read(Section::open(&head, table, faults));
        Self { head, keys }
    }
}

impl<R> Headed<R> {
    /// A fault of a key: where it is written, or where the table begins if it is not.
    pub(super) fn fault<K: Kind>(&self, field: &Field<K>, message: String) -> ConfigError {
        let offset = field.spanned().map_or(self.head.offset(), |value| value.span().start);
        self.fault_at(offset, field, message)
    }

    /// A fault of a key, at a byte.
    pub(super) fn fault_at<K: Kind>(&self, offset: usize, field: &Field<K>, message: String) -> ConfigError {
        self.head.fault_at(offset, &field.path(), message)
    }
}

impl<R> Deref for Headed<R> {
    type Target = R;

    fn deref(&self) -> &R {
        &self.keys
    }
}

/// Declares a table:
///
/// ```text
/// table! {
///     "[drain]", reload, "What the table is for.";
///     RawDrain => #[derive(Copy)] DrainConfig;
///     keys { "quiet" quiet: Duration => Duration, default "10s", "What the key does."; }
///     tables { "queue" queue: RawQueue => QueueConfig, "What it is."; }
///     made { "What it is." identity: ListenerIdentity = function_of_the_raw_table; }
/// }
/// ```
///
/// `reload` or `restart` is what a change needs. A key has its name, its field, what a file may hold, the type of the checked
/// field, its presence with a value in TOML, and its documentation. Without a checked type the key is only part of what is
/// `made`; without a checked struct only the reader is made.
macro_rules! table {
    ($heading:literal $(in $prefix:literal)?, $change:ident, $doc:literal; $raw:ident; $($parts:tt)*) => {
        crate::config::table::raw_table! { [$heading, concat!($($prefix)?), $change, $doc] $raw; $($parts)* }
    };
    ($heading:literal $(in $prefix:literal)?, $change:ident, $doc:literal; $raw:ident => $(#[$attribute:meta])* $checked:ident;
     $($parts:tt)*) => {
        crate::config::table::raw_table! { [$heading, concat!($($prefix)?), $change, $doc] $raw; $($parts)* }
        crate::config::table::checked_table! { [$doc $(#[$attribute])*] $raw => $checked; $($parts)* }
    };
}

/// The reader of a declared table: a struct of its fields as they were written.
macro_rules! raw_table {
    ([$heading:literal, $prefix:expr, $change:ident, $doc:literal] $raw:ident;
     keys { $($name:literal $field:ident: $kind:ty $(=> $type:ty)?, $presence:ident $value:tt, $key_doc:literal;)* }
     $(tables { $($part_name:literal $part:ident: $part_raw:ident $(=> $part_type:ty, $part_doc:literal)?;)* })?
     $(made $made:tt)?) => {
        #[doc = $doc]
        #[derive(Clone)]
        pub(in crate::config) struct $raw {
            $(pub(in crate::config) $field: Field<$kind>,)*
            $($(pub(in crate::config) $part: $part_raw,)*)?
        }

        impl RawTable for $raw {
            const TABLE: Table = Table {
                heading: $heading,
                needs_restart: crate::config::table::raw_table!(@needs_restart $change),
                doc: $doc,
                keys: &[$(crate::config::table::raw_table!(@key $prefix, $name, $kind, $presence $value, $key_doc)),*],
            };

            fn take(section: &mut Section<'_, '_>) -> Self {
                Self {
                    $($field: Field::take(section, const { &crate::config::table::raw_table!(@key $prefix, $name, $kind, $presence $value, $key_doc) }),)*
                    $($($part: $part_raw::within(section, $part_name, concat!($part_name, ".")),)*)?
                }
            }

            fn inherit(&mut self, from: &Self) {
                $(self.$field.inherit(&from.$field);)*
                $($(self.$part.inherit(&from.$part);)*)?
            }
        }

        impl Default for $raw {
            fn default() -> Self {
                Self {
                    $($field: Field::absent(const { &crate::config::table::raw_table!(@key $prefix, $name, $kind, $presence $value, $key_doc) }),)*
                    $($($part: $part_raw::default(),)*)?
                }
            }
        }
    };
    (@key $prefix:expr, $name:literal, $kind:ty, $presence:ident $value:tt, $doc:literal) => {
        Key {
            prefix: $prefix,
            name: $name,
            presence: crate::config::table::raw_table!(@presence $presence $value),
            range: <$kind as Kind>::range,
            doc: $doc,
        }
    };
    (@presence default $value:tt) => { Presence::Default(stringify!($value)) };
    (@presence conditional $value:tt) => { Presence::Conditional(stringify!($value)) };
    (@presence optional $value:tt) => { Presence::Optional(stringify!($value)) };
    (@presence usual $value:tt) => { Presence::Usual(stringify!($value)) };
    (@presence required $value:tt) => { Presence::Required(stringify!($value)) };
    (@needs_restart restart) => { true };
    (@needs_restart reload) => { false };
}

/// The checked form of a declared table, and how it is made of what was written.
macro_rules! checked_table {
    ([$doc:literal $(#[$attribute:meta])*] $raw:ident => $checked:ident;
     keys { $($name:literal $field:ident: $kind:ty $(=> $type:ty)?, $presence:ident $value:tt, $key_doc:literal;)* }
     $(tables { $($part_name:literal $part:ident: $part_raw:ident $(=> $part_type:ty, $part_doc:literal)?;)* })?
     $(made { $($made_doc:literal $made:ident: $made_type:ty = $make:path;)* })?) => {
        #[doc = $doc]
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        $(#[$attribute])*
        pub struct $checked {
            $($(#[doc = $key_doc] pub $field: $type,)?)*
            $($($(#[doc = $part_doc] pub $part: $part_type,)?)*)?
            $($(#[doc = $made_doc] pub $made: $made_type,)*)?
        }

        impl From<$raw> for $checked {
            fn from(raw: $raw) -> Self {
                Self {
                    $($($made: $make(&raw),)*)?
                    $($($($part: <$part_type>::from(raw.$part),)?)*)?
                    $($($field: crate::config::table::checked_table!(@value $presence $type, raw.$field),)?)*
                }
            }
        }
    };
    (@value optional $type:ty, $field:expr) => { $field.into_given().map(<$type>::from).unwrap_or_default() };
    (@value usual $type:ty, $field:expr) => { crate::config::table::checked_table!(@value optional $type, $field) };
    (@value $presence:ident $type:ty, $field:expr) => { <$type>::from($field.into_value()) };
}

pub(super) use {checked_table, raw_table, table};
