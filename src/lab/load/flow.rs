//! One UDP flow of the load: numbered questions, some of them open at once, and what becomes of each.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::time::{MissedTickBehavior, interval};

use super::client_addresses::ClientAddresses;
use super::datagram_requests::{DatagramRequests, RequestAnswer};
use super::{Begin, LoadFailure, LoadNotes, LoadPlan, LoadWindow};
use crate::clock::{self, Moment};
use crate::lab::backend::load::{HEAD, LoadRequest, SessionTag};
use crate::lab::datagram::{DatagramPort, ReceiveBuffer};
use crate::lab::nlb;

/// The bytes of a question before those of the flow's own: the request, and its number.
pub const FRONT: usize = HEAD + size_of::<u64>();

/// In a timeout, it is looked so often whether something has passed it.
const LOOKS: u32 = 4;

pub(super) struct LoadFlow {
    target: SocketAddr,
    window: LoadWindow,
    /// In an open loop: when each question is due.
    orders: Option<mpsc::Receiver<Moment>>,
    notes: LoadNotes,
    port: DatagramPort,
    questions: DatagramRequests,
    /// Questions that may be open at once.
    at_once: usize,
    /// What goes in front of each question.
    header: Vec<u8>,
    /// The pool that has to answer; empty accepts any.
    pool: String,
    /// The bytes of each question after its front: this flow's alone.
    body: Vec<u8>,
    out: Vec<u8>,
    /// When each of the questions in `out` was due.
    dues: Vec<Moment>,
    ended: bool,
}

impl LoadFlow {
    pub(super) fn new(
        plan: &LoadPlan,
        port: DatagramPort,
        at_once: usize,
        questions: DatagramRequests,
        mut callers: ClientAddresses,
        (window, orders, notes): Begin,
    ) -> io::Result<Self> {
        let mut rolls = fastrand::Rng::new();
        let (header, pool) = callers.next(&mut rolls, port.local_addr()?, nlb::datagram_header);
        let mut body = vec![0; plan.size.saturating_sub(FRONT)];
        rolls.fill(&mut body);
        Ok(Self {
            target: plan.target,
            window,
            orders,
            notes,
            port,
            questions,
            at_once: at_once.max(1),
            header,
            pool,
            body,
            out: Vec::new(),
            dues: Vec::new(),
            ended: false,
        })
    }

    /// Asks until the end, and takes what comes into a room that all flows share.
    pub(super) async fn run(mut self, room: Rc<RefCell<ReceiveBuffer>>) {
        let mut looks = interval((self.questions.timeout() / LOOKS).max(Duration::from_millis(1)));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.collect();
            if self.ended && self.questions.open() == 0 && self.dues.is_empty() {
                return;
            }
            if self.ask() {
                self.port.writable().await.unwrap_or_default();
                continue;
            }
            let may_order = self.may_order();
            tokio::select! {
                ready = self.port.readable() => if ready.is_ok() {
                    self.hear(&mut room.borrow_mut());
                },
                due = next(&mut self.orders), if may_order => match due {
                    Some(due) => self.take(due),
                    None => self.ended = true,
                },
                // A flow that waits for nothing is not woken: there may be thousands.
                _ = looks.tick(), if self.questions.open() > 0 => self.give_up(),
            }
        }
    }

    fn may_order(&self) -> bool {
        !self.ended && self.dues.len() + self.questions.open() < self.at_once
    }

    /// Takes an order; one after the end is the last.
    fn take(&mut self, due: Moment) {
        self.ended = due >= self.window.end;
        if !self.ended {
            self.dues.push(due);
        }
    }

    fn give_up(&mut self) {
        let (notes, window) = (&self.notes, self.window);
        self.questions.expire(clock::now(), |due| notes.lost(due, window));
    }

    /// Takes the orders that are there; in a closed loop there is one for each place that is free.
    fn collect(&mut self) {
        while self.may_order() {
            match self.orders.as_mut().map(mpsc::Receiver::try_recv) {
                None => self.take(clock::now()),
                Some(Ok(due)) => self.take(due),
                Some(Err(TryRecvError::Empty)) => return,
                Some(Err(TryRecvError::Disconnected)) => self.ended = true,
            }
        }
    }

    /// Sends the questions that are due, together. Whether some have to wait for room.
    fn ask(&mut self) -> bool {
        if self.dues.is_empty() {
            return false;
        }
        self.out.clear();
        for (number, _) in (self.questions.next()..).zip(&self.dues) {
            self.out.extend_from_slice(&self.header);
            self.out.extend_from_slice(&LoadRequest::Echo.head());
            self.out.extend_from_slice(&number.to_be_bytes());
            self.out.extend_from_slice(&self.body);
        }
        let each = self.out.len() / self.dues.len();
        let transmit = || self.port.send(self.target, &self.out, each);
        let is_full = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        // The first error may be the ICMP error of an earlier datagram.
        let sent = match transmit().or_else(|error| if is_full(&error) { Err(error) } else { transmit() }) {
            Ok(bytes) => bytes / each,
            Err(error) if is_full(&error) => 0,
            // It is not sent, so it has no answer.
            Err(_) => 1,
        };
        let now = clock::now();
        for due in self.dues.drain(..sent) {
            self.questions.ask(due, now);
        }
        !self.dues.is_empty()
    }

    fn hear(&mut self, room: &mut ReceiveBuffer) {
        let Self { port, questions, notes, pool, body, window, .. } = self;
        let received = port.receive(room, |_, bytes, each| {
            for answer in bytes.chunks(each) {
                check(answer, questions, notes, pool, body, *window);
            }
        });
        // The ICMP error of an earlier request; that request counts as lost at its timeout.
        received.unwrap_or_default();
    }
}

