//! Long sessions that number every byte: each end sends words that follow from the session, the direction and their place,
//! and the other end knows which one comes next. A byte that is lost, doubled, out of order or of another session is detected at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_local};
use tokio::time::{sleep, timeout};
use vestibule::account::Direction;
use vestibule::lab::nlb;

/// What a session does between its first word and its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Says nothing.
    Idle,
    /// A small message each way, now and then.
    Talks,
    /// Large chunks each way: they are spliced.
    Streams,
    /// The client has ended its side; the backend goes on.
    ClientEnded,
    /// The backend has; the client goes on.
    BackendEnded,
    /// As fast as its tenant's bandwidth allows, which is not fast.
    Limited,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Idle, Self::Talks, Self::Streams, Self::ClientEnded, Self::BackendEnded, Self::Limited];

    /// How many bytes at once, and how long until the next ones. `None`: this side says nothing between its first word and its last.
    fn pace(self, direction: Direction) -> Option<(usize, Duration)> {
        match (self, direction) {
            (Self::Idle, _)
            | (Self::ClientEnded, Direction::ToBackend)
            | (Self::BackendEnded, Direction::ToClient) => None,
            (Self::Talks | Self::ClientEnded | Self::BackendEnded, _) => {
                Some((fastrand::usize(1..500), Duration::from_millis(fastrand::u64(50..400))))
            }
            (Self::Streams, _) => Some((256 * 1024, Duration::from_millis(150))),
            (Self::Limited, _) => Some((16 * 1024, Duration::from_millis(5))),
        }
    }

    /// Whether this side ends after its first word.
    fn ends_early(self, direction: Direction) -> bool {
        matches!(
            (self, direction),
            (Self::ClientEnded, Direction::ToBackend) | (Self::BackendEnded, Direction::ToClient)
        )
    }
}

/// What the bytes of one direction of a session are.
#[derive(Clone, Copy, Debug)]
struct Words(u64);

impl Words {
    fn of(session: u32, direction: Direction) -> Self {
        Self((u64::from(session) << 1 | u64::from(direction == Direction::ToClient)) << 24)
    }

