//! Picks a backend for a session of a tenant, within the tenant's share of the pool.

use std::net::SocketAddr;

use super::{PickError, PickedBackend, Pool, TriedBackends};

impl Pool {
    /// Picks a backend for a session of the tenant, by its label's serial number. Where several tenants may use the pool, and
    /// its backends have `max-sessions`, the tenant gets none beyond its share of them. Locks once, for that count.
    ///
    /// # Errors
    /// Why no backend can be picked.
    pub fn pick_for(
        &self,
        tenant: u32,
        key: u64,
        roll: u64,
        tried: &mut TriedBackends,
    ) -> Result<PickedBackend, PickError> {
        if !tried.is_empty() {
            // The session is already counted and tries another backend.
            return self.pick_again(tenant, key, roll, tried);
        }
        let shares = &self.persistent.shares;
        // Waiting sessions are served first. Those that still wait hold more than their share of what is left.
        let passes_line = self.waiting() > 0 && shares.room().is_some();
        if passes_line {
            self.serve_queue();
        }
        shares.enter([tenant])?;
        let picked = self.pick_skipping_queue(passes_line, key, roll, tried);
        shares.settle();
        let picked = picked.map(|picked| picked.of(tenant)).inspect_err(|_| shares.leave(tenant));
        // The session was counted twice meanwhile, which may have kept a waiting session from being served.
        self.serve_queue();
        picked
    }

    /// The same for a session or a flow that was in the pool before, at another backend: neither its tenant's share nor the line
    /// keeps it out.
    ///
    /// # Errors
    /// Why no backend can be picked.
    pub fn pick_again(
        &self,
        tenant: u32,
        key: u64,
        roll: u64,
        tried: &mut TriedBackends,
    ) -> Result<PickedBackend, PickError> {
        let picked = self.pick_skipping_queue(true, key, roll, tried)?;
        self.persistent.shares.enter_anyway(tenant);
        Ok(picked.of(tenant))
    }

    /// Takes in a session of the tenant that is connected to one of its backends already.
    #[must_use]
    pub fn adopt(&self, address: SocketAddr, tenant: u32) -> Option<PickedBackend> {
        let candidates = self.candidates();
        let backend = candidates.backends().iter().find(|own| own.address().0 == address)?;
        self.persistent.shares.enter_anyway(tenant);
        Some(PickedBackend::adopt(backend).of(tenant))
    }

    /// From now on one tenant may use it, or several may: then none of them gets all the room of its backends.
    pub fn set_shared(&self, is_shared: bool) {
        if self.persistent.shares.set_shared(is_shared) && !is_shared {
            self.serve_queue();
        }
    }

    /// How many places at its backends a tenant holds.
    #[must_use]
    pub fn held(&self, tenant: u32) -> usize {
        self.persistent.shares.held(tenant)
    }
}
