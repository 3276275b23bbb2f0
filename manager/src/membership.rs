//! Which managers vote: the way of a learner into the quorum and of a voter out of it.
//!
//! What is wanted is replicated state (`Cluster.desired_voters`); the leader moves Raft towards it, one step at a time.
//! A manager becomes wanted only once it has committed that it opens the newest key-ring epoch: a quorum of managers
//! that cannot read a secret would be of no use to anyone.

mod gate;
mod silence;

pub use gate::Gate;

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_identity::Certificate;
use bulkhead_proto::Role;
use bulkhead_proto::wire::{
    self, Availability, Cluster, Kind, Node, NodeKey, NodeStatus, Role as WireRole, change, object,
    precondition,
};
use bulkhead_raft::state::State;

use crate::view;

/// What Raft itself knows of its members.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RaftMembers {
    /// Those that vote, in any configuration.
    pub voters: BTreeSet<u64>,
    /// Whether two configurations hold at once.
    pub joint: bool,
    /// Every member, learners included.
    pub all: BTreeSet<u64>,
}

/// The next thing to do about who votes.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Commit what is wanted; the transaction is refused if what it was read from moved on.
    Want {
        /// What to commit.
        changes: Vec<wire::Change>,
        /// The objects as they were read.
        preconditions: Vec<wire::Precondition>,
    },
    /// Move Raft to these voters, and forget members without a record.
    Reconcile {
        /// Who votes.
        voters: BTreeSet<u64>,
        /// Who leaves, learner or voter.
        strangers: BTreeSet<u64>,
    },
}

/// Decides what the leader does next; nothing when Raft is as it is wanted.
pub fn plan(state: &State, raft: &RaftMembers, now_ms: i64) -> Option<Step> {
    let cluster = view::cluster(state)?;
    let wanted: BTreeSet<u64> = cluster.desired_voters.iter().copied().collect();
    let managers = managers(state);
    let newest = cluster
        .key_ring
        .iter()
        .map(|epoch| epoch.epoch)
        .max()
        .unwrap_or(0);
    let ready = managers.iter().filter(|(member, node)| {
        let holds_ring = node.opened_epoch >= newest && !node.envelope_key.is_empty();
        raft.all.contains(member) && holds_ring && !leaves(node)
    });
    let next: BTreeSet<u64> = wanted
        .iter()
        .copied()
        // A voter whose record is gone was removed on purpose.
        .filter(|member| managers.contains_key(member))
        .chain(ready.map(|(member, _)| *member))
        .collect();
    if next.is_empty() {
        return None; // never plan a cluster without voters, whatever the state says
    }
    if next != wanted {
        return Some(want(cluster.clone(), &next, Vec::new()));
    }
    let gone = managers
        .iter()
        .find(|(member, node)| leaves(node) && !wanted.contains(member) && !raft.voters.contains(member));
    if let Some((_, node)) = gone {
        return Some(forget(node, now_ms));
    }
    // Learners on their way in have a record; a member without one has left.
    let strangers: BTreeSet<u64> = raft
        .all
        .iter()
        .copied()
        .filter(|member| !managers.contains_key(member))
        .collect();
    let settled = raft.voters == wanted && !raft.joint && strangers.is_empty();
    (!settled).then_some(Step::Reconcile {
        voters: wanted,
        strangers,
    })
}

/// Why a manager may not leave.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaveError {
    /// No manager has this member id.
    #[error("member {0} is no manager of this cluster")]
    Unknown(u64),
    /// The cluster would have no voter.
    #[error("it is the last manager: without it there is no cluster")]
    Last,
    /// Too few of the others answer to go on deciding.
    #[error(
        "{alive} of the {voters} managers that would remain answer; {needed} are needed to decide anything"
    )]
    Quorum {
        /// Voters without the one that leaves.
        voters: usize,
        /// Those among them that were heard lately.
        alive: usize,
        /// A majority of them.
        needed: usize,
    },
}

