//! A worker machine's launcher, and the tasks that run under it: they outlive the worker's program, as real ones do.
//!
//! No sandbox is built, no program executed. A task is a record that runs until it is told to end, it ends by itself, or
//! its machine loses power.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_identity::seam::Clock;
use bulkhead_launcher::message::{
    DiffId, Event, ExitCause, ExitRecord, LayerRecord, NodeFacts, Refusal, RefusalCode, Reply, Request,
    TaskId, TaskSignal, TaskSpec, TaskState, TaskStatus,
};
use bulkhead_worker::runtime::{Answer, Call};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// A folder for what simulated machines keep on real files: in memory where the system has such a one, which costs no flush.
///
/// # Errors
/// Where none can be made.
pub(crate) fn folder() -> io::Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
}

/// The launcher of one machine. Clones share it.
#[derive(Clone)]
pub(crate) struct Sandbox(Arc<Mutex<Inner>>);

struct Inner {
    clock: Arc<dyn Clock>,
    tasks: BTreeMap<TaskId, Held>,
    layers: BTreeMap<DiffId, LayerRecord>,
    /// To the worker's program that runs now.
    events: Option<mpsc::Sender<Event>>,
    pids: u32,
}

struct Held {
    status: TaskStatus,
    /// Names and values, as they were handed over.
    secrets: Vec<(String, Vec<u8>)>,
}

impl Sandbox {
    /// One that has run nothing yet.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            clock,
            tasks: BTreeMap::new(),
            layers: BTreeMap::new(),
            events: None,
            pids: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a worker's program until that ends.
    pub(crate) async fn serve(
        self,
        mut calls: mpsc::Receiver<Call>,
        events: mpsc::Sender<Event>,
    ) -> io::Result<()> {
        self.inner().events = Some(events);
        while let Some(call) = calls.recv().await {
            let answer = self.answer(call.request, call.descriptors).await;
            let _gone = call.answer.send(answer); // who asked may have given up
        }
        Ok(())
    }

    async fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let reply = match request {
            Request::Probe => Reply::Node(facts()),
            Request::UnpackLayer(layer) => Reply::Layer(self.inner().unpack(layer.diff_id)),
            Request::VerifyLayer { diff_id } => Reply::Layer(self.inner().layer(&diff_id)?),
            Request::RemoveLayer { diff_id } => {
                self.inner().layers.remove(&diff_id);
                Reply::Done
            }
            Request::Layers { after: _ } => Reply::Layers {
                layers: self.inner().layers.values().cloned().collect(),
                more: false,
            },
            Request::Start(spec) => {
                let values = match descriptors.into_iter().next() {
                    Some(descriptor) => read(descriptor).await.map_err(broken)?,
                    None => Vec::new(),
                };
                Reply::Started(self.inner().start(&spec, &values)?)
            }
            Request::Signal { task, signal } => {
                let number = match signal {
                    TaskSignal::Term => 15,
                    TaskSignal::Kill => 9,
                };
                self.end(&task, ExitCause::Signal(number));
                Reply::Done
            }
            Request::List { after: _ } => Reply::Tasks {
                tasks: self.inner().tasks.values().map(|it| it.status.clone()).collect(),
                more: false,
            },
            Request::Remove { task } => {
                self.inner().tasks.remove(&task);
                Reply::Done
            }
            Request::Sockets { .. } | Request::Logs { .. } | Request::Inspect { .. } => {
                return Err(Refusal::new(
                    RefusalCode::Unsupported,
                    "a simulated sandbox has none",
                ));
            }
        };
        Ok((reply, Vec::new()))
    }

    /// A task ends. Of one that has ended already nothing changes.
    pub(crate) fn end(&self, task: &TaskId, cause: ExitCause) {
        let mut inner = self.inner();
        let ended_at_ms = inner.clock.wall_millis();
        let Some(held) = inner.tasks.get_mut(task) else {
            return;
        };
        if matches!(held.status.state, TaskState::Exited(_)) {
            return;
        }
        let exit = ExitRecord {
            cause,
            out_of_memory: false,
            ended_at_ms,
            message: String::new(),
        };
        held.status.state = TaskState::Exited(exit.clone());
        let epoch = held.status.epoch;
        if let Some(events) = &inner.events {
            let task = task.clone();
            // Without room, or without a program: its next listing tells the same.
            let _unheard = events.try_send(Event::Exited { task, epoch, exit });
        }
    }

    /// The machine loses power: every task is gone with it.
    pub(crate) fn lose_power(&self) {
        let tasks: Vec<TaskId> = self.inner().tasks.keys().cloned().collect();
        self.inner().events = None;
        for task in tasks {
            self.end(&task, ExitCause::Lost);
        }
    }

    /// The tasks that run.
    pub(crate) fn running(&self) -> Vec<TaskId> {
        let inner = self.inner();
        let running = inner
            .tasks
            .values()
            .filter(|it| it.status.state == TaskState::Running);
        running.map(|it| it.status.task.clone()).collect()
    }

    /// The secrets of the tasks that run: task, name, value.
    pub(crate) fn secrets(&self) -> Vec<(TaskId, String, Vec<u8>)> {
        let inner = self.inner();
        let of = |held: &Held| {
            let task = held.status.task.clone();
            let secrets = held.secrets.iter();
            secrets
                .map(|(name, value)| (task.clone(), name.clone(), value.clone()))
                .collect::<Vec<_>>()
        };
        inner.tasks.values().flat_map(of).collect()
    }
}

