//! Maglev: a table in which every backend has its share of the places, and few places change when a backend goes.
//!
//! Eisenbud et al., "Maglev: a fast and reliable software network load balancer", NSDI 2016, section 3.4: each backend
//! has an order of its own in which it wants the places, and the backends take turns at the next one that is free.

/// Sizes of tables: primes, so that every step visits every place. Two only: with the size every key moves, and few pools
/// grow beyond the first, which is the one of the paper.
const SIZES: [u32; 2] = [65_537, 262_139];

/// Places for each backend in the smaller table, at least. A backend that is out of use for a while moves its own keys and
/// no others. One that is taken off the list moves 1.5 times its own of 100 backends, 1.7 of 128, then, in the larger
/// table, 1.6 of 200, 1.9 of 300 and 3.3 of 600.
const EACH: usize = 512;

/// The greatest weight that has one place in its turn, in means of all weights.
const MOST_MEANS: u32 = 8;

/// The Maglev lookup table. Built off the data path; a lookup is one remainder and one read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MaglevTable {
    /// Places of backends, by the place in the table. Empty where no backend has a weight.
    places: Vec<u16>,
}

/// One backend, as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaglevEntry {
    /// A hash of its name: it gets the same keys whichever other backends exist.
    pub name: u64,
    /// Its share while all are in use, in relation to the others'; 0 is none.
    pub whole: u32,
    /// Its share now, in relation to the others'; 0 is none.
    pub weight: u32,
}

/// The table of all backends, whether they are in use or not.
#[derive(Clone, Debug, Default)]
pub struct MaglevPlan {
    /// Name and share of each.
    all: Vec<(u64, u32)>,
    places: Vec<u16>,
    /// The places that each took, first the one that it wanted most.
    taken: Vec<Vec<u32>>,
}

/// A free place.
const FREE: u16 = u16::MAX;

/// The permutation of one backend.
struct MaglevPermutation {
    backend: u16,
    next: u32,
    step: u32,
    weight: u32,
    /// What it has saved up for its next turn.
    credit: u32,
    /// How many places it may still take.
    most: usize,
    /// The places that it took, first the one that it wanted most.
    taken: Vec<u32>,
}

impl MaglevPlan {
    /// The plan of these backends, of which there are at most 65,535.
    #[must_use]
    pub fn new(entries: &[MaglevEntry]) -> Self {
        let wanted = entries.len().saturating_mul(EACH);
        let fits = |size: &&u32| usize::try_from(**size).is_ok_and(|size| size >= wanted);
        let size = SIZES.iter().find(fits).or(SIZES.last()).copied().unwrap_or(1);
        let mut places = vec![FREE; usize::try_from(size).unwrap_or(0)];
        let wish = |(backend, entry): (u16, &MaglevEntry)| {
            MaglevPermutation::new(backend, entry.name, entry.whole, size, Vec::new())
        };
        let mut wishes: Vec<MaglevPermutation> = (0..).zip(entries).map(wish).collect();
        in_their_order(&mut wishes, entries);
        share_out(&mut places, &mut wishes, size);
        wishes.sort_unstable_by_key(|wish| wish.backend);
        let taken = wishes.into_iter().map(|wish| wish.taken).collect();
        Self { all: entries.iter().map(|entry| (entry.name, entry.whole)).collect(), places, taken }
    }

    /// Whether it is the plan of these.
    #[must_use]
    pub fn is_of(&self, entries: &[MaglevEntry]) -> bool {
        self.all.len() == entries.len()
            && self.all.iter().zip(entries).all(|(own, entry)| *own == (entry.name, entry.whole))
    }
}

impl MaglevTable {
    /// Makes the table of these backends; a backend is found by its position among them.
    #[must_use]
    pub fn new(entries: &[MaglevEntry]) -> Self {
        Self::of(&MaglevPlan::new(entries), entries)
    }

    /// Builds the table from the plan of these backends: one that is to have less than it took there gives up
    /// what it wanted least, and those that are to have more share that. So a change of what is in use moves no key beyond
    /// those that it must.
    #[must_use]
    pub fn of(plan: &MaglevPlan, entries: &[MaglevEntry]) -> Self {
        if entries.iter().all(|entry| entry.weight == 0) {
            return Self::default();
        }
        let (mut places, size) = (plan.places.clone(), u32::try_from(plan.places.len()).unwrap_or(1));
        let wish = |((backend, entry), taken): ((u16, &MaglevEntry), &Vec<u32>)| {
            MaglevPermutation::new(backend, entry.name, entry.weight, size, taken.clone())
        };
        let mut wishes: Vec<MaglevPermutation> = (0..).zip(entries).zip(&plan.taken).map(wish).collect();
        in_their_order(&mut wishes, entries);
        share_out(&mut places, &mut wishes, size);
        Self { places }
    }

