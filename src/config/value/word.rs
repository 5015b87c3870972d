//! Keys whose value is one of a few words.

use toml::de::DeValue;

use super::word;
use crate::config::section::FromToml;
use crate::config::{BareDatagrams, OnRevoke};

impl FromToml for BareDatagrams {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("refuse", Self::Refuse), ("follow", Self::Follow)])
    }
}

impl FromToml for OnRevoke {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        word(value, &[("end", Self::End), ("keep", Self::Keep)])
    }
}
