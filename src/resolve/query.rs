//! The lookup: the hosts file, then the servers, with each name of the search list in turn.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hickory_resolver::config::{NameServerConfig, ResolverOpts};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Message, Query, ResponseCode};
use hickory_resolver::proto::rr::domain::usage::LOCALHOST;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use hickory_resolver::{Hosts, PoolContext, TlsConfig};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::LookupResult;
use super::address_filter::{AddressFilter, Own, is_usable};
use super::answer::{self, DnsAnswer, Families, HostAnswer, LastAnswers, NameResolution, SrvRecord};
use super::server::DnsServer;
use crate::account::lock;
use crate::account::session_metrics::ConnectResult;
use crate::config::{BackendTarget, DnsConfig};
use crate::connect;
use crate::pool::MOST_ADDRESSES;

/// Questions on their way at once, of all names: each has a socket, or two where it is asked with and without EDNS.
const AT_ONCE: usize = 64;

/// Aliases that are asked for one after the other where a server does not follow them itself.
const MOST_ALIASES: usize = 8;

/// The two families of addresses.
const FAMILIES: [RecordType; 2] = [RecordType::A, RecordType::AAAA];

/// The system's own names.
const HOSTS: &str = "/etc/hosts";

/// Why there is no DNS server.
#[derive(Debug, thiserror::Error)]
#[error("the system's resolver configuration cannot be used: {0}")]
pub struct NoServers(NetError);

/// A DNS resolver without a cache.
///
/// Messages, retransmission, the change to TCP, and the files' formats are hickory's. Its `Resolver` is not used: questions
/// share connections there, so that one slow answer delays others; it does not ask again without EDNS; after a timeout it goes
/// on with the search list, whose next name may be another service; it reads the hosts file once; and it does not tell which
/// addresses its filter removed.
pub struct Resolver {
    servers: Vec<DnsServer>,
    /// The server that answered last.
    preferred: AtomicUsize,
    /// What a server, and what all of them together may take over a question.
    share: Duration,
    timeout: Duration,
    bounds: (Duration, Duration),
    search: Vec<Name>,
    /// So many dots make a name one that is asked for as it is first.
    dots: usize,
    hosts: HostsFile,
    questions: Semaphore,
    guard: AddressFilter,
}

impl Resolver {
    /// One that asks the servers of the configuration, which know names as they are written; or those of the system, by its
    /// search list. An answer with one of the `own` addresses, at which the process listens, is refused.
    ///
    /// # Errors
    /// The system's configuration is needed and cannot be read, or names no server.
    pub fn new(config: &DnsConfig, own: Own) -> Result<Self, NoServers> {
        let (servers, search, dots, edns) = if config.servers.is_empty() {
            let (system, options) = read_system_conf().map_err(NoServers)?;
            let (domain, mut search, servers) = system.into_parts();
            if search.is_empty() {
                search.extend(domain);
            }
            (servers, search, options.ndots, options.edns0)
        } else {
            let server = |address: &std::net::SocketAddr| {
                let mut server = NameServerConfig::udp_and_tcp(address.ip());
                server.connections.iter_mut().for_each(|connection| connection.port = address.port());
                server
            };
            (config.servers.iter().map(server).collect(), Vec::new(), 0, true)
        };
        let share = config.timeout / u32::try_from(servers.len()).unwrap_or(u32::MAX).max(1);
        let mut options = ResolverOpts::default();
        (options.timeout, options.edns0) = (share, edns);
        let context = Arc::new(PoolContext::new(options, TlsConfig::new().map_err(NoServers)?));
        Ok(Self {
            servers: servers.into_iter().map(|server| DnsServer::new(server, &context)).collect(),
            preferred: AtomicUsize::new(0),
            share,
            timeout: config.timeout,
            bounds: (config.min_ttl, config.max_ttl),
            search,
            dots,
            hosts: HostsFile::new(HOSTS),
            questions: Semaphore::new(AT_ONCE),
            guard: AddressFilter::new(config, own),
        })
    }

