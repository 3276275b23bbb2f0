//! Places pending tasks: the least loaded node that no filter refuses.

use std::collections::BTreeMap;

use bulkhead_proto::wire;

use super::filter::refusals;
use super::{NodeInfo, Request, View, state};
use crate::orchestrator::{Plan, Step};

/// Tasks that one pass changes. A transaction of this many fits its limits with room; the next pass takes the rest.
pub const PLACEMENTS_PER_PASS: usize = 256;

/// Gives a node to each task that wants one, oldest wish first.
pub fn plan(view: &View<'_>, now_ms: i64) -> Plan {
    let mut infos = NodeInfo::of_workers(view);
    NodeInfo::note_failures(&mut infos, view, now_ms);
    let mut plan = Plan::default();
    for task in waiting(&view.tasks) {
        if plan.steps.len() == PLACEMENTS_PER_PASS {
            break;
        }
        let Some(spec) = view.spec_of(task) else {
            continue;
        };
        let request = Request::new(&task.service_id, spec);
        let mut step = Step::default();
        // What was planned for a task or a node that changed meanwhile is planned again.
        step.unless_changed(task);
        let changed = match place(&mut infos, &request) {
            Ok(node) => {
                step.unless_changed(node);
                assigned(task, node, now_ms)
            }
            Err(reasons) if reasons == task.refusals => continue,
            Err(reasons) => wire::Task {
                refusals: reasons,
                ..task.clone()
            },
        };
        step.replace(changed);
        plan.steps.push(step);
    }
    plan
}

fn waiting<'a>(tasks: &[&'a wire::Task]) -> Vec<&'a wire::Task> {
    let mut waiting: Vec<_> = tasks
        .iter()
        .copied()
        .filter(|task| task.node_id.is_empty() && state(task) <= wire::TaskState::Pending as i32)
        .filter(|task| {
            matches!(
                task.desired(),
                wire::DesiredState::Ready | wire::DesiredState::Running
            )
        })
        .collect();
    waiting.sort_by_key(|task| (task.desired_since, &task.service_id, task.slot, &task.id));
    waiting
}

fn place<'a>(
    infos: &mut BTreeMap<&'a [u8], NodeInfo<'a>>,
    request: &Request<'a>,
) -> Result<&'a wire::Node, Vec<String>> {
    let best = infos
        .values_mut()
        .filter(|info| refusals(info, request).is_empty())
        .min_by_key(|info| info.rank(request.service));
    match best {
        Some(info) => {
            info.add(request);
            Ok(info.node)
        }
        None => Err(super::explain::summary(infos.values(), request)),
    }
}

fn assigned(task: &wire::Task, node: &wire::Node, now_ms: i64) -> wire::Task {
    let mut status = task.status.clone().unwrap_or_default();
    status.state = wire::TaskState::Assigned as i32;
    status.at = now_ms;
    wire::Task {
        node_id: node.id.clone(),
        status: Some(status),
        refusals: Vec::new(),
        ..task.clone()
    }
}
