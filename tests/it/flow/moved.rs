//! Flows that go from one process to another while their clients and backends talk on.

use std::cell::Cell;
use std::net::UdpSocket as Bound;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{interval, timeout};
use vestibule::clock;
use vestibule::config::Config;
use vestibule::flow::FlowWorker;
use vestibule::flow::freeze::{FlowRecord, FrozenFlow};
use vestibule::frozen::{Departure, ThawError, TransferReply};
use vestibule::outcome::Reason;
use vestibule::state::{LiveState, ProcessLimits, WorkerContext};

use super::super::harness::{ACME, GLOBEX, LIMIT, eventually};
use super::{Balancer, datagram};

/// One worker of one process, with flows alone.
struct Side {
    context: Rc<WorkerContext>,
    flows: Rc<FlowWorker<()>>,
}

impl Side {
    fn start(text: &str, door: &Bound) -> Self {
        let live = LiveState::new(
            &Config::parse("test.toml", text).unwrap(),
            1,
            ProcessLimits { sessions: 10_000, pending: 1_000, pipes: 0 },
        );
        let context = WorkerContext::new(0, &live, None).unwrap();
        let flows = FlowWorker::new(&context, Box::new(|| ())).unwrap();
        let [keeps, answers, ticks, ends] = [(); 4].map(|()| Rc::clone(&flows));
        let door = door.try_clone().unwrap();
        spawn_local(async move {
            keeps
                .serve_socket(door, 0, &async |_: &std::io::Error, _: &dyn Fn() -> bool| None)
                .await
                .unwrap();
        });
        spawn_local(async move { answers.answer().await.unwrap() });
        spawn_local(async move { ends.end_idle().await });
        spawn_local(async move {
            let mut interval = interval(Duration::from_millis(50));
            loop {
                interval.tick().await;
                ticks.advance(clock::now());
            }
        });
        Self { context, flows }
    }

    fn ended(&self, why: Reason) -> u64 {
        let routes = self.context.live.shards[0].routes();
        let ended = routes.iter().flat_map(|route| route.ended().collect::<Vec<_>>());
        ended.filter(|(outcome, _)| outcome.why == why).map(|(_, count)| count).sum()
    }

    /// All of its flows' places and gauges.
    fn held(&self) -> [u64; 6] {
        let tenants = self.context.live.snapshot.load();
        let of_tenants = tenants.directory.tenants().iter().map(|tenant| tenant.quota.flows()).sum::<usize>();
        let backends = tenants.pools.iter().flat_map(|pool| pool.candidates().backends().to_vec());
        let shard = &self.context.live.shards[0];
        let active = shard.routes().iter().map(|route| route.active.value()).sum();
        let at_backends = shard.backends().iter().map(|backend| backend.active.value()).sum::<u64>();
        let load = backends.map(|backend| u64::from(backend.load())).sum::<u64>();
        assert_eq!(self.ended(Reason::IdleTimeout), 0, "nobody is idle for so long");
        let ports = self.context.live.udp_ports.usage().iter().map(|usage| usage.live as u64).sum();
        [self.context.live.sessions.used() as u64, of_tenants as u64, active, at_backends, load, ports]
    }

