//! The bounded queue of access log lines: which lines are dropped first when the writer is behind.
//!
//! All workers share the queue, and it has room for so many bytes. How much of it one tenant may use depends on what is
//! free (dynamic thresholds, Choudhury and Hahne, 1998): a tenant's lines take at most as much as is free after them, so
//! one tenant alone takes half, and a tenant with few lines always finds room. Lines of rejections and of connections
//! without a tenant may take an eighth of what is free.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The class of a line. Under pressure the last class is dropped first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LineClass {
    /// A session or flow of a tenant.
    Session,
    /// A rejection of a tenant's session or flow at the step `tenant`.
    Rejection,
    /// A connection or datagram that ended before its tenant was known.
    Stray,
}

impl LineClass {
    /// Every class.
    pub const ALL: [Self; 3] = [Self::Session, Self::Rejection, Self::Stray];

    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Rejection => "rejection",
            Self::Stray => "stray",
        }
    }
}

/// Lines by class.
pub(crate) type Lines = [u64; LineClass::ALL.len()];

/// Places of tenants in the queue's account; tenants whose labels' numbers differ by a multiple of it share one.
const TENANTS: usize = 1024;

/// The part of the free room that rejections, and strays, may use: one eighth.
const MINOR: usize = 8;

/// Bounds the bytes of lines that wait for the writer.
#[derive(Debug)]
pub struct LogQueue {
    /// Bytes that may wait.
    room: usize,
    waiting: AtomicUsize,
    /// Bytes that wait: by tenant, then of rejections, then of strays.
    held_by_tenant: Box<[AtomicUsize]>,
    dropped: [AtomicU64; LineClass::ALL.len()],
    left_out: [AtomicU64; LineClass::ALL.len()],
    /// What the process log has been told of.
    reported: Mutex<MissingLines>,
}

/// Lines that are missing in the access log, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissingLines {
    /// Dropped because the writer was behind, or because they could not be written.
    pub dropped: Lines,
    /// Left out because there were too many of their kind in a second.
    pub left_out: Lines,
}

/// The bytes of the queue that one line occupies.
#[derive(Clone, Copy, Debug)]
pub(super) struct LineReservation {
    place: u16,
    bytes: u32,
}

impl LogQueue {
    /// An empty queue with room for so many bytes.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self {
            room,
            waiting: AtomicUsize::new(0),
            held_by_tenant: (0..TENANTS + 2).map(|_| AtomicUsize::new(0)).collect(),
            dropped: Default::default(),
            left_out: Default::default(),
            reported: Mutex::default(),
        }
    }

    /// Reserves room for a line of so many bytes, of the tenant with this label number; none where the class or the
    /// tenant has its part already. The line is counted as dropped then.
    pub(super) fn admit(&self, class: LineClass, tenant: u32, bytes: usize) -> Option<LineReservation> {
        let free = self.room.saturating_sub(self.waiting.load(Ordering::Relaxed));
        let (place, part) = match class {
            LineClass::Session => (tenant as usize % TENANTS, free),
            LineClass::Rejection => (TENANTS, free / MINOR),
            LineClass::Stray => (TENANTS + 1, free / MINOR),
        };
        let held = self.held_by_tenant.get(place)?;
        // Workers that ask at once may exceed a part by a line each: it is a bound on memory, not a limit to be exact.
        if held.load(Ordering::Relaxed) + bytes > part {
            self.drop_lines(class, 1);
            return None;
        }
        held.fetch_add(bytes, Ordering::Relaxed);
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
        Some(LineReservation { place: u16::try_from(place).ok()?, bytes: u32::try_from(bytes).ok()? })
    }

    /// Releases the room of a line.
    pub(super) fn release(&self, line: LineReservation) {
        if let Some(held) = self.held_by_tenant.get(usize::from(line.place)) {
            held.fetch_sub(line.bytes as usize, Ordering::Relaxed);
            self.waiting.fetch_sub(line.bytes as usize, Ordering::Relaxed);
        }
    }

    /// Counts lines as dropped.
    fn drop_lines(&self, class: LineClass, lines: u64) {
        add(&self.dropped, class, lines);
    }

    /// Counts a queued line that could not be written.
    pub(super) fn drop_line(&self, line: LineReservation) {
        let class = match usize::from(line.place) {
            TENANTS => LineClass::Rejection,
            place if place > TENANTS => LineClass::Stray,
            _ => LineClass::Session,
        };
        self.drop_lines(class, 1);
    }

    /// Counts a suppressed line.
    pub(super) fn leave_out(&self, class: LineClass) {
        add(&self.left_out, class, 1);
    }

    /// The queued bytes.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// All missing lines since the start.
    #[must_use]
    pub fn missing_lines(&self) -> MissingLines {
        let values = |counts: &[AtomicU64; LineClass::ALL.len()]| {
            counts.each_ref().map(|count| count.load(Ordering::Relaxed))
        };
        MissingLines { dropped: values(&self.dropped), left_out: values(&self.left_out) }
    }

    /// The missing lines since the last call.
    #[must_use]
    pub fn take_unreported(&self) -> MissingLines {
        let mut told = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.missing_lines();
        let before = std::mem::replace(&mut *told, now);
        let since = |now: Lines, before: Lines| {
            let mut lines = now;
            lines.iter_mut().zip(before).for_each(|(line, before)| *line -= before);
            lines
        };
        MissingLines {
            dropped: since(now.dropped, before.dropped),
            left_out: since(now.left_out, before.left_out),
        }
    }
}

