//! The workers, as those see them who tell them something.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::takeover::Order as Takeover;
use super::worker::Order;
use crate::takeover::Leaving;
use crate::takeover::message::Offered;

/// The way to each worker's ear. A worker that has ended hears nothing, and is left out.
#[derive(Clone, Debug)]
pub(super) struct Team(Arc<[mpsc::Sender<Order>]>);

impl Team {
    pub(super) fn new(orders: Vec<mpsc::Sender<Order>>) -> Self {
        Self(orders.into())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells one worker something, and waits while its queue is full. Not for threads that run tasks.
    pub(super) fn tell(&self, worker: usize, order: Takeover) {
        let Some(orders) = self.0.get(worker) else { return };
        orders.blocking_send(Order::Takeover(order)).unwrap_or_default();
    }

    /// Tells all of them, and waits for all their answers.
    fn ask<T>(&self, order: impl Fn(oneshot::Sender<T>) -> Takeover) -> Vec<T> {
        let ask = |worker| {
            let (sender, answer) = oneshot::channel();
            self.tell(worker, order(sender));
            answer
        };
        let answers: Vec<_> = (0..self.len()).map(ask).collect();
        answers.into_iter().filter_map(|answer| answer.blocking_recv().ok()).collect()
    }

    /// All listening sockets.
    pub(super) fn lend(&self) -> Vec<(Offered, OwnedFd)> {
        self.ask(Takeover::Lend).into_iter().flatten().collect()
    }

    /// Returns once nobody accepts any more.
    pub(super) fn pause(&self) {
        self.ask(Takeover::Pause);
    }

    pub(super) fn resume(&self) {
        (0..self.len()).for_each(|worker| self.tell(worker, Takeover::Resume));
    }

    /// Has each worker send its sessions to its channel.
    pub(super) fn depart(&self, channels: Vec<mpsc::Sender<Leaving>>) {
        for (worker, channel) in channels.into_iter().enumerate() {
            self.tell(worker, Takeover::Depart(channel));
        }
    }

    pub(super) fn stay(&self) {
        (0..self.len()).for_each(|worker| self.tell(worker, Takeover::Stay));
    }
}
