//! Copy against splice by chunk size: CPU seconds for each GB that one thread moves from socket to socket.
//!
//! `cargo bench --bench splice`, on loopback; `-- --test` runs each once, briefly. One thread writes chunks, one reads,
//! and the one between them is measured by its own CPU clock. A chunk is sent when the one before it has arrived, so that
//! its size is what the mover sees; the last row is a stream without pauses. It justifies the sizes and thresholds of
//! `src/session_context.rs`, src/forward.rs and src/forward/pipe.rs, and writes target/splice.json.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on says so by panicking"
)]

mod stage;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use vestibule::clock;

const KIB: usize = 1024;

/// Chunks of the paced rows; 0 stands for the stream without pauses.
const CHUNKS: [usize; 12] = [
    KIB,
    2 * KIB,
    4 * KIB,
    8 * KIB,
    16 * KIB,
    32 * KIB,
    64 * KIB,
    128 * KIB,
    256 * KIB,
    512 * KIB,
    1024 * KIB,
    0,
];

/// How bytes are moved.
#[derive(Clone, Copy)]
enum Way {
    /// Through a buffer of so many bytes.
    Copy(usize),
    /// Through a pipe of so many bytes.
    Splice(usize),
}

const WAYS: [(&str, Way); 6] = [
    ("copy 16K", Way::Copy(16 * KIB)),
    ("copy 64K", Way::Copy(64 * KIB)),
    ("copy 256K", Way::Copy(256 * KIB)),
    ("splice 64K", Way::Splice(64 * KIB)),
    ("splice 256K", Way::Splice(256 * KIB)),
    ("splice 1M", Way::Splice(1024 * KIB)),
];

/// Rounds that count; one more goes before them.
const ROUNDS: usize = 5;

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    let (rounds, span) =
        if test { (1, Duration::from_millis(5)) } else { (ROUNDS, Duration::from_millis(300)) };
    println!("kernel {}; CPU s/GB of the thread that moves, medians of {rounds}", stage::kernel());
    print!("{:<10}", "chunk");
    for (name, _) in &WAYS {
        print!("{name:>13}");
    }
    println!();
    let mut rows = Vec::new();
    for chunk in CHUNKS {
        let mut figures: Vec<Vec<f64>> = WAYS.iter().map(|_| Vec::new()).collect();
        for round in 0..=rounds {
            for ((_, way), figures) in WAYS.iter().zip(&mut figures) {
                let figure = measure(*way, chunk, span);
                if round > 0 || test {
                    figures.push(figure);
                }
            }
        }
        let figures: Vec<f64> = figures.into_iter().map(stage::median).collect();
        let name = if chunk == 0 { "stream".to_owned() } else { format!("{} KiB", chunk / KIB) };
        print!("{name:<10}");
        for figure in &figures {
            print!("{figure:>13.3}");
        }
        println!();
        let figures: serde_json::Map<_, _> =
            WAYS.iter().zip(figures).map(|((name, _), figure)| ((*name).to_owned(), json!(figure))).collect();
        rows.push(json!({ "chunk": name, "cpu_seconds_per_gb": figures }));
    }
    stage::write_json("splice", &json!({ "kernel": stage::kernel(), "rows": rows }));
}

/// CPU seconds per GB of the mover.
fn measure(way: Way, chunk: usize, span: Duration) -> f64 {
    let ((client, source), (sink, backend)) = (pair(), pair());
    let (acknowledge, acknowledged) = sync_channel(1);
    let writer = std::thread::spawn(move || write(client, chunk, span, &acknowledged));
    let reader = std::thread::spawn(move || read(backend, chunk, &acknowledge));
    let mover = std::thread::spawn(move || {
        let before = cpu();
        let bytes = match way {
            Way::Copy(size) => copy(source, sink, size),
            Way::Splice(size) => spliced(&source, &sink, size),
        };
        (cpu() - before, bytes)
    });
    let (cpu, bytes) = mover.join().expect("the mover");
    writer.join().expect("the writer");
    reader.join().expect("the reader");
    #[expect(clippy::cast_precision_loss, reason = "a rate has fewer digits")]
    let gigabytes = bytes as f64 / 1e9;
    cpu / gigabytes
}

fn write(mut stream: TcpStream, chunk: usize, span: Duration, acknowledged: &Receiver<()>) {
    let bytes = vec![0; if chunk == 0 { 256 * KIB } else { chunk }];
    let end = clock::now() + span;
    // At least once.
    loop {
        stream.write_all(&bytes).expect("the mover takes it");
        if chunk > 0 {
            acknowledged.recv().expect("the reader has it");
        }
        if clock::now() >= end {
            return;
        }
    }
}

fn read(mut stream: TcpStream, chunk: usize, acknowledge: &SyncSender<()>) {
    let mut buffer = vec![0; 256 * KIB];
    let mut left = chunk;
    loop {
        let count = stream.read(&mut buffer).expect("the mover brings it");
        if count == 0 {
            return;
        }
        left = left.saturating_sub(count);
        if left == 0 && chunk > 0 {
            // The writer may have gone.
            acknowledge.send(()).unwrap_or_default();
            left = chunk;
        }
    }
}

fn copy(mut source: TcpStream, mut sink: TcpStream, size: usize) -> usize {
    let mut buffer = vec![0; size];
    let mut all = 0;
    loop {
        let count = source.read(&mut buffer).expect("the writer brings it");
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { return all };
        sink.write_all(part).expect("the reader takes it");
        all += count;
    }
}

fn spliced(source: &TcpStream, sink: &TcpStream, size: usize) -> usize {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    let size = fcntl_setpipe_size(&write, size).expect("a pipe of that size");
    let mut all = 0;
    loop {
        let mut held = splice(source, None, &write, None, size, SpliceFlags::MOVE).expect("into the pipe");
        if held == 0 {
            return all;
        }
        all += held;
        while held > 0 {
            held -= splice(&read, None, sink, None, held, SpliceFlags::MOVE).expect("out of the pipe");
        }
    }
}

/// This thread's CPU seconds so far.
fn cpu() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default().as_secs_f64()
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (far, _) = listener.accept().expect("its other end");
    near.set_nodelay(true).expect("no delay");
    far.set_nodelay(true).expect("no delay");
    (near, far)
}
