//! Whether this process can end without the kernel or a container runtime ending its successor with it.

use std::fs;
use std::process;

use rustix::process::getppid;

/// Inits for containers that end with the one child they start, by their names in /proc/1/comm.
const INITS: [&str; 5] = ["tini", "docker-init", "dumb-init", "catatonit", "podman-init"];

/// What to do where a takeover is refused.
const REMEDY: &str =
    "start another container with the new program, and send SIGTERM to this process to drain it";

/// Why a successor in the same PID namespace would end with this process, and what to do instead; `None` where it would not.
/// A process that is a successor itself is no container's main process, unless it is PID 1.
#[must_use]
pub fn takeover_obstacle(is_successor: bool) -> Option<String> {
    let init = || fs::read_to_string("/proc/1/comm").unwrap_or_default();
    let parent = getppid().map_or(0, |parent| parent.as_raw_nonzero().get());
    let why = reason(process::id(), parent, is_successor, init)?;
    Some(format!("{why}; {REMEDY}"))
}

fn reason(own: u32, parent: i32, is_successor: bool, init: impl Fn() -> String) -> Option<String> {
    if own == 1 {
        // pid_namespaces(7): when the init of a PID namespace ends, the kernel kills every process in it.
        return Some(
            "this process is PID 1, and the kernel ends every process of a PID namespace with its PID 1"
                .to_owned(),
        );
    }
    if is_successor {
        return None;
    }
    match parent {
        // Its parent is outside of the PID namespace: a container runtime, where the namespace is shared with other
        // containers. It ends what is left of a container whose main process has ended.
        0 => Some("this process is the main process of its container; the container ends with it".to_owned()),
        1 => {
            let init = init();
            let init = INITS.into_iter().find(|name| *name == init.trim_end())?;
            Some(format!("this process is the child of {init}, which is PID 1 and ends with it"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_process_of_a_container_cannot_leave_a_successor() {
        let reason =
            |own, parent, is_successor, init: &str| reason(own, parent, is_successor, || format!("{init}\n"));
        assert!(reason(1, 0, false, "vestibule").unwrap().contains("is PID 1"));
        assert!(reason(1, 0, true, "vestibule").is_some());
        assert!(reason(7, 0, false, "pause").unwrap().contains("main process of its container"));
        for init in INITS {
            assert!(reason(7, 1, false, init).unwrap().contains(init));
            // The child that the init started is another one, or this one would not live.
            assert_eq!(reason(9, 1, true, init), None);
        }
        assert_eq!(reason(700, 1, false, "systemd"), None);
        assert_eq!(reason(700, 300, false, "tini"), None);
    }
}
