//! Datagrams of one flow that came together and leave together: a call of the kernel for many.

use std::io::IoSlice;

use super::entry::Flow;
use super::socket::{self, EACH, LONGEST, SEGMENTS, Span, TOGETHER, UdpListenSocket};
use super::table::{FlowId, FlowPath};
use crate::account::Direction;
use crate::account::udp_drops::DatagramDrop;
use crate::admission::quota::{DatagramVerdict, ExceededLimit};
use crate::clock::Moment;
use crate::proxy_protocol::{self, ParsedHeader, Transport};

/// The datagrams of one batch, to be sent to backends.
#[derive(Debug, Default)]
pub(super) struct SendRuns {
    /// In the order in which they came.
    all: Vec<(FlowId, u32, Span)>,
    pub(super) headers: DatagramHeaders,
}

/// The headers of datagrams whose pool wants each of them: where the payload lies, and where its header. In the order in which
/// the datagrams came, so by rising places.
#[derive(Debug, Default)]
pub(super) struct DatagramHeaders(Vec<(Span, Span)>);

impl DatagramHeaders {
    /// Adds a datagram's.
    pub(super) fn add(&mut self, payload: Span, header: Span) {
        self.0.push((payload, header));
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The header that came with this payload.
    fn of<'a>(&self, payload: &Span, room: &'a [u8]) -> Option<&'a [u8]> {
        let first = self.0.partition_point(|(known, _)| known.start < payload.start);
        let mut known = self.0.iter().skip(first).take_while(|(known, _)| known.start == payload.start);
        known.find(|(known, _)| known == payload).and_then(|(_, header)| room.get(header.clone()))
    }
}

impl SendRuns {
    /// Adds a flow's datagram.
    pub(super) fn add(&mut self, id: FlowId, span: Span) {
        let turn = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        self.all.push((id, turn, span));
    }

    /// Takes them flow by flow, each flow's in their order: calls `send` with a flow and its datagrams.
    pub(super) fn take_by_flow(
        &mut self,
        spans: &mut Vec<Span>,
        mut send: impl FnMut(FlowId, &mut Vec<Span>),
    ) {
        // Most batches are of one datagram.
        if self.all.len() > 1 {
            self.all.sort_unstable_by_key(|(id, turn, _)| (id.to_u64(), *turn));
        }
        for of_flow in self.all.chunk_by(|(one, ..), (other, ..)| one == other) {
            spans.clear();
            spans.extend(of_flow.iter().map(|(_, _, span)| span.clone()));
            if let Some((id, ..)) = of_flow.first() {
                send(*id, spans);
            }
        }
        self.all.clear();
    }
}

/// How many of these, from the first on, may go out in one call: all of one length, but for a shorter last one.
fn together(spans: &[Span]) -> usize {
    let each = spans.first().map_or(0, ExactSizeIterator::len);
    if each == 0 || each > EACH {
        return 1;
    }
    let most = (TOGETHER / each).min(SEGMENTS);
    let same = spans.iter().take(most).take_while(|span| span.len() == each).count();
    let has_last = same < most && spans.get(same).is_some_and(|last| (1..each).contains(&last.len()));
    same + usize::from(has_last)
}

/// The backend's host has answered with port unreachable; so many datagrams were processed before.
pub(super) struct SendRefused {
    pub(super) done: usize,
}

/// What is counted of a datagram that is beyond this limit.
pub(super) fn drop_reason(excess: ExceededLimit) -> DatagramDrop {
    match excess {
        ExceededLimit::Rate => DatagramDrop::Rate,
        ExceededLimit::Bandwidth => DatagramDrop::Bandwidth,
    }
}

impl<A> Flow<A> {
    /// Removes the datagrams that the tenant's limits reject.
    pub(super) fn apply_limits(&mut self, spans: &mut Vec<Span>, direction: Direction, now: Moment) {
        let mut is_paid = direction == Direction::ToBackend && std::mem::take(&mut self.first_is_paid);
        let (quota, metrics) = (self.permit.quota(), &mut self.log_context.metrics);
        if !quota.is_limited() {
            return;
        }
        spans.retain(|span| {
            if std::mem::take(&mut is_paid) {
                return true;
            }
            match quota.pass(direction, span.len() as u64, now) {
                DatagramVerdict::Free => true,
                DatagramVerdict::Observed(excess) => {
                    metrics.count_would_drop(direction, drop_reason(excess));
                    true
                }
                DatagramVerdict::Dropped(excess) => {
                    metrics.count_dropped(direction, drop_reason(excess), 1);
                    false
                }
            }
        });
    }

