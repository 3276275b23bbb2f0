//! The launcher's one loop: requests from the worker, news from supervisors and unpackers.
//!
//! Single-threaded, and nothing in it waits: starting a task hands its assignment to a new supervisor and
//! goes on; the answer comes when the supervisor tells.

use crate::clock;
use crate::connection::Connection;
use crate::id_range::IdRanges;
use crate::layers::{Asker, Finished, Layers};
use crate::message::{
    DiffId, Envelope, Event, ExitCause, ExitRecord, FromLauncher, LIST_PAGE, MAX_SOCKETS, NodeFacts, Refusal,
    RefusalCode, Reply, Request, TaskId, TaskSignal, TaskSpec, TaskState, TaskStatus, UnpackLayer,
};
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::sys;
use crate::spec;
use crate::supervisor::protocol::{Assignment, FromSupervisor, ToSupervisor};
use crate::tasks::{ProcessId, TaskFolders, TaskRecord};
use crate::unpack::Job;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Tasks on one node: what the id ranges and the worker's lists hold.
const MAX_TASKS: usize = 2_000;
/// Messages waiting for a worker that does not read; after that it is beyond help and restarted.
const MAX_OUTGOING: usize = 4_096;
/// How often to look whether a killed group is empty: the kernel does not tell on version 1.
const CLEANUP_EVERY: Duration = Duration::from_millis(20);

mod layer_requests;
mod removal;
mod starts;
mod supervised;

use starts::WaitingStart;

/// A task as the launcher handles it.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) record: TaskRecord,
    pub(crate) state: TaskState,
    pub(crate) control: Option<Connection>,
    start_asker: Option<Asker>,
    socket_askers: VecDeque<Asker>,
    /// Asked to be forgotten.
    removers: Vec<Asker>,
}

impl Task {
    pub(crate) fn new(record: TaskRecord, state: TaskState, control: Option<Connection>) -> Task {
        Task {
            record,
            state,
            control,
            start_asker: None,
            socket_askers: VecDeque::new(),
            removers: Vec::new(),
        }
    }

    fn status(&self) -> TaskStatus {
        TaskStatus {
            task: self.record.task.clone(),
            epoch: self.record.epoch,
            pid: self.record.pid.unwrap_or(0),
            started_at_ms: self.record.started_at_ms,
            state: self.state.clone(),
        }
    }
}

/// What supervisors and unpackers are made of.
#[derive(Debug)]
pub(crate) struct Programs {
    /// This program, sealed in memory.
    pub program: OwnedFd,
    /// A task's filters.
    pub task_filters: OwnedFd,
    /// A supervisor's.
    pub supervisor_filters: OwnedFd,
    /// An unpacker's.
    pub unpacker_filters: OwnedFd,
    /// The launcher's state folder.
    pub state: OwnedFd,
}

/// The connection to the present worker.
#[derive(Debug)]
struct WorkerLink {
    connection: Connection,
    outgoing: VecDeque<(FromLauncher, Vec<OwnedFd>)>,
}

/// The launcher's state.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) programs: Programs,
    pub(crate) folders: TaskFolders,
    pub(crate) layers: Layers,
    pub(crate) cgroups: Cgroups,
    pub(crate) ids: IdRanges,
    pub(crate) tasks: BTreeMap<TaskId, Task>,
    pub(crate) boot_id: String,
    facts: NodeFacts,
    waiting: Vec<WaitingStart>,
    worker: Option<WorkerLink>,
    worker_number: u64,
}

impl Server {
    /// Puts the parts together; [`crate::reconcile`] fills in what there was.
    pub(crate) fn new(
        programs: Programs,
        (folders, layers): (TaskFolders, Layers),
        cgroups: Cgroups,
        ids: IdRanges,
        facts: NodeFacts,
        boot_id: String,
    ) -> Server {
        Server {
            programs,
            folders,
            layers,
            cgroups,
            ids,
            tasks: BTreeMap::new(),
            boot_id,
            facts,
            waiting: Vec::new(),
            worker: None,
            worker_number: 0,
        }
    }

    /// A new worker is at the other end of this connection; answers to the old one are dropped.
    pub(crate) fn set_worker(&mut self, connection: Connection) {
        self.worker_number += 1;
        self.worker = Some(WorkerLink {
            connection,
            outgoing: VecDeque::new(),
        });
    }

    /// The worker is gone.
    pub(crate) fn lose_worker(&mut self) {
        self.worker = None;
    }

    /// Whether a worker is connected.
    pub(crate) fn has_worker(&self) -> bool {
        self.worker.is_some()
    }

    /// What to wait for, and whether to wait until the worker reads.
    pub(crate) fn descriptors(&self) -> Vec<(BorrowedFd<'_>, bool)> {
        let worker = self
            .worker
            .iter()
            .map(|link| (link.connection.as_fd(), !link.outgoing.is_empty()));
        let tasks = self
            .tasks
            .values()
            .filter_map(|task| task.control.as_ref())
            .map(|c| (c.as_fd(), false));
        worker
            .chain(tasks)
            .chain(self.layers.descriptors().map(|fd| (fd, false)))
            .collect()
    }

