//! What the machine lets the process have: processors and file descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::StartError;
use crate::config::Process;
use crate::forward::pipe;

/// How many sessions the process can carry, and what that was computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Sessions at once.
    pub sessions: usize,
    /// Sessions that the descriptors allow; less than `sessions` only where the operator asked for more.
    pub possible: usize,
    /// Splice pipes at once.
    pub pipes: u64,
    /// The file-descriptor limit in force.
    pub descriptors: u64,
    /// Worker threads.
    pub workers: usize,
}

/// Descriptors of a session: its two sockets.
const PER_SESSION: u64 = 2;
/// Descriptors of a pipe.
const PER_PIPE: u64 = 2;
/// Descriptors of a worker beside its listening sockets: epoll, its waker, its timer.
const PER_WORKER: u64 = 4;
/// Descriptors for everything else: standard streams, logs, probes, pages, and 128 health checks at once.
const RESERVE: u64 = 256;

/// Worker threads: as configured, or one for each processor that the process may use.
pub(super) fn workers(configured: usize) -> usize {
    match configured {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

/// Raises the soft descriptor limit to the hard one, and computes what it allows.
pub(super) fn capacity(process: &Process, workers: usize, listening: usize) -> Result<Capacity, StartError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // An ordinary user may do this; where it is refused, the soft limit stays.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let descriptors = if raised.is_ok() { maximum } else { current }.unwrap_or(u64::MAX);
    compute(process, workers, listening, descriptors)
}

fn compute(
    process: &Process,
    workers: usize,
    listening: usize,
    descriptors: u64,
) -> Result<Capacity, StartError> {
    let pipes = process.pipe_memory / pipe::CAPACITY as u64;
    let fixed = RESERVE + workers as u64 * (PER_WORKER + listening as u64);
    // Pipes take what they need of the rest, but never more than a quarter: without one a session copies.
    let rest = descriptors.saturating_sub(fixed);
    let pipes = pipes.min(rest / 4 / PER_PIPE);
    let for_sessions = rest - pipes * PER_PIPE;
    let possible = usize::try_from(for_sessions / PER_SESSION).unwrap_or(usize::MAX);
    if possible == 0 {
        return Err(StartError::Descriptors { needed: fixed + PER_SESSION, found: descriptors });
    }
    let sessions = if process.max_sessions == 0 { possible } else { process.max_sessions };
    Ok(Capacity { sessions, possible, pipes, descriptors, workers })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(max_sessions: usize, pipe_memory: u64) -> Process {
        Process { workers: 0, max_sessions, pipe_memory }
    }

    fn sessions(process: &Process, descriptors: u64) -> Result<usize, String> {
        compute(process, 2, 3, descriptors)
            .map(|capacity| capacity.sessions)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sessions_take_what_listeners_pipes_and_reserve_leave() {
        let mib_64 = 64 * 1024 * 1024;
        assert_eq!(sessions(&process(0, mib_64), 20_000), Ok((20_000 - 256 - 14 - 512) / 2));
        assert_eq!(sessions(&process(0, 0), 20_000), Ok((20_000 - 256 - 14) / 2));
        assert_eq!(sessions(&process(0, u64::MAX / 4), 1_270), Ok((1_000 - 250) / 2));
        assert_eq!(sessions(&process(7, mib_64), 20_000), Ok(7));
    }

    #[test]
    fn too_few_descriptors_are_an_error_with_a_remedy() {
        assert_eq!(sessions(&process(0, 0), 272), Ok(1));
        let message = sessions(&process(0, 0), 271).unwrap_err();
        assert!(message.contains("must be at least 272, found 271; raise LimitNOFILE"), "{message}");
    }

    #[test]
    fn workers_are_the_processors_unless_somebody_says_otherwise() {
        assert!(workers(0) >= 1);
        assert_eq!(workers(3), 3);
    }
}
