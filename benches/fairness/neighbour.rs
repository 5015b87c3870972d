//! The load of tenant A while tenant B is measured. It runs in its own processes in the scheduler's idle class, so that B is
//! affected by the proxy and the kernel only, and not by A's load generator on the same cores.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use clap::ValueEnum;
use vestibule::lab::nlb;

use super::stage::{self, LOAD_CORE, PROXY_CORE, Proc};
use super::{A, Bench, Figures, RATE_OF_A, now};

/// One kind of neighbour.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Neighbour {
    /// More bytes than its bandwidth limit allows.
    Greedy,
    /// 50 times as many new sessions as its limit allows.
    Sessions,
    /// Connections that are closed at once.
    Connections,
    /// Connections with half a header.
    Halves,
}

/// Connections in a second of the flood: as many as the sessions.
const FLOOD: u32 = 50 * RATE_OF_A;

/// Connections with half a header at once; they stay until the proxy ends them.
const HALVES: usize = 500;

/// A neighbour ends after this time, even if it is not stopped.
const LONGEST: Duration = Duration::from_secs(60);

impl Neighbour {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Greedy => "16 greedy sessions each way",
            Self::Sessions => "50 times its session rate",
            Self::Connections => "2,000 empty connections a second",
            Self::Halves => "500 connections with half a header",
        }
    }

    /// The metric that shows the neighbour's activity, and whether it is a counter.
    fn activity(self) -> (&'static str, &'static [(&'static str, &'static str)], bool) {
        match self {
            Self::Greedy => ("vestibule_forwarded_bytes_total", &[("tenant", "a")], true),
            Self::Sessions => ("vestibule_tenant_rejected_total", &[("tenant", "a")], true),
            Self::Connections => ("vestibule_sessions_ended_total", &[("why", "zero_bytes")], true),
            Self::Halves => ("vestibule_sessions_pending", &[], false),
        }
    }

    /// The value of that metric as text.
    pub(super) fn activity_text(self, figure: f64) -> String {
        match self {
            Self::Greedy => format!("{:.2} MiB/s", figure / f64::from(1 << 20)),
            Self::Sessions => format!("{figure:.0} rejected/s"),
            Self::Connections => format!("{figure:.0}/s"),
            Self::Halves => format!("{figure:.0} pending"),
        }
    }

    fn commands(self, bench: &Bench) -> Vec<Command> {
        let load =
            |options: &[&str]| bench.load(A, &[options, &["--duration", "60s", "--warmup", "0s"]].concat());
        match self {
            Self::Greedy => ["to-client", "to-backend"]
                .map(|mode| load(&["--mode", mode, "--sessions", "16", "--size", "64KiB"]))
                .into(),
            Self::Sessions => {
                let rate = format!("{FLOOD}/s");
                vec![load(&["--mode", "connect", "--sessions", "256", "--rate", &rate])]
            }
            Self::Connections => vec![ourselves("connections", bench.target)],
            Self::Halves => vec![ourselves("halves", bench.target)],
        }
    }
}

/// The result of `measure` while the neighbour, if any, uses `bench`'s proxy, and the neighbour's activity meanwhile.
pub(super) fn beside(
    neighbour: Option<Neighbour>,
    bench: &Bench,
    beforehand: Duration,
    measure: impl FnOnce() -> Figures,
) -> (Figures, f64) {
    let commands = neighbour.map_or_else(Vec::new, |neighbour| neighbour.commands(bench));
    let _processes: Vec<_> = commands.iter().map(|command| Proc::start(&low_priority(command))).collect();
    // Lets the neighbour start and the effects of its start settle. Without a neighbour the wait is the same.
    std::thread::park_timeout(beforehand);
    let Some((name, labels, counts)) = neighbour.map(Neighbour::activity) else { return (measure(), 0.0) };
    let (start, before) = (now(), bench.metric(name, labels));
    let figures = measure();
    let (took, after) = ((now() - start).as_secs_f64(), bench.metric(name, labels));
    (figures, if counts { (after - before) / took } else { after })
}

/// The scheduler's idle class, which every other task preempts at once (sched(7), `SCHED_IDLE`); one that is merely nice
/// keeps its core to the end of its slice, some milliseconds.
const IDLE: &[&str] = &["chrt", "--idle", "0"];

/// Before all tasks of the ordinary classes (sched(7), `SCHED_RR`), if permitted.
const FIRST: &[&str] = &["chrt", "--rr", "1"];

/// The same command on a core and in a scheduler class.
pub(super) fn on(core: &str, class: &[&str], command: &Command) -> Command {
    let mut there = stage::pinned(core);
    there.args(class).arg(command.get_program()).args(command.get_args());
    there
}

/// The same command on the load's core, with the lowest priority.
pub(super) fn low_priority(command: &Command) -> Command {
    on(LOAD_CORE, IDLE, command)
}

/// The same command on the load's core, with the highest priority.
pub(super) fn high_priority(command: &Command) -> Command {
    static CLASS: LazyLock<&[&str]> = LazyLock::new(|| {
        let tried = Command::new(FIRST[0]).args(&FIRST[1..]).arg("true").status();
        if tried.is_ok_and(|status| status.success()) { FIRST } else { &[] }
    });
    on(LOAD_CORE, *CLASS, command)
}

/// This program in the role of a neighbour.
fn ourselves(kind: &str, target: SocketAddr) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--neighbour", kind, &target.to_string()]);
    command
}

/// Runs as a neighbour if the arguments ask for it; returns whether they do.
pub(super) fn act(arguments: &[String]) -> bool {
    let Some(at) = arguments.iter().position(|argument| argument == "--neighbour") else { return false };
    let target = arguments[at + 2].parse().expect("an address");
    match arguments[at + 1].as_str() {
        "nothing" => keep_awake(),
        "connections" => flood(target),
        _ => halves(target),
    }
    true
}

/// Keeps both cores awake with tasks of the idle class. Waking up a core of a virtual machine takes longer than what is
/// measured here: B alone would wait for it, and B with a neighbour would not.
pub(super) fn awake(bench: &Bench) -> [Proc; 2] {
    let nothing = ourselves("nothing", bench.target);
    [PROXY_CORE, LOAD_CORE].map(|core| Proc::start(&on(core, IDLE, &nothing)))
}

fn keep_awake() {
    let start = now();
    while now() < start + LONGEST * 30 {
        (0..10_000).for_each(|_| std::hint::spin_loop());
    }
}

/// Connects and closes, at a bounded pace.
fn flood(target: SocketAddr) {
    let start = now();
    let mut due = start;
    while due < start + LONGEST {
        // A failed connect, such as without a free port, does not stop the flood.
        drop(TcpStream::connect(target));
        due += Duration::from_secs(1) / FLOOD;
        std::thread::park_timeout(due.saturating_duration_since(now()));
    }
}

/// Holds connections that have sent half a header; those that the proxy has ended are replaced.
fn halves(target: SocketAddr) {
    let header = nlb::header(SocketAddr::from(([10, 100, 0, 10], 4000)), target, Some(A));
    let open = || -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(target)?;
        stream.write_all(&header[..header.len() / 2])?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let start = now();
    let mut held: Vec<TcpStream> = Vec::new();
    while now() < start + LONGEST {
        // Nothing is ever sent to them: whatever can be read is their end.
        held.retain(|stream| stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
        while held.len() < HALVES
            && let Ok(stream) = open()
        {
            held.push(stream);
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}
