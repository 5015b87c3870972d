//! The tournament against a look at everybody: who wins has least, and equals have turns by weight.

use vestibule::config::Balance;
use vestibule::pool::least::Tournament;
use vestibule::pool::{Pool, TriedBackends};

use super::pool::{config, place};
use super::*;

/// What a tournament takes for equal: so many sessions for a part of weight.
const FINE: f64 = 1.0 / 1_048_576.0;

/// Beyond this all are equally full.
const FULL: f64 = 127.9;

#[derive(Clone, Debug)]
enum Game {
    Changed(Index, u32, u32),
    Picked,
}

/// Of a backend's parts of weight: none, a few, and up to the most that there are.
fn weight() -> impl Strategy<Value = u32> {
    prop_oneof![1 => Just(0), 2 => 1..64_u32, 4 => (1..1_000_u32).prop_map(|weight| weight * 64), 1 => 1..=64_000_u32]
}

fn load() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..10_u32, 2 => 0..1_000_u32, 1 => 0..100_000_u32, 1 => any::<u32>()]
}

fn game() -> impl Strategy<Value = Game> {
    prop_oneof![
        (any::<Index>(), load(), weight()).prop_map(|(leaf, load, weight)| Game::Changed(leaf, load, weight)),
        Just(Game::Picked),
    ]
}

/// Whether nobody has less than the winner, and somebody wins where somebody takes part. With a `unit`, a load counts as
/// so many whole sessions of a backend of that weight.
fn check(winner: Option<usize>, all: &[(u32, u32)], unit: Option<u32>) -> Result<(), TestCaseError> {
    let relative = |(load, weight): (u32, u32)| match unit {
        None => (f64::from(load) / f64::from(weight)).min(FULL),
        Some(unit) => (f64::from(load) * f64::from(unit) / f64::from(weight)).floor(),
    };
    let taking = || all.iter().copied().filter(|(_, weight)| *weight > 0);
    prop_assert_eq!(winner.is_some(), taking().count() > 0);
    if let Some(winner) = winner {
        prop_assert!(all[winner].1 > 0);
        let least = taking().map(relative).fold(f64::MAX, f64::min);
        prop_assert!(relative(all[winner]) <= least + FINE, "{} of {:?}", winner, all);
    }
    Ok(())
}

proptest! {
    #[test]
    fn winner_has_the_least_load_by_weight(
        count in 1..70_usize,
        games in prop::collection::vec(game(), 0..200),
    ) {
        let tournament = Tournament::new(count);
        let mut all = vec![(0, 0); count];
        for game in games {
            match (game, tournament.winner()) {
                (Game::Changed(leaf, load, weight), _) => {
                    let leaf = leaf.index(count);
                    all[leaf] = (load, weight);
                    tournament.changed(leaf, || (load, weight));
                }
                (Game::Picked, Some(winner)) => {
                    all[winner].0 = all[winner].0.saturating_add(1);
                    tournament.picked(winner, || all[winner]);
                }
                (Game::Picked, None) => {}
            }
            check(tournament.winner(), &all, None)?;
        }
    }

    #[test]
    fn picked_backend_has_the_least_load_by_weight(
        weights in prop::collection::vec(0..1_000_u32, 1..20),
        ends in prop::collection::vec(prop::option::of(any::<Index>()), 0..200),
    ) {
        let pool = Pool::new(&config(Balance::LeastSessions, &weights), &Labels::default());
        let mut all: Vec<_> = weights.iter().map(|weight| (0, weight * 64)).collect();
        let unit = weights.iter().filter(|weight| **weight > 0).min().map(|weight| weight * 64);
        let mut held = Vec::new();
        for end in ends {
            match end {
                Some(which) if !held.is_empty() => {
                    let ended: vestibule::pool::PickedBackend = held.swap_remove(which.index(held.len()));
                    all[place(&ended)].0 -= 1;
                }
                Some(_) => {}
                None => {
                    let picked = pool.pick(0, 0, &mut TriedBackends::default()).ok();
                    check(picked.as_ref().map(|picked| place(picked)), &all, unit)?;
                    // Where nobody has a weight, nobody is picked.
                    if let Some(picked) = picked {
                        all[place(&picked)].0 += 1;
                        held.push(picked);
                    }
                }
            }
        }
    }
}