    /// The backend of a key, by its hash.
    #[must_use]
    pub fn find(&self, hash: u64) -> Option<u16> {
        let size = u64::try_from(self.places.len()).ok()?;
        let place = usize::try_from(hash.checked_rem(size)?).ok()?;
        self.places.get(place).copied()
    }
}

impl MaglevPermutation {
    fn new(backend: u16, name: u64, weight: u32, size: u32, taken: Vec<u32>) -> Self {
        let (next, step) = (low(name, size), 1 + low(name.rotate_left(32), size - 1));
        Self { backend, next, step, weight, credit: 0, most: 0, taken }
    }

    /// Gives up what it wanted least, down to so many places.
    fn give_up(&mut self, table: &mut [u16], places: usize) {
        for place in self.taken.drain(places.min(self.taken.len())..) {
            if let Some(taken) = table.get_mut(usize::try_from(place).unwrap_or(usize::MAX)) {
                *taken = FREE;
            }
        }
    }

    /// Takes its next preferred place that is free. There is one: the step is coprime to the size.
    fn take(&mut self, table: &mut [u16], size: u32) {
        loop {
            let at = self.next;
            self.next = (self.next + self.step) % size;
            if let Some(free @ &mut FREE) = table.get_mut(usize::try_from(at).unwrap_or(usize::MAX)) {
                *free = self.backend;
                self.taken.push(at);
                self.most -= 1;
                return;
            }
        }
    }
}

/// Has turns in an order that is the backends' own: another process, or another answer to a name's question, may list them
/// in another.
fn in_their_order(wishes: &mut [MaglevPermutation], entries: &[MaglevEntry]) {
    wishes.sort_unstable_by_key(|wish| entries.get(usize::from(wish.backend)).map(|entry| entry.name));
}

/// Gives each backend its share of the places, rounded down or up, and of those that it has as many as it may keep.
fn share_out(table: &mut [u16], wishes: &mut [MaglevPermutation], size: u32) {
    let total: u64 = wishes.iter().map(|wish| u64::from(wish.weight)).sum();
    if total == 0 {
        return;
    }
    let share = |wish: &MaglevPermutation, up: u64| {
        let share = (u64::from(wish.weight) * u64::from(size) + up * (total - 1)) / total;
        usize::try_from(share).unwrap_or(0)
    };
    for wish in wishes.iter_mut() {
        let most = share(wish, 1);
        wish.give_up(table, most);
    }
    // If every backend kept a share that is rounded up, backends with fewer slots could get far less than their share.
    let missing: usize = wishes.iter().map(|wish| share(wish, 0).saturating_sub(wish.taken.len())).sum();
    let free = table.iter().filter(|place| **place == FREE).count();
    let beyond = wishes.iter_mut().filter(|wish| wish.taken.len() > share(wish, 0));
    beyond.take(missing.saturating_sub(free)).for_each(|wish| wish.give_up(table, wish.taken.len() - 1));
    for up in [0, 1] {
        for wish in wishes.iter_mut() {
            (wish.most, wish.credit) = (share(wish, up).saturating_sub(wish.taken.len()), 0);
        }
        fill(table, wishes, size);
    }
}

/// Has the backends take turns by weight until no place is free, or each has what it may.
fn fill(table: &mut [u16], wishes: &mut [MaglevPermutation], size: u32) {
    let mut free = table.iter().filter(|place| **place == FREE).count();
    loop {
        let taking = || wishes.iter().filter(|wish| wish.most > 0).map(|wish| wish.weight);
        let Some(greatest) = taking().max().filter(|_| free > 0) else { return };
        // A backend of half the greatest weight has every other turn. One of many times the others' weight takes several
        // places in its turn, or they would wait through hundreds of thousands of turns.
        let sum: u64 = taking().map(u64::from).sum();
        let mean = u32::try_from(sum / taking().count().max(1) as u64).unwrap_or(u32::MAX);
        let turn = greatest.min(mean.saturating_mul(MOST_MEANS));
        for wish in wishes.iter_mut().filter(|wish| wish.most > 0) {
            wish.credit += wish.weight;
            while wish.credit >= turn && wish.most > 0 && free > 0 {
                wish.credit -= turn;
                wish.take(table, size);
                free -= 1;
            }
        }
    }
}

