//! The hands-on's world on one machine: a provider and two consumers, each in a network of its own, and all of them
//! 10.100.0.0/16; an interface endpoint in each consumer's, the load balancer, two proxies, two backends for each tenant.

mod nginx;

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use tokio::task::JoinSet;

use super::nlb::balancer::Balancer;
use super::nlb::group::TargetGroupRules;
use super::vpc::Network;
use super::vpc::run::{self, LabRun, network_name};

pub(crate) use self::nginx::{DOWNLOAD, LEN};

/// What all three networks are called by their owners.
pub(crate) const CIDR: &str = "10.100.0.0/16";
/// The client of each consumer: the same.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 10);
/// The endpoint's interface in each consumer's network: the same.
pub(crate) const ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 200);
/// The load balancer's address in the provider's network.
pub(crate) const NLB: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 5);
/// Where a proxy is the load balancer's target.
pub(crate) const PORT: u16 = 8080;
/// Where a proxy's health is asked.
pub(crate) const HEALTH: u16 = 8081;
/// Where a proxy's metrics and status are.
pub(crate) const ADMIN: u16 = 9900;
/// The port of the endpoints and of the backends.
pub(crate) const HTTP: u16 = 80;
/// The proxies.
pub(crate) const PROXIES: [(&str, Ipv4Addr); 2] =
    [("proxy-1", Ipv4Addr::new(10, 100, 2, 11)), ("proxy-2", Ipv4Addr::new(10, 100, 2, 12))];
/// The tenants.
pub(crate) const TENANTS: [LabTenant; 2] = [
    LabTenant {
        name: "acme",
        endpoint: "vpce-0acce0000acce0000",
        backends: [("acme-1", Ipv4Addr::new(10, 100, 3, 11)), ("acme-2", Ipv4Addr::new(10, 100, 3, 12))],
    },
    LabTenant {
        name: "globex",
        endpoint: "vpce-0910be00910be0000",
        backends: [("globex-1", Ipv4Addr::new(10, 100, 3, 21)), ("globex-2", Ipv4Addr::new(10, 100, 3, 22))],
    },
];
/// The load balancer's socket for orders, in the run's folder.
const ORDERS: &str = "nlb.sock";

/// What the load balancer's target group is set to. Times are shorter than an NLB allows: the hands-on is watched. What
/// drains by its health check must not have its flows reset when the check fails.
pub(crate) const RULES: TargetGroupRules = TargetGroupRules {
    interval: Duration::from_secs(1),
    timeout: Duration::from_secs(3),
    healthy: 2,
    unhealthy: 2,
    idle: Duration::from_secs(350),
    reset_unhealthy: false,
    deregistration: Duration::from_secs(300),
    reset_deregistered: false,
};

