use super::*;
use crate::agent::assignments::tests::{complete, wire_task};
use bulkhead_launcher::message::{ExitCause, ExitRecord};
use bulkhead_proto::wire::DesiredState as Wanted;
use proptest::prelude::*;

/// A world to plan in.
#[derive(Default)]
struct World {
    assignments: Assignments,
    observed: BTreeMap<TaskId, Observed>,
    launched: Vec<TaskStatus>,
    blobs: BTreeSet<Digest>,
    layers: BTreeSet<Digest>,
    under_way: BTreeSet<Action>,
}

impl World {
    fn with(tasks: &[(u8, Wanted)]) -> World {
        let mut world = World::default();
        let tasks = tasks.iter().map(|(n, desired)| wire_task(*n, *desired)).collect();
        world.assignments.apply(complete(1, tasks)).expect("assignments");
        world
    }

    fn ready(mut self) -> World {
        self.blobs.insert(Digest::from_bytes([1; 32]));
        self.layers.insert(Digest::from_bytes([2; 32]));
        self
    }

    fn seen(mut self, n: u8, state: State) -> World {
        let seen = Observed {
            state,
            ..Observed::assigned(0)
        };
        self.observed.insert(task(n), seen);
        self
    }

    fn launched(mut self, n: u8, epoch: u64, state: TaskState) -> World {
        self.launched.push(TaskStatus {
            task: launch(n),
            epoch,
            pid: 4,
            started_at_ms: 0,
            state,
        });
        self
    }

    fn plan(&self) -> Plan {
        plan(View {
            assignments: &self.assignments,
            observed: &self.observed,
            launched: &self.launched,
            blobs: &self.blobs,
            layers: &self.layers,
            under_way: &self.under_way,
            now_ms: 100,
        })
    }
}

fn task(n: u8) -> TaskId {
    TaskId::from_bytes([n; 16])
}

fn launch(n: u8) -> LaunchId {
    LaunchId::try_from(task(n).to_string()).expect("a task's id suits the launcher")
}

fn exited() -> TaskState {
    TaskState::Exited(ExitRecord {
        cause: ExitCause::Code(0),
        out_of_memory: false,
        ended_at_ms: 1,
        message: String::new(),
    })
}

#[test]
fn a_task_is_fetched_unpacked_and_started() {
    let mut world = World::with(&[(1, Wanted::Running), (2, Wanted::Running)]);
    let first = world.plan();
    let [Action::Fetch(layer)] = first.actions[..] else {
        panic!("one fetch for both: {first:?}")
    };
    assert_eq!(
        first.events,
        [(task(1), Event::Preparing), (task(2), Event::Preparing)]
    );

    world.under_way.insert(Action::Fetch(layer));
    assert_eq!(world.plan().actions, [], "it is under way");

    world.under_way.clear();
    world.blobs.insert(layer.blob);
    assert_eq!(world.plan().actions, [Action::Unpack(layer)]);

    world.layers.insert(layer.diff);
    assert_eq!(
        world.plan().actions,
        [Action::Start(task(1)), Action::Start(task(2))]
    );
}

#[test]
fn a_running_task_is_adopted() {
    let world = World::with(&[(1, Wanted::Running)])
        .ready()
        .launched(1, 1, TaskState::Running);
    let plan = world.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.events, [(task(1), Event::Running { pid: 4 })]);
    assert_eq!(
        world.seen(1, State::Running).plan(),
        Plan::default(),
        "and nothing more to say"
    );
}

#[test]
fn strangers_end_before_anything_starts() {
    let world = World::with(&[(1, Wanted::Running)]).ready();
    let running = world.launched(8, 1, TaskState::Running);
    assert_eq!(running.plan().actions, [Action::Kill(launch(8))]);
    let mut ended = running;
    ended.launched[0].state = exited();
    assert_eq!(ended.plan().actions, [Action::Remove(launch(8))]);
    ended.launched.clear();
    assert_eq!(ended.plan().actions, [Action::Start(task(1))]);
}

#[test]
fn an_old_copy_of_a_task_is_a_stranger() {
    let world = World::with(&[(1, Wanted::Running)])
        .ready()
        .launched(1, 77, TaskState::Running);
    assert_eq!(world.plan().actions, [Action::Kill(launch(1))]);
}

#[test]
fn before_a_manager_has_spoken_nothing_is_a_stranger() {
    let world = World::default().launched(1, 1, TaskState::Running);
    assert_eq!(world.plan(), Plan::default());
}

#[test]
fn a_stop_is_asked_once_and_its_exit_is_no_failure() {
    let mut world = World::with(&[(1, Wanted::Shutdown)])
        .ready()
        .seen(1, State::Running)
        .launched(1, 1, TaskState::Running);
    assert_eq!(world.plan().actions, [Action::Stop(launch(1))]);
    world.under_way.insert(Action::Stop(launch(1)));
    assert_eq!(world.plan().actions, []);
    world.launched[0].state = exited();
    let [(_, event)] = &world.plan().events[..] else {
        panic!("an exit")
    };
    assert_eq!(State::Running.next(event), Some(State::Shutdown));
}