/// Plans the departure of a manager that asked for it: no longer wanted, no longer a holder of the key ring.
pub fn leave(state: &State, member: u64, alive: &BTreeSet<u64>) -> Result<Step, LeaveError> {
    let cluster = view::cluster(state).ok_or(LeaveError::Unknown(member))?;
    let managers = managers(state);
    let node = managers.get(&member).ok_or(LeaveError::Unknown(member))?;
    let mut next: BTreeSet<u64> = cluster.desired_voters.iter().copied().collect();
    next.remove(&member);
    let (voters, needed) = (next.len(), next.len() / 2 + 1);
    let alive = next.intersection(alive).count();
    if voters == 0 {
        return Err(LeaveError::Last);
    }
    if alive < needed {
        return Err(LeaveError::Quorum {
            voters,
            alive,
            needed,
        });
    }
    let mut node = Node::clone(node);
    node.set_availability(Availability::Drain);
    node.opened_epoch = 0;
    node.envelope_key.clear();
    // An envelope for who is a manager no more makes the leader renew the ring and the root: without, nothing is renewed.
    let mut cluster = cluster.clone();
    if node.leaves_clean {
        for epoch in &mut cluster.key_ring {
            epoch.envelopes.retain(|envelope| envelope.node_id != node.id);
        }
    }
    let node = replace(object::Object::Node(node));
    Ok(want(cluster, &next, vec![node]))
}

/// Why a manager whose store is lost is not taken back, or not yet.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeBackError {
    /// The state has no such manager.
    #[error("the cluster lists no such manager")]
    Unknown,
    /// It is on its way out.
    #[error("this manager is leaving the quorum")]
    Leaves,
    /// It is heard: two programs have its key, or the one before ended a moment ago.
    #[error("member {0} answers: a program with this manager's key runs, or ended a moment ago")]
    Answers(u64),
    /// The store's id is none.
    #[error("a store's id has 16 bytes")]
    Store,
}

/// Plans the return of a manager whose store is lost: as a new member that has acknowledged nothing. Nothing where it
/// was done before.
///
/// # Errors
/// [`TakeBackError`].
pub fn take_back(
    state: &State,
    node: &[u8],
    store: &[u8],
    alive: &BTreeSet<u64>,
) -> Result<Option<(wire::Precondition, wire::Change)>, TakeBackError> {
    let record = view::managers(state)
        .find(|it| it.id == node)
        .ok_or(TakeBackError::Unknown)?;
    if store.len() != 16 {
        return Err(TakeBackError::Store);
    }
    if record.store == store {
        return Ok(None);
    }
    if leaves(record) {
        return Err(TakeBackError::Leaves);
    }
    if alive.contains(&record.member_id) {
        return Err(TakeBackError::Answers(record.member_id));
    }
    let new = Node {
        store: store.to_vec(),
        // Said anew by the new member.
        opened_epoch: 0,
        resealed: 0,
        ..record.clone()
    };
    let read = unchanged(reference(Kind::Node, &record.id), record.meta.as_ref());
    Ok(Some((read, replace(object::Object::Node(new)))))
}

/// Whether a manager may be demoted, as far as the records say: the leader decides once more when it leaves.
///
/// # Errors
/// [`LeaveError`], with the arithmetic.
pub fn may_leave(state: &State, member: u64) -> Result<(), LeaveError> {
    let alive = managers(state)
        .into_iter()
        .filter(|(_, node)| node.status() != NodeStatus::Down)
        .map(|(member, _)| member)
        .collect();
    leave(state, member, &alive).map(drop)
}

/// A manager runs no tasks, so draining it means that it is on its way out.
fn leaves(node: &Node) -> bool {
    node.availability() == Availability::Drain
}

