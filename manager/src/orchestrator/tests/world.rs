//! A cluster in memory: the state machine, the plans that the leader runs, and workers that do as they are told.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::wire::{self, DesiredState, TaskState, change::Change as Step_, object::Object as Any};
use bulkhead_proto::{ServiceId, limits};
use bulkhead_raft::state::{Key, State};
use prost::Message as _;

use super::super::{plan, revision, task};
use crate::leader::{Batch, pack};
use crate::orchestrator::{Plan, Step};
use crate::scheduler::{self, View};

pub(super) const SERVICE: [u8; 16] = [9; 16];

pub(super) struct World {
    pub(super) state: State,
    pub(super) now_ms: i64,
    pub(super) wake_at_ms: Option<i64>,
    /// Nodes that do what is wanted of them.
    pub(super) reachable: BTreeSet<u8>,
    created: BTreeSet<Vec<u8>>,
}

impl World {
    /// Workers 1 to `nodes`, ready.
    pub(super) fn new(nodes: u8) -> Self {
        let mut world = Self {
            state: State::default(),
            now_ms: 1_000_000,
            wake_at_ms: None,
            reachable: (1..=nodes).collect(),
            created: BTreeSet::new(),
        };
        for node in 1..=nodes {
            let node = wire::Node {
                id: vec![node; 16],
                name: format!("n{node}"),
                role: wire::Role::Worker.into(),
                status: wire::NodeStatus::Ready.into(),
                availability: wire::Availability::Active.into(),
                ..Default::default()
            };
            world.commit(|step| step.create(node));
        }
        world
    }

    pub(super) fn spec(replicas: u32, user: &str) -> wire::ServiceSpec {
        wire::ServiceSpec {
            name: "web".into(),
            replicas,
            user: user.into(),
            ..Default::default()
        }
    }

    pub(super) fn with_service(nodes: u8, spec: wire::ServiceSpec) -> Self {
        let mut world = Self::new(nodes);
        let service = revision::create(ServiceId::from_bytes(SERVICE), spec, world.now_ms);
        world.commit(|step| step.create(service));
        world
    }

    /// Commits what must be accepted.
    #[track_caller]
    pub(super) fn commit(&mut self, fill: impl FnOnce(&mut Step)) {
        let mut step = Step::default();
        fill(&mut step);
        let rejection = self.apply(Batch {
            preconditions: step.preconditions,
            changes: step.changes,
        });
        assert_eq!(rejection, None);
    }

