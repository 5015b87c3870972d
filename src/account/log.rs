//! The access log: one JSON line for each session that ended, except load balancers' health checks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, SystemTime};

use super::PerDirection;
use super::log_line::{TimestampFormat, address, decimal, hexadecimal, milliseconds, quote};
use super::log_queue::{LineClass, LineReservation, LogQueue};
use crate::addr::{BackendAddr, ClientAddr, PeerAddr};
use crate::id::{EndpointId, SessionId};
use crate::outcome::{Outcome, Reason};

/// One line of the access log. Unknown fields are omitted.
#[derive(Debug)]
pub struct AccessLogRecord<'a> {
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
    pub bytes: PerDirection<u64>,
    /// Datagrams forwarded, where it is a flow.
    pub datagrams: Option<PerDirection<u64>>,
    /// From the pick of the first backend to the connection.
    pub connect_ms: Option<Duration>,
    /// From accept to the end.
    pub total_ms: Duration,
    /// The outcome: side, step and reason.
    pub outcome: Outcome,
    /// What the tenant's limits have to do with it.
    pub flags: LogFlags,
    /// The tenant's labels.
    pub labels: Option<&'a BTreeMap<String, String>>,
}

/// Optional fields: the time in the pool's queue, and what the tenant's limits would have done.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogFlags {
    /// How long it waited for a backend with room, in microseconds; 0 where it did not. Few bytes, as it lives as long as
    /// its session.
    pub queued_us: u32,
    /// The reason for which it would have been rejected in enforce mode.
    pub would_reject: Option<Reason>,
    /// Whether its bytes would have had to wait.
    pub would_delay: bool,
    /// Lines of the same kind that were left out before this one.
    pub left_out: u32,
}

