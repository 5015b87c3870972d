//! Pure rules of a pool: which backends may be used, and which one is next.

pub mod backend;
pub mod health;
pub mod pick;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;

use self::backend::{Backend, Picked};
use self::health::State;
use crate::account::Label;
use crate::config::{Balance, Probe};

/// Interchangeable backends with one policy.
#[derive(Debug)]
pub struct Pool {
    /// Its name.
    pub label: Label,
    /// Backends tried before the first byte is forwarded.
    pub attempts: u32,
    /// Whether the client's header is passed on.
    pub send_proxy: bool,
    /// Local addresses to connect from; empty is the system's choice.
    pub sources: Vec<IpAddr>,
    /// The active check.
    pub probe: Probe,
    balance: Balance,
    backends: Vec<Arc<Backend>>,
    /// The places of those that may be used: all that are healthy, or else all that are unknown.
    usable: ArcSwap<Vec<usize>>,
    turn: AtomicUsize,
}

/// Backends that one session has tried already.
#[derive(Debug, Default)]
pub struct Tried {
    /// Most sessions try one, and need no list.
    first: Option<usize>,
    others: Vec<usize>,
}

impl Tried {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.others.len()
    }

    /// Whether none was tried.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    fn has(&self, place: usize) -> bool {
        self.first == Some(place) || self.others.contains(&place)
    }

    fn add(&mut self, place: usize) {
        if self.first.is_some() {
            self.others.push(place);
        } else {
            self.first = Some(place);
        }
    }
}

impl Pool {
    /// A pool as configured; its backends are unknown until their first probe, or healthy where there is none.
    #[must_use]
    pub fn new(label: Label, config: &crate::config::Pool, backends: Vec<Arc<Backend>>) -> Self {
        let pool = Self {
            label,
            attempts: config.attempts,
            send_proxy: config.send_proxy,
            sources: config.source_addresses.clone(),
            probe: config.health,
            balance: config.balance,
            backends,
            usable: ArcSwap::default(),
            turn: AtomicUsize::new(0),
        };
        pool.refresh();
        pool
    }

    /// All its backends.
    #[must_use]
    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// Looks again which backends may be used; called after a change of health, never by a session.
    pub fn refresh(&self) {
        let places = |state| {
            let backends = self.backends.iter().enumerate();
            backends
                .filter(|(_, backend)| backend.state() == state)
                .map(|(place, _)| place)
                .collect::<Vec<_>>()
        };
        let mut usable = places(State::Healthy);
        if usable.is_empty() {
            usable = places(State::Unknown);
        }
        self.usable.store(Arc::new(usable));
    }

    /// How many backends may be used.
    #[must_use]
    pub fn usable(&self) -> usize {
        self.usable.load().len()
    }

    /// Picks a backend that was not tried yet, and takes it down as tried. `roll` is a random number.
    ///
    /// No lock: with 64 workers each pick reads one snapshot of the usable and, for round-robin, adds to one counter.
    #[must_use]
    pub fn pick(&self, roll: u64, tried: &mut Tried) -> Option<Picked> {
        let usable = self.usable.load();
        let place = if tried.is_empty() {
            self.choose(&usable, roll)?
        } else {
            // Another attempt takes no turn of round-robin: it would be the turn of the next session, and with one
            // dead backend of two every session would start with the dead one.
            let left: Vec<usize> = usable.iter().copied().filter(|place| !tried.has(*place)).collect();
            self.less_loaded(&left, roll)?
        };
        tried.add(place);
        self.backends.get(place).map(Picked::new)
    }

    fn choose(&self, places: &[usize], roll: u64) -> Option<usize> {
        match self.balance {
            Balance::RoundRobin => {
                let index = pick::round_robin(self.turn.fetch_add(1, Ordering::Relaxed), places.len())?;
                places.get(index).copied()
            }
            Balance::P2c => self.less_loaded(places, roll),
        }
    }

