//! A worker's listening sockets: opened and closed by command while sessions continue.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::drain::WorkerStage;
use super::listen_sockets::{self, BoundSocket, ListenSocketId};
use super::server_worker::ServerWorker;
use crate::accept::{AcceptError, ListenSocket, PAUSE};
use crate::account::session_metrics::ListenerCounters;
use crate::config::Protocol;
use crate::flow::SocketRetirement;
use crate::state::StoppedListener;
use crate::state::worker_loads::OpenSocket;

/// Orders that may wait for a worker; each is what one reload wants of it.
pub(super) const ORDERS: usize = 64;

/// A command to a worker.
#[derive(Debug)]
pub(super) enum SocketCommand {
    /// Serve these, too.
    Open(Vec<(u32, BoundSocket)>),
    /// Accept nothing more here. What the kernel has accepted is served, and so are flows, whose socket all workers
    /// close together once none has any.
    Close(Vec<(ListenSocketId, Arc<SocketRetirement>)>),
    /// Accept nothing and hear nothing, and say so once that holds: what comes waits in the sockets.
    Pause(oneshot::Sender<()>),
    /// Accept again. Datagrams are received again by a transfer command.
    Resume,
    /// Show every socket, for another process to accept there too.
    Lend(oneshot::Sender<Vec<ClonedSocket>>),
}

/// A duplicate of a socket, and the id of the listening socket.
pub(super) type ClonedSocket = (ListenSocketId, OwnedFd);

/// An open TCP listening socket.
struct OpenTcpSocket {
    /// Gone once its task has closed it, and while it is broken.
    socket: Rc<RefCell<Weak<ListenSocket>>>,
    /// Closes it, where this goes.
    _close: oneshot::Sender<()>,
}

/// The listening sockets of one worker.
pub(super) struct WorkerSockets {
    worker: Rc<ServerWorker>,
    stages: watch::Receiver<WorkerStage>,
    /// The TCP sockets. There are several of one address if a previous process had more workers.
    open: RefCell<HashMap<ListenSocketId, Vec<OpenTcpSocket>>>,
    /// Whether anything is accepted.
    accepts: watch::Sender<bool>,
}

impl WorkerSockets {
    pub(super) fn new(
        worker: &Rc<ServerWorker>,
        stages: &watch::Receiver<WorkerStage>,
        accepts: bool,
    ) -> Self {
        let accepts = watch::Sender::new(accepts);
        Self { worker: Rc::clone(worker), stages: stages.clone(), open: RefCell::default(), accepts }
    }

    /// Carries out commands until the channel closes.
    pub(super) async fn run_commands(self, mut commands: mpsc::Receiver<SocketCommand>) {
        while let Some(command) = commands.recv().await {
            match command {
                SocketCommand::Open(sockets) => {
                    for (listener, socket) in sockets {
                        self.open(listener, socket);
                    }
                }
                SocketCommand::Close(sockets) => {
                    for (listen_socket, last) in sockets {
                        self.close(listen_socket, &last);
                    }
                }
                SocketCommand::Pause(done) => {
                    // Every accept checks this first: from now on none accepts.
                    self.accepts.send_replace(false);
                    self.worker.existing_flows().iter().for_each(|flows| flows.pause());
                    // The requester has given up.
                    done.send(()).unwrap_or_default();
                }
                SocketCommand::Resume => drop(self.accepts.send_replace(true)),
                SocketCommand::Lend(to) => drop(to.send(self.clone_sockets())),
            }
        }
        // The sockets stay open without commands: the senders that close them must not be dropped.
        std::future::pending::<()>().await;
    }

    /// Begins to serve a listener's socket.
    pub(super) fn open(&self, listener: u32, socket: BoundSocket) {
        match socket {
            BoundSocket::Tcp(socket) => {
                let Ok(address) = socket.local_addr() else { return };
                let (slot, (close, closes)) =
                    (Rc::<RefCell<Weak<ListenSocket>>>::default(), oneshot::channel());
                let id = ListenSocketId { listener, protocol: Protocol::Tcp, address };
                let opened = OpenTcpSocket { socket: Rc::clone(&slot), _close: close };
                self.open.borrow_mut().entry(id).or_default().push(opened);
                let open = self.worker.loads.count_socket();
                let (stages, accepts) = (self.stages.clone(), self.accepts.subscribe());
                let commands = AcceptLifetime { stages, closes, accepts, guard: open };
                let listen_socket = ListenSocket::new(socket).map(Rc::new);
                // Before the next order: it may be to lend it.
                slot.replace(listen_socket.as_ref().map_or_else(|_| Weak::new(), Rc::downgrade));
                spawn_local(keep(listen_socket, slot, id, Rc::clone(&self.worker), commands));
            }
            BoundSocket::Udp(socket) => {
                let (worker, accepts) = (Rc::clone(&self.worker), self.accepts.subscribe());
                if let Ok(flows) = worker.flows()
                    && !*accepts.borrow()
                {
                    flows.pause();
                }
                spawn_local(keep_udp(socket, listener, worker, accepts));
            }
        }
    }