    /// How long an answer holds at least, and at most.
    #[must_use]
    pub fn bounds(&self) -> (Duration, Duration) {
        self.bounds
    }

    /// Looks a target up once; `memory` is what its lookups know of each other.
    ///
    /// # Errors
    /// How it ended, where nothing was found.
    pub async fn look_up(
        self: &Arc<Self>,
        target: &BackendTarget,
        memory: &mut LastAnswers,
    ) -> Result<NameResolution, LookupResult> {
        memory.refused.clear();
        let mut answer = self.find(target, memory).await?;
        if matches!(target, BackendTarget::Address(_)) {
            return Ok(answer);
        }
        let own = answer.found.extract_if(.., |resolved| self.guard.is_own(resolved.address));
        memory.refused.extend(own.map(|resolved| resolved.address.ip()));
        if answer.found.is_empty() { Err(LookupResult::AddressRefused) } else { Ok(answer) }
    }

    async fn find(
        self: &Arc<Self>,
        target: &BackendTarget,
        memory: &mut LastAnswers,
    ) -> Result<NameResolution, LookupResult> {
        match target {
            BackendTarget::Address(address) => {
                let said = DnsAnswer { found: vec![address.ip()], ttl: u32::MAX };
                answer::of_host(said, address.port()).ok_or(LookupResult::NoAddress)
            }
            BackendTarget::Host { name, port } => {
                let names = self.names_of_host(name)?;
                let mut worst = LookupResult::NoSuchName;
                for name in &names {
                    let (families, refused) = self.families(name, true).await;
                    memory.refused.extend(refused);
                    let HostAnswer { addresses, lookup } = memory.settle(name, families);
                    if lookup == LookupResult::Found {
                        memory.keep(&BTreeSet::from([name.clone()]));
                        return answer::of_host(addresses, *port).ok_or(LookupResult::NoAddress);
                    }
                    worst = worst.max(lookup);
                    if ends_search(lookup) {
                        break;
                    }
                }
                Err(worst)
            }
            BackendTarget::Service(name) => self.service(name, memory).await,
        }
    }

    async fn service(
        self: &Arc<Self>,
        name: &str,
        memory: &mut LastAnswers,
    ) -> Result<NameResolution, LookupResult> {
        let mut services = self.services(name).await?;
        let most = services.found.len().min(MOST_ADDRESSES as usize);
        let left_out = services.found.split_off(most).len();
        let hosts: BTreeSet<_> = services.found.iter().map(|service| service.host.clone()).collect();
        let mut asked = JoinSet::new();
        for host in hosts.clone() {
            let own = Arc::clone(self);
            asked.spawn(async move {
                let families = own.families(&host, false).await;
                (host, families)
            });
        }
        let (mut known, mut worst, mut is_found) = (BTreeMap::new(), LookupResult::NoAddress, false);
        while let Some(joined) = asked.join_next().await {
            let Ok((host, (families, refused))) = joined else { continue };
            memory.refused.extend(refused);
            let HostAnswer { addresses, lookup } = memory.settle(&host, families);
            if lookup == LookupResult::Found {
                is_found = true;
            } else {
                worst = worst.max(lookup);
            }
            if !addresses.found.is_empty() {
                known.insert(host, addresses);
            }
        }
        memory.keep(&hosts);
        if !is_found {
            return Err(worst);
        }
        let answer = answer::of_service(&services, &known).ok_or(worst)?;
        Ok(NameResolution { left_out: answer.left_out + left_out, ..answer })
    }

    async fn services(&self, name: &str) -> Result<DnsAnswer<SrvRecord>, LookupResult> {
        let mut worst = LookupResult::NoSuchName;
        for name in self.names(name)? {
            match self.ask(&name, RecordType::SRV, answer::services).await {
                Ok(said) => return Ok(said),
                Err(lookup) => worst = worst.max(lookup),
            }
            if ends_search(worst) {
                break;
            }
        }
        Err(worst)
    }

