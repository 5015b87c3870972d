//! Deadlines of many sessions on one coarse timing wheel: no timer per session, no clock reading per byte.
//!
//! Pure: time comes in as a [`Tick`]. Moving a deadline back, as every byte does, only stores a number; the wheel
//! looks at it again when the old deadline comes round (a lazy wheel, as in Varghese and Lauck, "Hashed and
//! hierarchical timing wheels", 1987, scheme 6).

use std::task::Waker;
use std::time::Duration;

use slab::Slab;

/// Coarse time: a count of [`Tick::SPAN`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(u32);

impl Tick {
    /// How long a tick is. A timeout is late by up to two of them, and never early.
    pub const SPAN: Duration = Duration::from_millis(50);

    /// A tick that does not come: 6.8 years after the start.
    pub const NEVER: Self = Self(u32::MAX);

    /// The tick at `elapsed` since the wheel's start.
    #[must_use]
    pub fn at(elapsed: Duration) -> Self {
        Self(u32::try_from(elapsed.as_millis() / Self::SPAN.as_millis()).unwrap_or(u32::MAX))
    }

    /// This tick and `span` more.
    #[must_use]
    pub const fn after(self, span: TickSpan) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// The tick so long before this one, or the first of all.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(Self::at(duration).0))
    }

    /// How long ago `earlier` was, to the tick; zero where it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Self::SPAN * self.0.saturating_sub(earlier.0)
    }
}

/// A length of coarse time, computed once: adding it to a [`Tick`] needs no division.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TickSpan(u32);

impl TickSpan {
    /// At least `duration`: rounded up, and one tick more for the part of the present one that has passed.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "what does not fit is cut before")]
    pub const fn of(duration: Duration) -> Self {
        let ticks = duration.as_nanos().div_ceil(Tick::SPAN.as_nanos()) + 1;
        Self(if ticks > u32::MAX as u128 { u32::MAX } else { ticks as u32 })
    }

    /// How long that is at most.
    #[must_use]
    pub fn duration(self) -> Duration {
        Tick::SPAN * self.0
    }
}

/// Identifies a timer until it is removed.
#[derive(Debug, PartialEq, Eq)]
pub struct TimerKey(u32);

/// The number of slots: with ticks of 50 ms, deadlines more than 51 s away come round more than once.
const SLOTS: u32 = 1024;
/// No node.
const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct TimerNode {
    prev: u32,
    next: u32,
    slot: u32,
    deadline: Tick,
    /// No `Option`: the slab marks a vacant entry in the niche that it would use, and a node stays 32 bytes.
    waker: Waker,
}

/// The wheel of one worker.
#[derive(Debug)]
pub struct TimerWheel {
    now: Tick,
    heads: Vec<u32>,
    nodes: Slab<TimerNode>,
}

impl Default for TimerWheel {
    fn default() -> Self {
        Self { now: Tick::default(), heads: vec![NIL; SLOTS as usize], nodes: Slab::new() }
    }
}

impl TimerWheel {
    /// The tick that the wheel was last advanced to.
    #[must_use]
    pub fn now(&self) -> Tick {
        self.now
    }

    /// The number of waiting timers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether the wheel is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Adds a timer that wakes its waker at `deadline`.
    pub fn insert(&mut self, deadline: Tick) -> TimerKey {
        let node = TimerNode { prev: NIL, next: NIL, slot: NIL, deadline, waker: Waker::noop().clone() };
        let place = u32::try_from(self.nodes.insert(node)).unwrap_or(NIL);
        self.link(place);
        TimerKey(place)
    }

    /// Sets the waker.
    pub fn wake_with(&mut self, key: &TimerKey, waker: &Waker) {
        if let Some(node) = self.nodes.get_mut(key.0 as usize) {
            node.waker.clone_from(waker);
        }
    }

    /// Sets a new deadline.
    pub fn set(&mut self, key: &TimerKey, deadline: Tick) {
        let Some(node) = self.nodes.get_mut(key.0 as usize) else { return };
        let sooner = deadline < node.deadline;
        node.deadline = deadline;
        if sooner {
            self.unlink(key.0);
            self.link(key.0);
        }
    }

