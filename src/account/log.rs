//! The access log: one JSON line for each session that ended, except load balancers' health checks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

use super::EachWay;
use crate::addr::{BackendAddr, ClientAddr, PeerAddr};
use crate::id::{EndpointId, SessionId};
use crate::outcome::Outcome;

/// One line. What was never known is left out.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// The end, RFC 3339 in UTC.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The session's number in hexadecimal.
    #[serde(serialize_with = "shown")]
    pub session: SessionId,
    /// The listener's name.
    pub listener: &'a str,
    /// The tenant's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<&'a str>,
    /// The VPC endpoint's ID, as the header says.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown_where_known")]
    pub endpoint: Option<EndpointId>,
    /// The client's address, as the header says.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown_where_known")]
    pub client: Option<ClientAddr>,
    /// The other end of the socket.
    #[serde(serialize_with = "shown")]
    pub peer: PeerAddr,
    /// The pool's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<&'a str>,
    /// The backend, or the last that was tried.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown_where_known")]
    pub backend: Option<BackendAddr>,
    /// How many backends were tried.
    pub attempts: u32,
    /// Bytes forwarded.
    #[serde(serialize_with = "each_way")]
    pub bytes: EachWay<u64>,
    /// From the pick of the first backend to the connection.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "milliseconds_where_known")]
    pub connect_ms: Option<Duration>,
    /// From accept to the end.
    #[serde(serialize_with = "milliseconds")]
    pub total_ms: Duration,
    /// Who ended it, at which step, why.
    #[serde(serialize_with = "outcome")]
    pub outcome: Outcome,
    /// The tenant's labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<&'a BTreeMap<String, String>>,
}

fn rfc3339<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&humantime::format_rfc3339_micros(*time))
}

fn shown<T: std::fmt::Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

#[expect(clippy::ref_option, reason = "serde's form")]
fn shown_where_known<T: std::fmt::Display, S: Serializer>(
    value: &Option<T>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => to.collect_str(value),
        None => to.serialize_none(),
    }
}

fn milliseconds<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64((value.as_secs_f64() * 1e6).round() / 1e3)
}

#[expect(clippy::ref_option, reason = "serde's form")]
fn milliseconds_where_known<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => milliseconds(value, to),
        None => to.serialize_none(),
    }
}