/// The low half of a hash as a number below `size`.
fn low(hash: u64, size: u32) -> u32 {
    let low = hash & u64::from(u32::MAX);
    u32::try_from(low % u64::from(size.max(1))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Well spread numbers for names and keys (splitmix64).
    fn hash(number: u64) -> u64 {
        let mut z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn entries(weights: &[u32]) -> Vec<MaglevEntry> {
        let entry =
            |(name, weight): (u64, &u32)| MaglevEntry { name: hash(name), whole: *weight, weight: *weight };
        (0..).zip(weights).map(entry).collect()
    }

    fn shares(table: &MaglevTable, count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        for place in &table.places {
            shares[usize::from(*place)] += 1;
        }
        shares
    }

    #[test]
    fn lookup_without_weights_finds_none() {
        assert_eq!(MaglevTable::new(&[]).find(7), None);
        assert_eq!(MaglevTable::new(&entries(&[0, 0])).find(7), None);
    }

    #[test]
    fn single_backend_has_every_key() {
        let table = MaglevTable::new(&entries(&[0, 1000, 0]));
        assert_eq!((table.find(0), table.find(u64::MAX)), (Some(1), Some(1)));
    }

    #[test]
    fn equal_weights_have_equal_shares() {
        let table = MaglevTable::new(&entries(&[1; 20]));
        assert_eq!(table.places.len(), 65_537);
        assert!(
            shares(&table, 20).iter().all(|share| (3_276..=3_277).contains(share)),
            "{:?}",
            shares(&table, 20)
        );
    }

    #[test]
    fn shares_go_by_weight() {
        let table = MaglevTable::new(&entries(&[100, 200, 0, 700]));
        let shares = shares(&table, 4);
        for (share, weight) in shares.iter().zip([100, 200, 0, 700_usize]) {
            assert!(share.abs_diff(65_537 * weight / 1_000) <= 2, "{shares:?}");
        }
    }

    /// Of 20,000 keys, how many another backend is found for, by name.
    fn moved(one: (&MaglevTable, &[MaglevEntry]), other: (&MaglevTable, &[MaglevEntry])) -> usize {
        let name = |(table, entries): (&MaglevTable, &[MaglevEntry]), key| {
            table.find(hash(key)).map(|place| entries[usize::from(place)].name)
        };
        (0..20_000).filter(|key| name(one, *key) != name(other, *key)).count()
    }

    #[test]
    fn table_is_independent_of_backend_order() {
        let mut weights = vec![100; 20];
        (weights[3], weights[7]) = (0, 300);
        let all = entries(&weights);
        let mut other = all.clone();
        other.reverse();
        other.swap(2, 9);
        assert_eq!(moved((&MaglevTable::new(&all), &all), (&MaglevTable::new(&other), &other)), 0);
    }

    #[test]
    fn when_one_of_n_is_out_its_own_keys_move_and_no_others() {
        for count in [3_usize, 10, 100, 600] {
            let all = entries(&vec![1; count]);
            let whole = MaglevTable::new(&all);
            for gone in [0, count / 2, count - 1] {
                let mut left = all.clone();
                left[gone].weight = 0;
                let without = MaglevTable::new(&left);
                for key in 0..20_000 {
                    let (before, after) = (whole.find(hash(key)).unwrap(), without.find(hash(key)).unwrap());
                    assert!(usize::from(after) != gone);
                    assert!(before == after || usize::from(before) == gone);
                }
                // While it comes back, it has its part and no more.
                for entry in &mut left {
                    (entry.whole, entry.weight) = (64, 64);
                }
                left[gone].weight = 16;
                let shares = shares(&MaglevTable::new(&left), count);
                let due = without.places.len() * 16 / (64 * (count - 1) + 16);
                assert!(shares[gone].abs_diff(due) <= 1, "{} for {due}", shares[gone]);
            }
        }
    }

    #[test]
    fn when_one_of_300_is_taken_off_the_list_at_most_2_in_300_keys_move() {
        for count in [3_usize, 10, 100, 128, 200, 300] {
            let all = entries(&vec![1; count]);
            let whole = MaglevTable::new(&all);
            for gone in [0, count / 2, count - 1] {
                let mut left = all.clone();
                left.remove(gone);
                let moved = moved((&whole, &all), (&MaglevTable::new(&left), &left));
                assert!(
                    moved <= 2 * 20_000 / count,
                    "{moved} of 20,000 keys moved without {gone} of {count}"
                );
            }
        }
    }

    #[test]
    fn largest_table_has_slots_for_thousands() {
        let table = MaglevTable::new(&entries(&vec![1; 5_000]));
        assert_eq!(table.places.len(), 262_139);
        assert!(shares(&table, 5_000).iter().all(|share| (52..=53).contains(share)));
    }
}
