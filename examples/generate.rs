//! Writes the manual pages, the shell completions and the configuration reference to a directory:
//! `cargo run --example generate -- target/generated`.
//!
//! It is an example, not a subcommand or a build script, because only the packaging needs it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use vestibule::config::{TABLES, reference};

/// The reference as it is.
const REFERENCE: &str = include_str!("../config/reference.toml");

const SOURCE: &str = concat!("vestibule ", env!("CARGO_PKG_VERSION"));
const MANUAL: &str = "vestibule";

fn main() -> io::Result<()> {
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, "usage: generate FOLDER");
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or_else(usage)?);
    let (pages, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let mut command = vestibule::cli::command().disable_help_subcommand(true);
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "vestibule", &completions)?;
    }
    command.build();
    let children: Vec<_> = command.get_subcommands().filter(|child| !child.is_hide_set()).cloned().collect();
    let names: Vec<_> = children.iter().map(|child| format!("vestibule-{}", child.get_name())).collect();
    for child in children {
        page(child, &["vestibule".to_owned()], &pages)?;
    }
    page(command, &names, &pages)?;
    fs::write(folder.join("reference.toml"), reference::renewed(REFERENCE, &TABLES))?;
    configuration(&pages)
}

/// The page of a command: what clap knows, and the sections that all commands share.
fn page(command: Command, related: &[String], folder: &Path) -> io::Result<()> {
    let examples = command.get_after_help().map(ToString::to_string);
    let has_children = command.has_subcommands();
    let man = Man::new(command).source(SOURCE).manual(MANUAL);
    let mut file = File::create(folder.join(man.get_filename()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    man.render_synopsis_section(&mut file)?;
    man.render_description_section(&mut file)?;
    man.render_options_section(&mut file)?;
    if has_children {
        man.render_subcommands_section(&mut file)?;
    }
    let mut rest = Roff::new();
    // As they are typed: clap's own section would fill the lines up.
    if let Some(examples) = examples {
        rest.control("SH", ["EXAMPLES"]);
        as_it_is(&mut rest, &examples);
    }
    section(
        &mut rest,
        "EXIT STATUS",
        "0 on success, 1 on failure, 2 for an invalid command line. vestibule-serve exits with 70 after an internal error.",
    );
    rest.control("SH", ["FILES"]);
    entry(&mut rest, "/etc/vestibule/vestibule.toml", "The configuration of the systemd service.");
    entry(&mut rest, "/run/vestibule", "The directory of the admin socket, created by the service.");
    see_also(&mut rest, related.iter().map(|name| (name.as_str(), "1")).chain([("vestibule.toml", "5")]));
    rest.to_writer(&mut file)?;
    file.flush()
}

/// vestibule.toml(5).
fn configuration(folder: &Path) -> io::Result<()> {
    let mut page = Roff::new();
    page.control("TH", ["vestibule.toml", "5", "", SOURCE, MANUAL]);
    section(&mut page, "NAME", "vestibule.toml - configuration of vestibule");
    section(
        &mut page,
        "DESCRIPTION",
        "A TOML file. Below is each key with its default or, where it has none, with an example. vestibule check reports all errors of a \
         file, each with its line. A complete file is /usr/share/doc/vestibule/examples/reference.toml; documents with examples are in \
         /usr/share/doc/vestibule/docs.",
    );
    page.control("SH", ["KEYS"]);
    let mut file = File::create(folder.join("vestibule.toml.5"))?;
    page.to_writer(&mut file)?;
    file.write_all(reference::manual(&TABLES).as_bytes())?;
    let mut rest = Roff::new();
    see_also(&mut rest, [("vestibule", "1"), ("vestibule-check", "1"), ("vestibule-serve", "1")].into_iter());
    rest.to_writer(&mut file)?;
    file.flush()
}

fn as_it_is(page: &mut Roff, text: &str) {
    page.control("nf", []);
    for line in text.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
}

fn section(page: &mut Roff, name: &str, text: &str) {
    page.control("SH", [name]).text([roman(text)]);
}

fn entry(page: &mut Roff, name: &str, text: &str) {
    page.control("TP", []).text([bold(name)]).text([roman(text)]);
}

fn see_also<'a>(page: &mut Roff, pages: impl Iterator<Item = (&'a str, &'a str)>) {
    page.control("SH", ["SEE ALSO"]);
    let mut inlines = Vec::new();
    for (name, section) in pages {
        if !inlines.is_empty() {
            inlines.push(roman(", "));
        }
        inlines.push(bold(name));
        inlines.push(roman(format!("({section})")));
    }
    page.text(inlines);
}