/// The record of a manager that no longer votes goes, and its keys are never served again. One that an operator wants to
/// be a standby stays, with the key that it got for that.
fn forget(node: &Node, now_ms: i64) -> Step {
    let object = reference(Kind::Node, &node.id);
    let (kept, dead): (Vec<&NodeKey>, Vec<&NodeKey>) = node
        .keys
        .iter()
        .partition(|key| node.wanted_role() == WireRole::Standby && is_of_standby(key));
    let tombstones = dead.iter().map(|key| wire::Tombstone {
        key_id: key.key_id.clone(),
        node_id: node.id.clone(),
        removed_at: now_ms,
        ..Default::default()
    });
    let record = match kept.is_empty() {
        true => change::Change::Delete(object.clone()),
        false => change::Change::Replace(wire::Object {
            object: Some(object::Object::Node(Node {
                role: WireRole::Standby.into(),
                wanted_role: WireRole::Unspecified.into(),
                availability: Availability::Active.into(),
                status: NodeStatus::Unknown.into(),
                keys: kept.into_iter().cloned().collect(),
                leaves_clean: false,
                // On its way out it may have said once more that it opens the ring.
                opened_epoch: 0,
                envelope_key: Vec::new(),
                locked_with: 0,
                resealed: 0,
                store: Vec::new(),
                ..node.clone()
            })),
        }),
    };
    let changes = tombstones
        .map(|tombstone| {
            let tombstone = Some(tombstone);
            change::Change::AddTombstone(wire::AddTombstone { tombstone })
        })
        .chain([record])
        .map(|change| wire::Change { change: Some(change) })
        .collect();
    Step::Want {
        changes,
        preconditions: vec![unchanged(object, node.meta.as_ref())],
    }
}

fn is_of_standby(key: &NodeKey) -> bool {
    Certificate::from_der(&key.certificate).is_ok_and(|it| it.subject().role == Role::Standby)
}

fn want(mut cluster: Cluster, voters: &BTreeSet<u64>, mut changes: Vec<wire::Change>) -> Step {
    let read = unchanged(reference(Kind::Cluster, &cluster.id), cluster.meta.as_ref());
    cluster.desired_voters = voters.iter().copied().collect();
    changes.insert(0, replace(object::Object::Cluster(cluster)));
    Step::Want {
        changes,
        preconditions: vec![read],
    }
}

fn reference(kind: Kind, id: &[u8]) -> wire::ObjectRef {
    wire::ObjectRef {
        kind: kind.into(),
        id: id.to_vec(),
    }
}

fn unchanged(object: wire::ObjectRef, meta: Option<&wire::Meta>) -> wire::Precondition {
    let read = wire::VersionIs {
        object: Some(object),
        version: meta.map_or(0, |meta| meta.version),
    };
    wire::Precondition {
        precondition: Some(precondition::Precondition::VersionIs(read)),
    }
}

fn replace(object: object::Object) -> wire::Change {
    let object = wire::Object { object: Some(object) };
    wire::Change {
        change: Some(change::Change::Replace(object)),
    }
}