    /// A copy of each socket. One of which no copy can be made is left out: the other process binds its own.
    fn clone_sockets(&self) -> Vec<ClonedSocket> {
        let open = self.open.borrow();
        let tcp = open.iter().flat_map(|(id, sockets)| sockets.iter().map(move |opened| (*id, opened)));
        let tcp = tcp.filter_map(|(id, opened)| {
            Some((id, opened.socket.borrow().upgrade()?.as_fd().try_clone_to_owned().ok()?))
        });
        let udp = self.worker.existing_flows().map_or_else(Vec::new, |flows| flows.clone_sockets());
        let udp = udp.into_iter().map(|(listener, address, socket)| {
            (ListenSocketId { listener, protocol: Protocol::Udp, address }, socket)
        });
        tcp.chain(udp).collect()
    }

    fn close(&self, listen_socket: ListenSocketId, last: &Arc<SocketRetirement>) {
        match listen_socket.protocol {
            // Its task closes it; where that has ended, it is closed.
            Protocol::Tcp => drop(self.open.borrow_mut().remove(&listen_socket)),
            Protocol::Udp => match self.worker.existing_flows() {
                Some(flows) => flows.close(listen_socket.listener, listen_socket.address, last),
                None => last.worker_done(),
            },
        }
    }
}

/// Ends an accept loop: drain, close command or pause.
struct AcceptLifetime {
    stages: watch::Receiver<WorkerStage>,
    /// Until this is closed.
    closes: oneshot::Receiver<()>,
    accepts: watch::Receiver<bool>,
    /// A drain waits for it.
    guard: OpenSocket,
}

/// Why an accept loop ended.
enum AcceptEnd {
    /// The listener's address or the process goes: what the kernel has accepted is served.
    Closed,
    /// Another process has the socket.
    Given,
    /// The socket broke.
    Broken(io::Error),
}

/// Accepts at one address until it, or the process, stops accepting. A socket that breaks is opened again.
async fn keep(
    mut opened: io::Result<Rc<ListenSocket>>,
    slot: Rc<RefCell<Weak<ListenSocket>>>,
    id: ListenSocketId,
    worker: Rc<ServerWorker>,
    mut commands: AcceptLifetime,
) {
    let listener = id.listener;
    let Some(label) = worker.context.listener_label(listener) else { return };
    let _vital = worker.essential_task("accepting");
    let cells = worker.context.metrics.listener(&label);
    loop {
        let listen_socket = match opened {
            Ok(listen_socket) => listen_socket,
            Err(error) => {
                let _stopped = stopped(&worker, label.name(), id.address, &error);
                let Some(listen_socket) = reopen(label.name(), id.address, &mut commands).await else {
                    return;
                };
                tracing::info!(listener = label.name(), address = %id.address, "listening socket opened again");
                slot.replace(Rc::downgrade(&listen_socket));
                listen_socket
            }
        };
        match accept(&listen_socket, label.name(), &cells, listener, &worker, &mut commands).await {
            AcceptEnd::Closed => {
                listen_socket.close(|accepted| worker.start(accepted, listener));
                // What was accepted is counted by now.
                return drop(commands.guard);
            }
            AcceptEnd::Given => return,
            AcceptEnd::Broken(error) => {
                cells.errors_fatal.add(1);
                opened = Err(error);
            }
        }
    }
}