    /// The names that a name may stand for, in the order in which they are asked for (resolv.conf(5)).
    fn names(&self, name: &str) -> Result<Vec<Name>, LookupResult> {
        let (name, whole) = parsed(name)?;
        if name.is_fqdn() {
            return Ok(vec![whole]);
        }
        let within = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let mut names: Vec<_> = within.filter(|name| *name != whole).collect();
        let is_whole_first = name.iter().count() > self.dots || LOCALHOST.zone_of(&whole);
        names.insert(if is_whole_first { 0 } else { names.len() }, whole);
        Ok(names)
    }

    /// The same for a host: the hosts file knows names as they are written, and comes first.
    fn names_of_host(&self, name: &str) -> Result<Vec<Name>, LookupResult> {
        let (_, whole) = parsed(name)?;
        if self.hosts.knows(&whole) { Ok(vec![whole]) } else { self.names(name) }
    }

    /// Both families of a host, without the addresses that no answer may contain, and those. What this machine knows of a name
    /// that `is_configured` is no answer: the operator wrote both.
    async fn families(&self, host: &Name, is_configured: bool) -> (Families, Vec<IpAddr>) {
        let here = self.known_here(host);
        let is_answer = here.is_none() || !is_configured;
        let ask = |kind| self.ask(host, kind, answer::addresses);
        let mut families = match here {
            Some(families) => families,
            None => tokio::join!(ask(RecordType::A), ask(RecordType::AAAA)).into(),
        };
        let mut refused = Vec::new();
        for family in families.iter_mut().filter(|_| is_answer) {
            let Ok(said) = family else { continue };
            refused.append(&mut self.guard.refuse(&mut said.found, is_configured));
            if said.found.is_empty() {
                *family = Err(LookupResult::AddressRefused);
            }
        }
        (families, refused)
    }

    /// What this machine knows of a host: from the hosts file, where it knows one of the families, or as localhost.
    fn known_here(&self, host: &Name) -> Option<Families> {
        if self.hosts.knows(host) {
            return Some(FAMILIES.map(|kind| {
                let said = DnsAnswer { found: self.hosts.find(host, kind), ttl: 0 };
                if said.found.is_empty() { Err(LookupResult::NoAddress) } else { Ok(said) }
            }));
        }
        // No server is asked for it (RFC 6761, 6.3).
        let loopback = [std::net::Ipv4Addr::LOCALHOST.into(), std::net::Ipv6Addr::LOCALHOST.into()];
        let said = |address| Ok(DnsAnswer { found: vec![address], ttl: u32::MAX });
        LOCALHOST.zone_of(host).then(|| loopback.map(said))
    }

    /// Asks a question, and for the aliases that are its answer.
    async fn ask<T>(
        &self,
        name: &Name,
        kind: RecordType,
        read: fn(&Name, &[hickory_resolver::proto::rr::Record]) -> DnsAnswer<T>,
    ) -> Result<DnsAnswer<T>, LookupResult> {
        let _permit = self.questions.acquire().await.map_err(|_| LookupResult::Shortage)?;
        let asked = async {
            let (mut name, mut ttl) = (name.clone(), u32::MAX);
            for _ in 0..MOST_ALIASES {
                let message = self.question(&name, kind).await?;
                let (end, of_aliases) = answer::follow(&name, &message.answers);
                let said = read(&end, &message.answers);
                ttl = ttl.min(of_aliases).min(said.ttl);
                if !said.found.is_empty() {
                    return Ok(DnsAnswer { ttl, ..said });
                }
                if message.response_code == ResponseCode::NXDomain {
                    return Err(LookupResult::NoSuchName);
                }
                // An answer with the zone's SOA record is a definite negative answer (RFC 2308, 2.2).
                let is_known = message.authorities.iter().any(|record| matches!(record.data, RData::SOA(_)));
                let has_some = message.answers.iter().any(|record| record.record_type() == kind);
                if is_known || has_some || end == name {
                    return Err(LookupResult::NoAddress);
                }
                name = end;
            }
            Err(LookupResult::Malformed)
        };
        timeout(self.timeout, asked).await.unwrap_or(Err(LookupResult::Timeout))
    }

