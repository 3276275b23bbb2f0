use bulkhead_proto::wire::{
    Availability, DesiredState, Label, NodeStatus, RestartCondition, RestartPolicy, TaskState, UpdatePolicy,
    UpdateState,
};
use bulkhead_proto::{NodeId, limits, wire};

use super::super::{removal, revision, task};
use super::world::{SERVICE, World};
use crate::orchestrator::Step;

/// A service of so many replicas that all run.
fn running(nodes: u8, replicas: u32) -> World {
    let mut world = World::with_service(nodes, World::spec(replicas, "good"));
    world.run(5);
    assert_eq!(world.running().len(), replicas as usize);
    world
}

fn with_restart(mut spec: wire::ServiceSpec, condition: RestartCondition, max: u32) -> wire::ServiceSpec {
    spec.restart = Some(RestartPolicy {
        condition: condition.into(),
        delay_ms: 3_000,
        max_attempts: max,
    });
    spec
}

fn update_state(world: &World) -> Option<UpdateState> {
    let status = world.service().expect("there").update?;
    Some(status.state())
}

#[test]
fn every_slot_gets_one_task_and_a_second_pass_nothing() {
    let mut world = World::with_service(2, World::spec(3, "good"));
    let steps = world.plan().steps;
    assert_eq!(steps, world.plan().steps, "the same state gives the same plan");
    assert_eq!(steps.len(), 3);
    world.settle();
    let slots: Vec<_> = world
        .tasks()
        .iter()
        .map(|task| (task.slot, task.attempt))
        .collect();
    assert_eq!(slots, [(1, 1), (2, 1), (3, 1)]);
    assert!(world.tasks().iter().all(|task| !task.node_id.is_empty()));
    assert_eq!(world.plan().steps, []);
}

#[test]
fn a_plan_from_an_older_state_is_refused_whole() {
    let mut world = World::with_service(1, World::spec(2, "good"));
    let old = world.plan();
    world.revise(World::spec(1, "good"));
    let [batch] = &mut crate::leader::pack(old.steps)[..] else {
        panic!("one batch")
    };
    let rejection = world.apply(std::mem::take(batch)).expect("refused");
    assert_eq!(rejection.code(), wire::RejectionCode::Stale);
    assert_eq!(world.tasks().len(), 0);
}

#[test]
fn a_scale_down_ends_the_highest_slots_and_a_scale_up_uses_no_attempt_twice() {
    let mut world = running(2, 3);
    world.revise(World::spec(1, "good"));
    world.settle();
    let wanted: Vec<_> = world.tasks().iter().map(wire::Task::desired).collect();
    assert_eq!(
        wanted,
        [DesiredState::Running, DesiredState::Remove, DesiredState::Remove]
    );
    world.run(3);
    assert_eq!(world.tasks().len(), 1, "ended tasks of surplus slots go");
    world.revise(World::spec(3, "good"));
    world.run(4);
    assert_eq!(world.running(), [(1, 1), (2, 1), (3, 1)]);
    assert_eq!(world.head(3).attempt, 2, "the first attempt was used");
    assert_eq!(update_state(&world), None, "a scale is no update");
}

#[test]
fn a_surplus_task_that_no_node_has_goes_at_once() {
    let mut world = World::with_service(0, World::spec(2, "good"));
    world.settle();
    world.revise(World::spec(1, "good"));
    world.settle();
    assert_eq!(world.tasks().len(), 1);
}

#[test]
fn a_removed_service_ends_its_tasks_and_then_goes() {
    let mut world = running(2, 2);
    let removing = revision::remove(&world.service().expect("there"));
    world.commit(|step| step.replace(removing));
    world.settle();
    assert_eq!(world.tasks().len(), 2, "it stays as long as something runs");
    world.run(3);
    assert_eq!((world.tasks().len(), world.service()), (0, None));
}

#[test]
fn a_failed_task_is_followed_after_its_delay_on_the_same_spec() {
    let spec = with_restart(World::spec(1, "good"), RestartCondition::OnFailure, 2);
    let mut world = World::with_service(1, spec);
    for restarts in 0..=2 {
        world.run(9);
        let head = world.head(1);
        assert_eq!(
            (task::state(&head), head.restarts, head.attempt),
            (TaskState::Running, restarts, restarts + 1)
        );
        world.observe(&head, TaskState::Failed);
        world.settle();
        if restarts < 2 {
            let next = world.head(1);
            assert_eq!(next.start_after, world.now_ms + 3_000);
            assert!(next.fence > head.fence);
        }
    }
    assert_eq!(
        task::state(&world.head(1)),
        TaskState::Failed,
        "two restarts and no more"
    );
}