    /// Whether the deadline has come.
    #[must_use]
    pub fn is_due(&self, key: &TimerKey) -> bool {
        self.nodes.get(key.0 as usize).is_some_and(|node| node.deadline <= self.now)
    }

    /// Removes a timer.
    #[expect(clippy::needless_pass_by_value, reason = "a key ends with its node")]
    pub fn remove(&mut self, key: TimerKey) {
        self.unlink(key.0);
        drop(self.nodes.try_remove(key.0 as usize));
        if self.nodes.is_empty() {
            // Frees the memory of a past burst of timers.
            self.nodes = Slab::new();
        }
    }

    /// Advances to `now` and calls `due` with the waker of each due timer. Going back does nothing.
    ///
    /// A timer that is due stays on the wheel and fires again at the next tick, until its deadline moves or it is
    /// removed.
    pub fn advance(&mut self, now: Tick, mut due: impl FnMut(&Waker)) {
        let steps = now.0.saturating_sub(self.now.0).min(SLOTS);
        self.now = self.now.max(now);
        // A jump of more than a turn begins with the next tick's slot: timers that are due are put there again, and
        // would be called twice if it came later.
        let first = self.now.0.wrapping_sub(steps).wrapping_add(1);
        for step in 0..steps {
            let slot = first.wrapping_add(step) % SLOTS;
            let mut place =
                self.heads.get_mut(slot as usize).map_or(NIL, |head| std::mem::replace(head, NIL));
            while let Some(node) = self.nodes.get_mut(place as usize) {
                let next = node.next;
                node.slot = NIL;
                if node.deadline <= self.now {
                    due(&node.waker);
                }
                self.link(place);
                place = next;
            }
        }
    }

    /// Calls `due` with the waker of each, whatever its deadline.
    pub fn wake_all(&self, mut due: impl FnMut(&Waker)) {
        self.nodes.iter().for_each(|(_, node)| due(&node.waker));
    }

    /// Puts a node into the slot of its deadline: never the current one, never more than a turn ahead.
    fn link(&mut self, place: u32) {
        let Some(node) = self.nodes.get(place as usize) else { return };
        let ahead = node.deadline.0.saturating_sub(self.now.0).clamp(1, SLOTS - 1);
        let slot = self.now.0.wrapping_add(ahead) % SLOTS;
        let Some(head) = self.heads.get_mut(slot as usize) else { return };
        let next = std::mem::replace(head, place);
        if let Some(second) = self.nodes.get_mut(next as usize) {
            second.prev = place;
        }
        if let Some(node) = self.nodes.get_mut(place as usize) {
            (node.prev, node.next, node.slot) = (NIL, next, slot);
        }
    }

