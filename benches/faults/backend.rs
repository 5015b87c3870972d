//! A tenant's backends: they report an error if bytes of another tenant arrive.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::Tally;
use crate::stream::{HEAD, Head, Toward};

/// Starts one that hears TCP and UDP at one port; where.
pub(crate) async fn start(tenant: u32, tally: Arc<Tally>) -> SocketAddr {
    let (streams, datagrams) = loop {
        let streams = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = streams.local_addr().expect("an address");
        if let Ok(datagrams) = UdpSocket::bind(address).await {
            break (streams, datagrams);
        }
    };
    let address = streams.local_addr().expect("an address");
    let of_datagrams = Arc::clone(&tally);
    tokio::spawn(async move {
        loop {
            // One that has gone already comes back as an error.
            let Ok((stream, _)) = streams.accept().await else { continue };
            let tally = Arc::clone(&tally);
            tokio::spawn(async move {
                if let Err(fault) = serve(tenant, stream).await {
                    tally.fault(fault);
                }
            });
        }
    });
    tokio::spawn(async move {
        let mut room = vec![0; 65_536];
        loop {
            let Ok((count, from)) = datagrams.recv_from(&mut room).await else { continue };
            match answer(tenant, room.get(..count).unwrap_or_default()) {
                Ok(answer) => drop(datagrams.send_to(&answer, from).await),
                Err(fault) => of_datagrams.fault(fault),
            }
        }
    });
    address
}

/// Takes what the client sends, and answers with what it asks for.
async fn serve(tenant: u32, mut stream: TcpStream) -> Result<(), String> {
    let mut first = [0; HEAD];
    match stream.read_exact(&mut first).await {
        Ok(_) => {}
        // The client sent nothing, or was reset before it sent. After a part, a plain end says no more to the reader.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof || first == [0; HEAD] => return Ok(()),
        Err(_) => return Err(format!("tenant {tenant}: a plain end within the first block")),
    }
    let (head, _) = Head::read(&first, Toward::Backend)
        .ok_or(format!("tenant {tenant}: a stream of the other direction"))?;
    if head.tenant != tenant {
        return Err(format!("tenant {tenant}'s backend got {head:?}"));
    }
    let (mut from, mut to) = stream.split();
    let (received, sent) =
        tokio::join!(head.receive(Toward::Backend, &first, &mut from), head.send(Toward::Client, &mut to));
    head.judge(Toward::Backend, &received?, &sent).map(drop)
}

/// The answer to a datagram: as long, and of the other direction.
fn answer(tenant: u32, datagram: &[u8]) -> Result<Vec<u8>, String> {
    let (head, number) = checked(datagram, Toward::Backend)?;
    if head.tenant != tenant {
        return Err(format!("tenant {tenant}'s backend got a datagram of {head:?}"));
    }
    let mut answer = head.block(Toward::Client, number).to_vec();
    answer.truncate(datagram.len());
    Ok(answer)
}

/// Whose a datagram is, where it is whole and has come where it should.
pub(crate) fn checked(datagram: &[u8], toward: Toward) -> Result<(Head, u64), String> {
    let (head, number) = Head::read(datagram, toward).ok_or("a datagram of the other direction")?;
    if head.block(toward, number).get(..datagram.len()) != Some(datagram) {
        return Err(format!("{head:?}: a datagram is not what was sent"));
    }
    Ok((head, number))
}
