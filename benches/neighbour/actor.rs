//! The attacker's processes: this program again, with `--act`. Each has a bound in number, in rate and in time, and ends by itself.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::{interval, timeout};
use vestibule::lab::nlb;

/// An attacker ends after so long at the latest, should the bench not end it.
const LONGEST: Duration = Duration::from_secs(600);

/// What it tries is done in turns of this length: a longer one sends bursts, and the neighbour waits behind each.
const TURN: Duration = Duration::from_millis(1);

/// A connection of a churn is given up after so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A client of the header, by number.
fn client(number: u32) -> SocketAddr {
    let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 0)) + number / 50_000);
    SocketAddr::from((ip, u16::try_from(10_000 + number % 50_000).unwrap_or(10_000)))
}

/// What one actor does. On the command line: `--act KIND TARGET RATE MOST ENDPOINT BYTES`.
#[derive(Clone, Copy)]
pub(super) struct Act<'a> {
    pub(super) kind: &'a str,
    pub(super) target: SocketAddr,
    /// Connections or datagrams in a second.
    pub(super) rate: u32,
    /// Connections at once, or flows.
    pub(super) most: u32,
    /// The endpoint of the header; `-` for none.
    pub(super) endpoint: &'a str,
    /// Bytes behind the header.
    pub(super) bytes: usize,
}

impl Act<'_> {
    /// The command that acts so.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--act", self.kind, &self.target.to_string(), &self.rate.to_string()]);
        command.args([&self.most.to_string(), self.endpoint, &self.bytes.to_string()]);
        command
    }

    fn header(&self, number: u32) -> Vec<u8> {
        let endpoint = Some(self.endpoint).filter(|endpoint| *endpoint != "-");
        let Some(endpoint) = endpoint else { return Vec::new() };
        match self.kind {
            "flows" => nlb::datagram_header(client(number), self.target, Some(endpoint)),
            _ => nlb::header(client(number), self.target, Some(endpoint)),
        }
    }

    fn message(&self, number: u32) -> Vec<u8> {
        let mut message = self.header(number);
        message.resize(message.len() + self.bytes, b'G');
        message
    }
}

/// Acts where the arguments ask for it; whether they did.
pub(super) fn act(arguments: &[String]) -> bool {
    let Some(at) = arguments.iter().position(|argument| argument == "--act") else { return false };
    let word = |place: usize| arguments[at + place].as_str();
    let number = |place: usize| word(place).parse::<u32>().expect("a number");
    let act = Act {
        kind: word(1),
        target: word(2).parse().expect("an address"),
        rate: number(3),
        most: number(4),
        endpoint: word(5),
        bytes: word(6).parse().expect("a number"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let tasks = tokio::task::LocalSet::new();
    let acting = async {
        match act.kind {
            "churn" => churn(act).await,
            "hold" => hold(act).await,
            "flows" | "bare" => datagrams(act).await,
            "scrape" => scrape(act).await,
            "source" => source(act).await,
            kind => panic!("no actor does {kind}"),
        }
    };
    // What is over time is the bench's to end, and if it has gone, nobody's.
    drop(runtime.block_on(tasks.run_until(async { timeout(LONGEST, acting).await })));
    true
}

/// A socket of one of 200 addresses: the attackers do not run out of ports, and take none of the neighbour's.
fn from(number: u32) -> std::io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    // A port that `bind` chooses is closed to every connection of this machine that names none, whatever its addresses
    // (`__inet_hash_connect` in net/ipv4/inet_hashtables.c): to the neighbour's load and to the proxy.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    let ip = Ipv4Addr::new(127, 0, 1, u8::try_from(1 + number % 200).unwrap_or(1));
    socket.bind(SocketAddr::from((ip, 0)))?;
    Ok(socket)
}

/// How many are due in each turn.
async fn turns(rate: u32, mut each: impl AsyncFnMut(u32)) {
    let mut ticks = interval(TURN);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let (per_turn, mut number, mut owed) = (f64::from(rate) * TURN.as_secs_f64(), 0_u32, 0.0);
    loop {
        ticks.tick().await;
        owed += per_turn;
        while owed >= 1.0 {
            owed -= 1.0;
            number = number.wrapping_add(1);
            each(number).await;
        }
    }
}

/// Short connections: the message, then the end, and whatever the other side says until its own.
async fn churn(act: Act<'_>) {
    let open = std::rc::Rc::new(std::cell::Cell::new(0));
    turns(act.rate, async |number| {
        if open.get() >= act.most {
            return;
        }
        open.set(open.get() + 1);
        let (message, open, target) = (act.message(number), std::rc::Rc::clone(&open), act.target);
        tokio::task::spawn_local(async move {
            let once = async {
                let mut stream = from(number)?.connect(target).await?;
                stream.write_all(&message).await?;
                stream.shutdown().await?;
                tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
            };
            // That it fails is what the proxy's counters show.
            drop(timeout(PATIENCE, once).await);
            open.set(open.get() - 1);
        });
    })
    .await;
}

/// Connections that have sent the message and then neither send nor read; one that the proxy ends is replaced.
async fn hold(act: Act<'_>) {
    let mut held = std::collections::VecDeque::new();
    turns(act.rate, async |number| {
        // The oldest are looked at in turn: nobody sends to them unread but where that is the attack.
        for _ in 0..4.min(held.len()) {
            let Some(stream): Option<TcpStream> = held.pop_front() else { break };
            if !has_ended(&stream) {
                held.push_back(stream);
            }
        }
        if held.len() < usize::try_from(act.most).expect("32 bits")
            && let Ok(stream) = hold_one(act, number).await
        {
            held.push_back(stream);
        }
    })
    .await;
}

async fn hold_one(act: Act<'_>, number: u32) -> std::io::Result<TcpStream> {
    let socket = from(number)?;
    // Little room, so that what is not read stays with the proxy.
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(act.target).await?;
    stream.write_all(&act.message(number)).await?;
    Ok(stream)
}

fn has_ended(stream: &TcpStream) -> bool {
    // With a reset there is an error to take; with an end and unread bytes it counts as alive.
    let broken = stream.take_error().is_ok_and(|error| error.is_some());
    broken
        || socket2::SockRef::from(stream)
            .peek(&mut [std::mem::MaybeUninit::uninit()])
            .is_ok_and(|count| count == 0)
}

/// Datagrams, each of the next of so many clients.
async fn datagrams(act: Act<'_>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    turns(act.rate, async |number| {
        // A full queue is the proxy's to count.
        drop(socket.send_to(&act.message(number % act.most), act.target).await);
    })
    .await;
}

/// Pages of /metrics, one after the other.
async fn scrape(act: Act<'_>) {
    turns(act.rate, async |_| {
        let once = async {
            let mut stream = TcpStream::connect(act.target).await?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n").await?;
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
        };
        drop(timeout(PATIENCE, once).await);
    })
    .await;
}

/// A backend that sends without end to everybody who connects.
async fn source(act: Act<'_>) {
    let listener = TcpListener::bind(act.target).await.expect("the backend's address");
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        tokio::task::spawn_local(async move {
            let bytes = vec![b'z'; 65_536];
            while stream.write_all(&bytes).await.is_ok() {}
        });
    }
}