/// Takes down one answer.
fn check(
    answer: &[u8],
    questions: &mut DatagramRequests,
    notes: &LoadNotes,
    pool: &str,
    body: &[u8],
    window: LoadWindow,
) {
    let parts = answer.split_first_chunk::<HEAD>().and_then(|(tag, rest)| {
        let (number, rest) = rest.split_first_chunk()?;
        Some((tag, u64::from_be_bytes(*number), rest))
    });
    let Some((tag, number, rest)) = parts else { return notes.failed(LoadFailure::Wrong) };
    if !pool.is_empty() && SessionTag::new(pool).as_bytes() != tag {
        notes.misrouted();
    }
    if rest != body {
        return notes.failed(LoadFailure::Wrong);
    }
    match questions.answer(number) {
        RequestAnswer::First(due, is_reordered) => {
            let counts = is_reordered && due >= window.measured;
            notes.datagrams(|datagrams| datagrams.reordered += u64::from(counts));
            notes.succeeded(due, answer.len() as u64, window);
        }
        RequestAnswer::Again => notes.datagrams(|datagrams| datagrams.duplicates += 1),
        RequestAnswer::Late => notes.datagrams(|datagrams| datagrams.late += 1),
        RequestAnswer::Unasked => notes.failed(LoadFailure::Wrong),
    }
}

/// The next order; in a closed loop there is never one.
async fn next(orders: &mut Option<mpsc::Receiver<Moment>>) -> Option<Moment> {
    match orders {
        Some(orders) => orders.recv().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lab::load::LoadReport;

    #[test]
    fn answers_are_checked_and_counted() {
        let now = clock::now();
        let window = LoadWindow { measured: now, end: now + Duration::from_secs(1) };
        let notes = LoadNotes {
            report: Rc::new(RefCell::new(LoadReport::new())),
            progress: Arc::default(),
            measured: clock::now(),
            interval: None,
        };
        let mut questions = DatagramRequests::new(Duration::from_secs(1));
        let answer = |tag: &str, number: u64, body: &[u8]| {
            [&SessionTag::new(tag).as_bytes()[..], &number.to_be_bytes(), body].concat()
        };
        (0..4).for_each(|_| questions.ask(now, now));
        for bytes in [
            answer("acme", 1, b"own"),
            answer("acme", 0, b"own"),
            answer("acme", 0, b"own"),
            answer("hooli", 2, b"own"),
            answer("acme", 3, b"another's"),
            answer("acme", 9, b"own"),
            b"short".to_vec(),
        ] {
            check(&bytes, &mut questions, &notes, "acme", b"own", window);
        }
        let report = notes.report.borrow();
        assert_eq!((report.operations, report.misrouted), (3, 1));
        assert_eq!(report.failures[&LoadFailure::Wrong], 3);
        assert_eq!((report.datagrams.reordered, report.datagrams.duplicates), (1, 1));
        assert_eq!(report.bytes, 3 * (FRONT as u64 + 3));
    }
}
