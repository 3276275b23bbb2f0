//! Which workers and standbys are ready or down, written into their records.

use std::collections::BTreeSet;

use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{self, NodeStatus, Role};

use super::liveness::Verdict;
use super::plan::{Plan, Step};
use crate::scheduler::View;

/// Compares the workers' records with who was heard and with the verdict on the silent ones.
pub fn plan(view: &View<'_>, alive: &BTreeSet<NodeId>, verdict: &Verdict, now_ms: i64) -> Plan {
    let mut plan = Plan::default();
    let heard = |node: &&&wire::Node| matches!(node.role(), Role::Worker | Role::Standby);
    for &node in view.nodes.values().filter(heard) {
        let Ok(id) = NodeId::try_from(&node.id[..]) else {
            continue;
        };
        let (status, reason) = match verdict {
            _ if alive.contains(&id) => (NodeStatus::Ready, String::new()),
            Verdict::Down(down) if down.contains(&id) => {
                (NodeStatus::Down, "no manager hears from it".to_owned())
            }
            Verdict::Frozen { silent, .. } if silent.contains(&id) => {
                let reason = "silent, but not called down: many workers fell silent together, so the fault is more \
                              likely between them and the managers";
                (node.status(), reason.to_owned())
            }
            Verdict::Down(_) | Verdict::Frozen { .. } => continue,
        };
        if node.status() != status || node.status_reason != reason {
            let mut step = Step::default();
            step.unless_changed(node);
            let since = if node.status() == status {
                node.status_since
            } else {
                now_ms
            };
            step.replace(wire::Node {
                status: status.into(),
                status_reason: reason,
                status_since: since,
                ..node.clone()
            });
            plan.steps.push(step);
        }
    }
    plan
}
