//! What to do next about the assignments: a comparison of what is wanted with what the launcher has.
//!
//! Pure and idempotent. A start of this program, a new session and an ordinary change take the same path, so
//! adopting tasks after a restart is not a case of its own: a task that the launcher runs with the fencing epoch of
//! its assignment is observed as running, and whatever else it runs is killed and removed before anything is started.

use super::assignment::{Assignment, Desired, Layer};
use super::assignments::Assignments;
use crate::task::{Event, Observed, State};
use bulkhead_launcher::message::{TaskId as LaunchId, TaskState, TaskStatus};
use bulkhead_proto::{Digest, TaskId};
use std::collections::{BTreeMap, BTreeSet};

/// Something to be done. What is under way is not asked for again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Kill a task that this node should not run.
    Kill(LaunchId),
    /// Ask a task to end; the launcher kills it when its grace is over.
    Stop(LaunchId),
    /// Delete what the launcher keeps of an ended task.
    Remove(LaunchId),
    /// Delete an unpacked layer that no task has needed for long.
    RemoveLayer(Digest),
    /// Fetch a blob from a manager.
    Fetch(Layer),
    /// Have a fetched layer unpacked.
    Unpack(Layer),
    /// Start a task: its layers are unpacked and its secrets are here.
    Start(TaskId),
}

/// All that a decision may depend on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// What the managers want.
    pub assignments: &'a Assignments,
    /// What was last seen of each task.
    pub observed: &'a BTreeMap<TaskId, Observed>,
    /// What the launcher has, listed after the newest of `observed`: an older list would make a start look vanished.
    pub launched: &'a [TaskStatus],
    /// Blobs that are here.
    pub blobs: &'a BTreeSet<Digest>,
    /// Layers that are unpacked, by the digest of their archive.
    pub layers: &'a BTreeSet<Digest>,
    /// Actions that have not ended yet, or that wait to be tried again.
    pub under_way: &'a BTreeSet<Action>,
    /// Milliseconds since 1970.
    pub now_ms: i64,
}

/// What to do and what was seen.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be done, in any order.
    pub actions: Vec<Action>,
    /// To be recorded and reported.
    pub events: Vec<(TaskId, Event)>,
    /// When to plan again even if nothing happens: a restart delay ends.
    pub wake_at_ms: Option<i64>,
}

/// Compares what is wanted with what is.
pub fn plan(view: View<'_>) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<TaskId, &TaskStatus> = BTreeMap::new();
    let mut strangers = false;
    for status in view.launched {
        match owner(view.assignments, status) {
            Some(assignment) => {
                wanted.insert(assignment.task, status);
            }
            // Until a manager has spoken nobody is known to be a stranger: tasks outlive their managers.
            None if !view.assignments.known() => {}
            None => {
                strangers = true;
                plan.actions.push(match status.state {
                    TaskState::Starting | TaskState::Running => Action::Kill(status.task.clone()),
                    TaskState::Exited(_) => Action::Remove(status.task.clone()),
                });
            }
        }
    }
    for assignment in view.assignments.tasks() {
        match wanted.get(&assignment.task) {
            Some(status) => launched(view, assignment, status, &mut plan),
            None => absent(view, assignment, strangers, &mut plan),
        }
    }
    plan.actions.sort();
    plan.actions.dedup(); // two tasks of one image need the same layers
    plan.actions.retain(|action| !view.under_way.contains(action));
    let news = |task: &TaskId, event: &Event| {
        let state = view.observed.get(task).map_or(State::Assigned, |seen| seen.state);
        state.next(event).is_some()
    };
    plan.events.retain(|(task, event)| news(task, event));
    plan
}

/// The assignment that a launched task fulfils. A task of another fencing epoch is an old copy.
fn owner<'a>(assignments: &'a Assignments, status: &TaskStatus) -> Option<&'a Assignment> {
    let task = status.task.as_str().parse().ok()?;
    assignments
        .task(task)
        .filter(|assignment| assignment.fence == status.epoch)
}

/// The launcher has it: watch it, and end it when that is wanted.
fn launched(view: View<'_>, assignment: &Assignment, status: &TaskStatus, plan: &mut Plan) {
    let stop = assignment.desired >= Desired::Shutdown;
    match &status.state {
        TaskState::Starting => {}
        // The start's own end tells more: what the sandbox is like.
        TaskState::Running if view.under_way.contains(&Action::Start(assignment.task)) => {}
        TaskState::Running => plan
            .events
            .push((assignment.task, Event::Running { pid: status.pid })),
        TaskState::Exited(exit) => {
            let event = Event::Exited {
                exit: exit.clone(),
                asked: stop,
            };
            plan.events.push((assignment.task, event));
            let reported = view
                .observed
                .get(&assignment.task)
                .is_some_and(|seen| seen.state.is_final());
            // Only once the end is on record: the launcher's copy is the last one.
            if assignment.desired == Desired::Remove && reported {
                plan.actions.push(Action::Remove(status.task.clone()));
            }
            return;
        }
    }
    if stop {
        plan.actions.push(Action::Stop(status.task.clone()));
    }
}

/// The launcher does not have it: prepare and start it, unless it has been started before.
fn absent(view: View<'_>, assignment: &Assignment, strangers: bool, plan: &mut Plan) {
    let task = assignment.task;
    let state = view
        .observed
        .get(&task)
        .map_or(State::Assigned, |seen| seen.state);
    match state {
        State::Complete | State::Shutdown | State::Failed | State::Rejected => {}
        State::Starting if view.under_way.contains(&Action::Start(task)) => {}
        State::Starting | State::Running => plan.events.push((task, Event::Vanished)),
        State::Assigned | State::Preparing if assignment.desired >= Desired::Shutdown => {
            plan.events.push((task, Event::Unwanted));
        }
        State::Assigned | State::Preparing => {
            if prepared(view, assignment, plan) && !strangers && due(view, assignment, plan) {
                plan.actions.push(Action::Start(task));
            }
        }
    }
}

/// Whether all layers are unpacked; asks for what is missing.
fn prepared(view: View<'_>, assignment: &Assignment, plan: &mut Plan) -> bool {
    let Some(image) = view.assignments.image(assignment.image) else {
        let reason = "its image came with no assignment; the managers no longer have it".into();
        plan.events.push((assignment.task, Event::Refused { reason }));
        return false;
    };
    let missing = image
        .layers
        .iter()
        .filter(|layer| !view.layers.contains(&layer.diff));
    let before = plan.actions.len();
    plan.actions.extend(missing.map(|layer| {
        if view.blobs.contains(&layer.blob) {
            Action::Unpack(*layer)
        } else {
            Action::Fetch(*layer)
        }
    }));
    let ready = plan.actions.len() == before;
    if !ready {
        plan.events.push((assignment.task, Event::Preparing));
    }
    ready
}

/// Whether it may start now: wanted running, its restart delay over, its secrets here.
fn due(view: View<'_>, assignment: &Assignment, plan: &mut Plan) -> bool {
    if assignment.desired != Desired::Running {
        return false;
    }
    if assignment.start_after_ms > view.now_ms {
        let earliest = plan
            .wake_at_ms
            .map_or(assignment.start_after_ms, |at| at.min(assignment.start_after_ms));
        plan.wake_at_ms = Some(earliest);
        return false;
    }
    let secrets = view.assignments.secrets();
    assignment
        .secrets
        .iter()
        .all(|(id, _)| secrets.get(*id).is_some())
}

#[cfg(test)]
mod tests;
