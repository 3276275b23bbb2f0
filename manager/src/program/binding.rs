//! Which caller may speak for which member of Raft.

use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::{NodeId, Role};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use bulkhead_raft::transport::BindPeer;

use crate::view;

/// Holds callers against the node records of this replica.
#[derive(Debug)]
pub(super) struct Speakers(pub(super) Replica);

impl BindPeer for Speakers {
    fn speaks_for(&self, extensions: &tonic::Extensions, member: u64) -> bool {
        let Some(ConnectInfo {
            peer: Peer::Node(certificate),
            ..
        }) = extensions.get()
        else {
            return false;
        };
        let subject = certificate.subject();
        if subject.role != Role::Manager {
            return false;
        }
        let state = self.0.state();
        // A learner without any state knows nobody yet: the certificate's chain and role must do.
        if view::cluster(&state).is_none() {
            return true;
        }
        speaks(&state, subject.node, member)
    }
}

/// Whether a node may speak for a member. A member id is the index of the entry that gave it, so a replica that has not
/// applied that entry cannot know: what it knows of the node is of before, when it was a standby, or another member. One
/// that it has not heard of at all may be newer than its state, too; the first member is as old as the cluster.
fn speaks(state: &State, node: NodeId, member: u64) -> bool {
    state.index() < member || view::node(state, node).is_none_or(|it| it.member_id == member)
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{Change, Node, Role as WireRole, Transaction, change::Change as Step, object};
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_replica_that_catches_up_hears_who_was_promoted_since() {
        let id = NodeId::from_bytes([1; 16]);
        let record = |role: WireRole, wanted: WireRole| {
            view::object(object::Object::Node(Node {
                id: id.to_wire(),
                name: "n".into(),
                role: role.into(),
                wanted_role: wanted.into(),
                ..Default::default()
            }))
        };
        let mut state = State::default();
        let apply = |state: &mut State, step| {
            let transaction = Transaction {
                level: 1,
                changes: vec![Change { change: Some(step) }],
                ..Default::default()
            };
            let applied = state.apply(state.index() + 1, 1, &transaction.encode_to_vec());
            assert_eq!(applied.expect("a known level").outcome.rejection, None);
        };
        let standby = record(WireRole::Standby, WireRole::Manager);
        apply(&mut state, Step::Create(standby));
        assert!(
            speaks(&state, id, 2),
            "the entry that made it a manager is on its way"
        );
        apply(
            &mut state,
            Step::Replace(record(WireRole::Manager, WireRole::Unspecified)),
        );
        assert!(speaks(&state, id, 2) && !speaks(&state, id, 1));
        assert!(
            speaks(&state, NodeId::from_bytes([2; 16]), 1),
            "newer than this state"
        );
    }
}