    pub(super) fn apply(&mut self, batch: Batch) -> Option<wire::Rejection> {
        let index = self.state.index() + 1;
        let creates = batch.changes.iter().filter_map(|change| match &change.change {
            Some(Step_::Create(wire::Object {
                object: Some(Any::Task(task)),
            })) => Some(task.id.clone()),
            _ => None,
        });
        let creates: Vec<_> = creates.collect();
        let transaction = wire::Transaction {
            level: 1,
            request_id: index.to_be_bytes().to_vec(),
            at: self.now_ms,
            preconditions: batch.preconditions,
            changes: batch.changes,
            ..Default::default()
        };
        let applied = self.state.apply(index, 1, &transaction.encode_to_vec());
        let rejection = applied.expect("a known level").outcome.rejection;
        if rejection.is_none() {
            let used_once = creates.into_iter().all(|id| self.created.insert(id));
            assert!(used_once, "an id is used once");
        }
        self.check_invariants();
        rejection
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&View::of(&self.state), self.now_ms)
    }

    /// One pass of the leader, as it runs; how many changes were committed.
    #[track_caller]
    pub(super) fn pass(&mut self) -> usize {
        let decided = self.plan();
        self.wake_at_ms = decided.wake_at_ms;
        self.commit_all(decided.steps) + self.place()
    }

    pub(super) fn place(&mut self) -> usize {
        let placed = scheduler::plan(&View::of(&self.state), self.now_ms);
        self.commit_all(placed.steps)
    }

    #[track_caller]
    fn commit_all(&mut self, steps: Vec<Step>) -> usize {
        let mut count = 0;
        for batch in pack(steps) {
            count += batch.changes.len();
            assert_eq!(self.apply(batch), None, "a plan from the newest state holds");
        }
        count
    }

    /// Passes until there is nothing to do.
    #[track_caller]
    pub(super) fn settle(&mut self) {
        for _ in 0..50 {
            if self.pass() == 0 {
                return;
            }
        }
        panic!("the plans find no end: {:?}", self.plan());
    }

    pub(super) fn tasks(&self) -> Vec<wire::Task> {
        let view = View::of(&self.state);
        let mut tasks: Vec<_> = view.tasks.into_iter().cloned().collect();
        tasks.sort_by_key(|task| (task.slot, task.attempt));
        tasks
    }

    pub(super) fn head(&self, slot: u32) -> wire::Task {
        let tasks = self.tasks();
        tasks
            .into_iter()
            .rfind(|task| task.slot == slot)
            .expect("the slot has a task")
    }

    pub(super) fn service(&self) -> Option<wire::Service> {
        let object = self.state.get(Key::new(wire::Kind::Service, SERVICE))?;
        match &object.object {
            Some(Any::Service(service)) => Some(service.clone()),
            _ => None,
        }
    }

    pub(super) fn revise(&mut self, spec: wire::ServiceSpec) {
        let service = self.service().expect("the service is there");
        if let Ok(revised) = revision::revise(&service, spec, self.now_ms) {
            self.commit(|step| step.replace(revised));
        }
    }

    pub(super) fn change_node(&mut self, node: u8, change: impl FnOnce(&mut wire::Node)) {
        let object = self.state.get(Key::new(wire::Kind::Node, [node; 16]));
        let Some(Any::Node(found)) = object.and_then(|object| object.object.clone()) else {
            return;
        };
        let mut changed = found;
        change(&mut changed);
        self.commit(|step| step.replace(changed));
    }

    /// The node falls silent and is called down.
    pub(super) fn lose(&mut self, node: u8) {
        self.reachable.remove(&node);
        self.change_node(node, |node| node.status = wire::NodeStatus::Down.into());
    }

    pub(super) fn regain(&mut self, node: u8) {
        self.reachable.insert(node);
        self.change_node(node, |node| {
            node.status = wire::NodeStatus::Ready.into();
            node.availability = wire::Availability::Active.into();
        });
    }

    pub(super) fn observe(&mut self, task: &wire::Task, state: TaskState) {
        let report = wire::TaskObserved {
            task_id: task.id.clone(),
            node_id: task.node_id.clone(),
            status: Some(wire::TaskStatus {
                state: state.into(),
                at: self.now_ms,
                exit_code: (state == TaskState::Failed).then_some(1),
                ..Default::default()
            }),
        };
        let rejection = self.apply(Batch {
            preconditions: Vec::new(),
            changes: vec![wire::Change {
                change: Some(Step_::TaskObserved(report)),
            }],
        });
        assert_eq!(rejection, None);
    }

    /// Every reachable worker does the next thing for each of its tasks. A spec whose user is "bad" does not run.
    pub(super) fn work(&mut self) {
        let view = View::of(&self.state);
        let mut reports = Vec::new();
        for task in view.tasks.iter().filter(|task| task::is_live(task)) {
            let Some(node) = task.node_id.first().filter(|node| self.reachable.contains(node)) else {
                continue;
            };
            let bad = view.spec_of(task).is_some_and(|spec| spec.user == "bad");
            let next = match task::state(task) {
                _ if task.desired() >= DesiredState::Shutdown => TaskState::Shutdown,
                TaskState::Assigned if task.start_after > self.now_ms => continue,
                TaskState::Assigned if bad && node % 2 == 0 => TaskState::Rejected,
                TaskState::Assigned => TaskState::Starting,
                TaskState::Starting => TaskState::Running,
                TaskState::Running if bad => TaskState::Failed,
                _ => continue,
            };
            reports.push(((*task).clone(), next));
        }
        for (task, next) in reports {
            self.observe(&task, next);
        }
    }

    /// Leader and workers go on until nothing is left to do but wait; time passes where something waits for it.
    #[track_caller]
    pub(super) fn run(&mut self, rounds: usize) {
        for _ in 0..rounds {
            let before = self.state.digest();
            self.settle();
            self.work();
            if self.state.digest() == before {
                self.now_ms += 1_000;
            }
        }
        self.settle();
    }

    /// (slot, version) of every task that runs and is to run.
    pub(super) fn running(&self) -> Vec<(u32, u64)> {
        let running = self.tasks().into_iter().filter(|task| {
            task::state(task) == TaskState::Running && task.desired() == DesiredState::Running
        });
        running.map(|task| (task.slot, task.spec_version)).collect()
    }

    fn check_invariants(&self) {
        let mut slots: BTreeMap<u32, Vec<wire::Task>> = BTreeMap::new();
        for task in self.tasks() {
            slots.entry(task.slot).or_default().push(task);
        }
        for (slot, tasks) in slots {
            let may_run = tasks.iter().filter(|task| !task::is_over(task)).count();
            let wanted = tasks
                .iter()
                .filter(|task| task::is_live(task) && task.desired() == DesiredState::Running)
                .count();
            assert!(may_run <= 1 && wanted <= 1, "one task in slot {slot}: {tasks:?}");
            assert!(
                tasks.len() <= limits::TASK_HISTORY + 2,
                "slot {slot} keeps {}",
                tasks.len()
            );
            assert!(
                tasks
                    .iter()
                    .all(|task| task.id == task::id(&SERVICE, slot, task.attempt)),
                "ids follow from the place"
            );
        }
        let versions = self.service().map_or(0, |service| service.versions.len());
        assert!(versions <= limits::SPEC_VERSIONS);
    }
}
