//! The access log's writer: its own thread, so that a slow disk does not delay traffic.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::time::{MissedTickBehavior, interval};

use super::StartError;
use crate::account::lock;
use crate::account::log::{BATCHES, LogBatch, LogSender};
use crate::account::log_queue::{LogQueue, MissingLines};
use crate::config::AccessLogTarget;

/// How long an order to open the file anew waits for its result.
const REOPENING: Duration = Duration::from_secs(2);

/// How often the process log tells of lines that are missing.
const TELLING: Duration = Duration::from_secs(1);

/// A new file is its owner's alone: it has the addresses of all tenants' clients. One that exists keeps its mode.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// The running access log.
pub(super) struct AccessLogWriter {
    /// For the workers' journals; the thread ends with the last of them.
    pub(super) sender: LogSender,
    /// Closed when all is written.
    pub(super) written: Receiver<()>,
    /// There where the log is a file.
    pub(super) reopener: Option<LogReopener>,
}

/// Opens the log, where it is on, and starts its thread. Lines that it cannot write are counted in `queue`.
pub(super) fn open(
    log: &AccessLogTarget,
    workers: usize,
    queue: Arc<LogQueue>,
) -> Result<Option<AccessLogWriter>, StartError> {
    let to = match log {
        AccessLogTarget::Off => return Ok(None),
        AccessLogTarget::Stdout => LogOutput::Stdout,
        AccessLogTarget::File(path) => LogOutput::File(first_file(path)?, path.clone()),
    };
    let (to_writer, batches) = sync_channel(BATCHES * workers);
    let asked = Asked::default();
    let reopener = match &to {
        LogOutput::Stdout => None,
        LogOutput::File(_, path) => Some(LogReopener {
            to_writer: to_writer.clone(),
            asked: Arc::clone(&asked),
            path: path.clone(),
            reply: Mutex::default(),
        }),
    };
    let (done, written) = sync_channel(0);
    let outlet = LogSender { to_writer, queue: Arc::clone(&queue) };
    Builder::new().name("access-log".to_owned()).spawn(move || {
        write(to, &batches, &asked, &queue);
        report(&queue.take_unreported());
        drop(done);
    })?;
    Ok(Some(AccessLogWriter { sender: outlet, written, reopener }))
}

/// The file of a log that starts. A symbolic link is not opened: a user that may write to the folder must not keep
/// the process from serving, so lines are lost, and counted, until the link is removed and the file opened anew.
fn first_file(path: &Path) -> Result<Option<File>, StartError> {
    match open_file(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if path.is_symlink() => {
            let error = refused(path)(error);
            tracing::error!(
                "{error}; access log lines are lost until the path is a regular file and SIGUSR1 or a \
                 reload opens it"
            );
            Ok(None)
        }
        Err(error) => Err(refused(path)(error)),
    }
}

fn refused(path: &Path) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::AccessLog { path: path.display().to_string(), error }
}

/// What `vestibule check` can say of the log without opening it.
///
/// # Errors
/// Why it could not be opened.
pub(crate) fn check(log: &AccessLogTarget) -> Result<(), StartError> {
    match log {
        AccessLogTarget::File(path) if path.is_symlink() => Err(refused(path)(is_link())),
        AccessLogTarget::Off | AccessLogTarget::Stdout | AccessLogTarget::File(_) => Ok(()),
    }
}

fn is_link() -> io::Error {
    io::Error::other(
        "symbolic links are not followed; set the target path, or \"stdout\" for standard output",
    )
}

enum LogOutput {
    Stdout,
    /// None as long as it could not be opened.
    File(Option<File>, PathBuf),
}

impl Write for LogOutput {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout => io::stdout().write(text),
            Self::File(Some(file), _) => file.write(text),
            Self::File(None, _) => Err(is_link()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().flush(),
            Self::File(file, _) => file.as_ref().map_or(Ok(()), |mut file| file.flush()),
        }
    }
}

impl LogOutput {
    /// Opens the file anew; where that fails, the one that is open stays.
    fn reopen(&mut self) -> io::Result<()> {
        if let Self::File(file, path) = self {
            *file = Some(open_file(path)?);
        }
        Ok(())
    }
}

