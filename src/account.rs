//! Counters, histograms, metric names and the access log.
//!
//! Each worker writes its own counters; a scrape adds them up. So a byte forwarded
//! costs a plain addition: no lock, no label, no shared cache line.

pub mod admin_connections;
mod connect_counters;
mod counters;
pub mod dns_counters;
pub(crate) mod latency;
pub(crate) mod log;
mod log_line;
pub(crate) mod log_queue;
pub mod names;
pub mod session_metrics;
mod sparse_counters;
pub mod udp_drops;

pub use self::connect_counters::ProbeResult;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// An interned name for metric labels: compared by number, shown by name. Only [`Labels`] creates it.
#[derive(Clone, Debug)]
pub struct Label {
    serial: u32,
    name: Arc<str>,
}

impl Label {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number: equal for equal names of one [`Labels`].
    #[must_use]
    pub fn serial(&self) -> u32 {
        self.serial
    }
}

/// All labels of the process. A name keeps its number, and with it its counters, while a label of it exists.
#[derive(Debug, Default)]
pub struct Labels {
    known: Mutex<InternedNames>,
}

#[derive(Debug, Default)]
struct InternedNames {
    numbers: HashMap<Arc<str>, u32>,
    /// Numbers of names that were forgotten.
    free: Vec<u32>,
}

impl Labels {
    /// The label of `name`, new or known.
    #[must_use]
    pub fn intern(&self, name: &str) -> Label {
        let mut known = lock(&self.known);
        if let Some((name, serial)) = known.numbers.get_key_value(name) {
            return Label { serial: *serial, name: Arc::clone(name) };
        }
        // If no number was freed, all numbers below the count are in use, and the count is the next one.
        let serial = known.free.pop().or_else(|| u32::try_from(known.numbers.len()).ok());
        let label = Label { serial: serial.unwrap_or(u32::MAX), name: Arc::from(name) };
        known.numbers.insert(Arc::clone(&label.name), label.serial);
        label
    }

    /// Forgets names that no label has any more, and whose number is not held by anything that is kept by it; their numbers are
    /// given to others.
    pub fn forget_unused(&self, is_held: impl Fn(u32) -> bool) {
        let mut known = lock(&self.known);
        let InternedNames { numbers, free } = &mut *known;
        // A label is created under this lock or cloned from another label, so a count of one cannot rise meanwhile.
        numbers.retain(|name, serial| {
            let is_used = Arc::strong_count(name) > 1 || is_held(*serial);
            if !is_used {
                free.push(*serial);
            }
            is_used
        });
        if numbers.capacity() > 4 * numbers.len() {
            numbers.shrink_to(2 * numbers.len());
        }
    }

    /// The number of known names.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.known).numbers.len()
    }
}

/// A counter or gauge that one worker writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter64(AtomicU64);

impl Counter64 {
    /// Adds. Only the owning worker may call it: concurrent additions could be lost.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Subtracts; the rule of [`add`](Self::add) holds.
    #[inline]
    pub fn sub(&self, amount: u64) {
        self.add(amount.wrapping_neg());
    }

    /// The value now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Locks; a thread that panicked with the lock leaves counters, which are never half-written.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The direction of bytes or datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// From the client to the backend.
    ToBackend,
    /// From the backend to the client.
    ToClient,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::ToBackend, Self::ToClient];

    /// The label in log, metrics and documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ToBackend => "to_backend",
            Self::ToClient => "to_client",
        }
    }

    /// The other direction.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::ToBackend => Self::ToClient,
            Self::ToClient => Self::ToBackend,
        }
    }
}

/// One value for each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerDirection<T> {
    /// From the client to the backend.
    pub to_backend: T,
    /// From the backend to the client.
    pub to_client: T,
}

impl PerDirection<Counter64> {
    /// The values now.
    #[must_use]
    pub fn values(&self) -> PerDirection<u64> {
        PerDirection { to_backend: self.to_backend.value(), to_client: self.to_client.value() }
    }
}

impl<T> PerDirection<T> {
    /// The value of one direction.
    pub fn of(&self, direction: Direction) -> &T {
        match direction {
            Direction::ToBackend => &self.to_backend,
            Direction::ToClient => &self.to_client,
        }
    }

    /// The value of one direction, to be changed.
    pub fn of_mut(&mut self, direction: Direction) -> &mut T {
        match direction {
            Direction::ToBackend => &mut self.to_backend,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_keeps_its_number() {
        let labels = Labels::default();
        let (one, two) = (labels.intern("acme"), labels.intern("globex"));
        assert_eq!(labels.intern("acme").serial(), one.serial());
        assert_ne!(one.serial(), two.serial());
        assert_eq!(two.name(), "globex");
    }

    #[test]
    fn unused_names_are_forgotten_and_their_numbers_reused() {
        let labels = Labels::default();
        let kept = labels.intern("acme");
        let number = labels.intern("globex").serial();
        labels.forget_unused(|held| held == number);
        assert_eq!(labels.count(), 2, "its number is held");
        labels.forget_unused(|_| false);
        assert_eq!((labels.count(), labels.intern("acme").serial()), (1, kept.serial()));
        let (again, more) = (labels.intern("initech"), labels.intern("globex"));
        assert_eq!(again.serial(), number);
        assert!(![kept.serial(), number].contains(&more.serial()));
        drop((kept, again, more));
        labels.forget_unused(|_| false);
        assert_eq!(labels.count(), 0);
    }

    #[test]
    fn cells_add_and_subtract() {
        let cell = Counter64::default();
        cell.add(5);
        cell.sub(2);
        assert_eq!(cell.value(), 3);
        let ways = PerDirection { to_backend: Counter64::default(), to_client: cell };
        assert_eq!(ways.values(), PerDirection { to_backend: 0, to_client: 3 });
    }

    #[test]
    fn each_way_has_its_own_value() {
        let mut ways = PerDirection { to_backend: 1, to_client: 2 };
        for way in Direction::ALL {
            *ways.of_mut(way) += 10;
        }
        assert_eq!((*ways.of(Direction::ToBackend), *ways.of(Direction::ToClient)), (11, 12));
        assert_eq!(Direction::ALL.map(Direction::as_str), ["to_backend", "to_client"]);
    }

    #[test]
    fn poisoned_lock_can_be_taken() {
        let mutex = Mutex::new(1);
        let panicked = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _guard = mutex.lock().unwrap();
                    panic!("on purpose");
                })
                .join()
        });
        assert!(panicked.is_err());
        assert_eq!(*lock(&mutex), 1);
    }
}
