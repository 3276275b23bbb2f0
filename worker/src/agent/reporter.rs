//! Which task states the managers have yet to commit.
//!
//! Only the newest state of a task counts, so a burst of changes costs one report and a long absence costs one per
//! task. A batch is unacknowledged until the leader has committed it; a new session sends what is left again, which
//! is harmless because states only rise.

use crate::task::Observed;
use bulkhead_proto::{TaskId, wire};
use std::collections::BTreeMap;

/// Reports in one batch.
const BATCH: usize = 256;
/// Batches that may wait for their acknowledgement. Two keep the stream busy; more would only grow stale.
const WINDOW: usize = 2;

/// Keeps what is to be reported. Does no I/O.
#[derive(Debug, Default)]
pub struct Reporter {
    waiting: BTreeMap<TaskId, Observed>,
    sent: BTreeMap<u64, Vec<(TaskId, Observed)>>,
    sequence: u64,
}

impl Reporter {
    /// Notes a task's state, in place of an older one that has not been sent.
    pub fn note(&mut self, task: TaskId, seen: Observed) {
        let newer = self.waiting.get(&task).is_none_or(|old| old.state <= seen.state);
        if newer {
            self.waiting.insert(task, seen);
        }
    }

    /// The next batch to send; `None` when there is nothing to say or too much is unacknowledged.
    pub fn next_batch(&mut self) -> Option<wire::StatusBatch> {
        if self.waiting.is_empty() || self.sent.len() >= WINDOW {
            return None;
        }
        let mut reports = Vec::new();
        while reports.len() < BATCH {
            let Some(report) = self.waiting.pop_first() else {
                break;
            };
            reports.push(report);
        }
        self.sequence += 1;
        let batch = wire::StatusBatch {
            reports: reports.iter().map(report).collect(),
            sequence: self.sequence,
        };
        self.sent.insert(self.sequence, reports);
        Some(batch)
    }

    /// Everything up to `sequence` is committed.
    pub fn acknowledged(&mut self, sequence: u64) {
        self.sent = self.sent.split_off(&sequence.saturating_add(1));
    }

    /// A new session: what was sent and not acknowledged may never have arrived.
    pub fn restart(&mut self) {
        for (task, seen) in std::mem::take(&mut self.sent).into_values().flatten() {
            self.note(task, seen);
        }
    }

    /// Whether the managers know everything.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }
}

fn report((task, seen): &(TaskId, Observed)) -> wire::TaskReport {
    wire::TaskReport {
        task_id: task.to_wire(),
        status: Some(seen.to_wire()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::State;
    use proptest::prelude::*;

    const STATES: [State; 5] = [
        State::Assigned,
        State::Preparing,
        State::Starting,
        State::Running,
        State::Complete,
    ];

    fn seen(state: State) -> Observed {
        Observed {
            state,
            ..Observed::assigned(0)
        }
    }

    fn task(n: u8) -> TaskId {
        TaskId::from_bytes([n; 16])
    }

    #[test]
    fn a_burst_is_one_report() {
        let mut reporter = Reporter::default();
        for state in STATES {
            reporter.note(task(1), seen(state));
        }
        let batch = reporter.next_batch().expect("a batch");
        assert_eq!(batch.reports.len(), 1);
        assert_eq!(
            batch.reports[0].status.as_ref().expect("status").state(),
            wire::TaskState::Complete
        );
        assert_eq!(reporter.next_batch(), None);
        reporter.acknowledged(batch.sequence);
        assert!(reporter.is_idle());
    }

    #[test]
    fn a_new_session_repeats_only_what_is_still_the_newest() {
        let mut reporter = Reporter::default();
        reporter.note(task(1), seen(State::Starting));
        reporter.note(task(2), seen(State::Starting));
        reporter.next_batch().expect("a batch");
        reporter.note(task(1), seen(State::Running));
        reporter.restart();
        let again = reporter.next_batch().expect("both again");
        let states: Vec<_> = again
            .reports
            .iter()
            .map(|r| r.status.as_ref().expect("status").state())
            .collect();
        assert_eq!(states, [wire::TaskState::Running, wire::TaskState::Starting]);
    }

    #[test]
    fn the_window_holds_batches_back() {
        let mut reporter = Reporter::default();
        for n in 0..4 {
            reporter.note(task(n), seen(State::Running));
            let sent = reporter.next_batch().is_some();
            assert_eq!(sent, usize::from(n) < WINDOW);
        }
        reporter.acknowledged(1);
        assert_eq!(reporter.next_batch().expect("room again").reports.len(), 2);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Note(u8, usize),
        Send,
        Arrive,
        Break,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3u8, 0..STATES.len()).prop_map(|(n, state)| Step::Note(n, state)),
            Just(Step::Send),
            Just(Step::Arrive),
            Just(Step::Break),
        ]
    }

    proptest! {
        /// Whatever is lost on the way, the manager ends with each task's highest state.
        #[test]
        fn nothing_is_lost(steps in prop::collection::vec(any_step(), 0..60)) {
            let mut reporter = Reporter::default();
            let mut truth: BTreeMap<u8, i32> = BTreeMap::new();
            let mut manager: BTreeMap<Vec<u8>, i32> = BTreeMap::new();
            let mut wire = std::collections::VecDeque::new();
            let arrive = |batch: wire::StatusBatch, manager: &mut BTreeMap<Vec<u8>, i32>| {
                for report in batch.reports {
                    let state = report.status.expect("status").state;
                    let known = manager.entry(report.task_id).or_default();
                    *known = state.max(*known);
                }
                batch.sequence
            };
            for step in steps {
                match step {
                    Step::Note(n, state) => {
                        let state = STATES[state];
                        let number = state.to_wire() as i32;
                        let known = truth.entry(n).or_default();
                        if number > *known {
                            *known = number;
                            reporter.note(task(n), seen(state));
                        }
                    }
                    Step::Send => wire.extend(reporter.next_batch()),
                    Step::Arrive => if let Some(batch) = wire.pop_front() {
                        let sequence = arrive(batch, &mut manager);
                        reporter.acknowledged(sequence);
                    },
                    Step::Break => {
                        wire.clear();
                        reporter.restart();
                    }
                }
            }
            wire.clear();
            reporter.restart();
            while let Some(batch) = reporter.next_batch() {
                let sequence = arrive(batch, &mut manager);
                reporter.acknowledged(sequence);
            }
            prop_assert!(reporter.is_idle());
            for (n, state) in truth {
                prop_assert_eq!(manager.get(&task(n).to_wire()), Some(&state));
            }
        }
    }
}
