//! Networks of their own on one machine: Linux network namespaces, made with iproute2's `ip`, and removed with all that
//! runs in them. Nothing outside of them is touched: each pair of interfaces is made inside the two that it joins.

pub(crate) mod run;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::clock;

/// Where iproute2 keeps the namespaces that have names.
const NAMED: &str = "/run/netns";
/// What the end of a killed process may take.
const KILLED: Duration = Duration::from_secs(10);

/// A network namespace, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Network(String);

impl Network {
    /// Makes it, with its loopback.
    ///
    /// # Errors
    /// What `ip` said.
    pub(crate) fn make(name: &str) -> io::Result<Self> {
        ip(&["netns", "add", name])?;
        let network = Self(name.to_owned());
        network.ip(&["link", "set", "lo", "up"])?;
        Ok(network)
    }

    /// All whose names start so.
    ///
    /// # Errors
    /// Where the folder cannot be read; that there is none is no error.
    pub(crate) fn all(start: &str) -> io::Result<Vec<Self>> {
        let folder = match std::fs::read_dir(NAMED) {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in folder {
            let name = entry?.file_name().into_string().unwrap_or_default();
            if name.starts_with(start) {
                found.push(Self(name));
            }
        }
        Ok(found)
    }

    /// Its name.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Joins two by a wire, whose ends are called `eth0` and have these addresses, as in `10.100.0.10/16`.
    ///
    /// # Errors
    /// What `ip` said.
    pub(crate) fn join(&self, addresses: &[&str], other: &Self, others: &[&str]) -> io::Result<()> {
        self.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", other.name()])?;
        for (network, addresses) in [(self, addresses), (other, others)] {
            for address in addresses {
                network.ip(&["address", "add", address, "dev", "eth0"])?;
            }
            network.ip(&["link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    fn ip(&self, words: &[&str]) -> io::Result<()> {
        ip(&[&["-n", self.name()], words].concat()).map(drop)
    }

    /// A program that will run in it, away from the terminal and from the group that Ctrl-C reaches.
    #[must_use]
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(IP);
        command.args(["netns", "exec", self.name(), program]);
        // A service manager's variables are meant for this process only.
        for variable in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command
    }

    /// Moves the calling thread into it: sockets that the thread makes from now on are its own.
    ///
    /// # Errors
    /// Where there is none of its name, or the process may not.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let link = File::open(format!("{NAMED}/{}", self.name()))?;
        Ok(move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Does something on a thread of its own inside of it.
    ///
    /// # Errors
    /// What the thread met.
    pub(crate) fn inside<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let network = self.clone();
        let thread = std::thread::Builder::new().name(self.0.clone()).spawn(move || {
            network.enter()?;
            act()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the lab panicked")))
    }

    /// Kills what runs in it, and removes it.
    ///
    /// # Errors
    /// What `ip` said, or that a process does not end.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let start = clock::now();
        loop {
            let output = ip(&["netns", "pids", self.name()])?;
            let pids = String::from_utf8_lossy(&output.stdout).into_owned();
            let pids: Vec<_> =
                pids.split_whitespace().filter_map(|pid| pid.parse().ok().and_then(Pid::from_raw)).collect();
            if pids.is_empty() {
                break;
            }
            if clock::now().since(start) > KILLED {
                return Err(io::Error::other(format!("{}: {pids:?} cannot be killed", self.name())));
            }
            for pid in pids {
                // One that has ended meanwhile cannot be killed.
                kill_process(pid, Signal::KILL).unwrap_or_default();
            }
            std::thread::yield_now();
        }
        ip(&["netns", "delete", self.name()]).map(drop)
    }
}

/// The program of iproute2.
const IP: &str = "ip";

fn ip(words: &[&str]) -> io::Result<Output> {
    let said = |text: &str| io::Error::other(format!("ip {}: {text}", words.join(" ")));
    let output = Command::new(IP).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| said(&error.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(said(String::from_utf8_lossy(&output.stderr).trim_end()))
}
