//! Places pending tasks: the least loaded node that no filter refuses.

use std::collections::BTreeMap;

use bulkhead_proto::wire::{self, change, object, precondition};

use super::filter::refusals;
use super::{NodeInfo, Request, View, spec_of, state};

/// Tasks that one pass changes. A transaction of this many fits its limits with room; the next pass takes the rest.
pub const PLACEMENTS_PER_PASS: usize = 256;

/// What the pass wants committed, and under which conditions.
#[derive(Debug, Default)]
pub struct Plan {
    /// The tasks and nodes as the pass saw them.
    pub preconditions: Vec<wire::Precondition>,
    /// Assignments, and reasons for what found no node.
    pub changes: Vec<wire::Change>,
}

/// Gives a node to each task that wants one, oldest wish first.
pub fn plan(view: View<'_>, now_ms: i64) -> Plan {
    let mut infos = NodeInfo::of_workers(view);
    let mut nodes_used = BTreeMap::new();
    let mut plan = Plan::default();
    for task in waiting(view.tasks) {
        if plan.changes.len() == PLACEMENTS_PER_PASS {
            break;
        }
        let Some(spec) = spec_of(view.services, task) else {
            continue;
        };
        let request = Request::new(&task.service_id, spec);
        let changed = match place(&mut infos, &request) {
            Ok(node) => {
                nodes_used.insert(&node.id, node);
                assigned(task, node, now_ms)
            }
            Err(reasons) if reasons == task.refusals => continue,
            Err(reasons) => wire::Task {
                refusals: reasons,
                ..task.clone()
            },
        };
        plan.preconditions
            .push(unchanged(wire::Kind::Task, &task.id, task.meta.as_ref()));
        plan.changes.push(replace(changed));
    }
    // A node that was drained meanwhile must not receive what was planned for it.
    plan.preconditions.extend(
        nodes_used
            .values()
            .map(|node| unchanged(wire::Kind::Node, &node.id, node.meta.as_ref())),
    );
    plan
}

fn waiting(tasks: &[wire::Task]) -> Vec<&wire::Task> {
    let mut waiting: Vec<_> = tasks
        .iter()
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

fn replace(task: wire::Task) -> wire::Change {
    let object = wire::Object {
        object: Some(object::Object::Task(task)),
    };
    wire::Change {
        change: Some(change::Change::Replace(object)),
    }
}

fn unchanged(kind: wire::Kind, id: &[u8], meta: Option<&wire::Meta>) -> wire::Precondition {
    let is = wire::VersionIs {
        object: Some(wire::ObjectRef {
            kind: kind as i32,
            id: id.to_vec(),
        }),
        version: meta.map_or(0, |meta| meta.version),
    };
    wire::Precondition {
        precondition: Some(precondition::Precondition::VersionIs(is)),
    }
}
