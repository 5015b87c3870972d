//! The hands-on, step by step: each step does something, shows what happens, and claims what must be so.

use std::io;
use std::net::Ipv4Addr;

use rustix::process::{Pid, Signal, kill_process};

use super::query::{NginxAnswer, ProxyStatus, TargetStates, curl, health, order, until};
use super::screen::{Screen, note};
use super::traffic::{CALLERS, ConsumerTraffic};
use crate::lab::nlb::group::TargetHealth;
use crate::lab::vpc::Network;
use crate::lab::world::{CLIENT, ENDPOINT, HTTP, LabWorld, PORT, PROXIES, TENANTS};

/// The curls' ports in both consumers' networks: not even by these can the consumers be told apart.
const PORTS: std::ops::RangeInclusive<u16> = 40_001..=40_004;
/// Requests that count as traffic.
const SOME: u64 = 20;

pub(super) struct Walkthrough<'w> {
    world: &'w mut LabWorld,
    screen: &'w mut Screen,
}

impl<'w> Walkthrough<'w> {
    pub(super) fn new(world: &'w mut LabWorld, screen: &'w mut Screen) -> Self {
        Self { world, screen }
    }

    /// Tells it all.
    ///
    /// # Errors
    /// Why it could not go on; what does not hold is no error, but on the screen.
    pub(super) async fn tell(mut self) -> io::Result<()> {
        self.screen.picture(self.world);
        let provider = self.world.network("provider")?;
        let consumers: Vec<_> =
            TENANTS.into_iter().map(|tenant| self.world.network(tenant.name)).collect::<Result<_, _>>()?;
        self.come_up(&provider).await?;
        self.curl_from_each(&consumers).await?;
        self.pass_by(&provider).await?;
        let traffic = ConsumerTraffic::start(&consumers)?;
        self.drain(&provider, &traffic).await?;
        self.come_back(&traffic).await?;
        self.deregister(&traffic).await?;
        self.lose_a_backend(&provider, &traffic).await?;
        self.sum_up(traffic).await
    }

    async fn come_up(&mut self, provider: &Network) -> io::Result<()> {
        self.screen.step("The lab starts");
        self.world.start()?;
        let orders = self.world.orders();
        for (name, address) in PROXIES {
            let world = &mut *self.world;
            let ended = until(name, async || {
                if let Some(ended) = world.ended() {
                    return Ok(Some(Some(ended)));
                }
                let healthy =
                    TargetStates::of(&orders).await?.standing(address) == Some(TargetHealth::Healthy);
                Ok((healthy && ProxyStatus::of(provider, address).await?.all_healthy()).then_some(None))
            })
            .await?;
            if let Some(ended) = ended {
                return Err(io::Error::other(format!("{ended} ended")));
            }
            self.screen.event(&format!("{name} has probed its backends; the NLB finds it healthy"));
        }
        Ok(())
    }

    async fn curl_from_each(&mut self, consumers: &[Network]) -> io::Result<()> {
        self.screen.step("The hands-on's curl, from each consumer: equal client addresses, equal ports");
        let port = PORTS.start();
        let shown = format!("curl --local-port {port} http://{ENDPOINT}/");
        let name = consumers.first().map_or("", Network::name);
        note(&format!("# ip netns exec {name} {shown}"));
        self.screen.head(&format!(
            "{:<10}{:<26}{:<14}through",
            "consumer", "client address in nginx", "answered by"
        ));
        let mut right = true;
        for port in PORTS {
            for (network, tenant) in consumers.iter().zip(TENANTS) {
                let url = format!("http://{ENDPOINT}:{HTTP}/");
                let output = curl(network, &["--local-port", &port.to_string(), &url]).await?;
                let Ok(answer) = serde_json::from_slice::<NginxAnswer>(&output.stdout) else {
                    note(&format!("{:<10}no answer, curl ended with {}", tenant.name, output.status));
                    right = false;
                    continue;
                };
                let through = proxy_name(answer.proxy);
                note(&format!("{:<10}{:<26}{:<14}{through}", tenant.name, answer.client, answer.backend));
                right &= tenant.backends.iter().any(|(name, _)| *name == answer.backend)
                    && answer.client == (CLIENT, port).into();
            }
        }
        self.screen.claim(
            right,
            "Each was answered by its own tenant's backends: the endpoint ID identifies the tenant.",
        );
        Ok(())
    }

    async fn pass_by(&mut self, provider: &Network) -> io::Result<()> {
        self.screen.step("Past the load balancer, straight to a proxy");
        let [(name, address), _] = PROXIES;
        let output = curl(provider, &[&format!("http://{address}:{PORT}/")]).await?;
        note(&format!("# curl http://{address}:{PORT}/      in the provider's network: no answer"));
        let counted = until("untrusted_source", async || {
            let status = ProxyStatus::of(provider, address).await?;
            Ok(Some(status.unidentified("untrusted_source")).filter(|count| *count > 0))
        })
        .await?;
        self.screen.claim(
            !output.status.success() && output.stdout.is_empty() && counted == 1,
            &format!(
                "{name} ended it and counted one untrusted_source: a header from another source can be \
                 forged."
            ),
        );
        Ok(())
    }

