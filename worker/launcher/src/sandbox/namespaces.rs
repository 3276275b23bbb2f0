//! User namespaces and the id ranges mapped into them.
//!
//! Both maps are written from outside, by the parent: a process that writes its own may map
//! one id only.

use super::sys::{self, Fork, Process};
use crate::id_range::{IMAGE_RANGE, IdRange, RANGE_SIZE};
use rustix::process::{Signal, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The namespaces of a task, made in one step. The cgroup and time namespaces follow from within,
/// because the first must see the task's own control groups as its root.
pub(crate) const TASK_NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// Maps `count` ids from `inside` to `outside`, for users and groups.
pub(crate) fn write_maps(process: &Process, inside: u32, outside: u32) -> io::Result<()> {
    let line = format!("{inside} {outside} {RANGE_SIZE}");
    fs::write(format!("/proc/{}/uid_map", process.pid), &line)?;
    fs::write(format!("/proc/{}/gid_map", process.pid), &line)
}

/// A user namespace whose only use is to say how a layer's ids appear in a task: an id of the image range
/// as the same id of the task's range. The process that made it is gone when this returns.
pub(crate) fn layer_mapping(range: IdRange) -> io::Result<OwnedFd> {
    let (wait, hold) = io::pipe()?;
    match sys::fork(libc::CLONE_NEWUSER)? {
        Fork::Child => {
            drop(hold);
            let _ = io::Read::read(&mut &wait, &mut [0]); // ends when the parent has what it needs
            sys::exit_now(0)
        }
        Fork::Parent(process) => {
            let namespace = write_maps(&process, IMAGE_RANGE.base(), range.base())
                .and_then(|()| fs::File::open(format!("/proc/{}/ns/user", process.pid)));
            drop(hold);
            let reaped = reap(&process);
            Ok(namespace.and_then(|file| reaped.map(|()| file))?.into())
        }
    }
}

/// Opens a namespace of a process.
pub(crate) fn open(process: &Process, kind: &str) -> io::Result<OwnedFd> {
    Ok(fs::File::open(format!("/proc/{}/ns/{kind}", process.pid))?.into())
}

/// Waits for a child's end.
pub(crate) fn reap(process: &Process) -> io::Result<()> {
    let id = rustix::process::WaitId::PidFd(process.handle.as_fd());
    rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED)?;
    Ok(())
}

/// Kills a child and waits for its end.
pub(crate) fn kill_and_reap(process: &Process) -> io::Result<()> {
    pidfd_send_signal(&process.handle, Signal::KILL)?;
    reap(process)
}
