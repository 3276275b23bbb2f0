//! Carries plans out: the loop around [`plan`], with all judgement there.
//!
//! Each pass lists what is, plans, notes what was seen and spawns what is to be done. Whatever wakes the loop carries no
//! decision of its own, so restart, new assignments and a task's end take one path.

use super::Layer;
use super::assignment::diff_id;
use super::assignments::{AssignmentError, Assignments, Seen};
use super::plan::{Action, View, plan};
use super::reporter::Reporter;
use super::start::task_spec;
use crate::image::{BlobError, BlobStore, Ingest, Unused};
use crate::proxy::{Connect, PortError, Proxy, published};
use crate::records::{RecordError, Records};
use crate::runtime::{Runtime, RuntimeError};
use crate::task::{Event, Observed, State};
use bulkhead_launcher::message::{
    Event as LauncherEvent, RefusalCode, TaskId as LaunchId, TaskSignal, TaskSpec, TaskState, TaskStatus,
    UnpackLayer,
};
use bulkhead_proto::{Digest, TaskId, wire};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

/// What failed for a passing reason is tried again after this time.
const RETRY: Duration = Duration::from_secs(2);
/// Finds what a lost event left behind.
const RESYNC: Duration = Duration::from_secs(10);

/// Fetches blobs from a manager.
pub trait Fetch: Send + Sync + 'static {
    /// Writes the layer's blob into `ingest` and gives that back, unfinished.
    fn fetch(&self, layer: Layer, ingest: Ingest) -> impl Future<Output = io::Result<Ingest>> + Send;
}

/// What a session with a manager tells the agent.
#[derive(Debug)]
pub enum Input {
    /// A session began with a manager that stands here.
    Welcome(Seen),
    /// Assignments came.
    Assignments(Box<wire::Assignments>),
    /// Reports up to this sequence are committed.
    Acknowledged(u64),
}

/// What the agent tells the session.
#[derive(Debug)]
pub enum Output {
    /// Reports to send.
    Status(wire::StatusBatch),
    /// Assignments up to this sequence are taken over.
    Applied(u64),
    /// The manager is behind or its updates do not fit: end the session, try another manager.
    EndSession(AssignmentError),
}

/// What a session's first message tells of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// How far the managers were.
    pub seen: Seen,
    /// Tasks that this node has a record of.
    pub tasks: Vec<TaskId>,
}

/// Why the agent cannot go on. The launcher starts the program again.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The launcher is gone or of another version.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The records cannot be written.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// The blob store cannot be read.
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

/// How an action ended.
enum Ended {
    Done,
    /// The task runs, in this sandbox (JSON).
    Started {
        pid: u32,
        profile: String,
    },
    /// It did not work, and has waited to be tried again.
    Again,
    /// It will never work; the reason for the tasks that need it.
    Never(String),
}

/// The agent of one node.
#[derive(Debug)]
pub struct Agent<F, C, N> {
    runtime: Runtime,
    blobs: BlobStore,
    records: Records,
    fetch: Arc<F>,
    proxy: Proxy<C>,
    now_ms: N,
    assignments: Assignments,
    observed: BTreeMap<TaskId, Observed>,
    reporter: Reporter,
    under_way: BTreeSet<Action>,
    doing: JoinSet<(Action, Ended)>,
    unused_blobs: Unused,
    unused_layers: Unused,
    known: watch::Sender<Known>,
}

impl<F: Fetch, C: Connect, N: Fn() -> i64> Agent<F, C, N> {
    /// An agent that remembers what the records hold. `now_ms` is the clock.
    pub fn new(
        runtime: Runtime,
        blobs: BlobStore,
        records: Records,
        fetch: F,
        proxy: Proxy<C>,
        now_ms: N,
    ) -> Result<Self, AgentError> {
        let observed = records.tasks()?;
        // What an earlier run had not brought to a manager's knowledge is told again; states only rise.
        let mut reporter = Reporter::default();
        for (task, seen) in &observed {
            reporter.note(*task, seen.clone());
        }
        let seen = records.seen()?;
        let (known, _) = watch::channel(Known {
            seen,
            tasks: observed.keys().copied().collect(),
        });
        Ok(Agent {
            assignments: Assignments::new(seen),
            observed,
            runtime,
            blobs,
            records,
            fetch: Arc::new(fetch),
            proxy,
            now_ms,
            reporter,
            under_way: BTreeSet::new(),
            doing: JoinSet::new(),
            unused_blobs: Unused::default(),
            unused_layers: Unused::default(),
            known,
        })
    }

