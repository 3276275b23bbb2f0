//! What workers report of their tasks: checked, gathered for a moment, and committed together.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Entropy;
use bulkhead_proto::wire::{
    Change, StatusBatch, TaskObserved, TaskState, TaskStatus, change::Change as Step,
};
use bulkhead_proto::{NodeId, RequestId, TaskId, limits};
use bulkhead_raft::state::State;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::proposer::{ProposeError, Proposer};
use crate::view;

/// Reports are gathered for so long. Each transaction costs a flush on every manager; a task's start has three reports.
const GATHER: Duration = Duration::from_millis(15);
/// Reports in one batch of a worker.
const BATCH: usize = 2_000;
/// Bytes of the reports in one transaction; half of its limit.
const BYTES: usize = limits::TRANSACTION_BYTES / 2;
/// Characters of a worker's message about a task.
const MESSAGE_CHARS: usize = 1_024;
/// Bytes of what the kernel reports of a sandbox.
const PROFILE_BYTES: usize = 16 << 10;
/// Transactions of reports under way.
const UNDER_WAY: usize = 8;
/// Attempts to commit, with a pause between: several elections.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(200);

/// A batch that no correct worker sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Too many reports.
    #[error("a batch has at most {BATCH} reports, this one has {0}")]
    Long(usize),
    /// Not an id, or no status.
    #[error("a report names no task or no status")]
    Malformed,
    /// Not a state that a worker reports.
    #[error("task {task} was reported in state {state}, which no worker reports")]
    State {
        /// Which.
        task: TaskId,
        /// The state's number.
        state: i32,
    },
    /// A task of another node.
    #[error("task {0} is another node's")]
    Foreign(TaskId),
}

/// Checks a batch. What the state already knows better, and tasks that are gone, are dropped.
///
/// # Errors
/// [`ReportError`]; the session ends then.
pub fn check(state: &State, node: NodeId, batch: StatusBatch) -> Result<Vec<TaskObserved>, ReportError> {
    if batch.reports.len() > BATCH {
        return Err(ReportError::Long(batch.reports.len()));
    }
    let mut observed = Vec::with_capacity(batch.reports.len());
    for report in batch.reports {
        let id = TaskId::try_from(report.task_id.as_slice()).map_err(|_| ReportError::Malformed)?;
        let status = report.status.ok_or(ReportError::Malformed)?;
        match status.state() {
            TaskState::Unspecified | TaskState::Pending | TaskState::Assigned | TaskState::Lost => {
                return Err(ReportError::State {
                    task: id,
                    state: status.state,
                });
            }
            TaskState::Preparing
            | TaskState::Starting
            | TaskState::Running
            | TaskState::Complete
            | TaskState::Shutdown
            | TaskState::Failed
            | TaskState::Rejected => {}
        }
        let Some(task) = view::task(state, id) else {
            continue;
        };
        if task.node_id != node.as_bytes() {
            return Err(ReportError::Foreign(id));
        }
        if task
            .status
            .as_ref()
            .is_some_and(|known| known.state > status.state)
        {
            continue;
        }
        observed.push(TaskObserved {
            task_id: report.task_id,
            node_id: node.to_wire(),
            status: Some(bounded(status)),
        });
    }
    Ok(observed)
}

fn bounded(mut status: TaskStatus) -> TaskStatus {
    status.message = status.message.chars().take(MESSAGE_CHARS).collect();
    if status.profile.len() > PROFILE_BYTES {
        status.profile.clear();
    }
    status
}

struct Gathered {
    reports: Vec<TaskObserved>,
    done: oneshot::Sender<()>,
}

/// Where sessions hand their reports in. Clones share it.
#[derive(Debug, Clone)]
pub struct Reports(mpsc::Sender<Gathered>);

/// The loop behind [`Reports`].
pub struct Committer {
    inbox: mpsc::Receiver<Gathered>,
    proposer: Proposer,
    entropy: Arc<dyn Entropy>,
    actor: String,
}