    /// Sends datagrams to the backend.
    ///
    /// # Errors
    /// The backend's host answered an earlier datagram with port unreachable.
    pub(super) fn send_to_backend(
        &mut self,
        spans: &[Span],
        room: &[u8],
        headers: &DatagramHeaders,
        may_go_together: &mut bool,
    ) -> Result<(), SendRefused> {
        // How many of the next have to go one by one.
        let (mut done, mut apart) = (0, 0_usize);
        while let Some(rest) = spans.get(done..).filter(|rest| !rest.is_empty()) {
            let goes_together = *may_go_together && apart == 0 && self.header.is_empty();
            let count = if goes_together { together(rest) } else { 1 };
            let group = rest.get(..count).unwrap_or(rest);
            let bytes: usize = group.iter().map(ExactSizeIterator::len).sum();
            let sent = self.send_group(group, room, headers).or_else(|error| {
                // It may have been said of an earlier one.
                if count == 1 && socket::is_too_long(&error) {
                    self.send_group(group, room, headers)
                } else {
                    Err(error)
                }
            });
            match sent {
                Ok(()) => {
                    self.datagrams.to_backend += count as u64;
                    self.log_context.metrics.count_datagrams(
                        Direction::ToBackend,
                        count as u64,
                        bytes as u64,
                    );
                }
                Err(error) if count > 1 && socket::is_too_long(&error) => {
                    apart = count;
                    continue;
                }
                Err(error) if count > 1 && socket::is_gso_unsupported(&error) => {
                    *may_go_together = false;
                    continue;
                }
                Err(error) if socket::is_peer_error(&error) => return Err(SendRefused { done }),
                Err(error) => {
                    self.log_context.metrics.count_dropped(
                        Direction::ToBackend,
                        socket::drop_reason(&error),
                        count as u64,
                    );
                }
            }
            apart = apart.saturating_sub(1);
            done += count;
        }
        Ok(())
    }

    fn send_group(&self, group: &[Span], room: &[u8], headers: &DatagramHeaders) -> std::io::Result<()> {
        let bytes = |span: &Span| room.get(span.clone()).unwrap_or_default();
        if let [one] = group {
            // Its own header, which may say more than the first one's did; one without a header has the first one's.
            let own = if self.header.is_empty() { None } else { headers.of(one, room).and_then(resealed) };
            let header = own.as_deref().unwrap_or(&self.header);
            if !header.is_empty() && header.len() + one.len() > LONGEST {
                return Err(rustix::io::Errno::MSGSIZE.into());
            }
            return socket::send(&self.socket, header, bytes(one));
        }
        let mut parts = [IoSlice::new(&[]); SEGMENTS];
        parts.iter_mut().zip(group).for_each(|(part, span)| *part = IoSlice::new(bytes(span)));
        let each = group.first().map_or(0, ExactSizeIterator::len);
        let each = u16::try_from(each).unwrap_or(u16::MAX);
        socket::send_segments(&self.socket, parts.get(..group.len()).unwrap_or_default(), each)
    }

    /// Sends datagrams to the client.
    pub(super) fn send_to_client(
        &mut self,
        spans: &[Span],
        room: &[u8],
        copy: &mut Vec<u8>,
        listen_socket: &UdpListenSocket,
        path: FlowPath,
    ) {
        let (mut done, mut apart) = (0, 0_usize);
        while let Some(rest) = spans.get(done..).filter(|rest| !rest.is_empty()) {
            let count = if apart == 0 && listen_socket.has_gso() { together(rest) } else { 1 };
            let group = rest.get(..count).unwrap_or(rest);
            let contents = contiguous(group, room, copy);
            let each = group.first().filter(|_| count > 1).map(ExactSizeIterator::len);
            let sent = listen_socket.send(contents, each, path.peer, path.local);
            if sent.is_err() && count > 1 && !listen_socket.has_gso() {
                continue;
            }
            match sent {
                // By itself each may be cut in pieces.
                Err(DatagramDrop::TooLong) if count > 1 => {
                    apart = count;
                    continue;
                }
                Ok(()) => {
                    self.datagrams.to_client += count as u64;
                    self.log_context.metrics.count_datagrams(
                        Direction::ToClient,
                        count as u64,
                        contents.len() as u64,
                    );
                }
                Err(drop) => self.log_context.metrics.count_dropped(Direction::ToClient, drop, count as u64),
            }
            apart = apart.saturating_sub(1);
            done += count;
        }
    }
}