    fn less_loaded(&self, places: &[usize], roll: u64) -> Option<usize> {
        let backend = |index: usize| places.get(index).and_then(|place| self.backends.get(*place));
        let load = |index: usize| backend(index).map_or(u32::MAX, |backend| backend.load());
        places.get(pick::p2c(roll, places.len(), load)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use super::*;
    use crate::account::Labels;
    use crate::addr::BackendAddr;
    use crate::pool::health::Rules;

    fn pool(balance: Balance, count: u16) -> Pool {
        let labels = Labels::default();
        let addresses: Vec<SocketAddr> = (0..count).map(|n| ([10, 0, 0, 1], 1000 + n).into()).collect();
        let config = crate::config::Pool {
            name: "shared".to_owned(),
            balance,
            backends: addresses.clone(),
            send_proxy: false,
            attempts: 3,
            source_addresses: Vec::new(),
            health: Probe::None,
        };
        let backends = addresses
            .iter()
            .map(|address| {
                let label = labels.intern(&address.to_string());
                Arc::new(Backend::new(
                    BackendAddr(*address),
                    label,
                    Rules { rise: 1, fall: 1 },
                    State::Unknown,
                ))
            })
            .collect();
        Pool::new(labels.intern("shared"), &config, backends)
    }

    fn port(picked: &Picked) -> u16 {
        picked.address().0.port()
    }

    fn observe(pool: &Pool, place: usize, healthy: bool) {
        pool.backends()[place].observe(healthy);
        pool.refresh();
    }

    #[test]
    fn round_robin_takes_each_in_turn() {
        let pool = pool(Balance::RoundRobin, 3);
        let ports: Vec<u16> = (0..6).map(|_| port(&pool.pick(0, &mut Tried::default()).unwrap())).collect();
        assert_eq!(ports, [1000, 1001, 1002, 1000, 1001, 1002]);
    }

    #[test]
    fn another_attempt_takes_no_turn() {
        let pool = pool(Balance::RoundRobin, 2);
        let firsts: Vec<u16> = (0..4)
            .map(|roll| {
                let mut tried = Tried::default();
                let first = port(&pool.pick(roll, &mut tried).unwrap());
                assert_ne!(port(&pool.pick(roll, &mut tried).unwrap()), first);
                first
            })
            .collect();
        assert_eq!(firsts, [1000, 1001, 1000, 1001]);
    }

    #[test]
    fn p2c_takes_the_less_loaded_of_two() {
        let pool = pool(Balance::P2c, 2);
        let _busy = pool.pick(0, &mut Tried::default()).unwrap();
        let free = pool.backends().iter().position(|backend| backend.load() == 0).unwrap();
        for roll in [0, 1, u64::MAX, 0x1234_5678_9ABC_DEF0] {
            assert_eq!(usize::from(port(&pool.pick(roll, &mut Tried::default()).unwrap())) - 1000, free);
        }
    }

    #[test]
    fn nobody_is_picked_from_a_pool_of_nobody() {
        for balance in [Balance::RoundRobin, Balance::P2c] {
            let pool = pool(balance, 0);
            let mut tried = Tried::default();
            assert!(pool.pick(u64::MAX, &mut tried).is_none());
            assert!(tried.is_empty() && pool.usable() == 0);
        }
    }

    #[test]
    fn nobody_is_tried_twice_and_then_nobody_is_left() {
        for balance in [Balance::RoundRobin, Balance::P2c] {
            let pool = pool(balance, 3);
            let mut tried = Tried::default();
            let mut ports: Vec<u16> =
                (0..3).map(|roll| port(&pool.pick(roll << 32 | roll, &mut tried).unwrap())).collect();
            ports.sort_unstable();
            assert_eq!(ports, [1000, 1001, 1002]);
            assert_eq!(tried.len(), 3);
            assert!(pool.pick(0, &mut tried).is_none());
        }
    }

    #[test]
    fn the_healthy_are_used_or_else_the_unknown_but_never_the_unhealthy() {
        let pool = pool(Balance::RoundRobin, 3);
        assert_eq!(pool.usable(), 3, "all are unknown");
        observe(&pool, 1, true);
        assert_eq!(port(&pool.pick(0, &mut Tried::default()).unwrap()), 1001);
        observe(&pool, 1, false);
        let mut shares = BTreeMap::new();
        for _ in 0..10 {
            *shares.entry(port(&pool.pick(0, &mut Tried::default()).unwrap())).or_insert(0) += 1;
        }
        assert_eq!(shares, BTreeMap::from([(1000, 5), (1002, 5)]));
        observe(&pool, 0, false);
        observe(&pool, 2, false);
        assert_eq!(pool.usable(), 0);
        assert!(pool.pick(0, &mut Tried::default()).is_none());
    }
}