    /// The byte at a place: all of a word follow from its number, so that no two words are alike.
    fn byte(self, place: u64) -> u8 {
        let word = (self.0 ^ (place / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        word[(place % 8) as usize]
    }
}

/// What both ends of a session have done.
#[derive(Debug, Default)]
struct Book {
    sent: [Cell<u64>; 2],
    received: [Cell<u64>; 2],
    ended: [Cell<bool>; 2],
}

/// All sessions, and the backend that they go to.
pub(crate) struct Long {
    books: Rc<RefCell<HashMap<u32, Rc<Book>>>>,
    clients: RefCell<JoinSet<(u32, Result<(), String>)>>,
    kinds: RefCell<HashMap<u32, Kind>>,
    finish: watch::Sender<bool>,
    pub(crate) backend: SocketAddr,
    faults: Rc<RefCell<Vec<String>>>,
}

impl Long {
    /// The backend alone.
    pub(crate) async fn start() -> Rc<Self> {
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a backend");
        let backend = socket.local_addr().expect("its address");
        let (finish, finishes) = watch::channel(false);
        let long = Rc::new(Self {
            books: Rc::default(),
            clients: RefCell::default(),
            kinds: RefCell::default(),
            finish,
            backend,
            faults: Rc::default(),
        });
        let (books, faults) = (Rc::clone(&long.books), Rc::clone(&long.faults));
        spawn_local(async move {
            loop {
                let Ok((stream, _)) = socket.accept().await else { continue };
                let (books, faults, finishes) = (Rc::clone(&books), Rc::clone(&faults), finishes.clone());
                spawn_local(async move {
                    if let Err(fault) = serve(stream, &books, finishes).await {
                        faults.borrow_mut().push(format!("backend: {fault}"));
                    }
                });
            }
        });
        long
    }

    /// Opens sessions of each kind through `target`, each with its first word there and back.
    pub(crate) async fn open(&self, target: SocketAddr, of: &[(Kind, u32, &str)]) {
        let mut number = 0;
        let (standing, mut stands) = watch::channel(0_u32);
        let standing = Rc::new(standing);
        for (kind, count, endpoint) in of {
            for _ in 0..*count {
                number += 1;
                let book = Rc::new(Book::default());
                self.books.borrow_mut().insert(number, Rc::clone(&book));
                self.kinds.borrow_mut().insert(number, *kind);
                let client = SocketAddr::from(([10, 100, (number >> 8) as u8, number as u8], 40_000));
                let header = nlb::header(client, target, Some(endpoint));
                let (finishes, standing, kind, session) =
                    (self.finish.subscribe(), Rc::clone(&standing), *kind, number);
                self.clients.borrow_mut().spawn_local(async move {
                    let speak = speak(target, header, session, kind, book, finishes, standing);
                    (session, speak.await)
                });
            }
        }
        let all = timeout(Duration::from_secs(60), stands.wait_for(|stand| *stand == number)).await;
        assert!(matches!(all, Ok(Ok(_))), "not all sessions came about: {:?}", self.faults.borrow());
    }

    /// Has every session say its last words, and waits for all ends; bytes that arrived, both ways.
    pub(crate) async fn finish(&self) -> u64 {
        self.finish.send_replace(true);
        let mut faults = std::mem::take(&mut *self.faults.borrow_mut());
        let mut clients = std::mem::take(&mut *self.clients.borrow_mut());
        let end = timeout(Duration::from_secs(120), async {
            while let Some(ended) = clients.join_next().await {
                let (session, result) = ended.expect("a session's task");
                if let Err(fault) = result {
                    faults.push(format!("{:?} {session}: {fault}", self.kinds.borrow()[&session]));
                }
            }
        });
        end.await.expect("the sessions' ends");
        // What a client has sent may still be on its way to the backend, at its tenant's pace.
        let is_whole = |book: &Rc<Book>| (0..2).all(|way| book.ended[way].get());
        for _ in 0..3_000 {
            if self.books.borrow().values().all(is_whole) || !self.faults.borrow().is_empty() {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        let mut bytes = 0;
        for (session, book) in self.books.borrow().iter() {
            for way in 0..2 {
                let (sent, received) = (book.sent[way].get(), book.received[way].get());
                bytes += received;
                if sent != received || !book.ended[way].get() {
                    faults.push(format!(
                        "{:?} {session}, way {way}: {received} of {sent} bytes, end {}",
                        self.kinds.borrow()[session],
                        book.ended[way].get()
                    ));
                }
            }
        }
        faults.extend(std::mem::take(&mut *self.faults.borrow_mut()));
        let some: Vec<_> = faults.iter().take(10).collect();
        assert!(faults.is_empty(), "{} faults, such as {some:#?}", faults.len());
        bytes
    }
}

const FIRST: usize = 8;

async fn speak(
    target: SocketAddr,
    header: Vec<u8>,
    session: u32,
    kind: Kind,
    book: Rc<Book>,
    finishes: watch::Receiver<bool>,
    standing: Rc<watch::Sender<u32>>,
) -> Result<(), String> {
    let mut stream = TcpStream::connect(target).await.map_err(|error| error.to_string())?;
    let number = u64::from(session) << 8 | kind as u64;
    let first = [&header[..], &number.to_be_bytes()].concat();
    stream.write_all(&first).await.map_err(|error| error.to_string())?;
    let mut echo = [0; FIRST];
    stream.read_exact(&mut echo).await.map_err(|error| format!("no first word: {error}"))?;
    if u64::from_be_bytes(echo) != number {
        return Err("the first bytes of another session".to_owned());
    }
    standing.send_modify(|count| *count += 1);
    both(stream, session, kind, &book, finishes, Direction::ToBackend).await
}

async fn serve(
    mut stream: TcpStream,
    books: &RefCell<HashMap<u32, Rc<Book>>>,
    finishes: watch::Receiver<bool>,
) -> Result<(), String> {
    let mut first = [0; FIRST];
    stream.read_exact(&mut first).await.map_err(|error| format!("no first word: {error}"))?;
    stream.write_all(&first).await.map_err(|error| error.to_string())?;
    let number = u64::from_be_bytes(first);
    let session = u32::try_from(number >> 8).map_err(|error| error.to_string())?;
    let kind = Kind::ALL.get((number & 0xff) as usize).copied().ok_or("no such kind")?;
    let book = books.borrow().get(&session).cloned().ok_or("no such session")?;
    both(stream, session, kind, &book, finishes, Direction::ToClient).await
}

/// Sends in one direction and checks the other, until both have ended.
async fn both(
    stream: TcpStream,
    session: u32,
    kind: Kind,
    book: &Book,
    finishes: watch::Receiver<bool>,
    sends: Direction,
) -> Result<(), String> {
    let (read, write) = stream.into_split();
    let receives = if sends == Direction::ToBackend { Direction::ToClient } else { Direction::ToBackend };
    let sent = send(write, Words::of(session, sends), kind, sends, &book.sent[sends as usize], finishes);
    let end = (&book.received[receives as usize], &book.ended[receives as usize]);
    let (sent, checked) = tokio::join!(sent, check(read, Words::of(session, receives), end));
    sent.and(checked)
}

async fn send(
    mut to: OwnedWriteHalf,
    words: Words,
    kind: Kind,
    direction: Direction,
    sent: &Cell<u64>,
    mut finishes: watch::Receiver<bool>,
) -> Result<(), String> {
    let say = async |to: &mut OwnedWriteHalf, len: usize| {
        let start = sent.get();
        let bytes: Vec<u8> = (start..start + len as u64).map(|place| words.byte(place)).collect();
        // Counted before: the other end may have them before this one comes back.
        sent.set(start + len as u64);
        to.write_all(&bytes).await.map_err(|error| format!("sending at {start}: {error}"))
    };
    if !kind.ends_early(direction) {
        while !*finishes.borrow() {
            let Some((len, rest)) = kind.pace(direction) else {
                // No other task ends it.
                finishes.wait_for(|finish| *finish).await.map_err(|error| error.to_string())?;
                break;
            };
            say(&mut to, len).await?;
            let rested = timeout(rest, finishes.wait_for(|finish| *finish)).await;
            drop(rested);
        }
        say(&mut to, 100).await?;
    }
    to.shutdown().await.map_err(|error| format!("the end: {error}"))?;
    // Its half is kept: dropped, it would be shut down again.
    finishes.wait_for(|finish| *finish).await.map_err(|error| error.to_string())?;
    drop(to);
    Ok(())
}

async fn check(
    mut from: OwnedReadHalf,
    words: Words,
    (received, ended): (&Cell<u64>, &Cell<bool>),
) -> Result<(), String> {
    let mut room = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut room).await;
        let at = received.get();
        let count = count.map_err(|error| format!("receiving at {at}: {error}"))?;
        if count == 0 {
            ended.set(true);
            return Ok(());
        }
        for (byte, place) in room[..count].iter().zip(at..) {
            if *byte != words.byte(place) {
                return Err(format!("another byte than was sent at {place}"));
            }
        }
        received.set(at + count as u64);
        // A reader that is slow now and then: the proxy holds what it does not take.
        if fastrand::u8(..) == 0 {
            sleep(Duration::from_millis(20)).await;
        }
    }
}