    /// Moves all flows; each answer is `answer`'s.
    async fn move_to(&self, other: &Self, answer: impl Fn(Departure<FlowRecord>)) {
        other.flows.pause();
        self.context.local.start_transfer();
        let (departures, mut leaving) = mpsc::channel(8);
        let ferry = async {
            while let Some(leaving) = leaving.recv().await {
                answer(leaving);
                // The other process takes its time.
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(self.flows.freeze_all(departures), ferry);
        self.context.local.stop_transfer();
        other.flows.resume();
    }

    fn take(&self, Departure { frozen, reply }: Departure<FlowRecord>) {
        self.flows.thaw(FrozenFlow::new(frozen).unwrap()).unwrap();
        reply.send(TransferReply::Taken).unwrap();
    }
}

/// A backend that answers with the port that asked, and what it asked, as soon as it may.
async fn backend(may_answer: Rc<Cell<bool>>) -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    spawn_local(async move {
        let mut room = [0; 2_048];
        loop {
            let (count, from) = socket.recv_from(&mut room).await.unwrap();
            while !may_answer.get() {
                tokio::task::yield_now().await;
            }
            let answer = [from.port().to_string().as_bytes(), b" ", &room[..count]].concat();
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    address
}

fn text(backend: std::net::SocketAddr) -> String {
    format!(
        "[admin]\nbind = \"127.0.0.1:0\"\n[health]\nbind = \"127.0.0.1:0\"\n\
         [[listener]]\nname = \"dns\"\nprotocol = \"udp\"\nbind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.0/8\"]\n\
         bare-datagrams = \"follow\"\n\
         [[pool]]\nname = \"acme\"\nbackends = [\"{backend}\"]\nhealth = {{ kind = \"none\" }}\n\
         [[tenant]]\nname = \"acme\"\nendpoints = [\"{ACME}\"]\npool = \"acme\"\n\
         [[tenant]]\nname = \"globex\"\nendpoints = [\"{GLOBEX}\"]\npool = \"acme\"\n"
    )
}

struct World {
    sides: [Side; 2],
    door: Bound,
    may_answer: Rc<Cell<bool>>,
}

async fn world() -> World {
    let may_answer = Rc::new(Cell::new(true));
    let text = text(backend(Rc::clone(&may_answer)).await);
    let door = Bound::bind("127.0.0.1:0").unwrap();
    door.set_nonblocking(true).unwrap();
    let sides = [Side::start(&text, &door), Side::start(&text, &door)];
    sides[1].flows.pause();
    World { sides, door, may_answer }
}

impl World {
    async fn balancer(&self) -> Balancer {
        Balancer::to(self.door.local_addr().unwrap()).await
    }

    /// Everything was given back on both sides.
    fn finish(self) {
        for side in &self.sides {
            side.flows.end_all();
            assert_eq!(side.held(), [0; 6]);
        }
    }
}

/// Asks so many questions, each after the answer to the one before: by one port of the proxy's from the first to the last.
async fn talk(balancer: Balancer, endpoint: &'static str, questions: usize) {
    let mut port = None;
    for number in 0..questions {
        let question = format!("{endpoint} {number}");
        let answer = balancer.ask(&datagram("10.100.0.10:40000", endpoint, question.as_bytes())).await;
        let answer = String::from_utf8(answer).unwrap();
        let (asked_from, said) = answer.split_once(' ').unwrap();
        assert_eq!(said, question);
        assert_eq!(port.get_or_insert(asked_from.to_owned()), asked_from, "its socket is another one");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn flows_go_there_and_back_while_they_talk_and_nothing_is_lost() {
    let work = async {
        let world = world().await;
        let mut talks = Vec::new();
        for _ in 0..25 {
            for endpoint in [ACME, GLOBEX] {
                talks.push(spawn_local(talk(world.balancer().await, endpoint, 200)));
            }
        }
        let [one, other] = &world.sides;
        eventually("all flows", async || (one.flows.count() == 50).then_some(())).await;
        for _ in 0..10 {
            one.move_to(other, |leaving| other.take(leaving)).await;
            assert_eq!((one.held(), other.held()), ([0; 6], [50; 6]));
            other.move_to(one, |leaving| one.take(leaving)).await;
            assert_eq!((one.held(), other.held()), ([50; 6], [0; 6]));
        }
        for talk in talks {
            timeout(3 * LIMIT, talk).await.expect("every answer").unwrap();
        }
        assert_eq!((one.ended(Reason::Moved), other.ended(Reason::Moved)), (500, 500));
        assert_eq!(one.context.live.shards[0].listeners()[0].taken_over.value(), 500);
        world.finish();
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn answer_in_flight_is_delivered_by_the_other_process() {
    let work = async {
        let world = world().await;
        let [one, other] = &world.sides;
        let balancer = world.balancer().await;
        world.may_answer.set(false);
        balancer.send(&datagram("10.100.0.10:40000", ACME, b"slow")).await;
        eventually("the flow", async || (one.flows.count() == 1).then_some(())).await;
        one.move_to(other, |leaving| other.take(leaving)).await;
        assert!(balancer.is_silent());
        world.may_answer.set(true);
        assert!(balancer.answer().await.ends_with(b" slow"));
        // A datagram without a header finds it, too.
        assert!(balancer.ask(b"bare").await.ends_with(b" bare"));
        assert_eq!(other.ended(Reason::NoHeader), 0);
        world.finish();
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn refused_flow_continues_in_its_process() {
    let work = async {
        let world = world().await;
        let [one, other] = &world.sides;
        let talks: Vec<_> = [ACME, GLOBEX].map(|endpoint| (endpoint, world.balancer())).into_iter().collect();
        let mut running = Vec::new();
        for (endpoint, balancer) in talks {
            running.push(spawn_local(talk(balancer.await, endpoint, 300)));
        }
        eventually("both flows", async || (one.flows.count() == 2).then_some(())).await;
        for _ in 0..20 {
            one.move_to(other, drop).await;
            other.flows.pause();
            one.flows.resume();
            assert_eq!(one.flows.count(), 2);
        }
        for talk in running {
            timeout(3 * LIMIT, talk).await.expect("every answer").unwrap();
        }
        assert_eq!((one.ended(Reason::Moved), one.held(), other.held()), (0, [2; 6], [0; 6]));
        world.finish();
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn transferred_flow_without_its_listening_socket_is_refused() {
    let work = async {
        let world = world().await;
        let [one, _] = &world.sides;
        let elsewhere = Bound::bind("127.0.0.1:0").unwrap();
        elsewhere.set_nonblocking(true).unwrap();
        let stranger = Side::start(&text("127.0.0.1:9".parse().unwrap()), &elsewhere);
        let balancer = world.balancer().await;
        balancer.ask(&datagram("10.100.0.10:40000", ACME, b"hello")).await;
        one.move_to(&stranger, |Departure { frozen, reply }| {
            assert_eq!(
                (frozen.record.worker(), stranger.flows.has_socket(&frozen.record, false)),
                (0, false)
            );
            assert_eq!(stranger.flows.thaw(FrozenFlow::new(frozen).unwrap()), Err(ThawError::NoListenSocket));
            drop(reply);
        })
        .await;
        one.flows.resume();
        assert!(balancer.ask(b"still here").await.ends_with(b"still here"));
        stranger.flows.end_all();
        assert_eq!(stranger.held(), [0; 6]);
        world.finish();
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn restored_flow_replaces_one_opened_meanwhile() {
    let work = async {
        let world = world().await;
        let [one, other] = &world.sides;
        let balancer = world.balancer().await;
        let question = datagram("10.100.0.10:40000", ACME, b"hello");
        let first = balancer.ask(&question).await;
        // The other process hears too early.
        one.flows.pause();
        other.flows.resume();
        assert_ne!(balancer.ask(&question).await, first, "by another port");
        one.move_to(other, |leaving| other.take(leaving)).await;
        assert_eq!(balancer.ask(&question).await, first);
        assert_eq!((other.ended(Reason::Evicted), other.flows.count()), (1, 1));
        world.finish();
    };
    LocalSet::new().run_until(work).await;
}
