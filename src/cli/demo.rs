//! x
use std::process::ExitCode;
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// x
    #[arg(long)]
    seconds: Option<u64>,
}
pub(super) fn run(_: &Options) -> ExitCode {
    ExitCode::SUCCESS
}
