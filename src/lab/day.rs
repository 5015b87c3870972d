//! A scripted day: hosts that die, fall silent, flap and come back at random, but never all at once.

use std::time::Duration;

/// What happens to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DayAction {
    /// It ends: connections are refused.
    Kill,
    /// It falls silent: connections are neither taken nor refused.
    Stall,
    /// It is back.
    Return,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayEvent {
    /// When, from the start of the day.
    pub at: Duration,
    /// To which host, from 0.
    pub host: usize,
    /// What.
    pub act: DayAction,
}

/// From one fault to the next.
const STEP: Duration = Duration::from_secs(2);
/// A host that came back is left alone for as long.
const PEACE: Duration = Duration::from_secs(10);
/// A flapping host is so often down and up.
const FLAPS: u32 = 4;
/// How long a flapping host is down, and up.
const FLAP: Duration = Duration::from_millis(700);

/// A day of that length for so many hosts, in the order of time: the same for the same seed.
///
/// Nothing happens in its first and last tenth. At most half of the hosts are down, but for the fifth in its middle: then one
/// after the other goes until one alone is left.
#[must_use]
pub fn script(seed: u64, hosts: usize, length: Duration) -> Vec<DayEvent> {
    let mut rolls = fastrand::Rng::with_seed(seed);
    let mut events = Vec::new();
    // When each host is back.
    let mut back = vec![Duration::ZERO; hosts];
    let dark = (length * 2 / 5, length * 3 / 5);
    let mut at = length / 10;
    while at < length * 9 / 10 {
        let is_dark = at >= dark.0 && at < dark.1;
        let down = back.iter().filter(|back| **back > at).count();
        let most = if is_dark { hosts.saturating_sub(1) } else { hosts / 2 };
        let calm: Vec<usize> = (0..hosts)
            .filter(|host| back.get(*host).is_some_and(|back| *back == Duration::ZERO || *back + PEACE <= at))
            .collect();
        if let Some(host) = rolls.choice(&calm).copied().filter(|_| down < most) {
            let act = if rolls.u8(..10) < 6 { DayAction::Kill } else { DayAction::Stall };
            let flaps = !is_dark && rolls.u8(..10) < 2;
            let span = Duration::from_secs(rolls.u64(4..30));
            let end = if flaps {
                let twice = 2 * FLAP;
                for turn in 0..FLAPS {
                    events.push(DayEvent { at: at + twice * turn, host, act });
                    events.push(DayEvent { at: at + twice * turn + FLAP, host, act: DayAction::Return });
                }
                at + twice * FLAPS
            } else {
                let end = (if is_dark { dark.1 + span / 3 } else { at + span }).min(length * 9 / 10);
                events.push(DayEvent { at, host, act });
                events.push(DayEvent { at: end, host, act: DayAction::Return });
                end
            };
            if let Some(back) = back.get_mut(host) {
                *back = end;
            }
        }
        at += STEP;
    }
    events.sort_by_key(|event| event.at);
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_is_always_up_and_all_are_at_the_end() {
        for seed in 0..50 {
            let length = Duration::from_secs(600);
            let mut down = [false; 20];
            let mut fewest = 20;
            for event in script(seed, 20, length) {
                assert!(event.at >= length / 10 && event.at <= length * 9 / 10 + 2 * FLAP * FLAPS);
                assert_eq!(down[event.host], event.act == DayAction::Return, "{event:?}");
                down[event.host] = event.act != DayAction::Return;
                fewest = fewest.min(down.iter().filter(|down| !**down).count());
            }
            assert!(!down.contains(&true) && (1..=3).contains(&fewest), "{fewest} at the least");
        }
        assert_eq!(script(7, 20, Duration::from_secs(60)), script(7, 20, Duration::from_secs(60)));
        assert!(script(1, 1, Duration::from_secs(600)).is_empty());
    }
}
