//! A worker's doors: opened and closed by order, each for itself, while all else goes on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::crew::OpenDoor;
use super::drain::Stage;
use super::listen::Bound;
use super::worker::Shop;
use crate::accept::{Door, PAUSE, Trouble};
use crate::config::Protocol;
use crate::flow::Vacancy;

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
    /// Gone once its task has closed it.
    door: Weak<Door>,
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
            Bound::Tcp(socket) => match Door::new(socket) {
                Ok(door) => {
                    let (address, door) = (door.address().0, Rc::new(door));
                    let (close, closes) = oneshot::channel();
                    let id = DoorId { listener, protocol: Protocol::Tcp, address };
                    let opened = Opened { door: Rc::downgrade(&door), _close: close };
                    self.open.borrow_mut().entry(id).or_default().push(opened);
                    let open = self.shop.crew.open_door();
                    let orders =
                        Stays { stages: self.stages.clone(), closes, accepts: self.accepts.subscribe() };
                    spawn_local(keep(door, open, listener, Rc::clone(&self.shop), orders));
                }
                Err(error) => stopped(&self.shop, listener, &error),
            },
            Bound::Udp(socket) => {
                let Some(flows) = self.shop.flows() else { return };
                if !*self.accepts.borrow() {
                    flows.pause();
                }
                let shop = Rc::clone(&self.shop);
                spawn_local(async move {
                    let _vital = shop.vital("datagrams");
                    if let Err(error) = flows.keep(socket, listener).await {
                        stopped(&shop, listener, &error);
                    }
                });
            }
        }
    }

    /// A copy of each socket. One of which no copy can be made is left out: the other process binds its own.
    fn lend(&self) -> Vec<Lent> {
        let open = self.open.borrow();
        let tcp = open.iter().flat_map(|(id, doors)| doors.iter().map(move |opened| (*id, opened)));
        let tcp = tcp
            .filter_map(|(id, opened)| Some((id, opened.door.upgrade()?.as_fd().try_clone_to_owned().ok()?)));
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
            Protocol::Udp => match self.shop.flows() {
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
}

/// Accepts at one door until it, or the process, stops accepting.
async fn keep(door: Rc<Door>, open: OpenDoor, listener: u32, shop: Rc<Shop>, mut orders: Stays) {
    let snapshot = shop.live.snapshot.load_full();
    let Some(label) = snapshot.listeners.get(listener as usize).map(|listener| listener.label.clone()) else {
        return;
    };
    drop(snapshot);
    let _vital = shop.vital("accepting");
    let cells = shop.worker.local.ledger.listener(&label);
    let mut short = false;
    loop {
        if !*orders.accepts.borrow() {
            tokio::select! {
                // Another process has the socket, and what waits there is its: only this copy is closed.
                _ = orders.stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => return,
                _ = orders.accepts.wait_for(|accepts| *accepts) => {}
            }
        }
        let accepted = tokio::select! {
            // In this order: once it is paused, nothing is accepted here.
            biased;
            _ = orders.accepts.wait_for(|accepts| !accepts) => continue,
            _ = orders.stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => break,
            _ = &mut orders.closes => break,
            accepted = door.accept(|accepted| shop.receive(accepted, listener)) => accepted,
        };
        match accepted {
            Ok(()) => short = false,
            Err(Trouble::Peer(_)) => cells.errors_peer.add(1),
            Err(Trouble::Shortage(error)) => {
                cells.errors_shortage.add(1);
                if !std::mem::replace(&mut short, true) {
                    tracing::warn!(listener = label.name(), %error, "accepting pauses");
                }
                sleep(PAUSE).await;
            }
            Err(Trouble::Fatal(error)) => {
                cells.errors_fatal.add(1);
                return stopped(&shop, listener, &error);
            }
        }
    }
    door.close(|accepted| shop.start(accepted, listener));
    drop(open);
}

/// A listener never dies in silence.
fn stopped(shop: &Shop, listener: u32, error: &io::Error) {
    tracing::error!(worker = shop.worker.number, listener, %error, "a listening socket has stopped");
    shop.live.stopped_doors.fetch_add(1, Ordering::AcqRel);
}