/// Opens the file to append to it, and makes it where it is not there. The last part of its path must not be a link: in a
/// folder that others may write, it could lead to any file of this process's user.
fn open_file(path: &Path) -> io::Result<File> {
    let is_pipe = path.symlink_metadata().is_ok_and(|found| found.file_type().is_fifo());
    // A named pipe that is opened for writing alone waits for its reader, and so would the start of the process.
    let how = if is_pipe { OFlags::RDWR } else { OFlags::WRONLY | OFlags::CREATE };
    // Without waiting: what was a file a moment ago may be a pipe by now.
    let flags = how | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, MODE) {
        Err(rustix::io::Errno::LOOP) if path.is_symlink() => return Err(is_link()),
        opened => opened?,
    };
    // Its writes do wait.
    rustix::fs::fcntl_setfl(&file, flags & OFlags::APPEND)?;
    Ok(File::from(file))
}

/// The order to open the file anew, and where its result is awaited.
type Asked = Arc<Mutex<Option<SyncSender<io::Result<()>>>>>;

/// Reopens the access log's file after it was renamed.
#[derive(Debug)]
pub(super) struct LogReopener {
    to_writer: SyncSender<LogBatch>,
    asked: Asked,
    path: PathBuf,
    /// The result of an order that the writer has not carried out yet, as where its disk stands still: one is enough.
    reply: Mutex<Option<Receiver<io::Result<()>>>>,
}

impl LogReopener {
    /// Opens the file anew, and says in the process log what came of it.
    ///
    /// # Errors
    /// Why the log goes on in the file that it has.
    pub(super) fn reopen(&self) -> Result<(), String> {
        let result = self.ask();
        let path = self.path.display();
        match &result {
            Ok(()) => tracing::info!(%path, "access log reopened"),
            Err(error) => tracing::error!("{error}"),
        }
        result
    }

    fn ask(&self) -> Result<(), String> {
        let path = self.path.display();
        let mut awaited = lock(&self.reply);
        let answers = awaited.take().unwrap_or_else(|| {
            let (answer, answers) = sync_channel(1);
            *lock(&self.asked) = Some(answer);
            match self.to_writer.try_send(LogBatch::default()) {
                // The writer looks after each batch.
                Ok(()) | Err(TrySendError::Full(_)) => {}
                Err(TrySendError::Disconnected(_)) => drop(lock(&self.asked).take()),
            }
            answers
        });
        match answers.recv_timeout(REOPENING) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!(
                "log.access: cannot append to {path}: {error}; the log continues in the file that is \
                 open, if any"
            )),
            Err(RecvTimeoutError::Timeout) => {
                *awaited = Some(answers);
                Err(format!(
                    "log.access: {path}: the writer is behind; it reopens the file once the queued lines \
                     are written"
                ))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(format!("log.access: {path}: the writer ended and cannot open a file"))
            }
        }
    }
}

fn write(mut to: LogOutput, batches: &Receiver<LogBatch>, asked: &Asked, queue: &LogQueue) {
    let mut failing = false;
    for batch in batches {
        if !batch.text.is_empty() {
            write_lines(&mut to, &batch, queue, &mut failing);
        }
        let answer = lock(asked).take();
        if let Some(answer) = answer {
            // It may not be awaited any more.
            answer.try_send(to.reopen()).unwrap_or_default();
        }
    }
}

fn write_lines(to: &mut LogOutput, batch: &LogBatch, queue: &LogQueue, failing: &mut bool) {
    let written = to.write_all(&batch.text).and_then(|()| to.flush());
    match &written {
        Ok(()) => *failing = false,
        // Said once, until it works again: a full disk must not fill the other log too.
        Err(error) if !std::mem::replace(failing, true) => {
            tracing::error!(%error, lines = batch.lines(), "cannot write the access log; its lines are lost");
        }
        Err(_) => {}
    }
    batch.release(queue, written.is_ok());
}

/// Tells the process log once a second of lines that are missing in the access log.
pub(super) async fn report_missing_lines(queue: Arc<LogQueue>) {
    let mut ticks = interval(TELLING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        report(&queue.take_unreported());
    }
}

