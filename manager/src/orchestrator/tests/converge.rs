//! Whatever happens in whatever order: the invariants of [`super::world`] hold after each commit, and once the
//! trouble ends the cluster runs what was asked for.

use bulkhead_proto::wire::{
    Availability, RestartCondition, RestartPolicy, TaskState, UpdatePolicy, UpdateState,
};
use proptest::prelude::*;

use super::super::task;
use super::world::World;
use crate::leader::pack;
use crate::orchestrator::Step;
use crate::scheduler::{self, View};

#[derive(Debug, Clone)]
enum Event {
    Scale(u32),
    Update(u8),
    UpdateToBad,
    Drain(u8),
    Pause(u8),
    Activate(u8),
    Lose(u8),
    Regain(u8),
    Fail(usize),
    Complete(usize),
    Wait(i64),
    Work,
    Pass,
    /// A leader that commits half of its plan and is gone.
    HalfPass,
    Place,
    /// A leader proposes and hears nothing.
    Propose,
    /// What was proposed then is committed after all, unless it does not hold any more.
    Commit,
}

fn event() -> impl Strategy<Value = Event> {
    let node = 1u8..=4;
    prop_oneof![
        1 => (0u32..6).prop_map(Event::Scale),
        1 => any::<u8>().prop_map(Event::Update),
        1 => Just(Event::UpdateToBad),
        1 => node.clone().prop_map(Event::Drain),
        1 => node.clone().prop_map(Event::Pause),
        1 => node.clone().prop_map(Event::Activate),
        1 => node.clone().prop_map(Event::Lose),
        1 => node.prop_map(Event::Regain),
        2 => (0usize..8).prop_map(Event::Fail),
        1 => (0usize..8).prop_map(Event::Complete),
        2 => (0i64..8_000).prop_map(Event::Wait),
        6 => Just(Event::Work),
        6 => Just(Event::Pass),
        2 => Just(Event::HalfPass),
        1 => Just(Event::Place),
        2 => Just(Event::Propose),
        2 => Just(Event::Commit),
    ]
}

fn spec(replicas: u32, user: &str) -> bulkhead_proto::wire::ServiceSpec {
    let mut spec = World::spec(replicas, user);
    spec.restart = Some(RestartPolicy {
        condition: RestartCondition::Any.into(),
        delay_ms: 500,
        max_attempts: 0,
    });
    spec.update = Some(UpdatePolicy {
        parallelism: 2,
        monitor_ms: 1_000,
    });
    spec
}

fn end(world: &mut World, pick: usize, state: TaskState) {
    let live: Vec<_> = world
        .tasks()
        .into_iter()
        .filter(|task| task::is_live(task) && !task.node_id.is_empty())
        .collect();
    if let Some(task) = live.get(pick) {
        world.observe(task, state);
    }
}

/// What was last asked for, and what was proposed without an answer.
struct Told {
    replicas: u32,
    user: String,
    unanswered: Vec<Step>,
}

fn happen(world: &mut World, event: &Event, told: &mut Told) {
    match event {
        Event::Scale(count) => told.replicas = *count,
        Event::Update(number) => told.user = format!("good-{number}"),
        Event::UpdateToBad => told.user = "bad".into(),
        _ => {}
    }
    match event {
        Event::Scale(_) | Event::Update(_) | Event::UpdateToBad => {
            world.revise(spec(told.replicas, &told.user));
        }
        Event::Drain(node) => world.change_node(*node, |node| node.availability = Availability::Drain.into()),
        Event::Pause(node) => world.change_node(*node, |node| node.availability = Availability::Pause.into()),
        Event::Activate(node) => {
            world.change_node(*node, |node| node.availability = Availability::Active.into());
        }
        Event::Lose(node) => world.lose(*node),
        Event::Regain(node) => world.regain(*node),
        Event::Fail(pick) => end(world, *pick, TaskState::Failed),
        Event::Complete(pick) => end(world, *pick, TaskState::Complete),
        Event::Wait(ms) => world.now_ms += ms,
        Event::Work => world.work(),
        Event::Pass => {
            world.pass();
        }
        Event::HalfPass => {
            let mut steps = world.plan().steps;
            steps.truncate(steps.len().div_ceil(2));
            for batch in pack(steps) {
                assert_eq!(world.apply(batch), None);
            }
        }
        Event::Place => {
            world.place();
        }
        Event::Propose => {
            told.unanswered = world.plan().steps;
            let view = View::of(&world.state);
            told.unanswered.extend(scheduler::plan(&view, world.now_ms).steps);
        }
        Event::Commit => {
            // Each alone: a refused one must not hide what the others would do.
            for step in told.unanswered.drain(..) {
                for batch in pack(vec![step]) {
                    let _may_be_refused = world.apply(batch);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_cluster_converges_after_any_trouble(events in proptest::collection::vec(event(), 1..60)) {
        let mut told = Told { replicas: 3, user: "good".into(), unanswered: Vec::new() };
        let mut world = World::with_service(4, spec(told.replicas, &told.user));
        for event in &events {
            happen(&mut world, event, &mut told);
        }
        let replicas = told.replicas;
        (1..=4).for_each(|node| world.regain(node));
        // What runs is good again: the last word of the operator, who may have to wait for room for it.
        for _ in 0..20 {
            world.run(10);
            world.revise(spec(replicas, "last"));
        }
        world.run(60);
        let service = world.service().expect("never removed");
        let newest = service.versions.last().expect("one").number;
        let expected: Vec<_> = (1..=replicas).map(|slot| (slot, newest)).collect();
        prop_assert_eq!(world.running(), expected);
        prop_assert!(service.update.is_none_or(|update| update.state() == UpdateState::Completed));
        prop_assert_eq!(&world.plan().steps[..], &[]);
    }
}