    /// Asks each server until one knows, beginning with the one that knew last.
    async fn question(&self, name: &Name, kind: RecordType) -> Result<Message, LookupResult> {
        let preferred = self.preferred.load(Ordering::Relaxed);
        let mut last = LookupResult::Network;
        let turns = self.servers.iter().enumerate().cycle().skip(preferred).take(self.servers.len());
        for (place, server) in turns {
            let asked = server.ask(Query::query(name.clone(), kind), self.share);
            last = match timeout(self.share, asked).await {
                Ok(Ok(message)) => {
                    self.preferred.store(place, Ordering::Relaxed);
                    return Ok(message);
                }
                Ok(Err(error)) => classify(&error),
                Err(_) => LookupResult::Timeout,
            };
            if last.is_answer() {
                self.preferred.store(place, Ordering::Relaxed);
                break;
            }
        }
        Err(last)
    }
}

/// A name as it is written, and as one that is complete.
fn parsed(name: &str) -> Result<(Name, Name), LookupResult> {
    let name = Name::from_ascii(name).map_err(|_| LookupResult::NoSuchName)?;
    let mut whole = name.clone();
    whole.set_fqdn(true);
    Ok((name, whole))
}

/// Whether the next name of the search list must not be asked for: it would be taken for one that may exist. A zone that its
/// servers cannot answer for is passed over, as the system does.
fn ends_search(lookup: LookupResult) -> bool {
    !lookup.is_answer() && !matches!(lookup, LookupResult::Refused | LookupResult::ServerFailure)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the set is open")]
fn classify(error: &NetError) -> LookupResult {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) if none.response_code == ResponseCode::NXDomain => {
            LookupResult::NoSuchName
        }
        NetError::Dns(DnsError::NoRecordsFound(_)) => LookupResult::NoAddress,
        NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused)) => LookupResult::Refused,
        NetError::Dns(_) => LookupResult::ServerFailure,
        NetError::Timeout => LookupResult::Timeout,
        NetError::Busy => LookupResult::Shortage,
        NetError::Io(error) => match connect::classify(error) {
            ConnectResult::Shortage | ConnectResult::NoLocalPort => LookupResult::Shortage,
            ConnectResult::Timeout => LookupResult::Timeout,
            ConnectResult::Done
            | ConnectResult::Refused
            | ConnectResult::Unreachable
            | ConnectResult::Failed => LookupResult::Network,
        },
        NetError::NoConnections => LookupResult::Network,
        _ => LookupResult::Malformed,
    }
}

/// The hosts file; read again when it changes.
struct HostsFile {
    path: PathBuf,
    read: Mutex<(Option<SystemTime>, Arc<Hosts>)>,
}

