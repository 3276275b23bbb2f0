//! Nodes: availability, labels, removal.

use bulkhead_proto::wire::{
    Availability, Label, Node, NodeStatus, RemoveRequest, Role, Task, UpdateNodeRequest,
};
use bulkhead_proto::{Code, NodeId};
use bulkhead_raft::Members;
use bulkhead_raft::state::{Key, State};
use tonic::Status;

use super::change::{Decision, Plan};
use super::check;
use super::object::{Category, Kept, NODES, label};
use crate::membership;
use crate::orchestrator::removal;
use crate::refusal::refuse;
use crate::view;

/// Changes what operators say of a node.
pub(super) fn update(state: &State, request: &UpdateNodeRequest) -> Result<Decision, Status> {
    let node = NODES.find(state, &request.selector)?;
    if node.was_made_by(&request.request_id) {
        return Ok(Decision::done(node));
    }
    let availability = Availability::try_from(request.availability)
        .map_err(|_| check::invalid("availability", "it is none of active, pause and drain"))?;
    if availability != Availability::Unspecified && node.role() == Role::Manager {
        return Err(refuse(
            Code::Invalid,
            tonic::Code::InvalidArgument,
            format!("node {} is a manager, and managers run no tasks", label(node)),
            "name a worker; the host's worker is a node of its own",
        ));
    }
    if availability != Availability::Unspecified && node.quarantined_at != 0 {
        return Err(refuse(
            Code::Invalid,
            tonic::Code::FailedPrecondition,
            format!(
                "node {} is in quarantine: its keys are dead for ever",
                label(node)
            ),
            format!(
                "`bulkhead node rm {}`, and join the machine again with a new ticket once it is trusted",
                node.name
            ),
        ));
    }
    if request.clear_alarm && node.role() != Role::Manager {
        return Err(refuse(
            Code::Invalid,
            tonic::Code::FailedPrecondition,
            format!(
                "node {} is no manager: one with a clone is in quarantine for ever",
                label(node)
            ),
            format!(
                "`bulkhead node rm {}`, and join the machine again with a new ticket once it is trusted",
                node.name
            ),
        ));
    }
    check::labels(&request.label_add)?;
    let mut new = node.clone();
    if request.clear_alarm {
        new.clone_seen = None;
    }
    if availability != Availability::Unspecified {
        new.set_availability(availability);
    }
    new.labels.retain(|it| !request.label_rm.contains(&it.key));
    for added in &request.label_add {
        set(&mut new.labels, added);
    }
    check::labels(&new.labels)?;
    if new == *node {
        return Ok(Decision::done(node));
    }
    Ok(Plan::about(&node.id).unless_changed(node).replace(new).into())
}

fn set(labels: &mut Vec<Label>, added: &Label) {
    match labels.iter_mut().find(|it| it.key == added.key) {
        Some(found) => found.value.clone_from(&added.value),
        None => labels.push(added.clone()),
    }
}

/// A standby becomes a manager, as soon as it hears of it; a demotion that did not begin yet is taken back.
pub(super) fn promote(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let node = NODES.find(state, &request.selector)?;
    let wanted = match node.role() {
        Role::Standby => Role::Manager,
        Role::Manager if node.wanted_role() != Role::Standby => return Ok(Decision::done(node)),
        Role::Manager if node.availability() == Availability::Drain => return Err(leaves(node)),
        Role::Manager => Role::Unspecified,
        Role::Worker | Role::Operator | Role::Unspecified => return Err(no_manager(node)),
    };
    if node.quarantined_at != 0 {
        return Err(refuse(
            Code::Invalid,
            tonic::Code::FailedPrecondition,
            format!(
                "node {} is in quarantine: its keys are dead for ever",
                label(node)
            ),
            "promote another one",
        ));
    }
    Ok(want_role(node, wanted, false))
}

/// A manager becomes a standby; a promotion that did not happen yet is taken back.
pub(super) fn demote(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let node = NODES.find(state, &request.selector)?;
    match node.role() {
        Role::Standby => return Ok(want_role(node, Role::Unspecified, false)),
        Role::Manager if node.wanted_role() == Role::Standby => return Ok(Decision::done(node)),
        Role::Manager if node.availability() == Availability::Drain => return Err(leaves(node)),
        Role::Manager => {}
        Role::Worker | Role::Operator | Role::Unspecified => return Err(no_manager(node)),
    }
    if node.status() == NodeStatus::Down {
        return Err(refuse(
            Code::NotReady,
            tonic::Code::FailedPrecondition,
            format!(
                "manager {} does not answer, so it cannot become a standby",
                label(node)
            ),
            format!(
                "start it first; if it is lost for good, `bulkhead node rm --force {}` at the leading manager",
                node.name
            ),
        ));
    }
    membership::may_leave(state, node.member_id).map_err(|error| {
        refuse(
            Code::Unsafe,
            tonic::Code::FailedPrecondition,
            format!("manager {} cannot be spared: {error}", label(node)),
            "promote a standby first: `bulkhead node promote NAME`, or bring the others back",
        )
    })?;
    Ok(want_role(node, Role::Standby, request.clean))
}

