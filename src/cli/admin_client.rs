//! Requests to the admin address or the admin socket of a running process.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode, Uri, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// What a question may take: a configuration of 100,000 tenants is some 50 MiB of JSON.
const LIMIT: Duration = Duration::from_secs(60);

/// The most that is read of an answer.
const LONGEST: usize = 1 << 30;

/// The admin address or the admin socket of a running process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AdminTarget {
    /// The admin address: a host, perhaps with a port.
    Address {
        /// A name or an address; IPv6 in brackets.
        host: String,
        port: u16,
    },
    /// The admin socket.
    Socket(PathBuf),
}

impl FromStr for AdminTarget {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "must be http://HOST:PORT, of [admin] bind, or unix:PATH, of [admin] socket";
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Socket(PathBuf::from(path)));
        }
        let uri: Uri = text.parse().map_err(|_| WANTED)?;
        let is_plain =
            uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/") && uri.query().is_none();
        let authority = uri.authority().filter(|_| is_plain).ok_or(WANTED)?;
        Ok(Self::Address { host: authority.host().to_owned(), port: authority.port_u16().unwrap_or(80) })
    }
}

impl fmt::Display for AdminTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { host, port } => write!(f, "http://{host}:{port}"),
            Self::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl AdminTarget {
    /// The page at a path.
    ///
    /// # Errors
    /// Why there is none, for the operator to read.
    pub(super) async fn page(&self, path: &str) -> Result<Bytes, String> {
        let late = |_| Err(format!("no answer within {} s", LIMIT.as_secs()));
        let page = timeout(LIMIT, self.asked(path)).await.unwrap_or_else(late);
        page.map_err(|error| format!("cannot reach {self}: {error}"))
    }

    async fn asked(&self, path: &str) -> Result<Bytes, String> {
        match self {
            Self::Address { host, port } => {
                let name = host.trim_start_matches('[').trim_end_matches(']');
                let stream = TcpStream::connect((name, *port)).await.map_err(|error| error.to_string())?;
                get(stream, host, path).await
            }
            Self::Socket(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(|error| error.to_string())?;
                get(stream, "admin", path).await
            }
        }
    }
}

async fn get<S>(stream: S, host: &str, path: &str) -> Result<Bytes, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let said = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(said)?;
    // The connection ends with the response.
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, host).body(Body::empty());
    let request = request.map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(said)?;
    let status = answer.status();
    let body = axum::body::to_bytes(Body::new(answer.into_body()), LONGEST).await;
    connection.abort();
    match status {
        StatusCode::OK => body.map_err(|error| error.to_string()),
        StatusCode::NOT_FOUND => Err(format!("{status}: is it a vestibule of this version?")),
        _ => Err(status.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_target_is_an_address_or_a_path() {
        let address = |host: &str, port| Ok(AdminTarget::Address { host: host.to_owned(), port });
        for (text, place) in [
            ("http://127.0.0.1:9900", address("127.0.0.1", 9900)),
            ("http://[::1]:9900/", address("[::1]", 9900)),
            ("http://proxy.example", address("proxy.example", 80)),
            ("unix:/run/vestibule/admin.sock", Ok(AdminTarget::Socket("/run/vestibule/admin.sock".into()))),
        ] {
            assert_eq!(AdminTarget::from_str(text), place, "{text}");
        }
        for text in ["127.0.0.1:9900", "https://127.0.0.1:9900", "http://127.0.0.1:9900/status", "unix:", ""]
        {
            assert!(AdminTarget::from_str(text).is_err(), "{text}");
        }
    }
}