impl Inner {
    fn unpack(&mut self, diff_id: DiffId) -> LayerRecord {
        let record = LayerRecord {
            diff_id: diff_id.clone(),
            tree_digest: "0".repeat(64),
            entries: 0,
            bytes: 0,
            masks: false,
        };
        self.layers.entry(diff_id).or_insert(record).clone()
    }

    fn layer(&self, diff_id: &DiffId) -> Result<LayerRecord, Refusal> {
        let layer = self.layers.get(diff_id).cloned();
        layer.ok_or_else(|| Refusal::new(RefusalCode::UnknownLayer, "unpack it first"))
    }

    fn start(&mut self, spec: &TaskSpec, values: &[u8]) -> Result<TaskStatus, Refusal> {
        if self.tasks.contains_key(&spec.task) {
            return Err(Refusal::new(RefusalCode::TaskExists, "it exists"));
        }
        for layer in &spec.layers {
            self.layer(layer)?;
        }
        let mut rest = values;
        let mut secrets = Vec::new();
        for secret in &spec.secrets {
            let size = usize::try_from(secret.size).map_err(broken)?;
            let (value, after) = rest
                .split_at_checked(size)
                .ok_or_else(|| Refusal::new(RefusalCode::StartFailed, "a secret did not arrive whole"))?;
            secrets.push((secret.name.clone(), value.to_vec()));
            rest = after;
        }
        self.pids += 1;
        let status = TaskStatus {
            task: spec.task.clone(),
            epoch: spec.epoch,
            pid: self.pids,
            started_at_ms: self.clock.wall_millis(),
            state: TaskState::Running,
        };
        let held = Held {
            status: status.clone(),
            secrets,
        };
        self.tasks.insert(spec.task.clone(), held);
        Ok(status)
    }
}

fn broken(error: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalCode::Internal, error.to_string())
}

/// What a program's worker hands over, to its end.
async fn read(descriptor: OwnedFd) -> io::Result<Vec<u8>> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    let mut values = Vec::new();
    UnixStream::from_std(stream)?.read_to_end(&mut values).await?;
    Ok(values)
}

fn facts() -> NodeFacts {
    NodeFacts {
        kernel: "simulated".into(),
        landlock_abi: 0,
        cgroup: "v2".into(),
        controllers: Vec::new(),
        tmpfs_noswap: true,
        time_namespace: true,
        memory_bytes: 16 << 30,
        cpu_millis: 16_000,
        fallbacks: Vec::new(),
    }
}
