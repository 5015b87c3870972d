//! What the kernel dropped before anybody could receive it: datagrams for which a listening socket had no room.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use rustix::fs::fstat;

use super::{Label, lock};

/// Where the kernel tells of its UDP sockets, one in each line (net/ipv4/udp.c, `udp4_format_sock`).
const TABLES: [&str; 2] = ["/proc/self/net/udp", "/proc/self/net/udp6"];

/// The columns of a line: a socket's number, and how many datagrams it had no room for.
const INODE: usize = 9;
const DROPS: usize = 12;

/// The listening UDP sockets of a process.
#[derive(Debug, Default)]
pub struct Queues(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// By the kernel's number.
    open: HashMap<u64, Queue>,
    /// By listener, closed sockets and all.
    dropped: BTreeMap<Arc<str>, u64>,
}

/// One socket.
#[derive(Debug)]
struct Queue {
    listener: Arc<str>,
    /// As many as are counted already.
    known: u64,
}

/// Held as long as a socket is open.
#[derive(Debug)]
pub struct Watch {
    queues: Arc<Queues>,
    inode: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.queues.0).open.remove(&self.inode);
    }
}

impl Queues {
    /// From now on what this socket drops counts for the listener, and what it has dropped before: in another process it
    /// may have been another's, whose counter goes on here.
    ///
    /// # Errors
    /// What the system says of the socket.
    pub fn watch(self: &Arc<Self>, socket: &impl AsFd, listener: &Label) -> io::Result<Watch> {
        let inode = fstat(socket)?.st_ino;
        let mut counts = lock(&self.0);
        counts.dropped.entry(Arc::clone(&listener.name)).or_default();
        counts.open.insert(inode, Queue { listener: Arc::clone(&listener.name), known: 0 });
        Ok(Watch { queues: Arc::clone(self), inode })
    }

    /// Each listener's count now. What a socket dropped between the last call and its end is not in it.
    ///
    /// Reads a line for each UDP socket of the machine: not for the data path. Where they cannot be read, the counts stay.
    #[must_use]
    pub fn dropped(&self) -> Vec<(Arc<str>, u64)> {
        let mut counts = lock(&self.0);
        if !counts.open.is_empty() {
            for table in TABLES {
                let Ok(table) = File::open(table) else { continue };
                let lines = BufReader::new(table).lines().map_while(Result::ok);
                lines.filter_map(|line| entry(&line)).for_each(|(inode, drops)| counts.see(inode, drops));
            }
        }
        counts.dropped.iter().map(|(listener, count)| (Arc::clone(listener), *count)).collect()
    }
}

impl Counts {
    fn see(&mut self, inode: u64, drops: u64) {
        let Some(queue) = self.open.get_mut(&inode) else { return };
        let more = drops.saturating_sub(queue.known);
        queue.known = drops;
        if let Some(count) = self.dropped.get_mut(&queue.listener) {
            *count += more;
        }
    }
}

/// A socket's number and its drops.
fn entry(line: &str) -> Option<(u64, u64)> {
    let mut columns = line.split_ascii_whitespace().skip(INODE);
    let inode = columns.next()?.parse().ok()?;
    Some((inode, columns.nth(DROPS - INODE - 1)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Labels;

    #[test]
    fn a_line_tells_of_a_socket_and_the_head_of_none() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref \
                    pointer drops";
        let line = "  338: 0100007F:0143 00000000:0000 07 00000000:00000300 00:00000000 00000000   107        0 18213 2 \
                    000000003d4f4f5f 42";
        assert_eq!([head, "", "1: 2"].map(entry), [None, None, None]);
        assert_eq!(entry(line), Some((18213, 42)));
    }

    #[test]
    fn what_a_socket_drops_is_its_listeners_and_stays_so() {
        let (queues, labels) = (Arc::new(Queues::default()), Labels::default());
        // Whatever has a number will do.
        let [one, two] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let [web, dns] = ["web", "dns"].map(|name| labels.intern(name));
        assert!(queues.dropped().is_empty());
        let _web = queues.watch(&one, &web).unwrap();
        let watch = queues.watch(&two, &dns).unwrap();
        let inode = fstat(&two).unwrap().st_ino;
        for drops in [3, 3, 7] {
            lock(&queues.0).see(inode, drops);
        }
        lock(&queues.0).see(inode + 1_000_000, 9);
        drop(watch);
        lock(&queues.0).see(inode, 100);
        let counts = queues.dropped();
        let counts: Vec<_> = counts.iter().map(|(listener, count)| (&**listener, *count)).collect();
        assert_eq!(counts, [("dns", 7), ("web", 0)]);
    }
}
