//! A worker's doors: opened and closed by order, each for itself, while all else goes on.

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

use super::crew::OpenDoor;
use super::drain::Stage;
use super::listen::{self, Bound};
use super::worker::Shop;
use crate::accept::{Door, PAUSE, Trouble};
use crate::account::meter::ListenerCells;
use crate::config::Protocol;
use crate::flow::Vacancy;
use crate::state::StoppedListener;

/// Orders that may wait for a worker; each is what one reload wants of it.
pub(super) const ORDERS: usize = 64;

/// Which door: the place of its listener, and what is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DoorId {
    pub(super) listener: u32,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
}

impl DoorId {
    pub(super) fn is_udp(&self) -> bool {
        self.protocol == Protocol::Udp
    }
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Serve these, too.
    Open(Vec<(u32, Bound)>),
    /// Accept nothing more here. What the kernel has accepted is served, and so are flows, whose door all workers close
    /// together once none has any.
    Close(Vec<(DoorId, Arc<Vacancy>)>),
    /// Accept nothing and hear nothing, and say so once that holds: what comes waits in the sockets.
    Pause(oneshot::Sender<()>),
    /// Accept again. Datagrams are heard by an order of those who move flows.
    Resume,
    /// Show every socket, for another process to accept there too.
    Lend(oneshot::Sender<Vec<Lent>>),
}

/// A copy of a socket, and which door it is of.
pub(super) type Lent = (DoorId, OwnedFd);

/// A TCP door that is open.
struct Opened {
    /// Gone once its task has closed it, and while it is broken.
    door: Rc<RefCell<Weak<Door>>>,
    /// Closes it, where this goes.
    _close: oneshot::Sender<()>,
}

/// The doors of one worker.
pub(super) struct Doors {
    shop: Rc<Shop>,
    stages: watch::Receiver<Stage>,
    /// The TCP doors. There are several of one address where another process had more workers.
    open: RefCell<HashMap<DoorId, Vec<Opened>>>,
    /// Whether anything is accepted.
    accepts: watch::Sender<bool>,
}

impl Doors {
    pub(super) fn new(shop: &Rc<Shop>, stages: &watch::Receiver<Stage>, accepts: bool) -> Self {
        let accepts = watch::Sender::new(accepts);
        Self { shop: Rc::clone(shop), stages: stages.clone(), open: RefCell::default(), accepts }
    }