#[test]
fn a_completed_task_stays_complete_where_only_failures_restart() {
    let spec = with_restart(World::spec(1, "good"), RestartCondition::OnFailure, 0);
    let mut world = World::with_service(1, spec);
    world.run(5);
    world.observe(&world.head(1), TaskState::Complete);
    world.settle();
    assert_eq!(world.tasks().len(), 1);
}

#[test]
fn a_lost_node_s_tasks_run_elsewhere_at_once_and_do_not_count_as_restarts() {
    let spec = with_restart(World::spec(2, "good"), RestartCondition::None, 1);
    let mut world = World::with_service(2, spec);
    world.run(5);
    let on_lost = world
        .tasks()
        .into_iter()
        .find(|task| task.node_id == [2; 16])
        .expect("spread");
    world.lose(2);
    world.settle();
    let next = world.head(on_lost.slot);
    assert_eq!(
        (&next.node_id[..], next.start_after, next.restarts),
        (&[1; 16][..], 0, 0)
    );
    let old = world
        .tasks()
        .into_iter()
        .find(|task| task.id == on_lost.id)
        .expect("kept");
    assert_eq!(
        (task::state(&old), old.desired()),
        (TaskState::Lost, DesiredState::Shutdown)
    );
    assert!(old.status.expect("one").message.starts_with("node n2 is down"));
}

#[test]
fn history_is_short_and_the_oldest_goes_first() {
    let spec = with_restart(World::spec(1, "good"), RestartCondition::Any, 0);
    let mut world = World::with_service(1, spec);
    for _ in 0..9 {
        world.run(9);
        world.observe(&world.head(1), TaskState::Failed);
    }
    world.run(9);
    let attempts: Vec<_> = world.tasks().iter().map(|task| task.attempt).collect();
    assert_eq!(attempts, [5, 6, 7, 8, 9, 10]);
}

#[test]
fn a_drained_node_s_tasks_end_and_their_slots_are_filled_elsewhere() {
    let mut world = running(2, 4);
    world.change_node(1, |node| node.availability = Availability::Drain.into());
    world.settle();
    let leaving = |world: &World| {
        let tasks = world.tasks();
        tasks
            .iter()
            .filter(|task| task.desired() == DesiredState::Shutdown)
            .count()
    };
    assert_eq!((leaving(&world), world.tasks().len()), (2, 4), "stop first");
    world.run(5);
    assert_eq!(world.running().len(), 4);
    let live = world.tasks().into_iter().filter(task::is_live);
    assert!(live.into_iter().all(|task| task.node_id == [2; 16]));
}

#[test]
fn a_paused_node_keeps_its_tasks() {
    let mut world = running(2, 2);
    world.change_node(1, |node| node.availability = Availability::Pause.into());
    assert_eq!(world.plan().steps, []);
}

#[test]
fn a_task_leaves_a_node_that_lost_its_label() {
    let label = || Label {
        key: "zone".into(),
        value: "eu".into(),
    };
    let mut spec = World::spec(1, "good");
    spec.constraints = vec![wire::Constraint {
        key: "node.labels.zone".into(),
        equal: true,
        value: "eu".into(),
    }];
    let mut world = World::new(2);
    world.change_node(1, |node| node.labels.push(label()));
    let service = revision::create(bulkhead_proto::ServiceId::from_bytes(SERVICE), spec, 0);
    world.commit(|step| step.create(service));
    world.run(5);
    assert_eq!(world.head(1).node_id, [1; 16]);
    world.change_node(1, |node| node.labels.clear());
    world.change_node(2, |node| node.labels.push(label()));
    world.run(5);
    assert_eq!(world.head(1).node_id, [2; 16]);
    assert_eq!(world.running().len(), 1);
}

#[test]
fn a_node_is_removed_with_its_tasks_lost() {
    let mut world = running(2, 2);
    let mut step = Step {
        changes: removal::of_node(&world.state, NodeId::from_bytes([2; 16]), world.now_ms),
        ..Default::default()
    };
    step.delete(&wire::Node {
        id: vec![2; 16],
        ..Default::default()
    });
    world.commit(|all| *all = step);
    world.run(5);
    assert_eq!(world.running().len(), 2);
}

#[test]
fn an_update_replaces_one_slot_at_a_time_and_waits_for_the_monitor() {
    let mut world = running(3, 3);
    world.revise(World::spec(3, "better"));
    for replaced in 1..=3 {
        world.settle();
        let stopping: Vec<_> = world
            .tasks()
            .into_iter()
            .filter(|task| task.desired() == DesiredState::Shutdown && task::is_live(task))
            .collect();
        assert_eq!(stopping.len(), 1, "one at a time");
        assert_eq!(world.running().len(), 2);
        for _ in 0..3 {
            world.work();
            world.settle();
        }
        assert_eq!(
            world
                .running()
                .iter()
                .filter(|(_, version)| *version == 2)
                .count(),
            replaced
        );
        assert_eq!(update_state(&world), Some(UpdateState::Updating));
        let due = world.now_ms + i64::try_from(limits::UPDATE_MONITOR.as_millis()).expect("small");
        assert_eq!(world.wake_at_ms, Some(due));
        world.now_ms = due;
    }
    world.settle();
    assert_eq!(update_state(&world), Some(UpdateState::Completed));
    assert_eq!(world.running(), [(1, 2), (2, 2), (3, 2)]);
}

