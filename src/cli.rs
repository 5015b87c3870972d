//! The command line: what was asked for, carried out.

mod ask;
mod backend;
mod check;
mod demo;
mod lab;
mod load;
mod plot;
mod serve;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// A layer-4 proxy that knows its tenants: the target of an AWS Network Load Balancer on the provider's side of
/// PrivateLink.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
#[command(after_help = "Try it:  vestibule demo --seconds 10")]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Runs the proxy until it is told to stop
    ///
    /// SIGTERM or SIGINT drains: the health check says 503, accepting goes on until the load balancer has stopped
    /// sending, and sessions may end by themselves within the limits of [drain]. A second signal ends it at once.
    /// SIGHUP reloads, and so does a file that changes where [process] watch is true: tenants and their limits change
    /// while sessions live; a file with a fault changes nothing.
    ///
    /// With --takeover, takes the place of a process that runs: gets its listening sockets, then its live sessions and flows,
    /// and that one ends. Whatever goes wrong before this one could serve, that one goes on. SIGUSR2 has a process start its
    /// own successor so.
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::ServeOptions),
    /// Checks a configuration and prints every fault in it; or what it would change in a process that runs
    ///
    /// With --against, prints what a reload would change: listeners, pools, backends and tenants that are added, removed,
    /// moved or limited otherwise, what would be refused, and how many sessions and flows each of it concerns now.
    #[command(after_help = check::EXAMPLES)]
    Check(check::CheckOptions),
    /// Shows the whole thing in one process, with nothing but this binary
    ///
    /// Starts a load balancer with two VPC endpoints whose consumers have the same addresses, two pools of HTTP
    /// backends, and the proxy between them; sends traffic, and prints what to curl meanwhile.
    #[command(after_help = "Example:  vestibule demo --seconds 10")]
    Demo(demo::DemoOptions),
    /// Shows it in networks of their own: a provider and two consumers, all of them 10.100.0.0/16, on this machine
    ///
    /// Makes network namespaces, an interface endpoint for each consumer, a load balancer with PROXY v2 and health checks,
    /// two proxies and two nginx for each tenant; curls from both consumers, drains a proxy and kills a backend under load;
    /// removes it all. Needs root, ip, nginx and curl. Exit status 1 where something shown does not hold.
    #[command(after_help = lab::EXAMPLES)]
    Lab(lab::LabOptions),
    /// The lab's load balancer, in its own process
    #[command(hide = true)]
    LabNlb(lab::LabNlbOptions),
    /// Plays the load balancer: many sessions, each with its header, each checked for who answered
    ///
    /// Exit status 1 where a session was answered by another tenant's backend, or nothing was measured.
    #[command(after_help = load::EXAMPLES)]
    Load(Box<load::LoadOptions>),
    /// Serves the sessions of `vestibule load`: echo, source and sink, and says who answers
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
    match Cli::parse().command {
        CliCommand::Serve(options) => serve::run(&options),
        CliCommand::Check(options) => check::run(&options),
        CliCommand::Demo(options) => demo::run(&options),
        CliCommand::Lab(options) => lab::run(&options),
        CliCommand::LabNlb(options) => lab::balance(&options),
        CliCommand::Load(options) => load::run(&options),
        CliCommand::Backend(options) => backend::run(&options),
    }
}