/// A tenant, with its consumer on one side and its pool on the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LabTenant {
    /// Its name.
    pub name: &'static str,
    /// Its interface endpoint's ID.
    pub endpoint: &'static str,
    /// Its pool: what a backend answers by, and where.
    pub backends: [(&'static str, Ipv4Addr); 2],
}

/// The programs to run.
#[derive(Clone, Debug)]
pub(crate) struct LabPrograms {
    /// This one.
    pub vestibule: PathBuf,
    /// nginx, which may lie where an ordinary PATH does not look.
    pub nginx: String,
}

/// The world, which ends with this unless it is kept.
#[derive(Debug)]
pub(crate) struct LabWorld {
    run: LabRun,
    provider: Network,
    programs: LabPrograms,
    /// What runs, by its name.
    children: Vec<(String, Child)>,
}

impl LabWorld {
    /// Makes the networks, and joins them by wires.
    ///
    /// # Errors
    /// What the system refused; nothing is left then.
    pub(crate) fn make(programs: LabPrograms) -> io::Result<Self> {
        let run = LabRun::begin()?;
        let provider = run.network("provider")?;
        let with_mask = |address: &Ipv4Addr| format!("{address}/16");
        let inside = PROXIES.into_iter().chain(TENANTS.into_iter().flat_map(|tenant| tenant.backends));
        let inside: Vec<_> = inside.map(|(_, address)| with_mask(&address)).collect();
        let inside: Vec<_> = inside.iter().map(String::as_str).collect();
        provider.join(&inside, &run.network("nlb")?, &[&with_mask(&NLB)])?;
        for tenant in TENANTS {
            let endpoint = run.network(&format!("{}-endpoint", tenant.name))?;
            run.network(tenant.name)?.join(&[&with_mask(&CLIENT)], &endpoint, &[&with_mask(&ENDPOINT)])?;
        }
        Ok(Self { run, provider, programs, children: Vec::new() })
    }

    /// Starts everything; what is started answers later.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        nginx::write_download(&self.folder())?;
        for (backend, _) in TENANTS.into_iter().flat_map(|tenant| tenant.backends) {
            self.start_backend(backend)?;
        }
        for (proxy, address) in PROXIES {
            fs::write(self.folder().join(format!("{proxy}.toml")), config(address))?;
            self.start_proxy(proxy)?;
        }
        let mut nlb = self.network("nlb")?.command(&self.programs.vestibule.to_string_lossy());
        nlb.args(["lab-nlb", self.run.name()]);
        self.spawn("nlb", nlb)
    }

    /// Starts a backend.
    ///
    /// # Errors
    /// What the system refused, or that there is none of this name.
    pub(crate) fn start_backend(&mut self, name: &str) -> io::Result<()> {
        let mut backends = TENANTS.into_iter().flat_map(|tenant| tenant.backends);
        let (name, address) =
            backends.find(|(backend, _)| *backend == name).ok_or(io::ErrorKind::NotFound)?;
        let folder = self.folder().join(name);
        let file = nginx::write(&folder, &self.folder(), name, (address, HTTP).into())?;
        let mut command = self.provider.command(&self.programs.nginx);
        command.arg("-p").arg(&folder).args(["-e", "stderr", "-c"]).arg(&file);
        self.spawn(name, command)
    }

    /// Starts a proxy.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn start_proxy(&mut self, name: &str) -> io::Result<()> {
        let mut command = self.provider.command(&self.programs.vestibule.to_string_lossy());
        command.args(["serve", "--config"]).arg(self.folder().join(format!("{name}.toml")));
        self.spawn(name, command)
    }

    fn spawn(&mut self, name: &str, mut command: Command) -> io::Result<()> {
        let log = self.log(name);
        let log = File::options().create(true).append(true).open(log)?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.children.retain(|(known, _)| known != name);
        self.children.push((name.to_owned(), child));
        Ok(())
    }

    /// One that was started.
    pub(crate) fn child(&mut self, name: &str) -> Option<&mut Child> {
        self.children.iter_mut().find(|(known, _)| known == name).map(|(_, child)| child)
    }

    /// The first program that has exited unexpectedly.
    pub(crate) fn ended(&mut self) -> Option<String> {
        let ended = |child: &mut Child| child.try_wait().is_ok_and(|status| status.is_some());
        self.children.iter_mut().find_map(|(name, child)| ended(child).then(|| name.clone()))
    }

    /// One of the networks, as named when it was made: `provider`, `nlb`, a tenant's name, or that and `-endpoint`.
    ///
    /// # Errors
    /// Where it is not there.
    pub(crate) fn network(&self, name: &str) -> io::Result<Network> {
        network(self.run.name(), name)
    }

    /// The run's name.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        self.run.name()
    }

    /// Where configurations, logs and the load balancer's socket are.
    #[must_use]
    pub(crate) fn folder(&self) -> PathBuf {
        self.run.folder()
    }

    /// What a process has said.
    #[must_use]
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.log"))
    }

    /// Where the load balancer takes orders.
    #[must_use]
    pub(crate) fn orders(&self) -> PathBuf {
        self.folder().join(ORDERS)
    }

    /// Leaves everything running.
    ///
    /// # Errors
    /// Where that cannot be noted.
    pub(crate) fn keep(mut self) -> io::Result<()> {
        self.children.clear();
        self.run.keep()
    }

    /// Ends and removes everything.
    ///
    /// # Errors
    /// What could not be removed.
    pub(crate) fn remove(mut self) -> io::Result<()> {
        self.kill();
        self.run.remove()
    }

    /// Ends what it has started. One that was told to start a moment ago may not be in its network yet, and would not
    /// be found there.
    fn kill(&mut self) {
        for (_, mut child) in self.children.drain(..) {
            // One that has ended by itself cannot be killed.
            child.kill().and_then(|()| child.wait().map(drop)).unwrap_or_default();
        }
    }
}

