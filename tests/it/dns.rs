//! A server of names, by UDP and TCP, that says what the test wants.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

/// What a question is answered with.
#[derive(Clone, Debug)]
pub enum Reply {
    /// These records; none is the answer that there are none of that type.
    Records(Vec<Record>),
    /// No records, and this code.
    Code(ResponseCode),
    /// The identifier of the question, and these bytes.
    Bytes(Vec<u8>),
    /// Nothing.
    Silence,
    /// By UDP a truncated answer; by TCP nothing, and nothing for what is asked on the same connection after it.
    Stalled,
}

/// What the server does with a question that has EDNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edns {
    Understood,
    /// Answers with this code.
    Refused(ResponseCode),
    /// Answers FORMERR, without the question.
    Misread,
}

/// How questions with EDNS are treated, and how many came with it and without.
pub type Asked = Arc<Mutex<(Edns, [u32; 2])>>;

/// The replies by name and type. What is asked for and not listed does not exist.
type Zone = HashMap<(Name, RecordType), Reply>;

/// A server for names.
pub struct Names {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    asked: Asked,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Names {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Names {
    /// One that knows no name.
    pub async fn start() -> Self {
        let (udp, tcp) = sockets().await;
        let (address, zone) = (udp.local_addr().unwrap(), Arc::<Mutex<Zone>>::default());
        let asked = Arc::new(Mutex::new((Edns::Understood, [0; 2])));
        let tasks = [
            tokio::spawn(by_udp(udp, Arc::clone(&zone), Arc::clone(&asked))),
            tokio::spawn(by_tcp(tcp, Arc::clone(&zone))),
        ];
        Self { address, zone, asked, tasks }
    }

    /// From now on questions with EDNS are treated so.
    pub fn treat_edns(&self, edns: Edns) {
        self.asked.lock().unwrap().0 = edns;
    }

    /// How many questions came by UDP with EDNS, and without.
    pub fn asked(&self) -> [u32; 2] {
        self.asked.lock().unwrap().1
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on, this is the reply.
    pub fn say(&self, name: &str, kind: RecordType, reply: Reply) {
        let mut name = self::name(name);
        name.set_fqdn(true);
        self.zone.lock().unwrap().insert((name, kind), reply);
    }

    /// From now on, these are the host's addresses, of both families.
    pub fn host(&self, name: &str, ttl: u32, addresses: &[&str]) {
        let records = |kind| {
            let records = addresses.iter().map(|text| address(name, ttl, text.parse().unwrap()));
            Reply::Records(records.filter(|record| record.record_type() == kind).collect())
        };
        for kind in [RecordType::A, RecordType::AAAA] {
            self.say(name, kind, records(kind));
        }
    }

    /// From now on, these are the service's records: priority, weight, port and host.
    pub fn service(&self, name: &str, ttl: u32, all: &[(u16, u16, u16, &str)]) {
        let srv = |(priority, weight, port, host): &(u16, u16, u16, &str)| {
            RData::SRV(SRV::new(*priority, *weight, *port, self::name(host)))
        };
        let records = all.iter().map(|one| Record::from_rdata(self::name(name), ttl, srv(one)));
        self.say(name, RecordType::SRV, Reply::Records(records.collect()));
    }
}

pub fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

pub fn address(owner: &str, ttl: u32, address: IpAddr) -> Record {
    let rdata = match address {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name(owner), ttl, rdata)
}

pub fn alias(owner: &str, ttl: u32, target: &str) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
}

/// A port that is free for both.
async fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            return (udp, tcp);
        }
    }
}

async fn by_udp(socket: UdpSocket, zone: Arc<Mutex<Zone>>, asked: Asked) {
    let mut buffer = [0; 4096];
    loop {
        let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
        let refusal = refusal(&buffer[..len], &asked);
        if let Some(reply) = refusal.or_else(|| reply(&buffer[..len], &zone, true)) {
            socket.send_to(&reply, peer).await.unwrap();
        }
    }
}

async fn by_tcp(listener: TcpListener, zone: Arc<Mutex<Zone>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(by_stream(stream, Arc::clone(&zone)));
    }
}

async fn by_stream(mut stream: TcpStream, zone: Arc<Mutex<Zone>>) {
    while let Ok(len) = stream.read_u16().await {
        let mut question = vec![0; len.into()];
        stream.read_exact(&mut question).await.unwrap();
        if is_stalled(&question, &zone) {
            return std::future::pending().await;
        }
        let Some(reply) = reply(&question, &zone, false) else { continue };
        stream.write_u16(reply.len().try_into().unwrap()).await.unwrap();
        stream.write_all(&reply).await.unwrap();
    }
}

/// What a question with EDNS is answered with by a server that does not understand it.
fn refusal(question: &[u8], asked: &Asked) -> Option<Vec<u8>> {
    let message = Message::from_vec(question).unwrap();
    let mut asked = asked.lock().unwrap();
    asked.1[usize::from(message.edns.is_none())] += 1;
    message.edns.as_ref()?;
    let mut reply = Message::response(message.id, OpCode::Query);
    match asked.0 {
        Edns::Understood => return None,
        Edns::Refused(code) => {
            reply.add_query(message.queries[0].clone());
            reply.metadata.response_code = code;
            if code.high() > 0 {
                reply.set_edns(hickory_resolver::proto::op::Edns::new());
            }
        }
        Edns::Misread => reply.metadata.response_code = ResponseCode::FormErr,
    }
    Some(reply.to_vec().unwrap())
}

fn is_stalled(question: &[u8], zone: &Mutex<Zone>) -> bool {
    let question = Message::from_vec(question).unwrap();
    let key = (question.queries[0].name().clone(), question.queries[0].query_type());
    matches!(zone.lock().unwrap().get(&key), Some(Reply::Stalled))
}

fn reply(question: &[u8], zone: &Mutex<Zone>, by_udp: bool) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).unwrap();
    let query = question.queries[0].clone();
    let said = zone.lock().unwrap().get(&(query.name().clone(), query.query_type())).cloned();
    let mut reply = Message::response(question.id, OpCode::Query);
    reply.metadata.recursion_available = true;
    reply.add_query(query);
    match said.unwrap_or(Reply::Code(ResponseCode::NXDomain)) {
        Reply::Records(records) => reply.answers = records,
        Reply::Code(code) => reply.metadata.response_code = code,
        Reply::Bytes(bytes) => return Some([&question.id.to_be_bytes()[..], &bytes].concat()),
        Reply::Silence => return None,
        Reply::Stalled => {
            reply.metadata.truncation = true;
            return Some(reply.to_vec().unwrap());
        }
    }
    let bytes = reply.to_vec().unwrap();
    if by_udp && bytes.len() > question.max_payload().into() {
        return Some(reply.truncate().to_vec().unwrap());
    }
    Some(bytes)
}
