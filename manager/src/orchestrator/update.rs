//! Moves a service's slots to its newest spec, a few at a time, and stops at the first failure.
//!
//! Stop-first: the old task ends before the new one is made. A slot counts as under way until its new task has run
//! unchanged for the monitor period; the time is that of the record's last write, which managers' clocks give, never
//! a worker's. While an update is paused the other slots keep, and restart with, the spec that they have.

use std::collections::BTreeSet;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{self, DesiredState, RestartCondition, TaskState, UpdateState};

use super::replicated::Slots;
use super::restart::{self, Next};
use super::task;

/// What the updater wants of one pass.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Update {
    /// Slots to be moved to the newest spec now.
    pub(super) renew: BTreeSet<u32>,
    /// A new status of the update.
    pub(super) status: Option<wire::UpdateStatus>,
    /// When a monitor period ends.
    pub(super) wake_at_ms: Option<i64>,
}

/// Decides for a service whose newest spec has this number.
pub(super) fn plan(
    service: &wire::Service,
    number: u64,
    spec: &wire::ServiceSpec,
    slots: &Slots<'_>,
    now_ms: i64,
) -> Update {
    let mut update = Update::default();
    if service.update.as_ref().map(wire::UpdateStatus::state) != Some(UpdateState::Updating) {
        return update;
    }
    if let Some(failed) = failure(number, spec, slots) {
        let message = format!("replica {} {}", failed.slot, describe(failed));
        update.status = Some(status(UpdateState::Paused, message, now_ms));
        return update;
    }
    let mut under_way = 0;
    let mut outdated = Vec::new();
    for slot in 1..=spec.replicas {
        let Some(head) = slots.get(&slot).and_then(|tasks| tasks.last()) else {
            under_way += 1;
            continue;
        };
        if head.spec_version != number {
            if task::is_over(head) {
                outdated.push((0, slot)); // empty anyway
            } else if head.desired() >= DesiredState::Shutdown {
                under_way += 1;
            } else {
                let running = task::state(head) == TaskState::Running;
                outdated.push((if running { 2 } else { 1 }, slot));
            }
            continue;
        }
        match progress(head, spec) {
            Progress::Settled => {}
            Progress::SettledAt(at) if at <= now_ms => {}
            Progress::SettledAt(at) => {
                update.wake_at_ms = Some(update.wake_at_ms.map_or(at, |known| known.min(at)));
                under_way += 1;
            }
            Progress::UnderWay => under_way += 1,
        }
    }
    if under_way == 0 && outdated.is_empty() {
        update.status = Some(status(UpdateState::Completed, String::new(), now_ms));
    }
    outdated.sort_unstable();
    let free = parallelism(spec).saturating_sub(under_way);
    update.renew = outdated.into_iter().map(|(_, slot)| slot).take(free).collect();
    update
}

enum Progress {
    Settled,
    SettledAt(i64),
    UnderWay,
}

fn progress(head: &wire::Task, spec: &wire::ServiceSpec) -> Progress {
    if head.desired() >= DesiredState::Shutdown {
        return Progress::UnderWay;
    }
    if task::state(head) == TaskState::Running {
        let since = head.meta.as_ref().map_or(0, |meta| meta.updated_at);
        return Progress::SettledAt(since.saturating_add(monitor_ms(spec)));
    }
    if !task::is_live(head) && restart::next(head, spec) == Next::Nothing {
        return Progress::Settled;
    }
    Progress::UnderWay
}

/// The first task of the newest spec that did not stay up.
fn failure<'a>(number: u64, spec: &wire::ServiceSpec, slots: &Slots<'a>) -> Option<&'a wire::Task> {
    let runs_on = restart::condition(&spec.restart.unwrap_or_default()) == RestartCondition::Any;
    let wanted = slots.range(..=spec.replicas).flat_map(|(_, tasks)| tasks);
    wanted.copied().find(|task| {
        let failed = match task::state(task) {
            TaskState::Failed | TaskState::Rejected => true,
            TaskState::Complete => runs_on,
            TaskState::Shutdown => task.desired() < DesiredState::Shutdown,
            TaskState::Unspecified
            | TaskState::Pending
            | TaskState::Assigned
            | TaskState::Preparing
            | TaskState::Starting
            | TaskState::Running
            | TaskState::Lost => false,
        };
        failed && task.spec_version == number
    })
}

fn describe(failed: &wire::Task) -> String {
    let status = failed.status.clone().unwrap_or_default();
    let word = match status.state() {
        TaskState::Rejected => "could not be started",
        _ => "ended",
    };
    let how = match (status.exit_code, status.signal) {
        _ if status.out_of_memory => " out of memory".to_owned(),
        (Some(code), _) => format!(" with exit code {code}"),
        (None, Some(signal)) => format!(" by signal {signal}"),
        (None, None) => String::new(),
    };
    let why = if status.message.is_empty() {
        String::new()
    } else {
        format!(": {}", status.message)
    };
    format!("{word}{how}{why}")
}

fn status(state: UpdateState, message: String, now_ms: i64) -> wire::UpdateStatus {
    wire::UpdateStatus {
        state: state.into(),
        message,
        since: now_ms,
    }
}

fn parallelism(spec: &wire::ServiceSpec) -> usize {
    let asked = spec.update.as_ref().map_or(0, |policy| policy.parallelism);
    let slots = if asked == 0 {
        limits::UPDATE_PARALLELISM
    } else {
        asked
    };
    usize::try_from(slots).unwrap_or(usize::MAX)
}

fn monitor_ms(spec: &wire::ServiceSpec) -> i64 {
    let asked = spec.update.as_ref().map_or(0, |policy| policy.monitor_ms);
    let default = limits::UPDATE_MONITOR.as_millis();
    let ms = if asked == 0 { default } else { asked.into() };
    i64::try_from(ms).unwrap_or(i64::MAX)
}
