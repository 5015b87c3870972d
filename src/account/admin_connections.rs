//! Connections of the health port, the admin address and the admin socket, counted by how they ended.

use std::sync::atomic::{AtomicU64, Ordering};

/// The socket at which a connection was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminEndpoint {
    /// `[health] bind`
    Health,
    /// `[admin] bind`
    Admin,
    /// `[admin] socket`
    AdminSocket,
}

impl AdminEndpoint {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Health, Self::Admin, Self::AdminSocket];

    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Admin => "admin",
            Self::AdminSocket => "admin_socket",
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminConnectionEnd {
    /// At least one request was answered, and nothing was under way.
    Answered,
    /// The peer ended it, or sent what is no HTTP, without an answer.
    Closed,
    /// All places were taken by connections that made progress since: it gave way to a newer one.
    Displaced,
    /// Its first byte did not come in time.
    FirstByteTimeout,
    /// A request did not come as a whole in time.
    RequestTimeout,
    /// An answer was not made in time.
    AnswerTimeout,
    /// The peer did not read its answer in time.
    SendTimeout,
}

impl AdminConnectionEnd {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Answered,
        Self::Closed,
        Self::Displaced,
        Self::FirstByteTimeout,
        Self::RequestTimeout,
        Self::AnswerTimeout,
        Self::SendTimeout,
    ];

    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Closed => "closed",
            Self::Displaced => "displaced",
            Self::FirstByteTimeout => "first_byte_timeout",
            Self::RequestTimeout => "request_timeout",
            Self::AnswerTimeout => "answer_timeout",
            Self::SendTimeout => "send_timeout",
        }
    }
}

/// The counts of the process.
#[derive(Debug, Default)]
pub struct AdminConnections {
    open: [AtomicU64; AdminEndpoint::ALL.len()],
    ended: [[AtomicU64; AdminConnectionEnd::ALL.len()]; AdminEndpoint::ALL.len()],
}

impl AdminConnections {
    /// Counts an accepted connection.
    pub fn begin(&self, endpoint: AdminEndpoint) {
        if let Some(open) = self.open.get(endpoint as usize) {
            open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts the end of a connection.
    pub fn end(&self, endpoint: AdminEndpoint, ended: AdminConnectionEnd) {
        if let Some(open) = self.open.get(endpoint as usize) {
            open.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(count) = self.ended.get(endpoint as usize).and_then(|counts| counts.get(ended as usize)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The open connections.
    pub fn open(&self) -> impl Iterator<Item = (AdminEndpoint, u64)> + '_ {
        AdminEndpoint::ALL.into_iter().zip(self.open.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// The ended connections, by result.
    pub fn ended(&self) -> impl Iterator<Item = (AdminEndpoint, AdminConnectionEnd, u64)> + '_ {
        AdminEndpoint::ALL.into_iter().zip(&self.ended).flat_map(|(endpoint, counts)| {
            let counts = AdminConnectionEnd::ALL.into_iter().zip(counts);
            counts.map(move |(ended, count)| (endpoint, ended, count.load(Ordering::Relaxed)))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_end_has_its_own_label_and_counter() {
        let connections = AdminConnections::default();
        connections.begin(AdminEndpoint::Admin);
        connections.begin(AdminEndpoint::Health);
        connections.end(AdminEndpoint::Health, AdminConnectionEnd::Displaced);
        let open: Vec<_> = connections.open().map(|(endpoint, count)| (endpoint.as_str(), count)).collect();
        assert_eq!(open, [("health", 0), ("admin", 1), ("admin_socket", 0)]);
        let counted: Vec<_> = connections.ended().filter(|(.., count)| *count > 0).collect();
        assert_eq!(counted, [(AdminEndpoint::Health, AdminConnectionEnd::Displaced, 1)]);
        assert_eq!(
            AdminConnectionEnd::ALL
                .map(AdminConnectionEnd::as_str)
                .into_iter()
                .collect::<BTreeSet<_>>()
                .len(),
            AdminConnectionEnd::ALL.len()
        );
    }
}
