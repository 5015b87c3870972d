//! Sessions that wait because every backend of their pool has as many as it may have, or their tenant its share of them: first
//! come, first served, among those whose tenants may have what is free.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::backend::{Backend, WaitingSessions};
use super::picked::PickedBackend;
use crate::account::lock;
use crate::fair_share;

/// The queue of one pool. Locked only while sessions wait.
#[derive(Debug)]
pub struct PoolQueue {
    length: AtomicUsize,
    waiting: AtomicUsize,
    line: Mutex<QueueLine>,
}

#[derive(Debug, Default)]
struct QueueLine {
    /// Those of each tenant, in the order in which they came.
    tickets: HashMap<u32, VecDeque<Arc<QueueTicket>>>,
    /// Each tenant by the number of its first one.
    turns: BTreeMap<u64, u32>,
    /// The number of the next to come.
    next: u64,
}

/// A waiting session.
#[derive(Debug)]
struct QueueTicket {
    tenant: u32,
    number: u64,
    /// Until it has its turn, or leaves.
    is_waiting: AtomicBool,
    result: Mutex<TicketResult>,
}

#[derive(Debug, Default)]
struct TicketResult {
    picked: Option<PickedBackend>,
    waker: Option<Waker>,
}

/// A place in the line: ready with a backend when it is its turn. Dropping it leaves the line.
#[derive(Debug)]
pub struct QueuePlace {
    queue: Arc<PoolQueue>,
    ticket: Arc<QueueTicket>,
}

impl PoolQueue {
    /// A line for so many.
    #[must_use]
    pub fn new(length: usize) -> Arc<Self> {
        Arc::new(Self {
            length: AtomicUsize::new(length),
            waiting: AtomicUsize::new(0),
            line: Mutex::default(),
        })
    }

    /// Sets the length. Sessions that wait already stay.
    pub fn set_length(&self, length: usize) {
        self.length.store(length, Ordering::Release);
    }

    /// The number of waiting timers.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Takes the last place; `None` where the line is as long as it may be, or, `is_shared` by several tenants, this one has its
    /// share of it. After joining, serve the pool's queue once: a backend that became free a moment before has seen
    /// an empty queue.
    #[must_use]
    pub fn join(self: &Arc<Self>, tenant: u32, is_shared: bool) -> Option<QueuePlace> {
        let length = self.length.load(Ordering::Acquire);
        // A full queue is refused without the lock.
        if self.waiting() >= length {
            return None;
        }
        let mut line = lock(&self.line);
        let free = length.saturating_sub(self.waiting());
        if free == 0 || is_shared && !line.allows(tenant, length, free - 1) {
            return None;
        }
        let ticket = line.add(tenant);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Some(QueuePlace { queue: Arc::clone(self), ticket })
    }
}

impl WaitingSessions for PoolQueue {
    fn serve(&self, backend: &Arc<Backend>) -> bool {
        if backend.is_retired() {
            return true;
        }
        // Checked without the lock first, because every session of a full pool comes here. A session that joins and one
        // that frees a slot write before they read, so one of the two sees the other.
        while self.waiting() > 0 && (backend.is_used() || backend.is_spare()) && backend.has_room() {
            let next = {
                let mut line = lock(&self.line);
                if line.tickets.is_empty() {
                    return true;
                }
                let Ok(tenant) = backend.shares.enter(line.turns.values().copied()) else { return false };
                let picked = PickedBackend::take(backend);
                backend.shares.settle();
                let Some(picked) = picked else {
                    backend.shares.leave(tenant);
                    return true;
                };
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                line.take_first(tenant).map(|ticket| (ticket, picked.of(tenant)))
            };
            let Some((ticket, picked)) = next else { return true };
            let waker = {
                let mut result = lock(&ticket.result);
                result.picked = Some(picked);
                result.waker.take()
            };
            waker.into_iter().for_each(Waker::wake);
        }
        true
    }
}

impl QueueLine {
    /// Whether a tenant may have one more place of so many; `free` is what is left then.
    fn allows(&self, tenant: u32, length: usize, free: usize) -> bool {
        let own = self.tickets.get(&tenant).map_or(0, VecDeque::len);
        fair_share::is_allowed(own, self.tickets.len() + usize::from(own == 0), length, free)
    }

    fn add(&mut self, tenant: u32) -> Arc<QueueTicket> {
        let number = self.next;
        self.next += 1;
        let ticket =
            QueueTicket { tenant, number, is_waiting: AtomicBool::new(true), result: Mutex::default() };
        let ticket = Arc::new(ticket);
        let own = self.tickets.entry(tenant).or_default();
        if own.is_empty() {
            self.turns.insert(number, tenant);
        }
        own.push_back(Arc::clone(&ticket));
        ticket
    }

    fn take_first(&mut self, tenant: u32) -> Option<Arc<QueueTicket>> {
        let number = self.tickets.get(&tenant)?.front()?.number;
        self.take(tenant, number)
    }

