//! The least loaded of many without a look at each: a tournament of tens.
//!
//! Every backend is a leaf, and every node above holds the best of its ten. The last comparison has no node: a pick
//! for the winner plays it. A change of one leaf plays the games above it again: two of them for 1,000 backends.
//! Workers update the tree without a lock: a node is replaced only if it is still what was read, and a worker that
//! replaced one looks once more (after Jayanti, "f-arrays: implementation and applications", PODC 2002, section 3).
//!
//! A scan instead costs 7.5 % of a whole session at 1,000 backends (2026-12-01; benches/README.md, "pick").

use std::hint::select_unpredictable;
use std::iter::zip;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many play one game.
const PLAYERS: usize = 10;
/// Bits of a node, from the top: sessions in relation to the weight, one that is never set, its turn, and the leaf.
const STAMP_BITS: u32 = 20;
const LEAF_BITS: u32 = 16;
/// Takes the carry of a sum of stamps, so that it does not reach the sessions.
const CARRY: u64 = 1 << (STAMP_BITS + LEAF_BITS);
/// A unit that leaves no two loads equal that are not.
const EXACT: u32 = 1 << 20;
/// Half of all stamps: what is less ahead than this is ahead.
const HALF: u64 = 1 << (STAMP_BITS - 1);
/// How far a turn of the greatest weight, 64,000 parts, moves a stamp: far enough that weights differ by their share.
const STRIDE: u32 = 20 * 64_000;
/// A leaf that gets no sessions.
const NO_LEAF: u64 = !CARRY;

/// The tournament of a pool's backends.
#[derive(Debug)]
pub struct Tournament {
    /// The first ten play the last game. Node `n` holds the best of the ten from `10(n + 1)` on; the leaves come last.
    nodes: Vec<AtomicU64>,
    leaves: usize,
    /// Sessions count in whole multiples of this weight's share.
    unit: AtomicU32,
    /// The stamp of the last pick. Each pick moves its backend's stamp on, the further the smaller its weight, and of equals
    /// the one that is furthest behind wins: so equals have turns by weight (Waldspurger and Weihl, "Stride scheduling",
    /// 1995).
    turn: AtomicU64,
}