#[test]
fn an_ended_task_is_removed_only_after_its_end_is_on_record() {
    let world = World::with(&[(1, Wanted::Remove)])
        .ready()
        .launched(1, 1, exited());
    let world = world.seen(1, State::Running);
    assert_eq!(world.plan().actions, []);
    assert_eq!(world.plan().events.len(), 1);
    assert_eq!(
        world.seen(1, State::Shutdown).plan().actions,
        [Action::Remove(launch(1))]
    );
}

#[test]
fn a_task_that_may_have_run_is_never_started_again() {
    for state in [State::Starting, State::Running] {
        let plan = World::with(&[(1, Wanted::Running)]).ready().seen(1, state).plan();
        assert_eq!(
            (plan.actions, plan.events),
            (vec![], vec![(task(1), Event::Vanished)])
        );
    }
    let mut world = World::with(&[(1, Wanted::Running)])
        .ready()
        .seen(1, State::Starting);
    world.under_way.insert(Action::Start(task(1)));
    assert_eq!(world.plan(), Plan::default(), "the launcher is still at it");
}

#[test]
fn what_is_not_due_waits() {
    let ready = World::with(&[(1, Wanted::Ready)]).ready();
    assert_eq!(ready.plan().actions, []);

    let mut later = wire_task(1, Wanted::Running);
    later.task.as_mut().expect("task").start_after = 101;
    let mut world = World::default().ready();
    world
        .assignments
        .apply(complete(1, vec![later]))
        .expect("assignments");
    assert_eq!(
        world.plan(),
        Plan {
            wake_at_ms: Some(101),
            ..Plan::default()
        }
    );

    let mut update = complete(1, vec![wire_task(1, Wanted::Running)]);
    update.secrets.clear();
    let mut world = World::default().ready();
    world.assignments.apply(update).expect("assignments");
    assert_eq!(world.plan().actions, [], "its secret is not here");
}

#[test]
fn a_task_without_image_is_refused_with_the_reason() {
    let mut update = complete(1, vec![wire_task(1, Wanted::Running)]);
    update.images.clear();
    let mut world = World::default();
    world.assignments.apply(update).expect("assignments");
    assert!(matches!(&world.plan().events[..], [(_, Event::Refused { .. })]));
}

fn any_wanted() -> impl Strategy<Value = Wanted> {
    prop::sample::select(vec![
        Wanted::Ready,
        Wanted::Running,
        Wanted::Shutdown,
        Wanted::Remove,
    ])
}

fn any_launched() -> impl Strategy<Value = (u8, u64, TaskState)> {
    let state = prop::sample::select(vec![TaskState::Starting, TaskState::Running, exited()]);
    (1..6u8, 1..6u64, state)
}

proptest! {
    /// Carrying the plan out, over and over, comes to rest: what is left is wanted, and nothing ran beside a stranger.
    #[test]
    fn carrying_it_out_comes_to_rest(
        wanted in prop::collection::btree_map(1..6u8, any_wanted(), 0..5),
        launched in prop::collection::btree_map(1..6u8, any_launched(), 0..5),
    ) {
        let wanted: Vec<_> = wanted.into_iter().collect();
        let mut world = World::with(&wanted);
        for (n, (_, epoch, state)) in launched {
            world = world.launched(n, epoch, state);
        }
        for _ in 0..12 {
            let plan = world.plan();
            for (task, event) in plan.events {
                let seen = world.observed.entry(task).or_insert_with(|| Observed::assigned(0));
                *seen = seen.after(&event, 100).expect("a plan tells only news");
            }
            let strangers = world.launched.iter().any(|status| owner(&world.assignments, status).is_none());
            for action in plan.actions {
                match action {
                    Action::Kill(id) | Action::Stop(id) => {
                        world.launched.iter_mut().find(|t| t.task == id).expect("it exists").state = exited();
                    }
                    Action::Remove(id) => {
                        let at = world.launched.iter().position(|t| t.task == id).expect("it exists");
                        let removed = world.launched.remove(at);
                        prop_assert!(matches!(removed.state, TaskState::Exited(_)));
                    }
                    Action::Fetch(layer) => { world.blobs.insert(layer.blob); }
                    Action::Unpack(layer) => { world.layers.insert(layer.diff); }
                    Action::RemoveLayer(_) => unreachable!("that is the agent's"),
                    Action::Start(id) => {
                        prop_assert!(!strangers);
                        let seen = world.observed.entry(id).or_insert_with(|| Observed::assigned(0));
                        *seen = seen.after(&Event::Starting, 100).expect("never started before");
                        let status = TaskStatus {
                            task: LaunchId::try_from(id.to_string()).expect("id"),
                            epoch: world.assignments.task(id).expect("assigned").fence,
                            pid: 4,
                            started_at_ms: 0,
                            state: TaskState::Running,
                        };
                        world.launched.push(status);
                    }
                }
            }
        }
        prop_assert_eq!(world.plan(), Plan::default());
        for status in &world.launched {
            let assignment = owner(&world.assignments, status).expect("no stranger is left");
            let running = matches!(status.state, TaskState::Running);
            prop_assert!(!running || assignment.desired <= Desired::Running);
        }
    }
}
