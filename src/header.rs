//! The second step: exactly one PROXY header is read, and nothing that follows it is touched.

use std::future::{Future, poll_fn};
use std::io::{self, Read};
use std::net::TcpStream as Fresh;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpStream;

use crate::account::Counter64;
use crate::account::session_metrics::ListenerCounters;
use crate::addr::{ClientAddr, DestinationAddr, PeerAddr};
use crate::admission::pending::{PendingSlot, PendingSlots, PendingState};
use crate::clock;
use crate::clock::wheel::TickSpan;
use crate::fault::{self, Syscall};
use crate::id::EndpointClaim;
use crate::outcome::{EndedAt, EndedBy, Outcome, Reason};
use crate::proxy_protocol::{self, HeaderBuilder, HeaderCommand, ParsedHeader};
use crate::session_context::{Cancelled, SessionContext};

/// The most that is read before a backend is connected: a header, and the start of what follows it.
pub(crate) const FIRST_READ: usize = 16 * 1024;

/// A client whose header has been read.
#[derive(Debug)]
pub(crate) struct IdentifiedClient {
    /// The connection.
    pub connection: ClientSocket,
    /// The client, as the header states it.
    pub address: Option<ClientAddr>,
    /// On whose endpoint it came.
    pub endpoint: EndpointClaim,
    /// What was read: the header, then the payload's first bytes.
    first: Vec<u8>,
    header_len: usize,
    rules: proxy_protocol::ParserRules,
}

/// A client's socket: registered with the worker only once something has to be waited for, so that a connection
/// that is rejected at its first bytes costs no epoll call.
#[derive(Debug)]
pub(crate) enum ClientSocket {
    /// As it was accepted.
    Fresh(Fresh),
    /// Known to the worker's poll.
    Registered(TcpStream),
    /// It could not be registered, and is closed.
    Closed,
}

