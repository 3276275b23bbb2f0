//! Which running tasks may no longer stay where they are.

use bulkhead_proto::wire;

use crate::scheduler::{Request, View, satisfies_constraints};

/// Whether the task's node is drained, or no longer one that its constraints allow.
pub(super) fn must_leave(view: &View<'_>, task: &wire::Task) -> bool {
    let Some(node) = view.nodes.get(&task.node_id[..]) else {
        return false;
    };
    let allowed = view
        .spec_of(task)
        .is_none_or(|spec| satisfies_constraints(node, &Request::new(&task.service_id, spec)));
    node.availability() == wire::Availability::Drain || !allowed
}
