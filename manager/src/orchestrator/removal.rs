//! What the removal of a node means for its tasks.

use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{self, object::Object as Any};
use bulkhead_raft::state::{Key, State};

use super::plan::Step;
use super::task;

/// The changes that call the node's live tasks lost. In one transaction with the node's deletion they leave no task
/// on a node that is gone; without them the deletion is refused.
pub fn of_node(state: &State, node: NodeId, now_ms: i64) -> Vec<wire::Change> {
    let mut step = Step::default();
    let key = Key::new(wire::Kind::Node, *node.as_bytes());
    for object in state.referrers(key, wire::Kind::Task) {
        if let Some(Any::Task(task)) = &object.object
            && task::is_live(task)
        {
            step.replace(task::lost(task, "its node was removed from the cluster", now_ms));
        }
    }
    step.changes
}