/// Picks of equals, whose sessions end at once: how many each had of so many.
fn turns(tournament: &Tournament, weights: &[u32], count: u32) -> Vec<u32> {
    let mut counts = vec![0; weights.len()];
    for _ in 0..count {
        let winner = tournament.winner().unwrap();
        tournament.picked(winner, || (1, weights[winner]));
        tournament.changed(winner, || (0, weights[winner]));
        counts[winner] += 1;
    }
    counts
}

fn are_by_weight(counts: &[u32], weights: &[u32]) -> Result<(), TestCaseError> {
    let total: f64 = weights.iter().copied().map(f64::from).sum();
    let all: f64 = counts.iter().copied().map(f64::from).sum();
    for (count, weight) in counts.iter().zip(weights) {
        let due = all * f64::from(*weight) / total;
        // A stride is a whole number, and from 20 on: 20.9 is 20.
        prop_assert!((f64::from(*count) - due).abs() <= 2.0 + due * 0.06, "{:?} for {:?}", counts, weights);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn equals_have_turns_by_weight(
        weights in prop::collection::vec((1..=1_000_u32).prop_map(|weight| weight * 64), 1..12),
        before in 0..20_000_u32,
    ) {
        let tournament = Tournament::new(weights.len());
        weights.iter().enumerate().for_each(|(leaf, weight)| tournament.changed(leaf, || (0, *weight)));
        turns(&tournament, &weights, before);
        let counts = turns(&tournament, &weights, 3_000);
        are_by_weight(&counts, &weights)?;
    }

    #[test]
    fn returning_backend_gets_its_turns_and_does_not_catch_up(
        count in 2..6_usize,
        weight in prop_oneof![Just(64_000_u32), Just(6_400), Just(64)],
        busy in 1..120_000_u32,
    ) {
        let tournament = Tournament::new(count);
        let weights = vec![weight; count];
        (0..count).for_each(|leaf| tournament.changed(leaf, || (0, weight)));
        turns(&tournament, &weights, 100);
        // A long session, while the others have their turns.
        tournament.changed(0, || (1, weight));
        let during = turns(&tournament, &weights, busy);
        prop_assert_eq!(during[0], 0);
        tournament.changed(0, || (0, weight));
        let after = turns(&tournament, &weights, 1_000);
        let due = 1_000 / u32::try_from(count).unwrap();
        prop_assert!(after[0].abs_diff(due) <= 3, "{:?} after {}", after, busy);
    }
}

#[test]
fn with_real_threads_the_loads_are_even_and_the_last_word_is_true() {
    let pool = Pool::new(&config(Balance::LeastSessions, &[100, 200, 300, 400]), &Labels::default());
    let held: Vec<_> = std::thread::scope(|scope| {
        let player = |seed: usize| {
            let pool = &pool;
            scope.spawn(move || {
                let mut held = Vec::new();
                for turn in 0..20_000_usize {
                    held.push(pool.pick(0, 0, &mut TriedBackends::default()).unwrap());
                    if held.len() > 250 {
                        drop(held.swap_remove((turn * 7 + seed) % held.len()));
                    }
                }
                held
            })
        };
        let players: Vec<_> = (0..4).map(player).collect();
        players.into_iter().flat_map(|player| player.join().unwrap()).collect()
    });
    let all: Vec<_> =
        pool.candidates().backends().iter().map(|backend| (backend.load(), backend.weight())).collect();
    assert_eq!(held.len(), all.iter().map(|(load, _)| *load as usize).sum::<usize>());
    let picked = pool.pick(0, 0, &mut TriedBackends::default()).ok();
    check(picked.as_ref().map(|picked| place(picked)), &all, Some(100 * 64)).unwrap();
    drop(picked);
    drop(held);
    assert!(pool.candidates().backends().iter().all(|backend| backend.load() == 0));
    // With all at rest, each is won once nobody else has less.
    let picked: Vec<_> = (0..10).map(|_| pool.pick(0, 0, &mut TriedBackends::default()).unwrap()).collect();
    let loads: Vec<_> = pool.candidates().backends().iter().map(|backend| backend.load()).collect();
    assert_eq!((picked.len(), loads), (10, vec![1, 2, 3, 4]));
}