    /// Carries out what the worker is told, for as long as there is anybody to tell it something.
    pub(super) async fn obey(self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Open(sockets) => {
                    for (listener, socket) in sockets {
                        self.open(listener, socket);
                    }
                }
                Order::Close(doors) => doors.into_iter().for_each(|(door, last)| self.close(door, &last)),
                Order::Pause(done) => {
                    // Whoever accepts looks here first: from now on nobody does.
                    self.accepts.send_replace(false);
                    self.shop.known_flows().iter().for_each(|flows| flows.pause());
                    // Who asked has given up.
                    done.send(()).unwrap_or_default();
                }
                Order::Resume => drop(self.accepts.send_replace(true)),
                Order::Lend(to) => drop(to.send(self.lend())),
            }
        }
        // The doors stay open without orders: what closes them must not go.
        std::future::pending::<()>().await;
    }

    /// Begins to serve a listener's socket.
    pub(super) fn open(&self, listener: u32, socket: Bound) {
        match socket {
            Bound::Tcp(socket) => {
                let Ok(address) = socket.local_addr() else { return };
                let (slot, (close, closes)) = (Rc::<RefCell<Weak<Door>>>::default(), oneshot::channel());
                let id = DoorId { listener, protocol: Protocol::Tcp, address };
                let opened = Opened { door: Rc::clone(&slot), _close: close };
                self.open.borrow_mut().entry(id).or_default().push(opened);
                let open = self.shop.crew.open_door();
                let (stages, accepts) = (self.stages.clone(), self.accepts.subscribe());
                let orders = Stays { stages, closes, accepts, is_counted: open };
                let door = Door::new(socket).map(Rc::new);
                // Before the next order: it may be to lend it.
                slot.replace(door.as_ref().map_or_else(|_| Weak::new(), Rc::downgrade));
                spawn_local(keep(door, slot, id, Rc::clone(&self.shop), orders));
            }
            Bound::Udp(socket) => {
                let (shop, accepts) = (Rc::clone(&self.shop), self.accepts.subscribe());
                if let Ok(flows) = shop.flows()
                    && !*accepts.borrow()
                {
                    flows.pause();
                }
                spawn_local(keep_udp(socket, listener, shop, accepts));
            }
        }
    }

    /// A copy of each socket. One of which no copy can be made is left out: the other process binds its own.
    fn lend(&self) -> Vec<Lent> {
        let open = self.open.borrow();
        let tcp = open.iter().flat_map(|(id, doors)| doors.iter().map(move |opened| (*id, opened)));
        let tcp = tcp.filter_map(|(id, opened)| {
            Some((id, opened.door.borrow().upgrade()?.as_fd().try_clone_to_owned().ok()?))
        });
        let udp = self.shop.known_flows().map_or_else(Vec::new, |flows| flows.lend());
        let udp = udp.into_iter().map(|(listener, address, socket)| {
            (DoorId { listener, protocol: Protocol::Udp, address }, socket)
        });
        tcp.chain(udp).collect()
    }

    fn close(&self, door: DoorId, last: &Arc<Vacancy>) {
        match door.protocol {
            // Its task closes it; where that has ended, it is closed.
            Protocol::Tcp => drop(self.open.borrow_mut().remove(&door)),
            Protocol::Udp => match self.shop.known_flows() {
                Some(flows) => flows.close(door.listener, door.address, last),
                None => last.leave(),
            },
        }
    }
}

/// How long a door is kept.
struct Stays {
    stages: watch::Receiver<Stage>,
    /// Until this is closed.
    closes: oneshot::Receiver<()>,
    accepts: watch::Receiver<bool>,
    /// A drain waits for it.
    is_counted: OpenDoor,
}

/// How a listening socket's work ended.
enum End {
    /// The listener's address or the process goes: what the kernel has accepted is served.
    Closed,
    /// Another process has the socket.
    Given,
    /// The socket broke.
    Broken(io::Error),
}

/// Accepts at one address until it, or the process, stops accepting. A socket that breaks is opened again.
async fn keep(
    mut opened: io::Result<Rc<Door>>,
    slot: Rc<RefCell<Weak<Door>>>,
    id: DoorId,
    shop: Rc<Shop>,
    mut orders: Stays,
) {
    let listener = id.listener;
    let snapshot = shop.live.snapshot.load_full();
    let Some(label) = snapshot.listeners.get(listener as usize).map(|listener| listener.label.clone()) else {
        return;
    };
    drop(snapshot);
    let _vital = shop.vital("accepting");
    let cells = shop.worker.local.ledger.listener(&label);
    loop {
        let door = match opened {
            Ok(door) => door,
            Err(error) => {
                let _stopped = stopped(&shop, label.name(), id.address, &error);
                let Some(door) = reopen(label.name(), id.address, &mut orders).await else { return };
                tracing::info!(listener = label.name(), address = %id.address, "a listening socket is open again");
                slot.replace(Rc::downgrade(&door));
                door
            }
        };
        match accept(&door, label.name(), &cells, listener, &shop, &mut orders).await {
            End::Closed => {
                door.close(|accepted| shop.start(accepted, listener));
                // What was accepted is counted by now.
                return drop(orders.is_counted);
            }
            End::Given => return,
            End::Broken(error) => {
                cells.errors_fatal.add(1);
                opened = Err(error);
            }
        }
    }
}

