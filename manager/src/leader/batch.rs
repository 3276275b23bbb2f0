//! Packs the steps of a plan into transactions, each within its limits.

use std::collections::BTreeSet;

use bulkhead_proto::{limits, wire};
use prost::Message as _;

use crate::orchestrator::Step;

/// Room for what a transaction carries besides changes and preconditions.
const ENVELOPE_BYTES: usize = 4 << 10;

/// The content of one transaction.
#[derive(Debug, Default, PartialEq)]
pub struct Batch {
    /// Each once, however many steps have it.
    pub preconditions: Vec<wire::Precondition>,
    /// In the order of the steps.
    pub changes: Vec<wire::Change>,
}

/// Steps in their order, as few transactions as hold them. A step is never divided.
pub fn pack(steps: Vec<Step>) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut open = Open::default();
    for step in steps {
        let conditions: Vec<_> = step.preconditions.iter().map(|it| it.encode_to_vec()).collect();
        // Five bytes: a field's tag and length in front of each.
        let bytes = conditions.iter().map(|it| it.len() + 5).sum::<usize>()
            + step.changes.iter().map(|it| it.encoded_len() + 5).sum::<usize>();
        if !open.has_room(&step, bytes) {
            batches.push(std::mem::take(&mut open).batch);
        }
        open.bytes += bytes;
        open.batch.changes.extend(step.changes);
        for (condition, encoded) in step.preconditions.into_iter().zip(conditions) {
            if open.known.insert(encoded) {
                open.batch.preconditions.push(condition);
            }
        }
    }
    batches.push(open.batch);
    batches.retain(|batch| !batch.changes.is_empty());
    batches
}

#[derive(Default)]
struct Open {
    batch: Batch,
    known: BTreeSet<Vec<u8>>,
    bytes: usize,
}

impl Open {
    fn has_room(&self, step: &Step, bytes: usize) -> bool {
        self.batch.changes.len() + step.changes.len() <= limits::CHANGES
            && self.batch.preconditions.len() + step.preconditions.len() <= limits::PRECONDITIONS
            && self.bytes + bytes <= limits::TRANSACTION_BYTES - ENVELOPE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(task: u8, message_bytes: usize) -> Step {
        let task = wire::Task {
            id: vec![task; 16],
            refusals: vec!["x".repeat(message_bytes)],
            ..Default::default()
        };
        let mut step = Step::default();
        step.unless_changed(&wire::Service {
            id: vec![9; 16],
            ..Default::default()
        });
        step.replace(task);
        step
    }

    #[test]
    fn small_steps_share_a_transaction_and_its_preconditions() {
        let batches = pack((0..100).map(|n| step(n, 10)).collect());
        let sizes: Vec<_> = batches
            .iter()
            .map(|batch| (batch.preconditions.len(), batch.changes.len()))
            .collect();
        assert_eq!(sizes, [(1, 100)]);
    }

    #[test]
    fn no_transaction_is_over_its_limits() {
        let many = (0..=limits::CHANGES).map(|_| step(1, 10)).collect();
        let large = (0..30).map(|n| step(n, 100 << 10)).collect();
        for steps in [many, large] {
            let count: usize = Vec::len(&steps);
            let batches = pack(steps);
            assert!(batches.len() > 1);
            assert_eq!(
                batches.iter().map(|batch| batch.changes.len()).sum::<usize>(),
                count
            );
            for batch in batches {
                let transaction = wire::Transaction {
                    request_id: vec![1; 16],
                    preconditions: batch.preconditions,
                    changes: batch.changes,
                    ..Default::default()
                };
                assert!(transaction.changes.len() <= limits::CHANGES);
                assert!(transaction.encoded_len() <= limits::TRANSACTION_BYTES);
            }
        }
    }

    #[test]
    fn nothing_to_do_is_no_transaction() {
        assert_eq!(pack(Vec::new()), []);
        assert_eq!(pack(vec![Step::default()]), []);
    }
}
