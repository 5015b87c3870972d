//! `vestibule check`: every fault of a configuration, or what it holds; and what it would change.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use super::admin_client::AdminTarget;
use crate::admission::ports::LocalPorts;
use crate::config::Config;
use crate::config::diff::{ActiveConfig, ConfigDiff};
use crate::connect;
use crate::server::{ScarcePorts, log_writer, scarce_ports};

/// The options of `vestibule check`.
#[derive(Debug, clap::Args)]
pub(super) struct CheckOptions {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Compare with a running process: http://HOST:PORT ([admin] bind) or unix:PATH ([admin] socket)
    #[arg(long, value_name = "ADMIN")]
    against: Option<AdminTarget>,
    /// Print the changes as JSON
    #[arg(long, requires = "against")]
    json: bool,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  vestibule check --config config/reference.toml
  vestibule check --config config/reference.toml --against http://127.0.0.1:9900
  vestibule check --config config/reference.toml --against unix:/run/vestibule/admin.sock --json

Exit status: 0 no errors, 1 the configuration has errors or a reload would refuse it, 2 the process cannot be reached.";

/// The process that runs could not be asked.
const UNASKED: u8 = 2;

pub(super) fn run(options: &CheckOptions) -> ExitCode {
    let config = match Config::load(&options.config) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("{faults}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = log_writer::check(&config.log.access) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let tcp = connect::system_ports();
    let udp = LocalPorts::udp(tcp.range().clone());
    let mut warnings = 0;
    for ScarcePorts { pool, possible, message } in scarce_ports(&config, &tcp, &udp) {
        warnings += 1;
        let file = options.config.display();
        eprintln!("{file}: warning: pool \"{pool}\": {message} (here {possible})");
    }
    let Some(place) = &options.against else {
        let (file, warnings) = (options.config.display(), counted(warnings, "warning"));
        println!("{file}: OK: {}; {warnings}", contents(&config));
        return ExitCode::SUCCESS;
    };
    let now = match fetch_active(place) {
        Ok(now) => now,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(UNASKED);
        }
    };
    let difference = ConfigDiff::between(&now, &config);
    // A reader that closes the pipe early, such as head, is not an error.
    print_difference(&difference, options.json).unwrap_or_default();
    if difference.is_refused() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn fetch_active(place: &AdminTarget) -> Result<ActiveConfig, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let page = runtime.map_err(|error| error.to_string())?.block_on(place.page("/config"))?;
    serde_json::from_slice(&page).map_err(|error| {
        format!("version {} cannot read the running configuration: {error}", env!("CARGO_PKG_VERSION"))
    })
}

fn print_difference(difference: &ConfigDiff, as_json: bool) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    if as_json {
        serde_json::to_writer_pretty(&mut out, difference)?;
        return writeln!(out);
    }
    for change in &difference.changes {
        writeln!(out, "{change}")?;
    }
    let count = difference.changes.len();
    match (count, difference.is_refused()) {
        (0, _) => writeln!(out, "no changes"),
        (_, true) => writeln!(out, "the reload would be refused; no change would be applied"),
        (_, false) => {
            writeln!(out, "{}, affecting {}", counted(count, "change"), difference.now)?;
            if difference.ends.is_nothing() {
                return Ok(());
            }
            writeln!(out, "ending at most {} whose tenant or endpoint is revoked", difference.ends)
        }
    }
}

fn contents(config: &Config) -> String {
    let addresses = config.listeners.iter().map(|listener| listener.bind.len()).sum();
    let backends = config.pools.iter().map(|pool| pool.backends.len()).sum();
    let endpoints = config.tenants.iter().map(|tenant| tenant.endpoints.len()).sum();
    [
        format!("{} ({})", counted(config.listeners.len(), "listener"), counted(addresses, "address")),
        format!("{} ({})", counted(config.pools.len(), "pool"), counted(backends, "backend")),
        format!("{} ({})", counted(config.tenants.len(), "tenant"), counted(endpoints, "endpoint")),
    ]
    .join(", ")
}

fn counted(count: usize, noun: &str) -> String {
    match (count, noun.ends_with('s')) {
        (1, _) => format!("1 {noun}"),
        (_, true) => format!("{count} {noun}es"),
        (_, false) => format!("{count} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn nouns_have_their_plural() {
        assert_eq!(counted(1, "address"), "1 address");
        assert_eq!(counted(2, "address"), "2 addresses");
        assert_eq!(counted(0, "pool"), "0 pools");
    }
}