async fn accept(
    door: &Door,
    name: &str,
    cells: &ListenerCells,
    listener: u32,
    shop: &Rc<Shop>,
    orders: &mut Stays,
) -> End {
    let mut short = false;
    loop {
        if !*orders.accepts.borrow() {
            tokio::select! {
                // Another process has the socket, and what waits there is its: only this copy is closed.
                _ = orders.stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => return End::Given,
                _ = orders.accepts.wait_for(|accepts| *accepts) => {}
            }
        }
        let accepted = tokio::select! {
            // In this order: once it is paused, nothing is accepted here.
            biased;
            _ = orders.accepts.wait_for(|accepts| !accepts) => continue,
            _ = orders.stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => return End::Closed,
            _ = &mut orders.closes => return End::Closed,
            accepted = door.accept(|accepted| shop.receive(accepted, listener)) => accepted,
        };
        match accepted {
            Ok(()) => short = false,
            Err(Trouble::Peer(_)) => cells.errors_peer.add(1),
            Err(Trouble::Shortage(error)) => {
                cells.errors_shortage.add(1);
                if !std::mem::replace(&mut short, true) {
                    tracing::warn!(listener = name, %error, "accepting pauses");
                }
                sleep(PAUSE).await;
            }
            Err(Trouble::Fatal(error)) => return End::Broken(error),
        }
    }
}

/// The time to the first attempt to open a broken socket again, which doubles with each attempt, and the longest.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Opens a socket again; `None` where nothing is to be accepted at its address any more.
async fn reopen(name: &str, address: SocketAddr, orders: &mut Stays) -> Option<Rc<Door>> {
    let mut wait = FIRST_RETRY;
    loop {
        tokio::select! {
            _ = orders.stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => return None,
            _ = &mut orders.closes => return None,
            () = sleep(wait) => {}
        }
        // While another process takes over, connections would come to a socket that nobody accepts from.
        if *orders.accepts.borrow() {
            match listen::reopen(address).and_then(Door::new) {
                Ok(door) => return Some(Rc::new(door)),
                Err(error) => cannot_open(name, address, &error),
            }
        }
        wait = (wait * 2).min(LAST_RETRY);
    }
}

/// Receives at a UDP socket until its listener's address goes. A socket that breaks is opened again.
async fn keep_udp(mut socket: UdpSocket, listener: u32, shop: Rc<Shop>, accepts: watch::Receiver<bool>) {
    let Ok(address) = socket.local_addr() else { return };
    let _vital = shop.vital("datagrams");
    let snapshot = shop.live.snapshot.load_full();
    let label = snapshot.listeners.get(listener as usize).map(|listener| listener.label.clone());
    drop(snapshot);
    let Some(label) = label else { return };
    let is_in_force = || {
        let bound = shop.live.bound.load();
        bound.get(listener as usize).is_some_and(|addresses| addresses.contains(&address))
    };
    let (mut wait, mut is_stopped) = (FIRST_RETRY, None);
    let flows = loop {
        match shop.flows() {
            Ok(flows) => break flows,
            Err(error) if is_stopped.is_none() => {
                is_stopped = Some(stopped(&shop, label.name(), address, &error));
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
        let _stopped = stopped(&shop, label.name(), address, error);
        let mut wait = FIRST_RETRY;
        loop {
            sleep(wait).await;
            if !is_in_force() || is_closing() {
                return None;
            }
            if *accepts.borrow() {
                match listen::reopen_udp(address) {
                    Ok(socket) => {
                        tracing::info!(listener = label.name(), %address, "a listening socket is open again");
                        return Some(socket);
                    }
                    Err(error) => cannot_open(label.name(), address, &error),
                }
            }
            wait = (wait * 2).min(LAST_RETRY);
        }
    };
    while let Err(error) = flows.keep(socket, listener, &mend).await {
        let Some(again) = mend(&error, &|| false).await else { return };
        socket = again;
    }
}

fn cannot_open(listener: &str, address: SocketAddr, error: &io::Error) {
    tracing::warn!(listener, %address, %error, "a listening socket cannot be opened again yet; it is tried again");
}

/// A listener never dies in silence.
fn stopped(shop: &Shop, listener: &str, address: SocketAddr, error: &io::Error) -> StoppedListener {
    let worker = shop.worker.number;
    tracing::error!(worker, listener, %address, %error, "a listening socket has stopped; it is opened again");
    shop.live.stopped_listeners.stop()
}
