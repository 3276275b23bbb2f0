//! Words about one task that several plans share, and the few ways in which managers change one.

use bulkhead_proto::wire::{self, DesiredState, TaskState};
use sha2::{Digest as _, Sha256};

/// A task without a status is as new as can be.
pub(super) fn state(task: &wire::Task) -> TaskState {
    let state = task.status.as_ref().map(wire::TaskStatus::state);
    state
        .filter(|state| *state != TaskState::Unspecified)
        .unwrap_or(TaskState::Pending)
}

/// It has not ended, as far as the cluster knows.
pub(super) fn is_live(task: &wire::Task) -> bool {
    state(task) < TaskState::Complete
}

/// Nothing of it can be running: it ended, or no node ever had it.
pub(super) fn is_over(task: &wire::Task) -> bool {
    !is_live(task) || task.node_id.is_empty()
}

/// The id follows from the place, so that two plans of the same attempt make one task, not two.
pub(super) fn id(service: &[u8], slot: u32, attempt: u32) -> Vec<u8> {
    let digest = Sha256::new()
        .chain_update(b"bulkhead task 1\0")
        .chain_update(service)
        .chain_update(slot.to_be_bytes())
        .chain_update(attempt.to_be_bytes())
        .finalize();
    digest[..16].to_vec()
}

/// The task, wanted less than before. One that no node has ends by this: there is nobody else to say so.
pub(super) fn wanted(task: &wire::Task, desired: DesiredState, now_ms: i64) -> wire::Task {
    let mut task = task.clone();
    task.desired = desired.into();
    task.desired_since = now_ms;
    if task.node_id.is_empty() && is_live(&task) {
        task.status = Some(status(TaskState::Shutdown, now_ms, "no longer wanted"));
        task.refusals.clear();
    }
    task
}

/// The task of a node that is gone. It may run there still, so the node is to stop it should it return.
pub(super) fn lost(task: &wire::Task, why: &str, now_ms: i64) -> wire::Task {
    let mut task = task.clone();
    if task.desired() < DesiredState::Shutdown {
        task.desired = DesiredState::Shutdown.into();
        task.desired_since = now_ms;
    }
    task.status = Some(status(TaskState::Lost, now_ms, why));
    task
}

fn status(state: TaskState, at: i64, message: &str) -> wire::TaskStatus {
    wire::TaskStatus {
        state: state.into(),
        at,
        message: message.to_owned(),
        ..Default::default()
    }
}
