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

/// A start that waits for its layers to be verified.
#[derive(Debug)]
struct WaitingStart {
    asker: Asker,
    spec: TaskSpec,
    secrets: Option<OwnedFd>,
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

    fn unpack_layer(
        &mut self,
        asker: Asker,
        layer: UnpackLayer,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Option<Reply>, Refusal> {
        if let Some(record) = self.layers.verified(&layer.diff_id) {
            return Ok(Some(Reply::Layer(record.clone())));
        }
        if self.layers.contains(&layer.diff_id) {
            return self.layers.verify(layer.diff_id, Some(asker)).map(|()| None);
        }
        let blob = descriptors
            .into_iter()
            .next()
            .ok_or_else(|| invalid("no blob came with the request"))?;
        let blob = File::from(blob);
        let facts = blob
            .metadata()
            .map_err(|_| invalid("the blob cannot be examined"))?;
        if !facts.is_file() || facts.len() != layer.size {
            return Err(invalid("the blob is not a file of the size named"));
        }
        self.layers
            .unpack(layer.diff_id, layer.compression, blob.into(), asker)
            .map(|()| None)
    }

    fn remove_layer(&mut self, asker: Asker, diff_id: DiffId) -> Result<Option<Reply>, Refusal> {
        let used = self
            .tasks
            .values()
            .any(|task| task.record.layers.contains(&diff_id))
            || self
                .waiting
                .iter()
                .any(|start| start.spec.layers.contains(&diff_id));
        if used {
            return Err(Refusal::new(RefusalCode::Busy, "a task uses this layer"));
        }
        if !self.layers.contains(&diff_id) {
            return Ok(Some(Reply::Done));
        }
        self.layers.remove(diff_id, asker).map(|()| None)
    }

    fn layer_finished(&mut self, finished: Finished) {
        if let Err(refusal) = &finished.result {
            tracing::warn!(layer = %finished.diff_id, reason = %refusal, "work on a layer failed");
            // Starts that wait for it wait in vain.
            let (lost, kept) = std::mem::take(&mut self.waiting)
                .into_iter()
                .partition(|start| start.spec.layers.contains(&finished.diff_id));
            self.waiting = kept;
            let lost: Vec<WaitingStart> = lost;
            if finished.job == Job::Verify {
                lost.iter()
                    .for_each(|start| self.answer(start.asker, Err(refusal.clone()), Vec::new()));
            } else {
                self.waiting.extend(lost);
            }
        }
        for asker in finished.askers {
            let reply = match &finished.result {
                Ok(Some(record)) => Ok(Reply::Layer(record.clone())),
                Ok(None) => Ok(Reply::Done),
                Err(refusal) => Err(refusal.clone()),
            };
            self.answer(asker, reply, Vec::new());
        }
    }

    fn ask_start(&mut self, asker: Asker, spec: TaskSpec, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
        spec::validate(&spec)?;
        let waiting = self.waiting.iter().any(|start| start.spec.task == spec.task);
        if waiting || self.tasks.contains_key(&spec.task) {
            return Err(Refusal::new(
                RefusalCode::TaskExists,
                format!("there is a task {}", spec.task),
            ));
        }
        if self.tasks.len() + self.waiting.len() >= MAX_TASKS {
            return Err(Refusal::new(
                RefusalCode::Busy,
                "this node has as many tasks as it can hold",
            ));
        }
        let secrets = descriptors.into_iter().next();
        if secrets.is_none() && !spec.secrets.is_empty() {
            return Err(invalid("no stream came with the secrets' names"));
        }
        for diff_id in &spec.layers {
            if !self.layers.contains(diff_id) {
                return Err(unknown_layer(diff_id));
            }
            if self.layers.verified(diff_id).is_none() {
                self.layers.verify(diff_id.clone(), None)?;
            }
        }
        self.waiting.push(WaitingStart { asker, spec, secrets });
        Ok(())
    }

    fn start_waiting(&mut self) {
        for start in std::mem::take(&mut self.waiting) {
            let Some(lower) = self.layers.lower(&start.spec.layers) else {
                self.waiting.push(start);
                continue;
            };
            let (asker, task) = (start.asker, start.spec.task.clone());
            if let Err(refusal) = self.start(start, lower) {
                tracing::warn!(task.id = %task, reason = %refusal, "could not start a task");
                self.answer(asker, Err(refusal), Vec::new());
            }
        }
    }

    /// Writes the task down, makes its groups, starts its supervisor. What fails is undone.
    fn start(&mut self, start: WaitingStart, lower: Vec<String>) -> Result<(), Refusal> {
        let range = self.ids.allocate()?;
        let record = TaskRecord {
            task: start.spec.task.clone(),
            epoch: start.spec.epoch,
            layers: start.spec.layers.clone(),
            range,
            groups: self.cgroups.of_task(start.spec.task.as_str()),
            boot_id: self.boot_id.clone(),
            started_at_ms: clock::wall_ms(),
            supervisor: None,
            pid: None,
        };
        let mut task = Task::new(record, TaskState::Starting, None);
        task.start_asker = Some(start.asker);
        let begun = self.begin(&mut task, start, lower);
        if let Err(error) = begun {
            self.undo(&task.record);
            let step = format!("could not prepare the task: {error}");
            return Err(Refusal::new(RefusalCode::StartFailed, step));
        }
        self.tasks.insert(task.record.task.clone(), task);
        Ok(())
    }

    fn begin(&self, task: &mut Task, start: WaitingStart, lower: Vec<String>) -> io::Result<()> {
        let record = &mut task.record;
        self.folders.save(record)?;
        record.groups.create(&start.spec.limits)?;
        let folder = self.folders.descriptor(&record.task)?;
        let assignment = Assignment {
            spec: start.spec,
            layers: lower,
            range: record.range,
            groups: record.groups.clone(),
        };
        let (ours, theirs) = Connection::pair()?;
        let mut descriptors = vec![
            self.programs.state.as_fd(),
            folder.as_fd(),
            self.programs.task_filters.as_fd(),
            self.programs.supervisor_filters.as_fd(),
        ];
        descriptors.extend(start.secrets.as_ref().map(AsFd::as_fd));
        ours.send(&ToSupervisor::Start(Box::new(assignment)), &descriptors)?;
        let name = CString::new(format!("{}", record.task)).unwrap_or_default();
        let argv = [CString::from(c"bulkhead-supervisor"), name];
        let process = sys::spawn(self.programs.program.as_fd(), theirs.as_fd(), &argv, &[])?;
        record.supervisor = ProcessId::of(process.pid).ok();
        task.control = Some(ours);
        Ok(())
    }

    /// Removes what a start has left. Nothing ran, or it was killed.
    fn undo(&mut self, record: &TaskRecord) {
        let removed = record.groups.kill().and_then(|_| record.groups.remove());
        if let Err(error) = removed.and_then(|_| self.folders.remove(&record.task)) {
            tracing::warn!(task.id = %record.task, %error, "could not clean up after a failed start");
        }
        self.ids.release(record.range);
    }

    fn hear_supervisors(&mut self) {
        let connected: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.control.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for id in connected {
            while let Some(news) = self.news_of(&id) {
                self.supervisor_said(&id, news);
            }
        }
    }

    /// What a supervisor said next; the loss of its connection is an end.
    fn news_of(&self, id: &TaskId) -> Option<(FromSupervisor, Vec<OwnedFd>)> {
        let control = self.tasks.get(id)?.control.as_ref()?;
        match control.receive() {
            Ok(Some(news)) => Some(news),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(None) | Err(_) => Some((FromSupervisor::Exited(self.recorded_end(id)), Vec::new())),
        }
    }

    pub(crate) fn recorded_end(&self, id: &TaskId) -> ExitRecord {
        self.folders.exit(id).unwrap_or_else(|| {
            let end = lost("its supervisor ended without a record");
            if let Err(error) = self.folders.save_exit(id, &end) {
                tracing::warn!(task.id = %id, %error, "could not write down an end");
            }
            end
        })
    }

    fn supervisor_said(&mut self, id: &TaskId, (news, descriptors): (FromSupervisor, Vec<OwnedFd>)) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        match news {
            FromSupervisor::Started { pid } => {
                task.record.pid = Some(pid);
                task.state = TaskState::Running;
                let status = task.status();
                let asker = task.start_asker.take();
                if let Err(error) = self.folders.save(&task.record) {
                    tracing::warn!(task.id = %id, %error, "could not write down a start");
                }
                tracing::info!(task.id = %id, pid, "task runs");
                asker
                    .into_iter()
                    .for_each(|asker| self.answer(asker, Ok(Reply::Started(status.clone())), Vec::new()));
            }
            FromSupervisor::Failed(refusal) => self.start_failed(id, refusal),
            FromSupervisor::Sockets => {
                if let Some(asker) = task.socket_askers.pop_front() {
                    self.answer(asker, Ok(Reply::Sockets), descriptors);
                }
            }
            FromSupervisor::NoSockets(refusal) => {
                if let Some(asker) = task.socket_askers.pop_front() {
                    self.answer(asker, Err(refusal), Vec::new());
                }
            }
            FromSupervisor::Exited(end) if task.state == TaskState::Starting => {
                self.start_failed(id, Refusal::new(RefusalCode::StartFailed, end.message));
            }
            FromSupervisor::Exited(end) => self.ended(id, end),
        }
    }

