//! What the worker may ask of the launcher, and what the launcher answers.
//!
//! The worker speaks to the network; the launcher is root. This closed enum is the whole
//! surface between them: tasks and layers are named by id, never by a path, and nothing here
//! can express a host folder, a host namespace, a capability or a weaker profile.
//!
//! Messages are JSON, one per `SOCK_SEQPACKET` message, with descriptors beside them
//! ([`crate::connection::Connection`]). A request carries a number that its reply repeats: replies
//! may come in another order than the requests, because unpacking takes seconds and a
//! kill must not wait for it. Secret values never pass here: `Start` brings one end of a
//! stream socket, which the launcher hands on to the task's supervisor unread.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of one encoded message. Below the kernel's default socket buffer (212,992), so that a
/// message never needs a privilege to be sent.
pub const MAX_MESSAGE_BYTES: usize = 192 * 1024;
/// Descriptors beside one message; the kernel's own limit is 253.
pub const MAX_DESCRIPTORS: usize = 64;
/// Sockets that one `Sockets` request may ask for.
pub const MAX_SOCKETS: u32 = 32;
/// Tasks in one `List` reply; ask again with `after` for the rest.
pub const LIST_PAGE: usize = 200;

/// A request with the number that its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// Chosen by the worker; unique among its unanswered requests.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What a worker can ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// What this kernel and machine offer. Reply: [`Reply::Node`].
    Probe,
    /// Unpacks a layer. Brings one descriptor: the blob, read-only, at its start.
    /// Reply: [`Reply::Layer`]; at once when the layer is already there and whole.
    UnpackLayer(UnpackLayer),
    /// Compares an unpacked layer with its recorded tree digest. Reply: [`Reply::Layer`].
    VerifyLayer {
        /// Which layer.
        diff_id: DiffId,
    },
    /// Deletes a layer that no task uses. Reply: [`Reply::Done`], also when it is absent.
    RemoveLayer {
        /// Which layer.
        diff_id: DiffId,
    },
    /// Which layers are unpacked. Reply: [`Reply::Layers`].
    Layers {
        /// Only layers after this one, for the next page.
        after: Option<DiffId>,
    },
    /// Starts a task. Brings one descriptor when `secrets` is not empty: a stream socket from
    /// which the values are read, one after the other in the order of `secrets`, to its end.
    /// Reply: [`Reply::Started`] once the program was executed.
    Start(Box<TaskSpec>),
    /// Stops or kills a task. Reply: [`Reply::Done`] when sent; the exit follows as an event.
    Signal {
        /// Which task.
        task: TaskId,
        /// How.
        signal: TaskSignal,
    },
    /// New TCP sockets inside the task's network namespace, not connected: connect them to
    /// 127.0.0.1. Reply: [`Reply::Sockets`] with as many descriptors.
    Sockets {
        /// Which task.
        task: TaskId,
        /// How many, at most [`MAX_SOCKETS`].
        count: u32,
    },
    /// The task's log files, read-only: older first, one or two ([`crate::log_file`]).
    /// Reply: [`Reply::Logs`] with as many descriptors.
    Logs {
        /// Which task.
        task: TaskId,
    },
    /// All tasks known here, also exited ones not yet removed. Reply: [`Reply::Tasks`].
    List {
        /// Only tasks after this one, for the next page.
        after: Option<TaskId>,
    },
    /// The sandbox of a running task as the kernel reports it. Reply: [`Reply::Profile`].
    Inspect {
        /// Which task.
        task: TaskId,
    },
    /// Forgets an exited task: logs, record, control groups, id range. A running task is
    /// refused. Reply: [`Reply::Done`], also when the task is unknown.
    Remove {
        /// Which task.
        task: TaskId,
    },
}

/// What the launcher sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FromLauncher {
    /// The answer to one request.
    Reply {
        /// The request's number.
        id: u64,
        /// The answer.
        result: Result<Reply, Refusal>,
    },
    /// Something happened by itself. Events may be lost when the worker restarts; `List`
    /// tells the same.
    Event(Event),
}

/// Answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// To `Probe`.
    Node(NodeFacts),
    /// To `UnpackLayer` and `VerifyLayer`.
    Layer(LayerRecord),
    /// To `Layers`.
    Layers {
        /// In the order of their ids.
        layers: Vec<LayerRecord>,
        /// Whether another page follows.
        more: bool,
    },
    /// To `Start`.
    Started(TaskStatus),
    /// To `Sockets`; the descriptors are beside the message.
    Sockets,
    /// To `Logs`; the descriptors are beside the message, older first.
    Logs,
    /// To `List`.
    Tasks {
        /// In the order of their ids.
        tasks: Vec<TaskStatus>,
        /// Whether another page follows.
        more: bool,
    },
    /// To `Inspect`.
    Profile(Box<Profile>),
}

