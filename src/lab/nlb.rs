//! A Network Load Balancer and its VPC endpoints, as far as a target sees them.
//!
//! Its headers are encoded by the crate `proxy-protocol`, and the TLVs added here, so that what vestibule parses was
//! not written by its own encoder.

pub(crate) mod balancer;
mod datagram;
pub(crate) mod group;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::Ipv4Net;
use proxy_protocol::ProxyHeader;
use proxy_protocol::version2::{ProxyAddresses, ProxyCommand, ProxyTransportProtocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{ANYWHERE, Tasks, accept, listen, reap};

/// The length that NLB pads its headers to.
const PADDED: usize = 100;

/// The header of a client's connection as NLB writes it: CRC32C, the endpoint's ID where there is one, padding.
#[must_use]
pub fn header(client: SocketAddr, destination: SocketAddr, endpoint: Option<&str>) -> Vec<u8> {
    of_a_client(ProxyTransportProtocol::Stream, client, destination, endpoint)
}

/// The header in front of a client's datagram: the same, but for the transport.
#[must_use]
pub fn datagram_header(client: SocketAddr, destination: SocketAddr, endpoint: Option<&str>) -> Vec<u8> {
    of_a_client(ProxyTransportProtocol::Datagram, client, destination, endpoint)
}

fn of_a_client(
    transport: ProxyTransportProtocol,
    client: SocketAddr,
    destination: SocketAddr,
    endpoint: Option<&str>,
) -> Vec<u8> {
    let addresses = match (client, destination) {
        (SocketAddr::V4(source), SocketAddr::V4(destination)) => ProxyAddresses::Ipv4 { source, destination },
        (SocketAddr::V6(source), SocketAddr::V6(destination)) => ProxyAddresses::Ipv6 { source, destination },
        _ => ProxyAddresses::Unspec,
    };
    with_tlvs(ProxyCommand::Proxy, transport, addresses, endpoint)
}

/// The header of a health check: LOCAL, with the family of TCP over IPv4 and no addresses, as captures show it
/// (kubernetes/kubernetes issue 57250).
#[must_use]
pub fn health_check_header() -> Vec<u8> {
    let mut bytes = plain(ProxyCommand::Local, ProxyTransportProtocol::Unspec, ProxyAddresses::Unspec);
    if let Some(family) = bytes.get_mut(13) {
        *family = 0x11;
    }
    finish(bytes, None)
}

fn with_tlvs(
    command: ProxyCommand,
    transport: ProxyTransportProtocol,
    addresses: ProxyAddresses,
    endpoint: Option<&str>,
) -> Vec<u8> {
    finish(plain(command, transport, addresses), endpoint)
}

fn plain(
    command: ProxyCommand,
    transport_protocol: ProxyTransportProtocol,
    addresses: ProxyAddresses,
) -> Vec<u8> {
    let header = ProxyHeader::Version2 { command, transport_protocol, addresses };
    // Only version 1 headers can fail to be written.
    proxy_protocol::encode(header).map(|bytes| bytes.to_vec()).unwrap_or_default()
}

/// Adds the TLVs, the length and the checksum.
fn finish(mut bytes: Vec<u8>, endpoint: Option<&str>) -> Vec<u8> {
    tlv(&mut bytes, 0x03, &[0; 4]);
    let crc_ends = bytes.len();
    if let Some(id) = endpoint {
        tlv(&mut bytes, 0xEA, &[&[0x01], id.as_bytes()].concat());
    }
    if let Some(padding) = PADDED.checked_sub(bytes.len() + 3) {
        tlv(&mut bytes, 0x04, &vec![0; padding]);
    }
    let len = u16::try_from(bytes.len() - 16).unwrap_or(u16::MAX).to_be_bytes();
    if let Some(field) = bytes.get_mut(14..16) {
        field.copy_from_slice(&len);
    }
    let crc = crc32c::crc32c(&bytes).to_be_bytes();
    if let Some(field) = bytes.get_mut(crc_ends - 4..crc_ends) {
        field.copy_from_slice(&crc);
    }
    bytes
}

fn tlv(bytes: &mut Vec<u8>, kind: u8, value: &[u8]) {
    bytes.push(kind);
    bytes.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes.extend(value);
}

/// An interface endpoint in a consumer's VPC.
#[derive(Clone, Debug)]
pub struct VpcEndpoint {
    /// Its ID.
    pub id: String,
    /// The consumer's network: its clients' addresses are taken from here.
    pub consumers: Ipv4Net,
}

/// A load balancer: what connects to one of its endpoints arrives at the target, behind a header; and so does every
/// datagram, where it is one for UDP.
#[derive(Debug)]
pub struct Nlb {
    addresses: Vec<SocketAddr>,
    counts: Vec<Arc<AtomicU64>>,
    /// Held for their end.
    _tasks: Tasks,
}

impl Nlb {
    /// Opens one loopback address for each endpoint, and sends what comes there to `target`.
    ///
    /// # Errors
    /// Where loopback has no port left.
    pub async fn start(target: SocketAddr, endpoints: Vec<VpcEndpoint>) -> io::Result<Self> {
        let mut tasks = Tasks::new();
        let (mut addresses, mut counts) = (Vec::new(), Vec::new());
        for endpoint in endpoints {
            let (socket, address) = listen(ANYWHERE).await?;
            let count = Arc::new(AtomicU64::new(0));
            addresses.push(address);
            counts.push(Arc::clone(&count));
            tasks.spawn(serve(socket, target, endpoint, count));
        }
        Ok(Self { addresses, counts, _tasks: tasks })
    }

    /// Where the consumers of an endpoint connect.
    #[must_use]
    pub fn address(&self, endpoint: usize) -> Option<SocketAddr> {
        self.addresses.get(endpoint).copied()
    }

    /// Connections, or flows, that came over an endpoint so far.
    #[must_use]
    pub fn connections(&self, endpoint: usize) -> u64 {
        self.counts.get(endpoint).map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

async fn serve(socket: TcpListener, target: SocketAddr, endpoint: VpcEndpoint, count: Arc<AtomicU64>) {
    let mut sessions = Tasks::new();
    loop {
        let consumer = accept(&socket).await;
        reap(&mut sessions);
        let client = client(endpoint.consumers, count.fetch_add(1, Ordering::Relaxed));
        let header = header(client, target, Some(&endpoint.id));
        sessions.spawn(async move {
            // What fails here fails visibly at the consumer, whose connection is closed.
            carry(consumer, target, header).await.unwrap_or_default();
        });
    }
}

/// The address of the `count`-th connection of an endpoint: the same for every endpoint with the same network.
fn client(network: Ipv4Net, count: u64) -> SocketAddr {
    /// Consumers that an endpoint has.
    const HOSTS: u64 = 4;
    let host = u32::try_from(10 + count % HOSTS).unwrap_or(10);
    let address = Ipv4Addr::from(u32::from(network.network()).wrapping_add(host));
    let port = 40_000 + u16::try_from((count / HOSTS) % 20_000).unwrap_or(0);
    (address, port).into()
}

/// One connection: the header goes with the client's first payload, which is NLB's default
/// (`proxy_protocol_v2.client_to_server.header_placement = on_first_ack_with_payload`).
async fn carry(mut consumer: TcpStream, target: SocketAddr, mut first: Vec<u8>) -> io::Result<()> {
    let mut target = TcpStream::connect(target).await?;
    target.set_nodelay(true)?;
    consumer.set_nodelay(true)?;
    if consumer.read_buf(&mut first).await? == 0 {
        return Ok(());
    }
    target.write_all(&first).await?;
    let carried = tokio::io::copy_bidirectional(&mut consumer, &mut target).await;
    if carried.is_err() {
        consumer.set_zero_linger()?;
        target.set_zero_linger()?;
    }
    carried.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(name: &str) -> Vec<u8> {
        let table = include_str!("../../tests/vectors/proxy-v2.tsv");
        let line = table.lines().find(|line| line.split('\t').next() == Some(name)).unwrap();
        let hex = line.split('\t').nth(2).unwrap();
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn headers_are_the_captured_ones_to_the_byte() {
        let address = |text: &str| text.parse().unwrap();
        let cases = [
            ("privatelink-tcp4", "172.31.7.113:51442", "172.31.10.31:80", Some("vpce-08d2bf15fac5001c9")),
            (
                "privatelink-tcp6",
                "[fd00:10:1::a]:51442",
                "[fd00:10:1::7]:443",
                Some("vpce-0123456789abcdef0"),
            ),
            ("legacy-id", "10.1.2.3:51442", "10.1.2.9:443", Some("vpce-1a2b3c4d")),
            ("nlb-no-privatelink", "123.103.201.154:45334", "172.31.12.55:587", None),
        ];
        for (name, client, destination, endpoint) in cases {
            let found = header(address(client), address(destination), endpoint);
            // Vectors without recorded addresses are compared from the TLVs on, and by the checksum.
            assert_eq!(found.len(), vector(name).len(), "{name}");
            if name == "privatelink-tcp4" || name == "nlb-no-privatelink" {
                assert_eq!(found, vector(name), "{name}");
            }
        }
        assert_eq!(health_check_header(), vector("nlb-health-check"));
    }

    #[test]
    fn two_consumers_have_the_same_addresses() {
        let network = "10.100.0.0/16".parse().unwrap();
        assert_eq!(client(network, 0), "10.100.0.10:40000".parse().unwrap());
        assert_eq!(client(network, 5), "10.100.0.11:40001".parse().unwrap());
    }
}
