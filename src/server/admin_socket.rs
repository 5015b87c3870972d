//! The admin socket's file: private from creation, replaced if its process is dead, kept if it is alive, removed at
//! the end.

use std::fs::{Metadata, remove_file, symlink_metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

use super::StartError;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// The file of a socket that this process has bound. It is removed with this, unless it is kept.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Which file it is: another process may have put its own in the place.
    own: Identity,
    kept: AtomicBool,
}

impl SocketFile {
    /// The file of a socket that another process has bound; it is kept until it is [own](Self::own).
    pub(super) fn of_another(path: &Path) -> Option<Self> {
        let own = identity(&symlink_metadata(path).ok()?);
        Some(Self { path: path.to_owned(), own, kept: AtomicBool::new(true) })
    }

    /// No other process has the socket any more.
    pub(super) fn own(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Another process has the socket now: the file stays.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_own = symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.own);
        if is_own && !self.kept.load(Ordering::Acquire) {
            // It fails if the file is gone or the folder is not writable; a stale file is replaced at the next start.
            remove_file(&self.path).unwrap_or_default();
        }
    }
}

/// Device, inode and its last change: the number of an inode that is removed is soon used again.
type Identity = (u64, u64, i64, i64);

fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
}

/// Listens at a path.
///
/// # Errors
/// If a process listens there, the path is not a socket, or the system refuses.
pub(super) fn open(path: &Path) -> Result<(UnixListener, SocketFile), StartError> {
    let refused = |found: String| StartError::AdminSocket { path: path.to_owned(), found };
    let listener = match bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            clear(path).map_err(refused)?;
            bind(path)
        }
        bound => bound,
    };
    let listener = listener.map_err(|error| refused(error.to_string()))?;
    let own = symlink_metadata(path).map_err(|error| refused(error.to_string()))?;
    let file = SocketFile { path: path.to_owned(), own: identity(&own), kept: AtomicBool::new(false) };
    Ok((listener, file))
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    // Before it is bound: the file is made with the mode of the descriptor (unix_bind in net/unix/af_unix.c), so that
    // there is no moment in which others could connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket of a process that is dead.
fn clear(path: &Path) -> Result<(), String> {
    let found = symlink_metadata(path).map_err(|error| error.to_string())?;
    if !found.file_type().is_socket() {
        return Err("a file that is not a socket; remove it, or set another path".to_owned());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replaced the admin socket of a process that no longer runs");
            remove_file(path).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
        Ok(_) => Err(format!(
            "the socket of a running process; stop it, or take over from it: vestibule serve --takeover {}",
            path.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn said(path: &Path) -> String {
        open(path).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn admin_socket_is_private_and_removed_with_its_process() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("admin.sock");
        let (listener, file) = open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(said(&path).contains("--takeover"), "{}", said(&path));
        drop(listener);
        // As a process that was killed leaves it: it is replaced, and the one before does not remove it then.
        let (next, next_file) = open(&path).unwrap();
        drop(file);
        assert!(UnixStream::connect(&path).is_ok());
        next_file.keep();
        drop((next, next_file));
        assert!(path.exists(), "it was handed on");
        drop(open(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn path_that_is_not_a_socket_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(said(&path).contains("found a file that is not a socket; remove it"), "{}", said(&path));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let absent = home.path().join("absent/admin.sock");
        assert!(said(&absent).contains("No such file or directory"), "{}", said(&absent));
    }
}
