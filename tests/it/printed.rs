//! What a child process prints, read as it comes.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout};

/// The standard output of a child.
pub(crate) struct Printed(BufReader<ChildStdout>);

impl Printed {
    /// Of one whose output is a pipe.
    pub(crate) fn of(child: &mut Child) -> Self {
        Self(BufReader::new(child.stdout.take().unwrap()))
    }

    /// What it prints up to and with the line that starts with `last`.
    pub(crate) fn until(&mut self, last: &str) -> String {
        let mut text = String::new();
        loop {
            let start = text.len();
            assert_ne!(self.0.read_line(&mut text).unwrap(), 0, "no line with {last} in\n{text}");
            if text[start..].trim_start().starts_with(last) {
                return text;
            }
        }
    }

    /// What else it prints to its end.
    pub(crate) fn rest(&mut self) -> String {
        let mut text = String::new();
        self.0.read_to_string(&mut text).unwrap();
        text
    }
}