fn managers(state: &State) -> BTreeMap<u64, &Node> {
    view::managers(state).map(|node| (node.member_id, node)).collect()
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::Role;
    use prost::Message as _;

    use super::*;

    const NOW: i64 = 1_000;
    const DAY: i64 = 86_400_000;

    fn manager(member: u64, opened: u32) -> wire::Change {
        let node = Node {
            id: vec![u8::try_from(member).expect("small"); 16],
            name: format!("manager-{member}"),
            role: Role::Manager.into(),
            member_id: member,
            envelope_key: if opened > 0 { vec![1; 32] } else { Vec::new() },
            opened_epoch: opened,
            ..Default::default()
        };
        create(object::Object::Node(node))
    }

    fn create(object: object::Object) -> wire::Change {
        let object = wire::Object { object: Some(object) };
        wire::Change {
            change: Some(change::Change::Create(object)),
        }
    }

    /// A cluster at epoch 1 with these (member, opened epoch) managers.
    fn state(wanted: &[u64], managers: &[(u64, u32)]) -> State {
        let cluster = Cluster {
            id: vec![9; 16],
            key_ring: vec![wire::KeyRingEpoch {
                epoch: 1,
                // A manager with an envelope key must have its envelope.
                envelopes: (1..=3)
                    .map(|node| wire::Envelope {
                        node_id: vec![node; 16],
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            }],
            desired_voters: wanted.to_vec(),
            ..Default::default()
        };
        // Apply numbers managers by the entry that makes them: one entry each, in order.
        let state = managers.iter().fold(State::default(), |state, (member, opened)| {
            apply(state, vec![manager(*member, *opened)])
        });
        apply(state, vec![create(object::Object::Cluster(cluster))])
    }

    fn apply(state: State, changes: Vec<wire::Change>) -> State {
        apply_at(state, changes, NOW)
    }

    fn apply_at(mut state: State, changes: Vec<wire::Change>, at: i64) -> State {
        let transaction = wire::Transaction {
            level: 1,
            at,
            request_id: vec![u8::try_from(state.index()).expect("small") + 1; 16],
            changes,
            ..Default::default()
        };
        let index = state.index() + 1;
        let applied = state
            .apply(index, 1, &transaction.encode_to_vec())
            .expect("a known level");
        assert_eq!(applied.outcome.rejection, None);
        state
    }

    fn raft(configurations: &[&[u64]], all: &[u64]) -> RaftMembers {
        RaftMembers {
            voters: configurations.concat().into_iter().collect(),
            joint: configurations.len() > 1,
            all: all.iter().copied().collect(),
        }
    }

    /// Applies what the plan wants until it asks for a reconciliation or nothing.
    fn settle(mut state: State, raft: &RaftMembers) -> (State, Option<Step>) {
        for _ in 0..4 {
            match plan(&state, raft, NOW) {
                Some(Step::Want { changes, .. }) => state = apply(state, changes),
                other => return (state, other),
            }
        }
        panic!("the plan never settles")
    }

    fn reconcile(voters: &[u64], strangers: &[u64]) -> Option<Step> {
        Some(Step::Reconcile {
            voters: voters.iter().copied().collect(),
            strangers: strangers.iter().copied().collect(),
        })
    }

    #[test]
    fn the_plan_for_each_situation() {
        let check = |what: &str, state: State, raft: RaftMembers, expected: Option<Step>| {
            assert_eq!(settle(state, &raft).1, expected, "{what}");
        };
        check("settled", state(&[1], &[(1, 1)]), raft(&[&[1]], &[1]), None);
        check(
            "a learner that opened the key ring votes",
            state(&[1], &[(1, 1), (2, 1)]),
            raft(&[&[1]], &[1, 2]),
            reconcile(&[1, 2], &[]),
        );
        check(
            "a learner that did not waits",
            state(&[1], &[(1, 1), (2, 0)]),
            raft(&[&[1]], &[1, 2]),
            None,
        );
        check(
            "a manager that Raft does not know yet waits",
            state(&[1], &[(1, 1), (2, 1)]),
            raft(&[&[1]], &[1]),
            None,
        );
        check(
            "a joint configuration left by a crash is flattened",
            state(&[1, 2], &[(1, 1), (2, 1)]),
            raft(&[&[1], &[1, 2]], &[1, 2]),
            reconcile(&[1, 2], &[]),
        );
        check(
            "a removed manager leaves",
            state(&[1, 2, 3], &[(1, 1), (2, 1)]),
            raft(&[&[1, 2, 3]], &[1, 2, 3]),
            reconcile(&[1, 2], &[3]),
        );
        check(
            "never a cluster without voters",
            state(&[7], &[]),
            raft(&[&[7]], &[7]),
            None,
        );
    }

    #[test]
    fn a_manager_whose_store_is_lost_is_a_new_member_and_the_former_one_goes() {
        let three = || state(&[1, 2, 3], &[(1, 1), (2, 1), (3, 1)]);
        let ask = |state: &State, node: u8, store: &[u8], alive: &[u64]| {
            take_back(state, &[node; 16], store, &alive.iter().copied().collect())
        };
        let refused =
            |node, store: &[u8], alive: &[u64]| ask(&three(), node, store, alive).expect_err("refused");
        assert_eq!(refused(4, &[7; 16], &[1, 2]), TakeBackError::Unknown);
        assert_eq!(refused(3, &[7; 15], &[1, 2]), TakeBackError::Store);
        assert_eq!(refused(3, &[7; 16], &[1, 2, 3]), TakeBackError::Answers(3));

        let planned = ask(&three(), 3, &[7; 16], &[1, 2]).expect("taken back");
        let (_, change) = planned.expect("to be committed");
        let taken = apply(three(), vec![change]);
        // A retry changes nothing; another store is one more loss.
        assert_eq!(ask(&taken, 3, &[7; 16], &[1, 2]), Ok(None));
        let again = ask(&taken, 3, &[8; 16], &[1, 2]).expect("taken back");
        assert!(again.is_some());
        let record = managers(&taken).into_values().find(|it| it.id == [3; 16]);
        let record = record.expect("its record").clone();
        assert!(record.member_id > 3 && record.opened_epoch == 0);

        let (left, step) = settle(taken, &raft(&[&[1, 2, 3]], &[1, 2, 3]));
        assert_eq!(step, reconcile(&[1, 2], &[3]), "the former member leaves");
        let fresh = record.member_id;
        let learns = raft(&[&[1, 2]], &[1, 2, fresh]);
        let (left, step) = settle(left, &learns);
        assert_eq!(step, None, "it has proved nothing yet");
        let proved = managers(&left)[&fresh].clone();
        let proved = Node {
            opened_epoch: 1,
            ..proved
        };
        let left = apply(left, vec![replace(object::Object::Node(proved))]);
        assert_eq!(settle(left, &learns).1, reconcile(&[1, 2, fresh], &[]));
    }

    #[test]
    fn who_leaves_is_not_taken_back() {
        let three = state(&[1, 2, 3], &[(1, 1), (2, 1), (3, 1)]);
        let Ok(Step::Want { changes, .. }) = leave(&three, 3, &[1, 2, 3].into()) else {
            panic!("it may leave")
        };
        let (left, step) = settle(apply(three, changes), &raft(&[&[1, 2, 3]], &[1, 2, 3]));
        assert_eq!(step, reconcile(&[1, 2], &[]));
        // Once it does not vote any more its record goes, and then the member.
        let (left, step) = settle(left, &raft(&[&[1, 2]], &[1, 2, 3]));
        assert_eq!(step, reconcile(&[1, 2], &[3]));
        assert!(!managers(&left).contains_key(&3));
    }

    #[test]
    fn the_keys_of_who_left_stay_dead_when_others_leave() {
        let key = |byte: u8| wire::NodeKey {
            key_id: vec![byte; 32],
            ..Default::default()
        };
        let node = |byte: u8| Node {
            id: vec![byte; 16],
            keys: vec![key(byte)],
            ..Default::default()
        };
        let mut state = apply_at(state(&[1], &[(1, 1)]), Vec::new(), DAY * 20_000);
        for gone in [2, 3] {
            let Step::Want { changes, .. } = forget(&node(gone), DAY * 20_000) else {
                panic!("a change");
            };
            state = apply_at(state, changes, DAY * 20_000);
        }
        let cluster = view::cluster(&state).expect("there");
        assert_eq!(cluster.tombstones.len(), 2, "the second removal forgot the first");
    }

    #[test]
    fn nobody_leaves_a_cluster_that_could_not_decide_any_more() {
        let two = state(&[1, 2], &[(1, 1), (2, 1)]);
        let lost = LeaveError::Quorum {
            voters: 1,
            alive: 0,
            needed: 1,
        };
        assert_eq!(leave(&two, 2, &[2].into()), Err(lost));
        assert_eq!(
            leave(&state(&[1], &[(1, 1)]), 1, &[1].into()),
            Err(LeaveError::Last)
        );
        assert_eq!(leave(&two, 9, &[1].into()), Err(LeaveError::Unknown(9)));
    }
}
