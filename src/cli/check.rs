//! `vestibule check`: every fault of a configuration, or what it holds.

use std::path::Path;
use std::process::ExitCode;

use crate::config::Config;

pub(super) fn run(path: &Path) -> ExitCode {
    match Config::load(path) {
        Ok(config) => {
            println!("{}: fine: {}", path.display(), contents(&config));
            ExitCode::SUCCESS
        }
        Err(faults) => {
            eprintln!("{faults}");
            ExitCode::FAILURE
        }
    }
}

fn contents(config: &Config) -> String {
    let addresses = config.listeners.iter().map(|listener| listener.bind.len()).sum();
    let backends = config.pools.iter().map(|pool| pool.backends.len()).sum();
    let endpoints = config.tenants.iter().map(|tenant| tenant.endpoints.len()).sum();
    [
        counted(config.listeners.len(), "listener"),
        format!("({})", counted(addresses, "address")),
        counted(config.pools.len(), "pool"),
        format!("({})", counted(backends, "backend")),
        counted(config.tenants.len(), "tenant"),
        format!("({})", counted(endpoints, "endpoint")),
    ]
    .join(" ")
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
