//! What became of each datagram that was sent: pure.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Moment;

/// Questions beyond the open ones that are remembered, to tell an answer that comes twice from one that comes late.
const REMEMBERED: usize = 1024;

/// The numbered questions of one flow.
#[derive(Debug)]
pub(crate) struct DatagramRequests {
    /// When an answer no longer counts.
    timeout: Duration,
    all: VecDeque<DatagramRequest>,
    /// The number of the first that is remembered.
    first: u64,
    /// All before it are closed.
    oldest: u64,
    open: usize,
    /// The highest number that was answered.
    highest: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct DatagramRequest {
    due: Moment,
    sent: Moment,
    fate: RequestFate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestFate {
    Open,
    Answered,
    Lost,
}

/// What an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestAnswer {
    /// The first to its question, which was due then; whether a later question was answered before.
    First(Moment, bool),
    /// One more to a question that has its answer.
    Again,
    /// To a question that was given up.
    Late,
    /// To an unknown request.
    Unasked,
}

impl DatagramRequests {
    /// None yet. An answer after `timeout` is late.
    #[must_use]
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, all: VecDeque::new(), first: 0, oldest: 0, open: 0, highest: None }
    }

    /// When an answer no longer counts.
    #[must_use]
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Questions without an answer.
    #[must_use]
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    /// The number of the next question.
    #[must_use]
    pub(crate) fn next(&self) -> u64 {
        self.first + self.all.len() as u64
    }

    /// The next question has been sent; it was due then.
    pub(crate) fn ask(&mut self, due: Moment, now: Moment) {
        self.all.push_back(DatagramRequest { due, sent: now, fate: RequestFate::Open });
        self.open += 1;
        while self.first < self.oldest && self.all.len() > self.open + REMEMBERED {
            self.all.pop_front();
            self.first += 1;
        }
    }

    /// An answer to the question of this number has come.
    pub(crate) fn answer(&mut self, number: u64) -> RequestAnswer {
        let Some(place) = number.checked_sub(self.first) else { return RequestAnswer::Late };
        let question = usize::try_from(place).ok().and_then(|place| self.all.get_mut(place));
        let Some(question) = question else { return RequestAnswer::Unasked };
        match question.fate {
            RequestFate::Answered => RequestAnswer::Again,
            RequestFate::Lost => RequestAnswer::Late,
            RequestFate::Open => {
                question.fate = RequestFate::Answered;
                self.open -= 1;
                let is_reordered = self.highest.is_some_and(|highest| highest > number);
                self.highest = self.highest.max(Some(number));
                RequestAnswer::First(question.due, is_reordered)
            }
        }
    }

    /// Gives up what was sent too long ago: `lost` is told when each was due.
    pub(crate) fn expire(&mut self, now: Moment, mut lost: impl FnMut(Moment)) {
        while let Some(place) = usize::try_from(self.oldest - self.first).ok()
            && let Some(question) = self.all.get_mut(place)
        {
            if question.fate == RequestFate::Open {
                if now < question.sent + self.timeout {
                    return;
                }
                question.fate = RequestFate::Lost;
                self.open -= 1;
                lost(question.due);
            }
            self.oldest += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn each_answer_has_its_result() {
        let mut questions = DatagramRequests::new(Duration::from_millis(100));
        for number in 0..4 {
            assert_eq!(questions.next(), number);
            questions.ask(at(number), at(number + 10));
        }
        assert_eq!(questions.answer(1), RequestAnswer::First(at(1), false));
        assert_eq!(questions.answer(0), RequestAnswer::First(at(0), true));
        assert_eq!(questions.answer(0), RequestAnswer::Again);
        assert_eq!(questions.answer(4), RequestAnswer::Unasked);
        assert_eq!(questions.answer(u64::MAX), RequestAnswer::Unasked);
        assert_eq!(questions.open(), 2);
        let mut lost = Vec::new();
        questions.expire(at(111), |due| lost.push(due));
        assert!(lost.is_empty());
        questions.expire(at(112), |due| lost.push(due));
        assert_eq!((lost, questions.open()), (vec![at(2)], 1));
        assert_eq!(questions.answer(2), RequestAnswer::Late);
        assert_eq!(questions.answer(3), RequestAnswer::First(at(3), false));
    }

    #[test]
    fn memory_of_ports_is_bounded_and_open_ones_are_kept() {
        let mut questions = DatagramRequests::new(Duration::from_secs(1));
        questions.ask(at(0), at(0));
        for number in 1..5_000 {
            questions.ask(at(0), at(0));
            questions.answer(number);
            questions.expire(at(1), |_| panic!("too early"));
        }
        // The first is open, and keeps those after it.
        assert_eq!((questions.open(), questions.all.len()), (1, 5_000));
        assert_eq!(questions.answer(0), RequestAnswer::First(at(0), true));
        questions.expire(at(1), |_| panic!("nothing is open"));
        questions.ask(at(2), at(2));
        assert_eq!(questions.all.len(), REMEMBERED + 1);
        assert_eq!(questions.answer(0), RequestAnswer::Late);
        assert_eq!(questions.answer(4_999), RequestAnswer::Again);
        assert_eq!(questions.answer(5_000), RequestAnswer::First(at(2), false));
    }
}
