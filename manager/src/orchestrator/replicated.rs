//! Compares the slots that each service asks for with the tasks that fill them.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::limits;
use bulkhead_proto::wire::{self, DesiredState};

use super::plan::{Plan, Step};
use super::restart::{self, Next};
use super::{enforcer, task, update};
use crate::scheduler::View;

/// The tasks of a service by slot, oldest attempt first.
pub(super) type Slots<'a> = BTreeMap<u32, Vec<&'a wire::Task>>;

/// Slots of one service that one pass changes; the next takes the rest. Ten thousand slots are ten transactions.
const SLOTS_PER_PASS: usize = 1_024;

/// Fills, replaces, empties and cleans the slots of every service.
pub(super) fn plan(view: &View<'_>, now_ms: i64) -> Plan {
    let mut by_service: BTreeMap<&[u8], Slots<'_>> = BTreeMap::new();
    for task in &view.tasks {
        let slots = by_service.entry(&task.service_id).or_default();
        slots.entry(task.slot).or_default().push(task);
    }
    let mut plan = Plan::default();
    for (id, service) in &view.services {
        let mut slots = by_service.remove(id).unwrap_or_default();
        slots
            .values_mut()
            .for_each(|tasks| tasks.sort_by_key(|task| task.attempt));
        if let Some(pass) = Pass::new(view, service, now_ms) {
            plan.append(pass.run(&slots));
        }
    }
    plan
}

/// One pass over one service.
struct Pass<'a> {
    view: &'a View<'a>,
    service: &'a wire::Service,
    /// The newest spec's number.
    number: u64,
    spec: &'a wire::ServiceSpec,
    now_ms: i64,
}

impl<'a> Pass<'a> {
    fn new(view: &'a View<'a>, service: &'a wire::Service, now_ms: i64) -> Option<Self> {
        let newest = service.versions.last()?;
        Some(Self {
            view,
            service,
            number: newest.number,
            spec: newest.spec.as_ref()?,
            now_ms,
        })
    }

    fn run(&self, slots: &Slots<'_>) -> Plan {
        let mut plan = Plan::default();
        if self.service.removing && slots.is_empty() {
            let mut step = self.step();
            step.delete(self.service);
            plan.steps.push(step);
            return plan;
        }
        let replicas = if self.service.removing {
            0
        } else {
            self.spec.replicas
        };
        let update = match replicas {
            0 if self.service.removing => update::Update::default(),
            _ => update::plan(self.service, self.number, self.spec, slots, self.now_ms),
        };
        update.wake_at_ms.into_iter().for_each(|at| plan.wake_at(at));
        // Surplus first: what is given up frees resources for what is wanted.
        let surplus = || slots.range(replicas.saturating_add(1)..).map(|(_, tasks)| tasks);
        plan.steps
            .extend(surplus().filter_map(|tasks| self.give_up(tasks)));
        let (empty, floor) = emptied(surplus());
        plan.steps
            .extend(self.record(slots, &empty, floor, update.status));
        let wanted = (1..=replicas).filter_map(|slot| match slots.get(&slot) {
            Some(tasks) => self.keep(tasks, update.renew.contains(&slot)),
            None => Some(self.fill(slot)),
        });
        plan.steps.extend(wanted);
        plan.steps.truncate(SLOTS_PER_PASS);
        plan
    }

    /// Every step was planned for the service as it is.
    fn step(&self) -> Step {
        let mut step = Step::default();
        step.unless_changed(self.service);
        step
    }

    /// The first attempt of a slot that has none.
    fn fill(&self, slot: u32) -> Step {
        let attempt = self.service.attempt_floor + 1;
        let mut step = self.step();
        step.create(wire::Task {
            id: task::id(&self.service.id, slot, attempt),
            slot,
            attempt,
            ..self.task(self.number)
        });
        step
    }

    /// What a new task of this spec has in common with every other.
    fn task(&self, spec_version: u64) -> wire::Task {
        wire::Task {
            service_id: self.service.id.clone(),
            spec_version,
            desired: DesiredState::Running.into(),
            desired_since: self.now_ms,
            // The earliest index at which the task can be committed: later starts have later ones.
            fence: self.view.index + 1,
            ..Default::default()
        }
    }

    /// Tasks of a slot that is no longer wanted are to end; ended ones wait for the deletion of the slot.
    fn give_up(&self, tasks: &[&wire::Task]) -> Option<Step> {
        let mut step = self.step();
        let live = tasks.iter().filter(|task| !task::is_over(task));
        for task in live.filter(|task| task.desired() < DesiredState::Remove) {
            step.replace(task::wanted(task, DesiredState::Remove, self.now_ms));
        }
        (!step.changes.is_empty()).then_some(step)
    }

