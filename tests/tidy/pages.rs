//! The documents agree with the program: each metric, reason, key, command, path and fault of one is in the other.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use vestibule::account::names::{self, MetricKind};
use vestibule::config::{Config, Presence, TABLES};
use vestibule::outcome::Reason;

use super::markdown::{anchors, blocks, commands, rows};
use super::{FLOORS, collect, none, sources};

/// Lines that the README may have.
const README_LINES: usize = 150;

/// Words that make a sentence a riddle.
const FORBIDDEN: [&str; 4] = ["nobody", "whoever", "somebody", "how-many"];

/// Programs that the documents use and that are not ours.
const PROGRAMS: [&str; 7] = ["aws", "curl", "grep", "journalctl", "mv", "systemctl", "tail"];

/// A document.
struct Page {
    path: String,
    text: String,
}

#[test]
fn readme_is_short_and_links_every_page() {
    let readme = page("README.md");
    let lines = readme.text.lines().count();
    assert!(lines <= README_LINES, "README.md: {lines} lines, at most {README_LINES}");
    let unlinked =
        folder("docs", "md").into_iter().filter(|page| !readme.text.contains(&format!("({})", page.path)));
    none(&unlinked.map(|page| format!("README.md: no link to {}", page.path)).collect::<Vec<_>>());
}

#[test]
fn documents_have_no_forbidden_words() {
    let mut others = Vec::new();
    for folder in ["config", "deploy"] {
        collect(Path::new(folder), &mut others);
    }
    let others = others.iter().map(|path| page(path.to_str().unwrap()));
    // The changelog names what old words became.
    let pages = pages().into_iter().filter(|page| page.path != "CHANGELOG.md");
    let mut faults = Vec::new();
    for page in pages.chain(others) {
        for (number, line) in (1..).zip(page.text.lines()) {
            let lower = line.to_lowercase();
            let mut words = lower.split(|c: char| !c.is_alphanumeric() && c != '-' && c != '_');
            if let Some(word) = words.find(|word| FORBIDDEN.contains(word)) {
                faults.push(format!("{}:{number}: the word {word}", page.path));
            }
        }
    }
    none(&faults);
}

#[test]
fn metrics_of_the_program_and_of_its_page_are_the_same() {
    let kind = |kind| match kind {
        MetricKind::Counter => "counter",
        MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    };
    let row = |metric: &names::Metric| {
        let labels = if metric.labels.is_empty() { "-".to_owned() } else { metric.labels.join(", ") };
        format!("| `{}` | {} | {labels} | {} |", metric.name, kind(metric.kind), metric.help)
    };
    let written = rows(&page("docs/observability.md").text, "Metrics");
    same("docs/observability.md", &names::ALL.iter().map(row).collect::<Vec<_>>(), &written);
}

#[test]
fn reasons_of_the_program_and_of_its_page_are_the_same() {
    let written = rows(&page("docs/observability.md").text, "Reasons");
    // The last column is what a client sees, which no code says.
    let without_last =
        |row: &String| row.trim_end_matches(" |").rsplit_once(" | ").map(|(row, _)| format!("{row} |"));
    let written: Vec<_> = written.iter().filter_map(without_last).collect();
    let known: Vec<_> =
        Reason::ALL.iter().map(|why| format!("| `{}` | {} |", why.as_str(), why.meaning())).collect();
    same("docs/observability.md", &known, &written);
}

#[test]
fn fields_of_the_access_log_and_of_its_page_are_the_same() {
    let mut known = BTreeSet::new();
    for source in sources(&["src"]).into_iter().filter(|source| source.path.starts_with("src/account")) {
        // Keys of JSON as they are written: {"time": or ,"session":
        let code = source.text.split("#[cfg(test)]").next().unwrap_or_default();
        let keys = code.split(['{', ',']).filter_map(|rest| rest.strip_prefix('"')?.split_once("\":"));
        known.extend(
            keys.map(|(key, _)| key.to_owned())
                .filter(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '_')),
        );
    }
    assert!(known.len() > 20, "{known:?}");
    let text = page("docs/observability.md").text;
    let section = text.split("\n## ").find(|section| section.starts_with("Access log")).unwrap();
    let table: Vec<_> = section.lines().filter(|line| line.starts_with("| `")).collect();
    let written: BTreeSet<_> = table.join("\n").split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let named = table
        .iter()
        .filter_map(|row| row.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let unknown =
        named.filter(|name| !known.contains(*name)).map(|name| format!("the log has no field {name}"));
    let missing =
        known.iter().filter(|name| !written.contains(*name)).map(|name| format!("the page lacks {name}"));
    none(&unknown.chain(missing).collect::<Vec<_>>());
}

