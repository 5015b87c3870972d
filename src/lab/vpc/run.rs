//! Runs of the lab: each has a name, a folder and a lock, so that two at once do not conflict, and what one left
//! that was killed is found and removed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::Network;

/// Where the runs' folders are.
const FOLDER: &str = "/run/vestibule-lab";
/// What its networks are called, before the run's name.
const PREFIX: &str = "vestibule";
/// Held, by lock, for as long as the run's command lives.
const HELD: &str = "lock";
/// There where the run was left on purpose.
const KEPT: &str = "kept";
/// So many names are tried.
const NAMES: usize = 100;

/// A run: all that it has made is removed with it, unless it is kept.
#[derive(Debug)]
pub(crate) struct LabRun {
    name: String,
    /// The lock.
    _held: File,
    kept: bool,
}

/// What became of a run that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It is gone.
    Removed,
    /// A command is using it.
    InUse,
}

impl LabRun {
    /// A new one, with a folder and no networks yet.
    ///
    /// # Errors
    /// Where the folder cannot be made.
    pub(crate) fn begin() -> io::Result<Self> {
        let _alone = alone()?;
        for _ in 0..NAMES {
            let name = format!("{:04x}", fastrand::u16(1..));
            match fs::create_dir(folder(&name)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            }
            let held = File::create(folder(&name).join(HELD))?;
            flock(&held, FlockOperation::NonBlockingLockExclusive)?;
            return Ok(Self { name, _held: held, kept: false });
        }
        Err(io::Error::other(format!("{FOLDER}: must have a name left")))
    }

    /// Its name.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its folder.
    #[must_use]
    pub(crate) fn folder(&self) -> PathBuf {
        folder(&self.name)
    }

    /// Makes one of its networks.
    ///
    /// # Errors
    /// What `ip` said.
    pub(crate) fn network(&self, name: &str) -> io::Result<Network> {
        Network::make(&network_name(&self.name, name))
    }

    /// Leaves everything as it is.
    ///
    /// # Errors
    /// Where its folder cannot be written to.
    pub(crate) fn keep(&mut self) -> io::Result<()> {
        File::create(self.folder().join(KEPT))?;
        self.kept = true;
        Ok(())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// What could not be removed.
    pub(crate) fn remove(&mut self) -> io::Result<()> {
        // Tried once: what cannot be removed here can be by the next run, or by hand.
        self.kept = true;
        remove_all(&self.name)
    }
}

impl Drop for LabRun {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove_all(&self.name)
        {
            eprintln!("the lab's run {} is not wholly removed: {error}", self.name);
        }
    }
}

/// What a network of a run is called.
#[must_use]
pub(crate) fn network_name(run: &str, network: &str) -> String {
    format!("{PREFIX}-{run}-{network}")
}

/// The names of all runs, and whether each was left on purpose.
///
/// # Errors
/// Where the folder cannot be read.
pub(crate) fn all() -> io::Result<Vec<(String, bool)>> {
    let mut found = Vec::new();
    fs::create_dir_all(FOLDER)?;
    for entry in fs::read_dir(FOLDER)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        if folder(&name).is_dir() {
            let kept = folder(&name).join(KEPT).exists();
            found.push((name, kept));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes what killed commands have left; their names.
///
/// # Errors
/// What could not be removed.
pub(crate) fn sweep() -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    for (name, _) in all()?.into_iter().filter(|(_, kept)| !kept) {
        if remove(&name)? == Removal::Removed {
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Removes a run that no command is using.
///
/// # Errors
/// What could not be removed.
pub(crate) fn remove(name: &str) -> io::Result<Removal> {
    let _alone = alone()?;
    match File::open(folder(name).join(HELD)) {
        Ok(held) => match flock(&held, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => remove_all(name).map(|()| Removal::Removed),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Removal::InUse),
            Err(error) => Err(error.into()),
        },
        // It was killed before it had a lock, or has gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => remove_all(name).map(|()| Removal::Removed),
        Err(error) => Err(error),
    }
}

/// The networks first: as long as one is left, so is the folder by which it is found.
fn remove_all(name: &str) -> io::Result<()> {
    for network in Network::all(&network_name(name, ""))? {
        network.remove()?;
    }
    match fs::remove_dir_all(folder(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// No other process creates or removes a run meanwhile: a folder without a lock is then a run that was killed.
fn alone() -> io::Result<File> {
    fs::create_dir_all(FOLDER)?;
    let lock = File::create(Path::new(FOLDER).join(HELD))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    Ok(lock)
}

/// Where a run has its files.
#[must_use]
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}
