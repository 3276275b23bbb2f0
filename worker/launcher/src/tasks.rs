//! What is written down about tasks: one folder each, below the launcher's own.
//!
//! `record` is written before anything is made, so that after a crash whatever was made is found and
//! removed; `exit` is the supervisor's; `current` and `previous` are the log; `control` is the
//! supervisor's socket.

use crate::id_range::IdRange;
use crate::message::{DiffId, ExitRecord, TaskId};
use crate::sandbox::cgroup::TaskGroups;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// What the launcher must remember of a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TaskRecord {
    /// Which task.
    pub task: TaskId,
    /// The fencing epoch it was started with.
    pub epoch: u64,
    /// Its layers, base first: not to be removed while it exists.
    pub layers: Vec<DiffId>,
    /// Its ids.
    pub range: IdRange,
    /// Its control groups.
    pub groups: TaskGroups,
    /// In which boot of the machine: in another one nothing of it is left but this folder.
    pub boot_id: String,
    /// Milliseconds since 1970.
    pub started_at_ms: u64,
    /// Its supervisor's process id and start time, once there is one; its program's id, once it runs.
    pub supervisor: Option<ProcessId>,
    /// Its program's process id, once it runs.
    pub pid: Option<u32>,
}

/// A process that a reused number cannot be mistaken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in the kernel's ticks since the boot.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub(crate) fn of(pid: u32) -> io::Result<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The second field is a name that may hold anything; the others follow its last bracket.
        let started = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok());
        started
            .map(|started| ProcessId { pid, started })
            .ok_or(io::ErrorKind::InvalidData.into())
    }

    /// Whether it still exists.
    pub(crate) fn is_alive(self) -> bool {
        ProcessId::of(self.pid).is_ok_and(|now| now == self)
    }
}

/// This boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// The folder that holds the tasks' folders.
#[derive(Debug)]
pub(crate) struct TaskFolders {
    folder: PathBuf,
}

impl TaskFolders {
    /// Opens or makes it.
    pub(crate) fn open(folder: PathBuf) -> io::Result<TaskFolders> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        Ok(TaskFolders { folder })
    }

    /// Writes a record; the first one makes the folder.
    pub(crate) fn save(&self, record: &TaskRecord) -> io::Result<()> {
        let folder = self.path(&record.task);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        fs::write(folder.join("record.draft"), serde_json::to_vec(record)?)?;
        fs::rename(folder.join("record.draft"), folder.join("record"))
    }

    /// All tasks written down. A folder without a readable record is of a start that had made nothing yet.
    pub(crate) fn load(&self) -> io::Result<Vec<TaskRecord>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            match fs::read(path.join("record")).map(|text| serde_json::from_slice(&text)) {
                Ok(Ok(record)) => records.push(record),
                _ => fs::remove_dir_all(path)?,
            }
        }
        Ok(records)
    }

    /// How a task ended, if its supervisor wrote it down.
    pub(crate) fn exit(&self, task: &TaskId) -> Option<ExitRecord> {
        serde_json::from_slice(&fs::read(self.path(task).join("exit")).ok()?).ok()
    }

    /// Writes down an end that no supervisor saw.
    pub(crate) fn save_exit(&self, task: &TaskId, exit: &ExitRecord) -> io::Result<()> {
        fs::write(self.path(task).join("exit"), serde_json::to_vec(exit)?)
    }

    /// Forgets a task.
    pub(crate) fn remove(&self, task: &TaskId) -> io::Result<()> {
        match fs::remove_dir_all(self.path(task)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A task's folder, for its supervisor.
    pub(crate) fn descriptor(&self, task: &TaskId) -> io::Result<OwnedFd> {
        Ok(File::open(self.path(task))?.into())
    }

    /// A task's log files, older first.
    pub(crate) fn logs(&self, task: &TaskId) -> io::Result<Vec<OwnedFd>> {
        let folder = self.descriptor(task)?;
        let open = |name| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&folder, name, flags, Mode::empty()) {
                Err(rustix::io::Errno::NOENT) => Ok(None),
                result => result.map(Some),
            }
        };
        // The current one first: should it be renamed in between, then it is the one and only.
        let current = open("current")?;
        let previous = open("previous")?;
        Ok(previous.into_iter().chain(current).collect())
    }

    /// Connects to a task's supervisor, and tells which process it is.
    pub(crate) fn connect(&self, task: &TaskId) -> io::Result<(OwnedFd, u32)> {
        let folder = self.descriptor(task)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(socket_path(folder.as_fd()))?)?;
        let peer = rustix::net::sockopt::socket_peercred(&socket)?;
        if !peer.uid.is_root() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok((socket, peer.pid.as_raw_nonzero().get().cast_unsigned()))
    }

    fn path(&self, task: &TaskId) -> PathBuf {
        self.folder.join(task.as_str())
    }
}

/// The name of a supervisor's socket, through a descriptor: a socket's name is at most 107 bytes.
pub(crate) fn socket_path(folder: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join("control")
}