#[test]
fn every_metric_that_a_document_names_exists() {
    let exists = |name: &str| {
        let parts = ["_bucket", "_sum", "_count"].into_iter().filter_map(|end| name.strip_suffix(end));
        parts.chain([name]).any(|name| names::ALL.iter().any(|metric| metric.name == name))
    };
    let mut faults = Vec::new();
    for page in pages() {
        for (at, _) in page.text.match_indices("vestibule_") {
            let rest = &page.text[at..];
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
            let name = &rest[..end];
            // A prefix of several metrics, as in a pattern for grep.
            if !name.ends_with('_') && !exists(name) {
                faults.push(format!("{}: there is no metric {name}", page.path));
            }
            let labels = rest[end..]
                .strip_prefix('{')
                .and_then(|rest| rest.split_once('}'))
                .map_or("", |(list, _)| list);
            let metric = names::ALL.iter().find(|metric| metric.name == name);
            let unknown = labels.split(',').filter_map(|label| label.split_once('='));
            let unknown =
                unknown.filter(|(label, _)| metric.is_none_or(|metric| !metric.labels.contains(label)));
            faults.extend(unknown.map(|(label, _)| format!("{}: {name} has no label {label}", page.path)));
        }
    }
    none(&faults);
}

#[test]
fn keys_of_the_program_and_of_its_page_are_the_same() {
    let text = page("docs/configuration.md").text;
    let written = text.split("\n### ").skip(1).flat_map(|section| {
        let (heading, rows) = section.split_once('\n').unwrap();
        let rows = rows.lines().filter(|line| line.starts_with("| `"));
        rows.map(move |row| {
            let cells: Vec<_> = row.split(" | ").collect();
            format!("{heading}: {} = {}", cells[0].trim_start_matches("| "), cells[1].trim_matches('`'))
        })
    });
    let known = TABLES.iter().flat_map(|table| {
        let name =
            if table.heading.is_empty() { "Top level".to_owned() } else { format!("`{}`", table.heading) };
        let heading = name + if table.needs_restart { " (restart)" } else { "" };
        table.keys.iter().map(move |key| (format!("{heading}: `{}` = ", key.name), key.presence))
    });
    let written: Vec<_> = written.collect();
    // What holds without a value has words of its own.
    let known: Vec<_> = known
        .map(|(row, presence)| match presence {
            Presence::Default(value) | Presence::Conditional(value) => row + value,
            Presence::Required(_) => row + "required",
            Presence::Optional(_) | Presence::Usual(_) => {
                written.iter().find(|written| written.starts_with(&row)).cloned().unwrap_or(row)
            }
        })
        .collect();
    same("docs/configuration.md", &known, &written);
}

#[test]
fn every_configuration_in_a_document_is_valid() {
    let mut faults = Vec::new();
    for page in pages() {
        for (line, block) in blocks(&page.text, "toml") {
            let found = block.parse::<toml::Table>().map_err(|error| error.to_string()).and_then(|table| {
                // The name's folder is where includes are looked for.
                Config::parse("config/document.toml", &whole(&block, &table))
                    .map_err(|faults| faults.to_string())
            });
            if let Err(fault) = found {
                faults.push(format!("{}:{line}: {fault}", page.path));
            }
        }
    }
    none(&faults);
}

