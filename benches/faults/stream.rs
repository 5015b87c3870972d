//! Streams that say of each of their blocks whose it is: its tenant, its session, its direction, its number and a checksum.
//! What arrives can be checked to the byte, however it was cut.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::yield_now;

/// The bytes of a block.
pub(crate) const BLOCK: usize = 4096;

/// The bytes of what stands in front of each.
pub(crate) const HEAD: usize = 40;

/// Blocks that are written at once.
const AT_ONCE: u64 = 64;

/// Whose a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) tenant: u32,
    pub(crate) session: u64,
    /// Bytes that the client sends, and that the backend answers with.
    pub(crate) ask: u64,
    pub(crate) answer: u64,
}

/// Where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toward {
    Backend,
    Client,
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With its last byte.
    Whole,
    /// Before, with a reset, after so many bytes.
    Cut(u64),
    /// Before, as if it had been whole, after so many bytes.
    Feigned(u64),
}

impl Head {
    /// The bytes of the whole stream.
    pub(crate) fn total(self, toward: Toward) -> u64 {
        match toward {
            Toward::Backend => self.ask,
            Toward::Client => self.answer,
        }
    }

    /// One block.
    pub(crate) fn block(self, toward: Toward, number: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let seed = u64::from(self.tenant) << 48 ^ self.session << 16 ^ number << 1 ^ toward as u64;
        let (tenant, way) = (self.tenant.to_le_bytes(), (toward as u32).to_le_bytes());
        let numbers = [self.session, self.ask, self.answer, number].map(u64::to_le_bytes);
        let (head, rest) = block.split_at_mut(HEAD);
        head.copy_from_slice(&[&tenant[..], &way, numbers.as_flattened()].concat());
        let (filled, sum) = rest.split_at_mut(BLOCK - HEAD - 4);
        fastrand::Rng::with_seed(seed).fill(filled);
        sum.copy_from_slice(&(crc32c::crc32c(head) ^ crc32c::crc32c(filled)).to_le_bytes());
        block
    }

    /// What stands in front of a block, with the block's number; `None` where it goes the other way, or is too short.
    pub(crate) fn read(bytes: &[u8], toward: Toward) -> Option<(Self, u64)> {
        let (tenant, rest) = bytes.split_first_chunk()?;
        let (way, rest) = rest.split_first_chunk()?;
        let (session, rest) = rest.split_first_chunk()?;
        let (ask, rest) = rest.split_first_chunk()?;
        let (answer, rest) = rest.split_first_chunk()?;
        let number = u64::from_le_bytes(*rest.first_chunk()?);
        let head = Self {
            tenant: u32::from_le_bytes(*tenant),
            session: u64::from_le_bytes(*session),
            ask: u64::from_le_bytes(*ask),
            answer: u64::from_le_bytes(*answer),
        };
        (u32::from_le_bytes(*way) == toward as u32).then_some((head, number))
    }

    /// Writes the whole stream, and ends it.
    pub(crate) async fn send(self, toward: Toward, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let total = self.total(toward);
        let mut sent = 0;
        let mut bytes = Vec::new();
        while sent < total {
            bytes.clear();
            let first = sent / BLOCK as u64;
            let blocks = (total - sent).div_ceil(BLOCK as u64).min(AT_ONCE);
            (first..first + blocks).for_each(|number| bytes.extend(self.block(toward, number)));
            bytes.truncate(usize::try_from(total - sent).unwrap_or(usize::MAX));
            to.write_all(&bytes).await?;
            sent += bytes.len() as u64;
            // To make bytes and to check them takes longer than to send them: the others have their turn.
            yield_now().await;
        }
        to.shutdown().await
    }

    /// Reads the stream to its end; `before` has been read already. Says what is wrong with it.
    pub(crate) async fn receive(
        self,
        toward: Toward,
        before: &[u8],
        from: &mut (impl AsyncRead + Unpin),
    ) -> Result<End, String> {
        let total = self.total(toward);
        let mut count = 0;
        self.check(toward, &mut count, before)?;
        let mut room = vec![0; 64 * 1024];
        loop {
            match from.read(&mut room).await {
                Ok(0) if count == total => return Ok(End::Whole),
                Ok(0) => return Ok(End::Feigned(count)),
                Ok(read) => {
                    self.check(toward, &mut count, room.get(..read).unwrap_or_default())?;
                    yield_now().await;
                }
                Err(_) => return Ok(End::Cut(count)),
            }
        }
    }

    /// How a stream ended, given how the other direction's sending over the same connection did; its bytes, where it was not
    /// whole. The kernel reports a reset once, to the first write or read: after the writer, the reader sees a plain end.
    pub(crate) fn judge(
        self,
        toward: Toward,
        end: &End,
        sent: &io::Result<()>,
    ) -> Result<Option<u64>, String> {
        match end {
            End::Whole => Ok(None),
            End::Cut(count) => Ok(Some(*count)),
            // Turned away before it was heard, or ended before anybody spoke.
            End::Feigned(count) if *count == 0 || sent.is_err() => Ok(Some(*count)),
            End::Feigned(count) => Err(format!("{self:?}, {toward:?}: a plain end after {count} bytes")),
        }
    }

    /// Compares what has come with what comes next.
    fn check(self, toward: Toward, count: &mut u64, mut bytes: &[u8]) -> Result<(), String> {
        if *count + bytes.len() as u64 > self.total(toward) {
            return Err(format!("{self:?}, {toward:?}: more than was sent"));
        }
        while !bytes.is_empty() {
            let at = usize::try_from(*count % BLOCK as u64).unwrap_or(0);
            let block = self.block(toward, *count / BLOCK as u64);
            let expected = block.get(at..).unwrap_or_default();
            let len = expected.len().min(bytes.len());
            let (part, rest) = bytes.split_at(len);
            if Some(part) != expected.get(..len) {
                let found = Self::read(part, toward);
                return Err(format!(
                    "{self:?}, {toward:?}: not what was sent after {count} bytes; {found:?} perhaps"
                ));
            }
            *count += len as u64;
            bytes = rest;
        }
        Ok(())
    }
}
