//! Which caller may speak for which member of Raft.

use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::Role;
use bulkhead_raft::Replica;
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
        // One that this replica has not heard of yet may be newer than its state; one that it knows is bound.
        view::node(&state, subject.node).is_none_or(|node| node.member_id == member)
    }
}