fn each_way<S: Serializer>(bytes: &EachWay<u64>, to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Form {
        to_backend: u64,
        to_client: u64,
    }
    Form { to_backend: bytes.to_backend, to_client: bytes.to_client }.serialize(to)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn outcome<S: Serializer>(outcome: &Outcome, to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Form {
        by: &'static str,
        at: &'static str,
        why: &'static str,
    }
    Form { by: outcome.by.word(), at: outcome.at.word(), why: outcome.why.word() }.serialize(to)
}

/// Lines that are ready to be written.
#[derive(Debug, Default)]
pub struct Batch {
    /// Whole lines, each with its end.
    pub text: Vec<u8>,
    /// How many.
    pub lines: u64,
}

/// The bytes after which a worker hands its lines to the writer without waiting for the next tick.
const FULL: usize = 32 * 1024;

/// Batches that may wait for the writer, for each worker: 2 MiB.
pub const QUEUE: usize = 64;

/// One worker's end of the access log: lines are collected, and handed to the writer by the batch.
#[derive(Debug)]
pub struct Journal {
    batch: RefCell<Batch>,
    /// `None` where the log is off.
    writer: Option<SyncSender<Batch>>,
    dropped: Cell<u64>,
}

impl Journal {
    /// A journal that hands its batches to `writer`.
    #[must_use]
    pub fn new(writer: Option<SyncSender<Batch>>) -> Self {
        Self { batch: RefCell::default(), writer, dropped: Cell::new(0) }
    }

    /// Adds a line.
    pub fn write(&self, record: &Record<'_>) {
        if self.writer.is_none() {
            return;
        }
        let mut batch = self.batch.borrow_mut();
        let start = batch.text.len();
        if serde_json::to_writer(&mut batch.text, record).is_ok() {
            batch.text.push(b'\n');
            batch.lines += 1;
        } else {
            batch.text.truncate(start);
        }
        let full = batch.text.len() >= FULL;
        drop(batch);
        if full {
            self.flush();
        }
    }

    /// Hands what was collected to the writer. Where the writer is behind, the lines are dropped and counted:
    /// a slow disk must not hold up traffic.
    pub fn flush(&self) {
        let Some(writer) = &self.writer else { return };
        let batch = std::mem::take(&mut *self.batch.borrow_mut());
        let lines = batch.lines;
        if lines > 0 && writer.try_send(batch).is_err() {
            self.dropped.set(self.dropped.get() + lines);
        }
    }

    /// Takes the count of lines dropped since it was last taken.
    #[must_use]
    pub fn take_dropped(&self) -> u64 {
        self.dropped.take()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};

    use super::*;
    use crate::outcome::{At, By, Why};

    fn record(labels: &BTreeMap<String, String>) -> Record<'_> {
        Record {
            time: SystemTime::UNIX_EPOCH + Duration::from_micros(1_500),
            session: SessionId::new(1, 2),
            listener: "web",
            tenant: Some("acme"),
            endpoint: EndpointId::from_bytes(b"vpce-08d2bf15fac5001c9"),
            client: Some(ClientAddr("10.100.0.5:40000".parse().unwrap())),
            peer: PeerAddr("10.0.0.7:1234".parse().unwrap()),
            pool: Some("shared"),
            backend: Some(BackendAddr("10.0.1.10:80".parse().unwrap())),
            attempts: 1,
            bytes: EachWay { to_backend: 1, to_client: 2 },
            connect_ms: Some(Duration::from_nanos(1_234_567)),
            total_ms: Duration::from_secs(2),
            outcome: Outcome::new(By::Client, At::Forward, Why::Done),
            labels: Some(labels),
        }
    }

    fn journal(queue: usize) -> (Journal, Receiver<Batch>) {
        let (sender, receiver) = sync_channel(queue);
        (Journal::new(Some(sender)), receiver)
    }

    #[test]
    fn a_line_has_all_that_is_known() {
        let labels = BTreeMap::from([("plan".to_owned(), "gold".to_owned())]);
        let (journal, receiver) = journal(1);
        journal.write(&record(&labels));
        journal.flush();
        let batch = receiver.recv().unwrap();
        assert_eq!(batch.lines, 1);
        assert_eq!(
            String::from_utf8(batch.text).unwrap(),
            concat!(
                r#"{"time":"1970-01-01T00:00:00.001500Z","session":"0001000000000002","listener":"web","#,
                r#""tenant":"acme","endpoint":"vpce-08d2bf15fac5001c9","client":"10.100.0.5:40000","#,
                r#""peer":"10.0.0.7:1234","pool":"shared","backend":"10.0.1.10:80","attempts":1,"#,
                r#""bytes":{"to_backend":1,"to_client":2},"connect_ms":1.235,"total_ms":2000.0,"#,
                r#""outcome":{"by":"client","at":"forward","why":"done"},"labels":{"plan":"gold"}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let (journal, receiver) = journal(1);
        journal.write(&Record {
            tenant: None,
            endpoint: None,
            client: None,
            pool: None,
            backend: None,
            attempts: 0,
            connect_ms: None,
            labels: None,
            ..record(&BTreeMap::new())
        });
        journal.flush();
        let line = String::from_utf8(receiver.recv().unwrap().text).unwrap();
        for key in ["tenant", "endpoint", "client", "pool", "backend", "connect_ms", "labels"] {
            assert!(!line.contains(&format!("\"{key}\":")), "{key} in {line}");
        }
        assert_eq!(serde_json::to_string(&Wrapped).unwrap(), "[null,null]");
    }

    /// Serde never calls the two with `None`, because such fields are skipped; they answer all the same.
    struct Wrapped;

    impl Serialize for Wrapped {
        fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeSeq;
            struct Null(bool);
            impl Serialize for Null {
                fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                    if self.0 {
                        shown_where_known(&None::<u8>, to)
                    } else {
                        milliseconds_where_known(&None, to)
                    }
                }
            }
            let mut seq = to.serialize_seq(Some(2))?;
            seq.serialize_element(&Null(true))?;
            seq.serialize_element(&Null(false))?;
            seq.end()
        }
    }

    #[test]
    fn a_full_batch_goes_at_once_and_a_full_queue_drops_and_counts() {
        let labels = BTreeMap::new();
        let (journal, receiver) = journal(1);
        for _ in 0..200 {
            journal.write(&record(&labels));
        }
        let dropped = journal.take_dropped();
        assert!(dropped > 0, "one batch waits, the next is dropped");
        assert_eq!(journal.take_dropped(), 0);
        let first = receiver.try_recv().unwrap();
        assert!(first.text.len() >= FULL && first.text.ends_with(b"\n"));
        journal.flush();
        assert_eq!(receiver.try_recv().unwrap().lines + first.lines + dropped, 200);
        journal.flush();
        assert!(receiver.try_recv().is_err(), "an empty batch is not sent");
    }

    #[test]
    fn lines_for_a_writer_that_has_gone_are_dropped_and_counted() {
        let (journal, receiver) = journal(1);
        drop(receiver);
        journal.write(&record(&BTreeMap::new()));
        journal.write(&record(&BTreeMap::new()));
        journal.flush();
        assert_eq!(journal.take_dropped(), 2);
    }

    #[test]
    fn a_log_that_is_off_costs_nothing() {
        let journal = Journal::new(None);
        journal.write(&record(&BTreeMap::new()));
        journal.flush();
        assert_eq!((journal.take_dropped(), journal.batch.borrow().text.capacity()), (0, 0));
    }
}