    fn start_failed(&mut self, id: &TaskId, refusal: Refusal) {
        tracing::warn!(task.id = %id, reason = %refusal, "could not start a task");
        if let Some(mut task) = self.tasks.remove(id) {
            self.undo(&task.record);
            if let Some(asker) = task.start_asker.take() {
                self.answer(asker, Err(refusal), Vec::new());
            }
        }
    }

    pub(crate) fn ended(&mut self, id: &TaskId, exit: ExitRecord) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        tracing::info!(task.id = %id, cause = ?exit.cause, out_of_memory = exit.out_of_memory, "task ended");
        task.control = None;
        task.state = TaskState::Exited(exit.clone());
        let epoch = task.record.epoch;
        let askers = std::mem::take(&mut task.socket_askers);
        if let Err(error) = task
            .record
            .groups
            .kill()
            .and_then(|_| task.record.groups.remove())
        {
            tracing::warn!(task.id = %id, %error, "could not remove control groups");
        }
        for asker in askers {
            self.answer(asker, Err(not_running(id)), Vec::new());
        }
        self.send(
            FromLauncher::Event(Event::Exited {
                task: id.clone(),
                epoch,
                exit,
            }),
            Vec::new(),
        );
    }

    fn signal(&self, id: &TaskId, signal: TaskSignal) -> Result<Reply, Refusal> {
        let control = self.running(id)?;
        let message = match signal {
            TaskSignal::Term => ToSupervisor::Stop,
            TaskSignal::Kill => ToSupervisor::Kill,
        };
        control
            .send(&message, &[])
            .map(|()| Reply::Done)
            .map_err(|_| busy())
    }

    fn ask_sockets(&mut self, asker: Asker, id: &TaskId, count: u32) -> Result<(), Refusal> {
        if !(1..=MAX_SOCKETS).contains(&count) {
            return Err(invalid("ask for 1 to 32 sockets"));
        }
        self.running(id)?
            .send(&ToSupervisor::Sockets { count }, &[])
            .map_err(|_| busy())?;
        if let Some(task) = self.tasks.get_mut(id) {
            task.socket_askers.push_back(asker);
        }
        Ok(())
    }

    fn running(&self, id: &TaskId) -> Result<&Connection, Refusal> {
        let task = self.tasks.get(id).ok_or_else(|| unknown_task(id))?;
        task.control
            .as_ref()
            .filter(|_| task.state == TaskState::Running)
            .ok_or_else(|| not_running(id))
    }

    fn logs(&self, id: &TaskId) -> Result<Vec<OwnedFd>, Refusal> {
        if !self.tasks.contains_key(id) {
            return Err(unknown_task(id));
        }
        self.folders
            .logs(id)
            .map_err(|error| Refusal::new(RefusalCode::Internal, format!("could not open the log: {error}")))
    }

    fn inspect(&self, id: &TaskId) -> Result<Reply, Refusal> {
        self.running(id)?;
        let record = &self.tasks[id].record;
        let pid = record.pid.ok_or_else(|| not_running(id))?;
        let profile = crate::profile::read(pid, &record.groups, &record.layers);
        profile
            .map(|profile| Reply::Profile(Box::new(profile)))
            .map_err(|_| not_running(id))
    }

    fn remove(&mut self, asker: Asker, id: &TaskId) -> Option<Result<Reply, Refusal>> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Some(Ok(Reply::Done));
        };
        if !matches!(task.state, TaskState::Exited(_)) {
            return Some(Err(Refusal::new(
                RefusalCode::WrongState,
                format!("task {id} runs; stop it first"),
            )));
        }
        task.removers.push(asker);
        None
    }

    /// Forgets tasks that were asked to be, once neither a process nor a group of them is left: only then can
    /// another task have their ids.
    fn clean_up(&mut self) {
        let asked: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| !task.removers.is_empty())
            .map(|(id, _)| id.clone())
            .collect();
        for id in asked {
            let record = &self.tasks[&id].record;
            let supervised =
                record.boot_id == self.boot_id && record.supervisor.is_some_and(ProcessId::is_alive);
            let gone = record.groups.kill().and_then(|_| record.groups.remove());
            let removed = match gone {
                Ok(true) if !supervised => self.folders.remove(&id),
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            let Some(task) = self.tasks.remove(&id) else {
                continue;
            };
            let result = match removed {
                Ok(()) => {
                    self.ids.release(task.record.range);
                    Ok(Reply::Done)
                }
                Err(error) => Err(Refusal::new(
                    RefusalCode::Internal,
                    format!("could not remove the task: {error}"),
                )),
            };
            for asker in &task.removers {
                self.answer(*asker, result.clone(), Vec::new());
            }
            if result.is_err() {
                self.tasks.insert(
                    id,
                    Task {
                        removers: Vec::new(),
                        ..task
                    },
                );
            }
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
