//! What the records of an answer mean: which addresses, with which weights, and for how long.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::proto::rr::{Name, RData, Record};

use super::LookupResult;
use crate::pool::{MOST_ADDRESSES, ResolvedAddress};

/// The weight of the heaviest where weights must be scaled, and the most that a backend may have.
const HEAVIEST: u64 = 1_000;

/// The resolved addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameResolution {
    /// Its addresses: never empty, none twice, and [`MOST_ADDRESSES`] at most. The same records give the same order.
    pub found: Vec<ResolvedAddress>,
    /// How many more there were.
    pub left_out: usize,
    /// How long it holds, by its records.
    pub ttl: Duration,
}

/// The records of one DNS answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsAnswer<T> {
    /// What the records lead to; never empty.
    pub found: Vec<T>,
    /// The least time to live, in seconds.
    pub ttl: u32,
}

/// The answers for the two families of a host: A, then AAAA.
pub type Families = [Result<DnsAnswer<IpAddr>, LookupResult>; 2];

/// An SRV record (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SrvRecord {
    /// The lowest is used first.
    pub priority: u16,
    /// The share among those of the same priority.
    pub weight: u16,
    /// The host that offers it.
    pub host: Name,
    /// At which port; not 0.
    pub port: u16,
}

/// Follows the aliases of an answer from `name`: what they end at, and the least time to live of those that were followed.
#[must_use]
pub fn follow(name: &Name, records: &[Record]) -> (Name, u32) {
    let (mut end, mut ttl) = (name.clone(), u32::MAX);
    // An answer may run in a circle.
    for _ in records {
        let mut alias = records.iter().filter(|record| record.name == end);
        let Some((target, own)) = alias.find_map(as_alias) else { break };
        (end, ttl) = (target.clone(), ttl.min(own));
    }
    (end, ttl)
}

fn as_alias(record: &Record) -> Option<(&Name, u32)> {
    let RData::CNAME(target) = &record.data else { return None };
    Some((&target.0, time_to_live(record)))
}

/// In seconds; one that has the highest bit is 0 (RFC 2181, 8).
fn time_to_live(record: &Record) -> u32 {
    if record.ttl > i32::MAX.unsigned_abs() { 0 } else { record.ttl }
}

/// The addresses that the records of `name` say, in order, and the least time to live of those records.
#[must_use]
pub fn addresses(name: &Name, records: &[Record]) -> DnsAnswer<IpAddr> {
    let own = records.iter().filter(|record| record.name == *name);
    let (found, ttls): (BTreeSet<_>, Vec<_>) = own
        .filter_map(|record| {
            let address = record.data.ip_addr()?;
            Some((address, time_to_live(record)))
        })
        .unzip();
    DnsAnswer { found: found.into_iter().collect(), ttl: least(ttls) }
}

/// The services that the records of `name` say, the preferred first, and the least time to live of those records. The target `.` says that the service is not available (RFC 2782).
#[must_use]
pub fn services(name: &Name, records: &[Record]) -> DnsAnswer<SrvRecord> {
    let own = records.iter().filter(|record| record.name == *name);
    let (found, ttls): (BTreeSet<_>, Vec<_>) = own
        .filter_map(|record| {
            let RData::SRV(said) = &record.data else { return None };
            let host = said.target.to_lowercase();
            let is_offered = !host.is_root() && said.port != 0;
            let service = (said.priority, Reverse(said.weight), host, said.port);
            is_offered.then_some((service, time_to_live(record)))
        })
        .unzip();
    let service = |(priority, Reverse(weight), host, port)| SrvRecord { priority, weight, host, port };
    let found = found.into_iter().map(service).collect();
    DnsAnswer { found, ttl: least(ttls) }
}

fn least(ttls: Vec<u32>) -> u32 {
    ttls.into_iter().min().unwrap_or(u32::MAX)
}

/// What a host's addresses at a port are.
#[must_use]
pub fn of_host(said: DnsAnswer<IpAddr>, port: u16) -> Option<NameResolution> {
    let resolved =
        |address| ResolvedAddress { address: SocketAddr::new(address, port), weight: None, is_backup: false };
    let found: BTreeSet<_> = said.found.into_iter().collect();
    limited(found.into_iter().map(resolved).collect(), said.ttl)
}