    async fn drain(&mut self, provider: &Network, traffic: &ConsumerTraffic) -> io::Result<()> {
        let [(name, address), (other, at_other)] = PROXIES;
        self.screen.step(&format!("{name} drains, under load"));
        let orders = self.world.orders();
        let nlb = self.world.network("nlb")?;
        self.busy(traffic).await?;
        let downloads = traffic.download().await?;
        let sessions = ProxyStatus::of(provider, address).await?.sessions();
        let child = self.world.child(name).ok_or(io::ErrorKind::NotFound)?;
        kill_process(Pid::from_child(child), Signal::TERM)?;
        self.screen
            .event(&format!("SIGTERM to {name}, which has {sessions} sessions open, downloads among them"));
        let said = until("the health check fails", async || {
            Ok(Some(health(&nlb, address).await?).filter(|said| said.starts_with("503")))
        })
        .await?;
        self.screen
            .event(&format!("its health check answers {said}; it still accepts connections from the NLB"));
        let (sent, sent_other) = until("the NLB's target state", async || {
            let targets = TargetStates::of(&orders).await?;
            let out = targets.standing(address) == Some(TargetHealth::Unhealthy);
            Ok(out.then(|| (targets.flows(address), targets.flows(at_other))))
        })
        .await?;
        self.screen
            .event(&format!("two failed health checks: the NLB sends new connections to {other} only"));
        let world = &mut *self.world;
        let status = until("the end of a drained proxy", async || {
            world.child(name).ok_or(io::ErrorKind::NotFound)?.try_wait()
        })
        .await?;
        self.screen.event(&format!("{name} had no session left and ended: {status}"));
        let ends = downloads.end().await;
        let targets = TargetStates::of(&orders).await?;
        let whole = ends.iter().flatten().filter(|end| end.whole).count();
        let through = ends.iter().flatten().filter(|end| end.proxy == Some(address)).count();
        self.screen.claim(
            targets.flows(address) == sent && targets.flows(at_other) > sent_other,
            &format!("The NLB sent {name} nothing more once its health was bad."),
        );
        self.screen.claim(
            whole == ends.len() && through > 0,
            &format!(
                "{whole} of {} downloads came whole, {through} of them through {name} as it drained.",
                ends.len()
            ),
        );
        self.screen.claim(status.success(), &format!("{name} ended by itself, with exit status 0."));
        self.none_failed(traffic);
        Ok(())
    }

    async fn come_back(&mut self, traffic: &ConsumerTraffic) -> io::Result<()> {
        let [(name, address), _] = PROXIES;
        self.screen.step(&format!("{name} comes back, as after an upgrade"));
        let orders = self.world.orders();
        self.world.start_proxy(name)?;
        self.screen.event("it is started; its health check answers 503 until its backends are probed");
        let sent = until("the NLB's target state", async || {
            let targets = TargetStates::of(&orders).await?;
            Ok((targets.standing(address) == Some(TargetHealth::Healthy)).then(|| targets.flows(address)))
        })
        .await?;
        self.screen.event("two health checks passed: it gets its share of new connections again");
        until("traffic over the new proxy", async || {
            Ok((TargetStates::of(&orders).await?.flows(address) >= sent + SOME).then_some(()))
        })
        .await?;
        self.none_failed(traffic);
        Ok(())
    }

    async fn deregister(&mut self, traffic: &ConsumerTraffic) -> io::Result<()> {
        let [_, (name, address)] = PROXIES;
        self.screen.step(&format!("{name} is deregistered, and registered again"));
        let orders = self.world.orders();
        order(&orders, "deregister", address).await?;
        let sent = TargetStates::of(&orders).await?.flows(address);
        self.busy(traffic).await?;
        let targets = TargetStates::of(&orders).await?;
        self.screen.event("the NLB marks it draining: it keeps its flows and gets no new ones");
        self.screen.claim(
            targets.standing(address) == Some(TargetHealth::Draining) && targets.flows(address) == sent,
            &format!("The NLB sent {name} nothing more, though its health is good."),
        );
        order(&orders, "register", address).await?;
        until("the NLB's target state", async || {
            let targets = TargetStates::of(&orders).await?;
            let healthy = targets.standing(address) == Some(TargetHealth::Healthy);
            Ok((healthy && targets.flows(address) >= SOME).then_some(()))
        })
        .await?;
        self.screen.event("it is registered and healthy, and gets its share again");
        self.none_failed(traffic);
        Ok(())
    }