    /// How long to wait at most.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let cleaning = self.tasks.values().any(|task| !task.removers.is_empty());
        let layers = self
            .layers
            .deadline()
            .map(|at| at.saturating_sub(clock::monotonic()));
        [cleaning.then_some(CLEANUP_EVERY), layers]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does whatever can be done without waiting.
    pub(crate) fn turn(&mut self) {
        self.hear_worker();
        self.hear_supervisors();
        let finished = self.layers.turn(
            self.programs.program.as_fd(),
            self.programs.unpacker_filters.as_fd(),
        );
        for one in finished {
            self.layer_finished(one);
        }
        self.start_waiting();
        self.clean_up();
        self.flush();
    }

    fn hear_worker(&mut self) {
        while let Some(link) = &self.worker {
            match link.connection.receive::<Envelope>() {
                Ok(Some((envelope, descriptors))) => {
                    let asker = Asker {
                        worker: self.worker_number,
                        request: envelope.id,
                    };
                    if let Some(result) = self.handle(asker, envelope.request, descriptors) {
                        self.answer(asker, result, Vec::new());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) => self.lose_worker(),
                Err(error) => {
                    tracing::warn!(%error, "the worker sent something unreadable");
                    self.lose_worker();
                }
            }
        }
    }

    /// Handles a request; `None` when the answer comes later or was sent.
    fn handle(
        &mut self,
        asker: Asker,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Option<Result<Reply, Refusal>> {
        match request {
            Request::Probe => Some(Ok(Reply::Node(self.facts.clone()))),
            Request::UnpackLayer(layer) => self.unpack_layer(asker, layer, descriptors).transpose(),
            Request::VerifyLayer { diff_id } => {
                if !self.layers.contains(&diff_id) {
                    return Some(Err(unknown_layer(&diff_id)));
                }
                self.layers.verify(diff_id, Some(asker)).err().map(Err)
            }
            Request::RemoveLayer { diff_id } => self.remove_layer(asker, diff_id).transpose(),
            Request::Layers { after } => {
                let (layers, more) = self.layers.page(after.as_ref(), LIST_PAGE);
                Some(Ok(Reply::Layers { layers, more }))
            }
            Request::Start(spec) => self.ask_start(asker, *spec, descriptors).err().map(Err),
            Request::Signal { task, signal } => Some(self.signal(&task, signal)),
            Request::Sockets { task, count } => self.ask_sockets(asker, &task, count).err().map(Err),
            Request::Logs { task } => match self.logs(&task) {
                Ok(files) => {
                    self.answer(asker, Ok(Reply::Logs), files);
                    None
                }
                Err(refusal) => Some(Err(refusal)),
            },
            Request::List { after } => {
                let mut rest = self
                    .tasks
                    .iter()
                    .filter(|(id, _)| after.as_ref().is_none_or(|after| *id > after));
                let tasks = rest
                    .by_ref()
                    .take(LIST_PAGE)
                    .map(|(_, task)| task.status())
                    .collect();
                let more = rest.next().is_some();
                Some(Ok(Reply::Tasks { tasks, more }))
            }
            Request::Inspect { task } => Some(self.inspect(&task)),
            Request::Remove { task } => self.remove(asker, &task),
        }
    }

    fn answer(&mut self, asker: Asker, result: Result<Reply, Refusal>, descriptors: Vec<OwnedFd>) {
        if asker.worker == self.worker_number {
            self.send(
                FromLauncher::Reply {
                    id: asker.request,
                    result,
                },
                descriptors,
            );
        }
    }

    fn send(&mut self, message: FromLauncher, descriptors: Vec<OwnedFd>) {
        if let Some(link) = &mut self.worker {
            link.outgoing.push_back((message, descriptors));
        }
    }

    fn flush(&mut self) {
        let Some(link) = &mut self.worker else { return };
        while let Some((message, descriptors)) = link.outgoing.front() {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match link.connection.send(message, &borrowed) {
                Ok(()) => drop(link.outgoing.pop_front()),
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && link.outgoing.len() < MAX_OUTGOING =>
                {
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the worker cannot be told; it will be started again");
                    self.worker = None;
                    return;
                }
            }
        }
    }
}

/// An end that nobody saw.
pub(crate) fn lost(message: &str) -> ExitRecord {
    ExitRecord {
        cause: ExitCause::Lost,
        out_of_memory: false,
        ended_at_ms: clock::wall_ms(),
        message: message.to_owned(),
    }
}

fn invalid(message: &str) -> Refusal {
    Refusal::new(RefusalCode::Invalid, message)
}

fn unknown_task(id: &TaskId) -> Refusal {
    Refusal::new(RefusalCode::UnknownTask, format!("there is no task {id}"))
}

fn unknown_layer(id: &DiffId) -> Refusal {
    Refusal::new(
        RefusalCode::UnknownLayer,
        format!("there is no layer {id}; unpack it first"),
    )
}

fn not_running(id: &TaskId) -> Refusal {
    Refusal::new(RefusalCode::WrongState, format!("task {id} does not run"))
}

fn busy() -> Refusal {
    Refusal::new(
        RefusalCode::Busy,
        "the task's supervisor does not answer, try again",
    )
}

/// The name under which this data folder's groups are kept.
pub(crate) fn group_name(data: &Path) -> String {
    use sha2::{Digest, Sha256};
    use std::os::unix::ffi::OsStrExt;
    let hash = Sha256::digest(data.as_os_str().as_bytes());
    format!(
        "bulkhead-{:02x}{:02x}{:02x}{:02x}",
        hash[0], hash[1], hash[2], hash[3]
    )
}
