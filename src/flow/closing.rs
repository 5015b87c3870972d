//! Listening sockets of flows that close: no flow begins there, and those that there are go on until they are silent.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::FlowWorker;
use super::retirement::SocketRetirement;
use super::socket::UdpListenSocket;

impl<A> FlowWorker<A> {
    /// Stops opening flows at a listener's address.
    pub fn close(&self, listener: u32, address: SocketAddr, vacancy: &Arc<SocketRetirement>) {
        let sockets = self.sockets.borrow();
        let is_it = |listen_socket: &&Rc<UdpListenSocket>| {
            listen_socket.is_at(listener, address) && !listen_socket.is_closing()
        };
        // Several where another process had more workers. Each leaves once.
        for listen_socket in sockets.iter().flatten().filter(is_it) {
            vacancy.add_worker();
            listen_socket.close(Arc::clone(vacancy));
        }
        // The worker itself; its sockets may have failed, which is logged already.
        vacancy.worker_done();
    }

    /// Flows begin again where there are some still from before, of whatever listener; whether that is so. With more sockets
    /// of the address than there were, the kernel would bring the datagrams of those flows to others.
    pub(super) fn reopen(&self, listener: u32, address: SocketAddr) -> bool {
        let sockets = self.sockets.borrow();
        let is_it = |listen_socket: &&Rc<UdpListenSocket>| {
            listen_socket.address() == address && listen_socket.is_closing()
        };
        let mut closing = sockets.iter().flatten().filter(is_it).peekable();
        let is_there = closing.peek().is_some();
        closing.for_each(|listen_socket| {
            // What was dropped until now is the other listener's.
            self.count_drops(listen_socket);
            listen_socket.reopen(listener);
            self.count_drops(listen_socket);
        });
        is_there
    }

    /// Closes sockets at which no worker has a flow any more.
    pub(super) fn close_vacant(&self) {
        for place in self.sockets.borrow_mut().iter_mut() {
            if let Some(gone) =
                place.take_if(|listen_socket| listen_socket.is_vacant(SocketRetirement::is_complete))
            {
                self.count_drops(&gone);
            }
        }
    }
}