impl LogFlags {
    fn write(self, to: &mut Vec<u8>) {
        if self.queued_us > 0 {
            to.extend_from_slice(br#","queued_ms":"#);
            milliseconds(to, Duration::from_micros(self.queued_us.into()));
        }
        if let Some(why) = self.would_reject {
            to.extend_from_slice(br#","would_reject":[""#);
            to.extend_from_slice(why.as_str().as_bytes());
            to.extend_from_slice(br#""]"#);
        }
        if self.would_delay {
            to.extend_from_slice(br#","would_delay":true"#);
        }
        if self.left_out > 0 {
            to.extend_from_slice(br#","left_out":"#);
            decimal(to, self.left_out.into());
        }
    }
}

impl AccessLogRecord<'_> {
    /// Writes the line, with its end.
    fn write(&self, to: &mut Vec<u8>, stamp: &mut TimestampFormat) {
        to.extend_from_slice(br#"{"time":""#);
        stamp.write(to, self.time);
        to.extend_from_slice(br#"","session":""#);
        hexadecimal(to, self.session.number(), 16);
        to.extend_from_slice(br#"","listener":"#);
        quote(to, self.listener);
        self.write_client(to);
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
            (&br#","outcome":{"by":""#[..], self.outcome.by.as_str()),
            (br#"","at":""#, self.outcome.at.as_str()),
            (br#"","why":""#, self.outcome.why.as_str()),
        ] {
            to.extend_from_slice(key);
            to.extend_from_slice(word.as_bytes());
        }
        to.extend_from_slice(br#""}"#);
        self.flags.write(to);
        self.write_labels(to);
        to.extend_from_slice(b"}\n");
    }

    /// Writes client, endpoint, tenant, pool and backend.
    fn write_client(&self, to: &mut Vec<u8>) {
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
pub struct LogBatch {
    /// Whole lines, each with its end.
    pub text: Vec<u8>,
    lines: Vec<LineReservation>,
}

impl LogBatch {
    /// How many lines it has.
    #[must_use]
    pub fn lines(&self) -> usize {
        self.lines.len()
    }

    /// Releases the room of its lines in the queue; lines that could not be written are counted as dropped.
    pub fn release(&self, queue: &LogQueue, is_written: bool) {
        for line in self.lines.iter().copied() {
            if !is_written {
                queue.drop_line(line);
            }
            queue.release(line);
        }
    }
}

/// The bytes after which a worker hands its lines to the writer without waiting for the next tick.
const FULL: usize = 32 * 1024;

/// Bytes of lines that may wait, in the journals and for the writer, for each worker.
pub(crate) const QUEUE: usize = 2 * 1024 * 1024;

/// Batches that may be on their way to the writer, for each worker; the others wait in their journals.
pub(crate) const BATCHES: usize = 64;

/// The sending side of the channel to the writer.
#[derive(Clone, Debug)]
pub struct LogSender {
    /// An empty batch wakes the writer.
    pub to_writer: SyncSender<LogBatch>,
    /// Bounds the bytes of lines that wait for the writer.
    pub queue: Arc<LogQueue>,
}

/// One worker's side of the access log: lines are collected and sent to the writer in batches.
#[derive(Debug)]
pub struct AccessLogger {
    batch: RefCell<LogBatch>,
    timestamps: RefCell<TimestampFormat>,
    /// `None` where the log is off.
    sender: Option<LogSender>,
}

impl AccessLogger {
    /// A logger that sends its batches to a writer.
    #[must_use]
    pub fn new(outlet: Option<LogSender>) -> Self {
        Self { batch: RefCell::default(), timestamps: RefCell::default(), sender: outlet }
    }

    /// Whether there is a log.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.sender.is_some()
    }

    /// Adds a line of the tenant whose label has this number. Where the queue has no room for it, it is dropped and
    /// counted: a slow disk must not hold up traffic.
    pub fn write(&self, class: LineClass, tenant: u32, record: &AccessLogRecord<'_>) {
        let Some(outlet) = &self.sender else { return };
        let mut batch = self.batch.borrow_mut();
        if batch.text.capacity() == 0 {
            batch.text.reserve(FULL + FULL / 8);
        }
        let before = batch.text.len();
        record.write(&mut batch.text, &mut self.timestamps.borrow_mut());
        match outlet.queue.admit(class, tenant, batch.text.len() - before) {
            Some(held) => batch.lines.push(held),
            None => batch.text.truncate(before),
        }
        let full = batch.text.len() >= FULL;
        drop(batch);
        if full {
            self.flush();
        }
    }

    /// Counts a suppressed line.
    pub fn leave_out(&self, class: LineClass) {
        self.sender.iter().for_each(|outlet| outlet.queue.leave_out(class));
    }

    /// Sends the collected lines to the writer, if the channel has room.
    pub fn flush(&self) {
        let Some(outlet) = &self.sender else { return };
        if self.batch.borrow().lines.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut *self.batch.borrow_mut());
        match outlet.to_writer.try_send(batch) {
            Ok(()) => {}
            // They go with the next.
            Err(TrySendError::Full(batch)) => *self.batch.borrow_mut() = batch,
            Err(TrySendError::Disconnected(batch)) => batch.release(&outlet.queue, false),
        }
    }
}

impl Drop for AccessLogger {
    fn drop(&mut self) {
        self.flush();
        let rest = std::mem::take(&mut *self.batch.borrow_mut());
        self.sender.iter().for_each(|outlet| rest.release(&outlet.queue, false));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};

    use super::*;
    use crate::outcome::{EndedAt, EndedBy};

    fn record(labels: &BTreeMap<String, String>) -> AccessLogRecord<'_> {
        AccessLogRecord {
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
            bytes: PerDirection { to_backend: 1, to_client: 2 },
            datagrams: None,
            connect_ms: Some(Duration::from_nanos(1_234_567)),
            total_ms: Duration::from_secs(2),
            outcome: Outcome::new(EndedBy::Client, EndedAt::Forward, Reason::Done),
            flags: LogFlags::default(),
            labels: Some(labels),
        }
    }

    /// A logger with room for so many bytes.
    fn access_log(room: usize) -> (AccessLogger, Receiver<LogBatch>, Arc<LogQueue>) {
        let (to_writer, receiver) = sync_channel(1);
        let queue = Arc::new(LogQueue::new(room));
        (AccessLogger::new(Some(LogSender { to_writer, queue: Arc::clone(&queue) })), receiver, queue)
    }

    fn write(access_log: &AccessLogger, record: &AccessLogRecord<'_>) {
        access_log.write(LineClass::Session, 1, record);
    }

    fn received(receiver: &Receiver<LogBatch>) -> Option<LogBatch> {
        receiver.try_recv().ok()
    }

    #[test]
    fn log_line_has_all_known_fields() {
        let labels = BTreeMap::from([("plan".to_owned(), "gold".to_owned())]);
        let (access_log, receiver, _queue) = access_log(QUEUE);
        write(&access_log, &record(&labels));
        access_log.flush();
        let batch = received(&receiver).unwrap();
        assert_eq!(batch.lines(), 1);
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
    fn unknown_fields_are_omitted() {
        let (access_log, receiver, _queue) = access_log(QUEUE);
        write(
            &access_log,
            &AccessLogRecord {
                tenant: None,
                endpoint: None,
                client: None,
                pool: None,
                backend: None,
                attempts: 0,
                connect_ms: None,
                labels: None,
                ..record(&BTreeMap::new())
            },
        );
        access_log.flush();
        let line = String::from_utf8(received(&receiver).unwrap().text).unwrap();
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
    fn limit_fields_are_logged_only_where_limits_apply() {
        let (access_log, receiver, _queue) = access_log(QUEUE);
        let labels = BTreeMap::new();
        let flags = LogFlags {
            queued_us: 1_500,
            would_reject: Some(Reason::SessionLimit),
            would_delay: true,
            left_out: 7,
        };
        write(&access_log, &AccessLogRecord { flags, ..record(&labels) });
        access_log.flush();
        let line = String::from_utf8(received(&receiver).unwrap().text).unwrap();
        let expected = r#""queued_ms":1.5,"would_reject":["session_limit"],"would_delay":true,"left_out":7,"labels":{}}"#;
        assert!(line.trim_end().ends_with(expected), "{line}");
    }

    #[test]
    fn full_batch_is_sent_at_once_and_full_queue_drops_and_counts() {
        let labels = BTreeMap::new();
        // Half of it is one tenant's.
        let (access_log, receiver, queue) = access_log(8 * FULL);
        for _ in 0..400 {
            write(&access_log, &record(&labels));
        }
        let dropped = queue.missing_lines().dropped[0];
        assert!(dropped > 0);
        let first = received(&receiver).unwrap();
        assert!(first.text.len() >= FULL && first.text.ends_with(b"\n"));
        // The writer takes one at a time: the others have waited in the logger.
        access_log.flush();
        let rest = received(&receiver).unwrap();
        assert!(rest.text.len() > first.text.len());
        assert_eq!(u64::try_from(first.lines() + rest.lines()).unwrap() + dropped, 400);
        first.release(&queue, true);
        rest.release(&queue, true);
        assert_eq!((queue.waiting(), queue.missing_lines().dropped[0]), (0, dropped));
        access_log.flush();
        assert!(received(&receiver).is_none(), "an empty batch is not sent");
    }

    #[test]
    fn lines_that_the_writer_has_not_taken_at_the_end_are_counted() {
        let (access_log, receiver, queue) = access_log(QUEUE);
        for _ in 0..2 {
            write(&access_log, &record(&BTreeMap::new()));
            access_log.flush();
        }
        drop(access_log);
        assert_eq!((received(&receiver).unwrap().lines(), queue.missing_lines().dropped[0]), (1, 1));
    }

    #[test]
    fn lines_for_an_ended_writer_are_dropped_and_counted() {
        let (access_log, receiver, queue) = access_log(QUEUE);
        drop(receiver);
        write(&access_log, &record(&BTreeMap::new()));
        access_log.write(LineClass::Stray, 0, &record(&BTreeMap::new()));
        access_log.leave_out(LineClass::Stray);
        access_log.flush();
        assert_eq!((queue.missing_lines().dropped, queue.missing_lines().left_out), ([1, 0, 1], [0, 0, 1]));
        assert_eq!(queue.waiting(), 0);
    }

    #[test]
    fn disabled_log_formats_and_queues_nothing() {
        let access_log = AccessLogger::new(None);
        assert!(!access_log.is_on());
        write(&access_log, &record(&BTreeMap::new()));
        access_log.leave_out(LineClass::Stray);
        access_log.flush();
        assert_eq!(access_log.batch.borrow().text.capacity(), 0);
    }
}
