//! Whether a task that ended gets a successor, and when.
//!
//! The policy is about ends of the program. A lost node and an end that the cluster asked for are none: the slot is
//! filled again at once, whatever the policy says, and they do not count as attempts.

use bulkhead_proto::limits;
use bulkhead_proto::wire::{self, DesiredState, RestartCondition, TaskState};

use super::task;

/// No restart comes sooner, so that a program which ends at once does not fill the log.
const SHORTEST_DELAY_MS: i64 = 100;

/// What follows an ended task.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A successor at once, the count of restarts unchanged.
    Refill,
    /// A successor after the delay, in milliseconds; the count of restarts rises.
    Restart { delay_ms: i64 },
    /// Nothing: the slot has done its work, or is given up.
    Nothing,
}

/// What follows this task, which is [over](task::is_over).
pub(super) fn next(ended: &wire::Task, spec: &wire::ServiceSpec) -> Next {
    let policy = spec.restart.unwrap_or_default();
    let wanted = match task::state(ended) {
        TaskState::Lost => return Next::Refill,
        // The worker says so only of a task that it was asked to stop.
        TaskState::Shutdown if ended.desired() >= DesiredState::Shutdown => return Next::Refill,
        TaskState::Complete => condition(&policy) == RestartCondition::Any,
        TaskState::Failed | TaskState::Rejected | TaskState::Shutdown => {
            condition(&policy) != RestartCondition::None
        }
        // Never placed: it has not ended by itself.
        TaskState::Unspecified
        | TaskState::Pending
        | TaskState::Assigned
        | TaskState::Preparing
        | TaskState::Starting
        | TaskState::Running => return Next::Refill,
    };
    if !wanted || (policy.max_attempts > 0 && ended.restarts >= policy.max_attempts) {
        return Next::Nothing;
    }
    let delay = match spec.restart {
        Some(policy) => i64::try_from(policy.delay_ms).unwrap_or(i64::MAX),
        None => i64::try_from(limits::RESTART_DELAY.as_millis()).unwrap_or(i64::MAX),
    };
    Next::Restart {
        delay_ms: delay.max(SHORTEST_DELAY_MS),
    }
}

/// The condition, the default filled in.
pub(super) fn condition(policy: &wire::RestartPolicy) -> RestartCondition {
    match policy.condition() {
        RestartCondition::Unspecified => RestartCondition::Any,
        said => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Next = Next::Restart { delay_ms: 7_000 };

    #[track_caller]
    fn check(
        condition: RestartCondition,
        max: u32,
        state: TaskState,
        asked: bool,
        restarts: u32,
        next: Next,
    ) {
        let desired = if asked {
            DesiredState::Shutdown
        } else {
            DesiredState::Running
        };
        let ended = wire::Task {
            node_id: vec![1; 16],
            desired: desired.into(),
            restarts,
            status: Some(wire::TaskStatus {
                state: state.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let spec = wire::ServiceSpec {
            restart: Some(wire::RestartPolicy {
                condition: condition.into(),
                delay_ms: 7_000,
                max_attempts: max,
            }),
            ..Default::default()
        };
        assert_eq!(
            super::next(&ended, &spec),
            next,
            "{condition:?} {max} {state:?} {asked} {restarts}"
        );
    }

    #[test]
    fn the_condition_is_about_the_programs_own_end() {
        use RestartCondition::{Any, None, OnFailure, Unspecified};
        use TaskState::{Complete, Failed, Lost, Rejected, Shutdown};
        for (condition, state, expected) in [
            (Unspecified, Complete, DELAY),
            (Any, Complete, DELAY),
            (Any, Failed, DELAY),
            (OnFailure, Complete, Next::Nothing),
            (OnFailure, Failed, DELAY),
            (OnFailure, Rejected, DELAY),
            (OnFailure, Shutdown, DELAY),
            (None, Complete, Next::Nothing),
            (None, Failed, Next::Nothing),
            (None, Lost, Next::Refill),
        ] {
            check(condition, 0, state, false, 0, expected);
        }
        check(None, 0, Shutdown, true, 0, Next::Refill);
        check(None, 0, Complete, true, 0, Next::Nothing);
    }

    #[test]
    fn attempts_are_counted_and_a_lost_node_is_none() {
        use RestartCondition::Any;
        check(Any, 2, TaskState::Failed, false, 1, DELAY);
        check(Any, 2, TaskState::Failed, false, 2, Next::Nothing);
        check(Any, 2, TaskState::Lost, false, 2, Next::Refill);
    }
}