fn add(counts: &[AtomicU64; LineClass::ALL.len()], class: LineClass, lines: u64) {
    if let Some(count) = counts.get(class as usize) {
        count.fetch_add(lines, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: usize = 100;

    /// Admits lines until one is dropped; how many there were.
    fn fill(queue: &LogQueue, class: LineClass, tenant: u32) -> Vec<LineReservation> {
        std::iter::from_fn(|| queue.admit(class, tenant, LINE)).collect()
    }

    #[test]
    fn one_tenant_takes_half_of_the_queue_and_others_still_find_room() {
        let queue = LogQueue::new(64 * LINE);
        assert_eq!(fill(&queue, LineClass::Session, 7).len(), 32);
        assert_eq!(fill(&queue, LineClass::Session, 8).len(), 16);
        assert_eq!(fill(&queue, LineClass::Session, 9).len(), 8);
        assert!(queue.admit(LineClass::Session, 10, LINE).is_some(), "a tenant with one line has room");
        assert_eq!(queue.missing_lines().dropped, [3, 0, 0]);
    }

    #[test]
    fn unidentified_and_rejection_lines_leave_room_for_session_lines() {
        let queue = LogQueue::new(64 * LINE);
        assert_eq!(fill(&queue, LineClass::Stray, 0).len(), 7);
        assert_eq!(fill(&queue, LineClass::Rejection, 0).len(), 6);
        assert_eq!(fill(&queue, LineClass::Session, 0).len(), 26, "half of what is left");
        assert!(queue.admit(LineClass::Stray, 0, LINE).is_none());
        assert_eq!(queue.missing_lines().dropped, [1, 1, 2]);
    }

    #[test]
    fn written_lines_give_back_their_room_and_lost_ones_are_counted_by_class() {
        let queue = LogQueue::new(64 * LINE);
        let held: Vec<_> = LineClass::ALL.iter().filter_map(|class| queue.admit(*class, 3, LINE)).collect();
        assert_eq!((held.len(), queue.waiting()), (3, 3 * LINE));
        for line in held {
            queue.drop_line(line);
            queue.release(line);
        }
        assert_eq!((queue.waiting(), queue.missing_lines().dropped), (0, [1, 1, 1]));
        assert!(queue.held_by_tenant.iter().all(|held| held.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn losses_are_reported_once() {
        let queue = LogQueue::new(0);
        assert!(queue.admit(LineClass::Stray, 0, LINE).is_none());
        queue.leave_out(LineClass::Rejection);
        assert_eq!(queue.take_unreported(), MissingLines { dropped: [0, 0, 1], left_out: [0, 1, 0] });
        assert_eq!(queue.take_unreported(), MissingLines::default());
        assert_eq!(queue.missing_lines().dropped, [0, 0, 1]);
    }

    #[test]
    fn every_class_has_its_index_and_label() {
        assert!(LineClass::ALL.iter().enumerate().all(|(place, class)| *class as usize == place));
        assert_eq!(LineClass::ALL.map(LineClass::as_str), ["session", "rejection", "stray"]);
    }
}
