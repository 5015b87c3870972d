//! One DNS server, and one query to it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hickory_resolver::config::NameServerConfig;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::{DnsHandle, FirstAnswer};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{DnsRequestOptions, DnsResponse, Message, Query, ResponseCode};
use hickory_resolver::{NameServerPool, PoolContext};
use tokio::time::sleep;

use crate::clock;

/// So long a server that does not understand EDNS is asked without it, in seconds; then it is tried again.
const WITHOUT_EDNS: u64 = 600;

/// Of the EDNS state: the server has answered a question with EDNS.
const SPEAKS: u64 = u64::MAX;

/// A DNS server.
pub(super) struct DnsServer {
    config: NameServerConfig,
    context: Arc<PoolContext>,
    /// [`SPEAKS`]; or until when it is asked without EDNS, in seconds since 1970; 0 where nothing is known.
    edns: AtomicU64,
}

impl DnsServer {
    pub(super) fn new(config: NameServerConfig, context: &Arc<PoolContext>) -> Self {
        Self { config, context: Arc::clone(context), edns: AtomicU64::new(0) }
    }

    /// Asks within about `time`: with EDNS, and without it where the server does not understand that (RFC 6891, section 7).
    ///
    /// Some of these servers answer without the question, which is no answer to anything, or not at all. A server of which it is
    /// not known that it understands EDNS is therefore asked without it too when half the time is over.
    pub(super) async fn ask(&self, query: Query, time: Duration) -> Result<Message, NetError> {
        if !self.context.options.edns0 {
            return self.send(query, false).await;
        }
        let known = self.edns.load(Ordering::Relaxed);
        if known != SPEAKS && clock::unix().as_secs() < known {
            return self.send(query, false).await;
        }
        let mut with = pin!(self.send(query.clone(), true));
        let answer = tokio::select! {
            answer = &mut with => answer,
            () = sleep(time / 2), if known != SPEAKS => {
                let without = self.without(query.clone());
                return tokio::select! {
                    answer = with => if is_refusal_of_edns(&answer) { self.without(query).await } else { answer },
                    answer = without => answer,
                };
            }
        };
        if is_refusal_of_edns(&answer) {
            return self.without(query).await;
        }
        if is_answer(&answer) {
            self.edns.store(SPEAKS, Ordering::Relaxed);
        }
        answer
    }

    /// Asks without EDNS, and remembers it where that is answered.
    async fn without(&self, query: Query) -> Result<Message, NetError> {
        let answer = self.send(query, false).await;
        if is_answer(&answer) {
            self.edns.store(clock::unix().as_secs() + WITHOUT_EDNS, Ordering::Relaxed);
        }
        answer
    }

    /// Sends one question, over connections of its own: by UDP, and where the answer is truncated by TCP. On a connection that
    /// questions share, a server that answers in order lets those time out that stand behind a slow one.
    async fn send(&self, query: Query, edns: bool) -> Result<Message, NetError> {
        let mut options = DnsRequestOptions::default();
        options.use_edns = edns;
        let servers = [self.config.clone()];
        let pool =
            NameServerPool::from_config(servers, Arc::clone(&self.context), TokioRuntimeProvider::new());
        pool.lookup(query, options).first_answer().await.map(DnsResponse::into_message)
    }
}

/// Whether it may be EDNS that the server does not understand.
fn is_refusal_of_edns(answer: &Result<Message, NetError>) -> bool {
    matches!(
        answer,
        Err(NetError::Dns(DnsError::ResponseCode(
            // BADSIG has the number of BADVERS, and no question is signed here.
            ResponseCode::FormErr | ResponseCode::NotImp | ResponseCode::BADVERS | ResponseCode::BADSIG
        )))
    )
}

/// Whether the server knows what was asked: that there is such a name, or none.
fn is_answer(answer: &Result<Message, NetError>) -> bool {
    matches!(answer, Ok(_) | Err(NetError::Dns(DnsError::NoRecordsFound(_))))
}
