//! The records of live sessions and flows, as they go from one process to the other.
//!
//! A record is a line of JSON followed by the bytes that are held. A process that does not know the record's version leaves
//! the session where it is.

use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::frozen::{Departure, Frozen, ThawError, TransferReply};
use crate::session::freeze::FrozenSession;

/// The version of all records. A record that means something else than before has another one; one that only says more
/// has not.
pub const VERSION: u32 = 1;

/// The bytes that a record's line may have.
pub const MOST_TOLD: usize = 64 * 1024;

/// A session or flow in transfer: its record, and its descriptors in the record's order.
#[derive(Debug)]
pub struct Transfer {
    /// What is told of it, and the bytes that it holds.
    pub record: Vec<u8>,
    /// Its sockets, and its pipes where they hold bytes.
    pub fds: Vec<OwnedFd>,
}

/// A transfer that waits for its reply; dropping the sender of the reply means [`TransferReply::Stays`].
#[derive(Debug)]
pub struct PendingTransfer {
    /// What leaves.
    pub transfer: Transfer,
    /// Where the answer goes.
    pub answer: oneshot::Sender<TransferReply>,
}

impl PendingTransfer {
    /// Packs a session or flow that leaves.
    ///
    /// # Errors
    /// Where more is told than may be.
    pub fn pack<R: Serialize>(kind: TransferKind, departure: Departure<R>) -> Result<Self, TransferError> {
        Ok(Self { transfer: Transfer::pack(kind, departure.frozen)?, answer: departure.reply })
    }
}

/// What is transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferKind {
    /// A TCP session.
    Session,
    /// A UDP flow.
    Flow,
}

/// Why a transfer is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Its record is none.
    #[error("the record is malformed: {0}")]
    Malformed(String),
    /// Its record is of another version.
    #[error("the record's version is {0}, and only {VERSION} is known")]
    Version(u32),
    /// There is something else in it than was asked for.
    #[error("the transfer is of another kind")]
    Kind,
    /// It cannot go on here.
    #[error(transparent)]
    Thaw(#[from] ThawError),
}

/// The fields that every version's record starts with.
#[derive(Serialize, Deserialize)]
struct RecordHeading {
    version: u32,
    kind: TransferKind,
}

/// The record's whole line.
#[derive(Serialize, Deserialize)]
struct VersionedRecord<T> {
    version: u32,
    kind: TransferKind,
    told: T,
}

fn malformed(error: &impl ToString) -> TransferError {
    TransferError::Malformed(error.to_string())
}

impl Transfer {
    /// Packs a session or flow at rest.
    ///
    /// # Errors
    /// Where more is told than may be.
    pub fn pack<R: Serialize>(kind: TransferKind, frozen: Frozen<R>) -> Result<Self, TransferError> {
        let versioned = VersionedRecord { version: VERSION, kind, told: &frozen.record };
        let mut record = serde_json::to_vec(&versioned).map_err(|error| malformed(&error))?;
        if record.len() > MOST_TOLD {
            return Err(malformed(&"too long"));
        }
        record.push(b'\n');
        record.extend_from_slice(&frozen.held);
        Ok(Self { record, fds: frozen.fds })
    }

    /// The record's line, and the bytes behind it.
    fn parts(&self) -> Result<(&[u8], &[u8]), TransferError> {
        let within = self.record.iter().take(MOST_TOLD + 1);
        let end = within.copied().position(|byte| byte == b'\n').ok_or_else(|| malformed(&"no end"))?;
        let (line, tail) = self.record.split_at_checked(end).unwrap_or_default();
        Ok((line, tail.get(1..).unwrap_or_default()))
    }

    /// What is in it.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub fn kind(&self) -> Result<TransferKind, TransferError> {
        let (line, _) = self.parts()?;
        let heading: RecordHeading = serde_json::from_slice(line).map_err(|error| malformed(&error))?;
        if heading.version == VERSION {
            Ok(heading.kind)
        } else {
            Err(TransferError::Version(heading.version))
        }
    }

    /// What is in it.
    ///
    /// # Errors
    /// Where it is of another kind or version, or cannot be read.
    pub fn read<R: DeserializeOwned>(self, kind: TransferKind) -> Result<Frozen<R>, TransferError> {
        if self.kind()? != kind {
            return Err(TransferError::Kind);
        }
        let (line, held) = self.parts()?;
        let versioned: VersionedRecord<R> =
            serde_json::from_slice(line).map_err(|error| malformed(&error))?;
        Ok(Frozen { record: versioned.told, held: held.to_vec(), fds: self.fds })
    }

    /// The session in it. That is unchanged: only the holder of this may confirm that it is taken.
    ///
    /// # Errors
    /// Where it cannot be read, or cannot go on here.
    pub fn session(self) -> Result<Box<FrozenSession>, TransferError> {
        Ok(FrozenSession::new(self.read(TransferKind::Session)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(record: &[u8]) -> Transfer {
        Transfer { record: record.to_vec(), fds: Vec::new() }
    }

    #[test]
    fn transfer_is_read_back_with_any_bytes() {
        let record = vec!["a\nb".to_owned(), "ü".to_owned()];
        let packed = || {
            let frozen = Frozen { record: record.clone(), held: b"\n{}\n".to_vec(), fds: Vec::new() };
            Transfer::pack(TransferKind::Session, frozen).unwrap()
        };
        assert_eq!(packed().kind(), Ok(TransferKind::Session));
        let read = packed().read::<Vec<String>>(TransferKind::Session).unwrap();
        assert_eq!((read.record, &read.held[..]), (record.clone(), &b"\n{}\n"[..]));
        assert_eq!(packed().read::<Vec<String>>(TransferKind::Flow).unwrap_err(), TransferError::Kind);
    }

    #[test]
    fn malformed_transfer_is_refused() {
        let newer = br#"{"version":2,"kind":"stream","told":{}}"#;
        assert!(matches!(transfer(newer).kind(), Err(TransferError::Malformed(_))), "no line's end");
        for (record, is_version) in [
            (&b"{\"version\":2,\"kind\":\"session\",\"told\":7}\n"[..], true),
            (b"{\"version\":0,\"kind\":\"session\"}\n", true),
            (b"{\"version\":1,\"kind\":\"session\"}\n", false),
            (b"{\"version\":1,\"kind\":\"session\",\"told\":\"7\"}\n", false),
            (b"{}\n", false),
            (b"\n", false),
            (b"", false),
        ] {
            let refused = transfer(record).read::<u32>(TransferKind::Session).unwrap_err();
            assert_eq!(matches!(refused, TransferError::Version(_)), is_version, "{refused}");
        }
        let more = b"{\"version\":1,\"kind\":\"session\",\"told\":7,\"more\":1}\n";
        let read = transfer(more).read::<u32>(TransferKind::Session).unwrap();
        assert_eq!((read.record, read.held.len()), (7, 0), "one that only says more is known");
    }

    #[test]
    fn transfer_record_has_a_length_bound() {
        let long = "x".repeat(MOST_TOLD);
        let frozen = Frozen { record: long.clone(), held: Vec::new(), fds: Vec::new() };
        assert!(Transfer::pack(TransferKind::Flow, frozen).is_err());
        let record = [long.as_bytes(), b"\n"].concat();
        assert!(matches!(transfer(&record).kind(), Err(TransferError::Malformed(_))));
    }
}
