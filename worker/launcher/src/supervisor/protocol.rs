//! What passes between the launcher and a task's supervisor.

use crate::id_range::IdRange;
use crate::message::{ExitRecord, Refusal, TaskSpec};
use crate::sandbox::cgroup::TaskGroups;
use serde::{Deserialize, Serialize};

/// From the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToSupervisor {
    /// First and once. Beside it: the launcher's state folder, the task's folder, the task's filters, the
    /// supervisor's own, and the stream of secrets if there are any.
    Start(Box<Assignment>),
    /// SIGTERM, then SIGKILL after the grace period.
    Stop,
    /// SIGKILL.
    Kill,
    /// New sockets in the task's network. Answered by `Sockets`.
    Sockets {
        /// How many.
        count: u32,
    },
}

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromSupervisor {
    /// The program was executed.
    Started {
        /// Its process id on the host.
        pid: u32,
    },
    /// It was not; nothing of it remains.
    Failed(Refusal),
    /// The sockets, beside this message.
    Sockets,
    /// They could not be made.
    NoSockets(Refusal),
    /// The task ended, and its record is written.
    Exited(ExitRecord),
}

/// A task with what the launcher decided about it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// What the worker asked for, checked.
    pub spec: TaskSpec,
    /// Layer folders below the state folder, topmost first.
    pub layers: Vec<String>,
    /// Its ids on the host.
    pub range: IdRange,
    /// Its control groups, with limits set.
    pub groups: TaskGroups,
}
