//! The cluster on one screen: always answered, and marked where it may be old.

use std::collections::BTreeSet;

use bulkhead_proto::wire::{
    Cluster, ClusterStatus, DesiredState, MemberStatus, Node, NodeStatus, Role, Task, TaskState,
};
use bulkhead_proto::{KeyId, limits};
use bulkhead_raft::Members;
use bulkhead_raft::state::State;

use super::object::{NODES, TASKS, get};
use crate::ca::signer::Signers;
use crate::{ca, key_ring, lock, view};

/// What Raft and the replica know.
pub(super) fn status(
    state: &State,
    raft: &Members,
    member: u64,
    is_fresh: bool,
    signers: Option<&Signers>,
) -> ClusterStatus {
    let cluster = view::cluster(state).cloned().unwrap_or_default();
    let nodes: Vec<&Node> = NODES.all(state).collect();
    let node_of = |member: u64| {
        nodes
            .iter()
            .find(|it| it.role() == Role::Manager && it.member_id == member)
    };
    let members: Vec<MemberStatus> = raft
        .nodes
        .iter()
        .map(|(id, at)| MemberStatus {
            member_id: *id,
            node_id: at.node.to_wire(),
            name: get::<Node>(state, at.node.as_bytes()).map_or_else(String::new, |it| it.name.clone()),
            address: at.address.clone(),
            voter: raft.voters.contains(id),
            matched: raft.matched.get(id).copied().flatten().unwrap_or(0),
            leader: raft.leader == Some(*id),
            locked_with: get::<Node>(state, at.node.as_bytes()).map_or(0, |it| it.locked_with),
            resealed: get::<Node>(state, at.node.as_bytes()).map_or(0, |it| it.resealed),
        })
        .collect();
    let certificates = nodes
        .iter()
        .filter_map(|it| it.keys.last().map(|key| key.not_after));
    let tasks = || {
        TASKS
            .all(state)
            .filter(|it| it.desired() <= DesiredState::Running)
    };
    let in_state = |task: &&Task, wanted| task.status.as_ref().is_some_and(|it| it.state() == wanted);
    ClusterStatus {
        index: state.index(),
        stale: !is_fresh,
        term: raft.term,
        leader_member: raft.leader.unwrap_or(0),
        can_lose: can_lose(&raft.voters, |id| {
            let down = node_of(id).is_some_and(|it| it.status() == NodeStatus::Down);
            !down && (raft.alive.is_empty() || raft.alive.contains(&id))
        }),
        members,
        lab: cluster.lab,
        autolock: lock::generation(&cluster) != 0,
        unlock_generation: lock::generation(&cluster),
        unlock_pending: lock::pending(&cluster),
        key_ring_epochs: u32::try_from(cluster.key_ring.len()).unwrap_or(u32::MAX),
        key_ring_left: u32::try_from(key_ring::left(state)).unwrap_or(u32::MAX),
        reseal: cluster.reseal,
        roots: ca::roots(&cluster),
        issuer: ca::trust::key_id(ca::trust::issuer(&cluster).root)
            .map_or_else(|_| Vec::new(), KeyId::to_wire),
        node_certificate_validity_ms: validity_ms(&cluster),
        oldest_certificate_not_after: certificates.min().unwrap_or(0),
        pending_tasks: tasks().filter(|it| it.node_id.is_empty()).count() as u64,
        running_tasks: tasks().filter(|it| in_state(it, TaskState::Running)).count() as u64,
        node_id: raft
            .nodes
            .get(&member)
            .map_or_else(Vec::new, |it| it.node.to_wire()),
        level: cluster.level,
        applied: state.index(),
        key_ring: opened(&cluster.key_ring, &nodes),
        signers: ca::rotation::signers(&cluster, signers),
        audit: Some(state.audit().head().to_wire()),
        epoch: cluster.epoch,
        recovery_key: cluster.recovery_key,
        return_until: cluster.return_until,
        cluster_id: cluster.id,
    }
}

/// How long a new certificate of a node is valid.
fn validity_ms(cluster: &Cluster) -> u64 {
    let set = cluster
        .settings
        .as_ref()
        .map_or(0, |it| it.node_certificate_validity_ms);
    match set {
        0 => u64::try_from(limits::NODE_CERTIFICATE_VALIDITY.as_millis()).unwrap_or(u64::MAX),
        set => set,
    }
}

/// How many managers may fail before no majority is left of those that vote.
fn can_lose(voters: &BTreeSet<u64>, is_up: impl Fn(u64) -> bool) -> u32 {
    let up = voters.iter().filter(|id| is_up(**id)).count();
    u32::try_from(up.saturating_sub(voters.len() / 2 + 1)).unwrap_or(u32::MAX)
}

fn opened(ring: &[bulkhead_proto::wire::KeyRingEpoch], nodes: &[&Node]) -> String {
    let Some(newest) = ring.last() else {
        return "none".to_owned();
    };
    let managers = nodes.iter().filter(|it| it.role() == Role::Manager);
    let (all, open) = managers.fold((0, 0), |(all, open), it| {
        (all + 1, open + usize::from(it.opened_epoch >= newest.epoch))
    });
    format!("epoch {}, opened by {open} of {all} managers", newest.epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_can_lose_what_its_majority_spares() {
        let check = |voters: u64, down: &[u64], expected| {
            let voters: BTreeSet<u64> = (1..=voters).collect();
            assert_eq!(
                can_lose(&voters, |id| !down.contains(&id)),
                expected,
                "{voters:?} {down:?}"
            );
        };
        check(0, &[], 0);
        check(1, &[], 0);
        check(2, &[], 0);
        check(3, &[], 1);
        check(3, &[2], 0);
        check(3, &[2, 3], 0);
        check(5, &[], 2);
        check(5, &[1], 1);
    }
}