/// A part of a configuration, with the tables that it leaves out.
fn whole(block: &str, table: &toml::Table) -> String {
    let pools = table.get("pool").and_then(toml::Value::as_array);
    let pool = pools.and_then(|pools| pools[0]["name"].as_str()).unwrap_or("app");
    let mut text = block.to_owned();
    if !table.contains_key("listener") {
        text.push_str(
            "\n[[listener]]\nname = \"web\"\nbind = \"0.0.0.0:8080\"\ntrusted-sources = [\"10.0.0.0/16\"]\n",
        );
        text.extend(["pool = \"", pool, "\"\n"]);
    }
    if pools.is_none() {
        text.extend(["\n[[pool]]\nname = \"", pool, "\"\nbackends = [\"10.0.1.10:80\"]\n"]);
    }
    text
}

#[test]
fn readme_shows_the_minimal_configuration() {
    let minimal = fs::read_to_string("config/minimal.toml").unwrap();
    let shown = page("README.md").text.contains(&format!("```toml\n{minimal}```\n"));
    assert!(shown, "README.md: config/minimal.toml is not there as it is");
}

#[test]
fn every_command_in_a_document_can_be_run() {
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    let (mut faults, mut shown) = (Vec::new(), BTreeSet::new());
    for page in pages().into_iter().filter(|page| !page.path.starts_with("deploy")) {
        for (line, block) in blocks(&page.text, "sh") {
            for command in commands(&block) {
                let words: Vec<_> = command.iter().map(String::as_str).collect();
                match fault(&words, &manifest, &mut shown) {
                    Ok(()) => {}
                    Err(fault) => faults.push(format!("{}:{line}: {}: {fault}", page.path, words.join(" "))),
                }
            }
        }
    }
    let ours = vestibule::cli::command();
    let visible =
        ours.get_subcommands().filter(|command| !command.is_hide_set()).map(clap::Command::get_name);
    faults.extend(
        visible
            .filter(|name| !shown.contains(*name))
            .map(|name| format!("no document shows vestibule {name}")),
    );
    none(&faults);
}

/// What is wrong with a command; the subcommand of one of ours is added to `shown`.
fn fault(words: &[&str], manifest: &str, shown: &mut BTreeSet<String>) -> Result<(), String> {
    match words {
        ["sudo", rest @ ..] => fault(rest, manifest, shown),
        ["vestibule", arguments @ ..] => {
            let all = ["vestibule"].into_iter().chain(arguments.iter().copied());
            vestibule::cli::command().try_get_matches_from(all).map_err(|error| error.to_string())?;
            shown.extend(arguments.first().map(|name| (*name).to_owned()));
            let file = arguments.iter().skip_while(|word| **word != "--config").nth(1);
            match file.filter(|file| !Path::new(file).exists()) {
                Some(file) => Err(format!("there is no file {file}")),
                None => Ok(()),
            }
        }
        ["cargo", "run", rest @ ..] => {
            let arguments = rest.iter().skip_while(|word| **word != "--").skip(1).copied();
            let words: Vec<_> = ["vestibule"].into_iter().chain(arguments).collect();
            fault(&words, manifest, shown)
        }
        ["cargo", "test"] => Ok(()),
        ["cargo", "bench", "--bench", name, ..] => {
            let is_known = manifest.contains(&format!("[[bench]]\nname = \"{name}\"\n"));
            is_known.then_some(()).ok_or_else(|| "there is no such bench".to_owned())
        }
        ["curl", arguments @ ..] => {
            let address = arguments.iter().find_map(|word| word.strip_prefix("http://")).unwrap_or_default();
            let path = address.split_once('/').map_or("", |(_, path)| path);
            let path = path.split('?').next().unwrap_or_default();
            let is_known = routes().contains(&format!("/{path}")) || path == "healthz";
            is_known.then_some(()).ok_or_else(|| format!("the program has no path /{path}"))
        }
        [program, ..] if PROGRAMS.contains(program) => Ok(()),
        _ => Err("nothing is known of this program".to_owned()),
    }
}

#[test]
fn every_path_of_the_admin_interface_is_documented() {
    let texts: String = pages().into_iter().map(|page| page.text).collect();
    // One is for the next process, the other a unit test's.
    let known = routes().into_iter().filter(|route| !matches!(route.as_str(), "/" | "/takeover" | "/take"));
    let missing = known
        .filter(|route| !texts.contains(&format!("`{route}`")) && !texts.contains(&format!("POST {route}`")));
    none(&missing.map(|route| format!("no document names {route}")).collect::<Vec<_>>());
}

