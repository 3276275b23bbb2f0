//! What the removal of a node means: for its record, its keys and its tasks.

use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{self, AddTombstone, Tombstone, change::Change, object::Object as Any};
use bulkhead_raft::state::{Key, State};

use super::plan::Step;
use super::task;

/// The record goes, its tasks are lost, and its keys are dead.
pub fn whole(state: &State, id: NodeId, node: &wire::Node, now_ms: i64) -> Vec<wire::Change> {
    let gone = Change::Delete(Key::new(wire::Kind::Node, *id.as_bytes()).to_wire());
    ended(state, id, node, now_ms, gone)
}

/// The record stays and says since when: its tasks are lost, its keys are dead, and it is given nothing.
pub fn quarantine(state: &State, id: NodeId, node: &wire::Node, now_ms: i64) -> Vec<wire::Change> {
    let mut kept = wire::Node {
        keys: Vec::new(),
        quarantined_at: now_ms,
        // A manager is given no new key of the ring.
        envelope_key: Vec::new(),
        opened_epoch: 0,
        meta: None,
        ..node.clone()
    };
    kept.set_availability(wire::Availability::Drain);
    let kept = Change::Replace(wire::Object {
        object: Some(Any::Node(kept)),
    });
    ended(state, id, node, now_ms, kept)
}

fn ended(state: &State, id: NodeId, node: &wire::Node, now_ms: i64, record: Change) -> Vec<wire::Change> {
    // Raft methods know no list of keys but that of dead ones.
    let superseded = node.superseded.iter().filter(|key| {
        node.role() == wire::Role::Manager && !node.keys.iter().any(|it| it.key_id == key.key_id)
    });
    let keys = node.keys.iter().map(|key| &key.key_id);
    let dead = keys.chain(superseded.map(|key| &key.key_id)).map(|key_id| {
        Change::AddTombstone(AddTombstone {
            tombstone: Some(Tombstone {
                key_id: key_id.clone(),
                node_id: node.id.clone(),
                removed_at: now_ms,
                ..Default::default()
            }),
        })
    });
    let mut changes = of_node(state, id, now_ms);
    changes.extend(
        dead.chain([record])
            .map(|change| wire::Change { change: Some(change) }),
    );
    changes
}

/// The changes that call the node's live tasks lost. In one transaction with the node's deletion they leave no task
/// on a node that is gone; without them the deletion is refused.
pub(super) fn of_node(state: &State, node: NodeId, now_ms: i64) -> Vec<wire::Change> {
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