impl HostsFile {
    fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned(), read: Mutex::default() }
    }

    fn knows(&self, host: &Name) -> bool {
        FAMILIES.iter().any(|kind| !self.find(host, *kind).is_empty())
    }

    /// The addresses that it says for a host; none where it says none, or cannot be read.
    fn find(&self, host: &Name, kind: RecordType) -> Vec<IpAddr> {
        let found = self.hosts().lookup_static_host(&Query::query(host.clone(), kind));
        let mut found = found.map_or_else(Vec::new, |found| answer::addresses(host, found.answers()).found);
        found.retain(|address| is_usable(*address));
        found
    }

    fn hosts(&self) -> Arc<Hosts> {
        let changed = fs::metadata(&self.path).and_then(|file| file.modified()).ok();
        let mut read = lock(&self.read);
        if read.0 != changed {
            let mut hosts = Hosts::default();
            // Entries read before an error are used.
            File::open(&self.path).and_then(|file| hosts.read_hosts_conf(file)).unwrap_or_default();
            *read = (changed, Arc::new(hosts));
        }
        Arc::clone(&read.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolver(search: &[&str], dots: usize) -> Resolver {
        let second = Duration::from_secs(1);
        let servers = vec!["127.0.0.1:9".parse().unwrap()];
        let config = DnsConfig {
            servers,
            timeout: second,
            min_ttl: second,
            max_ttl: second,
            allow_answers: Vec::new(),
        };
        let mut resolver = Resolver::new(&config, Box::new(Vec::new)).unwrap();
        resolver.search = search.iter().map(|domain| Name::from_ascii(domain).unwrap()).collect();
        (resolver.dots, resolver.hosts) = (dots, HostsFile::new("none"));
        resolver
    }

    fn texts(names: Result<Vec<Name>, LookupResult>) -> Vec<String> {
        names.unwrap().iter().map(Name::to_string).collect()
    }

    #[test]
    fn search_list_order_follows_the_system() {
        let resolver = resolver(&["ns.local", "local.", "."], 2);
        assert_eq!(texts(resolver.names("db")), ["db.ns.local.", "db.local.", "db."]);
        assert_eq!(texts(resolver.names("db.x")), ["db.x.ns.local.", "db.x.local.", "db.x."]);
        assert_eq!(texts(resolver.names("a.db.x")), ["a.db.x.", "a.db.x.ns.local.", "a.db.x.local."]);
        assert_eq!(texts(resolver.names("db.")), ["db."]);
        assert_eq!(resolver.names("a..b"), Err(LookupResult::NoSuchName));
    }

    #[test]
    fn search_list_continues_only_after_a_definite_answer() {
        let on: Vec<_> = LookupResult::ALL.into_iter().filter(|lookup| !ends_search(*lookup)).collect();
        let expected = [
            LookupResult::NoSuchName,
            LookupResult::NoAddress,
            LookupResult::Refused,
            LookupResult::ServerFailure,
        ];
        assert_eq!(on[1..], expected);
    }

    #[tokio::test]
    async fn hosts_file_comes_first_and_is_reread_when_it_changes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "10.0.0.7 db # the first\nfd00::7 DB other\nnonsense x\n").unwrap();
        let mut resolver = resolver(&["local."], 1);
        resolver.hosts = HostsFile::new(file.path());
        let resolver = Arc::new(resolver);
        let found = async |name: &str| {
            let target = BackendTarget::Host { name: name.to_owned(), port: 80 };
            let answer = resolver.look_up(&target, &mut LastAnswers::default()).await.unwrap();
            answer.found.iter().map(|resolved| resolved.address.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(found("db").await, ["10.0.0.7:80", "[fd00::7]:80"]);
        assert_eq!(found("other").await, ["[fd00::7]:80"]);
        assert_eq!(found("localhost").await, ["127.0.0.1:80", "[::1]:80"]);

        fs::write(file.path(), "10.0.0.8 db\n").unwrap();
        let later = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
        File::options().append(true).open(file.path()).unwrap().set_modified(later).unwrap();
        assert_eq!(found("db").await, ["10.0.0.8:80"]);
    }

    #[test]
    fn failures_are_classified() {
        let io = |kind: std::io::ErrorKind| NetError::from(std::io::Error::from(kind));
        let code = |code| NetError::from(DnsError::ResponseCode(code));
        for (error, expected) in [
            (NetError::Timeout, LookupResult::Timeout),
            (io(std::io::ErrorKind::TimedOut), LookupResult::Timeout),
            (io(std::io::ErrorKind::Other), LookupResult::Network),
            (std::io::Error::from(rustix::io::Errno::MFILE).into(), LookupResult::Shortage),
            (NetError::NoConnections, LookupResult::Network),
            (NetError::Truncated, LookupResult::Malformed),
            (code(ResponseCode::Refused), LookupResult::Refused),
            (code(ResponseCode::ServFail), LookupResult::ServerFailure),
            (code(ResponseCode::NotImp), LookupResult::ServerFailure),
        ] {
            assert_eq!(classify(&error), expected, "{error}");
        }
    }
}