    async fn lose_a_backend(&mut self, provider: &Network, traffic: &ConsumerTraffic) -> io::Result<()> {
        let [tenant, neighbour] = TENANTS;
        let [(name, address), _] = tenant.backends;
        let address = format!("{address}:{HTTP}");
        self.screen.step(&format!("A backend dies: {name} is killed, under load"));
        let before = traffic.failures();
        let first = retries(provider, tenant.name).await?;
        let child = self.world.child(name).ok_or(io::ErrorKind::NotFound)?;
        child.kill()?;
        child.wait()?;
        self.screen
            .event(&format!("kill -9 of {name}'s nginx; refused sessions try the pool's other backend"));
        for (proxy, at) in PROXIES {
            let state = until("a proxy's health state", async || {
                let status = ProxyStatus::of(provider, at).await?;
                Ok(status.backend(&address).filter(|state| *state != "healthy").map(str::to_owned))
            })
            .await?;
            self.screen.event(&format!("{proxy} has it {state}: it gets no more sessions"));
        }
        let out = traffic.failures();
        self.busy(traffic).await?;
        let saved = retries(provider, tenant.name).await? - first;
        self.screen.event(&format!("{saved} sessions were saved by another attempt"));
        self.world.start_backend(name)?;
        for (_, at) in PROXIES {
            until("a backend that is back", async || {
                Ok((ProxyStatus::of(provider, at).await?.backend(&address) == Some("healthy")).then_some(()))
            })
            .await?;
        }
        self.screen.event(&format!("{name} is started again and is back after two successful probes"));
        self.busy(traffic).await?;
        let after = traffic.failures();
        let lost = |place: usize| after.get(place).zip(before.get(place)).map_or(0, |(now, then)| now - then);
        let most = CALLERS as u64;
        self.screen.claim(
            lost(0) <= most && out == after,
            &format!(
                "{} of {}'s requests failed (limit {most}): requests in progress at {name} cannot be \
                 retried.",
                lost(0),
                tenant.name
            ),
        );
        self.screen
            .claim(lost(1) == 0, &format!("None of {}'s failed: it has its own backends.", neighbour.name));
        Ok(())
    }

    async fn sum_up(&mut self, traffic: ConsumerTraffic) -> io::Result<()> {
        self.screen.step("In sum");
        let reports = traffic.reports();
        traffic.end().await?;
        self.screen.head(&format!(
            "{:<10}{:<24}{:<13}{:<12}{:>9}{:>10}{:>10}",
            "tenant", "endpoint", "clients", "backend", "answers", "p50", "p99"
        ));
        let mut right = true;
        for (report, tenant) in reports.iter().zip(TENANTS) {
            let time = |percent| format!("{:.1} ms", report.times.percentile(percent).as_secs_f64() * 1e3);
            for (backend, answers) in &report.backends {
                let clients: Vec<_> = answers.clients.iter().map(ToString::to_string).collect();
                note(&format!(
                    "{:<10}{:<24}{:<13}{backend:<12}{:>9}{:>10}{:>10}",
                    tenant.name,
                    tenant.endpoint,
                    clients.join(" "),
                    answers.count,
                    time(50.0),
                    time(99.0)
                ));
            }
            let of_pool = |(name, _): &(&str, Ipv4Addr)| report.backends.contains_key(*name);
            right &= report.misrouted == 0 && tenant.backends.iter().all(of_pool);
        }
        self.screen.claim(right, "All backends had traffic, and none received another tenant's.");
        Ok(())
    }

    /// Waits until every tenant has had some more answers.
    async fn busy(&self, traffic: &ConsumerTraffic) -> io::Result<()> {
        let answered = || traffic.reports().iter().map(|report| report.answered).collect::<Vec<_>>();
        let before = answered();
        until("traffic", async || {
            let some = |(now, then): (&u64, &u64)| *now >= then + SOME;
            Ok(answered().iter().zip(&before).all(some).then_some(()))
        })
        .await
    }

    fn none_failed(&mut self, traffic: &ConsumerTraffic) {
        let answered: u64 = traffic.reports().iter().map(|report| report.answered).sum();
        let failed: u64 = traffic.failures().iter().sum();
        self.screen.claim(failed == 0, &format!("{answered} requests so far, and {failed} failed."));
    }
}

/// Attempts beyond the first that the proxies made for a pool.
async fn retries(provider: &Network, pool: &str) -> io::Result<u64> {
    let mut sum = 0;
    for (_, address) in PROXIES {
        sum += ProxyStatus::of(provider, address).await?.retries(pool);
    }
    Ok(sum)
}

fn proxy_name(address: Ipv4Addr) -> String {
    let found = PROXIES.into_iter().find(|(_, known)| *known == address);
    found.map_or_else(|| address.to_string(), |(name, _)| name.to_owned())
}