fn want_role(node: &Node, wanted: Role, clean: bool) -> Decision {
    if node.wanted_role() == wanted {
        return Decision::done(node);
    }
    let mut new = node.clone();
    new.set_wanted_role(wanted);
    new.leaves_clean = clean;
    Plan::about(&node.id).unless_changed(node).replace(new).into()
}

fn leaves(node: &Node) -> Status {
    refuse(
        Code::Conflict,
        tonic::Code::FailedPrecondition,
        format!("manager {} is leaving the quorum now", label(node)),
        "wait until `bulkhead node ls` shows it as a standby, or no more",
    )
}

fn no_manager(node: &Node) -> Status {
    refuse(
        Code::Invalid,
        tonic::Code::FailedPrecondition,
        format!(
            "node {} is a worker: a worker never holds what a manager holds",
            label(node)
        ),
        "start `bulkhead-manager --standby` on that machine, let it join with a ticket of `bulkhead cluster ticket create \
         --role standby`, and promote that node",
    )
}

/// Removes a worker, a manager that has left Raft, or one that is lost for good. Its keys are never served again.
pub(super) fn remove(
    state: &State,
    request: &RemoveRequest,
    raft: &Members,
    now_ms: i64,
) -> Result<Decision, Status> {
    let node = NODES.find(state, &request.selector)?;
    no_member(node, request, raft)?;
    if node.role() == Role::Worker && node.status() == NodeStatus::Ready && !request.force {
        let key = node.id().try_into().map(|id| Key::new(Node::KIND, id));
        let tasks = key.map_or(0, |key| state.referrers(key, Task::KIND).count());
        return Err(refuse(
            Code::InUse,
            tonic::Code::FailedPrecondition,
            format!("node {} is ready and has {tasks} tasks", label(node)),
            format!(
                "`bulkhead node drain {}` and stop its worker first, or repeat with --force",
                node.name
            ),
        ));
    }
    let plan = gone(state, node, now_ms)?;
    match view::cluster(state).filter(|_| request.clean && node.role() == Role::Manager) {
        None => Ok(plan.into()),
        // Without its envelopes nothing says that it could open the ring, and so nothing is renewed.
        Some(cluster) => {
            let mut new = cluster.clone();
            for epoch in &mut new.key_ring {
                epoch.envelopes.retain(|it| it.node_id != node.id);
            }
            Ok(plan.unless_changed(cluster).replace(new).into())
        }
    }
}

/// Cuts a worker off that is not trusted any more, or a manager that has left Raft or is lost: its keys are dead, its
/// tasks are lost, and its record stays to say what it held.
pub(super) fn quarantine(
    state: &State,
    request: &RemoveRequest,
    raft: &Members,
    now_ms: i64,
) -> Result<Decision, Status> {
    let node = NODES.find(state, &request.selector)?;
    if node.quarantined_at != 0 {
        return Ok(Decision::done(node));
    }
    no_member(node, request, raft)?;
    let mut plan = Plan::about(&node.id).unless_changed(node);
    plan.changes = removal::quarantine(state, id(node)?, node, now_ms);
    Ok(plan.into())
}

/// Refuses a manager that counts for the quorum.
fn no_member(node: &Node, request: &RemoveRequest, raft: &Members) -> Result<(), Status> {
    let is_member = node.role() == Role::Manager && raft.nodes.contains_key(&node.member_id);
    if is_member && !(request.force && is_lost(node.member_id, raft)) {
        return Err(refuse(
            Code::Unsafe,
            tonic::Code::FailedPrecondition,
            format!("manager {} is a member of the cluster's quorum", label(node)),
            "let it leave: `bulkhead cluster leave` on its host; if that is lost for good, repeat with --force at the \
             leading manager",
        ));
    }
    Ok(())
}

fn id(node: &Node) -> Result<NodeId, Status> {
    NodeId::try_from(node.id()).map_err(|error| crate::refusal::internal("holds a malformed node", &error))
}

