//! A target group: its targets, their health, and the choice of a target for a flow.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

/// What the group is set to. The defaults are those of an NLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TargetGroupRules {
    /// From one health check of a target to its next.
    pub interval: Duration,
    /// What one check may take.
    pub timeout: Duration,
    /// Checks passed in a row that bring an unhealthy target back.
    pub healthy: u32,
    /// Checks failed in a row that take a target out.
    pub unhealthy: u32,
    /// How long a flow may be silent.
    pub idle: Duration,
    /// Whether a target that becomes unhealthy has its live flows reset
    /// (`target_health_state.unhealthy.connection_termination.enabled`).
    pub reset_unhealthy: bool,
    /// How long a target that was deregistered keeps its flows.
    pub deregistration: Duration,
    /// Whether they are reset after that (`deregistration_delay.connection_termination.enabled`).
    pub reset_deregistered: bool,
}

impl Default for TargetGroupRules {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(6),
            healthy: 5,
            unhealthy: 2,
            idle: Duration::from_secs(350),
            reset_unhealthy: true,
            deregistration: Duration::from_secs(300),
            reset_deregistered: false,
        }
    }
}

/// What the load balancer thinks of a target, in its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TargetHealth {
    /// No check has ended yet.
    Initial,
    /// It gets flows.
    Healthy,
    /// It gets flows only where every target is unhealthy.
    Unhealthy,
    /// It was deregistered: it keeps its flows, and gets no new ones.
    Draining,
}

/// One target, as the load balancer tells of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TargetDescription {
    /// Where flows go.
    pub address: SocketAddr,
    /// What is thought of it.
    pub state: TargetHealth,
    /// What its last check said.
    pub reason: String,
    /// Flows that it was given so far.
    pub flows: u64,
    /// Those that live.
    pub open: usize,
}

/// One target.
#[derive(Debug)]
struct GroupTarget {
    address: SocketAddr,
    standing: TargetHealth,
    reason: String,
    /// Checks in a row that contradict the present health.
    streak: u32,
    flows: u64,
    /// Its flows listen here for the order to end.
    reset: watch::Sender<bool>,
}

/// A flow's target, and the order that ends the flow early.
pub(crate) type Chosen = (SocketAddr, watch::Receiver<bool>);

/// The targets of a listener.
#[derive(Debug)]
pub(crate) struct TargetGroup {
    rules: TargetGroupRules,
    targets: Vec<GroupTarget>,
}

impl TargetGroup {
    /// A group without targets.
    #[must_use]
    pub(crate) fn new(rules: TargetGroupRules) -> Self {
        Self { rules, targets: Vec::new() }
    }

    /// Takes a target in, as a new one where it was draining.
    pub(crate) fn register(&mut self, address: SocketAddr) {
        self.targets.retain(|target| target.address != address || target.standing != TargetHealth::Draining);
        if self.find(address).is_none() {
            let (standing, reason) = (TargetHealth::Initial, "registered".to_owned());
            let reset = watch::Sender::new(false);
            self.targets.push(GroupTarget { address, standing, reason, streak: 0, flows: 0, reset });
        }
    }

    /// Gives a target no new flows. Whether there is one.
    pub(crate) fn deregister(&mut self, address: SocketAddr) -> bool {
        let Some(target) = self.find(address) else { return false };
        (target.standing, target.reason) = (TargetHealth::Draining, "deregistered".to_owned());
        true
    }

    /// The end of the deregistration delay: the target is forgotten, where it was not registered again meanwhile.
    pub(crate) fn forget(&mut self, address: SocketAddr) {
        let over =
            |target: &GroupTarget| target.address == address && target.standing == TargetHealth::Draining;
        for target in self.targets.iter().filter(|target| over(target) && self.rules.reset_deregistered) {
            target.reset.send_replace(true);
        }
        self.targets.retain(|target| !over(target));
    }

    /// Takes in what a check of a target said.
    pub(crate) fn note(&mut self, address: SocketAddr, said: Result<String, String>) {
        let rules = self.rules;
        let Some(target) = self.find(address) else { return };
        let (passed, reason) = match said {
            Ok(reason) => (true, reason),
            Err(reason) => (false, reason),
        };
        let (contradicts, needed) = match target.standing {
            TargetHealth::Draining => return,
            // A new target is in with its first check; only one that was out has to pass several.
            TargetHealth::Initial => (true, if passed { 1 } else { rules.unhealthy }),
            TargetHealth::Healthy => (!passed, rules.unhealthy),
            TargetHealth::Unhealthy => (passed, rules.healthy),
        };
        target.reason = reason;
        target.streak = if contradicts { target.streak + 1 } else { 0 };
        if target.streak < needed {
            return;
        }
        target.streak = 0;
        target.standing = if passed { TargetHealth::Healthy } else { TargetHealth::Unhealthy };
        if !passed && rules.reset_unhealthy {
            // Later flows, where all targets are unhealthy, are not meant.
            target.reset.send_replace(true);
            target.reset = watch::Sender::new(false);
        }
    }

    /// The target of a flow: the same for the same flow as long as the same targets are healthy. Where none is, all
    /// are used, as an NLB fails open.
    pub(crate) fn choose(&mut self, flow: &[u8]) -> Option<Chosen> {
        let any_healthy = self.targets.iter().any(|target| target.standing == TargetHealth::Healthy);
        let usable = |target: &&mut GroupTarget| match target.standing {
            TargetHealth::Healthy => true,
            TargetHealth::Initial | TargetHealth::Unhealthy => !any_healthy,
            TargetHealth::Draining => false,
        };
        let mut usable: Vec<_> = self.targets.iter_mut().filter(usable).collect();
        let count = u64::try_from(usable.len()).ok().filter(|count| *count > 0)?;
        let place = usize::try_from(xxh3_64(flow) % count).ok()?;
        let target = usable.get_mut(place)?;
        target.flows += 1;
        Some((target.address, target.reset.subscribe()))
    }

