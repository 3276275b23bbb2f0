//! What the replicated state says about a caller's key, and when that may have changed.

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_identity::bundle::Root;
use bulkhead_identity::{Certificate, Subject};
use bulkhead_proto::wire::{Kind, Role as WireRole, event, object::Object as Any};
use bulkhead_proto::{KeyId, Role};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::KeyState;
use crate::ca::{clone, trust};
use crate::view;

/// The key lists of all nodes. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Listing {
    replica: Replica,
    changed: watch::Sender<u64>,
    /// The roots that sign no more, as of a version of the cluster object.
    dropped: Arc<Mutex<(u64, Vec<Root>)>>,
}

impl Listing {
    /// The lists as this replica has them: [`Listing::run`] must run for streams to close at a removal.
    pub fn new(replica: Replica) -> Self {
        let index = replica.index();
        Self {
            replica,
            changed: watch::Sender::new(index),
            dropped: Arc::default(),
        }
    }

    /// Wakes open streams when a node or the cluster object changed, and at no other commit.
    pub async fn run(&self, stop: CancellationToken) {
        let mut applied = self.replica.applied();
        let mut seen = *self.changed.borrow();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
            let index = *applied.borrow_and_update();
            // What is compacted may have been a removal.
            let events = self.replica.events_since(seen);
            seen = index;
            if events.is_err() || events.is_ok_and(|events| events.iter().any(|it| concerns(it))) {
                self.changed.send_replace(index);
            }
        }
    }

    /// The key of a connection that was opened at `opened_ms`, as the state has it now.
    pub fn of(&self, subject: &Subject, key: KeyId, opened_ms: i64) -> KeyState {
        key_state(&self.replica.state(), subject, key, opened_ms)
    }

    /// Whether the certificate's root was rotated away, and opens nothing any more. One whose root this replica does
    /// not know yet was not.
    pub(super) fn is_dropped(&self, certificate: &Certificate, raft: bool) -> bool {
        let state = self.replica.state();
        let Some(cluster) = view::cluster(&state) else {
            return false;
        };
        let version = cluster.meta.as_ref().map_or(0, |meta| meta.version);
        let mut known = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != version {
            *known = (version, trust::dropped(cluster));
        }
        trust::is_dropped(cluster, &known.1, certificate, raft)
    }

    /// The reason, once `ended` gives one; it is asked again whenever a node or the cluster object changed.
    pub(super) async fn until<T>(&self, ended: impl Fn() -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(reason) = ended() {
                return reason;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await; // the sender is this list's own
            }
        }
    }
}

fn concerns(event: &bulkhead_proto::wire::Event) -> bool {
    match &event.change {
        Some(event::Change::Put(object)) => matches!(object.object, Some(Any::Node(_) | Any::Cluster(_))),
        Some(event::Change::Deleted(reference)) => reference.kind() == Kind::Node,
        None => false,
    }
}

fn key_state(state: &State, subject: &Subject, key: KeyId, opened_ms: i64) -> KeyState {
    let id = key.as_bytes();
    if view::cluster(state).is_some_and(|it| it.tombstones.iter().any(|it| it.key_id == id)) {
        return KeyState::Tombstoned;
    }
    let Some(node) = view::node(state, subject.node) else {
        return KeyState::Unknown;
    };
    if clone::superseded(node, key).is_some_and(|it| clone::is_clone(it, opened_ms)) {
        return KeyState::Superseded;
    }
    let listed = {
        let role = node.role();
        // A standby that was promoted asks for the answer that it lost, and a manager that is to be demoted asks with the
        // standby's certificate what it is by now. What each is given, the methods decide by the record: to be listed here
        // opens neither a manager's certificate nor the way out of the cluster.
        let changes = subject.role == Role::Standby && role == WireRole::Manager;
        (role == view::wire_role(subject.role) || changes) && node.keys.iter().any(|it| it.key_id == id)
    };
    match listed {
        true => KeyState::Listed,
        false => KeyState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{Change, Node, NodeKey, Transaction, change::Change as Step};
    use bulkhead_proto::{ClusterId, NodeId};
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_standbys_key_counts_while_its_node_changes_its_role_and_no_other_does() {
        let key = KeyId::from_bytes([7; 32]);
        let check = |record: WireRole, role: Role, want: KeyState| {
            let node = Node {
                id: vec![1; 16],
                name: "n".into(),
                role: record.into(),
                keys: vec![NodeKey {
                    key_id: key.to_wire(),
                    ..Default::default()
                }],
                ..Default::default()
            };
            let transaction = Transaction {
                level: 1,
                changes: vec![Change {
                    change: Some(Step::Create(view::object(Any::Node(node)))),
                }],
                ..Default::default()
            };
            let mut state = State::default();
            let applied = state.apply(1, 1, &transaction.encode_to_vec());
            assert_eq!(applied.expect("a known level").outcome.rejection, None);
            let subject = Subject {
                cluster: ClusterId::from_bytes([9; 16]),
                node: NodeId::from_bytes([1; 16]),
                role,
            };
            assert_eq!(key_state(&state, &subject, key, 0), want, "{record:?} {role}");
        };
        for record in [
            WireRole::Manager,
            WireRole::Worker,
            WireRole::Operator,
            WireRole::Standby,
        ] {
            for role in Role::ALL {
                let own = record == view::wire_role(role);
                let changes = record == WireRole::Manager && role == Role::Standby;
                let want = match own || changes {
                    true => KeyState::Listed,
                    false => KeyState::Unknown,
                };
                check(record, role, want);
            }
        }
    }
}
