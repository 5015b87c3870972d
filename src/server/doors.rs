//! A worker's doors: opened and closed by order, each for itself, while all else goes on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::crew::OpenDoor;
use super::drain::Stage;
use super::listen::Bound;
use super::worker::Shop;
use crate::accept::{Door, Trouble};
use crate::config::Protocol;
use crate::flow::Vacancy;

/// Orders that may wait for a worker; each is what one reload wants of it.
pub(super) const ORDERS: usize = 64;

/// How long accepting rests when descriptors or memory have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Which door: the place of its listener, and what is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DoorId {
    pub(super) listener: u32,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Serve these, too.
    Open(Vec<(u32, Bound)>),
    /// Accept nothing more here. What the kernel has accepted is served, and so are flows, whose door all workers close
    /// together once none has any.
    Close(Vec<(DoorId, Arc<Vacancy>)>),
}

/// The doors of one worker.
pub(super) struct Doors {
    shop: Rc<Shop>,
    stages: watch::Receiver<Stage>,
    /// What closes each TCP door.
    open: RefCell<HashMap<DoorId, oneshot::Sender<()>>>,
}

impl Doors {
    pub(super) fn new(shop: &Rc<Shop>, stages: &watch::Receiver<Stage>) -> Self {
        Self { shop: Rc::clone(shop), stages: stages.clone(), open: RefCell::default() }
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
                Order::Close(doors) => doors.into_iter().for_each(|(door, last)| self.close(door, last)),
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
                    let address = door.address().0;
                    let (close, closes) = oneshot::channel();
                    let id = DoorId { listener, protocol: Protocol::Tcp, address };
                    self.open.borrow_mut().insert(id, close);
                    let open = self.shop.crew.open_door();
                    let shop = Rc::clone(&self.shop);
                    spawn_local(keep(door, open, listener, shop, self.stages.clone(), closes));
                }
                Err(error) => stopped(&self.shop, listener, &error),
            },
            Bound::Udp(socket) => {
                let Some(flows) = self.shop.flows() else { return };
                let shop = Rc::clone(&self.shop);
                spawn_local(async move {
                    if let Err(error) = flows.keep(socket, listener).await {
                        stopped(&shop, listener, &error);
                    }
                });
            }
        }
    }

    fn close(&self, door: DoorId, last: Arc<Vacancy>) {
        match door.protocol {
            // Its task closes it; where that has ended, the door is closed.
            Protocol::Tcp => drop(self.open.borrow_mut().remove(&door)),
            Protocol::Udp => match self.shop.flows() {
                Some(flows) => flows.close(door.listener, door.address, last),
                None => last.leave(),
            },
        }
    }
}

/// Accepts at one door until it, or the process, stops accepting.
async fn keep(
    door: Door,
    open: OpenDoor,
    listener: u32,
    shop: Rc<Shop>,
    mut stages: watch::Receiver<Stage>,
    mut closes: oneshot::Receiver<()>,
) {
    let snapshot = shop.live.snapshot.load_full();
    let Some(label) = snapshot.listeners.get(listener as usize).map(|listener| listener.label.clone()) else {
        return;
    };
    drop(snapshot);
    let cells = shop.worker.local.ledger.listener(&label);
    let mut short = false;
    loop {
        let accepted = tokio::select! {
            accepted = door.accept(|accepted| shop.receive(accepted, listener)) => accepted,
            _ = stages.wait_for(|stage| !matches!(stage, Stage::Serving)) => break,
            _ = &mut closes => break,
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