    /// The slot is wanted: its newest task stays, ends, or gets a successor; its history stays short.
    fn keep(&self, tasks: &[&wire::Task], renew: bool) -> Option<Step> {
        let (head, older) = tasks.split_last()?;
        let mut step = self.step();
        for old in older.iter().rev().skip(self.view.history) {
            step.delete(*old);
        }
        if !task::is_live(head) {
            self.succeed_ended(head, renew, &mut step);
        } else if renew && task::is_over(head) {
            // No node had it when it was read; the scheduler may have been quicker.
            step.unless_changed(*head);
            self.succeed(head, self.number, 0, 0, &mut step);
        } else if head.desired() < DesiredState::Shutdown && (renew || enforcer::must_leave(self.view, head))
        {
            step.replace(task::wanted(head, DesiredState::Shutdown, self.now_ms));
        }
        (!step.changes.is_empty()).then_some(step)
    }

    fn succeed_ended(&self, head: &wire::Task, renew: bool, step: &mut Step) {
        if renew || head.desired() == DesiredState::Remove {
            return self.succeed(head, self.number, 0, 0, step);
        }
        // Only the updater moves a slot to another spec, unless the old one is gone.
        let known = self
            .service
            .versions
            .iter()
            .any(|version| version.number == head.spec_version);
        let number = if known { head.spec_version } else { self.number };
        match restart::next(head, self.spec) {
            Next::Refill => self.succeed(head, number, 0, head.restarts, step),
            Next::Restart { delay_ms } => {
                let start_after = self.now_ms.saturating_add(delay_ms);
                self.succeed(head, number, start_after, head.restarts + 1, step);
            }
            Next::Nothing => {}
        }
    }

    fn succeed(&self, head: &wire::Task, number: u64, start_after: i64, restarts: u32, step: &mut Step) {
        if head.desired() < DesiredState::Shutdown {
            step.replace(task::wanted(head, DesiredState::Shutdown, self.now_ms));
        }
        step.create(wire::Task {
            id: task::id(&head.service_id, head.slot, head.attempt + 1),
            slot: head.slot,
            attempt: head.attempt + 1,
            start_after,
            restarts,
            ..self.task(number)
        });
    }

    /// What changes in the service itself, together with the slots that vanish by it.
    fn record(
        &self,
        slots: &Slots<'_>,
        empty: &[&wire::Task],
        floor: u32,
        status: Option<wire::UpdateStatus>,
    ) -> Option<Step> {
        let kept = kept_versions(self.service, self.number, slots);
        let floor = floor.max(self.service.attempt_floor);
        let same = kept.len() == self.service.versions.len() && floor == self.service.attempt_floor;
        if same && status.is_none() && empty.is_empty() {
            return None;
        }
        let mut step = self.step();
        for task in empty {
            if task::is_live(task) {
                step.unless_changed(*task); // no node had it when it was read
            }
            step.delete(*task);
        }
        let mut service = self.service.clone();
        service.versions.retain(|version| kept.contains(&version.number));
        service.attempt_floor = floor;
        service.update = status.or(service.update);
        step.replace(service);
        Some(step)
    }
}

/// The tasks of surplus slots of which nothing can be running, and the highest attempt among them: an attempt is
/// never used twice, since its id is what a worker remembers.
fn emptied<'t, 'a: 't>(surplus: impl Iterator<Item = &'t Vec<&'a wire::Task>>) -> (Vec<&'a wire::Task>, u32) {
    let mut empty: Vec<&wire::Task> = Vec::new();
    for tasks in surplus.filter(|tasks| tasks.iter().all(|task| task::is_over(task))) {
        if empty.len() + tasks.len() > SLOTS_PER_PASS {
            break;
        }
        empty.extend(tasks);
    }
    let floor = empty.iter().map(|task| task.attempt).max().unwrap_or(0);
    (empty, floor)
}

/// The newest spec, those of each slot's newest task, and as many that only history points to as there is room for.
fn kept_versions(service: &wire::Service, newest: u64, slots: &Slots<'_>) -> BTreeSet<u64> {
    let known: BTreeSet<u64> = service.versions.iter().map(|version| version.number).collect();
    let heads = slots.values().filter_map(|tasks| tasks.last());
    let mut kept: BTreeSet<u64> = heads.map(|task| task.spec_version).collect();
    kept.insert(newest);
    let history: BTreeSet<u64> = slots.values().flatten().map(|task| task.spec_version).collect();
    for number in history.into_iter().rev() {
        if kept.len() < limits::SPEC_VERSIONS {
            kept.insert(number);
        }
    }
    kept.intersection(&known).copied().collect()
}
