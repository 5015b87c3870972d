//! The access log: one JSON line for each session that ended, except load balancers' health checks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, SystemTime};

use super::EachWay;
use super::line::{Stamp, address, decimal, hexadecimal, milliseconds, quote};
use crate::addr::{BackendAddr, ClientAddr, PeerAddr};
use crate::id::{EndpointId, SessionId};
use crate::outcome::{Outcome, Why};

/// One line. What was never known is left out.
#[derive(Debug)]
pub struct Record<'a> {
    /// The end, RFC 3339 in UTC.
    pub time: SystemTime,
    /// The session's number in hexadecimal.
    pub session: SessionId,
    /// The listener's name.
    pub listener: &'a str,
    /// The tenant's name.
    pub tenant: Option<&'a str>,
    /// The VPC endpoint's ID, as the header says.
    pub endpoint: Option<EndpointId>,
    /// The client's address, as the header says.
    pub client: Option<ClientAddr>,
    /// The other end of the socket.
    pub peer: PeerAddr,
    /// The pool's name.
    pub pool: Option<&'a str>,
    /// The backend, or the last that was tried.
    pub backend: Option<BackendAddr>,
    /// How many backends were tried.
    pub attempts: u32,
    /// Bytes forwarded.
    pub bytes: EachWay<u64>,
    /// Datagrams forwarded, where it is a flow.
    pub datagrams: Option<EachWay<u64>>,
    /// From the pick of the first backend to the connection.
    pub connect_ms: Option<Duration>,
    /// From accept to the end.
    pub total_ms: Duration,
    /// Who ended it, at which step, why.
    pub outcome: Outcome,
    /// What the tenant's limits have to do with it.
    pub marks: Marks,
    /// The tenant's labels.
    pub labels: Option<&'a BTreeMap<String, String>>,
}

/// What most lines do not have: how a session waited, and what its tenant's limits have to do with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// How long it waited for a backend with room, in microseconds; 0 where it did not. Few bytes, as it lives as long as
    /// its session.
    pub queued_us: u32,
    /// Why it would have been rejected, were the limits not only observed.
    pub would_reject: Option<Why>,
    /// Whether its bytes would have had to wait.
    pub would_delay: bool,
    /// Lines that tell of the tenant's rejections and were left out before this one.
    pub left_out: u64,
}

