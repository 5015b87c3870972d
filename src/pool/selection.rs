//! Selection: from the state of each backend to its effective weight.

use super::health::{FULL, HealthState};

/// The inputs of the selection for one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectionState {
    /// What probes say.
    pub state: HealthState,
    /// Whether real sessions have put it out.
    pub is_ejected: bool,
    /// Its share in relation to the others'; 0 is none.
    pub weight: u32,
    /// How much of its weight counts while it comes back, from 1 to [`FULL`].
    pub ramp: u32,
    /// Whether it is used only where no other can be.
    pub is_backup: bool,
    /// Whether it is in the zone that is preferred.
    pub is_preferred: bool,
}

impl SelectionState {
    /// Whether it is as healthy as the backends of this tier.
    #[must_use]
    pub fn is_of(&self, tier: SelectionTier) -> bool {
        let is_in = |state| self.state == state && !self.is_ejected;
        match tier {
            SelectionTier::Healthy | SelectionTier::Backup => is_in(HealthState::Healthy),
            SelectionTier::Unknown => is_in(HealthState::Unknown),
            SelectionTier::Ejected => self.state != HealthState::Unhealthy,
            SelectionTier::Panic | SelectionTier::None => false,
        }
    }
}

/// The selection tier in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SelectionTier {
    /// They are known to be healthy.
    Healthy,
    /// Healthy backups, as no other backend is healthy.
    Backup,
    /// Backends that have not been probed yet, as none is known to be healthy.
    Unknown,
    /// Ejected backends, as all others are unhealthy.
    Ejected,
    /// Too few are healthy for their health to count.
    Panic,
    /// No backend is used.
    #[default]
    None,
}

impl SelectionTier {
    /// The label in log and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Backup => "backup",
            Self::Unknown => "unknown",
            Self::Ejected => "ejected",
            Self::Panic => "panic",
            Self::None => "none",
        }
    }
}

/// Gives each backend its weight in force, in [`FULL`]ths of a unit; 0 is not used.
///
/// The known-healthy are used, or else healthy backups, or else those that have not been probed yet, or else those
/// that are ejected but not unhealthy. Where less than `panic_threshold` percent of those with a weight are neither
/// unhealthy nor ejected, all are used: then it is likelier that the probes are wrong (Envoy, "Panic threshold").
#[must_use]
pub fn effective_weights(all: &[SelectionState], panic_threshold: u32) -> (SelectionTier, Vec<u32>) {
    if is_panic(all, panic_threshold) {
        return (
            SelectionTier::Panic,
            all.iter().map(|seen| if seen.is_backup { 0 } else { seen.weight * FULL }).collect(),
        );
    }
    let tiers = [
        (SelectionTier::Healthy, false),
        (SelectionTier::Backup, true),
        (SelectionTier::Unknown, false),
        (SelectionTier::Unknown, true),
        (SelectionTier::Ejected, false),
        (SelectionTier::Ejected, true),
    ];
    for (tier, is_backup) in tiers {
        let is_used = |seen: &SelectionState| seen.is_backup == is_backup && seen.is_of(tier);
        let weight =
            |seen: &SelectionState| if is_used(seen) { seen.weight * seen.ramp.clamp(1, FULL) } else { 0 };
        let mut weights: Vec<u32> = all.iter().map(weight).collect();
        if weights.iter().any(|weight| *weight > 0) {
            prefer(all, &mut weights);
            return (tier, weights);
        }
    }
    (SelectionTier::None, vec![0; all.len()])
}

/// Whether so few can be used that nothing that is known of them counts.
fn is_panic(all: &[SelectionState], threshold: u32) -> bool {
    let counted = || all.iter().filter(|seen| seen.weight > 0 && !seen.is_backup);
    let sound = counted().filter(|seen| seen.state != HealthState::Unhealthy && !seen.is_ejected).count();
    // Backups that are known to work are better than primaries that are known not to.
    let rescued = sound == 0
        && all.iter().any(|seen| {
            seen.is_backup && seen.weight > 0 && seen.state == HealthState::Healthy && !seen.is_ejected
        });
    let threshold = usize::try_from(threshold).unwrap_or(100);
    !rescued && sound * 100 < threshold * counted().count()
}