    fn take(&mut self, tenant: u32, number: u64) -> Option<Arc<QueueTicket>> {
        let own = self.tickets.get_mut(&tenant)?;
        let place = own.binary_search_by_key(&number, |ticket| ticket.number).ok()?;
        let ticket = own.remove(place)?;
        ticket.is_waiting.store(false, Ordering::Release);
        self.turns.remove(&number);
        match own.front() {
            Some(first) => drop(self.turns.insert(first.number, tenant)),
            None => drop(self.tickets.remove(&tenant)),
        }
        Some(ticket)
    }
}

impl Future for QueuePlace {
    type Output = PickedBackend;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<PickedBackend> {
        let mut result = lock(&self.ticket.result);
        if let Some(picked) = result.picked.take() {
            return Poll::Ready(picked);
        }
        result.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        {
            // Usually the session was served, and the queue need not be searched.
            if self.ticket.is_waiting.load(Ordering::Acquire) {
                let mut line = lock(&self.queue.line);
                if line.take(self.ticket.tenant, self.ticket.number).is_some() {
                    self.queue.waiting.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
        // A backend that was assigned and not used goes to the next session in the queue. That takes the lock, so it is
        // released first.
        let given = lock(&self.ticket.result).picked.take();
        drop(given);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::pool::backend::BackendSettings;

    fn backend(queue: &Arc<PoolQueue>, most: u32) -> Arc<Backend> {
        let mut backend = Backend::standalone(
            "10.0.0.1:80",
            BackendSettings { max_sessions: Some(most), ..BackendSettings::default() },
        );
        backend.queue = Some(Arc::<PoolQueue>::clone(queue));
        Arc::new(backend)
    }

    fn poll(place: &mut QueuePlace) -> Option<PickedBackend> {
        match pin!(place).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(picked) => Some(picked),
            Poll::Pending => None,
        }
    }

    #[test]
    fn queue_is_first_in_first_out_and_bounded() {
        let queue = PoolQueue::new(2);
        let backend = backend(&queue, 1);
        let held = PickedBackend::take(&backend).unwrap();
        assert!(PickedBackend::take(&backend).is_none(), "it is full");
        let (mut first, mut second) = (queue.join(1, false).unwrap(), queue.join(1, false).unwrap());
        assert!(queue.join(1, false).is_none() && queue.waiting() == 2);
        assert!(poll(&mut first).is_none() && poll(&mut second).is_none());
        drop(held);
        assert!(poll(&mut second).is_none());
        let held = poll(&mut first).unwrap();
        assert_eq!((queue.waiting(), backend.load()), (1, 1));
        drop(held);
        assert!(poll(&mut second).is_some());
        assert_eq!((queue.waiting(), backend.load()), (0, 0));
    }

    #[test]
    fn tenant_of_a_shared_pool_gets_its_share_of_the_line() {
        let queue = PoolQueue::new(4);
        let one: Vec<_> = (0..2).map(|_| queue.join(1, true).unwrap()).collect();
        assert!(queue.join(1, true).is_none());
        let others = [2, 3].map(|tenant| queue.join(tenant, true).unwrap());
        assert!(queue.join(4, true).is_none(), "it is full");
        drop((one, others));
        let alone: Vec<_> = (0..4).map(|_| queue.join(1, false).unwrap()).collect();
        assert_eq!((alone.len(), queue.waiting()), (4, 4));
    }

    #[test]
    fn several_tenants_are_served_in_the_order_in_which_their_sessions_came() {
        let queue = PoolQueue::new(9);
        let backend = backend(&queue, 1);
        let mut held = PickedBackend::take(&backend).unwrap();
        let mut line: Vec<_> = [1, 2, 1, 1, 2].map(|tenant| Some(queue.join(tenant, false).unwrap())).into();
        line[2] = None;
        for place in [0, 1, 3, 4] {
            drop(held);
            held = poll(line[place].as_mut().unwrap()).unwrap();
        }
        assert_eq!((queue.waiting(), backend.load()), (0, 1));
    }

    #[test]
    fn cancelled_session_leaves_the_queue() {
        let queue = PoolQueue::new(9);
        let backend = backend(&queue, 1);
        let held = PickedBackend::take(&backend).unwrap();
        let (first, gone, mut last) =
            (queue.join(1, false).unwrap(), queue.join(1, false).unwrap(), queue.join(1, false).unwrap());
        drop(gone);
        assert_eq!(queue.waiting(), 2);
        drop(held);
        // It was given a backend and goes without it: the next one gets it.
        drop(first);
        assert!(poll(&mut last).is_some());
        assert_eq!((queue.waiting(), backend.load()), (0, 0));
    }

    #[test]
    fn queue_serves_no_replaced_backend() {
        let queue = PoolQueue::new(1);
        let backend = backend(&queue, 5);
        backend.set(0, u32::MAX, false);
        let mut place = queue.join(1, false).unwrap();
        queue.serve(&backend);
        assert!(poll(&mut place).is_none() && backend.load() == 0);
    }
}