impl Tournament {
    /// An empty tournament for at most 65,535 backends.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let mut leaves = PLAYERS;
        while leaves < count {
            leaves *= PLAYERS;
        }
        let nodes = (0..leaves + above(leaves)).map(|_| AtomicU64::new(NO_LEAF)).collect();
        Self { nodes, leaves, unit: AtomicU32::new(EXACT), turn: AtomicU64::new(0) }
    }

    /// From the next change of each backend on, sessions count by how many a backend of this weight would have: so
    /// those that are equally full but for a part of one session are equals, and take turns by weight. Otherwise a
    /// backend of small weight and no session would always be the emptiest, and get more than its share.
    pub fn count_by(&self, unit: u32) {
        self.unit.store(unit, Ordering::SeqCst);
    }

    /// The least loaded.
    #[must_use]
    pub fn winner(&self) -> Option<usize> {
        let best = best(read(self.players(0)?), self.turn.load(Ordering::Relaxed));
        (best != NO_LEAF).then(|| usize::try_from(best & mask(LEAF_BITS)).ok())?
    }

    /// Takes in that a backend was picked, and has its turn behind it. `look` says how many sessions it has and what its
    /// weight is.
    pub fn picked(&self, leaf: usize, look: impl Fn() -> (u32, u32)) {
        let turn = self.turn.load(Ordering::Relaxed);
        let now = look();
        let stride = stride(now.1);
        let base = self.stamp(leaf, turn, stride).filter(|stamp| is_ahead(*stamp, turn)).unwrap_or(turn);
        if base != turn {
            self.turn.store(base, Ordering::Relaxed);
        }
        self.play(leaf, (base + stride) & mask(STAMP_BITS), now, look);
    }

    /// Updates the sessions and weight of a backend; with weight 0 it gets no sessions.
    pub fn changed(&self, leaf: usize, look: impl Fn() -> (u32, u32)) {
        let turn = self.turn.load(Ordering::Relaxed);
        let now = look();
        let stamp = self.stamp(leaf, turn, stride(now.1)).unwrap_or(turn);
        self.play(leaf, stamp, now, look);
    }

    /// The stamp of a backend that takes part, if it is within one turn of the last pick's. One that was out or busy
    /// for long has its turn now: it neither has all those that it missed nor, where the stamps went round meanwhile,
    /// waits for its old one to come again.
    fn stamp(&self, leaf: usize, turn: u64, stride: u64) -> Option<u64> {
        let node = self.node(self.first_leaf() + leaf)?.load(Ordering::SeqCst);
        let stamp = node >> LEAF_BITS & mask(STAMP_BITS);
        let is_recent = stamp.wrapping_sub(turn).wrapping_add(stride) & mask(STAMP_BITS) <= 2 * stride;
        (node != NO_LEAF && is_recent).then_some(stamp)
    }

    fn first_leaf(&self) -> usize {
        above(self.leaves)
    }

    fn node(&self, at: usize) -> Option<&AtomicU64> {
        self.nodes.get(at)
    }

    /// The children of a node.
    fn players(&self, game: usize) -> Option<&[AtomicU64; PLAYERS]> {
        self.nodes.get(game * PLAYERS..)?.first_chunk()
    }

    /// Puts a leaf in its place and plays the games above it, but for the last.
    fn play(&self, leaf: usize, stamp: u64, now: (u32, u32), look: impl Fn() -> (u32, u32)) {
        let mut at = self.first_leaf() + leaf;
        let Some(own) = self.node(at) else { return };
        // A writer checks again after storing: the last one has stored the present state.
        let look = || (look(), self.unit.load(Ordering::SeqCst));
        let mut seen = (now, self.unit.load(Ordering::SeqCst));
        loop {
            let ((load, weight), unit) = seen;
            own.store(node((load, unit), weight, stamp, leaf), Ordering::SeqCst);
            let again = look();
            if again == seen {
                break;
            }
            seen = again;
        }
        let turn = self.turn.load(Ordering::Relaxed);
        // The last comparison is made by each pick.
        while at >= PLAYERS {
            let game = at / PLAYERS;
            at = game - 1;
            // The worker that replaced the node continues from there.
            if !self.replay(at, game, turn) {
                return;
            }
        }
    }

    /// Updates a node until it holds the best of its children; returns whether it changed meanwhile.
    ///
    /// After writing a winner, checks that the children are unchanged: a worker that changed one since may have
    /// found the node as it had to be, and left.
    fn replay(&self, at: usize, game: usize, turn: u64) -> bool {
        let (Some(node), Some(players)) = (self.node(at), self.players(game)) else { return false };
        let mut is_changed = false;
        loop {
            let before = node.load(Ordering::SeqCst);
            let seen = read(players);
            let best = best(seen, turn);
            if before == best {
                return is_changed;
            }
            is_changed = true;
            let put = node.compare_exchange(before, best, Ordering::SeqCst, Ordering::SeqCst);
            if put.is_ok() && zip(players, seen).all(|(player, seen)| player.load(Ordering::SeqCst) == seen) {
                return true;
            }
        }
    }
}

/// How many nodes stand before so many leaves.
fn above(leaves: usize) -> usize {
    // A tenth, and a hundredth, and so on.
    (leaves - 1) / (PLAYERS - 1) - 1
}

fn read(players: &[AtomicU64; PLAYERS]) -> [u64; PLAYERS] {
    players.each_ref().map(|player| player.load(Ordering::SeqCst))
}

const fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// How far a turn moves a stamp.
fn stride(weight: u32) -> u64 {
    // In 32 bits, for that is the faster division.
    u64::from(STRIDE / weight.max(1)).min(HALF / 4)
}

fn node((load, unit): (u32, u32), weight: u32, stamp: u64, leaf: usize) -> u64 {
    // 27 bits; beyond them all are equally full.
    let relative = match weight {
        0 => return NO_LEAF,
        _ if weight == unit => u64::from(load),
        _ => u64::from(load) * u64::from(unit) / u64::from(weight),
    };
    let relative = relative.min(mask(63 - STAMP_BITS - LEAF_BITS) - 1);
    relative << (1 + STAMP_BITS + LEAF_BITS) | stamp << LEAF_BITS | leaf as u64
}

/// Whether a stamp is ahead of another, in the arithmetic of serial numbers (RFC 1982), for stamps wrap.
fn is_ahead(stamp: u64, other: u64) -> bool {
    let ahead = stamp.wrapping_sub(other) & mask(STAMP_BITS);
    ahead > 0 && ahead < HALF
}