fn report(losses: &MissingLines) {
    if losses.dropped.iter().any(|lines| *lines > 0) {
        let [sessions, rejections, strays] = losses.dropped;
        tracing::warn!(
            sessions,
            rejections,
            strays,
            "access log lines dropped: the file or its reader is slow or cannot be written"
        );
    }
    // Rejections are told of by their tenants' names.
    let [_, _, strays] = losses.left_out;
    if strays > 0 {
        tracing::warn!(
            lines = strays,
            "access log lines of connections without a tenant suppressed: lines beyond 10 per second for \
             each listener and reason are dropped"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn new_log_file_is_private_and_an_existing_one_keeps_mode_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        for text in ["one\n", "two\n"] {
            open_file(&path).unwrap().write_all(text.as_bytes()).unwrap();
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o177, 0, "{mode:o}");
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        open_file(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn symbolic_link_is_not_followed_and_refused_by_the_check() {
        let dir = tempfile::tempdir().unwrap();
        let (target, path) = (dir.path().join("target"), dir.path().join("access.log"));
        std::fs::write(&target, "precious").unwrap();
        symlink(&target, &path).unwrap();
        let log = AccessLogTarget::File(path.clone());
        let refused = check(&log).unwrap_err().to_string();
        assert!(refused.contains("symbolic links are not followed"), "{refused}");
        let writer = open(&log, 1, Arc::new(LogQueue::new(0))).unwrap().unwrap();
        let reopener = writer.reopener.unwrap();
        assert!(reopener.reopen().unwrap_err().contains("symbolic links"));
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
        reopener.reopen().unwrap();
        assert!(path.is_file() && !path.is_symlink());
        assert!(check(&AccessLogTarget::File(target)).is_ok() && check(&AccessLogTarget::Stdout).is_ok());
        // A folder that is a link is followed: systemd makes /var/log/vestibule one.
        symlink(dir.path(), dir.path().join("folder")).unwrap();
        assert!(open_file(&dir.path().join("folder/other.log")).is_ok());
        let dangling = dir.path().join("dangling");
        symlink(dir.path().join("nowhere"), &dangling).unwrap();
        assert!(open_file(&dangling).is_err() && !dir.path().join("nowhere").exists());
    }

    #[test]
    fn named_pipe_without_a_reader_is_opened_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, MODE, 0).unwrap();
        open_file(&path).unwrap().write_all(b"line\n").unwrap();
    }

    #[test]
    fn file_is_reopened_and_a_failure_keeps_the_open_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
        let log = AccessLogTarget::File(path.clone());
        let queue = Arc::new(LogQueue::new(0));
        let AccessLogWriter { sender: outlet, written, reopener } = open(&log, 1, queue).unwrap().unwrap();
        let reopener = reopener.unwrap();
        let write = |text: &str| {
            let mut batch = LogBatch::default();
            batch.text.extend_from_slice(text.as_bytes());
            outlet.to_writer.send(batch).unwrap();
        };
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        // An order to open the file anew passes lines that wait: those are in the new file then.
        let is_written = |path: &Path, text: &str| {
            while read(path) != text {
                std::thread::yield_now();
            }
        };
        write("one\n");
        is_written(&path, "one\n");
        reopener.reopen().unwrap();
        std::fs::rename(&path, &old).unwrap();
        write("two\n");
        is_written(&old, "one\ntwo\n");
        reopener.reopen().unwrap();
        write("three\n");
        is_written(&path, "three\n");
        reopener.reopen().unwrap();
        assert_eq!((read(&old), read(&path)), ("one\ntwo\n".to_owned(), "three\n".to_owned()));
        std::fs::rename(&path, &old).unwrap();
        std::fs::create_dir(&path).unwrap();
        let failure = reopener.reopen().unwrap_err();
        assert!(failure.contains("the log continues in the file that is open, if any"), "{failure}");
        write("four\n");
        drop((outlet, reopener));
        written.recv().unwrap_err();
        assert_eq!(read(&old), "three\nfour\n");
    }

    #[test]
    fn order_to_a_writer_that_has_ended_is_answered() {
        let (to_writer, batches) = sync_channel(1);
        drop(batches);
        let (asked, path) = (Asked::default(), "access.log".into());
        let reopener = LogReopener { to_writer, asked, path, reply: Mutex::default() };
        assert!(reopener.reopen().unwrap_err().contains("the writer ended"));
    }
}
