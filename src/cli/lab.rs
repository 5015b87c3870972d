//! `vestibule lab`: the classic PrivateLink hands-on on one machine, shown and checked.

mod query;
mod screen;
mod traffic;
mod walkthrough;

use std::io;
use std::process::{Command, ExitCode, Stdio};

use tokio::signal::unix::{Signal, SignalKind, signal};

use self::screen::Screen;
use self::walkthrough::Walkthrough;
use crate::lab::vpc::Network;
use crate::lab::vpc::run::{self, Removal, network_name};
use crate::lab::world::{self, LabPrograms, LabWorld};

pub(super) const EXAMPLES: &str = "Examples:
  sudo vestibule lab           runs all steps, then removes everything
  sudo vestibule lab --keep    leaves everything running
  sudo vestibule lab --down    removes it";

#[derive(Debug, clap::Args)]
pub(super) struct LabOptions {
    /// Leave everything running, and print how to enter the networks
    #[arg(long)]
    keep: bool,
    /// Remove a run left behind: the named one, or all that are not in use
    #[arg(long, value_name = "RUN", conflicts_with = "keep", value_parser = run_name)]
    #[expect(clippy::option_option, reason = "both the option value and the option are optional")]
    down: Option<Option<String>>,
}

#[derive(Debug, clap::Args)]
pub(super) struct LabNlbOptions {
    /// The run
    #[arg(value_parser = run_name)]
    run: String,
}

fn run_name(text: &str) -> Result<String, String> {
    let is_one = text.len() == 4 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_one.then(|| text.to_owned()).ok_or_else(|| "must be a run's name, such as \"1a2b\"".to_owned())
}

/// What Ctrl-C makes of a command, as a shell has it.
const INTERRUPTED: u8 = 130;

pub(super) fn run(options: &LabOptions) -> ExitCode {
    let programs = match programs() {
        Ok(programs) => programs,
        Err(lacking) => {
            eprintln!("{}", lacking.join("\n"));
            return ExitCode::FAILURE;
        }
    };
    let done = match &options.down {
        Some(name) => down(name.as_deref()),
        None => show(options.keep, programs),
    };
    done.unwrap_or_else(|error| {
        eprintln!("the lab failed: {error}");
        ExitCode::FAILURE
    })
}

/// The load balancer, until it is killed.
pub(super) fn balance(options: &LabNlbOptions) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(world::balance(&options.run))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the load balancer failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where the programs are; or all that is lacking, each with its remedy.
fn programs() -> Result<LabPrograms, Vec<String>> {
    let mut lacking = Vec::new();
    if !rustix::process::geteuid().is_root() {
        lacking.push("needs root to create network namespaces; try: sudo vestibule lab".to_owned());
    }
    let mut find = |name: &str, version: &str, folders: &[&str], package: &str| {
        let found = folders.iter().map(|folder| format!("{folder}{name}")).find(|program| {
            let shown = Command::new(program)
                .arg(version)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            shown.is_ok_and(|status| status.success())
        });
        if found.is_none() {
            lacking.push(format!("{name} must be installed; try: apt-get install {package}"));
        }
        found
    };
    // iproute2 looks for what it runs in the PATH; servers may lie elsewhere.
    let ip = find("ip", "-V", &[""], "iproute2");
    let curl = find("curl", "-V", &[""], "curl");
    let nginx = find("nginx", "-v", &["", "/usr/sbin/", "/usr/local/sbin/"], "nginx");
    let vestibule = std::env::current_exe()
        .map_err(|error| vec![format!("cannot find the path of this program: {error}")])?;
    match (ip, curl, nginx) {
        (Some(_), Some(_), Some(nginx)) if lacking.is_empty() => Ok(LabPrograms { vestibule, nginx }),
        _ => Err(lacking),
    }
}

/// Removes what earlier runs have left.
fn down(name: Option<&str>) -> io::Result<ExitCode> {
    let known = run::all()?.into_iter().map(|(name, _)| name);
    let names: Vec<_> = known.filter(|known| name.is_none_or(|name| name == known)).collect();
    if names.is_empty() {
        println!("there is nothing to remove");
    }
    for name in names {
        match run::remove(&name)? {
            Removal::Removed => println!("run {name} is removed"),
            Removal::InUse => println!("run {name} is in use: end its command with Ctrl-C"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// SIGINT, SIGTERM and SIGHUP.
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn catch() -> io::Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn show(keep: bool, programs: LabPrograms) -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Caught before anything is made, so that none of it can be left behind.
    let mut signals = {
        let _context = runtime.enter();
        StopSignals::catch()?
    };
    for name in run::sweep()? {
        println!("removed what run {name} left behind; its command was killed");
    }
    let mut world = LabWorld::make(programs)?;
    let mut screen = Screen::new();
    let told = runtime.block_on(async {
        tokio::select! {
            told = Walkthrough::new(&mut world, &mut screen).tell() => Some(told),
            () = signals.any() => None,
        }
    });
    match &told {
        None => screen::note("interrupted"),
        Some(Err(error)) => {
            screen.claim(false, &format!("The lab continues. {error}"));
            screen.logs(&world);
        }
        Some(Ok(())) if keep => {
            screen.end();
            screen.ways_in(&mut world);
            world.keep()?;
            return Ok(screen.verdict());
        }
        Some(Ok(())) => {}
    }
    let name = world.name().to_owned();
    world.remove()?;
    let left = Network::all(&network_name(&name, ""))?.len();
    screen.claim(left == 0, "Removed: namespaces with their interfaces, processes, files.");
    // Everything in progress ended with its network.
    runtime.shutdown_background();
    if told.is_none() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    screen.end();
    Ok(screen.verdict())
}