impl Marks {
    fn write(self, to: &mut Vec<u8>) {
        if self.queued_us > 0 {
            to.extend_from_slice(br#","queued_ms":"#);
            milliseconds(to, Duration::from_micros(self.queued_us.into()));
        }
        if let Some(why) = self.would_reject {
            to.extend_from_slice(br#","would_reject":[""#);
            to.extend_from_slice(why.word().as_bytes());
            to.extend_from_slice(br#""]"#);
        }
        if self.would_delay {
            to.extend_from_slice(br#","would_delay":true"#);
        }
        if self.left_out > 0 {
            to.extend_from_slice(br#","left_out":"#);
            decimal(to, self.left_out);
        }
    }
}

impl Record<'_> {
    /// Writes the line, with its end.
    fn write(&self, to: &mut Vec<u8>, stamp: &mut Stamp) {
        to.extend_from_slice(br#"{"time":""#);
        stamp.write(to, self.time);
        to.extend_from_slice(br#"","session":""#);
        hexadecimal(to, self.session.number(), 16);
        to.extend_from_slice(br#"","listener":"#);
        quote(to, self.listener);
        self.write_who(to);
        to.extend_from_slice(br#","attempts":"#);
        decimal(to, u64::from(self.attempts));
        to.extend_from_slice(br#","bytes":{"to_backend":"#);
        decimal(to, self.bytes.to_backend);
        to.extend_from_slice(br#","to_client":"#);
        decimal(to, self.bytes.to_client);
        to.push(b'}');
        if let Some(datagrams) = self.datagrams {
            to.extend_from_slice(br#","datagrams":{"to_backend":"#);
            decimal(to, datagrams.to_backend);
            to.extend_from_slice(br#","to_client":"#);
            decimal(to, datagrams.to_client);
            to.push(b'}');
        }
        if let Some(span) = self.connect_ms {
            to.extend_from_slice(br#","connect_ms":"#);
            milliseconds(to, span);
        }
        to.extend_from_slice(br#","total_ms":"#);
        milliseconds(to, self.total_ms);
        for (key, word) in [
            (&br#","outcome":{"by":""#[..], self.outcome.by.word()),
            (br#"","at":""#, self.outcome.at.word()),
            (br#"","why":""#, self.outcome.why.word()),
        ] {
            to.extend_from_slice(key);
            to.extend_from_slice(word.as_bytes());
        }
        to.extend_from_slice(br#""}"#);
        self.marks.write(to);
        self.write_labels(to);
        to.extend_from_slice(b"}\n");
    }

    /// Whose session it was, and where it went.
    fn write_who(&self, to: &mut Vec<u8>) {
        if let Some(tenant) = self.tenant {
            to.extend_from_slice(br#","tenant":"#);
            quote(to, tenant);
        }
        if let Some(endpoint) = self.endpoint {
            to.extend_from_slice(br#","endpoint":"vpce-"#);
            let (first, rest, digits) = endpoint.digits();
            if let Some(first) = first {
                hexadecimal(to, u64::from(first), 1);
            }
            hexadecimal(to, rest, digits);
            to.push(b'"');
        }
        if let Some(client) = self.client {
            to.extend_from_slice(br#","client":""#);
            address(to, client.0);
            to.push(b'"');
        }
        to.extend_from_slice(br#","peer":""#);
        address(to, self.peer.0);
        to.push(b'"');
        if let Some(pool) = self.pool {
            to.extend_from_slice(br#","pool":"#);
            quote(to, pool);
        }
        if let Some(backend) = self.backend {
            to.extend_from_slice(br#","backend":""#);
            address(to, backend.0);
            to.push(b'"');
        }
    }

    fn write_labels(&self, to: &mut Vec<u8>) {
        let Some(labels) = self.labels else { return };
        let mut before: &[u8] = br#","labels":{"#;
        for (key, value) in labels {
            to.extend_from_slice(before);
            quote(to, key);
            to.push(b':');
            quote(to, value);
            before = b",";
        }
        to.extend_from_slice(if labels.is_empty() { br#","labels":{}"# } else { b"}" });
    }
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
    stamp: RefCell<Stamp>,
    /// `None` where the log is off.
    writer: Option<SyncSender<Batch>>,
    dropped: Cell<u64>,
}

impl Journal {
    /// A journal that hands its batches to `writer`.
    #[must_use]
    pub fn new(writer: Option<SyncSender<Batch>>) -> Self {
        Self { batch: RefCell::default(), stamp: RefCell::default(), writer, dropped: Cell::new(0) }
    }

    /// Whether anybody reads the lines.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.writer.is_some()
    }

    /// Adds a line.
    pub fn write(&self, record: &Record<'_>) {
        if self.writer.is_none() {
            return;
        }
        let mut batch = self.batch.borrow_mut();
        if batch.text.capacity() == 0 {
            batch.text.reserve(FULL + FULL / 8);
        }
        record.write(&mut batch.text, &mut self.stamp.borrow_mut());
        batch.lines += 1;
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
    use crate::outcome::{At, By};

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
            datagrams: None,
            connect_ms: Some(Duration::from_nanos(1_234_567)),
            total_ms: Duration::from_secs(2),
            outcome: Outcome::new(By::Client, At::Forward, Why::Done),
            marks: Marks::default(),
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
        for key in [
            "tenant",
            "endpoint",
            "client",
            "pool",
            "backend",
            "connect_ms",
            "labels",
            "would_reject",
            "would_delay",
            "left_out",
        ] {
            assert!(!line.contains(&format!("\"{key}\":")), "{key} in {line}");
        }
    }

    #[test]
    fn what_limits_have_to_do_with_it_is_said_only_where_they_have() {
        let (journal, receiver) = journal(1);
        let labels = BTreeMap::new();
        let marks =
            Marks { queued_us: 1_500, would_reject: Some(Why::SessionLimit), would_delay: true, left_out: 7 };
        journal.write(&Record { marks, ..record(&labels) });
        journal.flush();
        let line = String::from_utf8(receiver.recv().unwrap().text).unwrap();
        let expected = r#""queued_ms":1.5,"would_reject":["session_limit"],"would_delay":true,"left_out":7,"labels":{}}"#;
        assert!(line.trim_end().ends_with(expected), "{line}");
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
        assert!(!journal.is_on());
        journal.write(&record(&BTreeMap::new()));
        journal.flush();
        assert_eq!((journal.take_dropped(), journal.batch.borrow().text.capacity()), (0, 0));
    }
}
