//! What the lab looks like on a terminal: steps, what happens when, and claims that hold or do not.

use std::fs;
use std::io::{self, IsTerminal};
use std::net::Ipv4Addr;
use std::process::ExitCode;

use crate::clock::{self, Moment};
use crate::lab::vpc::run::network_name;
use crate::lab::world::{ADMIN, CIDR, CLIENT, ENDPOINT, LabWorld, NLB, PORT, PROXIES, RULES, TENANTS};

/// Lines of a log that are shown where something went wrong.
const LOG_LINES: usize = 5;

const BOLD: &str = "1";
const DIM: &str = "2";
const GOOD: &str = "32";
const BAD: &str = "31;1";

pub(super) struct Screen {
    colours: bool,
    step: u32,
    begun: Moment,
    held: u32,
    broken: u32,
}

impl Screen {
    pub(super) fn new() -> Self {
        let colours = io::stdout().is_terminal();
        Self { colours, step: 0, begun: clock::now(), held: 0, broken: 0 }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The networks and addresses.
    pub(super) fn picture(&self, world: &LabWorld) {
        let title =
            format!("vestibule lab {}: three networks on one machine, all of them {CIDR}", world.name());
        println!("{}\n", self.paint(BOLD, &title));
        self.head(&format!(
            "{:<16}{:<27}{:<15}{:<19}pools, of nginx",
            "consumers", "interface endpoints", "load balancer", "proxies"
        ));
        let [acme, globex] = TENANTS;
        let [(first, at_first), (second, at_second)] = PROXIES;
        let [acme_1, acme_2] = acme.backends.map(backend);
        let [globex_1, globex_2] = globex.backends.map(backend);
        let (client, endpoint, empty) = (CLIENT.to_string(), ENDPOINT.to_string(), "");
        let nlb = format!("  {NLB}");
        note(&format!("{:<16}{endpoint:<42}{first:<17}┌ {acme_1}", acme.name));
        note(&format!("{client} ─── {} ─┐{empty:<14}┌─ {at_first} ─┐   ├ {acme_2}", acme.endpoint));
        note(&format!("{empty:<40}├─ NLB {empty:<8}┤{empty:<15}├───┤"));
        note(&format!("{:<16}{endpoint:<24}│{nlb:<14}│  {second:<13}│   ├ {globex_1}", globex.name));
        note(&format!("{client} ─── {} ─┘{empty:<14}└─ {at_second} ─┘   └ {globex_2}", globex.endpoint));
        let interval = RULES.interval.as_secs();
        println!();
        note(&format!(
            "The NLB checks each proxy's health every {interval} s; two results change its state. (A real \
             NLB: 30 s; 2 take out, 5 bring"
        ));
        note("back.) Proxies drain within seconds instead of minutes. The rest is as in production.");
    }

    /// A heading. Times count from here.
    pub(super) fn step(&mut self, heading: &str) {
        self.step += 1;
        self.begun = clock::now();
        println!("\n{}", self.paint(BOLD, &format!("{}  {heading}", self.step)));
    }

    /// Something that happens now.
    pub(super) fn event(&self, text: &str) {
        let at = clock::now().since(self.begun).as_secs_f64();
        println!("   {} {text}", self.paint(DIM, &format!("{at:5.1} s")));
    }

    /// The head of a table.
    pub(super) fn head(&self, text: &str) {
        println!("   {}", self.paint(DIM, text));
    }

    /// Something that has to be so: shown, and counted where it is not.
    pub(super) fn claim(&mut self, holds: bool, text: &str) {
        if holds {
            self.held += 1;
            println!("   {} {text}", self.paint(GOOD, "✓"));
        } else {
            self.broken += 1;
            println!("   {}", self.paint(BAD, &format!("✗ DOES NOT HOLD: {text}")));
        }
    }

    /// The last line.
    pub(super) fn end(&self) {
        let said = if self.broken == 0 {
            self.paint(GOOD, &format!("{} claims, and all of them hold.", self.held))
        } else {
            self.paint(BAD, &format!("{} of {} claims do not hold.", self.broken, self.broken + self.held))
        };
        println!("\n{said}");
    }

    pub(super) fn verdict(&self) -> ExitCode {
        if self.broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// The ends of all logs.
    pub(super) fn logs(&self, world: &LabWorld) {
        let backends = TENANTS.into_iter().flat_map(|tenant| tenant.backends).map(|(name, _)| name);
        for name in PROXIES.into_iter().map(|(name, _)| name).chain(backends).chain(["nlb"]) {
            let log = fs::read_to_string(world.log(name)).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(LOG_LINES).collect();
            for line in lines.into_iter().rev() {
                println!("   {} {line}", self.paint(DIM, name));
            }
        }
    }

    /// How to look around in a world that is kept.
    pub(super) fn ways_in(&self, world: &mut LabWorld) {
        let run = world.name().to_owned();
        let enter = |network: &str| format!("ip netns exec {} bash", network_name(&run, network));
        let program = std::env::args().next().unwrap_or_else(|| "vestibule".to_owned());
        println!("\n{}\n", self.paint(BOLD, "It is left running. Look around, as root:"));
        let line = |what: &str, command: &str| println!("  {what:<37}{command}");
        for tenant in TENANTS {
            line(&format!("run commands as {}'s consumer", tenant.name), &enter(tenant.name));
        }
        line("  and there", &format!("curl http://{ENDPOINT}/"));
        line("run commands in the provider's network", &enter("provider"));
        for (name, address) in PROXIES {
            line(
                &format!("  and there, {name}'s metrics"),
                &format!("curl http://{address}:{ADMIN}/metrics"),
            );
        }
        line("  the headers, as they arrive", &format!("tcpdump -X -i eth0 tcp dst port {PORT}"));
        let orders = world.orders();
        let nlb = |words: &str, path: &str| {
            format!("curl {words}--unix-socket {} http://nlb/{path}", orders.display())
        };
        line("the NLB's view of its targets", &nlb("", "targets"));
        for (name, address) in PROXIES.into_iter().take(1) {
            line(&format!("deregister {name}"), &nlb("-X POST ", &format!("deregister/{address}:{PORT}")));
            line("  and register it again", &nlb("-X POST ", &format!("register/{address}:{PORT}")));
        }
        for (name, _) in PROXIES {
            if let Some(child) = world.child(name) {
                line(&format!("drain {name}"), &format!("kill -TERM {}", child.id()));
            }
        }
        line("configurations and logs", &format!("ls {}", world.folder().display()));
        line("remove everything", &format!("{program} lab --down {run}"));
    }
}

fn backend((name, address): (&str, Ipv4Addr)) -> String {
    format!("{name:<10}{address}")
}

/// Something to know, or a row of a table.
pub(super) fn note(text: &str) {
    println!("   {text}");
}
