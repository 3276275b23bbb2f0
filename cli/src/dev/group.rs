//! Control groups of the nodes, on the unified hierarchy: it kills a group at once, which version 1 cannot.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::refusal::{Code, Refusal};

/// Killed processes are gone within milliseconds; one in the middle of a disk write takes longer.
const GONE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(5);

/// The group of one node, or of all.
#[derive(Debug, Clone)]
pub(super) struct Group {
    path: PathBuf,
}

/// A process of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) program: String,
}

impl Group {
    /// The group at this path.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// A node's group below this one.
    pub(super) fn of(&self, node: &str) -> Self {
        Self::at(self.path.join(node))
    }

    /// Makes it. Controllers that the unified hierarchy has are passed on to those below.
    pub(super) fn create(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let controllers = std::fs::read_to_string(self.path.join("cgroup.controllers"))?;
        let passed_on: Vec<String> = controllers
            .split_whitespace()
            .filter(|one| ["cpu", "memory", "pids"].contains(one))
            .map(|one| format!("+{one}"))
            .collect();
        if passed_on.is_empty() {
            return Ok(()); // version 1 has them
        }
        std::fs::write(self.path.join("cgroup.subtree_control"), passed_on.join(" "))
    }

    /// Moves the calling process in, all that it starts from now on with it.
    pub(super) fn enter(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.path)?;
        std::fs::write(self.path.join("cgroup.procs"), "0")
    }

    /// Whether a process is in it or below.
    pub(super) fn populated(&self) -> io::Result<bool> {
        match std::fs::read_to_string(self.path.join("cgroup.events")) {
            Ok(events) => Ok(populated(&events)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            // What the kernel says of a group that goes while it is read.
            Err(e) if e.raw_os_error() == Some(nix::libc::ENODEV) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The processes in it, those of tasks left out: they are in groups below.
    pub(super) fn processes(&self) -> Vec<Process> {
        let of = |group: &Path| {
            let members = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            members
                .lines()
                .filter_map(|line| {
                    let pid = line.parse().ok()?;
                    Some(Process {
                        pid,
                        program: program(pid)?,
                    })
                })
                .collect::<Vec<_>>()
        };
        // Where the unified hierarchy has the controllers, the launcher makes a leaf for itself.
        let mut all = of(&self.path);
        all.extend(of(&self.path.join("launcher")));
        all
    }

    /// Kills everything in it and below at once, and waits until it is gone.
    pub(super) async fn kill(&self) -> io::Result<()> {
        match std::fs::write(self.path.join("cgroup.kill"), "1") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        }
        let gone = async {
            while self.populated()? {
                tokio::time::sleep(LOOK).await;
            }
            Ok(())
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "killed processes do not go");
        tokio::time::timeout(GONE, gone).await.map_err(late)?
    }

    /// Kills one process, if it still is of this group.
    pub(super) fn kill_process(&self, process: &Process) -> io::Result<bool> {
        let Some(pid) = Pid::from_raw(process.pid) else {
            return Ok(false);
        };
        // The descriptor is of whoever has the number now; only then it is asked who that is.
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        if !self.processes().contains(process) {
            return Ok(false);
        }
        pidfd_send_signal(&handle, Signal::KILL)?;
        Ok(true)
    }

    /// Removes it and the groups below, which must be empty of processes.
    pub(super) fn remove(&self) -> io::Result<()> {
        fn remove(path: &Path) -> io::Result<()> {
            for entry in std::fs::read_dir(path)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    remove(&entry.path())?;
                }
            }
            std::fs::remove_dir(path)
        }
        match remove(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// Where the unified hierarchy is mounted.
pub(super) fn unified() -> Result<PathBuf, Refusal> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounted(&mounts).ok_or_else(|| {
        let help =
            "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified";
        Refusal::new(
            Code::DevPrivilege,
            "control groups",
            "the unified hierarchy (cgroup v2) is not mounted; it is what kills a node at once",
            help,
        )
    })
}

fn mounted(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        (right.split(' ').next()? == "cgroup2").then(|| PathBuf::from(point))
    })
}

fn populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// The name of a process's program.
fn program(pid: i32) -> Option<String> {
    let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = path.file_name()?.to_str()?;
    Some(name.trim_end_matches(" (deleted)").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_beside_version_1() {
        let text = "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                    31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw\n";
        assert_eq!(mounted(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted("30 24 0:26 / /sys rw - sysfs sysfs rw\n"), None);
    }

    #[test]
    fn a_group_says_whether_anybody_is_in_it() {
        assert!(populated("populated 1\nfrozen 0\n"));
        assert!(!populated("populated 0\nfrozen 0\n"));
    }

    #[test]
    fn a_process_is_known_by_its_program() {
        let own = std::env::current_exe().expect("a test has a path");
        let name = own.file_name().expect("a name").to_string_lossy().into_owned();
        let pid = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!(program(pid), Some(name));
        assert_eq!(program(0), None);
    }
}