    /// Those that are checked.
    pub(crate) fn checked(&self) -> impl Iterator<Item = SocketAddr> {
        self.targets
            .iter()
            .filter(|target| target.standing != TargetHealth::Draining)
            .map(|target| target.address)
    }

    /// What an operator is told.
    #[must_use]
    pub(crate) fn describe(&self) -> Vec<TargetDescription> {
        let describe = |target: &GroupTarget| TargetDescription {
            address: target.address,
            state: target.standing,
            reason: target.reason.clone(),
            flows: target.flows,
            open: target.reset.receiver_count(),
        };
        self.targets.iter().map(describe).collect()
    }

    fn find(&mut self, address: SocketAddr) -> Option<&mut GroupTarget> {
        self.targets.iter_mut().find(|target| target.address == address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> SocketAddr {
        ([10, 100, 2, host], 8080).into()
    }

    fn group(rules: TargetGroupRules) -> TargetGroup {
        let mut group = TargetGroup::new(rules);
        for host in [11, 12] {
            group.register(address(host));
            group.note(address(host), says("200"));
        }
        group
    }

    /// A check's answer: 200 is good.
    fn says(status: &str) -> Result<String, String> {
        if status == "200" { Ok(status.to_owned()) } else { Err(status.to_owned()) }
    }

    fn standing(group: &TargetGroup, host: u8) -> Option<TargetHealth> {
        group.describe().into_iter().find(|target| target.address == address(host)).map(|target| target.state)
    }

    /// Which hosts a hundred flows go to.
    fn hosts(group: &mut TargetGroup) -> Vec<SocketAddr> {
        let mut found: Vec<_> =
            (0..100_u8).filter_map(|flow| group.choose(&[flow])).map(|(to, _)| to).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    #[test]
    fn flow_keeps_one_target_and_flows_use_all_targets() {
        let mut group = group(TargetGroupRules::default());
        assert_eq!(hosts(&mut group), [address(11), address(12)]);
        let first = group.choose(b"a flow").unwrap().0;
        assert!((0..10).all(|_| group.choose(b"a flow").unwrap().0 == first));
        assert_eq!(group.describe().iter().map(|target| target.flows).sum::<u64>(), 111);
    }

    #[test]
    fn two_failed_checks_in_a_row_take_out_and_five_passed_ones_bring_back() {
        let mut group = group(TargetGroupRules::default());
        for said in [says("503"), says("200"), says("503")] {
            group.note(address(11), said);
            assert_eq!(standing(&group, 11), Some(TargetHealth::Healthy));
        }
        group.note(address(11), says("503"));
        assert_eq!(standing(&group, 11), Some(TargetHealth::Unhealthy));
        assert_eq!(hosts(&mut group), [address(12)]);
        for _ in 0..4 {
            group.note(address(11), says("200"));
            assert_eq!(standing(&group, 11), Some(TargetHealth::Unhealthy));
        }
        group.note(address(11), says("200"));
        assert_eq!(hosts(&mut group), [address(11), address(12)]);
    }

    #[test]
    fn where_all_are_unhealthy_all_are_used() {
        let mut group = group(TargetGroupRules { unhealthy: 1, ..TargetGroupRules::default() });
        group.note(address(11), says("503"));
        group.note(address(12), says("503"));
        assert_eq!(hosts(&mut group), [address(11), address(12)]);
        assert!(TargetGroup::new(TargetGroupRules::default()).choose(b"a flow").is_none());
    }

    #[test]
    fn flows_of_an_unhealthy_target_are_reset_where_the_group_says_so() {
        for reset_unhealthy in [false, true] {
            let mut group =
                group(TargetGroupRules { reset_unhealthy, unhealthy: 1, ..TargetGroupRules::default() });
            group.deregister(address(12));
            let (_, flow) = group.choose(b"a flow").unwrap();
            assert_eq!(group.describe()[0].open, 1);
            group.note(address(11), says("503"));
            assert_eq!(*flow.borrow(), reset_unhealthy);
            // All are unhealthy: another flow comes all the same, and lives.
            assert!(!*group.choose(b"a flow").unwrap().1.borrow());
        }
    }

    #[test]
    fn deregistered_target_keeps_its_flows_until_the_delay_ends() {
        for reset_deregistered in [false, true] {
            let mut group = group(TargetGroupRules { reset_deregistered, ..TargetGroupRules::default() });
            let (_, flow) =
                (0..100_u8).filter_map(|f| group.choose(&[f])).find(|f| f.0 == address(11)).unwrap();
            assert!(group.deregister(address(11)) && !group.deregister(address(13)));
            assert_eq!(hosts(&mut group), [address(12)]);
            assert_eq!(group.checked().collect::<Vec<_>>(), [address(12)]);
            group.note(address(11), says("200"));
            assert_eq!(standing(&group, 11), Some(TargetHealth::Draining));
            assert!(!*flow.borrow());
            group.forget(address(11));
            assert_eq!((standing(&group, 11), *flow.borrow()), (None, reset_deregistered));
        }
    }

    #[test]
    fn target_registered_again_starts_fresh() {
        let mut group = group(TargetGroupRules::default());
        group.register(address(11));
        assert_eq!(standing(&group, 11), Some(TargetHealth::Healthy));
        group.deregister(address(11));
        group.register(address(11));
        group.forget(address(11));
        assert_eq!(standing(&group, 11), Some(TargetHealth::Initial));
    }
}