/// What happens without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Event {
    /// A task ended. Its record stays until `Remove`.
    Exited {
        /// Which task.
        task: TaskId,
        /// The fencing epoch it was started with.
        epoch: u64,
        /// How it ended.
        exit: ExitRecord,
    },
}

/// Why the launcher did not do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// For the caller's decisions.
    pub code: RefusalCode,
    /// For people: what, why, and what to do. Names no host path.
    pub message: String,
}

impl Refusal {
    /// A refusal with its reason.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Refusal {
            code,
            message: message.into(),
        }
    }
}

/// The kinds of refusal that a worker may treat differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// The request breaks a limit or rule; the same request will always be refused.
    Invalid,
    /// No such task.
    UnknownTask,
    /// No such layer: unpack it first.
    UnknownLayer,
    /// A task of this id exists.
    TaskExists,
    /// The task is not in a state for this (running when it must not be, or the reverse).
    WrongState,
    /// In use, or too many at once: try again later.
    Busy,
    /// This kernel or file system lacks what is needed.
    Unsupported,
    /// The layer is malformed or hostile; no retry will help.
    HostileLayer,
    /// The content is not what its digest says.
    DigestMismatch,
    /// The program cannot be executed: missing, not executable, wrong format.
    NotExecutable,
    /// Setting up the sandbox failed.
    StartFailed,
    /// Anything else; the launcher's log has the details.
    Internal,
}

/// The id of a task: 1 to 64 of `a-z A-Z 0-9 - _`, starting with a letter or digit. It names a
/// folder and a control group, so it can be neither a path nor an option.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TaskId(String);

impl TaskId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TaskId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let starts_well = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if starts_well && text.len() <= 64 && text.bytes().all(valid) {
            Ok(TaskId(text))
        } else {
            Err(InvalidId)
        }
    }
}

impl From<TaskId> for String {
    fn from(id: TaskId) -> String {
        id.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The digest of a layer's uncompressed archive: `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiffId(String);

impl DiffId {
    /// The whole digest, with its algorithm.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The 64 hex digits.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl TryFrom<String> for DiffId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        let hex = text.strip_prefix("sha256:").ok_or(InvalidId)?;
        let valid = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() == 64 && hex.bytes().all(valid) {
            Ok(DiffId(text))
        } else {
            Err(InvalidId)
        }
    }
}

impl From<DiffId> for String {
    fn from(id: DiffId) -> String {
        id.0
    }
}

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that is not a valid id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid id")]
pub struct InvalidId;

/// A layer to unpack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnpackLayer {
    /// What the uncompressed archive must hash to.
    pub diff_id: DiffId,
    /// How the blob is compressed.
    pub compression: Compression,
    /// The blob's size in bytes; a descriptor of another size is refused.
    pub size: u64,
}

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// What is known of an unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRecord {
    /// The digest of its uncompressed archive.
    pub diff_id: DiffId,
    /// SHA-256 (hex) over the unpacked tree: names, types, modes, owners, contents.
    pub tree_digest: String,
    /// Files, folders and links.
    pub entries: u64,
    /// Sum of the file sizes.
    pub bytes: u64,
    /// Whether the layer hides entries of those below it (whiteouts).
    pub masks: bool,
}

/// A task to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// The task's id.
    pub task: TaskId,
    /// Fencing epoch of this start; repeated in status and events.
    pub epoch: u64,
    /// Unpacked layers, base first, as in the image's configuration.
    pub layers: Vec<DiffId>,
    /// Program and arguments. A program without `/` is looked for in the `PATH` of `env`.
    pub argv: Vec<String>,
    /// The exact environment. Nothing is added.
    pub env: Vec<(String, String)>,
    /// `""` (root of the sandbox), `uid`, `uid:gid`, `name` or `name:group`; numbers are ids,
    /// names are looked up in the image.
    pub user: String,
    /// Absolute folder inside the image, or `""` for `/`.
    pub workdir: String,
    /// The task's host name.
    pub hostname: String,
    /// Writable places, besides `/tmp` (64 MiB unless named here) and `/dev/shm`.
    pub tmpfs: Vec<Tmpfs>,
    /// What it may use.
    pub limits: Limits,
    /// Files to appear in `/run/secrets`; the values come over the stream beside the message.
    pub secrets: Vec<SecretFile>,
    /// From SIGTERM to SIGKILL when the task is stopped.
    pub stop_grace_ms: u64,
}

/// A writable place in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    /// Absolute path inside the task.
    pub path: String,
    /// Its size; counts towards the memory limit as it fills.
    pub size_bytes: u64,
}