impl Drop for LabWorld {
    fn drop(&mut self) {
        self.kill();
    }
}

fn network(run: &str, name: &str) -> io::Result<Network> {
    let name = network_name(run, name);
    let found = Network::all(&name)?.into_iter().find(|network| network.name() == name);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no network {name}")))
}

/// The load balancer of a run, with the interface endpoints in the consumers' networks, until it is killed.
///
/// # Errors
/// Why it cannot go on.
pub(crate) async fn balance(run: &str) -> io::Result<()> {
    let targets = PROXIES.map(|(_, address)| SocketAddr::from((address, PORT)));
    let balancer = Balancer::new(RULES, &targets, HEALTH, "/healthz");
    let mut tasks = JoinSet::new();
    for tenant in TENANTS {
        let network = network(run, &format!("{}-endpoint", tenant.name))?;
        let socket = network.inside(|| TcpListener::bind((ENDPOINT, HTTP)))?;
        socket.set_nonblocking(true)?;
        let socket = tokio::net::TcpListener::from_std(socket)?;
        tasks.spawn(balancer.clone().serve(socket, tenant.endpoint.to_owned()));
    }
    tasks.spawn(balancer.clone().check());
    balancer.obey(&run::folder(run).join(ORDERS)).await
}

/// A proxy's configuration, as an operator would write it.
fn config(address: Ipv4Addr) -> String {
    let head = format!(
        r#"# One of the two proxies of `vestibule lab`. Times are shorter than in earnest.

[process]
workers = 1

[admin]
bind = "{address}:{ADMIN}"

[health]
bind = "{address}:{HEALTH}"
path = "/healthz"

[log]
format = "text"

[drain]
notice = "3s"
quiet = "1s"
idle = "5s"
deadline = "60s"

[[listener]]
name = "web"
bind = "{address}:{PORT}"
trusted-sources = ["{NLB}/32"]          # the load balancer's address in this network
"#
    );
    TENANTS.iter().fold(head, |text, tenant| text + &tenant_tables(tenant, address))
}

/// A tenant and its pool.
fn tenant_tables(LabTenant { name, endpoint, backends }: &LabTenant, source: Ipv4Addr) -> String {
    let [first, second] = backends.map(|(_, address)| format!("\"{address}:{HTTP}\""));
    format!(
        r#"
[[tenant]]
name = "{name}"
endpoints = ["{endpoint}"]
pool = "{name}"

[[pool]]
name = "{name}"
backends = [{first}, {second}]
source-addresses = ["{source}"]
send-proxy = "v2"                       # so that nginx sees the client's address
panic-threshold = 40                    # of two backends one may be out; with both out both are used

[pool.health]
kind = "http"
interval = "1s"
timeout = "1s"
rise = 2
fall = 2
send-proxy = true

[pool.ejection]
base-time = "3s"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn lab_configurations_are_valid() {
        for (proxy, address) in PROXIES {
            let config = Config::parse(proxy, &config(address)).unwrap();
            assert_eq!(config.tenants.len(), TENANTS.len());
        }
    }
}