impl std::fmt::Debug for Committer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Committer")
            .field("actor", &self.actor)
            .finish_non_exhaustive()
    }
}

/// The two ends. `own` is this manager: the reports are committed in its name, and each says whose they are.
pub fn reports(proposer: Proposer, entropy: Arc<dyn Entropy>, own: NodeId) -> (Reports, Committer) {
    let (sender, inbox) = mpsc::channel(1_024);
    let committer = Committer {
        inbox,
        proposer,
        entropy,
        actor: format!("manager/{own}"),
    };
    (Reports(sender), committer)
}

impl Reports {
    /// Resolves with `true` once all of it is committed.
    pub async fn commit(&self, observed: Vec<TaskObserved>) -> bool {
        let mut waiting = Vec::new();
        let mut chunk = Vec::new();
        let mut bytes = 0;
        for report in observed {
            let length = report.encoded_len();
            if bytes + length > BYTES && !chunk.is_empty() {
                waiting.push(self.hand_in(std::mem::take(&mut chunk)).await);
                bytes = 0;
            }
            bytes += length;
            chunk.push(report);
        }
        if !chunk.is_empty() {
            waiting.push(self.hand_in(chunk).await);
        }
        for done in waiting {
            let Some(done) = done else { return false };
            if done.await.is_err() {
                return false;
            }
        }
        true
    }

    async fn hand_in(&self, reports: Vec<TaskObserved>) -> Option<oneshot::Receiver<()>> {
        let (done, committed) = oneshot::channel();
        self.0.send(Gathered { reports, done }).await.ok()?;
        Some(committed)
    }
}

impl Committer {
    /// Commits what is handed in until it is stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut under_way = JoinSet::new();
        loop {
            let first = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(_) = under_way.join_next() => continue,
                first = self.inbox.recv(), if under_way.len() < UNDER_WAY => first,
            };
            let Some(first) = first else { return };
            sleep(GATHER).await;
            let (mut bytes, mut count) = (length(&first), first.reports.len());
            let mut batch = vec![first];
            // One chunk more, of at most BYTES and BATCH, still fits a transaction.
            while bytes < BYTES / 2 && count < BATCH {
                let Ok(next) = self.inbox.try_recv() else { break };
                bytes += length(&next);
                count += next.reports.len();
                batch.push(next);
            }
            under_way.spawn(commit(
                self.proposer.clone(),
                self.entropy.clone(),
                self.actor.clone(),
                batch,
            ));
        }
    }
}

fn length(gathered: &Gathered) -> usize {
    gathered.reports.iter().map(Message::encoded_len).sum()
}

/// Commits one batch, again and again while nothing is known: a report that was committed twice changes nothing.
async fn commit(proposer: Proposer, entropy: Arc<dyn Entropy>, actor: String, batch: Vec<Gathered>) {
    let (reports, waiting): (Vec<_>, Vec<_>) = batch.into_iter().map(|it| (it.reports, it.done)).unzip();
    let changes: Vec<Change> = reports
        .into_iter()
        .flatten()
        .map(|it| Change {
            change: Some(Step::TaskObserved(it)),
        })
        .collect();
    let mut id = [0; 16];
    if entropy.fill(&mut id).is_err() {
        return; // the sessions end and the workers report again
    }
    for _ in 0..ATTEMPTS {
        match proposer
            .client(&actor, RequestId::from_bytes(id), Vec::new(), changes.clone())
            .await
        {
            Ok(outcome) => {
                if let Some(rejection) = outcome.rejection {
                    tracing::error!(detail = rejection.detail, "a checked report was rejected");
                }
                for waiting in waiting {
                    let _ = waiting.send(()); // a session that ended does not wait
                }
                return;
            }
            Err(ProposeError::TooLarge { bytes }) => {
                tracing::error!(bytes, "reports do not fit a transaction");
                return;
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}
