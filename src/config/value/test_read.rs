//! Reads one value, as the tests of this module do.

use toml::de::DeValue;

use crate::config::section::FromToml;

pub(super) fn read<T: FromToml>(text: &str) -> Result<T::Value, String> {
    T::from_toml(DeValue::parse(text).unwrap().get_ref())
}

/// The message for a value that is refused.
pub(super) fn refused<T: FromToml>(text: &str) -> String {
    read::<T>(text).map(|_| ()).unwrap_err()
}