/// The paths that the admin address and the admin socket answer.
fn routes() -> BTreeSet<String> {
    let sources = sources(&["src"]).into_iter().filter(|source| source.path.starts_with("src/admin"));
    let texts: String = sources.map(|source| source.text).collect();
    let found: BTreeSet<_> = texts
        .split(".route(\"")
        .skip(1)
        .filter_map(|rest| rest.split_once('"'))
        .map(|(path, _)| path.to_owned())
        .collect();
    assert!(found.len() > 5, "{found:?}");
    found
}

#[test]
fn every_fault_has_its_tests() {
    let rows = rows(&page("docs/faults.md").text, "Faults");
    assert!(rows.len() > 30, "{} rows", rows.len());
    let tests: String = sources(&["tests"]).into_iter().map(|source| source.text).collect();
    let mut faults = Vec::new();
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split('|').collect();
        // What stands in backticks: every other part.
        let named: Vec<_> = cells.last().unwrap().split('`').skip(1).step_by(2).collect();
        if cells.len() != 5 || named.is_empty() {
            faults.push(format!("docs/faults.md: no five cells, or no test: {row}"));
        }
        let missing = named.iter().filter(|name| !tests.contains(&format!("fn {name}(")));
        faults.extend(missing.map(|name| format!("docs/faults.md: no test is called {name}")));
    }
    none(&faults);
}

#[test]
fn floors_of_the_architecture_page_are_those_that_are_checked() {
    let written = rows(&page("docs/architecture.md").text, "Floors");
    let mut faults = Vec::new();
    for (floor, modules) in FLOORS.iter().enumerate() {
        let row =
            written.iter().find(|row| row.starts_with(&format!("| {floor} |"))).map_or("", String::as_str);
        let missing =
            modules.iter().filter(|module| !row.contains(&format!("`{module}`")) && **module != "atomic");
        faults.extend(missing.map(|module| format!("docs/architecture.md: floor {floor} lacks {module}")));
        let named = row.split('|').nth(2).unwrap_or_default().split('`').skip(1).step_by(2);
        let unknown = named.filter(|name| !modules.contains(name) && *name != "main");
        faults
            .extend(unknown.map(|name| format!("docs/architecture.md: floor {floor} has no module {name}")));
    }
    none(&faults);
}

#[test]
fn every_link_of_a_document_leads_somewhere() {
    let mut faults = Vec::new();
    for page in pages() {
        let folder = Path::new(&page.path).parent().unwrap();
        for rest in page.text.split("](").skip(1) {
            let Some((link, _)) = rest.split_once(')') else { continue };
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.path.clone().into() } else { folder.join(path) };
            let is_there = match fs::read_to_string(&target) {
                Ok(text) => anchor.is_empty() || anchors(&text).contains(anchor),
                Err(_) => target.is_dir() && anchor.is_empty(),
            };
            if !is_there {
                faults.push(format!("{}: {link} leads nowhere", page.path));
            }
        }
    }
    none(&faults);
}

/// Every document.
fn pages() -> Vec<Page> {
    let single = [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "benches/README.md",
        "deploy/README.md",
    ]
    .map(page);
    let deploy = ["container", "debian", "systemd"].map(|name| page(&format!("deploy/{name}/README.md")));
    single.into_iter().chain(deploy).chain(folder("docs", "md")).collect()
}

fn page(path: &str) -> Page {
    Page { path: path.to_owned(), text: fs::read_to_string(path).unwrap_or_default() }
}

fn folder(path: &str, end: &str) -> Vec<Page> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries.filter(|path| path.extension().is_some_and(|own| own == end)).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{path}");
    paths.iter().map(|path| page(path.to_str().unwrap())).collect()
}

#[track_caller]
fn same(path: &str, known: &[String], written: &[String]) {
    let missing = known.iter().filter(|row| !written.contains(row)).map(|row| format!("{path}: lacks {row}"));
    let unknown = written
        .iter()
        .filter(|row| !known.contains(row))
        .map(|row| format!("{path}: has without reason {row}"));
    none(&missing.chain(unknown).collect::<Vec<_>>());
}
