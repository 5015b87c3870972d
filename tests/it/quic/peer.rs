//! QUIC on both sides of the proxy: servers that say who they are and echo, and clients that check every byte.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, ServerConfig,
    TransportConfig,
};
use vestibule::lab::backend::pattern;

/// What is written or read at once.
const CHUNK: usize = 64 * 1024;

const ANYWHERE: &str = "127.0.0.1:0";

/// What a server has seen.
#[derive(Default)]
struct Seen {
    connections: Vec<Connection>,
    /// Where its streams came from.
    remotes: BTreeSet<SocketAddr>,
}

/// A server: each of its streams begins with its name and a line's end, then comes back what was sent.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    name: &'static str,
    /// Its own: whoever trusts this one is not served by another.
    certificate: CertificateDer<'static>,
    endpoint: Endpoint,
    seen: Arc<Mutex<Seen>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(0_u32.into(), b"the end");
    }
}

impl Server {
    pub(crate) fn start(name: &'static str, transport: &Arc<TransportConfig>) -> Self {
        let own = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let certificate = CertificateDer::from(own.cert);
        let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
        let mut config =
            ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).expect("its own key");
        config.transport_config(Arc::clone(transport));
        let endpoint = Endpoint::server(config, ANYWHERE.parse().expect("an address")).expect("a port");
        let address = endpoint.local_addr().expect("an address");
        let seen = Arc::default();
        tokio::spawn(serve(name, endpoint.clone(), Arc::clone(&seen)));
        Self { address, name, certificate, endpoint, seen }
    }

    /// The connections so far.
    pub(crate) fn connections(&self) -> Vec<Connection> {
        self.seen.lock().expect("nobody panicked").connections.clone()
    }

    /// Where streams came from.
    pub(crate) fn remotes(&self) -> BTreeSet<SocketAddr> {
        self.seen.lock().expect("nobody panicked").remotes.clone()
    }
}

async fn serve(name: &'static str, endpoint: Endpoint, seen: Arc<Mutex<Seen>>) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(streams(name, incoming, Arc::clone(&seen)));
    }
}

/// Serves a connection's streams until it ends.
async fn streams(
    name: &'static str,
    incoming: Incoming,
    seen: Arc<Mutex<Seen>>,
) -> Result<Infallible, ConnectionError> {
    let connection = incoming.await?;
    seen.lock().expect("nobody panicked").connections.push(connection.clone());
    loop {
        let (send, receive) = connection.accept_bi().await?;
        seen.lock().expect("nobody panicked").remotes.insert(connection.remote_address());
        // What fails here fails visibly at the client.
        tokio::spawn(async move { echo(name, send, receive).await.unwrap_or_default() });
    }
}

async fn echo(name: &str, mut send: SendStream, mut receive: RecvStream) -> std::io::Result<()> {
    send.write_all(format!("{name}\n").as_bytes()).await?;
    while let Some(chunk) = receive.read_chunk(CHUNK, true).await? {
        send.write_chunk(chunk.bytes).await?;
    }
    send.finish()?;
    Ok(())
}

/// A client and its one connection.
pub(crate) struct Client {
    pub(crate) connection: Connection,
    name: &'static str,
    endpoint: Endpoint,
}

impl Client {
    /// Connects at `address`, and wants to find this server there.
    pub(crate) async fn connect(
        server: &Server,
        address: SocketAddr,
        transport: &Arc<TransportConfig>,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(server.certificate.clone()).expect("a certificate");
        let mut config = ClientConfig::with_root_certificates(Arc::new(roots)).expect("a configuration");
        config.transport_config(Arc::clone(transport));
        let mut endpoint = Endpoint::client(ANYWHERE.parse().expect("an address")).expect("a port");
        endpoint.set_default_client_config(config);
        let connecting = endpoint.connect(address, server.name).expect("a connection");
        let connection = connecting.await.expect("a handshake with the right server");
        Self { connection, name: server.name, endpoint }
    }

    /// Sends so many bytes on a stream of its own, and checks that the server says its name and that they come back.
    pub(crate) async fn exchange(&self, number: u64, len: u64) {
        // No two streams have the same bytes.
        let begin = number << 32;
        let (mut outward, mut inward) = self.connection.open_bi().await.expect("a stream");
        let speak = async {
            let mut buffer = vec![0; CHUNK];
            let mut sent = 0;
            while sent < len {
                let count = usize::try_from(len - sent).map_or(CHUNK, |left| left.min(CHUNK));
                pattern(begin + sent, &mut buffer[..count]);
                outward.write_all(&buffer[..count]).await.expect("the stream goes on");
                sent += count as u64;
            }
            outward.finish().expect("an end");
        };
        let hear = async {
            let mut greeting = vec![0; self.name.len() + 1];
            inward.read_exact(&mut greeting).await.expect("a greeting");
            assert_eq!(greeting, format!("{}\n", self.name).as_bytes(), "crossed");
            let (mut buffer, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
            let mut heard = 0;
            while let Some(count) = inward.read(&mut buffer).await.expect("the stream goes on") {
                pattern(begin + heard, &mut expected[..count]);
                assert!(buffer[..count] == expected[..count], "stream {number}, from byte {heard} on");
                heard += count as u64;
            }
            assert_eq!(heard, len, "stream {number}");
        };
        tokio::join!(speak, hear);
    }

    /// Closes the connection, and waits until its last datagram has gone.
    pub(crate) async fn close(&self) {
        self.connection.close(0_u32.into(), b"done");
        self.endpoint.wait_idle().await;
    }
}
