//! Freezes a relay for another process, and thaws one that came from there.
//!
//! Between two polls a relay is consistent: what it has read is in its pending write or its pipe. So a
//! record of it, both sockets and a pipe that holds bytes are all that another process needs.

use std::io;
use std::net::TcpStream as Detached;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::ioctl_fionread;
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::bandwidth::TenantResources;
use super::copy::PendingWrite;
use super::direction::{DirectionPhase, DirectionState};
use super::pipe::{CAPACITY, Pipe};
use super::{IdleTimeouts, Relay};
use crate::account::{Direction, PerDirection};
use crate::clock;
use crate::clock::wheel::Tick;
use crate::outcome::{EndedBy, Reason};
use crate::session_context::SessionContext;

/// The most bytes of one direction's pending write: what was taken out of a pipe, a read of the scratch buffer, or a
/// header and what came with it, which is less.
pub const MOST_SPILLED: usize = CAPACITY;

/// The transferred state of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionRecord {
    phase: DirectionPhase,
    /// Whether the sink has TCP_NODELAY.
    prompt: bool,
    /// How long ago bytes moved.
    silent_ms: u64,
    /// The length of its pending write, whose bytes are in the tail.
    spill: usize,
    /// The bytes of its pipe, which comes along where it has any.
    pipe: Option<usize>,
}

/// The transferred state of a frozen relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRecord {
    to_backend: DirectionRecord,
    to_client: DirectionRecord,
    first_end: Option<EndedBy>,
    broken: Option<(EndedBy, Reason)>,
    /// Whether both sockets have keepalive.
    settled: bool,
}

impl RelayRecord {
    fn direction(&self, direction: Direction) -> &DirectionRecord {
        match direction {
            Direction::ToBackend => &self.to_backend,
            Direction::ToClient => &self.to_client,
        }
    }
}

/// Why a record cannot be restored to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The record and the tail disagree.
    #[error("the number of bytes after the record differs from the record")]
    Tail,
    /// The record and the descriptors disagree.
    #[error("the descriptors differ from the record")]
    Descriptors,
    /// A pipe has not what the record says.
    #[error("a pipe holds another number of bytes than the record says")]
    Pipe,
}

/// A frozen session, to be continued in this process.
#[derive(Debug)]
pub struct FrozenRelay {
    record: RelayRecord,
    client: OwnedFd,
    backend: OwnedFd,
    pending: PerDirection<Vec<u8>>,
    pipes: PerDirection<Option<[OwnedFd; 2]>>,
}

impl FrozenRelay {
    /// The own address of the connection to the backend.
    #[must_use]
    pub fn backend_source(&self) -> Option<IpAddr> {
        let address = rustix::net::getsockname(&self.backend).ok()?;
        SocketAddr::try_from(address).ok().map(|own| own.ip())
    }

    /// Puts together what arrived: the tail's bytes, and the descriptors in the record's order.
    ///
    /// # Errors
    /// Where they do not fit the record.
    pub fn new(record: RelayRecord, tail: &[u8], fds: Vec<OwnedFd>) -> Result<Self, RestoreError> {
        let mut fds = fds.into_iter();
        let (Some(client), Some(backend)) = (fds.next(), fds.next()) else {
            return Err(RestoreError::Descriptors);
        };
        if [&client, &backend].into_iter().any(|fd| socket_type(fd) != Ok(SocketType::STREAM)) {
            return Err(RestoreError::Descriptors);
        }
        let (mut spills, mut pipes) = (PerDirection::default(), PerDirection::default());
        let mut rest = tail;
        for direction in Direction::ALL {
            let state = record.direction(direction);
            let (spill, after) = rest.split_at_checked(state.spill).ok_or(RestoreError::Tail)?;
            if state.spill > MOST_SPILLED || state.spill > 0 && state.pipe.is_some() {
                return Err(RestoreError::Tail);
            }
            *spills.of_mut(direction) = spill.to_vec();
            rest = after;
            if let Some(held) = state.pipe {
                let (Some(read), Some(write)) = (fds.next(), fds.next()) else {
                    return Err(RestoreError::Descriptors);
                };
                if ioctl_fionread(&read).ok().and_then(|found| usize::try_from(found).ok()) != Some(held) {
                    return Err(RestoreError::Pipe);
                }
                *pipes.of_mut(direction) = Some([read, write]);
            }
        }
        if !rest.is_empty() {
            return Err(RestoreError::Tail);
        }
        if fds.next().is_some() {
            return Err(RestoreError::Descriptors);
        }
        Ok(Self { record, client, backend, pending: spills, pipes })
    }

