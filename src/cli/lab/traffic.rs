//! What the consumers do meanwhile: requests one after another, and downloads that take long. Each consumer is a thread
//! in its own network.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::lab::load::consumer::{ConsumerLoad, ConsumerReport, ConsumerRequest};
use crate::lab::vpc::Network;
use crate::lab::world::{DOWNLOAD, ENDPOINT, HTTP, LEN, TENANTS};

/// Requests under way at once for each tenant: so many can be with one backend when it dies.
pub(super) const CALLERS: usize = 3;
/// Between an answer and the caller's next request.
const PAUSE: Duration = Duration::from_millis(20);
/// The downloads' ports in each consumer's network: by them the load balancer spreads them over its targets.
pub(super) const PORTS: std::ops::Range<u16> = 41_001..41_004;

/// The result of a download.
#[derive(Clone, Copy, Debug)]
pub(super) struct Download {
    /// The proxy that it went through.
    pub(super) proxy: Option<Ipv4Addr>,
    /// Whether it came to its end, with all that was sent.
    pub(super) whole: bool,
}

/// All consumers, until they are told to stop, or this is dropped.
pub(super) struct ConsumerTraffic {
    loads: Vec<Arc<ConsumerLoad>>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    orders: Vec<mpsc::Sender<DownloadRequest>>,
}

impl ConsumerTraffic {
    /// Starts them: `networks` are those of the tenants, in their order.
    pub(super) fn start(networks: &[Network]) -> io::Result<Self> {
        let stop = watch::Sender::new(false);
        let (mut loads, mut threads, mut orders) = (Vec::new(), Vec::new(), Vec::new());
        for (network, tenant) in networks.iter().zip(TENANTS) {
            let address = (ENDPOINT, HTTP).into();
            let load = Arc::new(ConsumerLoad::new(
                address,
                ConsumerRequest::Http,
                &format!("{}-", tenant.name),
                PAUSE,
            ));
            loads.push(Arc::clone(&load));
            let (network, stopped) = (network.clone(), stop.subscribe());
            let (order, ordered) = mpsc::channel(1);
            orders.push(order);
            threads.push(std::thread::Builder::new().name(tenant.name.to_owned()).spawn(move || {
                network.enter()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(consume(load, stopped, ordered));
                Ok(())
            })?);
        }
        Ok(Self { loads, stop, threads, orders })
    }

    /// What the consumers have seen so far, in the order of the tenants.
    pub(super) fn reports(&self) -> Vec<ConsumerReport> {
        self.loads.iter().map(|load| load.report()).collect()
    }

    /// Requests of each tenant that got no answer, or another tenant's.
    pub(super) fn failures(&self) -> Vec<u64> {
        self.reports().iter().map(|report| report.failed + report.misrouted).collect()
    }

    /// Begins downloads for every tenant, and returns once each has its first bytes.
    pub(super) async fn download(&self) -> io::Result<Downloads> {
        let count = self.orders.len() * PORTS.len();
        let (begun, mut beginnings) = mpsc::channel(count);
        let (ended, endings) = mpsc::channel(count);
        for orders in &self.orders {
            let order = DownloadRequest { begun: begun.clone(), ended: ended.clone() };
            orders.send(order).await.map_err(io::Error::other)?;
        }
        drop(begun);
        // A task that fails before it begins reports the error when it is joined.
        while beginnings.recv().await.is_some() {}
        Ok(Downloads(endings))
    }

    /// Ends them, each after the request that is under way.
    pub(super) async fn end(self) -> io::Result<()> {
        self.stop.send_replace(true);
        for thread in self.threads {
            let ended = tokio::task::spawn_blocking(move || thread.join()).await?;
            ended.unwrap_or_else(|_| Err(io::Error::other("a consumer panicked")))?;
        }
        Ok(())
    }
}

/// A request to start a download.
struct DownloadRequest {
    /// Told by each download that has its first bytes, or will have none.
    begun: mpsc::Sender<()>,
    ended: mpsc::Sender<io::Result<Download>>,
}

/// Downloads in progress.
pub(super) struct Downloads(mpsc::Receiver<io::Result<Download>>);

impl Downloads {
    /// Waits for the last; how each ended.
    pub(super) async fn end(mut self) -> Vec<io::Result<Download>> {
        let mut ends = Vec::new();
        while let Some(end) = self.0.recv().await {
            ends.push(end);
        }
        ends
    }
}

/// One consumer, inside its network.
async fn consume(
    load: Arc<ConsumerLoad>,
    mut stopped: watch::Receiver<bool>,
    mut orders: mpsc::Receiver<DownloadRequest>,
) {
    let mut tasks = JoinSet::new();
    for _ in 0..CALLERS {
        let (load, stopped) = (Arc::clone(&load), stopped.clone());
        tasks.spawn(async move { load.run(stopped).await });
    }
    loop {
        let order = tokio::select! {
            Some(order) = orders.recv() => order,
            // A dropped sender also means the end.
            _ = stopped.wait_for(|stop| *stop) => break,
        };
        for port in PORTS {
            let DownloadRequest { begun, ended } =
                DownloadRequest { begun: order.begun.clone(), ended: order.ended.clone() };
            tasks.spawn(async move {
                let end = download(port, begun).await;
                // The receiver is gone once the walkthrough is over.
                ended.send(end).await.unwrap_or_default();
            });
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn download(port: u16, begun: mpsc::Sender<()>) -> io::Result<Download> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let mut stream = socket.connect(SocketAddr::from((ENDPOINT, HTTP))).await?;
    let question = format!("GET /{DOWNLOAD} HTTP/1.1\r\nhost: lab\r\nconnection: close\r\n\r\n");
    stream.write_all(question.as_bytes()).await?;
    let head = head(&mut stream).await?;
    drop(begun);
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    let proxy = headers.find(|(name, _)| *name == "X-Proxy").and_then(|(_, proxy)| proxy.parse().ok());
    let mut body = Vec::with_capacity(LEN);
    stream.read_to_end(&mut body).await?;
    Ok(Download { proxy, whole: body.len() == LEN })
}

/// The head of an answer, byte by byte: what follows is the body's.
async fn head(stream: &mut TcpStream) -> io::Result<String> {
    /// No head of these backends is longer.
    const MOST: usize = 4096;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MOST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.push(stream.read_u8().await?);
    }
    String::from_utf8(head).map_err(|_| io::ErrorKind::InvalidData.into())
}
