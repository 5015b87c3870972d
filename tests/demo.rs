//! `vestibule demo` as a user sees it: what it prints, what the printed addresses answer, how it ends.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a demo that says something else has failed"
)]

#[allow(dead_code, unreachable_pub, reason = "a lower bound is not needed here")]
#[path = "it/began.rs"]
mod began;
#[path = "it/printed.rs"]
mod printed;

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use self::began::Began;
use self::printed::Printed;

/// No answer takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// A demo that runs; it ends with this.
struct Demo {
    child: Child,
    output: Printed,
}

impl Demo {
    fn start(seconds: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vestibule"));
        command.args(["demo", "--seconds", seconds]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = Printed::of(&mut child);
        Self { child, output }
    }

    /// What else it prints, and how it ends.
    fn end(mut self) -> (String, ExitStatus) {
        (self.output.rest(), self.child.wait().unwrap())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // One that has ended already is an error here.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The words of each line of the closing table: tenant, endpoint, client addresses, backend, sessions and times.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let table = text.lines().skip_while(|line| !line.contains("client addresses")).skip(1);
    table.take_while(|line| !line.is_empty()).map(|line| line.split_whitespace().collect()).collect()
}

#[track_caller]
fn shows_tenants_apart(text: &str) {
    let rows = rows(text);
    let columns = |at: usize| rows.iter().map(|row| row[at]).collect::<Vec<_>>();
    assert_eq!(columns(0), ["acme", "acme", "globex", "globex", "initech", "initech"], "{text}");
    let [acme, globex, initech] =
        ["vpce-0acce0000acce0000", "vpce-0910be00910be0000", "vpce-0141e0ec0141e0ec0"];
    assert_eq!(columns(1), [acme, acme, globex, globex, initech, initech], "{text}");
    let backends = ["acme-1", "acme-2", "globex-1", "globex-2", "initech-1", "initech-2"];
    assert_eq!(columns(3), backends, "{text}");
    let clients = columns(2);
    let answers: Vec<u64> = rows.iter().map(|row| row[4].parse().unwrap()).collect();
    for (tenant, answers) in clients.chunks(2).zip(answers.chunks(2)) {
        // A flow has a hundred questions: on a slow machine there are too few for four flows of the UDP tenant.
        if tenant == &clients[4..] && answers.iter().sum::<u64>() <= 400 {
            continue;
        }
        // Any four connections in a row come from all four consumers, but one backend may not have seen them all.
        assert!(tenant.iter().any(|seen| seen.starts_with("10.100.0.10-")), "{text}");
        assert!(tenant.iter().any(|seen| seen.starts_with("10.100.0.1") && seen.ends_with("-13")), "{text}");
    }
    assert!(answers.iter().all(|count| *count > 0), "{text}");
    assert!(text.ends_with("\n  Every request reached its own tenant's pool.\n"), "{text}");
}

#[test]
fn tenants_with_the_same_addresses_are_kept_apart() {
    let (text, status) = Demo::start("2").end();
    assert!(status.success(), "{status}\n{text}");
    shows_tenants_apart(&text);
    assert!(text.contains("\n  unknown endpoint: reset; no backend received it\n"), "{text}");
    let forged =
        "\n  forged second header, acme claiming to be globex: forwarded as payload to acme's own backend";
    assert!(text.contains(forged), "{text}");
}

#[test]
fn printed_commands_work_and_an_interrupt_ends_the_demo() {
    let mut demo = Demo::start("60");
    let text = demo.output.until("health");
    let address = |line: &str| {
        let line = text.lines().find(|text| text.trim_start().starts_with(line)).unwrap();
        let url = line.split_whitespace().find_map(|word| word.strip_prefix("http://")).unwrap();
        let (address, path) = url.split_once('/').unwrap();
        (address.to_owned(), format!("/{path}"))
    };
    let ask = |line: &str| {
        let (address, path) = address(line);
        get(&address, &path)
    };
    for (tenant, endpoint) in [("acme", "vpce-0acce0000acce0000"), ("globex", "vpce-0910be00910be0000")] {
        let answer = ask(tenant).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let own = answer.contains(&format!("\"backend\":\"{tenant}-"));
        assert!(own && answer.contains(&format!("\"endpoint\":\"{endpoint}\"")), "{answer}");
        assert!(answer.contains("\"client\":\"10.100.0.1"), "{answer}");
    }
    let line = text.lines().find(|line| line.trim_start().starts_with("initech")).unwrap();
    let nc: Vec<_> = line.split_whitespace().skip_while(|word| *word != "-w1").skip(1).take(2).collect();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send_to(b"who?\n", format!("{}:{}", nc[0], nc[1])).unwrap();
    let mut answer = [0; 1024];
    let count = socket.recv(&mut answer).unwrap();
    let answer = std::str::from_utf8(&answer[..count]).unwrap();
    assert!(
        answer.contains("\"backend\":\"initech-") && answer.contains("\"client\":\"10.100.0.1"),
        "{answer}"
    );
    assert_eq!(ask("unknown").unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let page = ask("status").unwrap();
    assert!(page.starts_with("HTTP/1.1 200 ") && page.contains("<html"), "{page}");
    let metrics = ask("metrics").unwrap();
    let series = "\nvestibule_sessions_ended_total{";
    assert!(metrics.starts_with("HTTP/1.1 200 ") && metrics.contains(series), "{metrics}");
    // Not before the first probes are back.
    let began = Began::now();
    while !ask("health").unwrap().starts_with("HTTP/1.1 200 ") {
        assert!(!began.is_past(LIMIT), "never healthy");
    }

    // Two seconds of its own report: time for every backend to have answered.
    let report = demo.output.until("2 s ");
    assert!(report.contains("    1 s  acme ") && report.contains(" | globex "), "{report}");
    kill_process(Pid::from_child(&demo.child), Signal::INT).unwrap();
    let (text, status) = demo.end();
    assert!(status.success() && !text.contains(" 59 s "), "{status}\n{text}");
    shows_tenants_apart(&text);
}

/// Head and body of a page.
fn get(address: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