    fn unlink(&mut self, place: u32) {
        let Some(node) = self.nodes.get_mut(place as usize) else { return };
        let (prev, next, slot) = (node.prev, node.next, std::mem::replace(&mut node.slot, NIL));
        if let Some(after) = self.nodes.get_mut(next as usize) {
            after.prev = prev;
        }
        if let Some(before) = self.nodes.get_mut(prev as usize) {
            before.next = next;
        } else if let Some(head) = self.heads.get_mut(slot as usize) {
            *head = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn waits(wheel: &mut TimerWheel, deadline: u32) -> (TimerKey, Arc<Count>) {
        let count = Arc::new(Count::default());
        let key = wheel.insert(Tick(deadline));
        wheel.wake_with(&key, &Waker::from(Arc::clone(&count)));
        (key, count)
    }

    fn woken(count: &Count) -> usize {
        count.0.swap(0, Ordering::Relaxed)
    }

    #[test]
    fn ticks_round_up_and_never_early() {
        assert_eq!(Tick::at(Duration::from_millis(49)), Tick(0));
        assert_eq!(Tick::at(Duration::from_millis(50)), Tick(1));
        assert_eq!(Tick::at(Duration::MAX), Tick(u32::MAX));
        assert_eq!(Tick(3).after(TickSpan::of(Duration::ZERO)), Tick(4));
        assert_eq!(Tick(3).after(TickSpan::of(Duration::from_millis(50))), Tick(5));
        assert_eq!(Tick(3).after(TickSpan::of(Duration::from_millis(51))), Tick(6));
        assert_eq!(Tick(3).after(TickSpan::of(Duration::MAX)), Tick(u32::MAX));
    }

    #[test]
    fn one_is_woken_at_its_tick_and_again_after_a_tick_while_it_stays_due() {
        let mut wheel = TimerWheel::default();
        let (key, count) = waits(&mut wheel, 5);
        wheel.advance(Tick(4), Waker::wake_by_ref);
        assert_eq!((woken(&count), wheel.is_due(&key)), (0, false));
        wheel.advance(Tick(5), Waker::wake_by_ref);
        assert_eq!((woken(&count), wheel.is_due(&key)), (1, true));
        wheel.advance(Tick(6), Waker::wake_by_ref);
        assert_eq!(woken(&count), 1);
        wheel.remove(key);
        wheel.advance(Tick(7), Waker::wake_by_ref);
        assert_eq!((woken(&count), wheel.len(), wheel.is_empty()), (0, 0, true));
    }

    #[test]
    fn deadline_moves_forward_and_back() {
        let mut wheel = TimerWheel::default();
        let (key, count) = waits(&mut wheel, 5);
        wheel.set(&key, Tick(5000));
        wheel.advance(Tick(4999), Waker::wake_by_ref);
        assert_eq!(woken(&count), 0);
        wheel.set(&key, Tick(0));
        wheel.advance(Tick(5000), Waker::wake_by_ref);
        assert_eq!(woken(&count), 1);
        assert_eq!(wheel.now(), Tick(5000));
        wheel.advance(Tick(3), Waker::wake_by_ref);
        assert_eq!((woken(&count), wheel.now()), (0, Tick(5000)));
        wheel.remove(key);
    }

    #[test]
    fn clock_jump_over_a_whole_turn_wakes_each_timer_once() {
        for jump in [SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS + 1, u32::MAX] {
            let mut wheel = TimerWheel::default();
            let (first, one) = waits(&mut wheel, 0);
            let (second, two) = waits(&mut wheel, SLOTS - 1);
            let (third, never) = waits(&mut wheel, jump.saturating_add(1));
            wheel.advance(Tick(jump), Waker::wake_by_ref);
            assert_eq!((woken(&one), woken(&two)), (1, 1), "{jump}");
            assert_eq!(woken(&never), usize::from(jump == u32::MAX));
            for key in [first, second, third] {
                wheel.remove(key);
            }
        }
    }

    #[test]
    fn slot_is_reused_while_others_wait() {
        let mut wheel = TimerWheel::default();
        let (stays, count) = waits(&mut wheel, 9);
        let (first, _) = waits(&mut wheel, 9);
        let (second, _) = waits(&mut wheel, 9);
        wheel.remove(second);
        wheel.remove(first);
        let (third, other) = waits(&mut wheel, 8);
        assert_eq!(wheel.len(), 2);
        wheel.advance(Tick(8), Waker::wake_by_ref);
        assert_eq!((woken(&count), woken(&other)), (0, 1));
        wheel.remove(third);
        wheel.remove(stays);
        assert_eq!(wheel.nodes.capacity(), 0, "a flood's memory goes back");
    }

    #[test]
    fn all_can_be_woken_at_once() {
        let mut wheel = TimerWheel::default();
        let (first, one) = waits(&mut wheel, 500);
        let (second, two) = waits(&mut wheel, 50_000);
        let silent = wheel.insert(Tick(7));
        wheel.wake_all(Waker::wake_by_ref);
        assert_eq!((woken(&one), woken(&two)), (1, 1));
        for key in [first, second, silent] {
            wheel.remove(key);
        }
        wheel.wake_all(Waker::wake_by_ref);
        assert_eq!((woken(&one), woken(&two)), (0, 0));
    }

    #[test]
    fn node_has_a_niche_for_the_slab() {
        assert_eq!(size_of::<Option<TimerNode>>(), 32);
    }

    #[test]
    fn waker_can_be_replaced() {
        let mut wheel = TimerWheel::default();
        let (key, old) = waits(&mut wheel, 1);
        let new = Arc::new(Count::default());
        wheel.wake_with(&key, &Waker::from(Arc::clone(&new)));
        wheel.advance(Tick(1), Waker::wake_by_ref);
        assert_eq!((woken(&old), woken(&new)), (0, 1));
        wheel.remove(key);
    }
}