/// What a task may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory, page cache and tmpfs included; there is no swap beside it.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
    /// Thousandths of a processor, if limited.
    pub cpu_millis: Option<u32>,
    /// Relative share when processors are short, 1 to 10,000; the usual is 100.
    pub cpu_weight: u32,
    /// Log kept on disk, both files together.
    pub log_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory_bytes: 256 << 20,
            pids: 512,
            cpu_millis: None,
            cpu_weight: 100,
            log_bytes: 10 << 20,
        }
    }
}

/// A secret to place into the task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretFile {
    /// The file's name in `/run/secrets`.
    pub name: String,
    /// The length of its value in the stream.
    pub size: u32,
}

/// How to end a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskSignal {
    /// SIGTERM, then SIGKILL when the task's grace period is over.
    Term,
    /// SIGKILL to all of it, now.
    Kill,
}

/// A task as the launcher knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskStatus {
    /// Which task.
    pub task: TaskId,
    /// The fencing epoch it was started with.
    pub epoch: u64,
    /// The program's process id on the host; 0 while starting.
    pub pid: u32,
    /// Milliseconds since 1970 at the start.
    pub started_at_ms: u64,
    /// Where it stands.
    pub state: TaskState,
}

/// Where a task stands. Monotone: it only moves down this list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskState {
    /// Its sandbox is being built.
    Starting,
    /// Its program was executed.
    Running,
    /// It ended.
    Exited(ExitRecord),
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitRecord {
    /// How the program ended.
    pub cause: ExitCause,
    /// Whether the kernel killed a process of it for want of memory.
    pub out_of_memory: bool,
    /// Milliseconds since 1970.
    pub ended_at_ms: u64,
    /// For people; names the flag to raise when a limit was the cause.
    pub message: String,
}

/// How a task's program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitCause {
    /// It exited by itself with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It never ran; the reason is in the message.
    NeverRan,
    /// Its supervisor or the host ended with it; nobody saw how.
    Lost,
}

/// What the machine offers. Each feature that is absent has a line in `fallbacks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFacts {
    /// The kernel's release.
    pub kernel: String,
    /// Landlock's version; 0 when absent.
    pub landlock_abi: u32,
    /// `v1`, `v2` or `hybrid`.
    pub cgroup: String,
    /// Controllers that limits are enforced with.
    pub controllers: Vec<String>,
    /// Whether secrets are kept from swap by tmpfs itself.
    pub tmpfs_noswap: bool,
    /// Whether tasks get their own time namespace.
    pub time_namespace: bool,
    /// Total memory in bytes, the launcher's own control group considered.
    pub memory_bytes: u64,
    /// Processors in thousandths.
    pub cpu_millis: u64,
    /// What is done instead of each absent feature, for `node inspect`.
    pub fallbacks: Vec<String>,
}

/// The sandbox of a running task, as the kernel reports it from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Lines of the program's `status` that tell privileges: `Uid`, `Gid`, `Groups`, `Cap*`,
    /// `NoNewPrivs`, `Seccomp`, `Seccomp_filters`.
    pub status: Vec<(String, String)>,
    /// The user namespace's maps: inside, outside, count.
    pub uid_map: Vec<[u32; 3]>,
    /// The same for groups.
    pub gid_map: Vec<[u32; 3]>,
    /// Namespace kind and inode number.
    pub namespaces: Vec<(String, u64)>,
    /// Mount point, file system, options; as the task sees them.
    pub mounts: Vec<(String, String, String)>,
    /// Control group file and its value.
    pub limits: Vec<(String, String)>,
    /// The layers its root is made of, base first.
    pub layers: Vec<DiffId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_be_paths_or_options() {
        let valid = |text: &str| TaskId::try_from(text.to_owned()).is_ok();
        assert!(valid("web-1") && valid("0199a") && valid("A_b"));
        for bad in ["", "-x", ".", "..", "a/b", "a b", "a\n", "é", &"a".repeat(65)] {
            assert!(!valid(bad), "{bad:?}");
        }
    }

    #[test]
    fn diff_ids_are_sha256_in_lower_case() {
        let valid = |text: String| DiffId::try_from(text).is_ok();
        assert!(valid(format!("sha256:{}", "0a".repeat(32))));
        for bad in [
            format!("sha512:{}", "0a".repeat(32)),
            format!("sha256:{}", "0A".repeat(32)),
            "sha256:".into(),
        ] {
            assert!(!valid(bad));
        }
    }

    #[test]
    fn a_request_with_an_unknown_field_is_refused() {
        let text = r#"{"id":1,"request":{"Sockets":{"task":"a","count":1,"path":"/"}}}"#;
        assert!(serde_json::from_str::<Envelope>(text).is_err());
    }
}