    /// What this node knows, now and as it changes.
    pub fn known(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// Runs until `inputs` closes.
    pub async fn run(
        mut self,
        mut inputs: mpsc::Receiver<Input>,
        outputs: mpsc::Sender<Output>,
        mut events: mpsc::Receiver<LauncherEvent>,
    ) -> Result<(), AgentError> {
        loop {
            let wait = self.pass().await?;
            // A report that finds no room stays with the reporter until the session takes reports again.
            if let Ok(room) = outputs.try_reserve()
                && let Some(batch) = self.reporter.next_batch()
            {
                room.send(Output::Status(batch));
            }
            // Each branch is cancel-safe: a message or an ended action is taken or stays.
            tokio::select! {
                biased;
                input = inputs.recv() => match input {
                    None => return Ok(()),
                    Some(input) => {
                        let sequence = match &input {
                            Input::Assignments(update) => Some(update.sequence),
                            Input::Welcome(_) | Input::Acknowledged(_) => None,
                        };
                        let output = match self.take(input)? {
                            Ok(()) => sequence.map(Output::Applied),
                            Err(error) => Some(Output::EndSession(error)),
                        };
                        if let Some(output) = output {
                            drop(outputs.send(output).await); // the session takes it, or has ended with its program
                        }
                    }
                },
                Some(ended) = self.doing.join_next() => {
                    let (action, ended) = ended.expect("actions neither panic nor are aborted");
                    self.ended(&action, ended)?;
                }
                Some(_exited) = events.recv() => {} // the next pass lists it
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes a message over; the inner error ends the session and changes nothing here.
    fn take(&mut self, input: Input) -> Result<Result<(), AssignmentError>, AgentError> {
        let taken = match input {
            Input::Acknowledged(sequence) => {
                self.reporter.acknowledged(sequence);
                return Ok(Ok(()));
            }
            Input::Welcome(seen) => {
                self.reporter.restart();
                let raised = seen.epoch > self.assignments.seen().epoch;
                let taken = self.assignments.welcome(seen);
                if taken.is_ok() && raised {
                    // A restored cluster is older than what its managers of before had acknowledged.
                    for (task, seen) in &self.observed {
                        self.reporter.note(*task, seen.clone());
                    }
                }
                taken
            }
            Input::Assignments(update) => self.assignments.apply(*update),
        };
        if taken.is_ok() {
            self.records.set_seen(self.assignments.seen())?;
            self.tell_known();
        }
        Ok(taken)
    }

    /// One look at the world. Answers how long the loop may sleep.
    async fn pass(&mut self) -> Result<Duration, AgentError> {
        let launched = self.runtime.tasks().await?;
        let unpacked = self.runtime.layers().await?;
        let layers = unpacked
            .iter()
            .filter_map(|layer| layer.diff_id.as_str().parse().ok())
            .collect();
        let blobs: BTreeSet<Digest> = self.blobs.list()?.into_keys().collect();
        self.settle(&launched)?;
        let now_ms = (self.now_ms)();
        let mut plan = plan(View {
            assignments: &self.assignments,
            observed: &self.observed,
            launched: &launched,
            blobs: &blobs,
            layers: &layers,
            under_way: &self.under_way,
            now_ms,
        });
        let again = !plan.events.is_empty(); // an end on record may allow a removal
        for (task, event) in &plan.events {
            self.observe(*task, event)?;
        }
        self.collect_garbage(&mut plan.actions, &blobs, &layers, now_ms)?;
        let prepared = plan
            .actions
            .into_iter()
            .filter_map(|action| self.prepare(action).transpose())
            .collect::<Result<Vec<_>, _>>()?;
        // Before anything of it happens: after a crash in between, no task is started a second time.
        self.records.flush()?;
        for (action, start) in prepared {
            self.begin(action, start);
        }
        let failed = self.publish().await?;
        if again {
            return Ok(Duration::ZERO);
        }
        let resync = if failed { RETRY } else { RESYNC };
        let due = plan
            .wake_at_ms
            .map(|at| Duration::from_millis(u64::try_from(at - now_ms).unwrap_or(0)));
        Ok(due.map_or(resync, |due| due.min(resync)))
    }

    /// Deletes blobs that no task has needed for long, and adds the removal of such layers to the actions.
    fn collect_garbage(
        &mut self,
        actions: &mut Vec<Action>,
        blobs: &BTreeSet<Digest>,
        layers: &BTreeSet<Digest>,
        now_ms: i64,
    ) -> Result<(), AgentError> {
        if !self.assignments.known() {
            return Ok(());
        }
        let (needed_blobs, needed_layers) = self.assignments.layers().map(|l| (l.blob, l.diff)).unzip();
        for blob in self.unused_blobs.expired(blobs, &needed_blobs, now_ms) {
            tracing::info!(%blob, "no task has needed this blob for long; deleting it");
            self.blobs.remove(blob)?;
        }
        let expired = self.unused_layers.expired(layers, &needed_layers, now_ms);
        let removals = expired.into_iter().map(Action::RemoveLayer);
        actions.extend(removals.filter(|action| !self.under_way.contains(action)));
        Ok(())
    }

    fn tell_known(&self) {
        let known = Known {
            seen: self.assignments.seen(),
            tasks: self.observed.keys().copied().collect(),
        };
        self.known.send_if_modified(|old| {
            let news = *old != known;
            *old = known;
            news
        });
    }

    /// A stop or kill stays under way until its task has ended, so that it is asked once; records of tasks that are neither
    /// assigned nor launched go.
    fn settle(&mut self, launched: &[TaskStatus]) -> Result<(), AgentError> {
        let alive = |id: &LaunchId| {
            launched
                .iter()
                .any(|t| &t.task == id && !matches!(t.state, TaskState::Exited(_)))
        };
        self.under_way.retain(|action| match action {
            Action::Stop(id) | Action::Kill(id) => alive(id),
            Action::Remove(_)
            | Action::RemoveLayer(_)
            | Action::Fetch(_)
            | Action::Unpack(_)
            | Action::Start(_) => true,
        });
        if !self.assignments.known() {
            return Ok(());
        }
        let gone: Vec<TaskId> = self
            .observed
            .keys()
            .copied()
            .filter(|t| self.assignments.task(*t).is_none())
            .collect();
        for task in gone {
            self.observed.remove(&task);
            self.records.remove(task)?;
        }
        Ok(())
    }

    fn observe(&mut self, task: TaskId, event: &Event) -> Result<(), AgentError> {
        let now_ms = (self.now_ms)();
        let before = self
            .observed
            .get(&task)
            .cloned()
            .unwrap_or_else(|| Observed::assigned(now_ms));
        match before.after(event, now_ms) {
            Some(seen) => self.note(task, seen),
            None => Ok(()),
        }
    }

    /// Remembers and reports.
    fn note(&mut self, task: TaskId, seen: Observed) -> Result<(), AgentError> {
        self.records.put(task, &seen)?;
        self.reporter.note(task, seen.clone());
        self.observed.insert(task, seen);
        Ok(())
    }

    /// Writes a start down; `None` when it turns out impossible.
    fn prepare(&mut self, action: Action) -> Result<Option<(Action, Option<StartRequest>)>, AgentError> {
        let Action::Start(task) = action else {
            return Ok(Some((action, None)));
        };
        match self.start_request(task) {
            Ok(request) => {
                self.observe(task, &Event::Starting)?;
                Ok(Some((action, Some(request))))
            }
            Err(reason) => {
                self.observe(task, &Event::Refused { reason })?;
                Ok(None)
            }
        }
    }

    /// Spawns an action. What fails for a passing reason waits within its own task, so the loop need not keep times.
    fn begin(&mut self, action: Action, start: Option<StartRequest>) {
        self.under_way.insert(action.clone());
        let (runtime, blobs, fetch) = (self.runtime.clone(), self.blobs.clone(), self.fetch.clone());
        self.doing.spawn(async move {
            let done = match (&action, start) {
                (Action::Kill(id), _) => done(runtime.signal(id.clone(), TaskSignal::Kill).await),
                (Action::Stop(id), _) => done(runtime.signal(id.clone(), TaskSignal::Term).await),
                (Action::Remove(id), _) => done(runtime.remove(id.clone()).await),
                (Action::RemoveLayer(diff), _) => done(runtime.remove_layer(diff_id(*diff)).await),
                (Action::Fetch(layer), _) => fetch_blob(&blobs, fetch.as_ref(), *layer).await,
                (Action::Unpack(layer), _) => unpack(&runtime, &blobs, *layer).await,
                (Action::Start(_), Some((spec, secrets))) => start_task(&runtime, spec, &secrets).await,
                (Action::Start(_), None) => unreachable!("a start has its request"),
            };
            let ended = match done {
                Ok(ended) => ended,
                Err(Failure::Never(reason)) => Ended::Never(reason),
                Err(Failure::Passing(reason)) => {
                    tracing::warn!(?action, reason, "will be tried again");
                    tokio::time::sleep(RETRY).await;
                    Ended::Again
                }
            };
            (action, ended)
        });
    }

    fn start_request(&self, task: TaskId) -> Result<StartRequest, String> {
        let assignment = self.assignments.task(task).ok_or("it is no longer assigned")?;
        let image = self
            .assignments
            .image(assignment.image)
            .ok_or("its image is gone")?;
        let held = self.assignments.secrets();
        let values = assignment
            .secrets
            .iter()
            .map(|(id, _)| held.get(*id).map(|v| Zeroizing::new(v.to_vec())));
        let values: Vec<Zeroizing<Vec<u8>>> = values.collect::<Option<_>>().ok_or("a secret is gone")?;
        let sizes: Vec<u32> = values
            .iter()
            .map(|v| u32::try_from(v.len()).unwrap_or(u32::MAX))
            .collect();
        let spec = task_spec(assignment, image, &sizes).map_err(|error| error.to_string())?;
        Ok((spec, values))
    }

    fn ended(&mut self, action: &Action, ended: Ended) -> Result<(), AgentError> {
        let sent = matches!((action, &ended), (Action::Stop(_) | Action::Kill(_), Ended::Done));
        if !sent {
            self.under_way.remove(action);
        }
        let reason = match (ended, action) {
            (Ended::Never(reason), _) => reason,
            (Ended::Started { pid, profile }, Action::Start(task)) => {
                self.observe(*task, &Event::Running { pid })?;
                return match self.observed.get(task) {
                    Some(seen) if seen.state == State::Running => self.note(
                        *task,
                        Observed {
                            profile,
                            ..seen.clone()
                        },
                    ),
                    _ => Ok(()), // it has ended meanwhile
                };
            }
            (Ended::Done | Ended::Again | Ended::Started { .. }, _) => return Ok(()),
        };
        let needs = |layer: &Layer| -> Vec<TaskId> {
            let uses = |id| {
                self.assignments
                    .image(id)
                    .is_some_and(|image| image.layers.contains(layer))
            };
            self.assignments
                .tasks()
                .filter(|a| uses(a.image))
                .map(|a| a.task)
                .collect()
        };
        let tasks = match action {
            Action::Start(task) => vec![*task],
            Action::Fetch(layer) | Action::Unpack(layer) => needs(layer),
            Action::Kill(_) | Action::Stop(_) | Action::Remove(_) | Action::RemoveLayer(_) => vec![],
        };
        for task in tasks {
            // A task of that image that already runs has nothing to fear from a layer that cannot be unpacked again.
            if matches!(action, Action::Start(_)) || self.state(task) <= State::Preparing {
                self.observe(
                    task,
                    &Event::Refused {
                        reason: reason.clone(),
                    },
                )?;
            }
        }
        Ok(())
    }

    fn state(&self, task: TaskId) -> State {
        self.observed
            .get(&task)
            .map_or(State::Assigned, |seen| seen.state)
    }

    /// Opens and closes ports. A port that cannot be opened is said in the status of the tasks that publish it. Answers
    /// whether one was.
    async fn publish(&mut self) -> Result<bool, AgentError> {
        let running: Vec<_> = self
            .assignments
            .tasks()
            .filter(|a| self.state(a.task) == State::Running)
            .map(|a| (a.task, a.ports.clone()))
            .collect();
        let wanted = published(running.iter().map(|(task, ports)| (*task, ports.as_slice())));
        let failed = self.proxy.publish(&wanted).await;
        for (task, ports) in running {
            let message = port_message(&failed, &ports);
            let Some(seen) = self.observed.get(&task).filter(|seen| seen.message != message) else {
                continue;
            };
            if !message.is_empty() {
                tracing::warn!(task.id = %task, message, "will be tried again");
            }
            let seen = Observed {
                message,
                ..seen.clone()
            };
            self.note(task, seen)?;
        }
        Ok(!failed.is_empty())
    }
}

/// What a task's status says of its ports that could not be opened.
fn port_message(failed: &[PortError], ports: &[(u16, u16)]) -> String {
    let own = failed
        .iter()
        .filter(|error| ports.iter().any(|(host, _)| *host == error.port));
    own.map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

type StartRequest = (TaskSpec, Vec<Zeroizing<Vec<u8>>>);

enum Failure {
    Passing(String),
    Never(String),
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let never = [
            RefusalCode::Invalid,
            RefusalCode::Unsupported,
            RefusalCode::HostileLayer,
            RefusalCode::DigestMismatch,
        ];
        match &error {
            RuntimeError::Refused(refusal) if never.contains(&refusal.code) => {
                Failure::Never(error.to_string())
            }
            _ => Failure::Passing(error.to_string()),
        }
    }
}

impl From<BlobError> for Failure {
    fn from(error: BlobError) -> Self {
        Failure::Passing(error.to_string()) // another manager may send the right bytes, and space may be freed
    }
}

fn done(result: Result<(), RuntimeError>) -> Result<Ended, Failure> {
    Ok(result.map(|()| Ended::Done)?)
}

async fn start_task(
    runtime: &Runtime,
    spec: TaskSpec,
    secrets: &[Zeroizing<Vec<u8>>],
) -> Result<Ended, Failure> {
    let values: Vec<&[u8]> = secrets.iter().map(|value| value.as_slice()).collect();
    let started = match runtime.start(spec, &values).await {
        Ok(started) => started,
        // Not known whether it runs: the next listing tells.
        Err(error @ (RuntimeError::Closed | RuntimeError::Unfitting { .. })) => {
            return Err(Failure::Passing(error.to_string()));
        }
        Err(error) => return Err(Failure::Never(error.to_string())),
    };
    // For people only: a task that has ended already has none.
    let profile = runtime.inspect(started.task).await.ok();
    Ok(Ended::Started {
        pid: started.pid,
        profile: profile
            .and_then(|profile| serde_json::to_string(&profile).ok())
            .unwrap_or_default(),
    })
}

async fn fetch_blob<F: Fetch>(blobs: &BlobStore, fetch: &F, layer: Layer) -> Result<Ended, Failure> {
    let ingest = blobs.receive(layer.blob, layer.size)?;
    let ingest = fetch
        .fetch(layer, ingest)
        .await
        .map_err(|error| Failure::Passing(error.to_string()))?;
    let finished = bulkhead_identity::seam::blocking(|| ingest.finish()).await;
    finished.map_err(|error| Failure::Passing(error.to_string()))??;
    Ok(Ended::Done)
}

async fn unpack(runtime: &Runtime, blobs: &BlobStore, layer: Layer) -> Result<Ended, Failure> {
    let blob = blobs.read(layer.blob)?;
    let request = UnpackLayer {
        diff_id: layer.diff_id(),
        compression: layer.packing.compression(),
        size: layer.size,
    };
    runtime.unpack(request, blob.into()).await?;
    Ok(Ended::Done)
}

#[cfg(test)]
mod tests;
