//! Tasks of a node that is down are lost: their slots are filled elsewhere.

use bulkhead_proto::wire;

use super::plan::{Plan, Step};
use super::task;
use crate::scheduler::View;

/// Calls the live tasks of nodes that are down lost.
pub(super) fn plan(view: &View<'_>, now_ms: i64) -> Plan {
    let mut plan = Plan::default();
    for task in view.tasks.iter().filter(|task| task::is_live(task)) {
        let Some(node) = view.nodes.get(&task.node_id[..]) else {
            continue;
        };
        if node.status() == wire::NodeStatus::Down {
            let why = format!("node {} is down: {}", node.name, node.status_reason);
            let mut step = Step::default();
            // A node that came back meanwhile has lost nothing.
            step.unless_changed(*node);
            step.replace(task::lost(task, &why, now_ms));
            plan.steps.push(step);
        }
    }
    plan
}
