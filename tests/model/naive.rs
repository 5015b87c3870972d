//! The naive model of a pool: what was said of each backend, and who may be picked for that.

use vestibule::pool::health::{HealthRules, HealthState};

use super::pool::believed;
use super::*;

/// The parts of a whole weight.
const PARTS: u32 = 64;

/// What is known of one backend, written down as it was said.
#[derive(Clone, Debug)]
pub(super) struct One {
    results: Vec<bool>,
    pub(super) not_connected: u32,
    resets: u32,
    /// Whose session the last of them was.
    reset_for: Option<u32>,
    /// When its time out ends, in milliseconds.
    pub(super) until: Option<u64>,
    /// When its times out ended, and how long they count.
    times: u32,
    since: u64,
    /// Since when it comes back, and how long that takes.
    back: Option<(u64, u64)>,
    pub(super) load: u32,
}

pub(super) struct Model {
    pub(super) config: config::PoolConfig,
    pub(super) all: Vec<One>,
    pub(super) now: u64,
    pub(super) tenants: Vec<u32>,
}

impl Model {
    pub(super) fn new(config: &config::PoolConfig) -> Self {
        let one = One {
            results: Vec::new(),
            not_connected: 0,
            resets: 0,
            reset_for: None,
            until: None,
            times: 0,
            since: 0,
            back: None,
            load: 0,
        };
        let all = vec![one; config.backends.len()];
        Self { config: config.clone(), all, now: 0, tenants: Vec::new() }
    }

    pub(super) fn state(&self, place: usize) -> HealthState {
        match &self.config.health {
            None => {
                let (rules, start) = (HealthRules { rise: 1, fall: 1 }, HealthState::Healthy);
                believed(rules, start, &self.all[place].results)
            }
            Some(probe) => {
                let rules = HealthRules { rise: probe.rise, fall: probe.fall };
                believed(rules, HealthState::Unknown, &self.all[place].results)
            }
        }
    }

    pub(super) fn is_out(&self, place: usize) -> bool {
        self.all[place].until.is_some()
    }

    /// How much of it is back, in parts.
    fn parts(&self, place: usize, now: u64) -> u32 {
        match self.all[place].back {
            Some((since, span)) if now < since + span => {
                u32::try_from((now.saturating_sub(since)) * u64::from(PARTS) / span).unwrap().max(1)
            }
            _ => PARTS,
        }
    }

    /// The sessions that it may have.
    pub(super) fn room(&self, place: usize, now: u64) -> u32 {
        let weights = self.weights(now);
        let used = (0..weights.len()).filter(|place| weights[*place] > 0);
        let lead = used.map(|place| self.parts(place, now)).max().unwrap_or(PARTS);
        let own = (self.parts(place, now) * PARTS / lead).min(PARTS);
        let parts = if self.is_panic() { PARTS } else { own };
        self.config.backends[place].max_sessions.map_or(u32::MAX, |most| (most * parts / PARTS).max(1))
    }

    fn is_panic(&self) -> bool {
        let of = |backups: bool| {
            (0..self.all.len()).filter(move |place| {
                self.config.backends[*place].weight > 0 && self.config.backends[*place].backup == backups
            })
        };
        let is_sound = |place: &usize| self.state(*place) != HealthState::Unhealthy && !self.is_out(*place);
        let is_good = |place: &usize| self.state(*place) == HealthState::Healthy && !self.is_out(*place);
        let sound = of(false).filter(is_sound).count();
        let wanted = self.config.panic_threshold as usize * of(false).count();
        sound * 100 < wanted && (sound > 0 || !of(true).any(|place| is_good(&place)))
    }