async fn accept(
    listen_socket: &ListenSocket,
    name: &str,
    cells: &ListenerCounters,
    listener: u32,
    worker: &Rc<ServerWorker>,
    commands: &mut AcceptLifetime,
) -> AcceptEnd {
    let mut short = false;
    loop {
        if !*commands.accepts.borrow() {
            tokio::select! {
                // Another process has the socket, and what waits there is its: only this copy is closed.
                _ = commands.stages.wait_for(|stage| !matches!(stage, WorkerStage::Serving)) => return AcceptEnd::Given,
                _ = commands.accepts.wait_for(|accepts| *accepts) => {}
            }
        }
        let accepted = tokio::select! {
            // In this order: once it is paused, nothing is accepted here.
            biased;
            _ = commands.accepts.wait_for(|accepts| !accepts) => continue,
            _ = commands.stages.wait_for(|stage| !matches!(stage, WorkerStage::Serving)) => return AcceptEnd::Closed,
            _ = &mut commands.closes => return AcceptEnd::Closed,
            accepted = listen_socket.accept(|accepted| worker.receive(accepted, listener)) => accepted,
        };
        match accepted {
            Ok(()) => short = false,
            Err(AcceptError::Peer) => cells.errors_peer.add(1),
            Err(AcceptError::Shortage(error)) => {
                cells.errors_shortage.add(1);
                if !std::mem::replace(&mut short, true) {
                    tracing::warn!(listener = name, %error, "accepting pauses");
                }
                sleep(PAUSE).await;
            }
            Err(AcceptError::Fatal(error)) => return AcceptEnd::Broken(error),
        }
    }
}

/// The time to the first attempt to open a broken socket again, which doubles with each attempt, and the longest.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Opens a socket again; `None` where nothing is to be accepted at its address any more.
async fn reopen(name: &str, address: SocketAddr, commands: &mut AcceptLifetime) -> Option<Rc<ListenSocket>> {
    let mut wait = FIRST_RETRY;
    loop {
        tokio::select! {
            _ = commands.stages.wait_for(|stage| !matches!(stage, WorkerStage::Serving)) => return None,
            _ = &mut commands.closes => return None,
            () = sleep(wait) => {}
        }
        // During a takeover, connections would arrive at a socket that this process does not accept from.
        if *commands.accepts.borrow() {
            match listen_sockets::reopen(address).and_then(ListenSocket::new) {
                Ok(listen_socket) => return Some(Rc::new(listen_socket)),
                Err(error) => cannot_open(name, address, &error),
            }
        }
        wait = (wait * 2).min(LAST_RETRY);
    }
}

/// Receives at a UDP socket until its listener's address goes. A socket that breaks is opened again.
async fn keep_udp(
    mut socket: UdpSocket,
    listener: u32,
    worker: Rc<ServerWorker>,
    accepts: watch::Receiver<bool>,
) {
    let Ok(address) = socket.local_addr() else { return };
    let _vital = worker.essential_task("datagrams");
    let Some(label) = worker.context.listener_label(listener) else { return };
    let is_in_force = || {
        let bound = worker.context.live.bound.load();
        bound.get(listener as usize).is_some_and(|addresses| addresses.contains(&address))
    };
    let (mut wait, mut is_stopped) = (FIRST_RETRY, None);
    let flows = loop {
        match worker.flows() {
            Ok(flows) => break flows,
            Err(error) if is_stopped.is_none() => {
                is_stopped = Some(stopped(&worker, label.name(), address, &error));
            }
            Err(error) => cannot_open(label.name(), address, &error),
        }
        sleep(wait).await;
        if !is_in_force() {
            return;
        }
        wait = (wait * 2).min(LAST_RETRY);
    };
    drop(is_stopped);
    if !*accepts.borrow() {
        flows.pause();
    }
    let mend = async |error: &io::Error, is_closing: &dyn Fn() -> bool| {
        let _stopped = stopped(&worker, label.name(), address, error);
        let mut wait = FIRST_RETRY;
        loop {
            sleep(wait).await;
            if !is_in_force() || is_closing() {
                return None;
            }
            if *accepts.borrow() {
                match listen_sockets::reopen_udp(address) {
                    Ok(socket) => {
                        tracing::info!(listener = label.name(), %address, "listening socket opened again");
                        return Some(socket);
                    }
                    Err(error) => cannot_open(label.name(), address, &error),
                }
            }
            wait = (wait * 2).min(LAST_RETRY);
        }
    };
    while let Err(error) = flows.serve_socket(socket, listener, &mend).await {
        let Some(again) = mend(&error, &|| false).await else { return };
        socket = again;
    }
}

fn cannot_open(listener: &str, address: SocketAddr, error: &io::Error) {
    tracing::warn!(listener, %address, %error, "cannot open a listening socket again; retrying");
}

/// A listener never dies in silence.
fn stopped(worker: &ServerWorker, listener: &str, address: SocketAddr, error: &io::Error) -> StoppedListener {
    tracing::error!(worker = worker.context.number, listener, %address, %error, "listening socket failed; opening it again");
    worker.context.live.stopped_listeners.stop()
}