/// Whether a member is silent and the others decide without it. Only the leader knows; elsewhere nobody is lost.
fn is_lost(member: u64, raft: &Members) -> bool {
    let others = raft.voters.iter().filter(|id| **id != member);
    let (voters, alive) = others.fold((0, 0), |(voters, alive), id| {
        (voters + 1, alive + usize::from(raft.alive.contains(id)))
    });
    !raft.alive.contains(&member) && voters > 0 && alive > voters / 2
}

/// Takes an operator's certificates back.
pub(super) fn revoke(
    state: &State,
    operators: &Category<Node>,
    request: &RemoveRequest,
    now_ms: i64,
) -> Result<Decision, Status> {
    let operator = operators.find(state, &request.selector)?;
    Ok(gone(state, operator, now_ms)?.into())
}

/// The node goes with all that is of it.
fn gone(state: &State, node: &Node, now_ms: i64) -> Result<Plan, Status> {
    let mut plan = Plan::about(&node.id).unless_changed(node);
    plan.changes = removal::whole(state, id(node)?, node, now_ms);
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{CloneSeen, Kind, NodeKey, SupersededKey};

    use super::super::object::OPERATORS;
    use super::super::testing::{applied, node, plan, refused, state};
    use super::*;

    fn with_key(mut object: bulkhead_proto::wire::Object) -> bulkhead_proto::wire::Object {
        if let Some(bulkhead_proto::wire::object::Object::Node(node)) = &mut object.object {
            node.set_status(NodeStatus::Ready);
            node.keys.push(NodeKey {
                key_id: vec![9; 32],
                ..Default::default()
            });
        }
        object
    }

    fn update_of(selector: &str) -> UpdateNodeRequest {
        UpdateNodeRequest {
            request_id: vec![5; 16],
            selector: selector.into(),
            ..Default::default()
        }
    }

    fn removal_of(selector: &str, force: bool) -> RemoveRequest {
        RemoveRequest {
            request_id: vec![5; 16],
            selector: selector.into(),
            force,
            ..Default::default()
        }
    }

    #[test]
    fn labels_and_availability_change_and_a_retry_changes_nothing() {
        let mut state = state([node(1, "one", Role::Worker)]);
        let label = |key: &str, value: &str| Label {
            key: key.into(),
            value: value.into(),
        };
        let mut request = update_of("one");
        request.set_availability(Availability::Drain);
        request.label_add = vec![label("zone", "eu"), label("disk", "ssd")];
        let decided = plan(update(&state, &request).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        let changed = NODES.find(&state, "one").expect("there").clone();
        assert_eq!(
            (changed.availability(), changed.labels.len()),
            (Availability::Drain, 2)
        );
        assert!(
            matches!(update(&state, &request), Ok(Decision::Done { .. })),
            "a retry"
        );

        let mut second = update_of("one");
        second.request_id = vec![6; 16];
        second.label_rm = vec!["disk".into()];
        second.label_add = vec![label("zone", "us")];
        let decided = plan(update(&state, &second).expect("planned"));
        applied(&mut state, &second.request_id, decided);
        let changed = NODES.find(&state, "one").expect("there");
        assert_eq!(changed.labels, [label("zone", "us")]);
        assert_eq!(changed.availability(), Availability::Drain);
    }

    fn cluster_of(managers: &[(u8, NodeStatus)]) -> State {
        let nodes = managers.iter().map(|(id, status)| {
            let mut object = node(*id, &format!("m{id}"), Role::Manager);
            if let Some(bulkhead_proto::wire::object::Object::Node(node)) = &mut object.object {
                node.set_status(*status);
            }
            object
        });
        let mut state = state(nodes);
        let voters = NODES.all(&state).map(|it| it.member_id).collect();
        let cluster = crate::view::cluster(&state).expect("there").clone();
        let wanted = bulkhead_proto::wire::Cluster {
            desired_voters: voters,
            ..cluster.clone()
        };
        applied(&mut state, &[77; 16], Plan::about(&cluster.id).replace(wanted));
        state
    }

    #[test]
    fn a_demotion_keeps_the_quorum_or_is_refused_with_the_arithmetic() {
        let demoted = |managers: &[(u8, NodeStatus)], name: &str| {
            let state = cluster_of(managers);
            demote(&state, &removal_of(name, false)).map(|decided| plan(decided).changes.len())
        };
        let (up, down) = (NodeStatus::Ready, NodeStatus::Down);
        assert!(demoted(&[(1, up), (2, up), (3, up)], "m3").is_ok());
        assert!(demoted(&[(1, up), (2, up)], "m2").is_ok());
        let refusal = |managers: &[(u8, NodeStatus)], name: &str| demoted(managers, name).expect_err(name);
        refused(
            &refusal(&[(1, up), (2, up), (3, down)], "m1"),
            Code::Unsafe,
            "1 of the 2 managers that would remain answer; 2 are needed",
            "promote a standby first",
        );
        refused(
            &refusal(&[(1, up)], "m1"),
            Code::Unsafe,
            "it is the last manager",
            "promote",
        );
        refused(
            &refusal(&[(1, up), (2, up), (3, down)], "m3"),
            Code::NotReady,
            "does not answer",
            "node rm --force m3",
        );
    }

    #[test]
    fn roles_are_wanted_and_thought_better_of() {
        let mut state = cluster_of(&[(1, NodeStatus::Ready), (2, NodeStatus::Ready)]);
        let step = |state: &mut State, id: u8, decided: Result<Decision, Status>| {
            applied(state, &[id; 16], plan(decided.expect("planned")));
            NODES.find(state, "m2").expect("there").wanted_role()
        };
        let request = removal_of("m2", false);
        let decided = demote(&state, &request);
        assert_eq!(step(&mut state, 8, decided), Role::Standby);
        assert!(
            matches!(demote(&state, &request), Ok(Decision::Done { .. })),
            "again"
        );
        let decided = promote(&state, &request);
        assert_eq!(step(&mut state, 9, decided), Role::Unspecified);
        assert!(
            matches!(promote(&state, &request), Ok(Decision::Done { .. })),
            "a manager is one"
        );
        let workers = super::super::testing::state([node(5, "w", Role::Worker)]);
        for decided in [
            promote(&workers, &removal_of("w", false)),
            demote(&workers, &removal_of("w", false)),
        ] {
            refused(
                &decided.expect_err("a worker"),
                Code::Invalid,
                "is a worker",
                "--standby",
            );
        }
    }

    #[test]
    fn what_a_node_cannot_be_told_is_refused() {
        let state = state([node(1, "boss", Role::Manager)]);
        let mut request = update_of("boss");
        request.set_availability(Availability::Drain);
        let status = update(&state, &request).expect_err("a manager");
        refused(&status, Code::Invalid, "managers run no tasks", "name a worker");
        let mut request = update_of("boss");
        request.label_add = vec![Label {
            key: "a b".into(),
            value: String::new(),
        }];
        refused(
            &update(&state, &request).expect_err("a key"),
            Code::BadField,
            "labels",
            "",
        );
    }

    #[test]
    fn a_removed_node_leaves_dead_keys() {
        let mut state = state([with_key(node(1, "one", Role::Worker))]);
        let status = remove(&state, &removal_of("one", false), &Members::default(), 7).expect_err("ready");
        refused(&status, Code::InUse, "node one", "bulkhead node drain one");
        let request = removal_of("one", true);
        let decided = plan(remove(&state, &request, &Members::default(), 7).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        assert!(NODES.find(&state, "one").is_err());
        let cluster = state.list(Kind::Cluster).next().expect("a cluster");
        let Some(bulkhead_proto::wire::object::Object::Cluster(cluster)) = &cluster.object else {
            panic!("a cluster");
        };
        assert_eq!(cluster.tombstones[0].key_id, [9; 32]);
    }

    fn with_clone(object: bulkhead_proto::wire::Object, key: u8) -> bulkhead_proto::wire::Object {
        let mut object = with_key(object);
        if let Some(bulkhead_proto::wire::object::Object::Node(node)) = &mut object.object {
            node.superseded.push(SupersededKey {
                key_id: vec![key; 32],
                ..Default::default()
            });
            node.clone_seen = Some(CloneSeen::default());
        }
        object
    }

    #[test]
    fn the_alarm_about_a_manager_is_cleared_and_one_about_a_worker_is_for_ever() {
        let mut state = state([
            with_clone(node(1, "one", Role::Worker), 7),
            with_clone(node(2, "boss", Role::Manager), 8),
        ]);
        let clear = |selector: &str| UpdateNodeRequest {
            clear_alarm: true,
            ..update_of(selector)
        };
        let status = update(&state, &clear("one")).expect_err("a worker");
        refused(&status, Code::Invalid, "no manager", "node rm one");
        let decided = plan(update(&state, &clear("boss")).expect("planned"));
        applied(&mut state, &[5; 16], decided);
        let cleared = NODES.find(&state, "boss").expect("there");
        assert_eq!(cleared.clone_seen, None);
        assert_eq!(cleared.superseded.len(), 1, "another copy is told of again");
    }

    #[test]
    fn a_removed_managers_superseded_keys_are_dead_and_a_workers_need_not_be() {
        let mut state = state([
            with_clone(node(1, "one", Role::Worker), 7),
            with_clone(node(2, "boss", Role::Manager), 8),
        ]);
        for (name, request) in [("one", 5), ("boss", 6)] {
            let asked = RemoveRequest {
                request_id: vec![request; 16],
                ..removal_of(name, true)
            };
            let gone = plan(remove(&state, &asked, &Members::default(), 7).expect("planned"));
            applied(&mut state, &asked.request_id, gone);
        }
        let cluster = state.list(Kind::Cluster).next().expect("a cluster");
        let Some(bulkhead_proto::wire::object::Object::Cluster(cluster)) = &cluster.object else {
            panic!("a cluster");
        };
        let dead: Vec<u8> = cluster.tombstones.iter().map(|it| it.key_id[0]).collect();
        assert_eq!(dead, [9, 8], "Raft methods know no other list");
    }

    #[test]
    fn a_node_in_quarantine_has_no_keys_and_stays_where_it_is() {
        let mut state = state([
            with_key(node(1, "one", Role::Worker)),
            with_key(node(2, "boss", Role::Manager)),
        ]);
        let request = removal_of("one", false);
        let decided = plan(quarantine(&state, &request, &Members::default(), 7).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        let kept = NODES.find(&state, "one").expect("it stays").clone();
        assert_eq!((kept.quarantined_at, kept.keys.len()), (7, 0));
        assert_eq!(kept.availability(), Availability::Drain);
        let again = quarantine(&state, &request, &Members::default(), 8).expect("done");
        assert!(matches!(again, Decision::Done { .. }));
        let mut back = update_of("one");
        back.request_id = vec![8; 16];
        back.set_availability(Availability::Active);
        let status = update(&state, &back).expect_err("for ever");
        refused(&status, Code::Invalid, "in quarantine", "node rm one");
        let member = NODES.find(&state, "boss").expect("there").member_id;
        let at = bulkhead_raft::Member {
            node: NodeId::from_bytes([2; 16]),
            address: String::new(),
        };
        let raft = Members {
            nodes: [(member, at)].into(),
            ..Default::default()
        };
        let status = quarantine(&state, &removal_of("boss", false), &raft, 7).expect_err("a member");
        refused(&status, Code::Unsafe, "quorum", "cluster leave");
        // And `rm` takes it away for good.
        let gone = plan(remove(&state, &removal_of("one", true), &Members::default(), 9).expect("planned"));
        applied(&mut state, &[6; 16], gone);
        assert!(NODES.find(&state, "one").is_err());
    }

    #[test]
    fn a_member_of_the_quorum_and_an_operator_are_not_removed_as_nodes() {
        let state = state([
            with_key(node(1, "boss", Role::Manager)),
            node(2, "ops", Role::Operator),
        ]);
        let member = bulkhead_raft::Member {
            node: NodeId::from_bytes([1; 16]),
            address: String::new(),
        };
        let boss = NODES.find(&state, "boss").expect("there").member_id;
        // (alive, force, may go)
        for (alive, force, may_go) in [
            (vec![91, 92], true, true),
            (vec![91, 92], false, false),
            (vec![boss, 91, 92], true, false),
            (vec![91], true, false),
            (vec![], true, false),
        ] {
            let raft = Members {
                voters: [boss, 91, 92].into(),
                nodes: [(boss, member.clone())].into(),
                alive: alive.iter().copied().collect(),
                ..Default::default()
            };
            match remove(&state, &removal_of("boss", force), &raft, 7) {
                Ok(_) => assert!(may_go, "{alive:?} {force}"),
                Err(status) => {
                    assert!(!may_go, "{alive:?} {force}");
                    refused(&status, Code::Unsafe, "quorum", "cluster leave");
                }
            }
        }
        assert!(remove(&state, &removal_of("boss", true), &Members::default(), 7).is_ok());
        assert!(remove(&state, &removal_of("ops", true), &Members::default(), 7).is_err());
        assert!(revoke(&state, &OPERATORS, &removal_of("boss", true), 7).is_err());
        assert!(revoke(&state, &OPERATORS, &removal_of("ops", false), 7).is_ok());
    }
}