    /// Goes on with it.
    ///
    /// # Errors
    /// Where the worker's poll has no room for its sockets: both are reset then.
    pub fn thaw<'a>(
        mut self,
        timeouts: &'a IdleTimeouts,
        resources: TenantResources<'a>,
        session: &'a mut SessionContext,
    ) -> io::Result<Relay<'a>> {
        let now = session.tick();
        let mut state = |direction, session: &SessionContext| {
            let record = self.record.direction(direction);
            let mut state = DirectionState::new(now.before(Duration::from_millis(record.silent_ms)));
            (state.phase, state.prompt) = (record.phase, record.prompt);
            state.pending_write =
                PendingWrite::new(std::mem::take(self.pending.of_mut(direction)), resources);
            let held = record.pipe.unwrap_or(0);
            let ends = self.pipes.of_mut(direction).take();
            state.pipe =
                ends.map(|ends| Box::new(resources.worker.pipes.adopt(ends, held, resources.quota, session)));
            state
        };
        let directions = PerDirection {
            to_backend: state(Direction::ToBackend, session),
            to_client: state(Direction::ToClient, session),
        };
        let both = match registered(self.client, self.backend) {
            Ok(both) => both,
            Err(error) => {
                for state in [directions.to_backend, directions.to_client] {
                    resources.give_back(state.pipe, session);
                }
                return Err(error);
            }
        };
        // The other process may have bounded a queue. Here it has no bound until its reader is found to be slow.
        for socket in &both {
            super::buffer::bound_unsent(socket, 0);
        }
        let mut relay = Relay::new(both, directions, timeouts, resources, session);
        if self.record.settled {
            relay.settles = Tick::NEVER;
        }
        (relay.first_end, relay.broken) = (self.record.first_end, self.record.broken);
        // Its tenant may not be here, or not have its endpoint.
        relay.visit_first();
        Ok(relay)
    }
}

/// Both sockets, known to the worker's poll.
fn registered(client: OwnedFd, backend: OwnedFd) -> io::Result<[TcpStream; 2]> {
    let both = [client, backend].map(Detached::from);
    // A second copy of each, to say the end with where registering fails: it takes the first one with it.
    let register = |stream: &Detached| stream.try_clone().and_then(TcpStream::from_std);
    let [client, backend] = &both;
    match (register(client), register(backend)) {
        (Ok(client), Ok(backend)) => Ok([client, backend]),
        (Err(error), _) | (_, Err(error)) => {
            for socket in &both {
                // The only error is that the connection is closed already; then there is nothing to do.
                socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap_or_default();
            }
            Err(error)
        }
    }
}