/// The one with the fewest sessions; of equals the one whose turn is first, as seen from the turn that it is.
///
/// The result is unpredictable: a mispredicted branch would cost more than all the rest.
fn best(players: [u64; PLAYERS], turn: u64) -> u64 {
    let now = HALF.wrapping_sub(turn) & mask(STAMP_BITS);
    let keys = players.map(|player| player.wrapping_add(now << LEAF_BITS) & !CARRY);
    let least =
        keys.into_iter().fold(u64::MAX, |left, right| select_unpredictable(left <= right, left, right));
    let then = turn.wrapping_sub(HALF) & mask(STAMP_BITS);
    least.wrapping_add(then << LEAF_BITS) & !CARRY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_tournament_has_no_winner() {
        assert_eq!(Tournament::new(0).winner(), None);
        let tournament = Tournament::new(3);
        tournament.changed(1, || (5, 0));
        assert_eq!(tournament.winner(), None);
    }

    #[test]
    fn least_loaded_by_weight_wins() {
        let tournament = Tournament::new(5);
        for (leaf, load, weight) in [(0, 10, 100), (1, 4, 50), (2, 1, 1), (3, 90, 1000), (4, 0, 0)] {
            tournament.changed(leaf, || (load, weight));
        }
        assert_eq!(tournament.winner(), Some(1));
        tournament.changed(1, || (5, 50));
        assert_eq!(tournament.winner(), Some(3));
        tournament.changed(3, || (100, 1000));
        tournament.changed(2, || (0, 1));
        assert_eq!(tournament.winner(), Some(2));
    }

    #[test]
    fn equals_take_turns_over_the_wrap_of_the_stamps() {
        let tournament = Tournament::new(3);
        for leaf in 0..3 {
            tournament.changed(leaf, || (0, 7));
        }
        tournament.turn.store(mask(STAMP_BITS) - 20, Ordering::Relaxed);
        for leaf in 0..3 {
            tournament.picked(leaf, || (0, 7));
        }
        for turn in 0..60 {
            let winner = tournament.winner().unwrap();
            assert_eq!(winner, turn % 3);
            tournament.picked(winner, || (1, 7));
            tournament.changed(winner, || (0, 7));
        }
    }

    #[test]
    fn equal_backends_take_turns_by_weight_and_a_returning_one_does_not_catch_up() {
        let tournament = Tournament::new(4);
        let weights = [6_400, 12_800, 0, 44_800];
        let mut counts = [0_u32; 4];
        for (leaf, weight) in weights.into_iter().enumerate() {
            tournament.changed(leaf, || (0, weight));
        }
        let turns = |count: u32, counts: &mut [u32; 4]| {
            for _ in 0..count {
                let winner = tournament.winner().unwrap();
                tournament.picked(winner, || (0, weights[winner]));
                counts[winner] += 1;
            }
        };
        turns(10_000, &mut counts);
        for (count, due) in counts.into_iter().zip([1_000, 2_000, 0, 7_000]) {
            assert!(count.abs_diff(due) <= due / 50, "{counts:?}");
        }
        tournament.changed(0, || (0, 0));
        turns(10_000, &mut counts);
        tournament.changed(0, || (0, weights[0]));
        let mut after = [0; 4];
        turns(1_000, &mut after);
        assert!(after[0].abs_diff(100) <= 5, "{after:?}");
    }

    #[test]
    fn load_difference_below_one_session_is_a_tie() {
        let tournament = Tournament::new(2);
        tournament.count_by(50);
        tournament.changed(0, || (0, 50));
        tournament.changed(1, || (3, 200));
        assert_eq!(tournament.winner(), Some(0), "equals, and the first has its turn");
        tournament.picked(0, || (0, 50));
        assert_eq!(tournament.winner(), Some(1));
        tournament.changed(1, || (4, 200));
        assert_eq!(tournament.winner(), Some(0));
        tournament.changed(0, || (1, 50));
        assert_eq!(tournament.winner(), Some(1), "one and four of four times the weight are as much");
    }

    #[test]
    fn many_players_at_once_leave_the_true_winner() {
        let tournament = Tournament::new(100);
        for leaf in 0..100 {
            tournament.changed(leaf, || (3, 10));
        }
        std::thread::scope(|scope| {
            for player in 0..4_usize {
                let tournament = &tournament;
                scope.spawn(move || {
                    for turn in 0..10_000_u32 {
                        tournament.changed(player * 25 + turn as usize % 25, || (turn % 50, 10));
                    }
                });
            }
        });
        for leaf in 0..100 {
            let loads = |other: usize| u32::from(other != leaf);
            for other in 0..100 {
                tournament.changed(other, || (loads(other), 10));
            }
            assert_eq!(tournament.winner(), Some(leaf));
        }
    }
}