/// A header as it goes to a backend. It was verified when it came.
fn resealed(header: &[u8]) -> Option<Vec<u8>> {
    let rules = proxy_protocol::ParserRules { transport: Transport::Datagram, verify_crc: false };
    match proxy_protocol::parse(header, rules) {
        ParsedHeader::Done(header, _) => Some(proxy_protocol::reseal(&header)),
        ParsedHeader::Partial(_) | ParsedHeader::Malformed(_) => None,
    }
}

/// What these hold, in one piece: as it was received, where the kernel had put it together, or else copied.
fn contiguous<'a>(group: &[Span], room: &'a [u8], copy: &'a mut Vec<u8>) -> &'a [u8] {
    let (Some(first), Some(last)) = (group.first(), group.last()) else { return &[] };
    let is_whole = group.windows(2).all(|pair| matches!(pair, [one, next] if one.end == next.start));
    if is_whole {
        return room.get(first.start..last.end).unwrap_or_default();
    }
    copy.clear();
    group.iter().filter_map(|span| room.get(span.clone())).for_each(|bytes| copy.extend_from_slice(bytes));
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(lens: &[usize]) -> Vec<Span> {
        let mut at = 0;
        let span = |len: &usize| {
            at += len;
            at - len..at
        };
        lens.iter().map(span).collect()
    }

    #[test]
    fn datagrams_of_one_length_are_segmented_together_and_a_shorter_one_ends_the_group() {
        for (lens, expected) in [
            (&[0, 0][..], 1),
            (&[5], 1),
            (&[5, 5, 5], 3),
            (&[5, 5, 3, 5], 3),
            (&[5, 6], 1),
            (&[5, 0], 1),
            (&[5, 3, 3], 2),
            (&[60_000, 5_000], 1),
            (&[40_000, 40_000], 1),
            (&[EACH, EACH, 5], 3),
            (&[EACH + 1, EACH + 1], 1),
        ] {
            assert_eq!(together(&spans(lens)), expected, "{lens:?}");
        }
        assert_eq!(together(&spans(&[10; 100])), SEGMENTS);
        assert_eq!(together(&spans(&[1_200; 100])), TOGETHER / 1_200);
    }

    #[test]
    fn contiguous_datagrams_are_not_copied() {
        let (room, mut copy) = (*b"abcdefgh", Vec::new());
        assert_eq!(contiguous(&[0..2, 2..4], &room, &mut copy), b"abcd");
        assert!(copy.is_empty());
        assert_eq!(contiguous(&[0..2, 4..6], &room, &mut copy), b"abef");
        assert_eq!(contiguous(&[], &room, &mut copy), b"");
    }

    #[test]
    fn header_is_found_by_the_place_of_its_payload() {
        let room: Vec<u8> = (0..30).collect();
        let mut headers = DatagramHeaders::default();
        headers.add(2..5, 0..2);
        // An empty one: a datagram without a header may begin where it ends.
        headers.add(8..8, 5..8);
        headers.add(12..20, 10..12);
        assert_eq!(headers.of(&(2..5), &room), Some(&[0, 1][..]));
        assert_eq!(headers.of(&(8..8), &room), Some(&[5, 6, 7][..]));
        assert_eq!(headers.of(&(12..20), &room), Some(&[10, 11][..]));
        assert_eq!([8..10, 20..22, 0..2].map(|payload| headers.of(&payload, &room)), [None; 3]);
        headers.clear();
        assert_eq!(headers.of(&(2..5), &room), None);
    }

    #[test]
    fn each_flows_datagrams_stay_in_their_order() {
        let mut runs = SendRuns::default();
        let id = FlowId::from_u64;
        for (flow, span) in [(2, 0..1), (1, 1..2), (2, 2..3), (1, 3..4)] {
            runs.add(id(flow), span);
        }
        let mut taken = Vec::new();
        runs.take_by_flow(&mut Vec::new(), |id, spans| taken.push((id.to_u64(), spans.clone())));
        assert_eq!(taken, [(1, vec![1..2, 3..4]), (2, vec![0..1, 2..3])]);
        runs.take_by_flow(&mut Vec::new(), |_, _| panic!("nothing is left"));
    }
}
