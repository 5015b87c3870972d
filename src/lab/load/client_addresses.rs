//! The client address of a generated connection or flow.

use std::net::SocketAddr;
use std::rc::Rc;

use super::LoadPlan;
use super::schedule::SkewedShares;

/// The first client is 10.100.0.10; after 10.255.255.255 comes 10.0.0.0.
const FIRST_CLIENT: u32 = u32::from_be_bytes([0, 100, 0, 10]);

/// Clients at most: the addresses of 10.0.0.0/8.
pub const MOST_CLIENTS: u32 = 1 << 24;

/// Writes the header of a client's, for a destination and an endpoint.
pub(super) type Write = fn(SocketAddr, SocketAddr, Option<&str>) -> Vec<u8>;

/// Draws endpoints and clients as a plan asks.
pub(super) struct ClientAddresses {
    plan: Rc<LoadPlan>,
    shares: Rc<SkewedShares>,
    count: u16,
}

impl ClientAddresses {
    pub(super) fn new(plan: &Rc<LoadPlan>, shares: &Rc<SkewedShares>) -> Self {
        Self { plan: Rc::clone(plan), shares: Rc::clone(shares), count: 0 }
    }

    /// The next one's header, and the pool whose backends may answer; both are empty where no endpoint is played.
    pub(super) fn next(
        &mut self,
        rolls: &mut fastrand::Rng,
        local: SocketAddr,
        write: Write,
    ) -> (Vec<u8>, String) {
        let drawn = self.plan.endpoints.get(self.shares.draw(rolls.f64()));
        let Some((endpoint, pool)) = drawn else { return (Vec::new(), String::new()) };
        self.count = self.count.wrapping_add(1);
        let number = rolls.u32(..self.plan.clients.clamp(1, MOST_CLIENTS));
        let [_, b, c, d] = (number + FIRST_CLIENT).to_be_bytes();
        let client = SocketAddr::from(([10, b, c, d], self.count));
        let target = if local.is_ipv4() { self.plan.target } else { SocketAddr::from(([10, 0, 0, 5], 0)) };
        (write(client, target, Some(endpoint)), pool.clone())
    }
}