impl ClientSocket {
    /// The socket, registered with the worker's poll from now on.
    ///
    /// # Errors
    /// Where the kernel has no room for it.
    pub(crate) fn registered(&mut self) -> io::Result<&TcpStream> {
        if let Self::Fresh(_) = self
            && let Self::Fresh(socket) = std::mem::replace(self, Self::Closed)
        {
            fault::at(Syscall::Register)?;
            *self = Self::Registered(TcpStream::from_std(socket)?);
        }
        match self {
            Self::Registered(socket) => Ok(socket),
            Self::Fresh(_) | Self::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The socket itself, registered.
    ///
    /// # Errors
    /// Where the kernel has no room for it.
    pub(crate) fn into_registered(mut self) -> io::Result<TcpStream> {
        self.registered()?;
        match self {
            Self::Registered(socket) => Ok(socket),
            Self::Fresh(_) | Self::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Makes the coming close a reset.
    pub(crate) fn reset_on_close(&self) {
        let set = match self {
            Self::Fresh(socket) => socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)),
            Self::Registered(socket) => socket.set_zero_linger(),
            Self::Closed => Ok(()),
        };
        // The only error is that the connection is closed already; then there is nothing to do.
        set.unwrap_or_default();
    }

    /// The pending error of the socket (`SO_ERROR`).
    #[must_use]
    pub(crate) fn take_error(&self) -> Option<io::Error> {
        let error = match self {
            Self::Fresh(socket) => socket.take_error(),
            Self::Registered(socket) => socket.take_error(),
            Self::Closed => return None,
        };
        error.ok().flatten()
    }

    fn destination(&self) -> Option<DestinationAddr> {
        let address = match self {
            Self::Fresh(socket) => socket.local_addr(),
            Self::Registered(socket) => socket.local_addr(),
            Self::Closed => return None,
        };
        address.ok().map(DestinationAddr)
    }

    fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        fault::at(Syscall::Receive)?;
        match self {
            Self::Fresh(socket) => (&mut &*socket).read(room),
            Self::Registered(socket) => socket.try_read(room),
            Self::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl IdentifiedClient {
    /// A client of a listener without headers: its address is the socket's peer.
    #[must_use]
    pub(crate) fn without_header(socket: Fresh, peer: PeerAddr) -> Self {
        Self {
            connection: ClientSocket::Fresh(socket),
            address: Some(ClientAddr(peer.0)),
            endpoint: EndpointClaim::Absent,
            first: Vec::new(),
            header_len: 0,
            rules: proxy_protocol::ParserRules {
                transport: proxy_protocol::Transport::Stream,
                verify_crc: false,
            },
        }
    }

    /// The bytes of payload that came with the header.
    #[must_use]
    pub(crate) fn payload_len(&self) -> usize {
        self.first.len().saturating_sub(self.header_len)
    }

    /// The connection, and what goes to the backend first: the payload that came with the header and, where
    /// `send_proxy` holds, the header in front of it, its checksum computed anew. A client that sent none gets one
    /// made of its socket's addresses. What was read ends here: a session must not keep it for its whole life.
    #[must_use]
    pub(crate) fn into_parts(mut self, send_proxy: bool) -> (ClientSocket, Vec<u8>) {
        let header_len = self.header_len.min(self.first.len());
        if send_proxy {
            let header = self.header();
            self.first.splice(..header_len, header);
        } else {
            self.first.drain(..header_len);
        }
        (self.connection, self.first)
    }

    fn header(&self) -> Vec<u8> {
        if let ParsedHeader::Done(header, _) = proxy_protocol::parse(&self.first, self.rules) {
            return proxy_protocol::reseal(&header);
        }
        let builder = match (self.address, self.connection.destination()) {
            (Some(client), Some(destination)) => {
                HeaderBuilder::proxy(self.rules.transport, client, destination)
            }
            _ => HeaderBuilder::unspecified(),
        };
        // A header of addresses alone is far from its bound.
        builder.crc().map(HeaderBuilder::build).unwrap_or_default()
    }
}

/// The header rules of a listener.
#[derive(Clone, Debug)]
pub struct HeaderRules {
    /// Whether a checksum has to match.
    pub verify_crc: bool,
    /// From accept to a whole header.
    pub timeout: TickSpan,
    /// Sessions that have not yet sent a whole header.
    pub pending: Arc<PendingSlots>,
}

/// Counts a session as pending until dropped.
struct PendingGuard<'a> {
    gauge: &'a Counter64,
    slot: PendingSlot,
}

impl<'a> PendingGuard<'a> {
    fn enter(places: &Arc<PendingSlots>, counters: &'a ListenerCounters) -> Self {
        counters.pending.add(1);
        Self { gauge: &counters.pending, slot: places.enter(clock::now()) }
    }
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.gauge.sub(1);
    }
}

/// Reads the header of a fresh connection.
///
/// Most headers come with the client's first payload, and that is there when the connection is accepted: one
/// `recv`, no wait, no buffer of the session's own. The others wait, registered, and are bounded in number and time.
///
/// # Errors
/// The outcome, where there is no client to serve. A peer that had sent something is reset, and learns that it was
/// not heard; the others see a plain close.
pub(crate) async fn read(
    socket: Fresh,
    rules: &HeaderRules,
    session: &mut SessionContext,
) -> Result<IdentifiedClient, Outcome> {
    let mut reading = HeaderReader {
        connection: ClientSocket::Fresh(socket),
        first: Vec::new(),
        rules: proxy_protocol::ParserRules {
            transport: proxy_protocol::Transport::Stream,
            verify_crc: rules.verify_crc,
        },
    };
    match reading.whole_header(rules, session).await {
        Ok(found) => Ok(reading.into_client(&found)),
        Err(outcome) => {
            if outcome.by == EndedBy::Proxy && !reading.first.is_empty() {
                reading.connection.reset_on_close();
            }
            Err(outcome)
        }
    }
}

/// A connection whose header is being read.
struct HeaderReader {
    connection: ClientSocket,
    first: Vec<u8>,
    rules: proxy_protocol::ParserRules,
}

/// The fields of a client's header.
struct HeaderFields {
    address: Option<ClientAddr>,
    endpoint: EndpointClaim,
    header_len: usize,
}

impl HeaderReader {
    async fn whole_header(
        &mut self,
        rules: &HeaderRules,
        session: &mut SessionContext,
    ) -> Result<HeaderFields, Outcome> {
        if let Some(found) = self.receive(session)? {
            return Ok(found);
        }
        let counters = session.metrics.listener();
        let pending = PendingGuard::enter(&rules.pending, &counters);
        session.wake_at(session.tick().after(rules.timeout));
        loop {
            self.readable(&pending.slot, session).await?;
            if let Some(found) = self.receive(session)? {
                return Ok(found);
            }
        }
    }

    /// Waits until there is more to read, as long as it has its place.
    async fn readable(&mut self, place: &PendingSlot, session: &SessionContext) -> Result<(), Outcome> {
        let reject = |why| Outcome::reject(EndedAt::Header, why);
        let socket = self.connection.registered().map_err(|_| reject(Reason::Shortage))?;
        let mut readable = pin!(socket.readable());
        // Bytes that have arrived are read first, even if the pending slot was lost.
        let step = poll_fn(|context| match readable.as_mut().poll(context) {
            Poll::Ready(ready) => Poll::Ready(ready.map_err(|_| reject(Reason::Shortage))),
            Poll::Pending => match place.poll(context.waker()) {
                PendingState::Waits => Poll::Pending,
                PendingState::Displaced => Poll::Ready(Err(reject(Reason::PendingLimit))),
                PendingState::Expired => Poll::Ready(Err(reject(Reason::HeaderTimeout))),
            },
        });
        match session.watch(step).await {
            Ok(ready) => ready,
            Err(Cancelled::Expired) => Err(Outcome::reject(EndedAt::Header, Reason::HeaderTimeout)),
            Err(Cancelled::Drained) => Err(Outcome::reject(EndedAt::Header, Reason::Drained)),
        }
    }

    /// Takes what is there; `None` where the header is not whole yet.
    fn receive(&mut self, session: &SessionContext) -> Result<Option<HeaderFields>, Outcome> {
        let mut scratch = session.worker().scratch.borrow_mut();
        let room = scratch.get_mut(..FIRST_READ).unwrap_or_default();
        match self.connection.receive(room) {
            Ok(0) => Err(self.ended(Reason::HeaderTruncated)),
            Ok(count) => {
                self.first.extend_from_slice(room.get(..count).unwrap_or_default());
                self.examine()
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(self.ended(Reason::Unanswered)),
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOBUFS | Errno::NOMEM)) => {
                Err(Outcome::reject(EndedAt::Header, Reason::Shortage))
            }
            Err(_) => Err(self.ended(Reason::Reset)),
        }
    }

    /// The client ended it. Before its first byte that is a TCP health check, whether it closes or resets.
    fn ended(&self, why: Reason) -> Outcome {
        let why = if self.first.is_empty() { Reason::ZeroBytes } else { why };
        Outcome::new(EndedBy::Client, EndedAt::Header, why)
    }

    fn examine(&self) -> Result<Option<HeaderFields>, Outcome> {
        match proxy_protocol::parse(&self.first, self.rules) {
            ParsedHeader::Partial(_) => Ok(None),
            ParsedHeader::Malformed(reason) => Err(Outcome::reject(EndedAt::Header, reason.into())),
            ParsedHeader::Done(header, _) if header.command() == HeaderCommand::Local => {
                Err(Outcome::new(EndedBy::Client, EndedAt::Header, Reason::Local))
            }
            ParsedHeader::Done(header, header_len) => Ok(Some(HeaderFields {
                address: header.client(),
                endpoint: EndpointClaim::from_tlv(header.endpoint()),
                header_len,
            })),
        }
    }

    fn into_client(self, found: &HeaderFields) -> IdentifiedClient {
        IdentifiedClient {
            connection: self.connection,
            address: found.address,
            endpoint: found.endpoint,
            first: self.first,
            header_len: found.header_len,
            rules: self.rules,
        }
    }
}

/// The optional header at the start of a connection: of a health check, or at a test backend.
#[derive(Debug, Default)]
#[cfg_attr(not(feature = "lab"), allow(dead_code, reason = "only test backends look at client and endpoint"))]
pub(crate) struct OptionalHeader {
    /// The client that a header names.
    pub client: Option<ClientAddr>,
    /// The endpoint that it names.
    pub endpoint: EndpointClaim,
    /// What was read beyond it.
    pub rest: Vec<u8>,
}

/// Reads a header where there is one, and nothing but what came with it. Its checksum is not looked at: nothing
/// depends on what it says. The caller bounds the time.
///
/// # Errors
/// What the socket says.
pub(crate) async fn read_optional(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<OptionalHeader> {
    let rules =
        proxy_protocol::ParserRules { transport: proxy_protocol::Transport::Stream, verify_crc: false };
    let mut first = Vec::with_capacity(512);
    loop {
        let whole = match proxy_protocol::parse(&first, rules) {
            ParsedHeader::Done(header, len) => {
                Some((header.client(), EndpointClaim::from_tlv(header.endpoint()), len))
            }
            ParsedHeader::Partial(_) => None,
            ParsedHeader::Malformed(_) => {
                return Ok(OptionalHeader { rest: first, ..OptionalHeader::default() });
            }
        };
        if let Some((client, endpoint, len)) = whole {
            return Ok(OptionalHeader { client, endpoint, rest: first.split_off(len) });
        }
        if socket.read_buf(&mut first).await? == 0 {
            return Ok(OptionalHeader { rest: first, ..OptionalHeader::default() });
        }
    }
}