impl Relay<'_> {
    /// Its life.
    pub fn session(&mut self) -> &mut SessionContext {
        self.session
    }

    /// Freezes: leaves the queue; from here on dropping it does not reset client and backend, for another
    /// process may hold them. Must not be polled before it is [thawed](Self::thaw).
    ///
    /// Returns its record, the pending bytes of both directions, and duplicates of its descriptors.
    ///
    /// # Errors
    /// Where there is no descriptor left for a copy; it goes on then.
    pub fn freeze(&mut self) -> io::Result<(RelayRecord, Vec<u8>, Vec<OwnedFd>)> {
        self.ended = true;
        let now = self.session.tick();
        for direction in Direction::ALL {
            let state = self.directions.of_mut(direction);
            if state.limiter.has_joined() {
                state.limiter.leave(&mut self.resources.worker.bandwidth.borrow_mut(), clock::now());
                // What it waited was not its silence.
                state.last_progress = now;
            }
        }
        // A deadline that passes meanwhile is looked at when it goes on.
        self.session.wake_at(Tick::NEVER);
        self.pack().inspect_err(|_| self.thaw())
    }

    /// Continues here: no other process holds it.
    pub fn thaw(&mut self) {
        self.ended = false;
    }

    fn pack(&self) -> io::Result<(RelayRecord, Vec<u8>, Vec<OwnedFd>)> {
        let mut fds = vec![copy(&self.client)?, copy(&self.backend)?];
        let mut tail = Vec::new();
        let now = self.session.tick();
        for direction in Direction::ALL {
            let state = self.directions.of(direction);
            tail.extend_from_slice(state.pending_write.left());
            if let Some(pipe) = filled_pipe(state) {
                for end in pipe.ends() {
                    fds.push(copy(end)?);
                }
            }
        }
        let told = |state: &DirectionState| DirectionRecord {
            phase: state.phase,
            prompt: state.prompt,
            silent_ms: u64::try_from(now.since(state.last_progress).as_millis()).unwrap_or(u64::MAX),
            spill: state.pending_write.len(),
            pipe: filled_pipe(state).map(Pipe::held),
        };
        let record = RelayRecord {
            to_backend: told(&self.directions.to_backend),
            to_client: told(&self.directions.to_client),
            first_end: self.first_end,
            broken: self.broken,
            settled: self.settles == Tick::NEVER,
        };
        Ok((record, tail, fds))
    }
}

/// A direction's pipe, where it has bytes.
fn filled_pipe(state: &DirectionState) -> Option<&Pipe> {
    state.pipe.as_deref().filter(|pipe| !pipe.is_empty())
}

fn copy(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use rustix::pipe::pipe;

    use super::*;

    fn state(spill: usize, pipe: Option<usize>) -> DirectionRecord {
        DirectionRecord { phase: DirectionPhase::Open, prompt: true, silent_ms: 7, spill, pipe }
    }

    fn record(to_backend: DirectionRecord, to_client: DirectionRecord) -> RelayRecord {
        RelayRecord { to_backend, to_client, first_end: None, broken: None, settled: false }
    }

    fn sockets() -> Vec<OwnedFd> {
        let (one, other) = UnixStream::pair().unwrap();
        vec![one.into(), other.into()]
    }

    /// Both sockets, and a pipe with four bytes.
    fn with_pipe() -> Vec<OwnedFd> {
        let (mut fds, (read, write)) = (sockets(), pipe().unwrap());
        std::fs::File::from(write.try_clone().unwrap()).write_all(b"held").unwrap();
        fds.extend([read, write]);
        fds
    }

    #[test]
    fn matching_record_is_restored() {
        let still = FrozenRelay::new(record(state(2, None), state(0, Some(4))), b"ab", with_pipe()).unwrap();
        assert_eq!((&still.pending.to_backend[..], still.pending.to_client.len()), (&b"ab"[..], 0));
        assert!(still.pipes.to_backend.is_none() && still.pipes.to_client.is_some());
    }

    #[test]
    fn mismatched_record_is_refused() {
        let bare = record(state(0, None), state(0, None));
        let spilled = record(state(3, None), state(0, None));
        let piped = |held| record(state(0, Some(held)), state(0, None));
        let long = vec![0; MOST_SPILLED + 1];
        for (record, tail, fds, misfit) in [
            (spilled, &b"ab"[..], sockets(), RestoreError::Tail),
            (spilled, b"abcd", sockets(), RestoreError::Tail),
            (record(state(long.len(), None), state(0, None)), &long, sockets(), RestoreError::Tail),
            (record(state(1, Some(4)), state(0, None)), b"a", with_pipe(), RestoreError::Tail),
            (piped(5), b"", with_pipe(), RestoreError::Pipe),
            (piped(4), b"", sockets(), RestoreError::Descriptors),
            (bare, b"", with_pipe(), RestoreError::Descriptors),
            (bare, b"", Vec::new(), RestoreError::Descriptors),
            (bare, b"", with_pipe().split_off(2), RestoreError::Descriptors),
        ] {
            assert_eq!(FrozenRelay::new(record, tail, fds).unwrap_err(), misfit);
        }
    }
}
