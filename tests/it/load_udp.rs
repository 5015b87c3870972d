//! The load generator's datagrams, through the proxy and without it: what becomes of each is told.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use vestibule::lab::backend::{DatagramBackend, DatagramBehavior};
use vestibule::lab::load::{self, FRONT, LoadPlan, LoadWork};

use super::flow::{HOOLI, finish, others_are_unharmed, soon, world};
use super::harness::{ACME, Conf};
use super::load::{acme_alone, run};

/// Flows with a window of `at_once`, to `target`.
fn flows(target: SocketAddr, at_once: usize, timeout: Duration) -> LoadPlan {
    LoadPlan { clients: 4, ..acme_alone(target, LoadWork::Flows { window: at_once, timeout }) }
}

/// Longer than any test.
const PATIENT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn datagrams_reach_their_own_pool_at_any_window_size_and_pace() {
    let acme = DatagramBackend::start("acme", DatagramBehavior::Echo).await.unwrap();
    // Longer than a busy machine keeps a flow waiting.
    let idle = |conf: &mut Conf| conf.timeouts += "flow-idle = \"2s\"\n";
    let (proxy, _hooli) = world(&[acme.address()], |conf, _| idle(conf)).await;
    let mut operations = 0;
    // Long ones are few, so that the kernel's buffers hold them.
    for (sessions, at_once, size, rate) in
        [(8, 1, FRONT, None), (8, 1, 64, Some(2_000.0)), (8, 16, 1_200, None), (1, 1, 60_000, None)]
    {
        let plan = LoadPlan { sessions, size, rate, ..flows(proxy.address("dns"), at_once, PATIENT) };
        let report = run(plan).await;
        assert!(report.is_fine(), "{report:?}");
        assert_eq!((report.failed(), report.not_sent), (0, 0), "{report:?}");
        assert_eq!(report.datagrams, load::DatagramReport::default(), "{report:?}");
        assert_eq!(report.bytes, report.operations * size as u64);
        operations += report.operations;
    }
    // The window closes while some are still on their way.
    assert!(acme.heard() >= operations);
    let passed = [("tenant", "acme"), ("direction", "to_client")];
    proxy
        .metric("vestibule_forwarded_datagrams_total", &passed)
        .is(u32::try_from(acme.heard()).unwrap())
        .await;
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "dns")]).is(25).await;
    others_are_unharmed(&proxy).await;
    finish(proxy).await;
}

#[tokio::test]
async fn flow_answered_by_another_pool_is_counted() {
    let acme = DatagramBackend::start("acme", DatagramBehavior::Echo).await.unwrap();
    let (proxy, _hooli) = world(&[acme.address()], |conf, _| soon(conf)).await;
    let endpoints = vec![(ACME.to_owned(), "hooli".to_owned())];
    let report = run(LoadPlan { endpoints, ..flows(proxy.address("dns"), 1, PATIENT) }).await;
    assert!(!report.is_fine() && report.misrouted == report.operations, "{report:?}");
    // hooli's backend does not speak the generator's language.
    let endpoints = vec![(HOOLI.to_owned(), "hooli".to_owned())];
    let plan = LoadPlan { endpoints, ..flows(proxy.address("dns"), 1, Duration::from_millis(100)) };
    let report = run(plan).await;
    assert!(report.operations == 0 && report.failed() > 0, "{report:?}");
    finish(proxy).await;
}

#[tokio::test]
async fn missing_target_does_not_block_the_load() {
    let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for at_once in [1, 8] {
        let report = run(flows(nobody, at_once, Duration::from_millis(50))).await;
        assert!(!report.is_fine() && report.operations == 0, "{report:?}");
        assert!(report.datagrams.lost > 8, "{report:?}");
    }
}

/// Answers in an order of its own: `answer` is given what has come so far, and empties it.
async fn whimsical(
    answer: impl Fn(&mut Vec<Vec<u8>>) -> Vec<Vec<u8>> + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut room, mut heard) = (vec![0; 65_536], Vec::new());
        while let Ok((count, from)) = socket.recv_from(&mut room).await {
            heard.push(room[..count].to_vec());
            for datagram in answer(&mut heard) {
                socket.send_to(&datagram, from).await.unwrap();
            }
        }
    });
    (address, task)
}

/// One flow without a header, to somebody who only echoes.
fn alone(target: SocketAddr, at_once: usize, timeout: Duration) -> LoadPlan {
    LoadPlan { endpoints: Vec::new(), sessions: 1, ..flows(target, at_once, timeout) }
}

#[tokio::test]
async fn answers_out_of_order_and_twice_are_counted() {
    let (address, task) = whimsical(|heard| match &heard[..] {
        [one, two] => {
            let answers = vec![two.clone(), one.clone(), one.clone()];
            heard.clear();
            answers
        }
        _ => Vec::new(),
    })
    .await;
    // The last question may be left without another to answer it with.
    let report = run(alone(address, 2, Duration::from_secs(2))).await;
    let pairs = report.operations / 2;
    assert!(report.operations > 10 && report.failed() == 0, "{report:?}");
    assert_eq!(report.datagrams.reordered, pairs, "{report:?}");
    // The last one's second answer may come after the end.
    assert!((pairs - 1..=pairs).contains(&report.datagrams.duplicates), "{report:?}");
    assert!(report.datagrams.lost <= 1 && report.datagrams.late == 0, "{report:?}");
    task.abort();
}

#[tokio::test]
async fn answer_after_its_timeout_counts_as_late_and_its_request_as_lost() {
    // Each is answered when the next has come.
    let (address, task) =
        whimsical(|heard| if heard.len() > 1 { vec![heard.remove(0)] } else { Vec::new() }).await;
    let report = run(alone(address, 1, Duration::from_millis(20))).await;
    assert_eq!((report.operations, report.failed()), (0, 0), "{report:?}");
    assert!(report.datagrams.lost > 2, "{report:?}");
    // The last one's answer never comes, the one's before perhaps too late for the flow itself.
    let late = report.datagrams.late;
    assert!((report.datagrams.lost - 2..report.datagrams.lost).contains(&late), "{report:?}");
    assert_eq!((report.datagrams.reordered, report.datagrams.duplicates), (0, 0));
    task.abort();
}