/// Leaves to the other zones only what the preferred one is missing: its backends keep the share that each would have if
/// all of them were there.
fn prefer(all: &[SelectionState], weights: &mut [u32]) {
    let sum = |weight: &dyn Fn(&SelectionState, u32) -> u32, weights: &[u32]| -> u64 {
        all.iter().zip(weights).map(|(seen, own)| u64::from(weight(seen, *own))).sum()
    };
    let whole =
        sum(&|seen, _| if seen.is_preferred && !seen.is_backup { seen.weight * FULL } else { 0 }, weights);
    let here = sum(&|seen, own| if seen.is_preferred { own } else { 0 }, weights);
    let away = sum(&|seen, own| if seen.is_preferred { 0 } else { own }, weights);
    if here == 0 || away == 0 {
        return;
    }
    let missing = whole.saturating_sub(here);
    for (seen, own) in all.iter().zip(weights) {
        if !seen.is_preferred && *own > 0 {
            let share = u64::from(*own) * missing / away;
            let least = u64::from(missing > 0);
            *own = u32::try_from(share.max(least)).unwrap_or(u32::MAX).min(1_000 * FULL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: SelectionState = SelectionState {
        state: HealthState::Healthy,
        is_ejected: false,
        weight: 100,
        ramp: FULL,
        is_backup: false,
        is_preferred: false,
    };
    const DOWN: SelectionState = SelectionState { state: HealthState::Unhealthy, ..UP };
    const NEW: SelectionState = SelectionState { state: HealthState::Unknown, ..UP };
    const OUT: SelectionState = SelectionState { is_ejected: true, ..UP };
    const BACKUP: SelectionState = SelectionState { is_backup: true, ..UP };
    const NEAR: SelectionState = SelectionState { is_preferred: true, ..UP };
    const NEAR_DOWN: SelectionState = SelectionState { state: HealthState::Unhealthy, ..NEAR };
    const DRAINED: SelectionState = SelectionState { weight: 0, ..UP };

    /// The weights in whole units, and why.
    fn weights(all: &[SelectionState], panic_threshold: u32) -> (SelectionTier, Vec<u32>) {
        let (tier, weights) = effective_weights(all, panic_threshold);
        (tier, weights.iter().map(|weight| weight / FULL).collect())
    }

    #[test]
    fn best_available_tier_is_used_alone() {
        for (all, tier, expected) in [
            (vec![], SelectionTier::None, vec![]),
            (vec![UP, DOWN, NEW, OUT, BACKUP, DRAINED], SelectionTier::Healthy, vec![100, 0, 0, 0, 0, 0]),
            (vec![DOWN, NEW, OUT, BACKUP, DRAINED], SelectionTier::Backup, vec![0, 0, 0, 100, 0]),
            (vec![DOWN, NEW, OUT, DRAINED], SelectionTier::Unknown, vec![0, 100, 0, 0]),
            (
                vec![DOWN, SelectionState { is_backup: true, ..NEW }, OUT],
                SelectionTier::Unknown,
                vec![0, 100, 0],
            ),
            (vec![DOWN, OUT, DRAINED], SelectionTier::Ejected, vec![0, 100, 0]),
            (vec![DOWN, SelectionState { is_backup: true, ..OUT }], SelectionTier::Ejected, vec![0, 100]),
            (
                vec![DOWN, DRAINED, SelectionState { is_ejected: true, ..DOWN }],
                SelectionTier::None,
                vec![0, 0, 0],
            ),
        ] {
            assert_eq!(weights(&all, 0), (tier, expected), "{all:?}");
        }
    }

    #[test]
    fn below_the_threshold_health_does_not_count() {
        let half = [UP, DOWN, UP, OUT, DRAINED, BACKUP];
        assert_eq!(weights(&half, 50).0, SelectionTier::Healthy, "at the threshold");
        assert_eq!(weights(&half, 51), (SelectionTier::Panic, vec![100, 100, 100, 100, 0, 0]));
        assert_eq!(
            weights(&[NEW, NEW], 100).0,
            SelectionTier::Unknown,
            "who was not probed is not known to be bad"
        );
        assert_eq!(weights(&[DOWN, DOWN], 1), (SelectionTier::Panic, vec![100, 100]));
        assert_eq!(weights(&[DOWN, DOWN, BACKUP], 1), (SelectionTier::Backup, vec![0, 0, 100]));
    }

    #[test]
    fn returning_backend_has_a_part_of_its_weight() {
        let back = SelectionState { ramp: FULL / 4, ..UP };
        assert_eq!(weights(&[UP, back], 0).1, [100, 25]);
        let (_, weights) = effective_weights(&[SelectionState { weight: 1, ramp: 0, ..UP }], 0);
        assert_eq!(weights, [1], "never nothing");
    }

    #[test]
    fn other_zones_take_only_what_is_missing() {
        for (all, expected) in [
            (vec![NEAR, NEAR, UP, UP], vec![100, 100, 0, 0]),
            (vec![NEAR, NEAR_DOWN, UP, UP], vec![100, 0, 50, 50]),
            (vec![NEAR_DOWN, NEAR_DOWN, UP, UP], vec![0, 0, 100, 100]),
            (vec![NEAR, SelectionState { ramp: FULL / 2, ..NEAR }, UP], vec![100, 50, 50]),
            (vec![NEAR, NEAR_DOWN, SelectionState { weight: 900, ..UP }, UP], vec![100, 0, 90, 10]),
            (vec![NEAR, NEAR], vec![100, 100]),
        ] {
            assert_eq!(weights(&all, 0).1, expected, "{all:?}");
        }
        let words = [
            SelectionTier::Healthy,
            SelectionTier::Backup,
            SelectionTier::Unknown,
            SelectionTier::Ejected,
            SelectionTier::Panic,
            SelectionTier::None,
        ];
        let words: std::collections::BTreeSet<_> = words.map(SelectionTier::as_str).into();
        assert_eq!(words.len(), 6);
    }
}