/// What the services' hosts' addresses are: those of the lowest priority, and all others as backups. A weight is that of all
/// addresses of its host together.
#[must_use]
pub fn of_service(
    said: &DnsAnswer<SrvRecord>,
    hosts: &BTreeMap<Name, DnsAnswer<IpAddr>>,
) -> Option<NameResolution> {
    let known = || said.found.iter().filter_map(|service| Some((service, hosts.get(&service.host)?)));
    // If the preferred services have no addresses, the next priority is not a backup.
    let preferred = known().map(|(service, _)| service.priority).min()?;
    let mut shares: BTreeMap<(u16, SocketAddr), WeightShare> = BTreeMap::new();
    for (service, host) in known() {
        for address in &host.found {
            let place = (service.priority, SocketAddr::new(*address, service.port));
            shares.entry(place).or_default().add(service.weight, host.found.len());
        }
    }
    let mut seen = BTreeSet::new();
    shares.retain(|(_, address), _| seen.insert(*address));
    let [primaries, backups] = [false, true].map(|is_backup| {
        let own = shares.iter().filter(|((priority, _), _)| (*priority != preferred) == is_backup);
        WeightScale::new(own.map(|(_, share)| *share))
    });
    let found = shares.iter().map(|((priority, address), share)| {
        let is_backup = *priority != preferred;
        let scale = if is_backup { backups } else { primaries };
        ResolvedAddress { address: *address, weight: scale.weight(*share), is_backup }
    });
    let ttls = said.found.iter().filter_map(|service| hosts.get(&service.host)).map(|host| host.ttl);
    limited(found.collect(), ttls.fold(said.ttl, u32::min))
}

fn limited(mut found: Vec<ResolvedAddress>, ttl: u32) -> Option<NameResolution> {
    let left_out = found.len().saturating_sub(MOST_ADDRESSES as usize);
    found.truncate(MOST_ADDRESSES as usize);
    let ttl = Duration::from_secs(ttl.into());
    (!found.is_empty()).then_some(NameResolution { found, left_out, ttl })
}

/// An address's part of its host's weight, in [`PARTS`](Self::PARTS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct WeightShare(u64);

impl WeightShare {
    /// A whole weight is so many.
    const PARTS: u64 = 1 << 20;

    fn add(&mut self, weight: u16, among: usize) {
        let among = u64::try_from(among).unwrap_or(u64::MAX).max(1);
        self.0 = self.0.saturating_add(u64::from(weight) * Self::PARTS / among);
    }
}

/// How SRV weights become backend weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WeightScale {
    /// All are zero: they are equal (RFC 2782).
    Equal,
    /// Each is a weight as it stands.
    AsSaid,
    /// This one becomes [`HEAVIEST`], and the others in relation.
    To(WeightShare),
}

impl WeightScale {
    fn new(shares: impl Iterator<Item = WeightShare> + Clone) -> Self {
        let largest = shares.clone().max().unwrap_or_default();
        let is_weight = |WeightShare(parts): WeightShare| {
            parts % WeightShare::PARTS == 0 && (1..=HEAVIEST).contains(&(parts / WeightShare::PARTS))
        };
        if largest.0 == 0 {
            Self::Equal
        } else if shares.into_iter().all(is_weight) {
            Self::AsSaid
        } else {
            Self::To(largest)
        }
    }

    /// Never 0: one with the weight 0 among others has a very small chance of being picked (RFC 2782), not none.
    fn weight(self, WeightShare(parts): WeightShare) -> Option<u32> {
        let weight = match self {
            Self::Equal => return None,
            Self::AsSaid => parts / WeightShare::PARTS,
            Self::To(WeightShare(largest)) => {
                let whole = u128::from(parts) * u128::from(HEAVIEST) + u128::from(largest) / 2;
                u64::try_from(whole / u128::from(largest.max(1))).unwrap_or(HEAVIEST)
            }
        };
        u32::try_from(weight.clamp(1, HEAVIEST)).ok()
    }
}

/// The last answers for each host and address family, used while a query fails.
#[derive(Debug, Default)]
pub struct LastAnswers {
    hosts: BTreeMap<Name, [Vec<IpAddr>; 2]>,
    /// Addresses that the answers of the last lookup contained and that no answer may contain.
    pub refused: BTreeSet<IpAddr>,
}

/// The addresses of a host and the result of its lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAnswer {
    /// Its addresses; none where there never was one, or where it has none.
    pub addresses: DnsAnswer<IpAddr>,
    /// How its lookup ended: found, where one family at least has addresses now.
    pub lookup: LookupResult,
}

impl LastAnswers {
    /// Takes in the answers for a host.
    pub fn settle(&mut self, host: &Name, families: Families) -> HostAnswer {
        let last = self.hosts.entry(host.clone()).or_default();
        let (mut addresses, mut worst) = (DnsAnswer { found: Vec::new(), ttl: u32::MAX }, None);
        let mut is_found = false;
        for (last, family) in last.iter_mut().zip(families) {
            match family {
                Ok(said) => {
                    is_found = true;
                    addresses.ttl = addresses.ttl.min(said.ttl);
                    *last = said.found;
                }
                Err(lookup) => {
                    worst = worst.max(Some(lookup));
                    // That there is none is an answer too.
                    if lookup.is_answer() {
                        last.clear();
                    }
                }
            }
            addresses.found.extend_from_slice(last);
        }
        let lookup = if is_found { LookupResult::Found } else { worst.unwrap_or(LookupResult::NoAddress) };
        HostAnswer { addresses, lookup }
    }

    /// Forgets every host but these.
    pub fn keep(&mut self, hosts: &BTreeSet<Name>) {
        self.hosts.retain(|host, _| hosts.contains(host));
    }
}

#[cfg(test)]
mod tests;
