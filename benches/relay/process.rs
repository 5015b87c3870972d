//! Child processes of a bench, and addresses for them.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The binary under measurement, built with this bench's profile.
pub(crate) const VESTIBULE: &str = env!("CARGO_BIN_EXE_vestibule");

/// A child process that ends with its handle.
pub(crate) struct Proc(pub(crate) Child);

impl Proc {
    pub(crate) fn start(command: &Command) -> Self {
        let mut again = Command::new(command.get_program());
        again.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(again.spawn().expect("a child process"))
    }

    pub(crate) fn wait(&mut self) {
        let status = self.0.wait().expect("the child's end");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().unwrap_or_default();
        self.0.wait().map(|_| ()).unwrap_or_default();
    }
}

/// An address that nobody listens on.
pub(crate) fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

/// Waits until somebody listens.
pub(crate) fn ready(address: SocketAddr) {
    for _ in 0..500 {
        if TcpStream::connect(address).is_ok() {
            return;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    panic!("nobody listens on {address}");
}