    /// The weights in force, in parts.
    pub(super) fn weights(&self, now: u64) -> Vec<u32> {
        let backends = &self.config.backends;
        let places = || 0..self.all.len();
        if self.is_panic() {
            return backends.iter().map(|it| if it.backup { 0 } else { it.weight * PARTS }).collect();
        }
        let rank = |place: usize| match (self.state(place), self.is_out(place), backends[place].backup) {
            (HealthState::Unhealthy, ..) => None,
            (HealthState::Healthy, false, false) => Some(0),
            (HealthState::Healthy, false, true) => Some(1),
            (HealthState::Unknown, false, false) => Some(2),
            (HealthState::Unknown, false, true) => Some(3),
            (HealthState::Healthy | HealthState::Unknown, true, false) => Some(4),
            (HealthState::Healthy | HealthState::Unknown, true, true) => Some(5),
        };
        let with_weight = |place: usize| backends[place].weight > 0;
        let best = places().filter(|place| with_weight(*place)).filter_map(rank).min();
        let is_used = |place: usize| best.is_some() && rank(place) == best;
        let own = |place: usize| {
            if is_used(place) { backends[place].weight * self.parts(place, now) } else { 0 }
        };
        let mut weights: Vec<_> = places().map(own).collect();
        let is_near = |place: usize| {
            self.config.prefer_zone.is_some() && backends[place].zone == self.config.prefer_zone
        };
        let near: u64 = places().filter(|place| is_near(*place)).map(|place| u64::from(weights[place])).sum();
        let far: u64 = places().filter(|place| !is_near(*place)).map(|place| u64::from(weights[place])).sum();
        let whole: u64 = places()
            .filter(|place| is_near(*place) && !backends[*place].backup)
            .map(|place| u64::from(backends[place].weight * PARTS))
            .sum();
        if near > 0 && far > 0 {
            for place in places().filter(|place| !is_near(*place)) {
                let missing = whole.saturating_sub(near);
                let share = u64::from(weights[place]) * missing / far;
                let least = u64::from(missing > 0 && weights[place] > 0);
                weights[place] = u32::try_from(share.max(least).min(64_000)).unwrap();
            }
        }
        weights
    }

    /// Times at which the roster may have been made: it follows a slow start in steps.
    pub(super) fn times(&self) -> Vec<u64> {
        let from = self.now.saturating_sub(160);
        let mut times: Vec<_> = (from..=self.now).collect();
        times.reverse();
        times.retain(|now| {
            let changes = |place: usize| self.parts(place, *now) != self.parts(place, now.saturating_sub(1));
            *now == self.now || *now == from || (0..self.all.len()).any(changes)
        });
        times
    }

    /// Ends what is over.
    pub(super) fn tend(&mut self) {
        let span = (self.config.slow_start.as_secs() * 1_000).max(10_000);
        for one in &mut self.all {
            if one.until.is_some_and(|until| self.now >= until) {
                (one.until, one.since, one.back) = (None, self.now, Some((self.now, span)));
                (one.not_connected, one.resets) = (0, 0);
            }
        }
    }

    pub(super) fn probed(&mut self, place: usize, success: bool) -> bool {
        let before = self.state(place);
        self.all[place].results.push(success);
        let after = self.state(place);
        if (before, after) == (HealthState::Unhealthy, HealthState::Healthy) {
            let span = u64::try_from(self.config.slow_start.as_millis()).unwrap();
            self.all[place].back = (span > 0).then_some((self.now, span));
        }
        before != after
    }

    /// So many resets in a row, of which those that follow one of the same tenant's do not count where there are several.
    pub(super) fn reset(&mut self, place: usize, tenant: u32) -> u32 {
        let is_shared = self.tenants.len() > 1;
        let one = &mut self.all[place];
        if !is_shared || one.resets == 0 || one.reset_for != Some(tenant) {
            one.resets += 1;
        }
        one.reset_for = Some(tenant);
        one.resets
    }

    pub(super) fn answered(&mut self, place: usize) {
        self.all[place].resets = 0;
    }

    /// Those that are as sound as those in use, and are not, because of their zone.
    pub(super) fn spare(&self) -> Vec<usize> {
        let is_good = |place: &usize| {
            let own = &self.config.backends[*place];
            self.state(*place) == HealthState::Healthy
                && !self.is_out(*place)
                && own.weight > 0
                && !own.backup
        };
        if self.is_panic() { Vec::new() } else { (0..self.all.len()).filter(is_good).collect() }
    }

    /// Whether so many failures in a row eject it; then it is out.
    pub(super) fn ejects(&mut self, place: usize, failures: u32) -> Option<Duration> {
        let rules = self.config.ejection;
        let count = self.all.len();
        let out = (0..count).filter(|place| self.is_out(*place)).count() + 1;
        let within = out * 100 <= count * rules.max_percent as usize || out == 1;
        let is_wanted = rules.max_percent > 0 && rules.consecutive_failures > 0;
        let enough = failures >= rules.consecutive_failures;
        if !enough || !is_wanted || self.is_out(place) || !within || out >= count {
            return None;
        }
        let base = rules.base_time.as_secs() * 1_000;
        let one = &mut self.all[place];
        one.times = one.times.saturating_sub(u32::try_from((self.now - one.since) / base).unwrap()) + 1;
        let time = (0..one.times.min(20)).fold(base, |time, turn| if turn == 0 { base } else { time * 2 });
        let time = time.min(600_000.max(base));
        one.until = Some(self.now + time);
        (one.not_connected, one.resets) = (0, 0);
        Some(Duration::from_millis(time))
    }
}