#[test]
fn parallelism_is_the_number_of_slots_under_way() {
    let mut world = running(3, 5);
    let mut spec = World::spec(5, "better");
    spec.update = Some(UpdatePolicy {
        parallelism: 2,
        monitor_ms: 1,
    });
    world.revise(spec);
    world.settle();
    assert_eq!(world.running().len(), 3);
    world.run(60);
    assert_eq!(update_state(&world), Some(UpdateState::Completed));
}

#[test]
fn a_failing_update_pauses_says_why_and_leaves_the_others_alone() {
    let mut world = running(3, 3);
    world.revise(World::spec(3, "bad"));
    world.run(20);
    let status = world.service().expect("there").update.expect("a status");
    assert_eq!(status.state(), UpdateState::Paused);
    assert!(
        [
            "replica 1 ended with exit code 1",
            "replica 1 could not be started"
        ]
        .contains(&&status.message[..]),
        "{}",
        status.message
    );
    assert_eq!(world.running(), [(2, 1), (3, 1)]);
    // A crash of another replica meanwhile does not spread the failing spec.
    world.observe(&world.head(3), TaskState::Failed);
    world.run(20);
    assert!(world.running().contains(&(3, 1)));
    // The same again tries once more; something better heals it.
    world.revise(World::spec(3, "bad"));
    assert_eq!(update_state(&world), Some(UpdateState::Updating));
    world.run(20);
    assert_eq!(update_state(&world), Some(UpdateState::Paused));
    world.revise(World::spec(3, "good"));
    world.run(60);
    assert_eq!(update_state(&world), Some(UpdateState::Completed));
    assert_eq!(world.running().len(), 3);
}

#[test]
fn specs_that_no_task_points_to_are_dropped() {
    let mut world = running(2, 1);
    for round in 0..12 {
        world.revise(World::spec(1, &format!("good-{round}")));
        world.run(20);
    }
    let service = world.service().expect("there");
    let numbers: Vec<_> = service.versions.iter().map(|version| version.number).collect();
    assert_eq!(
        numbers,
        [8, 9, 10, 11, 12, 13],
        "the newest and those of the history"
    );
}

#[test]
fn an_empty_update_is_complete() {
    let mut world = World::with_service(1, World::spec(0, "good"));
    world.revise(World::spec(0, "better"));
    world.settle();
    assert_eq!(update_state(&world), Some(UpdateState::Completed));
}

#[test]
fn statuses_of_nodes_follow_the_signs_of_life() {
    use super::super::liveness::Verdict;
    let id = |node: u8| NodeId::from_bytes([node; 16]);
    let mut world = World::new(3);
    world.lose(3);
    let plan_for = |world: &World, alive: &[u8], verdict: Verdict| {
        let alive = alive.iter().map(|&node| id(node)).collect();
        let view = crate::scheduler::View::of(&world.state);
        super::super::node_status(&view, &alive, &verdict, 7).steps
    };
    let down = || Verdict::Down([id(2)].into());
    let steps = plan_for(&world, &[1, 3], down());
    assert_eq!(steps.len(), 2, "one down, one back, one unchanged");
    for step in steps {
        world.commit(|all| *all = step);
    }
    let view = crate::scheduler::View::of(&world.state);
    let statuses: Vec<_> = view.nodes.values().map(|node| node.status()).collect();
    assert_eq!(statuses, [NodeStatus::Ready, NodeStatus::Down, NodeStatus::Ready]);
    assert_eq!(plan_for(&world, &[1, 3], down()), []);
    let frozen = || Verdict::Frozen {
        expiring: 9,
        live: 9,
        silent: [id(1)].into(),
    };
    let [step] = &plan_for(&world, &[3], frozen())[..] else {
        panic!("the silent one is marked")
    };
    let step = Step {
        changes: step.changes.clone(),
        ..Default::default()
    };
    world.commit(|all| *all = step);
    assert_eq!(plan_for(&world, &[3], frozen()), []);
    let view = crate::scheduler::View::of(&world.state);
    let node = view.nodes[&[1; 16][..]];
    assert_eq!(node.status(), NodeStatus::Ready);
    assert!(node.status_reason.starts_with("silent"));
    assert_eq!(
        plan_for(&world, &[1, 3], down()).len(),
        1,
        "heard again, unmarked"
    );
}
