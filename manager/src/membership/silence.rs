//! Which managers answer, as `node ls` shows it. Nothing is decided by it: Raft counts its own votes.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::wire::{Kind, Node, NodeStatus, object};
use bulkhead_raft::state::State;

use super::{Step, managers, reference, replace, unchanged};

/// Looks in a row that a manager may miss before it is shown as down: a new leader has heard nobody at first.
const LOOKS: u32 = 4;

/// How often in a row each voter was not heard.
#[derive(Debug, Default)]
pub(super) struct Silence(BTreeMap<u64, u32>);

impl Silence {
    /// Takes note of one look.
    pub(super) fn count(&mut self, voters: &BTreeSet<u64>, alive: &BTreeSet<u64>) {
        let missed = |member: &u64| {
            if alive.contains(member) {
                0
            } else {
                self.0.get(member).map_or(1, |n| n + 1)
            }
        };
        self.0 = voters.iter().map(|member| (*member, missed(member))).collect();
    }

    /// The status of the first manager that is not shown as it is.
    pub(super) fn plan(&self, state: &State, alive: &BTreeSet<u64>) -> Option<Step> {
        managers(state).into_iter().find_map(|(member, node)| {
            let missed = *self.0.get(&member)?;
            let (status, reason) = match missed {
                0 if alive.contains(&member) => (NodeStatus::Ready, ""),
                missed if missed >= LOOKS => (NodeStatus::Down, "the leader does not hear from it"),
                _ => return None,
            };
            (node.status() != status).then(|| show(node, status, reason))
        })
    }
}

fn show(node: &Node, status: NodeStatus, reason: &str) -> Step {
    let read = unchanged(reference(Kind::Node, &node.id), node.meta.as_ref());
    let mut node = node.clone();
    node.set_status(status);
    reason.clone_into(&mut node.status_reason);
    Step::Want {
        changes: vec![replace(object::Object::Node(node))],
        preconditions: vec![read],
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{Change, Object, Role, Transaction, change};
    use prost::Message as _;

    use super::*;

    fn two_managers() -> State {
        let mut state = State::default();
        for member in 1..=2 {
            let node = Node {
                id: vec![member; 16],
                name: format!("manager-{member}"),
                role: Role::Manager.into(),
                ..Default::default()
            };
            let object = Object {
                object: Some(object::Object::Node(node)),
            };
            let create = Change {
                change: Some(change::Change::Create(object)),
            };
            apply(&mut state, vec![create]);
        }
        state
    }

    fn apply(state: &mut State, changes: Vec<Change>) {
        let index = state.index() + 1;
        let transaction = Transaction {
            level: 1,
            request_id: vec![u8::try_from(index).expect("small"); 16],
            changes,
            ..Default::default()
        };
        let applied = state
            .apply(index, 1, &transaction.encode_to_vec())
            .expect("a known level");
        assert_eq!(applied.outcome.rejection, None);
    }

    #[test]
    fn a_manager_is_down_only_after_it_was_missed_for_a_while() {
        let mut state = two_managers();
        let (voters, mut silence) = (BTreeSet::from([1, 2]), Silence::default());
        let mut settle = |alive: &[u64], looks: u32| {
            let alive = BTreeSet::from_iter(alive.iter().copied());
            for _ in 0..looks {
                silence.count(&voters, &alive);
            }
            while let Some(Step::Want { changes, .. }) = silence.plan(&state, &alive) {
                apply(&mut state, changes);
            }
            managers(&state)
                .into_values()
                .map(Node::status)
                .collect::<Vec<_>>()
        };
        assert_eq!(settle(&[1, 2], 1), [NodeStatus::Ready, NodeStatus::Ready]);
        assert_eq!(settle(&[1], LOOKS - 1), [NodeStatus::Ready, NodeStatus::Ready]);
        assert_eq!(settle(&[1], 1), [NodeStatus::Ready, NodeStatus::Down]);
        assert_eq!(settle(&[1, 2], 1), [NodeStatus::Ready, NodeStatus::Ready]);
    }
}
