//! The access log's writer: a thread of its own, so that a slow disk holds up nobody.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Builder;

use super::StartError;
use crate::account::log::Batch;
use crate::config::AccessLog;

/// The sender for workers' journals, where the log is on, and what is closed when all is written: the thread ends with
/// the last sender.
type Opened = (Option<SyncSender<Batch>>, Option<Receiver<()>>);

/// Opens the log; at most `queue` batches wait for it, and lines that it cannot write are counted in `lost`.
pub(super) fn open(log: &AccessLog, queue: usize, lost: Arc<AtomicU64>) -> Result<Opened, StartError> {
    let to: Box<dyn Write + Send> = match log {
        AccessLog::Off => return Ok((None, None)),
        AccessLog::Stdout => Box::new(io::stdout()),
        AccessLog::File(path) => {
            // Whoever opens a named pipe for writing alone waits for its reader, and so would the start of the process.
            let is_pipe = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
            let file = OpenOptions::new().create(!is_pipe).append(true).read(is_pipe).open(path);
            let refused = |error| StartError::AccessLog { path: path.display().to_string(), error };
            Box::new(file.map_err(refused)?)
        }
    };
    let (sender, receiver) = sync_channel(queue);
    let (done, written) = sync_channel(0);
    Builder::new().name("access-log".to_owned()).spawn(move || {
        write(to, &receiver, &lost);
        drop(done);
    })?;
    Ok((Some(sender), Some(written)))
}

fn write(mut to: Box<dyn Write + Send>, batches: &Receiver<Batch>, lost: &AtomicU64) {
    let mut failing = false;
    for batch in batches {
        let written = to.write_all(&batch.text).and_then(|()| to.flush());
        match written {
            Ok(()) => failing = false,
            Err(error) => {
                lost.fetch_add(batch.lines, Ordering::Relaxed);
                // Said once, until it works again: a full disk must not fill the other log too.
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(%error, lines = batch.lines, "the access log cannot be written; its lines are lost");
                }
            }
        }
    }
}
