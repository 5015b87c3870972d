//! The Maglev table against counting: shares by weight, and no key moves that need not.

use vestibule::pool::maglev::{MaglevEntry, MaglevTable};

use super::*;

/// Places in the table of up to 128 backends.
const SIZE: u64 = 65_537;

fn weight() -> impl Strategy<Value = u32> {
    prop_oneof![
        1 => Just(0),
        2 => Just(6_400),
        2 => (1..=1_000_u32).prop_map(|weight| weight * 64),
        1 => 1..=64_000_u32,
        1 => 1..64_u32,
    ]
}

/// Whose each place is.
fn places(table: &MaglevTable) -> Vec<Option<usize>> {
    (0..SIZE).map(|place| table.find(place).map(usize::from)).collect()
}

fn shares(places: &[Option<usize>], count: usize) -> Vec<u64> {
    let mut shares = vec![0; count];
    places.iter().flatten().for_each(|place| shares[*place] += 1);
    shares
}

fn entries(wholes: &[(u64, u32)], weights: &[u32]) -> Vec<MaglevEntry> {
    let entry = |((name, whole), weight): (&(u64, u32), &u32)| MaglevEntry {
        name: *name,
        whole: *whole,
        weight: *weight,
    };
    wholes.iter().zip(weights).map(entry).collect()
}

fn check_shares(entries: &[MaglevEntry]) -> Result<Vec<Option<usize>>, TestCaseError> {
    let places = places(&MaglevTable::new(entries));
    let total: u64 = entries.iter().map(|entry| u64::from(entry.weight)).sum();
    prop_assert!(places.iter().all(|place| place.is_some() == (total > 0)));
    for (share, entry) in shares(&places, entries.len()).into_iter().zip(entries) {
        let due = (u64::from(entry.weight) * SIZE).checked_div(total).unwrap_or(0);
        let is_whole = due * total == u64::from(entry.weight) * SIZE;
        prop_assert!(share == due || share == due + 1 && !is_whole, "{} for {} of {:?}", share, due, entries);
    }
    Ok(places)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn maglev_shares_follow_weights_and_weight_zero_gets_none(
        wholes in prop::collection::vec((any::<u64>(), weight()), 1..24),
        weights in prop::collection::vec(weight(), 24),
    ) {
        check_shares(&entries(&wholes, &weights))?;
    }

    #[test]
    fn maglev_shares_follow_weights_of_many_equal_and_few_other_backends(
        names in prop::collection::vec(any::<u64>(), 60..128),
        whole in weight(),
        others in prop::collection::vec((weight(), weight()), 1..4),
    ) {
        let mut wholes: Vec<_> = names.into_iter().map(|name| (name, whole)).collect();
        let mut weights = vec![whole; wholes.len()];
        for (at, (whole, weight)) in others.into_iter().enumerate() {
            wholes[at].1 = whole;
            weights[at] = weight;
        }
        check_shares(&entries(&wholes, &weights))?;
    }

    #[test]
    fn maglev_moves_only_keys_of_changed_backends(
        wholes in prop::collection::vec((any::<u64>(), weight()), 1..40),
        parts in prop::collection::vec(prop_oneof![3 => Just(64_u32), 1 => Just(0), 2 => 1..64_u32], 40),
    ) {
        let all: Vec<_> = wholes.iter().map(|(_, whole)| *whole).collect();
        let now: Vec<_> = all.iter().zip(parts).map(|(whole, part)| (whole * part).div_ceil(64)).collect();
        let before = check_shares(&entries(&wholes, &all))?;
        let after = check_shares(&entries(&wholes, &now))?;
        let (old, new) = (shares(&before, all.len()), shares(&after, all.len()));
        let mut kept = vec![0; all.len()];
        let same = before.iter().zip(&after).filter(|(before, after)| before == after);
        same.filter_map(|(before, _)| *before).for_each(|place| kept[place] += 1);
        let must: Vec<_> = old.into_iter().zip(new).map(|(old, new)| old.min(new)).collect();
        prop_assert_eq!(kept, must);
    }
}
