//! The command line: what was asked for, carried out.

mod admin_client;
#[cfg(feature = "lab")]
mod backend;
mod check;
#[cfg(feature = "lab")]
mod demo;
#[cfg(feature = "lab")]
mod lab;
#[cfg(feature = "lab")]
mod load;
#[cfg(feature = "lab")]
mod plot;
mod serve;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::build_info;

/// A layer-4 proxy for providers of AWS PrivateLink services: routes, limits and logs by VPC endpoint ID.
#[derive(Debug, Parser)]
#[command(version = build_info::VERSION_AND_COMMIT, max_term_width = 100)]
#[cfg_attr(feature = "lab", command(after_help = "Try it:  vestibule demo --seconds 10"))]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Runs the proxy
    ///
    /// SIGTERM or SIGINT drains: the health check answers 503, connections are accepted until the load balancer stops sending,
    /// and sessions may finish within the times of [drain]. A second signal ends the process at once. SIGHUP reloads the
    /// configuration, as a changed file does with [process] watch = true; a configuration with errors changes nothing.
    /// SIGUSR1 reopens the access log.
    ///
    /// With --takeover, it takes over the listening sockets, sessions and flows of a running process, which then exits. If this
    /// fails before the new process serves, the old one continues. SIGUSR2 makes a process start its successor this way.
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::ServeOptions),
    /// Checks a configuration and reports all errors, or what a reload would change
    ///
    /// With --against, prints the listeners, pools, backends and tenants that a reload would add, remove or change, what it would
    /// refuse, and the number of sessions and flows affected by each change.
    #[command(after_help = check::EXAMPLES)]
    Check(check::CheckOptions),
    #[cfg(feature = "lab")]
    #[command(flatten)]
    Lab(LabCommand),
}

/// The commands that only builds with the cargo feature `lab` have.
#[cfg(feature = "lab")]
#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Runs a demonstration in one process, without root or network
    ///
    /// Starts an emulated load balancer with VPC endpoints whose consumers have the same addresses, backends for each tenant, and
    /// the proxy; sends traffic, and prints addresses to curl. Exit status 1 if a request reached another tenant's backend.
    #[command(after_help = "Example:  vestibule demo --seconds 10")]
    Demo(demo::DemoOptions),
    /// Runs the PrivateLink hands-on in network namespaces on this machine
    ///
    /// Creates networks for a provider and two consumers, all with 10.100.0.0/16, an interface endpoint per consumer, a load
    /// balancer with PROXY v2 and health checks, two proxies, and two nginx per tenant; drains a proxy and kills a backend
    /// under load, checks the results, and removes everything. Needs root, ip, nginx and curl. Exit status 1 if a check fails.
    #[command(after_help = lab::EXAMPLES)]
    Lab(lab::LabOptions),
    /// The lab's load balancer, in its own process
    #[command(hide = true)]
    LabNlb(lab::LabNlbOptions),
    /// Generates load as the load balancer would, with a PROXY header per session
    ///
    /// Checks which backend answers each session. Exit status 1 if a session reached another tenant's backend, or if nothing was
    /// measured.
    #[command(after_help = load::EXAMPLES)]
    Load(Box<load::LoadOptions>),
    /// Serves the sessions of `vestibule load`: echo, source and sink
    #[command(after_help = "Example:  vestibule backend --listen app=127.0.0.1:9001")]
    Backend(backend::BackendOptions),
}

/// The command line itself, for man pages and completions (`examples/generate.rs`).
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Does what the command line asks.
#[must_use]
pub fn main() -> ExitCode {
    match parse().command {
        CliCommand::Serve(options) => serve::run(&options),
        CliCommand::Check(options) => check::run(&options),
        #[cfg(feature = "lab")]
        CliCommand::Lab(command) => run_lab(&command),
    }
}

#[cfg(feature = "lab")]
fn run_lab(command: &LabCommand) -> ExitCode {
    match command {
        LabCommand::Demo(options) => demo::run(options),
        LabCommand::Lab(options) => lab::run(options),
        LabCommand::LabNlb(options) => lab::balance(options),
        LabCommand::Load(options) => load::run(options),
        LabCommand::Backend(options) => backend::run(options),
    }
}

#[cfg(feature = "lab")]
fn parse() -> Cli {
    Cli::parse()
}

/// Without the feature `lab`, tells that a command of it is missing in this build, not unknown.
#[cfg(not(feature = "lab"))]
fn parse() -> Cli {
    use clap::error::{ContextKind, ContextValue, ErrorKind};

    Cli::try_parse().unwrap_or_else(|error| match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(name)) if LAB_COMMANDS.contains(&&name[..]) => {
            let message =
                format!("this build has no command '{name}': build vestibule with the cargo feature 'lab'");
            Cli::command().error(ErrorKind::InvalidSubcommand, message).exit()
        }
        _ => error.exit(),
    })
}

#[cfg(not(feature = "lab"))]
const LAB_COMMANDS: [&str; 4] = ["demo", "lab", "load", "backend"];
